"""One forward and backward pass before the first step, to find out what the plan missed while nothing is lost by it.

Weights, optimiser, random numbers and counters are afterwards as if it had not been: no step is taken, the tokens are
made up from a generator of their own, and the gradients are thrown away as DeepSpeed does after an overflow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sparsify.errors import RunError
from sparsify.methods.live_model import Engine
from sparsify.mixture.sequences.reader import Batch
from sparsify.recipe.recipe import Recipe
from sparsify.training.session import Session
from sparsify.training.step import accumulate

BEFORE_FIRST = -1
"""DeepSpeed's count of micro-batches in `stage_1_and_2` before the first of a step."""


def dry_run(session: Session) -> None:
    """Runs one micro-batch of the largest size through the engine; a resumed run needs none.

    Raises:
        RunError: If memory runs out, naming the settings that take less.
    """
    if session.state.step > 0:
        return
    engine, recipe = session.engine, session.recipe
    batch = largest_batch(recipe, engine.module.config.vocab_size, len(session.reader.names))
    num_sequences = recipe.training.micro_batch_size * dist.get_world_size()
    sources = [session.reader.names[0]] * num_sequences
    num_labels = recipe.training.sequence_length * num_sequences
    with out_of_memory_named(recipe):
        # As the last micro-batch of a step, which reduces the gradients as well.
        engine.set_gradient_accumulation_boundary(True)
        accumulate(session, [batch], sources, num_labels, None)
    forget_gradients(engine)
    engine.set_gradient_accumulation_boundary(None)


def largest_batch(recipe: Recipe, vocab_size: int, num_sources: int) -> Batch:
    """Full sequences of made-up tokens, two documents each, so that they need an attention mask."""
    training = recipe.training
    shape = (training.micro_batch_size, training.sequence_length)
    generator = torch.Generator().manual_seed(training.seed + dist.get_rank())
    tokens = torch.randint(vocab_size, shape, generator=generator)
    positions = torch.arange(training.sequence_length) % -(-training.sequence_length // 2)
    tensors = {"input_ids": tokens, "labels": tokens, "position_ids": positions.repeat(shape[0], 1)}
    return Batch(tensors, torch.arange(shape[0]) % num_sources)


def forget_gradients(engine: Engine) -> None:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        engine.zero_grad()
        return
    # BF16_Optimizer clears its fp32 sums here as well; stage 3 counts micro-batches from 0 again and overwrites its own.
    optimizer.zero_grad(set_to_none=True)
    if hasattr(optimizer, "averaged_gradients"):
        if hasattr(optimizer, "_release_preflattened_grad_buffers"):
            optimizer._release_preflattened_grad_buffers()
        optimizer.averaged_gradients.clear()
    if hasattr(optimizer, "all_grad_tensors"):
        optimizer.all_grad_tensors.clear()
    if getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False):
        optimizer.reset_cpu_buffers()
    if engine.zero_optimization_stage() < 3 and hasattr(optimizer, "micro_step_id"):
        optimizer.micro_step_id = BEFORE_FIRST


@contextmanager
def out_of_memory_named(recipe: Recipe) -> Iterator[None]:
    """Turns an exhausted memory into a message that says what takes less.

    Raises:
        RunError: Instead of PyTorch's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        training, stage = recipe.training, recipe.engine.zero_stage
        remedies = []
        if training.micro_batch_size > 1:
            fewer = max(size for size in range(1, training.micro_batch_size) if training.micro_batch_size % size == 0)
            remedies.append(f"training.micro_batch_size={fewer}")
        if not training.gradient_checkpointing:
            remedies.append("training.gradient_checkpointing=true")
        remedies.append("engine=zero3_offload" if stage == 3 else f"engine=zero{stage + 1}")
        raise RunError(
            f"Rank {dist.get_rank()} ran out of memory in the dry run before step 1, with {training.micro_batch_size} "
            f"sequence(s) of {training.sequence_length} tokens and ZeRO-{stage}: {str(error).splitlines()[0]}",
            allowed=f"In this order, each takes less: {', '.join(remedies)}.",
            next_step="`sparsify plan` shows how much; engine=auto chooses.",
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory")
    )
