"""transformers' Trainer with an order by seed, whole checkpoints, other losses, several processes that take the steps
that one would take, and a stop after any step that loses nothing.

What learns is held in float32: a bfloat16 weight has eight bits, so that a step below 1/512 of it is rounded away, as
nearly every step of a full fine-tuning is (Micikevicius et al. 1710.03740). float16 has no gradients below 6e-8.
"""

from __future__ import annotations

import math
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_callback import PrinterCallback

from unlearn import processes as collective
from unlearn.console import progress, say
from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import TrainingError
from unlearn.processes import Hold, held
from unlearn.recipe.methods import TrainSpec
from unlearn.store.cache import condensed
from unlearn.store.stages import STAGE_FILE, damage_of, read_record, seal
from unlearn.train.batches import ByLength, Dealt, Pad, Part, answers, blank
from unlearn.train.losses import (
    ADVICE,
    BESIDE,
    SIZES,
    Against,
    Keep,
    Objective,
    Share,
    only_at,
    reading,
    scaled_rows,
    with_answers,
)

Mixed = Literal["no", "bf16", "fp16"]
# transformers 5.23 renamed it
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
_RANKS = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextmanager
def recipe_decides() -> Iterator[None]:
    """Inside the ``with``, in which a Trainer is made and run, accelerate finds none of its environment variables.

    ``accelerate launch`` sets them, and they would turn on autocast, compilation or another device, which no stage's
    key knows. A process that works alone finds no ranks either: accelerate takes tasks that MPI or Slurm started side
    by side for one training.
    """
    ranks = _RANKS if collective.count() == 1 else ()
    before = {n: os.environ.pop(n) for n in list(os.environ) if n.startswith("ACCELERATE_") or n in ranks}
    try:
        yield
    finally:
        os.environ.update(before)


# -- settings


def mixed_precision(model: nn.Module) -> Mixed:
    """The autocast under which a model is trained, from its weights as they were loaded.

    Only on CUDA, as float16 needs a scaled loss; quantised weights are multiplied in a format of their own.
    """
    weight = next(model.parameters())
    if weight.device.type != "cuda" or getattr(model, "is_quantized", False):
        return "no"
    formats: dict[torch.dtype, Mixed] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return formats.get(weight.dtype, "no")


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` weights of 16 bits are held in float32; after it they are rounded to the format they had."""
    narrow = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    config = getattr(model, "config", None)
    said = getattr(config, "dtype", None)
    try:
        for parameter, _ in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        if config is not None and said is not None:
            config.dtype = said  # a checkpoint's saving has written float32 there


def range_for_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """float16 weights in float32 inside the ``with``, where gradients are taken of a loss that is not scaled up."""
    narrow = any(p.dtype == torch.float16 for p in model.parameters())
    return float32_weights(model) if narrow else nullcontext()


def settings(device: torch.device, mixed: Mixed, work: Path, seed: int, **options: Any) -> TrainingArguments:
    """The settings of any Trainer here: the model's device and autocast, the checkpoints' folder, the seed of draws."""
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
        ddp_broadcast_buffers=False,  # no buffer learns, and those of a shrinking are large
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        **options,
    )


def check_passed_on(spec: TrainSpec, model: nn.Module, key: str) -> None:
    """Refuse now what transformers would refuse when the training begins, of what a recipe passes on to it."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(TrainingArguments)}
    for name, value in spec.trainer.items():
        try:
            TypeAdapter(kinds[name]).validate_python(value, strict=True)
        except ValidationError as e:
            raise TrainingError(f"{key}.trainer.{name}: {e.errors()[0]['msg']}, got {value!r}") from e
    if not spec.trainer:
        return
    try:
        with recipe_decides():
            made = settings(next(model.parameters()).device, "no", Path(os.devnull), 0, **spec.trainer)
            optimizer, options = Trainer.get_optimizer_cls_and_kwargs(made, model)
            if not options.keys() & {"params", "model", "optimizer_dict"}:  # made of the model's own weights
                some = optimizer([torch.zeros(1, requires_grad=True)], **options)
                get_scheduler(spec.schedule, some, 1, 2, scheduler_specific_kwargs=made.lr_scheduler_kwargs)
    except (ValueError, TypeError, KeyError, ImportError, AttributeError) as e:
        raise TrainingError(f"{key}.trainer: transformers refuses it: {condensed(e)}") from e


@dataclass
class _Settings(TrainingArguments):
    """One process trains on its model's device; transformers' own goes to cuda:0, and to all GPUs by DataParallel."""

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


# -- training checkpoints, sealed like a stage whose key is the number of processes that wrote it


def last_checkpoint(work: Path, processes: int = 1) -> str | None:
    """The newest checkpoint that was written to its end and is as it was written, or None.

    One that was cut off (as every kill leaves it), is damaged, or was written by another number of processes is
    removed; of the last two a line says so.
    """
    for checkpoint in _by_number(work):
        trouble = _trouble(checkpoint, processes)
        if trouble is None:
            return str(checkpoint)
        if trouble:
            say(f"    {checkpoint.name}: {trouble}; training goes on from an older one or begins anew", style="yellow")
        shutil.rmtree(checkpoint, ignore_errors=True)
    return None


def _by_number(work: Path) -> list[Path]:
    """All checkpoints, the newest first."""
    numbers = {p: p.name.rpartition("-")[2] for p in work.glob("checkpoint-*") if p.is_dir()}
    return sorted((p for p, n in numbers.items() if n.isdecimal()), key=lambda p: -int(numbers[p]))


def _trouble(checkpoint: Path, processes: int) -> str | None:
    """What is wrong with a checkpoint: None for nothing, and nothing to speak of where it was only cut off."""
    if not (checkpoint / STAGE_FILE).is_file():
        return ""
    if (record := read_record(checkpoint)) is None:
        return f"{STAGE_FILE} cannot be read"
    if record.key == str(processes):
        return damage_of(checkpoint, record, "sha256")
    return f"{record.key} process{'es' * (record.key != '1')} wrote it, and now it is {processes}"


# -- training


@dataclass(frozen=True)
class TrainingLog:
    """What a fine-tuning did. ``losses``: per optimiser step, as their formulas have them, most in nats per token."""

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
    finished and a checkpoint is written, in all processes after the same step, then KeyboardInterrupt is raised; a
    second signal stops at once.

    Args:
        keep: Retain rows whose predictions must not change, in addition to the loss on ``rows``.
        against: A baseline's loss in place of cross-entropy, ``rows`` being what is to be forgotten.
        mixed: The autocast of the forward passes. What learns must be in float32 in any case.
    """
    part = Part(collective.rank(), collective.count())
    minimised = Objective(keep, against, part) if keep or against else None
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
        options = settings(
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
            save_total_limit=None,  # removed by number when one is sealed: here it would be by the times of files
            **spec.trainer,
            **({_CHECKPOINTING: True} if spec.gradient_checkpointing else {}),
        )
        advice = against.advice if against is not None else ADVICE
        watch = _Watch(advance, order, advice, hold, isinstance(model, PeftModel))
        trainer = _Trainer(
            order,
            minimised,
            part,
            spec.batch_size,
            model=model,
            args=options,
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
    """The Trainer, with the order of rows given, dealt out among processes, and perhaps with another objective."""

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
        if checkpoint is not None and int(checkpoint.rpartition("-")[2]) >= total:
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
        whole, layer = self.accelerator.unwrap_model(model), self._objective.layer
        reference = self._objective.reference(whole, inputs)
        positions, targets, rows = answers(inputs["labels"])
        asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        if layer is None:
            with only_at(whole, positions):
                logits = model(**asked).logits  # (N, V)
        else:
            with reading(whole, layer) as read:
                model(**asked)
            logits = read[0][positions]  # (N, d)
        share = Share(beside=inputs[BESIDE])  # the Trainer divides by the batches where it counts no tokens
        if num_items_in_batch is not None:
            # counted over all processes, whose gradients are averaged; each has as many batches
            processes = self._part.count if self.args.average_tokens_across_devices else 1
            tokens, answered = num_items_in_batch / processes, self._rows / self._part.count
            share = Share(tokens, answered, self._batches, share.beside)
        return self._objective.loss(logits, targets, rows, inputs[SIZES], share, reference)


class _Watch(TrainerCallback):
    """Moves the bar, sets the order of each epoch, stops on a non-finite loss or a signal, and seals checkpoints.

    Each of several processes gets a seed of its own: with the Trainer's all would drop the same places of their rows.
    """

    def __init__(self, advance: Callable[[int], None], order: ByLength, advice: str, hold: Hold, small: bool) -> None:
        self._advance, self._order, self._advice, self._hold, self._small = advance, order, advice, hold, small
        self._seen = self.skipped = 0
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
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}", str(collective.count()), 0.0)
            for old in _by_number(Path(args.output_dir))[2:]:
                shutil.rmtree(old, ignore_errors=True)
        collective.wait()  # nobody leaves before it is sealed: torchrun would end the others
