"""The typed schema of a recipe. Every setting and every default of the product stands here, once.

A recipe is one YAML file in `recipes/` (or a user's own) that Hydra composes onto `Recipe`; mixtures come
from `data_mixtures/`, measurement plans from `eval/`. Unknown keys and wrong types are refused while
composing (`sparsify.recipe.compose`), combinations that cannot work by `validate` below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from sparsify.recipe.evaluation import EvalSection
from sparsify.recipe.sparsification import (
    ActivationSection,
    BlendingSection,
    ConversionSection,
    DistillationSection,
    SparsitySection,
)

AUTO_STAGE = -1
FUSED_FFN_ACTIVATIONS = ("swiglu", "reglu", "drelu")
"""Those that `training.fused_activation` has kernels for."""
FUSED_ACTIVATION = ("auto", "triton", "inductor", "off")
ATTENTION_IMPLEMENTATIONS = ("sdpa", "flex_attention")
"""Not flash_attention_2: transformers tells documents apart there only when a forward pass has one sequence."""
ON_BAD_STEP = ("skip", "rollback", "stop")
EXECUTION_SETTINGS = (
    "micro_batch_size",
    "gradient_checkpointing",
    "fused_activation",
    "liger_kernels",
    "compile",
    "count_zeros",
)
"""Settings of `training` that change how a step is computed, but not which one: a run may go on with others."""


@dataclass
class ModelSection:
    """Where the weights come from."""

    source: str | None = None
    """A checkpoint folder, a Hub id, a GGUF file, or `package:NAME/PATH` inside an installed Python package."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    init: str = "pretrained"
    """`pretrained` reads `source`; `random` builds `architecture` from `training.seed`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """transformers config fields with `model_type` mistral or mixtral. For `random` it is the model; for `pretrained`
    it is what the checkpoint must be (checked on load) and what `plan` uses before the checkpoint is here."""
    tokenizer: str | None = None
    """Where the tokenizer comes from; `source` unless given."""
    upcycle_experts: int | None = None
    """Turn a dense Mistral into a Mixtral with this many experts, each a copy of the FFN."""
    upcycle_experts_per_token: int = 2


@dataclass
class SourceSection:
    """One source of a mixture: where its text is, what it is, how much of the run it gets."""

    token_share: float = MISSING
    """Share of all training tokens, over the whole mixture; the shares of a mixture sum to 1. Where the mixture sets
    `instruction_token_share`, it may be the share within the group instead; then the shares of each group sum to 1."""
    group: str = "pretraining"
    """`pretraining` or `instruction`: the two sides of `instruction_token_share`."""
    max_epochs: float | None = None
    """How often a run may see each document; null repeats the source as often as the budget asks."""
    when_exhausted: str = "stop"
    """What a source does that has reached `max_epochs`: `stop` refuses a run that would exceed it and says which budget fits;
    `redistribute` gives its share to the other sources from there on, in proportion."""
    files: list[str] | None = None
    """Local paths or globs: .jsonl .ndjson .json .csv .tsv .parquet .arrow .txt .text .md, each plain or .gz .zst .xz, and
    folders that `datasets.save_to_disk` wrote."""
    document_separator: str = "<|endoftext|>"
    """What stands between the documents of plain text: "\\n\\n", for example, makes each paragraph one."""
    token_files: list[str] | None = None
    """Paths or globs of text that the run's tokenizer has tokenised already: .npy or .bin, documents one after another,
    each ended by the end-of-sequence token. Pretraining only."""
    token_dtype: str | None = None
    """`uint16` or `uint32`: what the numbers of .bin files are."""
    hub: str | None = None
    """A Hugging Face dataset id, streamed."""
    hub_config: str | None = None
    hub_split: str = "train"
    hub_revision: str | None = None
    stdlib: str | None = None
    """Text that every Python installation carries: `code`, `prose` or `questions`."""
    text_column: str = "text"
    """Column with the document; pretraining sources only."""
    text_template: str | None = None
    """Jinja text over a row's columns instead of `text_column`: `"# {{ title }}\\n{{ body }}"`."""
    prompt_column: str = "prompt"
    response_column: str = "response"
    """Columns of a prompt and its answer; instruction sources only."""
    prompt_template: str | None = None
    response_template: str | None = None
    """Jinja text over a row's columns, each instead of the column of its name."""
    input_column: str | None = None
    """Column that is appended to the prompt after a blank line where it is not empty."""
    system_column: str | None = None
    """Column that becomes the system message where it is not empty."""
    messages_column: str | None = None
    """Column with a whole conversation, instead of all of the above: a list of {role, content}, or of {from, value}."""


@dataclass
class PhaseSection:
    """Shares from where the phase before ended up to a point of the run."""

    until_budget_share: float = MISSING
    """Where the phase ends, as a share of the training budget; 1 for the last phase."""
    instruction_token_share: float | None = None
    """Share of tokens from the instruction group, as in the mixture; shares inside both groups keep their proportions."""
    token_shares: dict[str, float] = field(default_factory=dict)
    """Share of each source instead of the sources' own; what is left out has none. They sum to 1."""
    ramp: bool = False
    """Move in a straight line from the shares at the end of the phase before to these, instead of all at once."""


@dataclass
class MixtureSection:
    """What to train on. Holds no run parameter, so that one mixture serves every budget."""

    name: str = MISSING
    description: str = ""
    sources: dict[str, SourceSection] = field(default_factory=dict)
    instruction_token_share: float | None = None
    """Share of training tokens from the instruction group; shares inside both groups keep their proportions.
    Null keeps the shares as the sources state them."""
    phases: list[PhaseSection] = field(default_factory=list)
    """How shares change over the run; without any they stay as stated."""
    instruction_loss: str = "responses"
    """Which tokens of an instruction carry loss: `responses` or `all`."""
    chat_template: str | None = None
    """What instructions are written with: null for the tokenizer's own chat template or else ChatML, `chatml`, a Jinja
    text, or the path of a .jinja file."""
    max_bad_fraction: float = 0.01
    """Share of a source's rows that may be unreadable, null, of the wrong type or otherwise bad; above it the run stops.
    They are left out, counted and listed in any case."""
    validation_fraction: float = 0.05
    """Share of each source's documents that is held out from training, chosen by a hash of their content or origin."""
    remove_duplicates: bool = True
    """Leave out a document whose text, or all of whose messages, an earlier document of the same source has. On, because
    what stands twice in a source would be seen twice an epoch, whatever the plan says about epochs."""
    decontaminate_against: list[str] = field(default_factory=list)
    """Evaluation sets: a document that shares 13 words in a row with one of their items is left out. Names of suites in
    `eval/` that list `evaluation_files`, paths of such a .yaml, or paths and globs of the files themselves."""


@dataclass
class TrainingSection:
    """How much to train, in which pieces."""

    budget_tokens: int = MISSING
    """Tokens to train on, rounded down to whole steps."""
    sequence_length: int = MISSING
    """Length of one packed training sequence; at most the model's context."""
    global_batch_size: int = MISSING
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: int = MISSING
    """Sequences per forward pass and process."""
    precision: str = "bf16"
    """`bf16` (with fp32 master weights; needs ZeRO stage 1 or above) or `fp32`."""
    gradient_checkpointing: bool = False
    router_aux_loss_coefficient: float | None = None
    """Weight of a Mixtral's load-balancing loss; null takes the checkpoint's own."""
    seed: int = 1
    fused_activation: str = "auto"
    """The activation in one pass forward and one back: `triton` (a GPU), `inductor` (a compiler builds it: a minute or less at
    the start), or `off` for the model's own code. `auto` is triton where it is, else off. Same values in each."""
    liger_kernels: bool = False
    """Liger's kernels for the norms, the rotary embedding and the loss of training steps, without whole logits; needs a GPU and
    liger-kernel. Never chosen for you: they round differently."""
    compile: bool = False
    """torch.compile on every decoder layer while it trains; ZeRO stage 0 to 2."""
    count_zeros: bool = False
    """Write the share of exact zeros of every step into metrics.jsonl, counted in the pass that makes them."""


@dataclass
class OptimizerSection:
    """AdamW with linear warm-up and cosine decay, as functions of the tokens seen."""

    peak_learning_rate: float = MISSING
    final_learning_rate: float = MISSING
    warmup_tokens: int = MISSING
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only, not to norms."""
    max_gradient_norm: float = 1.0


@dataclass
class StabilitySection:
    """What to do about a bad step: one whose loss or gradient is NaN or infinite, or whose loss is a spike.

    A bad step never changes weights or Adam's moments. Its sequences count as seen; metrics.jsonl names them.
    """

    on_bad_step: str = "skip"
    """`skip` goes on with the next batch; `rollback` also takes back every step since the last checkpoint and leaves their
    sequences out; `stop` saves the state from before the step and ends the run with a report."""
    spike_deviations: float | None = 8.0
    """A loss is a spike when it lies this many robust standard deviations above what the recent losses of its sources let
    expect; null judges NaN and infinity only."""
    recent_steps: int = 64
    """Steps that a loss is judged by. A source is judged from a quarter of them on."""
    max_bad_steps: int = 8
    """More bad steps than this among the recent ones stop the run with a report."""
    underused_expert_load: float = 0.1
    """A Mixtral's expert starves when it gets less than this part of an even share of its layer's tokens …"""
    underused_expert_steps: int = 100
    """… for so many steps in a row: then an alarm names it, once."""


@dataclass
class CheckpointSection:
    """When to save, and how much of it to keep."""

    every_tokens: int = MISSING
    keep_last: int = 2
    """The newest checkpoints. With 1 there is none to go back to when the newest is damaged."""
    keep_every_tokens: int | None = None
    """Keep also the checkpoint at each multiple of so many tokens, for good: a multiple of `every_tokens`."""


@dataclass
class EngineSection:
    """DeepSpeed ZeRO."""

    zero_stage: int = MISSING
    """0 to 3; AUTO_STAGE (`engine=auto`) leaves stage, offload, micro-batch and checkpointing to the plan."""
    auto_micro_batch: bool = True
    """`engine=auto` may replace training.micro_batch_size; the batch stays."""
    auto_checkpointing: bool = True
    """`engine=auto` may replace training.gradient_checkpointing."""
    auto_offload: bool = True
    """`engine=auto` may move optimiser and weights to host memory. On GPUs only; needs a C++ compiler."""
    planned_gpu: str | None = None
    """The GPU that `plan` reckons with, launch.processes of them, unless --hardware says otherwise: `h100-80gb`, for example.
    Null is this machine. Training always takes what is there."""
    offload_optimizer_to_cpu: bool = False
    """ZeRO stage 1 or above; needs a C++ compiler for DeepSpeed's CPU Adam."""
    offload_parameters_to_cpu: bool = False
    """ZeRO stage 3 only."""
    reduce_bucket_elements: int = 50_000_000
    attention: str = "sdpa"
    """One of ATTENTION_IMPLEMENTATIONS. Both keep the documents of a sequence apart; flex_attention skips what lies between
    them instead of masking it, and trains on a GPU only."""


TORCHRUN = "torchrun"


@dataclass
class LaunchSection:
    """On what to run; none of it changes what is trained."""

    processes: int = 1
    """Training processes on each machine, one GPU each where there are GPUs."""
    nodes: int = 1
    """Machines. Each is given the same command but for `node_rank`, and sees the same `run_dir` and `cache_dir`."""
    node_rank: int = 0
    """Which of them this is, from 0. Node 0 resolves the recipe, converts and tokenises; the others follow it."""
    rendezvous: str | None = None
    """HOST:PORT of node 0, where several nodes meet; or `torchrun`, under which `nodes` and `node_rank` are torchrun's."""
    hostfile: str | None = None
    """A DeepSpeed hostfile, lines of `HOST slots=N`. The command runs on the first host and starts the others by ssh; nodes and
    processes are the file's."""
    threads_per_process: int | None = None
    """CPU threads of each process; the machine's cores shared evenly unless given."""
    ingest_processes: int = 1
    """Processes that tokenise ahead of training, as long as there is something left to tokenise."""
    accept_changed_data: bool = False
    """Go on with a run although its text or its tokenizer changed since it began; the lock records it."""

    @property
    def total_processes(self) -> int:
        """Ranks over all machines."""
        return self.nodes * self.processes


@dataclass
class TrackingSection:
    """Who else is told."""

    wandb: str = "disabled"
    """`disabled`, `offline` or `online`. metrics.jsonl and sparsity.jsonl are written in any case."""
    wandb_project: str = "sparsify"


@dataclass
class BaselineSection:
    """A second run on the same tokens that differs in its activation only."""

    ffn_activation: str | None = None
    """`swiglu` trains the dense baseline after the sparse run; null trains none. A run that has this activation itself
    (`activation=swiglu`) is the baseline: `validate` sets null."""


@dataclass
class Recipe:
    """One experiment."""

    name: str = MISSING
    run_dir: str = "runs/${name}"
    """Overrides on the command line are added to its name, so that every variant has a folder of its own."""
    cache_dir: str = "~/.cache/sparsify"
    """Tokenised sources, shared by all runs."""
    model: ModelSection = field(default_factory=ModelSection)
    activation: ActivationSection = field(default_factory=ActivationSection)
    conversion: ConversionSection = field(default_factory=ConversionSection)
    blending: BlendingSection = field(default_factory=BlendingSection)
    sparsity: SparsitySection = field(default_factory=SparsitySection)
    distillation: DistillationSection = field(default_factory=DistillationSection)
    mixture: MixtureSection = field(default_factory=MixtureSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    stability: StabilitySection = field(default_factory=StabilitySection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    eval: EvalSection = field(default_factory=EvalSection)
    engine: EngineSection = field(default_factory=EngineSection)
    launch: LaunchSection = field(default_factory=LaunchSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    baseline: BaselineSection = field(default_factory=BaselineSection)

    @property
    def step_tokens(self) -> int:
        return self.training.global_batch_size * self.training.sequence_length

    @property
    def num_steps(self) -> int:
        return self.training.budget_tokens // self.step_tokens

    @property
    def accumulation_steps(self) -> int:
        return self.training.global_batch_size // (
            self.training.micro_batch_size * self.launch.total_processes
        )


def token_shares(mixture: MixtureSection) -> dict[str, float]:
    """Share of every source in the tokens of a whole run; sources without any are left out."""
    means = dict.fromkeys(mixture.sources, 0.0)
    start = 0.0
    for end, first, last in share_phases(mixture):
        for name in means:
            means[name] += (end - start) * (first[name] + last[name]) / 2
        start = end
    return {name: share for name, share in means.items() if share > 0}


def share_phases(mixture: MixtureSection) -> list[tuple[float, dict[str, float], dict[str, float]]]:
    """For each phase: where it ends as a share of the budget, and the shares of all sources at its beginning and end."""
    if not mixture.phases:
        shares = _with_instructions(mixture, mixture.instruction_token_share)
        return [(1.0, shares, shares)]
    phases, before = [], dict.fromkeys(mixture.sources, 0.0)
    for phase in mixture.phases:
        if phase.token_shares:
            after = {name: phase.token_shares.get(name, 0.0) for name in mixture.sources}
        else:
            after = _with_instructions(mixture, phase.instruction_token_share)
        phases.append((phase.until_budget_share, before if phase.ramp else after, after))
        before = after
    return phases


def _with_instructions(mixture: MixtureSection, share: float | None) -> dict[str, float]:
    """The sources' own shares, moved so that the instruction group has `share`; as stated when that is None."""
    stated = {name: source.token_share for name, source in mixture.sources.items()}
    if share is None:
        return stated
    target = {"instruction": share, "pretraining": 1.0 - share}
    totals = dict.fromkeys(target, 0.0)
    for source in mixture.sources.values():
        totals[source.group] += source.token_share
    return {
        name: source.token_share / totals[source.group] * target[source.group]
        if totals[source.group]
        else 0.0
        for name, source in mixture.sources.items()
    }
