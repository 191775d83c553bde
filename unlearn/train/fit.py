"""Fine-tune a model on examples, and read the task vector off the adapter.

transformers' Trainer trains and peft makes the adapter (Hu et al. 2106.09685); this module resumes from the last whole
checkpoint and refuses what cannot give a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from unlearn.data.encoding import Encoded
from unlearn.errors import TrainingError
from unlearn.model.load import resolve_targets
from unlearn.recipe.methods import LoraSpec, TrainSpec
from unlearn.train.losses import Against, Keep
from unlearn.train.trainer import TrainingLog, float32_weights, mixed_precision, range_for_gradients, train
from unlearn.vector.change import LowRank, check_rank
from unlearn.vector.edit import fit, shape_of
from unlearn.vector.task_vector import TaskVector


def lora_modules(model: PreTrainedModel, lora: LoraSpec) -> tuple[str, ...]:
    """Full paths of the modules that a LoRA is put on.

    Raises:
        ModelError: its targets match nothing.
        VectorError: its rank is above what a target's matrix can have.
    """
    targets = resolve_targets(model, lora.targets, lora.depth)
    check_rank(lora.rank, {name: shape_of(model.get_submodule(name)) for name in targets})
    return targets


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
    against: Against | None = None,
) -> tuple[TaskVector, TrainingLog]:
    """LoRA on ``rows``; the model comes back without the adapter, its own weights untouched.

    Args:
        work: Folder for checkpoints; training goes on from the last whole one it finds there.
        label: What the progress bar says.
        meta: Goes into the vector's metadata.
        keep: Retain rows on which the model's predictions must not change.
        against: A baseline's loss in place of cross-entropy. The vector is what was trained, and with these losses
            theta + tau is the model that has forgotten ``rows``: who subtracts vectors negates it first.

    Raises:
        ModelError: the LoRA's targets match nothing.
        VectorError: its rank is above what a target's matrix can have.
        TrainingError: non-finite loss, or an adapter that learned nothing.
        ValueError: ``keep`` and ``against`` together.
    """
    targets = lora_modules(model, lora)
    quantised = bool(getattr(model, "is_quantized", False))
    mixed = mixed_precision(model)
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
    with range_for_gradients(model) if mixed == "no" else nullcontext():
        peft_model = get_peft_model(model, config)
        assert isinstance(peft_model, PeftModel)
        try:
            log = train(peft_model, tokenizer, rows, spec, seed, work, label, keep, against, mixed)
            vector = read_adapter(peft_model, {**meta, "rank": str(lora.rank), "alpha": str(lora.alpha)})
        finally:
            peft_model.unload()
    if vector.norm() == 0.0:
        raise TrainingError(f"{label}: the adapter did not move from zero; raise learning_rate or steps")
    return vector, log


def train_weights(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[Encoded], spec: TrainSpec, seed: int, work: Path, label: str
) -> TrainingLog:
    """Fine-tune all weights in place (teach without a LoRA), in float32, and round them to their own format at the end.

    Raises:
        TrainingError: the loss is not finite.
    """
    set_seed(seed)
    mixed = mixed_precision(model)
    try:
        with float32_weights(model):
            model.requires_grad_(True)
            return train(model, tokenizer, rows, spec, seed, work, label, mixed=mixed)
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
