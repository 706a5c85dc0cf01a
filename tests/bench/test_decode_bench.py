"""The benchmark's blocks have the given sparsity, bytes are counted by rows, and the command prints the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from numpy.ctypeslib import as_array
from rich.console import Console
from torch.nn.functional import linear

from sparsify.bench.decode import EXPORT_REPEATS, time_export
from sparsify.bench.decode_blocks import make_blocks, measure_point
from sparsify.bench.decode_models import dense_twin, measure_model
from sparsify.bench.decode_report import captured_words, export_speed
from sparsify.bench.decode_result import FfnPoint, SpeculationPoint, SpeedUp, Timing, crossover
from sparsify.bench.decode_shapes import Shape, random_model
from sparsify.bench.llamacpp import LlamaCpp
from sparsify.cli import main
from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.recipe.compose import compose_recipe, save_recipe
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from sparsify.runs.run_folder import RunFolder
from sparsify.runtime import accelerate

HIDDEN, NEURONS, RANK = 64, 500, 16
IN_CACHE = 1 << 20


@pytest.mark.parametrize("tokens", [1, 3])
def test_blocks_have_the_given_sparsity_and_bytes_are_counted_by_rows(tokens: int) -> None:
    blocks = make_blocks(HIDDEN, NEURONS, RANK, 3, torch.bfloat16, out_of_cache_bytes=IN_CACHE)
    point = measure_point(blocks[:2], 0.1, 0.3, tokens, threads=1, repeats=2, out_of_cache_bytes=IN_CACHE)
    block = blocks[0]
    x = block.x[:tokens]
    gate, up = linear(x, block.gate) > 0, linear(x, block.up) > 0
    assert torch.equal(gate.sum(1), torch.full((tokens,), 150))
    assert torch.equal((gate & up).sum(1), torch.full((tokens,), 50))
    row = HIDDEN * 2
    any_gate, any_both = gate.any(0).sum().item(), (gate & up).any(0).sum().item()
    predictor = RANK * (HIDDEN + NEURONS) * 2
    assert point.bytes_read == {
        "torch": 3 * NEURONS * row,
        "dense": 3 * NEURONS * row,
        "exact": (NEURONS + any_gate + any_both) * row,
        "predictor": 3 * any_both * row + predictor,
    }
    assert point.ideal("exact") == pytest.approx(3 * NEURONS / (NEURONS + any_gate + any_both))
    assert all(len(timing.seconds) == 2 for timing in point.seconds.values())


def test_only_the_kernels_read_int4_blocks() -> None:
    blocks = make_blocks(HIDDEN, NEURONS, RANK, 2, torch.bfloat16, "int4", out_of_cache_bytes=IN_CACHE)
    point = measure_point(blocks[:2], 0.1, 0.3, 2, threads=1, repeats=1, out_of_cache_bytes=IN_CACHE)
    x, block = blocks[0].x, blocks[0]
    gate, up = (linear(x, one) > 0 for one in (block.gate, block.up))
    row = HIDDEN // 2 + 2 * HIDDEN // 32
    rows = NEURONS + gate.any(0).sum().item() + (gate & up).any(0).sum().item()
    assert point.bytes_read["torch"] == 3 * NEURONS * HIDDEN * 2
    assert point.bytes_read["dense"] == 3 * NEURONS * row
    assert point.bytes_read["exact"] == rows * row


def test_ratios_are_taken_within_pairs() -> None:
    slow, fast = Timing(seconds=[2.0, 20.0, 6.0]), Timing(seconds=[1.0, 10.0, 2.0])
    assert SpeedUp.of(slow, fast).median == 2.0


def test_the_crossover_is_the_first_batch_at_which_torch_is_faster() -> None:
    def point(tokens: int, exact: float, gates: float = 0.1) -> FfnPoint:
        seconds = {"torch": Timing(seconds=[1.0]), "exact": Timing(seconds=[exact])}
        return FfnPoint(
            active_share=0.1,
            gate_share=gates,
            tokens=tokens,
            threads=1,
            bytes_read={},
            read_bytes_per_second=1.0,
            seconds=seconds,
        )

    points = [point(1, 0.2), point(1, 9.0, 0.3), point(4, 0.8), point(8, 1.1), point(16, 0.9)]
    assert crossover(points) == (4, 8)
    assert crossover(points[:3]) == (4, None)
    assert crossover([point(1, 1.2)]) == (None, 1)


@pytest.fixture(scope="module")
def bundle(compiled: None, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("bench") / "mistral-drelu"
    source, activation = ModelSection(source=str(stock["mistral"])), ActivationSection("drelu")
    convert(source, activation, to, seed=0, dtype=torch.float32)
    return to


def test_an_export_is_timed_once_and_a_small_model_is_said_to_gain_little(bundle: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    save_recipe(compose_recipe("quickstart", ["activation=drelu", "conversion=bare"]), run.recipe)
    run.export.symlink_to(bundle)
    point = time_export(run, lambda _: None)
    assert point is not None
    assert len(point.decode_seconds["exact"].seconds) == EXPORT_REPEATS
    assert time_export(run, lambda _: pytest.fail("timed twice")) == point
    point.decode_seconds["exact"] = point.decode_seconds["torch"]
    console = Console(width=200)
    with console.capture() as captured:
        console.print(export_speed(point))
    assert "too small to gain more" in captured.get()
    assert "sparsify bench decode --layers 0" in captured.get()
    save_recipe(
        compose_recipe("quickstart", ["activation=drelu", "conversion=bare", "eval.time_decoding=false"]), run.recipe
    )
    assert time_export(run, lambda _: None) is None


def test_the_dense_twin_is_the_same_model_and_shares_its_memory(bundle: Path) -> None:
    model = load_sparse(bundle)
    twin = dense_twin(model)
    ids = torch.arange(3, 30)[None]
    point = measure_model(model, "one", None, ids, 8, 1, lambda _: None)
    assert torch.equal(twin(ids).logits, load_sparse(bundle)(ids).logits)
    shared = [
        name
        for (name, one), other in zip(twin.named_parameters(), model.parameters(), strict=True)
        if one.data_ptr() != other.data_ptr()
    ]
    assert all("down_proj" in name for name in shared)
    assert not any("forward" in vars(block) for block in (twin, *twin.ffn_blocks()))
    assert point.bytes_read["exact"] < point.bytes_read["torch"]
    assert point.bytes_read["dense"] == point.bytes_read["torch"]
    assert point.parts["exact"].keys() == {"projections", "attention", "ffn", "head", "rest", "overhead"}
    seconds = point.decode_seconds["exact"].median
    assert sum(point.parts["exact"].values()) == pytest.approx(seconds, rel=1e-3)
    assert point.without_llamacpp == "not requested"
    assert point.captured == []
    point.captured = ["torch", "dense"]
    assert captured_words([point]).endswith("as generate() runs it with exact")


@pytest.mark.parametrize("experts", [None, (4, 2)])
def test_a_random_model_has_the_given_shares_in_every_layer(experts: tuple[int, int] | None) -> None:
    model, predictors = random_model(Shape(64, 300, 9, (4, 2), 50, experts), 2, 0.1, 0.25, 16, torch.float32)
    ids = torch.arange(3, 30)[None]
    point = measure_model(model, "one", predictors, ids, 8, 1, lambda _: None)
    used = 1 if experts is None else experts[1] / experts[0]
    ffn = sum(one.numel() * 4 for block in model.ffn_blocks() for one in block.parameters())
    assert point.active_share == pytest.approx(0.1)
    assert [one.touched_share for one in point.reads] == [pytest.approx((1 + 0.25 + 0.1) / 3)] * 2
    saved = point.bytes_read["torch"] - point.bytes_read["exact"]
    assert saved == pytest.approx(ffn * used * (1 - 0.45))


@pytest.mark.parametrize(("overlap", "fired"), [(0.0, 1 - 0.9**4), (1.0, 0.1)])
def test_tokens_of_a_random_model_share_as_many_neurons_as_given(overlap: float, fired: float) -> None:
    shape = Shape(64, 4000, 9, (4, 2), 50)
    model, _ = random_model(shape, 2, 0.1, 0.1, 16, torch.float32, kinds=8, overlap=overlap)
    acceleration = accelerate(model)
    with torch.no_grad():
        cache = model(torch.arange(9).expand(4, -1), use_cache=True).past_key_values
        acceleration.reset()
        model(torch.arange(4)[:, None], past_key_values=cache)
    assert [one.rows.down / one.offered for one in acceleration.reads] == [pytest.approx(fired, abs=0.02)] * 2


def test_drafts_pay_from_the_acceptance_at_which_a_step_yields_its_cost() -> None:
    def point(tokens: int, cost: float) -> SpeculationPoint:
        times = Timing(seconds=[cost]), Timing(seconds=[1.0])
        return SpeculationPoint(variant="exact", tokens=tokens, overlap=0.0, seconds=times[0], one=times[1])

    assert point(2, 1.25).break_even == pytest.approx(0.25)
    assert point(3, 1.75).break_even == pytest.approx(0.5)
    assert point(2, 2.5).break_even is None


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("weights", ["stored", "int4"])
def test_llamacpp_decodes_the_dense_model_of_the_same_weights(
    kind: str, weights: str, stock: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    model = load_sparse(stock[kind], "swiglu")
    ids = torch.arange(3, 30)[None]
    engine = LlamaCpp(model, weights, 1, 64, tmp_path)
    engine.decode(ids, 8, 2)
    scores = torch.from_numpy(as_array(engine._engine._ctx.get_logits(), (model.config.vocab_size,)).copy())
    engine.close()
    with torch.no_grad():
        expected = model(ids).logits[0, -1]
    close = 1e-3 if weights == "stored" else 0.3
    assert (scores - expected).abs().max() < close * expected.abs().max()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sparsify", "bench", "decode", *arguments])
    with pytest.raises(SystemExit) as end:
        main.main()
    return int(end.value.code or 0)


SMALL = ("--hidden", "1024", "--neurons", "2048", "--dtype", "fp32", "--rank", "16", "--batch", "1,9", "--repeats", "2")


def test_the_command_measures_a_bundle_and_draws(
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plot = tmp_path / "plot.svg"
    blocks = (*SMALL, "--sparsity", "0.5,0.9", "--threads", "1,2", "--plot", str(plot))
    assert run(monkeypatch, *blocks, "--layers", "0", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert len(measured["ffn"]) == 2 * 2 + 1 + 1
    assert "limit by bytes read" in plot.read_text()
    whole = ("--bundle", str(bundle), "--sparsity", "", "--tokens", "6", "--repeats", "2")
    whole += ("--weights", "int8")
    assert run(monkeypatch, *whole, "--prompt", "word1 value2") == 0
    shown = capsys.readouterr().out
    assert "Layers that limit the speed-up most" in shown
    assert "exact" in shown
    assert "2 layers, int8 weight blocks on float32" in shown
    assert "Milliseconds of a token by part of the model" in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--dtype", "fp8"), "--dtype fp8"),
        (("--weights", "int3"), "--weights int3 (allowed: stored, int8, int4)"),
        (("--device", "tpu"), "--device tpu (here: cpu"),
        (("--sparsity", "1.5"), "--sparsity is '1.5'"),
        (("--batch", "1,x"), "--batch is 'x'"),
        (("--batch", "0"), "integers from 1 to"),
        (("--plot", "picture.pdf"), "picture.pdf is not a supported image format"),
        (("--predictors", "somewhere"), "--predictors without --bundle"),
        (("--shape", "gpt-5"), "--shape gpt-5 (allowed: mistral-7b, mixtral-8x7b"),
        (("--together", "2,16"), "--together 16, more than 8"),
        (("--gates", "0.05"), "--gates 0.05, fewer than the 0.1"),
        (("--bundle", "somewhere", "--layers", "2"), "--layers of a model with random weights, with --bundle"),
    ],
)
def test_invalid_settings_are_refused(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err
