"""A model whose neurons stay in a file decodes as in memory, to the bit, within its limit, and says what went wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.errors import ModelError, RunError, StorageError
from sparsify.models import (
    SparseMistralConfig,
    SparseMistralForCausalLM,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
)
from sparsify.runtime import Acceleration, Predictor, accelerate
from sparsify.runtime.memory_plan import plan_memory, smallest_memory
from sparsify.runtime.neuron_file import NeuronFile, neuron_layout, open_neurons
from sparsify.runtime.offload import parse_memory
from sparsify.runtime.stored_weights import StoredModel
from sparsify.runtime.weights import LayerPredictors
from tests.runtime.test_step import fill_masks

MEMORY = "8GB"
"""More than a small model needs: `neuron_memory` limits what its neurons have."""
SMALLEST = 1
HIDDEN, NEURONS = 64, 512
PROMPT = torch.arange(3, 15)[None]


@pytest.fixture(autouse=True)
def _own_files(native: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path_factory.getbasetemp() / "neurons"))


def saved(folder: Path, *, experts: int = 0, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> Path:
    shape: dict[str, Any] = {
        "vocab_size": 90,
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": None,
        "ffn_activation": "drelu",
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    if experts:
        model: Any = SparseMixtralForCausalLM(SparseMixtralConfig(**shape | {"num_local_experts": experts} | fields))
    else:
        model = SparseMistralForCausalLM(SparseMistralConfig(**shape | fields))
    fill_masks(model)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    by_rank = {
        "method": "chosen",
        "sites": {"gate": {"rule": "top_k"}, "inter": {"rule": "threshold", "per": "channel"}},
    }
    on_up = {"method": "chosen", "sites": {"up": {"rule": "threshold", "per": "channel"}}}
    routed = {"method": "lte", "sites": {"group": {"rule": "router", "group_size": 16}}}
    by_proxy = {"method": "prox", "sites": {"inter": {"rule": "threshold", "by_proxy": True}}}
    return {
        "dense": saved(root / "dense"),
        "tied": saved(root / "tied", tie_word_embeddings=True, dtype=torch.float32),
        "experts": saved(root / "experts", experts=4),
        "by_rank": saved(root / "by_rank", sparsification=by_rank, ffn_activation="swiglu"),
        "on_up": saved(root / "on_up", sparsification=on_up, ffn_activation="swiglu"),
        "routed": saved(root / "routed", sparsification=routed, ffn_activation="swiglu"),
        "by_proxy": saved(root / "by_proxy", sparsification=by_proxy, ffn_activation="swiglu"),
    }


def load(folder: Path) -> Any:
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    of_kind: Any = SparseMixtralForCausalLM if kind == "sparse_mixtral" else SparseMistralForCausalLM
    model = of_kind.from_pretrained(folder, dtype="auto").eval()
    model.set_experts_implementation("eager") if kind == "sparse_mixtral" else None
    return model


def predictors_of(model: Any, _stored: Any = None) -> LayerPredictors:
    """Random ones, that miss some neurons."""
    generator = torch.Generator().manual_seed(1)
    experts = getattr(model.config, "num_local_experts", None) or 1
    return LayerPredictors(
        "normed",
        [
            [
                Predictor(
                    torch.randn(8, HIDDEN, generator=generator).to(model.dtype),
                    torch.randn(NEURONS, 8, generator=generator).to(model.dtype),
                    2.0,
                )
                for _ in range(experts)
            ]
            for _ in range(model.config.num_hidden_layers)
        ],
    )


@torch.no_grad()
def decoded(model: Any, tokens: int = 12) -> torch.Tensor:
    """The logits of a prompt and of each token after it, and so every choice of a greedy text."""
    output = model(PROMPT, use_cache=True)
    logits = [output.logits[:, -1]]
    for _ in range(tokens):
        output = model(logits[-1].argmax(-1)[:, None], past_key_values=output.past_key_values)
        logits.append(output.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("kind", "weights", "predicted", "policy", "prefetch"),
    [
        ("dense", "stored", False, "lru", "none"),
        ("dense", "stored", False, "no_cache", "persistence"),
        ("dense", "stored", True, "lfu", "frequency"),
        ("dense", "int8", False, "static", "none"),
        ("dense", "int4", True, "lru", "persistence"),
        ("tied", "stored", False, "lru", "persistence"),
        ("tied", "int4", False, "lru", "none"),
        ("experts", "stored", False, "lru", "persistence"),
        ("experts", "stored", True, "static", "persistence"),
        ("experts", "int4", False, "lfu", "none"),
        ("experts", "int8", False, "no_cache", "frequency"),
        ("by_rank", "stored", False, "lru", "none"),
        ("on_up", "stored", False, "lru", "persistence"),
        ("by_proxy", "stored", False, "lru", "none"),
        ("routed", "stored", False, "lfu", "none"),
    ],
)
def test_it_decodes_as_in_memory_to_the_bit(
    folders: dict[str, Path], kind: str, weights: str, predicted: bool, policy: str, prefetch: Any
) -> None:
    model = load(folders[kind])
    own = predictors_of(model) if predicted else None
    accelerate(model, weights=weights, predictors=own, keep_weights=False)
    made = accelerate(
        folders[kind],
        weights=weights,
        predictors=predictors_of if predicted else None,
        memory=MEMORY,
        neuron_memory=SMALLEST,
        policy=policy,
        prefetch=prefetch,
    )
    wanted = decoded(model)
    assert wanted.isfinite().all()
    assert torch.equal(decoded(made.model), wanted)
    first = made.neurons
    assert first is not None
    # Of the smallest memory, experts and tokens that need nearly all neurons leave nothing to keep.
    leaves_nothing = kind in ("on_up", "routed") or (kind == "experts" and not predicted)
    assert 0 < first.hits < first.needed or policy == "no_cache" or leaves_nothing
    # A second text from the same memory: what a prompt left there is not taken for neurons.
    assert torch.equal(decoded(made.model), wanted)


@pytest.mark.parametrize(("prefetch", "kind"), [("cluster", "dense"), ("low_rank", "dense"), ("low_rank", "tied")])
def test_guesses_fitted_to_the_prompt_change_no_bit(folders: dict[str, Path], prefetch: Any, kind: str) -> None:
    """And they are better than chance: layers whose neurons repeat are guessed from the layer before."""
    made = offloaded(folders[kind], prefetch=prefetch, policy="lru")
    plain = offloaded(folders[kind], policy="lru")
    prompt = torch.arange(3, 83).repeat(2)[None]
    logits = []
    for one in (made, plain):
        with torch.no_grad():
            output = one.model(prompt, use_cache=True)
            one.reset()
            own = []
            for token in (5, 11, 40):
                output = one.model(torch.tensor([[token]]), past_key_values=output.past_key_values)
                own.append(output.logits)
        logits.append(torch.cat(own))
    assert torch.equal(*logits)
    reads, without = made.neurons, plain.neurons
    assert reads is not None
    assert without is not None
    assert reads.ahead > 0
    assert reads.stall_bytes < without.stall_bytes
    layout = made.offloaded.cache.layout  # pyright: ignore[reportOptionalMemberAccess]
    chance = without.needed / (3 * layout.blocks * layout.neurons)
    assert reads.ahead / (reads.ahead + reads.over_fetched) > chance


def test_guesses_need_a_prompt_and_layers_in_order(folders: dict[str, Path]) -> None:
    made = offloaded(folders["dense"], prefetch="low_rank")
    decoded(made.model, 3)  # after twelve tokens nothing is fitted
    assert made.neurons.ahead == 0  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ModelError, match="which experts come next"):
        offloaded(folders["experts"], prefetch="cluster")


def test_threads_wait_for_each_other(folders: dict[str, Path]) -> None:
    """What one thread had read, all compute with."""
    wanted = decoded(offloaded(folders["dense"]).model, 4)
    assert torch.equal(decoded(offloaded(folders["dense"], threads=3).model, 4), wanted)


def test_a_prompt_of_a_few_tokens_and_a_batch_are_those_of_the_kernels(folders: dict[str, Path]) -> None:
    model, made = load(folders["dense"]), accelerate(folders["dense"], memory=MEMORY, neuron_memory=SMALLEST)
    accelerate(model)
    few, batch = PROMPT[:, :3], PROMPT.view(4, 3)
    with torch.no_grad():
        assert torch.equal(made.model(few).logits, model(few).logits)
        outputs = [one(batch, use_cache=True) for one in (model, made.model)]
        steps = [
            one(batch[:, :1], past_key_values=output.past_key_values).logits
            for one, output in zip((model, made.model), outputs, strict=True)
        ]
    assert torch.equal(*steps)


def offloaded(folder: Path, **changed: Any) -> Acceleration:
    return accelerate(folder, memory=MEMORY, **{"neuron_memory": SMALLEST} | changed)


def test_every_byte_is_counted(folders: dict[str, Path]) -> None:
    """What the operating system counted, the header and what streams ahead aside."""
    made = offloaded(folders["dense"], policy="no_cache")
    decoded(made.model, 2)
    before, wanted = _read_by_process(), made.neurons
    decoded(made.model, 6)
    counts = made.neurons
    assert counts is not None
    assert wanted is not None
    cache: Any = made.offloaded.cache  # pyright: ignore[reportOptionalMemberAccess]
    layout = cache.layout
    tokens = 6
    assert counts.hits == 0
    assert counts.stall_bytes - wanted.stall_bytes == (counts.needed - wanted.needed) * layout.unit_bytes
    streamed = counts.streamed_bytes - wanted.streamed_bytes
    in_full = layout.blocks * (layout.neurons - cache.plan.held_rows) * layout.row_bytes
    assert streamed == pytest.approx(tokens * in_full, rel=0.2)
    by_prompt = layout.file_bytes
    read = _read_by_process() - before
    mine = counts.bytes_read - wanted.bytes_read + by_prompt
    assert mine * 0.95 <= read <= mine * 1.2 + 2e6


def _read_by_process() -> int:
    """Bytes that reads of this process returned, from a disk or not."""
    return int(re.findall(r"rchar: (\d+)", Path("/proc/self/io").read_text())[0])


def test_more_memory_is_more_hits_and_all_of_it_no_reads(folders: dict[str, Path]) -> None:
    rates = []
    for memory in (SMALLEST, 3 * HIDDEN * NEURONS * 2 * 2, "1GB"):
        made = offloaded(folders["dense"], neuron_memory=memory)
        for _ in range(2):
            made.reset()
            output = made.model(PROMPT[:, :1], use_cache=True)
            for _ in range(8):
                output = made.model(PROMPT[:, :1], past_key_values=output.past_key_values)
        rates.append(made.neurons.hit_rate)  # pyright: ignore[reportOptionalMemberAccess]
    assert rates[0] < rates[1] <= rates[2] == 1.0
    assert made.neurons.bytes_read == 0  # pyright: ignore[reportOptionalMemberAccess]


def test_memory_is_divided_by_what_saves_most(folders: dict[str, Path]) -> None:
    layout = neuron_layout(StoredModel(folders["dense"]), "stored", "apart", "gate")
    least, gates = smallest_memory(layout), layout.blocks * layout.neurons * layout.row_bytes
    assert least >= 3 * NEURONS * HIDDEN * 2
    quarter = layout.neurons // 4
    few = plan_memory(layout, least, quarter)
    assert few.slots >= quarter
    assert few.held_rows == (few.num_bytes - quarter * layout.unit_bytes) // (layout.blocks * layout.row_bytes) > 0
    more = plan_memory(layout, gates + 200 * layout.unit_bytes, quarter)
    assert (more.held_rows, more.slots) == (layout.neurons, 200)
    everything = plan_memory(layout, 10**9, quarter)
    assert everything.slots == layout.blocks * layout.neurons
    assert everything.num_bytes < layout.file_bytes + 10**5


@pytest.mark.parametrize("text", ["4GB", "4000 mb", "3.72529GiB", "0.004TB", "0.003637979TiB"])
def test_sizes_have_units(text: str) -> None:
    assert parse_memory(text) == pytest.approx(4e9, rel=1e-5)


@pytest.mark.parametrize("text", ["", "4", "-4GB", "4 parsecs", "0GB", "1e99TB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RunError, match="A size with its unit"):
        parse_memory(text)


# ---- faults ----


def test_a_limit_below_the_smallest_is_refused_with_it(folders: dict[str, Path]) -> None:
    with pytest.raises(RunError, match="cannot be decoded in 100 MB") as refused:
        accelerate(folders["dense"], memory="100MB")
    smallest = refused.value.allowed.removesuffix(" or more.")
    assert decoded(accelerate(folders["dense"], memory=smallest, neuron_memory=SMALLEST).model).isfinite().all()


def test_longer_texts_than_there_is_room_for_are_refused(folders: dict[str, Path]) -> None:
    made = offloaded(folders["dense"], context_tokens=14)
    with pytest.raises(RunError, match="15 positions"):
        decoded(made.model)


def test_a_model_whose_rows_are_all_needed_is_refused(tmp_path: Path) -> None:
    late = {"method": "chosen", "sites": {"inter": {"rule": "top_k"}}}
    folder = saved(tmp_path / "late", sparsification=late, ffn_activation="swiglu")
    with pytest.raises(ModelError, match="chooses neurons only when both are known"):
        offloaded(folder)


def test_a_model_in_memory_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="in memory already"):
        accelerate(load(folders["dense"]), memory=MEMORY)
    with pytest.raises(ModelError, match="only this acceleration reads"):
        offloaded(folders["dense"]).remove()
    with pytest.raises(ModelError, match="cannot be saved"):
        offloaded(folders["dense"]).model.save_pretrained("somewhere")


@pytest.fixture
def fresh(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Acceleration, Path]]:
    """A model whose neuron file is its own, to be damaged."""
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path))
    made = offloaded(folders["dense"])
    yield made, next(tmp_path.glob("*.neurons"))
    monkeypatch.undo()


def test_a_file_that_is_truncated_under_a_run_is_named(fresh: tuple[Acceleration, Path]) -> None:
    made, path = fresh
    made.offloaded.cache.file.check = lambda: None  # pyright: ignore[reportOptionalMemberAccess] # between this check and a read
    os.truncate(path, 8192)
    with pytest.raises(StorageError, match=f"{path} was truncated"):
        decoded(made.model)


def test_a_file_that_is_changed_under_a_run_is_named(
    fresh: tuple[Acceleration, Path], folders: dict[str, Path]
) -> None:
    made, path = fresh
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    with pytest.raises(StorageError, match=f"{path} was changed"):
        decoded(made.model)


@pytest.mark.parametrize("part", ["prompt", "step"])
def test_a_read_error_is_one_message(fresh: tuple[Acceleration, Path], tmp_path: Path, part: str) -> None:
    made, path = fresh
    cache: Any = made.offloaded.cache  # pyright: ignore[reportOptionalMemberAccess]
    descriptor, kept = cache.file.descriptor, os.dup(cache.file.descriptor)
    given: dict[str, Any] = {"input_ids": PROMPT}
    with torch.no_grad():
        if part == "step":
            given = {"input_ids": PROMPT[:, :1], "past_key_values": made.model(PROMPT, use_cache=True).past_key_values}
        folder = os.open(tmp_path, os.O_RDONLY)
        os.dup2(folder, descriptor)  # reads of a folder fail
        cache.file.check = lambda: None
        with pytest.raises(StorageError, match=f"{path} cannot be read: Is a directory"):
            made.model(**given)
        os.dup2(kept, descriptor)
    assert decoded(made.model).isfinite().all()


def test_a_half_written_file_is_written_anew(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path))
    stored = StoredModel(folders["dense"])
    layout = neuron_layout(stored, "stored", "apart", "gate")
    told: list[str] = []
    open_neurons(stored, layout, told.append).close()
    assert len(told) == 3
    (path,) = tmp_path.glob("*.neurons")
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 1)
    (tmp_path / f".{path.name}.partial-1").write_bytes(b"left by a process that was killed")
    file: NeuronFile = open_neurons(stored, layout, lambda _: None)
    assert path.read_bytes() == whole
    assert not list(tmp_path.glob(".*partial*"))
    file.close()


def test_changed_weights_have_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path / "neurons"))
    folder = saved(tmp_path / "model")
    before = decoded(offloaded(folder).model)
    model = load(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    model.save_pretrained(folder)
    accelerate(model)
    after = decoded(offloaded(folder).model)
    assert torch.equal(after, decoded(model))
    assert not torch.equal(after, before)


def test_of_two_processes_one_writes_and_the_other_waits(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIFY_NEURON_CACHE", str(tmp_path))
    stored = StoredModel(folders["dense"])
    layout = neuron_layout(stored, "stored", "apart", "gate")
    told: dict[str, list[str]] = {"first": [], "second": []}
    writing, go = threading.Event(), threading.Event()

    def tell(text: str) -> None:
        told["first"].append(text)
        writing.set()
        go.wait(20)

    threads = [
        threading.Thread(target=lambda: open_neurons(stored, layout, tell).close()),
        threading.Thread(
            target=lambda: open_neurons(stored, layout, lambda text: (told["second"].append(text), go.set())).close()
        ),
    ]
    threads[0].start()
    assert writing.wait(20)
    threads[1].start()
    for one in threads:
        one.join(20)
    assert len(told["first"]) == 3
    assert len(told["second"]) == 1
    assert "Another process writes" in told["second"][0]
    assert len(list(tmp_path.glob("*.neurons"))) == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, also where the shell that started the tests has switched it off, as for a command in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_a_step_and_the_next_is_right(folders: dict[str, Path]) -> None:
    made = offloaded(folders["dense"])
    wanted = decoded(made.model)
    cache: Any = made.offloaded.cache  # pyright: ignore[reportOptionalMemberAccess]
    policy = cache._policies[1]
    step = policy.step

    def interrupted(mask: Any) -> Any:
        policy.step = step  # pyright: ignore[reportAttributeAccessIssue]
        signal.raise_signal(signal.SIGINT)
        return step(mask)

    policy.step = interrupted  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        decoded(made.model)
    assert torch.equal(decoded(made.model), wanted)


# ---- the limit ----

LARGE = """
import resource, sys, torch
from pathlib import Path
from sparsify.runtime import accelerate
from sparsify.runtime.offload import peak_rss_bytes, rss_bytes
torch.set_num_threads(2)
before = rss_bytes()
made = accelerate(Path(sys.argv[1]), memory=before + int(sys.argv[2]), weights=sys.argv[3], context_tokens=64)
loaded = peak_rss_bytes()
with torch.no_grad():
    output = made.model(torch.arange(40)[None], use_cache=True)
    for _ in range(8):
        output = made.model(output.logits[:, -1].argmax(-1)[:, None], past_key_values=output.past_key_values)
counts = made.neurons
print(made.offloaded.limits.memory_bytes, loaded, peak_rss_bytes(), counts.bytes_read, before)
"""


@pytest.mark.parametrize("weights", ["stored", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_peak_of_memory_stays_below_the_limit(weights: str, tmp_path: Path) -> None:
    """In a process of its own, from before the weights are loaded to the last token, the file's writing included."""
    folder = saved(
        tmp_path / "large",
        hidden_size=512,
        intermediate_size=4096,
        num_hidden_layers=6,
        dtype=torch.float32,
        vocab_size=512,
    )
    room = 215_000_000  # for all but Python and torch; the neurons alone have 151 MB
    environment = os.environ | {"SPARSIFY_NEURON_CACHE": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, "-c", LARGE, str(folder), str(room), weights],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    limit, loaded, peak, read, before = map(int, result.stdout.split())
    assert before < loaded <= peak <= limit
    assert weights != "stored" or read > 6 * 3 * 4096 * 512 * 4 // 10
