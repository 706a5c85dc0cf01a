"""The three loops of `sparsify bench train`: the bare DeepSpeed engine, ours, and the Trainer of Hugging Face."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from sparsify.bench.timing import Finished, InterleavedLoop
from sparsify.mixture.sequences.reader import NO_LOSS
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import RunFolder
from sparsify.training.deepspeed_engine import build_engine, deepspeed_config, load_model
from sparsify.training.loop import train
from sparsify.training.session import Session
from sparsify.training.worker import build_session

PackedSequence = dict[str, torch.Tensor]


@dataclass
class Loops:
    """The loops over one prepared run.

    Args:
        run: The run's folder, with weights, tokenised sources and lock.
        sequences: The sequences of all steps, in memory, for the bare engine and the Trainer.
    """

    recipe: Recipe
    run: RunFolder
    sequences: list[PackedSequence]
    session: Session | None = None

    def bare(self, control: InterleavedLoop) -> None:
        """Only forward, backward and step of the engine, on prepared batches."""
        engine = build_engine(self.recipe, self.run.initial)
        size = self.recipe.training.micro_batch_size
        micro_batches = [
            _on(engine.device, default_data_collator(self.sequences[start : start + size]))
            for start in range(0, len(self.sequences), size)
        ]
        accumulation = self.recipe.accumulation_steps
        labels = torch.stack([sequence["labels"] for sequence in self.sequences])
        num_labels = (labels != NO_LOSS).view(self.recipe.num_steps, -1).sum(1).tolist()
        for step in itertools.count():
            control.step()
            batches = micro_batches[step * accumulation : (step + 1) * accumulation]
            total = torch.zeros((), device=engine.device)
            for batch in batches:
                logits = engine(
                    input_ids=batch["input_ids"],
                    position_ids=batch["position_ids"],
                    use_cache=False,
                ).logits
                loss = functional.cross_entropy(
                    logits.float().flatten(0, 1),
                    batch["labels"].flatten(),
                    ignore_index=NO_LOSS,
                    reduction="sum",
                )
                engine.backward(loss / num_labels[step], scale_wrt_gas=False)
                engine.step()
                total += loss.detach()
            control.losses.append(float(total) / num_labels[step])

    def ours(self, control: InterleavedLoop) -> None:
        """`training.loop.train` unmodified: data, agreement of ranks, schedule, metrics.jsonl, log lines."""

        def once_a_step() -> bool:
            control.step()
            return False

        session = build_session(self.run, once_a_step)
        # Without validations and checkpoints, which would be in some blocks but not in others.
        recipe = deepcopy(session.recipe)
        recipe.eval.every_tokens = recipe.checkpoint.every_tokens = 2**62
        session.recipe, self.session = recipe, session
        try:
            train(self.session)
        except Finished:
            lines = map(json.loads, self.run.metrics.read_text().splitlines())
            control.losses = [line["loss"] for line in lines if line["kind"] == "train"]
            raise

    def trainer(self, control: InterleavedLoop) -> None:
        """The Trainer with the same DeepSpeed configuration, reading the sequences in the same order."""
        recipe, training, optimizer = self.recipe, self.recipe.training, self.recipe.optimizer
        config = deepspeed_config(recipe)
        arguments = TrainingArguments(
            output_dir=str(self.run.path / "trainer"),
            deepspeed=config,
            per_device_train_batch_size=training.micro_batch_size,
            gradient_accumulation_steps=recipe.accumulation_steps,
            max_steps=recipe.num_steps,
            max_grad_norm=optimizer.max_gradient_norm,
            # With DeepSpeed the Trainer always builds its own optimizer.
            optim="adamw_torch",
            learning_rate=optimizer.peak_learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_epsilon=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            bf16=training.precision == "bf16",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_steps=1,  # like ours
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        )
        model = load_model(recipe, self.run.initial, config).train()
        model.config.use_cache = False
        trainer = Trainer(
            model=model,
            args=arguments,
            # The labels are already shifted; with this name transformers' loss does not shift them again.
            train_dataset=[sequence | {"shift_labels": sequence["labels"]} for sequence in self.sequences],  # pyright: ignore
            callbacks=[_OnStep(control.step)],
        )
        try:
            trainer.train()
        finally:
            control.losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]


class _OnStep(TrainerCallback):
    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._step()


def _on(device: torch.device, batch: PackedSequence) -> PackedSequence:
    return {key: value.to(device) for key, value in batch.items()}
