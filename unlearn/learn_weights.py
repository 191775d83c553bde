"""Fit the coefficients of a vector's components on training items, with the model and the vector frozen.

With theta_w = theta - c * sum_k w_k tau_k, minimised over w by Adam:

    L(w) = - E_forget[ min(NLL(theta_w), ceiling) ] + beta * E_retain[ KL(theta || theta_w) ]

NLL is one answer's mean over its tokens, in nats, and the ceiling is taken per answer: one that is forgotten well
enough pulls no further, so that the first term cannot run away. KL is the mean over the retain answers' positions.
c is 1, or drawn anew each step from a range, so that a whole stretch of the sweep is fitted and not one point.

aTLAS (2407.02880) fits coefficients of parameter blocks for negation by ascent on the forget set and descent on a
control set; the divergence in place of the latter needs no right answers to be kept, only the model's own.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from unlearn.batches import Encoded, Pad
from unlearn.changes import Change, LowRank
from unlearn.errors import TrainingError, VectorError
from unlearn.frozen import answer_logits, frozen, with_answers
from unlearn.methods.checks import check_moved, check_number
from unlearn.methods.learned import sizes
from unlearn.methods.retain_kl import kl
from unlearn.negate import fit
from unlearn.precision import range_for_gradients
from unlearn.vector import TaskVector

By = Literal["component", "module"]


@dataclass(frozen=True)
class LearnSpec:
    """How coefficients are fitted.

    Args:
        steps: Adam steps.
        rate: Adam's learning rate; coefficients begin at 1.
        batch_size: Forget rows per step.
        retain_batch_size: Retain rows per step.
        beta: Weight of the retain divergence.
        ceiling: Nats per token above which an answer counts as forgotten.
        by: One coefficient per component, or one per module.
        coefficients: c is drawn from this range at each step; equal ends fix it.

    Raises:
        VectorError: a value out of range.
    """

    steps: int = 60
    rate: float = 0.1
    batch_size: int = 8
    retain_batch_size: int = 8
    beta: float = 5.0
    ceiling: float = 10.0
    by: By = "component"
    coefficients: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "retain_batch_size"):
            check_number("learned", name, getattr(self, name), 1)
        check_number("learned", "beta", self.beta, 0.0)
        for name in ("rate", "ceiling"):
            check_number("learned", name, getattr(self, name), 0.0, above=True)
        low, high = self.coefficients
        check_number("learned", "the coefficients' lower end", low, 0.0)
        check_number("learned", "the coefficients' upper end", high, max(low, 1e-6))
        if self.by not in ("component", "module"):
            raise VectorError(f"learned: by must be component or module, not {self.by!r}")


@dataclass(frozen=True)
class LearningLog:
    """What a fit did; one value per step, taken before it.

    ``forget`` is the mean answer's NLL in nats per token, not cut at the ceiling; ``retain`` the divergence in nats per
    token; ``losses`` the whole objective.
    """

    losses: tuple[float, ...]
    forget: tuple[float, ...]
    retain: tuple[float, ...]
    seconds: float


def learn(
    model: nn.Module,
    vector: TaskVector,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    spec: LearnSpec,
    seed: int,
    pad_id: int,
) -> tuple[dict[str, Tensor], LearningLog]:
    """The coefficients for :func:`unlearn.methods.learned.weigh`; the model comes back as it was.

    Args:
        model: A causal LM on its device, without the vector.
        vector: For ``by: component`` what :func:`unlearn.methods.learned.components` gave.
        forget: Training rows of the forget set.
        retain: Training rows of the retain sets.
        seed: Decides the batches.
        pad_id: Token that fills up short rows.

    Returns:
        Module path -> (r,) by component, (1,) by module or of a dense change, float32 on the CPU; and the log.

    Raises:
        VectorError: a zero vector, one that does not fit the model, or no rows on one side.
        TrainingError: the objective became non-finite.
    """
    check_moved("learned", "the vector", vector)
    forget, retain = with_answers(forget), with_answers(retain)
    for side, rows in (("forget", forget), ("retain", retain)):
        if not rows:
            raise VectorError(f"learned: the {side} set has no training item with an answer to fit coefficients on")
    device = next(model.parameters()).device
    counts = sizes(vector) if spec.by == "component" else dict.fromkeys(vector.modules, 1)
    weights = {name: torch.ones(count, device=device, requires_grad=True) for name, count in counts.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=spec.rate)
    steps: list[tuple[float, float, float]] = []
    started = time.monotonic()
    with frozen(model), range_for_gradients(model), weighted(model, vector, weights) as scale, torch.enable_grad():
        for step in range(spec.steps):
            draw = random.Random(f"{seed} {step}")
            rows = draw.sample(forget, min(spec.batch_size, len(forget)))
            near = draw.sample(retain, min(spec.retain_batch_size, len(retain)))
            scale.value = draw.uniform(*spec.coefficients)
            answers, kept = _measure(model, rows, near, scale, pad_id)
            loss = spec.beta * kept - answers.clamp(max=spec.ceiling).mean()
            steps.append((float(loss.detach()), float(answers.detach().mean()), float(kept.detach())))
            if not math.isfinite(steps[-1][0]):
                raise TrainingError(f"learned: the objective became {steps[-1][0]} at step {step}: lower rate")
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    found = {name: w.detach().cpu().clone() for name, w in weights.items()}
    losses, away, divergences = zip(*steps, strict=True)
    return found, LearningLog(losses, away, divergences, time.monotonic() - started)


@dataclass
class Scale:
    """c of the step; at 0 the model is the untouched one."""

    value: float = 0.0


def _measure(
    model: nn.Module, forget: Sequence[Encoded], retain: Sequence[Encoded], scale: Scale, pad_id: int
) -> tuple[Tensor, Tensor]:
    """NLL of every forget answer in nats per token, (F,), and the mean divergence on the retain answers, ()."""
    logits, wanted, row = answer_logits(model, Pad(pad_id)([*forget, *retain]))
    ours = row < len(forget)
    nll = functional.cross_entropy(logits[ours], wanted[ours], reduction="none")  # (N,)
    sums = torch.zeros(len(forget), device=nll.device).index_add(0, row[ours], nll)
    answers = sums / row[ours].bincount(minlength=len(forget))
    edited, scale.value = scale.value, 0.0
    with torch.no_grad():
        reference, _, _ = answer_logits(model, Pad(pad_id)(retain))
    scale.value = edited
    return answers, kl(reference, logits[~ours])


@contextmanager
def weighted(model: nn.Module, vector: TaskVector, weights: Mapping[str, Tensor]) -> Iterator[Scale]:
    """Inside the ``with``, every module of the vector gives W x - c * sum_k w_k tau_k x, differentiable in w.

    Args:
        weights: Module path -> (r,), or (1,) for one weight on the whole change; on the device it acts on.

    Yields:
        c, to be set; it begins at 0.
    """
    scale = Scale()
    handles = []
    try:
        for name, (module, change) in fit(model, vector).items():
            hook = partial(_subtract, change.to(weights[name].device), weights[name], scale)
            handles.append(module.register_forward_hook(hook))
        yield scale
    finally:
        for handle in handles:
            handle.remove()


def _subtract(
    change: Change, w: Tensor, scale: Scale, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    if scale.value == 0.0:
        return output
    x = args[0].float()  # (..., in)
    if isinstance(change, LowRank):
        moved = functional.linear(functional.linear(x, change.A) * w, change.B)  # (..., out)
    else:
        moved = change.act(x) * w
    return (output.float() - scale.value * moved).to(output.dtype)
