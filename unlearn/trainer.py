"""transformers' Trainer with what this project needs of it: order by seed, whole checkpoints, other losses, several
processes that take the steps one would take, and a stop after any step that loses nothing."""

from __future__ import annotations

import math
import pickle
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from unlearn import checkpoints, collective
from unlearn.batches import IGNORE, ByLength, Encoded, Pad, answers
from unlearn.checkpoints import last_checkpoint
from unlearn.console import progress, say
from unlearn.dealing import Dealt, Part, blank
from unlearn.errors import TrainingError
from unlearn.frozen import with_answers
from unlearn.methods.retain_kl import only_at, scaled_rows
from unlearn.objectives import BESIDE, Against, Answers, Keep, Objective, Share, all_labels, mend, objective
from unlearn.precision import Mixed
from unlearn.recipe import TrainSpec
from unlearn.stopping import Hold, held
from unlearn.trainer_arguments import arguments, recipe_decides

__all__ = ["Against", "Keep", "TrainingLog", "last_checkpoint", "train"]


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
    mixed: Mixed = "no",
) -> TrainingLog:
    """Run the Trainer over ``rows``, from the last whole checkpoint in ``work`` if there is one.

    A batch is of ``spec.batch_size`` rows however many processes share it. On SIGTERM or Ctrl-C the step at hand is
    finished and a checkpoint is written, in all processes after the same step; a second signal stops at once.

    Args:
        keep: Retain rows whose predictions must not change, in addition to the loss on ``rows``.
        against: A baseline's loss in place of cross-entropy, ``rows`` being what is to be forgotten.
        mixed: The autocast of the forward passes. What learns must be in float32 in any case.

    Raises:
        TrainingError: non-finite loss, a row without an answer, no step made, or a checkpoint that
            somebody else has put there.
        ValueError: ``keep`` and ``against`` together.
        KeyboardInterrupt: a signal to stop has arrived.
    """
    part = Part(collective.rank(), collective.count())
    minimised = objective(keep, against, part)
    if against is not None and len(with_answers(rows)) < len(rows):
        raise TrainingError(f"{label}: {against.loss} needs rows with a token to be predicted, and one has none")
    epochs, max_steps = spec.duration()
    per_epoch = math.ceil(math.ceil(len(rows) / spec.batch_size) / spec.accumulation)
    total = max_steps if max_steps > 0 else math.ceil(per_epoch * epochs)
    order = ByLength(rows, spec.batch_size * spec.accumulation, seed)
    started = time.monotonic()
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    with recipe_decides(), held() as hold, progress(label, total) as advance:
        watch = _Watch(advance, order, mend(against), hold, isinstance(model, PeftModel))
        trainer = _Trainer(
            order,
            minimised,
            part,
            spec.batch_size,
            model=model,
            args=arguments(model, spec, total, seed, work, part, mixed),
            train_dataset=list(rows),
            data_collator=Pad(tokenizer.pad_token_id),
            callbacks=[watch],
        )
        trainer.pop_callback(PrinterCallback)
        try:
            with collective.all_there():
                trainer.go_on(collective.from_main(lambda: last_checkpoint(work, part.count)), total)
        except pickle.UnpicklingError as e:  # only numbers are read of a checkpoint: no object of it is ever built
            message = f"{label}: a checkpoint in {work} holds more than numbers, so no run wrote it: remove that folder"
            collective.alarm(message)
            raise TrainingError(message) from e
        finally:
            if config is not None and use_cache is not None:
                config.use_cache = use_cache  # the Trainer turned it off, and the model's config is exported
            if vars(model).pop("_original_forward", None) is not None:
                del vars(model)["forward"]  # accelerate's, with the autocast: the class's own is under it
        if watch.stopped:
            say(f"    {label}: stopped after step {trainer.state.global_step} of {total}; it is kept")
            raise KeyboardInterrupt
        if watch.skipped:
            skipped = f"{watch.skipped} of {total} steps changed nothing: their gradients were too large for float16"
            say(f"    {label}: {skipped}. Use dtype bfloat16 or float32", style="yellow")
    model.eval()
    losses = tuple(h["loss"] for h in trainer.state.log_history if "loss" in h)
    if not losses:
        raise TrainingError(f"{label}: no optimiser step was made; raise steps or epochs")
    return TrainingLog(len(rows), trainer.state.global_step, losses, time.monotonic() - started)


class _Trainer(Trainer):
    """The Trainer, with the order of rows given, dealt out among processes, and with another objective than
    cross-entropy where there is one."""

    def __init__(self, order: ByLength, minimised: Objective | None, part: Part, size: int, **options: Any) -> None:
        super().__init__(**options)
        self._order = order
        self._objective = minimised
        self._part, self._size = part, size
        self._step, self._calls = -1, 0
        self._batches, self._rows = 1, 0
        if part.count > 1 and not self.model_accepts_loss_kwargs:
            raise TrainingError(
                f"{type(self.model).__name__} cannot be trained by several processes: it takes no count of the tokens "
                "that its loss is over. Start one process"
            )

    def go_on(self, checkpoint: str | None, total: int) -> None:
        """Train to the end from a checkpoint, or from the start."""
        if checkpoint is not None and checkpoints.step_of(checkpoint) >= total:
            # at the end already; the Trainer would make one step more
            self._load_from_checkpoint(checkpoint)
            self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        else:
            self.train(resume_from_checkpoint=checkpoint)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> ByLength:
        return self._order

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this process."""
        rows: list[Encoded] = list(self.train_dataset)
        if self._part.count == 1:
            found: DataLoader[Any] = super().get_train_dataloader()
            return found
        batches = Dealt(self._order, self._size, self._part, spare=len(rows))
        pin = self.args.dataloader_pin_memory
        data: Any = [*rows, blank(rows[0])]
        return DataLoader(data, batch_sampler=batches, collate_fn=self.data_collator, pin_memory=pin)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of one step; how many they are, and how many rows all processes have, for means over them."""
        found = super().get_batch_samples(*args, **kwargs)
        self._batches = len(found[0])
        if self._objective is not None:
            self._rows = collective.total(sum(int((batch["labels"] != IGNORE).any(1).sum()) for batch in found[0]))
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
        draw = random.Random(f"{self.args.seed} {self._step} {self._calls} 0")
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
        return self._objective.loss(said, len(inputs["labels"]), self._share(num_items_in_batch, inputs))

    def _share(self, tokens: Any, inputs: Any) -> Share:
        """What the batch is of its step; the Trainer itself divides by the batches where it counts no tokens."""
        beside = inputs.get(BESIDE, 1.0)
        if tokens is None:
            return Share(beside=beside)
        # counted over all processes, whose gradients are averaged; each has as many batches
        processes = self._part.count if self.args.average_tokens_across_devices else 1
        return Share(tokens / processes, self._rows / self._part.count, self._batches, beside)


class _Watch(TrainerCallback):
    """Moves the bar, sets the order of each epoch, stops on a non-finite loss or a signal, and seals checkpoints.

    Where there are several processes it gives each a seed of its own: the Trainer's, of which the adapter's start has
    been drawn alike, would have all of them drop the same places of their rows.
    """

    def __init__(self, advance: Callable[[int], None], order: ByLength, advice: str, hold: Hold, small: bool) -> None:
        self._advance = advance
        self._order = order
        self._advice = advice
        self._hold = hold
        self._small = small
        self._seen = 0
        self.skipped = 0
        self.stopped = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if collective.count() > 1:  # a checkpoint's own random state is read after this
            torch.manual_seed(random.Random(f"{args.seed} {collective.rank()} masks").getrandbits(63))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._order.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._advance(state.global_step - self._seen)
        self._seen = state.global_step
        self.skipped += optimizer.step_was_skipped
        if state.global_step >= state.max_steps:
            # what was trained is saved next. A kill before that must not cost the training; but a model's whole
            # weights, with the optimiser's state three times as much again, are not written twice for it
            control.should_save = self._small
        if collective.anyone(self._hold.requested):
            self.stopped = control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(f"the loss became {loss} at step {state.global_step}: {self._advice}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        collective.wait()  # every process has written its part
        if state.is_world_process_zero:
            checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", collective.count())
            checkpoints.keep_newest(Path(args.output_dir))
        collective.wait()  # nobody leaves before it is sealed: torchrun would end the others
