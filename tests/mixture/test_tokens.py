from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError, StorageError
from sparsify.mixture.tokens import TokenizedSource, ingest, ingest_mixture
from sparsify.recipe import MixtureSection, SourceSection

BOS, EOS = 0, 1  # the fixture's tokenizer numbers its special tokens first


def text_of(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def document_ids(source: TokenizedSource, number: int) -> tuple[list[int], list[bool]]:
    start = int(source.starts[number])
    stop = start + int(source.lengths[number])
    return source.tokens(start, stop).tolist(), source.loss_mask(start, stop).tolist()


def test_a_pretraining_document_is_its_ids_between_bos_and_eos(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    texts = [f"river {n} </s> stone" for n in range(30)]
    source = SourceSection(token_share=1.0, files=[write_jsonl([{"text": t} for t in texts])])
    mixture = MixtureSection(name="m", sources={"web": source}, validation_fraction=0.3)
    web = ingest("web", source, mixture, tokenizer, needed_tokens=10**9, cache_dir=tmp_path / "c")
    assert web.complete
    for number, text in enumerate(texts):
        ids, mask = document_ids(web, number)
        assert (ids[0], ids[-1]) == (BOS, EOS)
        # A text that spells a special token does not become one: the document would end in its middle.
        assert EOS not in ids[1:-1]
        assert text_of(tokenizer, ids[1:-1]) == text
        assert all(mask)


def test_only_answers_and_their_end_carry_loss(
    tokenized: dict[str, TokenizedSource], tokenizer: PreTrainedTokenizerFast
) -> None:
    chats = tokenized["chats"]
    for number in range(chats.num_documents):
        ids, mask = document_ids(chats, number)
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
    source = everything.sources["chats"]
    chats = ingest(
        "chats", source, everything, tokenizer, needed_tokens=10**9, cache_dir=tmp_path / "all"
    )
    assert not chats.has_loss_mask
    assert all(document_ids(chats, 0)[1])


def test_the_tokenizers_own_template_is_used_without_doubled_ends(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    own = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    own.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[Q] {{ m['content'] }} [A]"
        "{% else %} {{ m['content'] }}{{ eos_token }}\n{% endif %}{% endfor %}"
    )
    source = mixture.sources["chats"]
    chats = ingest("chats", source, mixture, own, needed_tokens=10**9, cache_dir=tmp_path / "own")
    ids, mask = document_ids(chats, 7)
    assert text_of(tokenizer, ids).startswith("<s>[Q] question7 about")
    assert ids.count(BOS) == ids.count(EOS) == 1
    answer = text_of(own, [i for i, carries in zip(ids, mask, strict=True) if carries])
    assert answer.startswith(" answer7 is ")
    assert answer.endswith("</s>")


def test_a_second_run_reuses_the_cache(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    calls: list[str] = []

    def read() -> dict[str, TokenizedSource]:
        return ingest_mixture(
            mixture,
            tokenizer,
            budget_tokens=800,
            window_tokens=8,
            cache_dir=tmp_path / "cache",
            on_progress=lambda name, done, needed: calls.append(name),
        )

    first = read()
    assert set(calls) == {"stories", "chats"}
    calls.clear()
    mixture.sources["stories"].token_share, mixture.sources["chats"].token_share = 0.69, 0.31
    started = time.perf_counter()
    second = read()
    assert not calls, "a changed ratio tokenises nothing"
    assert time.perf_counter() - started < 1
    assert {n: s.fingerprint for n, s in first.items()} == {
        n: s.fingerprint for n, s in second.items()
    }


def test_a_larger_need_reads_on_and_a_smaller_one_sees_what_it_saw_before(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparsify.mixture.tokens.BATCH_DOCUMENTS", 4)
    source = mixture.sources["stories"]

    def read(needed_tokens: int) -> TokenizedSource:
        return ingest(
            "stories",
            source,
            mixture,
            tokenizer,
            needed_tokens=needed_tokens,
            cache_dir=tmp_path / "c",
        )

    small = read(300)
    assert 300 <= small.num_train_tokens < 450
    assert not small.complete
    large = read(10**9)
    assert large.complete
    assert large.num_documents == 60
    again = read(300)
    assert again.num_documents == small.num_documents
    stop = int(small.lengths.sum())
    assert np.array_equal(again.tokens(0, stop), large.tokens(0, stop))
    assert np.array_equal(small.tokens(0, stop), large.tokens(0, stop)), (
        "open readers are not disturbed"
    )


@pytest.mark.parametrize("change", ["file", "validation_fraction", "tokenizer"])
def test_the_fingerprint_follows_what_tokens_depend_on(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: str
) -> None:
    source = mixture.sources["stories"]

    def fingerprint() -> str:
        return ingest(
            "stories", source, mixture, tokenizer, needed_tokens=10, cache_dir=tmp_path / "c"
        ).fingerprint

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


def test_a_damaged_cache_is_written_anew(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = mixture.sources["stories"]

    def read() -> TokenizedSource:
        return ingest(
            "stories", source, mixture, tokenizer, needed_tokens=10**9, cache_dir=tmp_path
        )

    before = read()
    shard = tmp_path / before.fingerprint / "tokens-00000.bin"
    whole = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(whole[:100])
    after = read()
    assert shard.read_bytes() == whole
    assert after.num_documents == before.num_documents


def _ingest_in_child(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, cache_dir: Path, results: list[int]
) -> None:
    source = mixture.sources["stories"]
    read = ingest("stories", source, mixture, tokenizer, needed_tokens=10**9, cache_dir=cache_dir)
    results.append(int(read.tokens(0, int(read.lengths.sum())).sum()))


def test_processes_that_ingest_at_once_get_the_same_tokens(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.list()
        children = [
            context.Process(
                target=_ingest_in_child, args=(mixture, tokenizer, tmp_path / "c", results)
            )
            for _ in range(4)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=60)
        assert len(results) == 4
        assert len(set(results)) == 1
    assert not list((tmp_path / "c").glob("*.partial-*"))


def test_duplicates_fall_on_the_same_side(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"text": f"river {n % 20}"} for n in range(60)]
    source = SourceSection(token_share=1.0, files=[write_jsonl(rows)])
    mixture = MixtureSection(name="m", sources={"web": source}, validation_fraction=0.5)
    web = ingest("web", source, mixture, tokenizer, needed_tokens=10**9, cache_dir=tmp_path / "c")
    assert np.array_equal(web.held_out[:20], web.held_out[20:40])
    assert np.array_equal(web.held_out[:20], web.held_out[40:])


@pytest.mark.parametrize(
    ("fraction", "side", "change"), [(1e-9, "held-out", "raise"), (1 - 1e-9, "training", "lower")]
)
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
        ingest(
            "stories",
            mixture.sources["stories"],
            mixture,
            tokenizer,
            needed_tokens=10,
            cache_dir=tmp_path,
        )
    message = str(caught.value)
    assert "Source 'stories'" in message
    assert f"none of its 60 document(s) on the {side} side" in message
    assert f"Add documents, or {change} mixture.validation_fraction." in message


def test_a_tokenizer_without_eos_is_refused(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(MixtureError, match="no end-of-sequence token"):
        ingest_mixture(mixture, endless, budget_tokens=10, window_tokens=4, cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="set cache_dir"):
        ingest_mixture(
            mixture, tokenizer, budget_tokens=10, window_tokens=4, cache_dir=tmp_path / "file"
        )


def test_sources_without_share_are_not_read(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    mixture.instruction_token_share = 0.0
    mixture.sources["chats"].files = ["/nowhere/*.jsonl"]
    read = ingest_mixture(mixture, tokenizer, budget_tokens=10, window_tokens=4, cache_dir=tmp_path)
    assert list(read) == ["stories"]
