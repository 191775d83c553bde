"""What transformers' Trainer is told for a recipe's training."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from unlearn.dealing import Part
from unlearn.recipe import TrainSpec


def arguments(model: nn.Module, spec: TrainSpec, total: int, seed: int, work: Path, part: Part) -> TrainingArguments:
    """The Trainer's settings for a training of ``total`` steps, as process ``part.index`` of ``part.count``."""
    epochs, max_steps = spec.duration()
    first = next(model.parameters())
    return TrainingArguments(
        output_dir=str(work),
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
        logging_steps=1,
        logging_nan_inf_filter=False,  # a non-finite loss must be seen, not averaged away
        report_to=list(spec.report_to) or "none",
        seed=seed,
        bf16=first.dtype == torch.bfloat16 and first.device.type == "cuda",
        use_cpu=first.device.type == "cpu",
        dataloader_pin_memory=first.device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        **_checkpointing(spec.gradient_checkpointing),
    )


def _checkpointing(on: bool) -> dict[str, Any]:
    """The option by the name this transformers has for it: 5.23 renamed it."""
    known = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True} if on else {}
