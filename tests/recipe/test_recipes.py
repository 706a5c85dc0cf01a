"""Every shipped YAML works, and what a user can get wrong in one is said in a way that helps."""

from __future__ import annotations

import cProfile
import pstats
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import RecipeError
from sparsify.mixture.sequences.shares import share_phases, token_shares
from sparsify.models import ACTIVATIONS
from sparsify.recipe.catalogue import (
    copy_recipe,
    folder,
    mixture_names,
    recipe_names,
    recipe_path,
    recipe_summary,
)
from sparsify.recipe.compose import compose_recipe, load_mixture, load_recipe, save_recipe, sweep
from sparsify.recipe.engine import AUTO_STAGE
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ConversionSection

RECIPES = recipe_names()
# The variants of these benchmarks are each other's baselines.
VARIANTS = [name for name in RECIPES if name.startswith(("recovery/", "proof/"))]
SPARSE_RECIPES = [name for name in RECIPES if name not in ("quickstart_base", "smollm2_proof", *VARIANTS)]
TURBOSPARSE = ["turbosparse_mistral_7b", "turbosparse_mixtral_8x7b"]
OF_FAMILIES = ["qwen3_4b", "llama3_8b", "gemma3_4b", "olmo2_7b", "qwen3_30b_a3b"]


@cache
def composed(name: str) -> Recipe:
    """One composing for all tests that only read the recipe."""
    return compose_recipe(name)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (folder("recipes") / group).rglob("*.yaml"))


# Every shipped file


def test_no_yaml_is_left_out_of_the_catalogue() -> None:
    groups = {"model", "activation", "conversion", "engine"}
    shipped = [path.relative_to(folder("recipes")) for path in folder("recipes").rglob("*.yaml")]
    recipes = {str(path.with_suffix("")) for path in shipped if path.parts[0] not in groups}
    assert recipes == set(RECIPES)
    assert {"quickstart", "quickstart_mixtral", "smollm2_135m", *TURBOSPARSE} <= recipes


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_composes_under_its_own_name_with_a_command_and_a_purpose(name: str) -> None:
    assert composed(name).name == name
    first_line = recipe_path(name).read_text().splitlines()[0]
    assert first_line == f"# sparsify train {name}"
    assert len(recipe_summary(recipe_path(name))) > 20


@pytest.mark.parametrize("name", SPARSE_RECIPES)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "drelu"])
def test_every_sparse_recipe_has_its_controls(name: str, activation: str) -> None:
    recipe = compose_recipe(name, [f"activation={activation}"])
    assert recipe.activation.ffn_activation == activation
    dense = "geglu" if name == "gemma3_4b" else "swiglu"
    assert recipe.baseline.ffn_activation == (None if name in TURBOSPARSE else dense)


@pytest.mark.parametrize("name", ["quickstart", *TURBOSPARSE, *OF_FAMILIES])
def test_a_recipe_starts_from_the_calibrated_replacement_and_the_bare_one_is_one_override(name: str) -> None:
    recipe, bare = composed(name), compose_recipe(name, ["conversion=bare"])
    assert (recipe.conversion.calibration_tokens, recipe.conversion.target_zeros) == (32_768, 0.9)
    assert bare.conversion == ConversionSection()
    assert bare.run_dir == f"runs/{name},conversion=bare"


@pytest.mark.parametrize("name", ["paper/from_scratch_2m", "paper/from_scratch_300m"])
def test_random_weights_have_nothing_to_calibrate(name: str) -> None:
    assert composed(name).conversion == ConversionSection()
    with pytest.raises(RecipeError, match=r"calibration_tokens is set with model\.init=random"):
        compose_recipe(name, ["conversion=calibrated"])


def test_a_gate_threshold_is_the_published_one_unless_given() -> None:
    fatrelu = compose_recipe("quickstart", ["activation=fatrelu"]).activation
    assert fatrelu.model_gate_threshold == 0.01
    override = ["activation=fatrelu", "activation.gate_threshold=0.2"]
    assert compose_recipe("quickstart", override).activation.model_gate_threshold == 0.2
    assert composed("quickstart").activation.model_gate_threshold == 0


@pytest.mark.parametrize("option", options("engine"))
def test_every_engine_composes(option: str) -> None:
    recipe = compose_recipe("quickstart", [f"engine={option}", "training.precision=fp32"])
    expected = AUTO_STAGE if option == "auto" else int(option.removeprefix("zero")[0])
    assert recipe.engine.zero_stage == expected


@pytest.mark.parametrize("option", options("model"))
def test_every_model_composes(option: str) -> None:
    model = compose_recipe("quickstart", [f"model={option}", "conversion=bare"]).model
    assert (model.source is None) == (model.init == "random")


@pytest.mark.parametrize("name", mixture_names())
def test_every_mixture_loads_and_composes_to_the_same(name: str) -> None:
    assert compose_recipe("quickstart", [f"mixture={name}"]).mixture == load_mixture(name)


@pytest.mark.parametrize("path", sorted(folder("eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_evaluation_composes(path: Path) -> None:
    assert compose_recipe("quickstart", [f"eval={path.stem}"]).eval.name == path.stem


# Turbo Sparse, arXiv 2406.05955: section 5, appendix and Table 4


@pytest.mark.parametrize("name", TURBOSPARSE)
def test_turbosparse_has_the_papers_hyperparameters(name: str) -> None:
    recipe = composed(name)
    assert recipe.training.sequence_length == 4096
    assert recipe.training.global_batch_size == 2048
    assert recipe.training.budget_tokens == 150_000_000_000
    assert recipe.num_steps == pytest.approx(17_900, rel=2e-3)
    assert recipe.optimizer.warmup_tokens == 1000 * recipe.step_tokens
    assert recipe.optimizer.peak_learning_rate == 5e-5
    assert recipe.optimizer.final_learning_rate == 5e-6
    assert (recipe.optimizer.beta1, recipe.optimizer.beta2) == (0.9, 0.95)
    assert recipe.activation.ffn_activation == "drelu"


def test_the_300m_comparison_has_the_papers_hyperparameters() -> None:
    """Section 3.2 and appendix A."""
    recipe = composed("paper/from_scratch_300m")
    assert recipe.step_tokens == 128 * 2048
    assert recipe.optimizer.warmup_tokens == 2000 * recipe.step_tokens
    assert recipe.optimizer.peak_learning_rate == 1e-4
    assert recipe.optimizer.weight_decay == 0.01
    shape = recipe.model.architecture
    assert (shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]) == (
        1024,
        24,
        32000,
    )
    assert composed("paper/from_scratch_2m").baseline.ffn_activation == "swiglu"


def test_turbosparse_mixture_has_the_shares_of_table_4() -> None:
    table_4 = {
        ("pile_arxiv", "pile_pubmed", "pile_philpapers"): 2.69,
        ("pes2o",): 7.83,
        ("wanjuan_cc",): 73.55,
        ("redpajama_wikipedia",): 0.65,
        ("pile_openwebtext2",): 0.44,
        ("redpajama_books",): 6.54,
        ("pile_pg19",): 0.37,
        ("open_web_math",): 1.46,
        ("proof_pile_2",): 0.76,
        ("algebraic_stack",): 0.54,
        ("starcoder",): 0.77 + 0.74 + 0.52 + 1.73,
        ("github_code",): 1.41,
    }
    shares = token_shares(load_mixture("turbosparse"))
    for sources, percent in table_4.items():
        assert 100 * sum(shares.pop(source) for source in sources) == pytest.approx(percent)
    assert not shares


def test_turbosparse_sft_keeps_the_table_within_its_pretraining_side() -> None:
    plain, mixed = token_shares(load_mixture("turbosparse")), load_mixture("turbosparse_sft")
    shares = token_shares(mixed)
    instructions = {name for name, source in mixed.sources.items() if source.group == "instruction"}
    assert instructions == {"orca_math", "bagel"}
    assert sum(shares[name] for name in instructions) == pytest.approx(0.05)
    assert {name: shares[name] / 0.95 for name in plain} == pytest.approx(plain)


def test_bamboo_has_the_two_phases_of_its_200_billion_tokens() -> None:
    phases = share_phases(load_mixture("bamboo"))
    assert [end * 200 for end, _, _ in phases] == [150, 200]
    early, late = phases[0][1], phases[1][1]
    assert all(late[name] > early[name] for name in ("starcoder", "open_web_math"))


def test_prosparse_mixes_the_papers_instruction_sets_all_the_way() -> None:
    mixture = load_mixture("prosparse")
    names = {name for name, source in mixture.sources.items() if source.group == "instruction"}
    assert names == {
        "ultrachat", "p3", "paq", "unnatural_instructions", "flan", "super_natural_instructions",
    }  # fmt: skip
    assert len(share_phases(mixture)) == 1


# What a user writes


def test_overrides_take_readable_numbers() -> None:
    recipe = compose_recipe("quickstart", ["training.budget_tokens=1_000_000"])
    assert recipe.training.budget_tokens == 1_000_000


def test_the_ratio_of_instructions_is_one_override() -> None:
    recipe = compose_recipe("quickstart", ["mixture.instruction_token_share=0.3"])
    shares = token_shares(recipe.mixture)
    assert shares["questions"] == pytest.approx(0.3)
    stated = recipe.mixture.sources
    kept = stated["code"].token_share / stated["prose"].token_share
    assert shares["code"] / shares["prose"] == pytest.approx(kept)


def test_own_recipe_builds_on_a_shipped_one_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my recipe.yaml").write_text("defaults: [quickstart, {override /engine: zero2}, _self_]\nname: mine\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = compose_recipe("../my recipe.yaml", ["activation=reglu"])
    assert recipe.run_dir == "runs/mine,activation=reglu"
    assert compose_recipe("../my recipe.yaml").run_dir == "runs/mine"
    assert recipe.engine.zero_stage == 2
    assert recipe.activation.ffn_activation == "reglu"
    assert recipe.mixture == load_mixture("quickstart")


def test_own_mixture_and_evaluation_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.yaml").write_text("name: mine\nsources: {books: {files: [b.txt], token_share: 1.0}}\n")
    (tmp_path / "rare.yaml").write_text("name: rare\nevery_tokens: 5_000_000\n")
    monkeypatch.chdir(tmp_path)
    recipe = compose_recipe("quickstart", ["mixture=my.yaml", "eval=rare.yaml"])
    assert list(recipe.mixture.sources) == ["books"]
    assert recipe.mixture == load_mixture("my.yaml")
    assert recipe.eval.every_tokens == 5_000_000


@given(
    seed=st.integers(0, 2**31),
    share=st.none() | st.floats(0, 1),
    rate=st.floats(1e-6, 1.0),
    name=st.text("abc-_é ", min_size=1).map(str.strip).filter(bool),
)
@settings(max_examples=10, deadline=None)
def test_a_saved_recipe_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float | None, rate: float, name: str
) -> None:
    recipe = deepcopy(composed("smollm2_135m"))
    recipe.name, recipe.training.seed, recipe.mixture.instruction_token_share = name, seed, share
    recipe.optimizer.peak_learning_rate = rate
    path = tmp_path_factory.mktemp("run") / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_copying_gives_a_recipe_with_runs_of_its_own(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy_recipe("quickstart", copy)
    recipe, original = compose_recipe(str(copy)), composed("quickstart")
    assert recipe.run_dir == "runs/mine"
    assert recipe.training == original.training
    assert recipe.mixture == original.mixture
    assert copy.read_text().startswith(f"# sparsify train {copy}\n")
    with pytest.raises(RecipeError, match="exists already"):
        copy_recipe("quickstart", copy)


def test_a_sweep_gives_every_combination_a_folder_of_its_own() -> None:
    runs = [
        compose_recipe("quickstart", overrides)
        for overrides in sweep(["activation=drelu,reglu", "training.seed=1,2", "name=grid"])
    ]
    assert {(run.activation.ffn_activation, run.training.seed) for run in runs} == {
        ("drelu", 1),
        ("drelu", 2),
        ("reglu", 1),
        ("reglu", 2),
    }
    assert len({run.run_dir for run in runs}) == 4
    assert runs[0].run_dir == "runs/grid,activation=drelu,seed=1"
    assert sweep(["training.seed=1"]) == [["training.seed=1"]]


# What a user gets wrong: the overrides, then what the message must hold

BAD_OVERRIDES = {
    "training.budget_token=5": ["'training.budget_token'", "Did you mean 'budget_tokens'?"],
    "activaton=drelu": ["Did you mean 'activation'?"],
    "weight_decay=0.1": ["Did you mean 'optimizer.weight_decay'?"],
    "+foo=3": ["no setting 'foo'"],
    "training.window_tokens=512": ["It is called training.sequence_length now."],
    "swap.budget_share=0.5": ["It is called blending now."],
    "+training.foo=3": ["no setting 'training.foo'", "budget_tokens"],
    "training.budget_tokens=lots": ["training.budget_tokens is 'lots'", "Integer, 1 to"],
    "training.budget_tokens=???": ["training.budget_tokens is not set"],
    "training=4": ["training=4: training is a section", "training.budget_tokens"],
    "foo": ["'foo' is not an override", "KEY=VALUE"],
    "activation=dreluu": ["no activation 'dreluu'", "Did you mean 'drelu'?", "reglu, relu2"],
    "engine=zero9": ["no engine 'zero9'", "zero0, zero1, zero2, zero3, zero3_offload"],
    "mixture=quikstart": ["Did you mean 'quickstart'?", "mixture=PATH.yaml"],
    "mixture=gone.yaml": ["mixture=gone.yaml", "no such file"],
    "mixture.sources.cod.token_share=1": ["Did you mean 'code'?", "code, prose, questions"],
    "mixture.sources.code.token_share=0.99": ["sum to", "They must sum to 1"],
    "mixture.sources.code.group=pretrain": ["Did you mean 'pretraining'?"],
    "mixture.sources.code.files=[a.txt]": ["Exactly one of files, hub, stdlib"],
    "mixture.instruction_token_share=1.5": ["mixture.instruction_token_share is 1.5", "0 to 1"],
    "engine=zero0 training.precision=bf16": ["engine.zero_stage is 0", "bf16", "engine=zero1"],
    "engine.offload_parameters_to_cpu=true": ["engine=zero3_offload"],
    "training.global_batch_size=17": ["training.global_batch_size is 17", "multiple of"],
    "training.precision=fp16": ["'fp16'", "bf16, fp32"],
    "activation.ffn_activation=gelu": ["'gelu'", "swiglu, geglu, reglu,"],
    "conversion=bare conversion.target_zeros=0.9": [
        "conversion.target_zeros=0.9 would be ignored",
        "calibration_t",
    ],
    "conversion=bare conversion.target_density=0.9": ["conversion.target_density=0.9 would be ignored"],
    "conversion.calibration_tokens=9999 conversion.target_density=1.2": ["is 1.2.", "such as 0.5"],
    "conversion.calibration_tokens=300": ["at least eight sequences: 2048"],
    "conversion.calibration_tokens=9999 conversion.target_zeros=90": ["is 90.", "such as 0.9"],
    "conversion.calibration_tokens=9999 conversion.refit_target=mx": ["Did you mean 'mix'?"],
    "activation.gate_threshold=0.1": ["activation.gate_threshold=0.1 would be ignored", "fatrelu"],
    "activation=fatrelu activation.gate_threshold=-1": ["activation.gate_threshold is -1", "0 or"],
    "optimizer.final_learning_rate=1": ["optimizer.final_learning_rate", "peak_learning_rate"],
    "model.source=null": ["model.source"],
    "launch.processes=0": ["launch.processes is 0", "1 to 4,096"],
}


@pytest.mark.parametrize("overrides", BAD_OVERRIDES)
def test_a_bad_override_is_answered_with_help(overrides: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compose_recipe("quickstart", overrides.split())
    for words in BAD_OVERRIDES[overrides]:
        assert words in str(caught.value)


def test_instructions_need_a_source() -> None:
    with pytest.raises(RecipeError, match="no instruction source"):
        compose_recipe("turbosparse_mistral_7b", ["mixture.instruction_token_share=0.1"])


BAD_FILES = {
    "defaults: [quickstart, _self_]\ntraining: {budget_token: 3}\n": "Did you mean 'budget_tokens'",
    "defaults: [quickstart, _self_]\ntraining: {budget_tokens: lots}\n": "Integer",
    "defaults: [quickstart, _self_]\ntraining: [\n": "line 3",
    "defaults: [recipe_schema, {engine: zero9}, _self_]\nname: x\n": "no engine 'zero9'",
    "defaults: [recipe_schema, {engin: zero1}, _self_]\nname: x\n": "Groups: model, activation",
    "defaults: [quickstrt, _self_]\nname: x\n": "no recipe 'quickstrt'",
    "defaults: [recipe_schema, _self_]\nname: x\n": "is not set",
    "- a list\n": "mine.yaml",
    "": "is not set",
}


@pytest.mark.parametrize("content", BAD_FILES)
def test_a_bad_recipe_file_is_named_with_its_fault(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=re.escape(BAD_FILES[content])) as caught:
        compose_recipe(str(path))
    assert "mine.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("name: [\n", "cannot be read as YAML"),
        ("name: x\n", "no sources"),
        ("name: x\nsorces: {}\n", "Did you mean 'sources'"),
        ("name: x\nsources: {a: {stdlib: code}}\n", "token_share is not set"),
    ],
)
def test_a_bad_mixture_file_is_answered_with_help(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=words):
        load_mixture(str(path))
    with pytest.raises(RecipeError, match=words):
        compose_recipe("quickstart", [f"mixture={path}"])


def test_a_mistyped_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        compose_recipe("quikstart")
    with pytest.raises(RecipeError, match="Did you mean 'turbosparse'"):
        load_mixture("turbospars")
    with pytest.raises(RecipeError, match=r"no recipe 'gone\.yaml'"):
        compose_recipe("gone.yaml")


def test_a_damaged_saved_recipe_is_no_traceback(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.yaml").write_text("name: x\nfoo: 1\n")
    with pytest.raises(RecipeError, match="no setting 'foo'"):
        load_recipe(tmp_path / "recipe.yaml")


OWN_SOURCES = """\
name: own
sources:
  b: {files: [b.txt], token_share: 0.5, max_epochs: 2}
  a: {files: ["${name}.txt"], token_share: 0.25}
  c: {files: [c.txt], token_share: 0.25, group: instruction, text_column: body}
"""


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["mixture.sources.b.token_share=0.4", "mixture.sources.a.token_share=0.35"],
        ["~mixture.sources.b", "mixture.sources.c.token_share=0.75"],
        ["+mixture.sources.d={files: [d.txt], token_share: 0.0}"],
        ["mixture.instruction_token_share=0.5"],
        ["training.seed=${mixture.sources.b.max_epochs}"],
        ["mixture.sources={}"],
        ["mixture.sources.c.grup=1"],
    ],
)
@pytest.mark.parametrize("body", ["", "mixture: {sources: {b: {max_epochs: 3}}}\n"])
def test_sources_that_hydra_does_not_compose_are_those_that_it_would(
    overrides: list[str], body: str, tmp_path: Path
) -> None:
    """A mixture file with a list of defaults goes through Hydra as a whole."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"defaults: [quickstart, _self_]\nname: mine\n{body}")
    found = []
    for first in ("", "defaults: [_self_]\n"):
        (tmp_path / "own.yaml").write_text(first + OWN_SOURCES)
        try:
            composed = compose_recipe(str(recipe), [f"mixture={tmp_path / 'own.yaml'}", *overrides])
            found.append((composed, list(composed.mixture.sources)))
        except RecipeError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_thousands_of_sources_do_not_cost_as_many_copies(tmp_path: Path) -> None:
    """Calls are counted: they are the same on a busy machine, where seconds are not."""
    calls = []
    for first in ("", "defaults: [_self_]\n"):
        sources = "".join(f"  s{n}: {{files: [a.txt], token_share: 0.0025}}\n" for n in range(400))
        (tmp_path / "own.yaml").write_text(f"{first}name: own\nsources:\n{sources}")
        profile = cProfile.Profile()
        composed = profile.runcall(compose_recipe, "quickstart", [f"mixture={tmp_path / 'own.yaml'}"])
        assert len(composed.mixture.sources) == 400
        calls.append(pstats.Stats(profile).total_calls)  # pyright: ignore[reportAttributeAccessIssue]
    assert calls[0] < calls[1] / 2
