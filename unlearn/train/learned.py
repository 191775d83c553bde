"""Learned coefficients: theta - c * sum_k w_k tau_k, one w_k per module or per rank-one component of a module.

aTLAS (2407.02880) learns one coefficient per parameter block; here a block can be as small as one term of a module's
singular value decomposition, dW = sum_k w_k s_k u_k v_k^T. The vector itself stays as it was fitted.
:mod:`unlearn.train.learned` finds the w_k.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from unlearn.data.encoding import Encoded
from unlearn.errors import TrainingError, VectorError
from unlearn.train.batches import Pad
from unlearn.train.losses import answer_logits, frozen, kl, with_answers
from unlearn.train.precision import range_for_gradients
from unlearn.vector.change import Change, Dense, LowRank, listed, truncated
from unlearn.vector.edit import fit
from unlearn.vector.methods import check_left, check_moved, check_number
from unlearn.vector.task_vector import TaskVector


def components(vector: TaskVector) -> TaskVector:
    """The same vector, with every low-rank change written as orthogonal rank-one terms in falling order.

    Row k of ``A`` is v_k, of length 1; column k of ``B`` is s_k u_k. Through the QR of the two thin factors, without
    building their product; terms lost in rounding are left out. A dense change stays whole, as one component.

    Raises:
        VectorError: a zero vector, or a change without a singular value decomposition.
    """
    check_moved("learned", "the vector", vector)
    return vector.map(lambda _, change: truncated(change, energy=1.0) if isinstance(change, LowRank) else change)


def sizes(vector: TaskVector) -> dict[str, int]:
    """Number of components per module: r of a low-rank change, 1 of a dense one."""
    return {name: m.rank if isinstance(m, LowRank) else 1 for name, m in vector.modules.items()}


def weigh(vector: TaskVector, weights: Mapping[str, Tensor]) -> TaskVector:
    """The vector with its components scaled.

    Args:
        vector: For weights per component: what :func:`components` gave.
        weights: Module path -> (r,), or (1,) for one weight for the whole module.

    Raises:
        VectorError: weights that are missing, for modules that the vector does not have, or of another number; a zero
            vector; or nothing is left.
    """
    check_moved("learned", "the vector", vector)
    differing = sorted({*weights} ^ {*vector.modules})
    if differing:
        raise VectorError(f"learned: the weights are not of this vector's modules: {listed(differing)}")
    wrong = [
        f"{name}: {tuple(weights[name].shape)} for {size}"
        for name, size in sizes(vector).items()
        if weights[name].ndim != 1 or len(weights[name]) not in (1, size)
    ]
    if wrong:
        raise VectorError(f"learned: there must be one weight per component or one in all: {listed(wrong)}")

    def shape(name: str, change: Change) -> Change:
        w = weights[name].detach().to(change.device).float()  # (r,) or (1,)
        return LowRank(change.A, change.B * w) if isinstance(change, LowRank) else Dense(change.values * w)

    return check_left("learned", vector.map(shape), vector, "every weight is 0: lower beta")


# -- fit the coefficients of a vector's components on training items, with the model and the vector froze


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
    """The coefficients for :func:`unlearn.train.learned.weigh`; the model comes back as it was.

    Args:
        model: A causal LM on its device, without the vector.
        vector: For ``by: component`` what :func:`unlearn.train.learned.components` gave.
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


# -- how much each weight matters for a set of examples


Importance = Literal["grad", "fisher"]


def gradients(
    model: nn.Module,
    rows: Sequence[Encoded],
    names: Sequence[str],
    kind: Importance = "grad",
    samples: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Importance of every entry of some linear weights; the model comes back as it was.

    Args:
        model: A causal LM on its device.
        rows: The examples; all of them when there are no more than ``samples``.
        names: Paths of linear modules, as a vector names them.
        kind: ``grad`` or ``fisher``.
        samples: How many rows are used, drawn without replacement.
        seed: Decides which.

    Returns:
        Module path -> (out, in) in float32 on the CPU, nowhere negative; transposed for GPT-2's Conv1D, like a vector.

    Raises:
        VectorError: no rows, no names, a name that is no linear module of floating-point weights, or a gradient that
            is not finite.
    """
    if kind not in get_args(Importance):
        raise VectorError(f"importance is {' or '.join(get_args(Importance))}, not {kind!r}")
    usable = with_answers(rows)
    if not usable or samples < 1:
        raise VectorError("importance needs at least one sample with a token to learn")
    weights = _weights(model, names)
    chosen = usable if len(usable) <= samples else random.Random(seed).sample(usable, samples)
    sums = {name: torch.zeros(weight.shape, dtype=torch.float32) for name, weight in weights.items()}
    with (
        frozen(model, but=list(weights.values())),
        range_for_gradients(model),
        _added(weights, sums, kind),
        torch.enable_grad(),
    ):
        for row in chosen:
            logits, wanted, _ = answer_logits(model, Pad(0)([row]))
            torch.autograd.backward(functional.cross_entropy(logits, wanted))
    found = {}
    for name in weights:
        mean = sums.pop(name).div_(len(chosen))
        found[name] = mean.T.contiguous() if isinstance(model.get_submodule(name), Conv1D) else mean
    bad = [name for name, mean in found.items() if not bool(torch.isfinite(mean).all())]
    if bad:
        raise VectorError(f"gradients are not finite in {len(bad)} modules, {bad[0]} first: use dtype float32")
    return found


@contextmanager
def _added(weights: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], kind: Importance) -> Iterator[None]:
    """Inside the ``with``, a gradient goes to the sums as soon as it is there, so that there is one at a time."""

    def add(total: Tensor, weight: Tensor) -> None:
        assert weight.grad is not None
        g, weight.grad = weight.grad.float(), None
        total.add_((g.abs() if kind == "grad" else g * g).to(total.device))

    handles = []
    try:
        for name, weight in weights.items():
            weight.grad = None
            handles.append(weight.register_post_accumulate_grad_hook(partial(add, sums[name])))  # type: ignore[no-untyped-call]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _weights(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The named modules' weights, or one error that lists every misfit."""
    modules = dict(model.named_modules())
    found: dict[str, nn.Parameter] = {}
    wrong = []
    for name in names:
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None:
            wrong.append(f"{name}: the model has no such module")
        elif not isinstance(module, nn.Linear | Conv1D):
            wrong.append(f"{name}: {type(module).__name__} is not a linear layer")
        elif not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            wrong.append(f"{name}: its weight is quantised and has no gradient")
        else:
            found[name] = weight
    if wrong:
        raise VectorError("importance cannot be measured here:\n  " + "\n  ".join(wrong))
    if not found:
        raise VectorError("importance needs the names of the modules it is to be measured at")
    return found
