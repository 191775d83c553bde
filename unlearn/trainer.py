"""transformers' Trainer with what this project needs of it: order by seed, whole checkpoints, other losses."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from unlearn.batches import ByLength, Encoded, Pad, answers
from unlearn.console import progress
from unlearn.errors import TrainingError
from unlearn.frozen import with_answers
from unlearn.memory import is_out_of_memory
from unlearn.methods.retain_kl import only_at, scaled_rows
from unlearn.objectives import Against, Answers, Keep, Objective, Share, all_labels, mend, objective
from unlearn.recipe import TrainSpec

__all__ = ["Against", "Keep", "TrainingLog", "last_checkpoint", "train"]

_WHOLE = "unlearn_checkpoint_is_whole"


@dataclass(frozen=True)
class TrainingLog:
    """What a fine-tuning did.

    ``losses`` has one value per optimiser step, of what was minimised: nats per trained token (with gradient ascent
    minus those), and for NPO 2/beta times nats per answer.
    """

    examples: int
    steps: int
    losses: tuple[float, ...]
    seconds: float

    def to_json(self, stage: str) -> dict[str, Any]:
        """The report's line about this training."""
        return {
            "stage": stage,
            "examples": self.examples,
            "steps": self.steps,
            "loss_first": self.losses[0],
            "loss_last": self.losses[-1],
            "losses": [round(x, 4) for x in self.losses],
            "seconds": round(self.seconds, 2),
        }


def train(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    spec: TrainSpec,
    seed: int,
    work: Path,
    label: str,
    keep: Keep | None = None,
    against: Against | None = None,
) -> TrainingLog:
    """Run the Trainer over ``rows``, from the last whole checkpoint in ``work`` if there is one.

    Args:
        keep: Retain rows whose predictions must not change, in addition to the loss on ``rows``.
        against: A baseline's loss in place of cross-entropy, ``rows`` being what is to be forgotten.

    Raises:
        TrainingError: non-finite loss, out of memory, a row without an answer, or no step made.
        ValueError: ``keep`` and ``against`` together.
    """
    minimised = objective(keep, against)
    if against is not None and len(with_answers(rows)) < len(rows):
        raise TrainingError(f"{label}: {against.loss} needs rows with a token to be predicted, and one has none")
    epochs, max_steps = spec.duration()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_epoch = math.ceil(math.ceil(len(rows) / (spec.batch_size * processes)) / spec.accumulation)
    total = max_steps if max_steps > 0 else math.ceil(per_epoch * epochs)
    first = next(model.parameters())
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=epochs,
        max_steps=max_steps,
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.accumulation,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        lr_scheduler_type=spec.schedule,
        warmup_steps=math.ceil(spec.warmup * total),
        save_strategy="steps",
        save_steps=spec.save_every or max(1, math.ceil(total / 4)),
        save_total_limit=2,
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
    order = ByLength(rows, spec.batch_size * spec.accumulation, seed)
    started = time.monotonic()
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    with progress(label, total) as advance:
        trainer = _Trainer(
            order,
            minimised,
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=Pad(tokenizer.pad_token_id),
            callbacks=[_Watch(advance, order, mend(against))],
        )
        trainer.pop_callback(PrinterCallback)
        try:
            trainer.train(resume_from_checkpoint=last_checkpoint(work))
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            raise TrainingError(
                f"{label}: out of memory. Lower batch_size (and raise accumulation by as much), lower max_length, "
                "or set gradient_checkpointing: true"
            ) from e
        finally:
            if config is not None and use_cache is not None:
                config.use_cache = use_cache  # the Trainer turned it off, and the model's config is exported
    model.eval()
    losses = tuple(h["loss"] for h in trainer.state.log_history if "loss" in h)
    if not losses:
        raise TrainingError(f"{label}: no optimiser step was made; raise steps or epochs")
    return TrainingLog(len(rows), trainer.state.global_step, losses, time.monotonic() - started)


def _checkpointing(on: bool) -> dict[str, Any]:
    """The option by the name this transformers has for it: 5.23 renamed it."""
    known = {f.name for f in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True} if on else {}


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end; one cut off by a kill is passed over."""
    whole = [p.parent for p in work.glob(f"checkpoint-*/{_WHOLE}")]
    newest = max(whole, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
    return str(newest) if newest else None


class _Trainer(Trainer):
    """The Trainer, with the order of rows given, and with another objective than cross-entropy where there is one."""

    def __init__(self, order: ByLength, minimised: Objective | None, **options: Any) -> None:
        super().__init__(**options)
        self._order = order
        self._objective = minimised
        self._step, self._calls = -1, 0
        self._batches, self._rows = 1, 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> ByLength:
        return self._order

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one step; how many they are and how many rows they have, for means over all of them."""
        found = super().get_batch_samples(*args, **kwargs)
        self._batches, self._rows = len(found[0]), sum(len(batch["input_ids"]) for batch in found[0])
        return found

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """One batch forward and backward; an objective may put other rows, and copies, beside the forget rows."""
        if self._objective is None:
            return super().training_step(model, inputs, *args, **kwargs)
        # drawn from the step's own seed, so that a resumed training sees what an uninterrupted one sees; counted
        # anew at each step, because the last one of an epoch may have fewer batches
        if self._step != self.state.global_step:
            self._step, self._calls = self.state.global_step, 0
        self._calls += 1
        draw = random.Random(f"{self.args.seed} {self._step} {self._calls} {self.args.process_index}")
        batch, factors = self._objective.batch(inputs, self.data_collator, draw)
        with scaled_rows(self.accelerator.unwrap_model(model), factors):
            return super().training_step(model, batch, *args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss, from the positions that predict a label."""
        if self._objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        positions, targets, rows = answers(all_labels(inputs))
        with only_at(self.accelerator.unwrap_model(model), positions):
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits  # (N, V)
        said = Answers(logits, targets, rows)
        return self._objective.loss(said, len(inputs["labels"]), self._share(num_items_in_batch))

    def _share(self, tokens: Any) -> Share:
        """What the batch is of its step; the Trainer itself divides by the batches where it counts no tokens."""
        if tokens is None:
            return Share()
        # the tokens are counted over all processes, whose gradients are averaged; rows and batches over this one's,
        # and every process has as many of them
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return Share(tokens / processes, self._rows, self._batches)


class _Watch(TrainerCallback):
    """Moves the bar, sets the order of each epoch, stops on a non-finite loss, and marks checkpoints that are whole."""

    def __init__(self, advance: Callable[[int], None], order: ByLength, advice: str) -> None:
        self._advance = advance
        self._order = order
        self._advice = advice
        self._seen = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state.global_step - self._seen)
        self._seen = state.global_step
        if state.global_step >= state.max_steps:
            # the vector is read off next; resumed from a checkpoint of the end, the Trainer would make one step more
            control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(f"the loss became {loss} at step {state.global_step}: {self._advice}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()
