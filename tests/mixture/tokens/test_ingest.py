from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import Timeout
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError, StorageError
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.tokens.encoder import Encoder
from sparsify.mixture.tokens.ingest import Ingest, IngestSession, mixture_ingests
from sparsify.mixture.tokens.tokenized_source import TokenizedSource
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection
from tests.mixture.conftest import SMALL, documents_of, ids_of, ingest_of, story

BOS, EOS = 0, 1  # the fixture's tokenizer numbers its special tokens first


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def test_a_pretraining_document_is_its_ids_between_bos_and_eos(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = [f"river {n} </s> stone" for n in range(30)]
    source = SourceSection(token_share=1.0, files=[write_jsonl([{"text": t} for t in texts])])
    mixture = MixtureSection(name="m", sources={"web": source}, validation_fraction=0.3)
    web = ingest_of(mixture, "web", tokenizer, tmp_path / "c").run()
    assert web.cache.complete
    for text, (ids, mask, _) in zip(texts, documents_of(web), strict=True):
        assert (ids[0], ids[-1]) == (BOS, EOS)
        # A text that spells a special token does not become one: the document would end in its middle.
        assert EOS not in ids[1:-1]
        assert text_of(tokenizer, ids[1:-1]) == text
        assert all(mask)


def test_a_long_document_is_tokenised_in_pieces_without_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [story(1, 40) + "\n" + story(2, 200), "short", "no line end " * 30]
    documents = [Document(text, text=text) for text in texts]
    whole, pieces = (
        [ids.tolist() for ids in ids_of(encoder.encode(documents))]
        for encoder in (
            Encoder("web", tokenizer, responses_only=False),
            Encoder("web", tokenizer, responses_only=False, piece_characters=64),
        )
    )
    for text, ids in zip(texts, pieces, strict=True):
        assert text_of(tokenizer, ids) == f"<s>{text}</s>"
    assert pieces[1] == whole[1]


def test_only_responses_and_their_end_carry_loss(
    tokenized: dict[str, TokenizedSource], tokenizer: PreTrainedTokenizerFast
) -> None:
    for number, (ids, mask, _) in enumerate(documents_of(tokenized["chats"])):
        with_loss = [i for i, carries in zip(ids, mask, strict=True) if carries]
        without = [i for i, carries in zip(ids, mask, strict=True) if not carries]
        assert with_loss[-1] == EOS
        assert text_of(tokenizer, with_loss).startswith(f"answer{number} is ")
        prompt = text_of(tokenizer, without)
        assert prompt.startswith(f"<s><|im_start|>user\nquestion{number} about")
        assert prompt.endswith("<|im_start|>assistant\n")


def test_instruction_loss_all_masks_nothing(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    everything = replace(mixture, instruction_loss="all")
    chats = ingest_of(everything, "chats", tokenizer, tmp_path / "all").run()
    assert not chats.info.has_loss_mask
    assert all(all(mask) for _, mask, _ in documents_of(chats))


def test_the_tokenizers_template_is_used_without_doubled_ends(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    own.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [A]"
        "{% else %} {{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    )
    chats = ingest_of(mixture, "chats", own, tmp_path / "own").run()
    ids, mask, _ = documents_of(chats)[7]
    assert text_of(tokenizer, ids).startswith("<s>[Q] question7 about")
    assert ids.count(BOS) == ids.count(EOS) == 1
    answer = text_of(own, [i for i, carries in zip(ids, mask, strict=True) if carries])
    assert answer.startswith(" answer7 is ")
    assert answer.endswith("</s>")


def test_a_second_run_reuses_the_cache(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    calls: list[str] = []

    def read() -> dict[str, str]:
        ingests = mixture_ingests(
            mixture,
            tokenizer,
            train_tokens={"stories": 560, "chats": 240},
            held_out_tokens=8,
            sequence_length=8,
            cache_dir=tmp_path / "cache",
        )
        sources = [i.run(lambda name, done, needed: calls.append(name)) for i in ingests.values()]
        return {source.name: source.fingerprint for source in sources}

    first = read()
    assert set(calls) <= {"stories", "chats"}
    calls.clear()
    mixture.sources["stories"].token_share, mixture.sources["chats"].token_share = 0.69, 0.31
    started = time.perf_counter()
    assert read() == first, "a changed ratio tokenises nothing"
    assert not calls
    assert time.perf_counter() - started < 1


def test_a_larger_need_continues_and_a_smaller_one_sees_the_same_as_before(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def read(train_tokens: int) -> TokenizedSource:
        return ingest_of(mixture, "stories", tokenizer, tmp_path / "c", train_tokens, 1, SMALL).run()

    small = read(300)
    assert 300 <= small.num_train_tokens < 345, "the document that meets the need is the last"
    assert not small.cache.complete
    before, files = training_ids(small), shard_files(small)
    large = read(10**9)
    assert large.cache.complete
    assert len(documents_of(large)) == 60
    assert shard_files(large).items() >= files.items(), "what was tokenised is not tokenised again"
    again = read(300)
    assert training_ids(again) == training_ids(small) == before, "open readers are not disturbed"
    assert training_ids(large)[: len(before)] == before


def training_ids(source: TokenizedSource) -> list[list[int]]:
    """Ids of every training document that the run sees."""
    found = []
    for number in range(source.num_shards):
        documents = source.train_documents(number)
        for start, length in zip(documents.starts, documents.lengths, strict=True):
            found.append(documents.shard.tokens[start : start + length].tolist())
    return found


def shard_files(source: TokenizedSource) -> dict[str, int]:
    """When each file of a closed shard was written."""
    closed = [f"-{number:05d}." for number in range(source.cache.num_closed)]
    files = source.cache.folder.iterdir()
    return {path.name: path.stat().st_mtime_ns for path in files if any(number in path.name for number in closed)}


def test_a_killed_ingest_resumes_where_it_was(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    straight = documents_of(ingest_of(mixture, "stories", tokenizer, tmp_path / "straight", sizes=SMALL).run())
    task = ingest_of(mixture, "stories", tokenizer, tmp_path / "killed", sizes=SMALL)

    def tokenize_and_die() -> None:
        with IngestSession(task) as ingesting:
            for _ in range(7):
                ingesting.step()
            os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=tokenize_and_die)
    child.start()
    child.join(timeout=60)
    assert child.exitcode == -signal.SIGKILL
    left = task.open()
    assert left.cache.num_closed > 0
    files = shard_files(left)
    again = task.run()
    assert documents_of(again) == straight
    assert shard_files(again).items() >= files.items()
    assert not list(again.cache.folder.glob("*.partial*")) or again.cache.complete


def test_only_one_process_at_a_time_writes_a_source(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    task = ingest_of(mixture, "stories", tokenizer, tmp_path / "c")
    with IngestSession(task), pytest.raises(Timeout), IngestSession(task, wait=False):
        pass


@pytest.mark.parametrize("change", ["file", "validation_fraction", "tokenizer"])
def test_the_fingerprint_changes_with_what_tokens_depend_on(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: str
) -> None:
    source = mixture.sources["stories"]

    def fingerprint() -> str:
        return ingest_of(mixture, "stories", tokenizer, tmp_path / "c").open().fingerprint

    before = fingerprint()
    if change == "file":
        path = Path((source.files or [])[0])
        path.write_text(path.read_text() + '{"text": "one more"}\n')
    elif change == "validation_fraction":
        mixture.validation_fraction = 0.25
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token="</s>", eos_token="<s>"
        )
    assert fingerprint() != before


def test_another_share_or_cap_does_not_tokenise_again(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def fingerprint() -> str:
        return ingest_of(mixture, "stories", tokenizer, tmp_path / "c").open().fingerprint

    before, source = fingerprint(), mixture.sources["stories"]
    source.token_share, source.max_epochs, source.when_exhausted = 0.1, 2.0, "redistribute"
    assert fingerprint() == before


@pytest.mark.parametrize("number", [0, 2])
def test_a_damaged_shard_and_those_after_it_are_written_again(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, number: int
) -> None:
    task = ingest_of(mixture, "stories", tokenizer, tmp_path, sizes=SMALL)
    before = documents_of(task.run())
    shard = task.open().cache.folder / f"tokens-{number:05d}.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    assert task.open().cache.num_closed == number
    assert documents_of(task.run()) == before
    assert shard.read_bytes() == whole


def _ingest_in_child(task: Ingest, results: list[int]) -> None:
    results.append(sum(sum(ids) for ids, _, _ in documents_of(task.run())))


def test_concurrent_ingests_give_the_same_tokens(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    task = ingest_of(mixture, "stories", tokenizer, tmp_path / "c")
    with context.Manager() as manager:
        results = manager.list()
        children = [context.Process(target=_ingest_in_child, args=(task, results)) for _ in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=60)
        assert len(results) == 4
        assert len(set(results)) == 1


def test_duplicates_fall_on_the_same_side(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"text": f"river {n % 20}"} for n in range(60)]
    source = SourceSection(token_share=1.0, files=[write_jsonl(rows)])
    mixture = MixtureSection(name="m", sources={"web": source}, validation_fraction=0.5, remove_duplicates=False)
    web = ingest_of(mixture, "web", tokenizer, tmp_path / "c").run()
    sides = [held_out for _, _, held_out in documents_of(web)]
    assert sides[:20] == sides[20:40] == sides[40:]


def test_duplicates_are_dropped_even_after_a_pause(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"text": story(n % 20, 9)} for n in range(60)]
    source = SourceSection(token_share=1.0, files=[write_jsonl(rows)])
    mixture = MixtureSection(name="m", sources={"web": source}, validation_fraction=0.3)
    for need in (100, 250, 10**9):
        web = ingest_of(mixture, "web", tokenizer, tmp_path / "c", need, 1, SMALL).run()
    assert web.cache.complete
    documents = [tuple(ids) for ids, _, _ in documents_of(web)]
    assert len(documents) == len(set(documents)) == 20


def test_an_overlap_with_an_evaluation_set_is_dropped_and_listed(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    item = " ".join(f"word{n}" for n in range(20))
    rows = [{"text": story(n, 9)} for n in range(30)] + [{"text": f"River. {item} stone"}]
    source = SourceSection(token_share=1.0, files=[write_jsonl(rows)])
    (tmp_path / "eval.jsonl").write_text(json.dumps({"question": item}))
    mixture = MixtureSection(
        name="m",
        sources={"web": source},
        validation_fraction=0.3,
        decontaminate_against=[str(tmp_path / "eval.jsonl")],
    )
    web = ingest_of(mixture, "web", tokenizer, tmp_path / "c").run()
    assert len(documents_of(web)) == 30
    report = (web.cache.folder / "contamination.json").read_text()
    assert "word0 word1" in report


@pytest.mark.parametrize(("fraction", "side", "change"), [(1e-9, "held-out", "raise"), (1 - 1e-9, "training", "lower")])
def test_a_split_that_leaves_one_side_empty_says_what_to_change(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    fraction: float,
    side: str,
    change: str,
) -> None:
    mixture.validation_fraction = fraction
    with pytest.raises(MixtureError) as caught:
        ingest_of(mixture, "stories", tokenizer, tmp_path).run()
    message = str(caught.value)
    assert "Source 'stories'" in message
    assert f"none of its 60 document(s) on the {side} side" in message
    assert f"Add documents, or {change} mixture.validation_fraction." in message


def test_a_tokenizer_without_eos_is_refused(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(MixtureError, match="no end-of-sequence token"):
        mixture_ingests(
            mixture,
            endless,
            train_tokens={"stories": 10},
            held_out_tokens=1,
            sequence_length=4,
            cache_dir=tmp_path,
        )


def test_a_cache_that_cannot_be_written_is_a_user_error(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written: a file is there"):
        ingest_of(mixture, "stories", tokenizer, tmp_path / "file").run()
