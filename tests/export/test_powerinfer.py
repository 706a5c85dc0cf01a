"""A PowerInfer file gives the exported model's logits by the engine's arithmetic, and unsupported models are refused."""

from __future__ import annotations

import copy
import json
import re
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
from tokenizers import pre_tokenizers

from sparsify.cli import main
from sparsify.commands.export import PowerInferOptions, to_powerinfer
from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ExportError, ModelError
from sparsify.export.powerinfer.export import PowerInferSettings, Written, export_powerinfer
from sparsify.export.powerinfer.gguf import Type
from sparsify.export.powerinfer.gpu_split import check_split, hot_neurons
from sparsify.export.powerinfer.rules import SPLIT_NEURONS, check_holdable, supported_context
from sparsify.export.powerinfer.vocabulary import NO_PREFIX_NOTE, PREFIX_NOTE, read_vocabulary
from sparsify.export.weight_shards import read_sums, sha256
from sparsify.models import SparseMistralConfig, SparseMistralForCausalLM, SparseMixtralConfig
from sparsify.predictors import BlockPredictor, EvaluationFacts, Predictors, read_predictors, write_predictors
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.predictor_mask import PredictorMask
from sparsify.predictors.trainer import Settings, train_predictors
from sparsify.runs.load import Loaded, load
from sparsify.sparsity.probe import SparsityProbe
from tests.conftest import SHAPE, TOKENIZER
from tests.export.powerinfer_engine import (
    F16,
    F32,
    I32_OF_POWERINFER,
    Q4_0,
    Q8_0,
    File,
    engine_logits,
    gpu_bytes_left,
)
from tests.predictors.untrained import random_predictors

PADDED = 2050
NEURONS = 1024
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


def rounded(predictors: Predictors) -> Predictors:
    """As the file holds them."""
    return predictors._replace(
        blocks={
            key: BlockPredictor(*(matrix.half().float() for matrix in block))
            for key, block in predictors.blocks.items()
        }
    )


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
    # The norm of the normed input is folded before rounding, so there signs can flip.
    masked = masked_logits(loaded, rounded(predictors))
    plain = plain_logits(loaded)
    assert difference(engine_logits(file, IDS[0]), masked) < (1e-3 if predictors.facts.input == "residual" else 1e-2)
    assert difference(plain, masked) > 2e-2, "the mask does nothing, so nothing was tested"


TYPES: dict[str, tuple[dict[str, str], int, int]] = {
    "f16": ({}, F16, F16),
    "q4_0": ({"ffn_type": "q4_0"}, Q4_0, Q4_0),
    "q4_0 with q8_0": ({"ffn_type": "q4_0", "rest_type": "q8_0"}, Q4_0, Q8_0),
    "f16 with q8_0": ({"rest_type": "q8_0"}, F16, Q8_0),
}


@torch.no_grad()
@pytest.mark.parametrize("name", TYPES)
def test_each_type_is_only_where_the_engine_reads_it(
    name: str, loaded: Loaded, predictors: Predictors, tmp_path: Path
) -> None:
    options, ffn, rest = TYPES[name]
    file, written = exported(loaded, predictors, tmp_path / "out", **options)
    kinds = {name.removeprefix("blk.1."): kind for name, kind in file.types.items()}
    kinds = {name: kind for name, kind in kinds.items() if not name.startswith("blk.0.")}
    assert kinds == {
        **dict.fromkeys(("attn_norm.weight", "ffn_norm.weight", "output_norm.weight"), F32),
        **dict.fromkeys(("token_embd.weight", "output.weight"), rest),
        **dict.fromkeys((f"attn_{part}.weight" for part in ("q", "k", "v", "output")), rest),
        **dict.fromkeys(("fc1.weight", "fc2.weight"), F16),
        **dict.fromkeys(("ffn_gate.weight", "ffn_up.weight", "ffn_down_t.weight"), ffn),
    }
    decoder = loaded.model.model
    for tensor, weight, kind in (
        ("blk.1.ffn_down_t.weight", decoder.layers[1].mlp.down_proj.weight.T, ffn),
        ("blk.1.attn_v.weight", decoder.layers[1].self_attn.v_proj.weight, rest),
        ("token_embd.weight", decoder.embed_tokens.weight, rest),
    ):
        expected = quants.dequantize(quants.quantize(weight.contiguous().numpy(), Type(kind)), Type(kind))
        assert torch.equal(file.tensors[tensor], torch.from_numpy(expected.astype("float32")))
    note = next(note for note in written.notes if note.startswith("Feed-forward weights"))
    ffn_bytes = sum(int(size) for tensor, size in file.num_bytes.items() if re.search("ffn_(gate|up|down_t)", tensor))
    embedding = int(file.num_bytes["token_embd.weight"])
    assert f"Feed-forward weights {ffn_bytes / 1e6:.1f} MB ({options.get('ffn_type', 'f16')})" in note
    assert f"embedding {embedding / 1e6:.1f} MB ({options.get('rest_type', options.get('ffn_type', 'f16'))})" in note


def test_every_row_of_the_embedding_has_its_token(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    file, _ = exported(loaded, predictors, tmp_path / "out")
    pieces = SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    tokens = file.keys["tokenizer.ggml.tokens"]
    assert tokens[:2048] == [pieces.id_to_piece(i) for i in range(2048)]
    assert tokens[2048:] == ["[PAD2048]", "[PAD2049]"]
    assert len(set(tokens)) == PADDED == len(file.tensors["output.weight"])
    assert file.keys["tokenizer.ggml.scores"][:2048] == pytest.approx([pieces.get_score(i) for i in range(2048)])
    assert file.keys["tokenizer.ggml.bos_token_id"] == 1
    assert file.keys["tokenizer.ggml.token_type"][:8] == [2, 3, 3, 1, 1, 1, 1, 6]


def test_the_split_puts_the_hottest_neurons_on_the_gpu(loaded: Loaded, predictors: Predictors, tmp_path: Path) -> None:
    _, written = exported(loaded, predictors, tmp_path / "out", vram_bytes=int(1.6 * NEURONS * 3 * 32 * 2))
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
    groups = torch.stack(counts).sort(dim=1, descending=True).values.unflatten(1, (-1, SPLIT_NEURONS)).sum(-1)
    chosen = [len(split.tensors[f"blk.{layer}.gpu_bucket"]) // SPLIT_NEURONS for layer in (0, 1)]
    assert sum(chosen) == 6
    # Less than the limit, which is no multiple of 256 neurons: the engine uses a split only if its bytes are left.
    capacity = split.keys["split.vram_capacity"]
    assert capacity == 6 * SPLIT_NEURONS * 3 * 32 * 2
    file = File(tmp_path / "out" / written.model_file)
    note = next(note for note in written.notes if "--vram-budget" in note)
    budgets = re.findall(r"--vram-budget ([0-9.]+)` at `-c ([0-9]+)`", note)
    assert [int(context) for _, context in budgets] == [512, 128]
    for budget, context in budgets:
        assert gpu_bytes_left(file, float(budget), int(context)) >= capacity
        assert gpu_bytes_left(file, float(budget) - 0.001, int(context)) < capacity
    assert note in (tmp_path / "out" / "README.md").read_text()
    gained = sum(float(row[:number].sum()) for row, number in zip(groups, chosen, strict=True))
    assert gained == float(groups.flatten().sort(descending=True).values[:6].sum())


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
    readme = (out / "README.md").read_text()
    assert "convert.py --outtype f16 --outfile tiny.powerinfer.gguf model predictor" in readme
    sums = read_sums(out)
    assert sums["predictor/model_1.pt"] == sha256(out / "predictor" / "model_1.pt")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"intermediate_size": 1000}, "intermediate_size is 1000; up to 1,000"),
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


def test_an_unsupported_model_is_refused_before_its_predictors_are_asked_for(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    config = SparseMistralConfig(**CONFIG | {"intermediate_size": 64})
    SparseMistralForCausalLM(config).save_pretrained(folder)
    write_config(config, folder, torch.float32)
    copy_tokenizer(TOKENIZER, folder)
    assert run_cli("export", str(folder), "--to", str(tmp_path / "out"), "--format", "powerinfer") == 2
    said = capsys.readouterr()
    assert "intermediate_size is 64" in said.out + said.err
    assert "predictors" not in said.out + said.err


def test_a_tokenizer_that_adds_a_space_is_told_from_one_that_does_not(loaded: Loaded) -> None:
    for scheme, adds in (("always", True), ("never", False)):
        own = copy.deepcopy(loaded.tokenizer)
        own.backend_tokenizer.normalizer = None
        own.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        vocabulary = read_vocabulary(TOKENIZER, own, PADDED)
        assert vocabulary.prefix == " " * adds
        assert vocabulary.notes == [PREFIX_NOTE if adds else NO_PREFIX_NOTE]


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
    odd = SparseMistralConfig(**CONFIG | {"intermediate_size": 1032})
    with pytest.raises(ExportError, match="q4_0 has blocks of 32"):
        check_holdable(odd, "q4_0", None)
    check_holdable(odd, "f16", None, "q8_0")
    with pytest.raises(ExportError, match="q8_0 has blocks of 32"):
        check_holdable(SparseMistralConfig(**CONFIG | {"hidden_size": 48}), "f16", None, "q8_0")
    with pytest.raises(ExportError, match="in groups of 256"):
        check_split(odd)
    cut = SparseMistralConfig(**CONFIG)
    cut.sparsification = {"method": "percentile", "sites": {"inter": {"per": "channel"}, "attn_in": {}, "ffn_in": {}}}
    with pytest.raises(ExportError, match="a mask of percentile on attn_in, ffn_in, which"):
        check_holdable(cut, "f16", None)
    sequence = SparseMistralConfig(**CONFIG | {"sliding_window": 64})
    check_holdable(sequence, "f16", 64)
    assert supported_context(sequence) == 64, "in which predictors are evaluated"
    assert supported_context(SparseMistralConfig(**CONFIG)) == CONFIG["max_position_embeddings"]


def evaluated(predictors: Predictors, threshold: float | None, *, dropped: bool = False) -> Predictors:
    result = EvaluationFacts(
        threshold=threshold,
        verdict="Above this the loss rises by 0.0123 nats."
        if threshold is not None
        else "No threshold keeps the loss.",
        loss=2.0,
        loss_rise=None if threshold is None else 0.0123,
        dropped_thresholds=dropped,
        num_tokens=4096,
        text="held-out text",
    )
    return predictors._replace(facts=predictors.facts.model_copy(update={"evaluations": {"powerinfer": result}}))


@pytest.fixture(scope="module")
def thresholded(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Predictors]:
    """The model with thresholds on the product and the gate, which change its outputs, and its predictors."""
    root = tmp_path_factory.mktemp("thresholded")
    sites = {"inter": {"per": "channel"}, "gate": {"per": "layer"}}
    config = SparseMistralConfig(**CONFIG, sparsification={"method": "thresholds", "sites": sites})
    model = SparseMistralForCausalLM(config).eval()
    missing = model.load_state_dict(loaded.model.state_dict(), strict=False).missing_keys
    assert len(missing) == 4
    for block in model.ffn_blocks():
        block.ffn_activation.threshold.fill_(0.05)
        block.ffn_activation.gate_mask.threshold.fill_(0.1)
    model.save_pretrained(root / "model")
    write_config(config, root / "model", torch.float32)
    copy_tokenizer(TOKENIZER, root / "model")
    own = load(str(root / "model"))
    settings = Settings("residual", wanted_recall=0.9, budget_share=1.0, ranks=(12,), passes=2)
    return own, train_predictors(
        own.model, batches(30, 1), batches(4, 2), settings, text="random", state_path=root / "state"
    )


def test_thresholds_are_dropped_and_what_that_cost_is_written(
    loaded: Loaded, thresholded: tuple[Loaded, Predictors], tmp_path: Path
) -> None:
    own, predictors = thresholded[0], rounded(thresholded[1])
    file, written = exported(own, evaluated(predictors, 0.25, dropped=True), tmp_path / "out")
    # The engine has the masks, but not the thresholds: the model without them, masked.
    masked = masked_logits(loaded, with_threshold(predictors, 0.25))
    assert difference(engine_logits(file, IDS[0]), masked) < 1e-3
    assert difference(masked_logits(own, with_threshold(predictors, 0.25)), masked) > 1e-2, "the thresholds do nothing"
    assert difference(plain_logits(own), plain_logits(loaded)) > 1e-2, "the model has its thresholds again"
    assert file.keys["powerinfer.sparse_threshold"] == 0.25
    readme = (tmp_path / "out" / "README.md").read_text()
    for text in (readme, " ".join(written.notes)):
        assert (
            "does not apply the thresholds of thresholds on gate, inter that the model stores, so they were dropped"
            in text
        )
        assert "the loss is 2.0123 nats per token, +0.0123 against 2.0000 of the model as trained" in text


def test_thresholds_whose_cost_is_unknown_are_refused(
    thresholded: tuple[Loaded, Predictors], loaded: Loaded, predictors: Predictors, tmp_path: Path
) -> None:
    own, theirs = thresholded
    with pytest.raises(ExportError, match="What that costs was not measured"):
        exported(own, theirs, tmp_path / "out")
    with pytest.raises(ExportError, match="refused every threshold: No threshold keeps the loss"):
        exported(own, evaluated(theirs, None, dropped=True), tmp_path / "out")
    with pytest.raises(ExportError, match="refused every threshold"):
        exported(loaded, evaluated(predictors, None), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, written = exported(loaded, predictors, tmp_path / "out")
    assert "The predictors were not evaluated for PowerInfer" in " ".join(written.notes)


@pytest.mark.parametrize(("scale", "ffn_type"), [(0.5, "f16"), (1.5, "f16"), (1.5, "q4_0"), (200.0, "q4_0")])
def test_products_that_the_kernel_cannot_hold_are_found(
    scale: float, ffn_type: str, loaded: Loaded, tmp_path: Path
) -> None:
    """`scale` times the largest number in F16, on the text that firing neurons are counted on."""
    large = Loaded(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.name, None)
    mlp = large.model.model.layers[1].mlp
    products: list[torch.Tensor] = []
    hook = mlp.ffn_activation.register_forward_hook(lambda _module, _args, product: products.append(product))
    with torch.no_grad():
        for batch in batches(4, 3):
            large.model(**batch, use_cache=False)
        hook.remove()
        mlp.up_proj.weight *= scale * 65504 / float(torch.cat(products).max())
        mlp.down_proj.weight.zero_()  # so that the rest of the model stays as it is
    everything = random_predictors(large.model, -1e9, "residual")
    options = {"ffn_type": ffn_type, "rest_type": "f16"}
    if scale == 0.5:
        _, written = exported(large, everything, tmp_path / "out", **options)
        assert any("The largest product of a neuron's gate and up is 32,7" in note for note in written.notes)
    elif (scale, ffn_type) == (1.5, "q4_0"):
        _, written = exported(large, everything, tmp_path / "out", **options)
        assert not any("largest product" in note for note in written.notes)
    else:
        with pytest.raises(ExportError, match=r"reaches (98,2|13,1).*beyond the (65,504|8,319,008)") as raised:
            exported(large, everything, tmp_path / "out", **options)
        assert ("--ffn-type q4_0" in raised.value.next_step) is (ffn_type == "f16")
        assert not (tmp_path / "out").exists()


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
        patch.setattr(sys, "argv", ["sparsify", *arguments])
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
    own = ["--predictors", str(tmp_path / "own"), "--on", str(text)]
    expected = "The predictors were not evaluated for PowerInfer"
    if predictors.facts.input == "residual":
        evaluation = ["--engine", "powerinfer", "--max-loss-rise", "9", "--tokens", "64", "--threshold", "2"]
        assert run_cli("predictors", "evaluate", loaded.name, *own, *evaluation) in (0, None)
        assert (tmp_path / "own-evaluated-powerinfer" / "index.html").is_file()
        facts = read_predictors(tmp_path / "own").facts
        assert (facts.threshold, facts.evaluations["powerinfer"].threshold) == (0.0, 2.0)
        predictors, expected = with_threshold(predictors, 2.0), "With predicted masks the loss is"
    capsys.readouterr()
    options = ["--to", str(tmp_path / "out"), "--format", "powerinfer"]
    assert run_cli("export", loaded.name, *own, *options) in (0, None)
    said = capsys.readouterr().out
    assert "out.powerinfer.gguf" in said
    assert expected in " ".join(said.split())
    prefix = read_vocabulary(TOKENIZER, loaded.tokenizer, PADDED).prefix
    assert (PREFIX_NOTE if prefix else NO_PREFIX_NOTE) in " ".join(said.split())
    assert f"-p '{prefix}Once upon a time'" in (tmp_path / "out" / "README.md").read_text()
    file = File(tmp_path / "out" / "out.powerinfer.gguf")
    assert difference(engine_logits(file, IDS[0]), masked_logits(loaded, predictors)) < 5e-2


def test_the_text_of_a_mixture_has_the_tokens_that_are_wanted(
    loaded: Loaded,
    predictors: Predictors,
    mixture_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # for the cache of tokens
    write_predictors(predictors, tmp_path / "own")
    options = PowerInferOptions(tmp_path / "own", on=str(mixture_file), tokens=128)
    with caplog.at_level("INFO", logger="sparsify"):
        to_powerinfer(loaded.name, tmp_path / "out", "powerinfer", options)
    assert "fire on 128 tokens: held-out sequences of mixture own" in caplog.text, "though it has three sources"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "gguf"], "Allowed: hf, llamacpp, powerinfer, powerinfer_hf"),
        (["--ffn-type", "q4_0"], "--format hf does not take --ffn-type"),
        (["--format", "powerinfer_hf", "--vram-gb", "1"], "does not take --vram-gb"),
        (["--format", "powerinfer", "--ffn-type", "q8_0"], "Allowed: f16, q4_0"),
        (["--format", "powerinfer", "--rest-type", "q4_1"], "Allowed: f16, q8_0, q4_0"),
        (["--format", "powerinfer_hf", "--rest-type", "f16"], "does not take --rest-type"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("export", "nowhere", "--to", str(tmp_path / "out"), *options) == 2
    assert words in capsys.readouterr().err
