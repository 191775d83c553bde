"""A penalty for the fitting of the forget vector that makes its negation harmless where the model must not change.

Fine-tuning pulls the forget loss down along +tau; what is deployed is theta - c*tau, the other side. The penalty asks
both sides to leave the model's predictions on retain data as they are:

    L = CE_forget(theta + tau) + beta * [ KL(theta || theta + tau) + KL(theta || theta - c*tau) ]_retain

with c drawn anew each step from the range the sweep will cover, so that the whole path is harmless and not one point.
One-sided (the second divergence left out) is what MOX (2602.06441) trains.

All terms come from one pass over one batch, in which every row has its own multiple of the adapter: 1 for forget rows;
1, -c and 0 for the copies of each retain row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional


def kl(reference: Tensor, logits: Tensor) -> Tensor:
    """Mean KL(p || q) in nats over positions.

    Args:
        reference: (N, V) logits of p, the untouched model.
        logits: (N, V) logits of q, the model under the vector.
    """
    p, q = (functional.log_softmax(x.float(), dim=-1) for x in (reference, logits))
    return functional.kl_div(q, p, reduction="batchmean", log_target=True)


def multiples(forget: int, retain: int, coefficient: float | None) -> list[float]:
    """The adapter's multiple in every row: forget rows, then the retain rows once per term, the untouched model last.

    Args:
        forget: Number of forget rows.
        retain: Number of retain rows.
        coefficient: c of the negative side; None leaves it out.
    """
    sides = [1.0] if coefficient is None else [1.0, -coefficient]
    return [1.0] * forget + [side for side in (*sides, 0.0) for _ in range(retain)]


def penalty(logits: Tensor, copies: int) -> Tensor:
    """The divergences of every side from the untouched model, added up.

    Args:
        logits: (S * N, V) at the labelled positions of S copies of the retain rows, in the order of :func:`multiples`.
        copies: S; the last copy is the untouched model's.
    """
    *sides, untouched = logits.chunk(copies)
    reference = untouched.detach()
    return torch.stack([kl(reference, side) for side in sides]).sum()


@contextmanager
def only_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside the ``with``, the model's head runs at some positions only, and its logits are (N, V).

    Answers are a few tokens at the end of a prompt; the vocabulary times all the others is a fifth of a small model's
    work for nothing.

    Args:
        positions: (B, T) booleans.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][positions],))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def scaled_rows(model: nn.Module, factors: Sequence[float]) -> Iterator[None]:
    """Inside the ``with``, row b of a batch sees ``factors[b]`` times the adapter's change.

    The backward pass belongs inside too: with gradient checkpointing it runs the model again.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.scaling]
    before = [layer.scaling["default"] for layer in layers]
    device = next(model.parameters()).device
    rows = torch.tensor(factors, device=device)[:, None, None]  # (B, 1, 1), against outputs (B, T, out)
    for layer, scale in zip(layers, before, strict=True):
        layer.scaling["default"] = scale * rows
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scaling["default"] = scale
