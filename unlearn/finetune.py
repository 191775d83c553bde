"""Fine-tune a model on examples, and read the task vector off the adapter.

transformers' Trainer trains and peft makes the adapter (Hu et al. 2106.09685); this module turns items into token
rows, resumes from the last whole checkpoint, and refuses what cannot give a vector.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import PrinterCallback

from unlearn.batches import IGNORE, ByLength, Encoded, Pad
from unlearn.console import progress
from unlearn.data import Item
from unlearn.errors import TrainingError
from unlearn.memory import is_out_of_memory
from unlearn.methods.retain_kl import penalty
from unlearn.models import resolve_targets
from unlearn.negate import fit
from unlearn.recipe import LoraSpec, RetainKLSpec, TrainSpec
from unlearn.vector import LowRank, TaskVector

_WHOLE = "unlearn_checkpoint_is_whole"


@dataclass(frozen=True)
class Keep:
    """Retain rows and the penalty that holds the model's predictions on them."""

    rows: Sequence[Encoded]
    spec: RetainKLSpec


@dataclass(frozen=True)
class TrainingLog:
    """What a fine-tuning did. ``losses`` has one value per optimiser step, in nats per trained token."""

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


def encode(items: Sequence[Item], kind: str, tokenizer: Any, max_length: int) -> list[Encoded]:
    """Tokens and labels: text is learned whole; for qa and mcq only the answer carries loss.

    The prompt is split off as lm-eval does it (tokens of the whole minus as many as the prompt alone has), so what is
    trained is what is scored. A qa answer ends with the end-of-text token, so that the model learns to stop.

    Raises:
        TrainingError: after cutting to ``max_length`` no item has a token left to learn.
    """
    rows = []
    for item in items:
        if kind == "text":
            ids = tokenizer(item.prompt + item.target)["input_ids"]
            skip = 1  # the first token has nothing before it
        else:
            ids = tokenizer(f"{item.prompt} {item.target}")["input_ids"]
            # blanks at a prompt's end count as the answer's; and the first token has nothing before it
            prompt = item.prompt.rstrip()
            skip = max(len(tokenizer(prompt)["input_ids"]) if prompt else 0, 1)
            if kind == "qa":
                ids = [*ids, tokenizer.eos_token_id]
        ids = ids[:max_length]
        if len(ids) > skip:
            rows.append(Encoded(tuple(ids), (*[IGNORE] * skip, *ids[skip:])))
    if not rows:
        raise TrainingError(
            f"none of the {len(items)} items has an answer within max_length ({max_length} tokens): raise max_length"
        )
    return rows


def train_vector(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Encoded],
    spec: TrainSpec,
    lora: LoraSpec,
    seed: int,
    work: Path,
    label: str,
    meta: Mapping[str, str],
    keep: Keep | None = None,
) -> tuple[TaskVector, TrainingLog]:
    """LoRA on ``rows``; the model comes back without the adapter, its own weights untouched.

    Args:
        work: Folder for checkpoints; training goes on from the last whole one it finds there.
        label: What the progress bar says.
        meta: Goes into the vector's metadata.
        keep: Retain rows on which the model's predictions must not change.

    Raises:
        ModelError: the LoRA's targets match nothing.
        TrainingError: non-finite loss, out of memory, or an adapter that learned nothing.
    """
    targets = resolve_targets(model, lora.targets)
    quantised = bool(getattr(model, "is_quantized", False))
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=spec.gradient_checkpointing)
    set_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rslora,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    try:
        log = _train(peft_model, tokenizer, rows, spec, seed, work, label, keep)
        vector = read_adapter(peft_model, {**meta, "rank": str(lora.rank), "alpha": str(lora.alpha)})
    finally:
        peft_model.unload()
    if vector.norm() == 0.0:
        raise TrainingError(f"{label}: the adapter did not move from zero; raise learning_rate or steps")
    return vector, log


def train_weights(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[Encoded], spec: TrainSpec, seed: int, work: Path, label: str
) -> TrainingLog:
    """Fine-tune all weights in place (teach without a LoRA).

    Raises:
        TrainingError: non-finite loss or out of memory.
    """
    set_seed(seed)
    model.requires_grad_(True)
    try:
        return _train(model, tokenizer, rows, spec, seed, work, label)
    finally:
        model.requires_grad_(False)


def read_adapter(model: nn.Module, meta: Mapping[str, str]) -> TaskVector:
    """The task vector of a PEFT model's active LoRA: delta = scaling * B @ A per module, float32.

    ``scaling`` is alpha/r, or alpha/sqrt(r) with rsLoRA; peft has it per layer.
    """
    modules: dict[str, LowRank] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            a = layer.lora_A["default"].weight.detach().float().cpu().clone()  # (r, in)
            b = layer.lora_B["default"].weight.detach().float().cpu() * layer.scaling["default"]  # (out, r)
            modules[name.removeprefix("base_model.model.")] = LowRank(a, b)
    return TaskVector(modules, meta)


def merge(model: nn.Module, vector: TaskVector) -> None:
    """Add a vector to the weights for good, in float32, rounded once to the weights' dtype.

    Raises:
        VectorError: the vector does not fit the model.
    """
    with torch.no_grad():
        for module, low_rank in fit(model, vector).values():
            weight = module.get_parameter("weight")
            delta = low_rank.delta().to(weight.device)
            weight.add_(delta.T if isinstance(module, Conv1D) else delta)


def _train(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    spec: TrainSpec,
    seed: int,
    work: Path,
    label: str,
    keep: Keep | None = None,
) -> TrainingLog:
    """Run the Trainer over ``rows``, from the last whole checkpoint in ``work`` if there is one."""
    epochs, max_steps = spec.duration()
    per_epoch = math.ceil(math.ceil(len(rows) / spec.batch_size) / spec.accumulation)
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
    with progress(label, total) as advance:
        trainer = _Trainer(
            order,
            keep,
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=Pad(tokenizer.pad_token_id),
            callbacks=[_Watch(advance, order)],
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
    """The Trainer, with the order of rows given, and with the retain penalty added to the loss where there is one."""

    def __init__(self, order: ByLength, keep: Keep | None, **options: Any) -> None:
        super().__init__(**options)
        self._order = order
        self._keep = keep
        self._step, self._calls = -1, 0

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> ByLength:
        return self._order

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self._keep is None:
            return loss
        # drawn from the step's own seed, so that a resumed training sees what an uninterrupted one sees; counted
        # anew at each step, because the last one of an epoch may have fewer batches
        if self._step != self.state.global_step:
            self._step, self._calls = self.state.global_step, 0
        self._calls += 1
        draw = random.Random(f"{self.args.seed} {self._step} {self._calls} {self.args.process_index}")
        spec = self._keep.spec
        rows = draw.sample(self._keep.rows, min(spec.batch_size, len(self._keep.rows)))
        batch = {k: v.to(loss.device) for k, v in self.data_collator(rows).items()}
        c = draw.uniform(*spec.coefficients) if spec.sides == "two" else None
        extra = penalty(self.accelerator.unwrap_model(model), batch, c)
        return loss + spec.weight * extra / self.args.gradient_accumulation_steps


class _Watch(TrainerCallback):
    """Moves the bar, sets the order of each epoch, stops on a non-finite loss, and marks checkpoints that are whole."""

    def __init__(self, advance: Callable[[int], None], order: ByLength) -> None:
        self._advance = advance
        self._order = order
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
            raise TrainingError(
                f"the loss became {loss} at step {state.global_step}: lower learning_rate, or use dtype: float32"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()
