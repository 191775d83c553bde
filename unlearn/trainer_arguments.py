"""What transformers' Trainer is told, and what it is kept from hearing elsewhere: the recipe decides a training."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn
from transformers import TrainingArguments

from unlearn import collective
from unlearn.dealing import Part
from unlearn.precision import Mixed
from unlearn.recipe import TrainSpec

_RANKS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextmanager
def recipe_decides() -> Iterator[None]:
    """Inside the ``with`` accelerate finds none of its environment variables; a Trainer is made and run in it.

    ``accelerate launch`` sets them from its options and its user's file, and they would turn on autocast, compilation,
    another device or another way of sharing the work, which no recipe says and no stage's key knows. A process that
    works alone finds no ranks either: to accelerate, tasks that MPI or Slurm started side by side are one training.
    """
    ranks = _RANKS if collective.count() == 1 else ()
    before = {n: os.environ.pop(n) for n in list(os.environ) if n.startswith("ACCELERATE_") or n in ranks}
    try:
        yield
    finally:
        os.environ.update(before)


def settings(device: torch.device, mixed: Mixed, work: Path, seed: int, **options: Any) -> TrainingArguments:
    """The settings of any Trainer here, for a model that is on ``device``.

    Args:
        mixed: Its autocast (:func:`unlearn.precision.mixed_precision`).
        work: Where its checkpoints go.
        seed: Of dropout, and of all that else is drawn.
        options: The Trainer's own.
    """
    return _Settings(
        own_device=str(device),
        output_dir=str(work),
        logging_steps=1,
        logging_nan_inf_filter=False,  # a non-finite loss must be seen, not averaged away
        seed=seed,
        bf16=mixed == "bf16",
        fp16=mixed == "fp16",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        **options,
    )


def arguments(
    model: nn.Module, spec: TrainSpec, total: int, seed: int, work: Path, part: Part, mixed: Mixed
) -> TrainingArguments:
    """The Trainer's settings for a recipe's training of ``total`` steps, as process ``part.index`` of as many."""
    epochs, max_steps = spec.duration()
    return settings(
        next(model.parameters()).device,
        mixed,
        work,
        seed,
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=math.ceil(spec.batch_size / part.count),
        gradient_accumulation_steps=spec.accumulation,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        lr_scheduler_type=spec.schedule,
        warmup_steps=min(math.ceil(spec.warmup * total), total - 1),  # the first of them has rate 0
        save_strategy="steps",
        save_steps=spec.save_every or max(1, math.ceil(total / 4)),
        save_total_limit=None,  # checkpoints.keep_newest removes them: by number, not as here by the times of files
        report_to=list(spec.report_to) or "none",
        **_checkpointing(spec.gradient_checkpointing),
    )


@dataclass
class _Settings(TrainingArguments):
    """One process trains on the device that its model is on.

    transformers' own goes to cuda:0 and, where more GPUs are visible, splits batches of so many times the size among
    them by DataParallel. What is drawn beside a batch, and each row's multiple of the adapter, cannot be split.
    """

    own_device: str = "cpu"

    @cached_property
    def _setup_devices(self) -> torch.device:
        if collective.count() > 1:
            found: torch.device = super()._setup_devices  # each process has a device since they joined
            return found
        device = torch.device(self.own_device)
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator_config.pop("use_configured_state", None)
        self.distributed_state = PartialState(cpu=device.type == "cpu")
        self.distributed_state.device = device
        self._n_gpu = int(device.type != "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)  # a checkpoint has the random state of the current one
        return device


def _checkpointing(on: bool) -> dict[str, Any]:
    """The option by the name this transformers has for it: 5.23 renamed it."""
    known = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True} if on else {}
