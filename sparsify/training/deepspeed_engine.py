"""The DeepSpeed engine around a sparse model.

Learning rate as a pure function of the tokens seen, so that nothing but a counter needs to be saved for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from sparsify.conversion.sparse_folder import check_activation, load_sparse
from sparsify.errors import RecipeError
from sparsify.launch.meeting import meet_ranks
from sparsify.methods.live_model import Engine, is_router
from sparsify.models import FAMILIES, SparseModel
from sparsify.models.masking import num_experts
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.training import OptimizerSection
from sparsify.runs.state import prepare_accelerator
from sparsify.training.kernels.activation import check_fusible, fuse_activation, has_compiler
from sparsify.training.kernels.liger import check_liger, use_liger


def check_machine(recipe: Recipe) -> None:
    """Refuses a recipe that this machine cannot train, before anything is started.

    Raises:
        RecipeError: Naming the setting.
    """
    if recipe.engine.attention == "flex_attention" and not torch.cuda.is_available():
        raise RecipeError(
            "engine.attention is flex_attention, and there is no GPU here.",
            allowed="torch computes its gradients on a GPU only.",
            next_step="Set engine.attention=sdpa.",
        )
    check_fusible(recipe)
    _check_compilable(recipe)
    check_liger(recipe)


def _check_compilable(recipe: Recipe) -> None:
    if recipe.training.compile and not has_compiler():
        raise RecipeError(
            "training.compile is set, and there is no C++ compiler here.",
            allowed="torch.compile writes C++ for a CPU and has it compiled: g++, or what CXX names.",
            next_step="Install one, or set training.compile=false.",
        )


def _compile_layers(model: SparseModel, recipe: Recipe) -> None:
    """Lets every decoder layer be compiled at its first pass: once for all, as they have the same code and shapes.

    Raises:
        RecipeError: For a checkpointed mixture of experts. transformers reads the router's logits through forward hooks, which
            torch.compile cannot trace inside a checkpoint: it would run every layer uncompiled without a word.
    """
    if not recipe.training.compile:
        return
    if recipe.training.gradient_checkpointing and num_experts(model.config) > 1:
        raise RecipeError(
            "training.compile is set with training.gradient_checkpointing, and the model is a mixture of experts.",
            allowed="Either of the two: torch.compile cannot trace the router's hooks inside a checkpoint, and would compile nothing.",
            next_step="Set training.compile=false, or training.gradient_checkpointing=false.",
        )
    for layer in model.model.layers:
        layer.compile()


def init_distributed() -> None:
    import deepspeed
    from deepspeed.constants import default_pg_timeout

    device = prepare_accelerator()
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if device == "cpu" else "nccl"
    if not dist.is_initialized():
        meet_ranks(backend, default_pg_timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def deepspeed_config(recipe: Recipe) -> dict[str, Any]:
    engine, training = recipe.engine, recipe.training
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        "reduce_bucket_size": engine.reduce_bucket_elements,
    }
    if engine.zero_stage == 3:
        # DeepSpeed's default leaf list may name classes by path; ours are loaded under their stock class here, but
        # saying so keeps ranks together when their tokens go to different experts.
        zero["leaf_module"] = {"classes": [one.expert_block for one in FAMILIES.values() if one.expert_block]}
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if engine.offload_optimizer_to_cpu:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload_parameters_to_cpu:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": recipe.accumulation_steps,
        "gradient_clipping": recipe.optimizer.max_gradient_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }
    if training.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def load_model(recipe: Recipe, folder: Path, config: dict[str, Any]) -> SparseModel:
    keep_alive = None
    if recipe.engine.zero_stage == 3:
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        keep_alive = HfDeepSpeedConfig(config)  # from_pretrained partitions while this object lives
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    model = load_sparse(folder, recipe.activation.ffn_activation, dtype)
    del keep_alive
    fuse_activation(model, recipe)
    use_liger(model, recipe)
    model.set_attn_implementation(recipe.engine.attention)
    if recipe.training.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    _compile_layers(model, recipe)
    return model


def build_engine(recipe: Recipe, folder: Path) -> Engine:
    """Builds the DeepSpeed engine with AdamW around the model in `folder`; every rank calls it."""
    import deepspeed

    config = deepspeed_config(recipe)
    model = load_model(recipe, folder, config)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=_build_optimizer(recipe, model),
        config=config,
        dist_init_required=False,
    )
    check_activation(model, recipe.activation.ffn_activation)
    engine.train()  # from_pretrained leaves it in evaluation mode, where gradient checkpointing does nothing
    return cast(Engine, engine)


def _build_optimizer(recipe: Recipe, model: SparseModel) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    parameters = dict(model.named_parameters())
    # A partitioned parameter is empty here; its full shape is in ds_shape.
    shapes = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in parameters.items()}
    kinds = parameter_groups(shapes)
    groups: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in names],
            "weight_decay": settings.weight_decay if kind == MATRICES else 0.0,
        }
        for kind, names in kinds.items()
    ]
    betas = (settings.beta1, settings.beta2)
    if recipe.engine.offload_optimizer_to_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(
            groups,
            lr=settings.peak_learning_rate,
            betas=betas,
            eps=settings.epsilon,
            adamw_mode=True,
        )
    return torch.optim.AdamW(groups, lr=settings.peak_learning_rate, betas=betas, eps=settings.epsilon)


MATRICES, VECTORS, ROUTERS = "matrices", "vectors", "routers"


def parameter_groups(shapes: Mapping[str, torch.Size]) -> dict[str, list[str]]:
    """Names of the parameters in each of the optimiser's groups, in its order: matrices, which have weight decay, vectors, and last the
    routers of groups, where there are any: decay would pull their scores towards 0, and they have a learning rate of their own.
    """
    routers = [name for name in shapes if is_router(name)]
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2 and not is_router(name)]
    vectors = [name for name, shape in shapes.items() if len(shape) < 2 and not is_router(name)]
    return {MATRICES: matrices, VECTORS: vectors, **({ROUTERS: routers} if routers else {})}


def set_learning_rate(engine: Engine, value: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = value


def learning_rate(optimizer: OptimizerSection, seen_tokens: int, budget_tokens: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to the final rate, which is the floor."""
    if seen_tokens < optimizer.warmup_tokens:
        return optimizer.peak_learning_rate * seen_tokens / optimizer.warmup_tokens
    decay_tokens = max(1, budget_tokens - optimizer.warmup_tokens)
    progress = min(1.0, (seen_tokens - optimizer.warmup_tokens) / decay_tokens)
    height = optimizer.peak_learning_rate - optimizer.final_learning_rate
    return optimizer.final_learning_rate + height * 0.5 * (1 + math.cos(math.pi * progress))
