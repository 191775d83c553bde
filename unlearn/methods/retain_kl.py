"""A penalty for the fitting of the forget vector that makes its negation harmless where the model must not change.

Fine-tuning pulls the forget loss down along +tau; what is deployed is theta - c*tau, the other side. The penalty asks
both sides to leave the model's predictions on retain data as they are:

    L = CE_forget(theta + tau) + beta * [ KL(theta || theta + tau) + KL(theta || theta - c*tau) ]_retain

with c drawn anew each step from the range the sweep will cover, so that the whole path is harmless and not one point.
One-sided (the second term left out) is what MOX (2602.06441) trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(p || q) in nats over positions.

    Args:
        reference: (N, V) logits of p, the untouched model.
        logits: (N, V) logits of q, the model under the vector.
    """
    p, q = (functional.log_softmax(x.float(), dim=-1) for x in (reference, logits))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def penalty(model: PeftModel, batch: Mapping[str, Tensor], coefficient: float | None) -> Tensor:
    """KL(theta || theta + tau), plus KL(theta || theta - coefficient * tau) unless that is None.

    Args:
        model: The model with the adapter in training.
        batch: Retain rows: input_ids, attention_mask, labels, each (B, T). Positions that predict a label count.
        coefficient: Where on the negative side; None for the one-sided penalty.
    """
    with torch.no_grad(), model.disable_adapter():
        reference = _answers(model, batch)
    total = kl(reference, _answers(model, batch))
    if coefficient is not None:
        with scaled(model, -coefficient):
            total = total + kl(reference, _answers(model, batch))
    return total


@contextmanager
def scaled(model: PeftModel, factor: float) -> Iterator[None]:
    """The adapter's change times ``factor`` inside the ``with``."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.scaling]
    before = [layer.scaling["default"] for layer in layers]
    for layer, scale in zip(layers, before, strict=True):
        layer.scaling["default"] = scale * factor
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling["default"] = scale


def _answers(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """(N, V) logits at the positions that predict a label."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, T, V)
    return logits[:, :-1][batch["labels"][:, 1:] != -100]
