"""Conversations as text, and where the answers are in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

from sparsify.mixture.sources.documents import Message, message_text
from sparsify.mixture.tokens.chat_marks import (
    CharacterSpan,
    common_end,
    common_start,
    has_marks,
    mark,
    marked_at,
    split_blanks,
    unmarked,
)
from sparsify.mixture.tokens.chat_template import ChatTemplate, ChatTemplateError, Spans, Tools, Turns

SYSTEM_ROLES = ("system", "developer")
TRIED_CHARACTERS = 16
"""Characters after which the search for the part of an answer that a template keeps ends."""


@dataclass(frozen=True)
class WrittenChat:
    """A conversation as text.

    Attributes:
        answers: What the model has to write: the answers with their ends, and what introduces a tool call or reasoning.
        dropped_turns: How many turns of each role are not in the text; `answer` for those of the assistant.
    """

    text: str
    answers: Spans
    dropped_turns: dict[str, int] = field(default_factory=dict)


class ChatWriter:
    """Writes conversations by a chat template, and finds the answers in what it wrote.

    With `{% generation %}` the template says itself where the answers are. Otherwise marks show where it wrote each text
    (`chat_marks`). A template may move, merge, trim or drop turns: only what is found is an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self._template = ChatTemplate(tokenizer, template)

    def write(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> WrittenChat:
        """Raises ChatTemplateError if the template fails, or drops a tool call or every answer."""
        best, failure = None, None
        for turns in self._forms(messages):
            try:
                layout = _Layout(self._template, turns, list(tools) if tools else None)
            except ChatTemplateError as error:
                failure = failure or error
                continue
            if best is None or layout.num_missing < best.num_missing:
                best = layout
            if not best.num_missing:
                break
        if best is None:
            assert failure is not None
            raise failure
        return best.written()

    def _forms(self, messages: Sequence[Message]) -> Iterator[Turns]:
        """The conversation in the forms that chat templates expect, the usual one first."""

        def turn(message: Message, role: str, no_content: str | None) -> Message:
            content = message["content"]
            if message.get("tool_calls") and not content:
                content = no_content
            elif self._template.ends.takes_parts:
                content = [{"type": "text", "text": content}]
            return {**message, "role": role, "content": content}

        # "developer" is the newer name of the system prompt, which most templates do not know.
        roles = ["developer", "system"] if any(one["role"] == "developer" for one in messages) else ["developer"]
        calls = any(one.get("tool_calls") and not one["content"] for one in messages)
        for no_content in ("", None) if calls else ("",):
            for role in roles:
                yield [turn(one, role if one["role"] == "developer" else one["role"], no_content) for one in messages]


class _Layout:
    """A rendered conversation, and where its turns are in the text.

    Attributes:
        places: Places of each turn's texts; empty if the template does not write the turn, or changes it.
    """

    def __init__(self, template: ChatTemplate, turns: Turns, tools: Tools | None) -> None:
        self._template, self.turns, self._tools = template, turns, tools
        if any(has_marks(message_text({**turn, "content": _text_of(turn)})) for turn in turns):
            raise ChatTemplateError("a turn has characters of a private Unicode plane, which mark the answers")
        rendered = template.render(turns, tools, blocks=template.has_blocks)
        self.text, self.blocks = rendered.text, rendered.blocks
        self.places = self._located(turns, self.text)
        if turns[-1]["role"] == "assistant" and self._missing_systems(self.places, self.text):
            self._keep_system()

    @property
    def num_missing(self) -> int:
        """Turns that are not in the text, and contents of None that were written as the word."""
        missing = sum(self._dropped_turns().values())
        if any(turn["content"] is None for turn in self.turns):
            missing += max(0, self.text.count("None") - sum(_text_of(turn).count("None") for turn in self.turns))
        return missing

    def _dropped_turns(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for turn, places in zip(self.turns, self.places, strict=True):
            core, role = _text_of(turn).strip(), turn["role"]
            empty = not core and not turn.get("tool_calls")
            if not places and not empty and (role == "assistant" or core not in self.text):
                counts["answer" if role == "assistant" else role] += 1
        if counts["answer"] and self.blocks_hold:
            # An answer that the template changes has a block, but no place.
            known = [place for places in self.places for place in places]
            changed = sum(not any(_overlap(block, place) for place in known) for block in self.blocks)
            counts["answer"] = max(0, counts["answer"] - changed)
        return +counts

    def _located(self, turns: Turns, text: str, *, prompt: bool = False) -> list[Spans]:
        marked = mark(turns)
        plain, places = marked.spans(self._attempt(marked.turns, prompt) or "")
        if plain != text:
            # The template looks at the texts: mark one turn at a time.
            places = [self._one_place(turns, text, number, prompt) for number in range(len(turns))]
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant" and not places[number] and _text_of(turn).strip():
                places[number] = self._kept_part(turns, text, number, prompt)
        return places

    def _attempt(self, turns: Turns, prompt: bool) -> str | None:
        try:
            return self._template.render(turns, self._tools, prompt=prompt).text
        except ChatTemplateError:
            return None

    def _one_place(self, turns: Turns, text: str, number: int, prompt: bool) -> Spans:
        marked = mark([turns[number]])
        changed = [*turns[:number], *marked.turns, *turns[number + 1 :]]
        plain, places = marked.spans(self._attempt(changed, prompt) or "")
        return places[0] if plain == text else []

    def _kept_part(self, turns: Turns, text: str, number: int, prompt: bool) -> Spans:
        """Place of the part of an answer that the template keeps: without its reasoning, for example."""
        core = _text_of(turns[number]).strip()

        def edges(first: int | None, last: int | None) -> tuple[int | None, int | None]:
            rendered = self._attempt(marked_at(turns, number, first, last), prompt)
            plain, marks = unmarked(rendered or "")
            if plain != text:
                return None, None
            begins, ends = marks.get(0, []), marks.get(1, [])
            return (begins[0] if len(begins) == 1 else None), (ends[0] if len(ends) == 1 else None)

        end = edges(None, len(core))[1]
        if end is not None:
            kept = common_end(core, text[:end])
            if kept == len(core):
                return [(end - kept, end)]
            tried = [(first, len(core)) for first in range(len(core) - kept, len(core))]
        else:
            begin = edges(0, None)[0]
            if begin is None:
                return []
            kept = common_start(core, text[begin:])
            tried = [(0, last) for last in range(kept, 0, -1)]
        for first, last in tried[:TRIED_CHARACTERS]:
            begin, end = edges(first, last)
            if begin is not None and end is not None and text[begin:end] == core[first:last]:
                return [(begin, end)]
        return []

    def _missing_systems(self, places: list[Spans], text: str) -> list[int]:
        return [
            number
            for number, turn in enumerate(self.turns[: len(places)])
            if turn["role"] in SYSTEM_ROLES
            and not places[number]
            and _text_of(turn).strip()
            and _text_of(turn).strip() not in text
        ]

    def _keep_system(self) -> None:
        """Writes the system prompt where the template puts it for the last answer: some templates move it into the last
        turn, but only if that is the user's.
        """
        before = self.turns[:-1]
        try:
            prompt = self._template.render(before, self._tools, prompt=True, blocks=self._template.has_blocks)
        except ChatTemplateError:
            return
        places = self._located(before, prompt.text, prompt=True)
        if len(self._missing_systems(places, prompt.text)) == len(self._missing_systems(self.places, self.text)):
            return
        if not (self.places[-1] and places[-1] and self.places[-2]):
            return
        tail = prompt.text[max(last for _, last in places[-1]) :]
        cut = max(last for _, last in self.places[-2])
        if not self.text.startswith(tail, cut) or cut + len(tail) > self.places[-1][0][0]:
            return
        cut += len(tail)
        moved = len(prompt.text) - cut
        last = [(first + moved, end + moved) for first, end in self.places[-1]]
        blocks = [(first + moved, end + moved) for first, end in self.blocks if first >= cut]
        self.text = prompt.text + self.text[cut:]
        self.places, self.blocks = [*places, last], [*prompt.blocks, *blocks]

    def written(self) -> WrittenChat:
        dropped_turns = self._dropped_turns()
        for number, (turn, places) in enumerate(zip(self.turns, self.places, strict=True), start=1):
            if turn.get("tool_calls") and not places and dropped_turns["answer"]:
                raise ChatTemplateError(
                    f"it does not write the tool calls of turn {number}; mixture.chat_template sets another"
                )
        answers, text = self._answers()
        if not answers:
            raise ChatTemplateError(self._why_no_answer())
        text = text.rstrip()
        answers = [(first, min(last, len(text))) for first, last in answers if first < len(text)]
        return WrittenChat(text, answers, dict(dropped_turns))

    def _why_no_answer(self) -> str:
        if self._attempt(self.turns, False) != self._attempt(self.turns, False):
            return "it writes another text each time, so where it writes the answers cannot be known"
        marked = mark(self.turns)
        _, marks = unmarked(self._attempt(marked.turns, False) or "")
        answers = [number for number, turn in enumerate(marked.owners) if self.turns[turn]["role"] == "assistant"]
        if any(len(marks.get(2 * number, [])) > 1 for number in answers):
            return "it writes an answer more than once, so which of them the model has to write cannot be known"
        return "none of the answers is in the text that it writes"

    def _answers(self) -> tuple[Spans, str]:
        if self.blocks_hold:
            return [block for block in self.blocks if block[0] < block[1]], self.text
        found: Spans = []
        text = self.text
        for number, turn in enumerate(self.turns):
            if turn["role"] != "assistant" or not self.places[number]:
                continue
            spans, is_end = self._answer(number)
            found += spans
            if is_end:
                text = text[: spans[-1][1]]
        return sorted(found), text

    @cached_property
    def blocks_hold(self) -> bool:
        """Whether the {% generation %} blocks hold every answer that was found, and no other turn."""
        for turn, places in zip(self.turns, self.places, strict=True):
            inside = [any(_overlap(place, block) for block in self.blocks) for place in places]
            if (turn["role"] == "assistant" and places and not any(inside)) or (
                turn["role"] != "assistant" and any(inside)
            ):
                return False
        return any(first < last for first, last in self.blocks)

    def _answer(self, number: int) -> tuple[Spans, bool]:
        """Spans of one answer, and whether the text ends with it."""
        places = sorted(self.places[number])
        first, last = places[0][0], max(end for _, end in places)
        others = [place for turn, found in enumerate(self.places) if turn != number for place in found]
        if any(_overlap((first, last), other) for other in others):
            return places, False  # another turn is written in between
        before = max((end for _, end in others if end <= first), default=0)
        after = min((begin for begin, _ in others if begin >= last), default=len(self.text))
        is_last = after == len(self.text) and number == len(self.turns) - 1
        end = last + self._closing(number, self.text[last:after], is_last)
        # A prompt that the template adds after the last answer does not belong to the text.
        return [(self._beginning(number, before, first), end)], is_last and all(self.places)

    def _beginning(self, number: int, before: int, first: int) -> int:
        """Where the model begins to write: after the prompt for an answer, if the template shows its end."""
        turn, gap, prompt = self.turns[number], self.text[before:first], self._template.ends.prompt
        lead, core, _ = split_blanks(_text_of(turn))
        if prompt:
            at = gap.rfind(prompt)
            return first if at < 0 else before + at + len(prompt)
        whole = self.text.startswith(core, first) and bool(core)
        if not gap or (whole and not gap[-1].isspace()):
            return first
        tail = self._tail(number, prompt=True)
        if tail is not None and gap.startswith(tail) and (not whole or gap[len(tail) :].isspace()):
            return before + len(tail)
        return first - len(lead) if lead and gap.endswith(lead) else first

    def _tail(self, number: int, *, prompt: bool) -> str | None:
        """What the template writes after the last of the first turns, with the beginning of an answer for a `prompt`."""
        marked = mark(self.turns[:number])
        if not marked.owners:
            return None
        plain, places = marked.spans(self._attempt(marked.turns, prompt) or "")
        return plain[max(end for _, end in places[-1]) :] if places[-1] else None

    def _closing(self, number: int, gap: str, is_last: bool) -> int:
        """Characters after an answer that end it."""
        _, _, trail = split_blanks(_text_of(self.turns[number]))
        ends = self._template.ends
        if self.turns[number].get("tool_calls"):
            # What follows the last text of a call are its brackets.
            tail = self._tail(number + 1, prompt=False)
            if tail and gap.startswith(tail):
                return len(tail)
            if ends.closing and ends.closing in gap:
                return gap.index(ends.closing) + len(ends.closing)
        if is_last and ends.last is None:
            return len(gap)
        closing = ends.last if is_last and ends.last else ends.closing
        for end in (closing, trail + closing):
            if end and gap.startswith(end):
                return len(end)
        return len(trail) if gap.startswith(trail) else 0


def _text_of(turn: Message) -> str:
    content = turn["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _overlap(one: CharacterSpan, other: CharacterSpan) -> bool:
    return one[0] < other[1] and other[0] < one[1]
