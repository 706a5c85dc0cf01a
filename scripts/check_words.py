"""Finds words that this project does not use: house dialect where the field has a term (docs/glossary.md).

    python scripts/check_words.py [PATH ...]

Reads Markdown, templates, YAML comments, and in Python files the docstrings, comments and messages. Exits with 1 and
prints every line with the words to use instead. A line that must keep a word says so: `words: ok` in a comment on it.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

WORDS = {
    r"(?<![Tt]here )(?<!that )\b(is|are|was) no (?!longer|more|less|other|need|room|way|matter)": "is not a …",
    r"\b(goes|go|went|going) on\b": "continue, resume",
    r"\banew\b": "again, new",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bbeside\b": "next to, in addition to",
    r"\b(stands|stood)\b": "is, is written",
    r"\btold\b": "says, gets",
    r"\bask(s|ed|ing)? (a|the|of|its|this|that) (suite|model|question)": "run, evaluate",
    r"\basked\b(?! question)": "requested",
    r"\blets? go\b": "closes, releases",
    r"\bamiss\b": "error",
    r"\bmeanwhile\b": "in the meantime",
    r"\bwhereof\b": "of which",
    r"\btill\b": "until",
    r"\bdear(er|est)\b": "more expensive",
    r"\bhungry\b|\bstarv(e|es|ing)\b": "under-utilised",
    r"\bdirty?\b": "invalid rows",
    r"\bquarantine": "invalid rows",
    r"\b(left|leaves?|leaving) out\b": "dropped, skipped",
    r"\bgentle\b": "blended",
    r"\bswap(s|ped|ping)?\b": "activation replacement",
    r"\banneal\w*": "activation blending",
    r"(?<!sliding )(?<!sliding-)(?<!attention )\bwindows?\b": "sequence",
    r"\barms?\b": "variant",
    r"\bdense control\b|\bcontrol run\b": "dense baseline",
    r"\bjudg(e|es|ed|ing|ement|ements)\b": "evaluate",
    r"\bpressure\b": "penalty, sparsity regularisation",
    r"\bmiddle half\b": "interquartile range",
    r"\belse(?=[.;:)]|$)": "otherwise",
    r"\bshall\b": "must, should",
    r"\breckon(s|ed|ing)?\b": "compute, count",
    r"\bbrings? home\b": "returns",
    r"\blast words\b": "error message",
    r"\bwish(es|ed)? (to|for)\b": "want",
    r"\bcareless\b": "say what happened",
    r"\bcannot be\.": "name the bad value",
    r"\bof late\b": "recently",
    r"\bby heart\b": "memorised",
    r"\bsay good-?bye\b": "acknowledge",
    r"\blooks? into\b": "reads",
    r"\bfade(s|d)?\b|\bfading\b": "blend",
    r"\bthe likeliest\b": "the most likely",
    r"\bhereby\b|\bthereby\b|\bwherein\b": "plain English",
    r"\bhand(ed|s)? on\b": "passed, redistributed",
}
PATTERNS = [(re.compile(pattern, re.IGNORECASE), use) for pattern, use in WORDS.items()]
ALLOWED = "words: ok"
SKIPPED = {"docs/glossary.md", "scripts/check_words.py", "CHANGELOG.md"}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a file that a person reads as sentences, with their numbers."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _python(text)
    elif path.suffix == ".yaml":
        for number, line in enumerate(text.split("\n"), 1):
            if "#" in line:
                yield number, line[line.index("#") :]
    else:
        yield from enumerate(text.split("\n"), 1)


def _python(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        # A string with a blank is a sentence or a part of one; without it is a key or a name.
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            for offset, line in enumerate(node.value.split("\n")):
                yield node.lineno + offset, line


def main(arguments: list[str]) -> int:
    """Prints what was found; returns the exit code."""
    listed = subprocess.run(["git", "ls-files", *arguments], capture_output=True, text=True, check=True)
    found = 0
    for name in listed.stdout.split("\n"):
        path = Path(name)
        suffixes = {".md", ".py", ".yaml", ".j2"}
        if path.suffix not in suffixes or name in SKIPPED or name.startswith("tests/"):
            continue
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in prose(path):
            if ALLOWED in lines[number - 1]:
                continue
            for pattern, use in PATTERNS:
                for match in pattern.finditer(line):
                    found += 1
                    print(f"{path}:{number}: '{match.group(0).strip()}' -> {use}: {line.strip()}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
