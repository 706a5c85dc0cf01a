"""A PowerInfer file gives the exported model's logits by the engine's arithmetic, and unsupported models are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import quants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

from sparsify.cli import main
from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ExportError, ModelError
from sparsify.export.powerinfer.export import PowerInferSettings, Written, export_powerinfer
from sparsify.export.powerinfer.gguf import Type
from sparsify.export.powerinfer.gpu_split import SPLIT_NEURONS, hot_neurons
from sparsify.export.powerinfer.rules import check_holdable
from sparsify.export.powerinfer.vocabulary import read_vocabulary
from sparsify.export.weight_shards import read_sums, sha256
from sparsify.models import SparseMistralConfig, SparseMistralForCausalLM, SparseMixtralConfig
from sparsify.predictors import BlockPredictor, Predictors, write_predictors
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.masking import PredictorMask
from sparsify.predictors.train import Settings, train_predictors
from sparsify.runs.load import Loaded, load
from sparsify.sparsity.probe import SparsityProbe
from tests.conftest import SHAPE, TOKENIZER
from tests.export.powerinfer_engine import F16, F32, I32_OF_POWERINFER, Q4_0, File, engine_logits

PADDED = 2050
NEURONS = 256
IDS = torch.randint(3, 2048, (1, 40), generator=torch.Generator().manual_seed(0))
CONFIG: dict[str, Any] = SHAPE | {
    "vocab_size": PADDED,
    "intermediate_size": NEURONS,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "sliding_window": None,
    "ffn_activation": "drelu",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A model whose weights bf16 holds, with a tied head, two rows without tokens and its own rope base."""
    folder = tmp_path_factory.mktemp("powerinfer") / "model"
    torch.manual_seed(0)
    model = SparseMistralForCausalLM(SparseMistralConfig(**CONFIG)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    write_config(model.config, folder, torch.float32)
    copy_tokenizer(TOKENIZER, folder)
    return load(str(folder))


def batches(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(3, 2048, (1, 64), generator=generator),
            "position_ids": torch.arange(64)[None],
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module", params=["residual", "normed"])
def predictors(request: pytest.FixtureRequest, loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Predictors:
    settings = Settings(request.param, wanted_recall=0.9, budget_share=1.0, ranks=(12,), passes=2)
    state = tmp_path_factory.mktemp("state") / "state"
    return train_predictors(loaded.model, batches(30, 1), batches(4, 2), settings, text="random", state_path=state)


def with_threshold(predictors: Predictors, threshold: float) -> Predictors:
    return predictors._replace(facts=predictors.facts.model_copy(update={"threshold": threshold}))


def exported(loaded: Loaded, predictors: Predictors, to: Path, **more: Any) -> tuple[File, Written]:
    settings = PowerInferSettings("tiny", **more)
    written = export_powerinfer(loaded, predictors, batches(4, 3), to, settings)
    return File(to / written.model_file), written


def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def plain_logits(loaded: Loaded) -> torch.Tensor:
    return loaded.model(IDS, use_cache=False).logits[0]


@torch.no_grad()
def masked_logits(loaded: Loaded, predictors: Predictors) -> torch.Tensor:
    with BlockInputs(loaded.model, predictors.facts.input) as inputs:
        mask = PredictorMask(predictors.to(loaded.model.device), inputs)
        with SparsityProbe(loaded.model, mask=mask):
            return loaded.model(IDS, use_cache=False).logits[0]


def test_with_everything_on_the_file_is_the_model(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    if predictors.facts.input == "normed":
        pytest.skip("the threshold must be 0 there")
    file, _ = exported(loaded, with_threshold(predictors, -1e9), tmp_path / "out")
    expected = plain_logits(loaded)
    assert difference(engine_logits(file, IDS[0]), expected) < 1e-3
    assert file.keys["bamboo.rope.freq_base"] == 50000.0


def test_with_the_predictor_the_file_is_the_masked_model(
    loaded: Loaded, predictors: Predictors, tmp_path: Path
) -> None:
    file, _ = exported(loaded, predictors, tmp_path / "out")
    # Rounded as the file holds them; the norm of the normed input is folded before rounding, so there signs can flip.
    rounded = {
        key: BlockPredictor(*(matrix.half().float() for matrix in block)) for key, block in predictors.blocks.items()
    }
    masked = masked_logits(loaded, predictors._replace(blocks=rounded))
    plain = plain_logits(loaded)
    assert difference(engine_logits(file, IDS[0]), masked) < (1e-3 if predictors.facts.input == "residual" else 1e-2)
    assert difference(plain, masked) > 2e-2, "the mask does nothing, so nothing was tested"


@torch.no_grad()
def test_q4_0_is_only_where_the_engine_reads_it(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    file, _ = exported(loaded, with_threshold(predictors, 0.0), tmp_path / "out", ffn_type="q4_0")
    kinds = {name.removeprefix("blk.1."): kind for name, kind in file.types.items()}
    kinds = {name: kind for name, kind in kinds.items() if not name.startswith("blk.0.")}
    assert kinds == {
        **dict.fromkeys(("attn_norm.weight", "ffn_norm.weight", "output_norm.weight"), F32),
        **dict.fromkeys(("token_embd.weight", "output.weight"), F16),
        **dict.fromkeys((f"attn_{part}.weight" for part in ("q", "k", "v", "output")), F16),
        **dict.fromkeys(("fc1.weight", "fc2.weight"), F16),
        **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight"), Q4_0),
    }
    down = loaded.model.model.layers[1].mlp.down_proj.weight.T.contiguous().numpy()
    expected = quants.dequantize(quants.quantize(down, Type.Q4_0), Type.Q4_0)
    assert torch.equal(file.tensors["blk.1.ffn_down_t.weight"], torch.from_numpy(expected))


def test_every_row_of_the_embedding_has_its_token(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    file, _ = exported(loaded, predictors, tmp_path / "out")
    pieces = SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    tokens = file.keys["tokenizer.ggml.tokens"]
    assert tokens[:2048] == [pieces.id_to_piece(i) for i in range(2048)]
    assert tokens[2048:] == ["[PAD2048]", "[PAD2049]"]
    assert len(set(tokens)) == PADDED == len(file.tensors["output.weight"])
    assert file.keys["tokenizer.ggml.scores"][:2048] == pytest.approx([pieces.get_score(i) for i in range(2048)])
    assert file.keys["tokenizer.ggml.bos_token_id"] == 1
    assert file.keys["tokenizer.ggml.token_type"][:8] == [2, 3, 3, 4, 4, 4, 4, 6]


def test_the_split_puts_the_hottest_neurons_on_the_gpu(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    _, written = exported(loaded, predictors, tmp_path / "out", vram_bytes=int(1.5 * NEURONS * 3 * 32 * 2))
    split = File(tmp_path / "out" / f"{written.model_file}.generated.gpuidx")
    assert (split.magic, split.keys["general.architecture"]) == (b"PWRI", "generic.gpu_index")
    assert split.keys["generic.gpu_index.block_count"] == 2
    names = [f"blk.{layer}.gpu_{part}" for layer in (0, 1) for part in ("idx", "bucket")]
    assert list(split.types) == names
    assert set(split.types.values()) == {I32_OF_POWERINFER}
    for layer in (0, 1):
        bucket = split.tensors[f"blk.{layer}.gpu_bucket"]
        assert torch.equal(split.tensors[f"blk.{layer}.gpu_idx"].nonzero().flatten(), bucket)
    counts = [
        torch.load(tmp_path / "out" / "activation" / f"activation_{layer}.pt", weights_only=True) for layer in (0, 1)
    ]
    hotter = int(counts[1].sum() > counts[0].sum())
    assert len(split.tensors[f"blk.{hotter}.gpu_bucket"]) == NEURONS
    assert len(split.tensors[f"blk.{1 - hotter}.gpu_bucket"]) == 0


@given(st.integers(0, 10_000), st.integers(0, 3000))
def test_no_dropped_group_fires_more_often_than_a_chosen_one(seed: int, capacity: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 1000, (3, 2 * SPLIT_NEURONS), generator=generator)
    hot = hot_neurons(counts, capacity)
    assert sum(map(len, hot)) == min(capacity, counts.numel()) // SPLIT_NEURONS * SPLIT_NEURONS
    for row, taken in zip(counts, hot, strict=True):
        left = torch.ones(len(row), dtype=torch.bool)
        left[taken] = False
        if len(taken) and left.any():
            assert row[taken].min() >= row[left].max()


def test_the_layout_for_powerinfers_own_converter(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    settings = PowerInferSettings("tiny", layout="powerinfer_hf")
    out = tmp_path / "out"
    export_powerinfer(loaded, predictors, batches(2, 3), out, settings)
    config = json.loads((out / "model" / "config.json").read_text())
    assert (config["model_type"], config["rope_theta"]) == ("bamboo", 50000.0)
    weights = load_file(out / "model" / "model.safetensors")
    assert set(weights) == {*dict(loaded.model.named_parameters()), "lm_head.weight"}
    added = json.loads((out / "model" / "added_tokens.json").read_text())
    assert added == {"[PAD2048]": 2048, "[PAD2049]": 2049}
    assert len(weights["model.embed_tokens.weight"]) == config["vocab_size"] == 2048 + len(added)
    for layer in (0, 1):
        matrices = torch.load(out / "predictor" / f"model_{layer}.pt", weights_only=True)
        assert {name: tuple(m.shape) for name, m in matrices.items()} == {
            "fc1.weight": (12, 32),
            "fc2.weight": (NEURONS, 12),
        }
        assert all(matrix.is_contiguous() for matrix in matrices.values())
    sums = read_sums(out)
    assert sums["predictor/model_1.pt"] == sha256(out / "predictor" / "model_1.pt")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"ffn_activation": "reglu"}, "would compute as dReLU"),
    ({"ffn_activation": "swiglu"}, "its activation is swiglu"),
    ({"head_dim": 16}, "head_dim is 16"),
    ({"sliding_window": 64}, "--context-tokens 64"),
    ({"hidden_size": 36, "num_attention_heads": 2}, "8 values at once"),
    (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "positions are scaled",
    ),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_the_engine_would_misread_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ExportError, match=words):
        check_holdable(SparseMistralConfig(**CONFIG | change), "f16", None)


def test_an_unsupported_tokenizer_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no tokenizer\.model"):
        read_vocabulary(tmp_path, loaded.tokenizer, PADDED)
    kept = (TOKENIZER / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(kept.replace(b"<|user|>", b"<|usor|>"))
    with pytest.raises(ExportError, match=r"its piece 4 is '<\|usor\|>'"):
        read_vocabulary(tmp_path, loaded.tokenizer, PADDED)
    with pytest.raises(ExportError, match="has only 2,000 rows"):
        read_vocabulary(TOKENIZER, loaded.tokenizer, 2000)


def test_unsupported_models_are_refused() -> None:
    mixtral = SparseMixtralConfig(**SHAPE, ffn_activation="drelu")
    with pytest.raises(ExportError, match="mixture of experts"):
        check_holdable(mixtral, "f16", None)
    with pytest.raises(ExportError, match="blocks of 32"):
        check_holdable(SparseMistralConfig(**CONFIG | {"intermediate_size": 72}), "q4_0", None)
    cut = SparseMistralConfig(**CONFIG)
    cut.sparsification = {"method": "thresholds", "sites": {"inter": {"per": "channel"}}}
    with pytest.raises(ExportError, match="a mask of thresholds on inter"):
        check_holdable(cut, "f16", None)
    sequence = SparseMistralConfig(**CONFIG | {"sliding_window": 64})
    check_holdable(sequence, "f16", 64)


def test_predictors_that_do_not_fit_are_refused(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    if predictors.facts.input == "normed":
        with pytest.raises(ExportError, match="differs from token to token"):
            exported(loaded, with_threshold(predictors, 0.3), tmp_path / "out")
    facts = predictors.facts.model_copy(update={"fingerprint": "another"})
    with pytest.raises(ModelError, match="trained for other weights"):
        exported(loaded, predictors._replace(facts=facts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def run_cli(*arguments: str) -> int | str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sparsify", "export", *arguments])
        try:
            main.main()
        except SystemExit as end:
            return end.code
    return 0


def test_the_command_writes_it_from_a_folder_with_predictors(
    loaded: Loaded, predictors: Predictors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_predictors(predictors, tmp_path / "own")
    text = tmp_path / "text.txt"
    text.write_text("word and value " * 400)
    options = ["--to", str(tmp_path / "out"), "--format", "powerinfer", "--on", str(text)]
    assert run_cli(loaded.name, "--predictors", str(tmp_path / "own"), *options) in (0, None)
    said = capsys.readouterr().out
    assert "out.powerinfer.gguf" in said
    assert "does not skip rows of up and gate" in " ".join(said.split())
    file = File(tmp_path / "out" / "out.powerinfer.gguf")
    assert difference(engine_logits(file, IDS[0]), masked_logits(loaded, predictors)) < 5e-2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "gguf"], "Allowed: hf, powerinfer, powerinfer_hf"),
        (["--ffn-type", "q4_0"], "--format hf does not take --ffn-type"),
        (["--format", "powerinfer_hf", "--vram-gb", "1"], "does not take --vram-gb"),
        (["--format", "powerinfer", "--ffn-type", "q8_0"], "Allowed: f16, q4_0"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("nowhere", "--to", str(tmp_path / "out"), *options) == 2
    assert words in capsys.readouterr().err
