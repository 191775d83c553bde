"""What is worked out by gradients with the model frozen: learned coefficients, how much each weight matters, and what a
LoRA may begin at for it.

theta - c * sum_k w_k tau_k, one w_k per module or per rank-one component of a module. aTLAS (2407.02880) learns one
coefficient per parameter block; here a block can be as small as one term of a module's singular value decomposition.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from unlearn.console import say
from unlearn.data.encoding import Encoded
from unlearn.errors import TrainingError, VectorError
from unlearn.recipe.methods import LearnedSpec
from unlearn.train.batches import Pad
from unlearn.train.losses import adapters, answer_logits, frozen, kl, with_answers
from unlearn.train.moments import gradient_moments, second_moments
from unlearn.train.trainer import range_for_gradients
from unlearn.vector.change import Change, LowRank
from unlearn.vector.edit import fit, weights_of
from unlearn.vector.methods import Have, check_moved
from unlearn.vector.task_vector import TaskVector


def materials(
    model: nn.Module,
    pad_id: int,
    seed: int,
    fitted: TaskVector,
    retain: TaskVector | None = None,
    forget_rows: Sequence[Encoded] = (),
    retain_rows: Sequence[Encoded] = (),
) -> Have:
    """What shapers work on beside the vector; training rows are needed where a method asks for them."""

    def importances(names: Sequence[str], kind: str, samples: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        forget, kept = (gradients(model, rows, names, kind, samples, seed) for rows in (forget_rows, retain_rows))
        return forget, kept

    def coefficients(vector: TaskVector, how: LearnedSpec) -> dict[str, Tensor]:
        weights, steps = learn(model, vector, forget_rows, retain_rows, how, seed, pad_id)
        say(f"    learned: retain divergence {steps[0][2]:.3g} to {steps[-1][2]:.3g} nats")
        return weights

    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)

    def moments(names: Sequence[str], of: str = "retain") -> Iterator[tuple[Sequence[str], Tensor]]:
        if of == "gradients":
            return gradient_moments(model, retain_rows, names, pad_id, seed)
        rows = forget_rows if of == "forget" else retain_rows
        return second_moments(model, rows, names, pad_id, thin=True)

    def slopes(vector: TaskVector, samples: int) -> tuple[Tensor, Tensor]:
        kept, gone = (component_slopes(model, vector, rows, samples, seed) for rows in (retain_rows, forget_rows))
        return kept, gone.mean(0)

    return Have(fitted, retain, layers, partial(weights_of, model), importances, coefficients, moments, slopes)


# -- learned coefficients


def learn(
    model: nn.Module,
    vector: TaskVector,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    how: LearnedSpec,
    seed: int,
    pad_id: int,
) -> tuple[dict[str, Tensor], list[tuple[float, float, float]]]:
    """The coefficients for :func:`unlearn.vector.methods.weigh`; the model comes back as it was.

    Minimised is ``beta`` times the divergence on retain answers less the forget answers' NLL, up to ``ceiling`` each.

    Args:
        model: A causal LM on its device, without the vector.
        vector: By component what :func:`unlearn.vector.methods.components` gave.
        seed: Decides the batches.

    Returns:
        Module path -> (r,) by component, (1,) by module or of a dense change, float32 on the CPU; and of each step,
        taken before it, the whole objective, the mean answer's NLL and the divergence, in nats per token.
    """
    check_moved("learned", "the vector", vector)
    forget, retain = with_answers(forget), with_answers(retain)
    for side, rows in (("forget", forget), ("retain", retain)):
        if not rows:
            raise VectorError(f"learned: the {side} set has no training item with an answer to fit coefficients on")
    weights = _weights(model, vector, 1.0, how.by)
    optimiser = torch.optim.Adam(weights.values(), lr=how.learning_rate)
    steps: list[tuple[float, float, float]] = []
    with frozen(model), range_for_gradients(model), weighted(model, vector, weights) as scale, torch.enable_grad():
        for step in range(how.steps):
            draw = random.Random(f"{seed} {step}")
            rows = draw.sample(forget, min(how.batch_size, len(forget)))
            near = draw.sample(retain, min(how.retain_batch_size, len(retain)))
            scale.value = how.scale
            answers, kept = _measure(model, rows, near, scale, pad_id)
            loss = how.beta * kept - answers.clamp(max=how.ceiling).mean()
            steps.append((float(loss.detach()), float(answers.detach().mean()), float(kept.detach())))
            if not math.isfinite(steps[-1][0]):
                raise TrainingError(f"learned: the objective became {steps[-1][0]} at step {step}: lower learning_rate")
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
    return {name: w.detach().cpu().clone() for name, w in weights.items()}, steps


def _weights(model: nn.Module, vector: TaskVector, start: float, by: str = "component") -> dict[str, Tensor]:
    """A weight on every component, or every module, of a vector, to be differentiated by."""
    device = next(model.parameters()).device
    counts = {n: m.rank if by == "component" and isinstance(m, LowRank) else 1 for n, m in vector.modules.items()}
    return {name: torch.full((count,), start, device=device, requires_grad=True) for name, count in counts.items()}


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
        weights: Module path -> (r,), or (1,) for one weight on the whole change.

    Yields:
        c, to be set; it begins at 0.
    """
    scale = Scale()
    with ExitStack() as hooks:
        for name, (module, change) in fit(model, vector).items():
            hook = partial(_subtract, change.to(module.get_parameter("weight").device), weights[name], scale)
            hooks.enter_context(module.register_forward_hook(hook))
        yield scale


def _subtract(
    change: Change, w: Tensor, scale: Scale, module: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    if scale.value == 0.0:
        return output
    x = args[0].float()  # (..., in)
    w = w.to(x.device)
    if isinstance(change, LowRank):
        moved = functional.linear(functional.linear(x, change.A) * w, change.B)  # (..., out)
    else:
        moved = change.act(x) * w
    return (output.float() - scale.value * moved).to(output.dtype)


# -- how losses move along the components of a vector


def component_slopes(model: nn.Module, vector: TaskVector, rows: Sequence[Encoded], samples: int, seed: int) -> Tensor:
    """How every item's loss moves with every component's weight w, at theta + sum_k w_k tau_k with all w 0.

    Args:
        vector: Written by component, as :func:`unlearn.vector.methods.components` does.
        samples: How many rows are used at most, drawn without replacement by ``seed``.

    Returns:
        (N, K) in nats per answer's token, float32 on the CPU; components in the order of the vector's modules.
    """
    usable = _drawn(rows, samples, seed, "slopes need")
    weights = _weights(model, vector, 0.0)
    found = []
    with frozen(model), range_for_gradients(model), weighted(model, vector, weights) as scale, torch.enable_grad():
        scale.value = -1.0  # added, not subtracted
        for row in usable:
            logits, wanted, _ = answer_logits(model, Pad(0)([row]))
            grads = torch.autograd.grad(functional.cross_entropy(logits, wanted), list(weights.values()))
            found.append(torch.cat([g.cpu() for g in grads]))
    slopes = torch.stack(found)
    if not bool(torch.isfinite(slopes).all()):
        raise VectorError("slopes of the losses are not finite: use dtype float32")
    return slopes


# -- how much each weight matters for a set of examples


def gradients(
    model: nn.Module,
    rows: Sequence[Encoded],
    names: Sequence[str],
    kind: str = "grad",
    samples: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Importance of every entry of some linear weights; the model comes back as it was.

    Args:
        names: Paths of linear modules, as a vector names them.
        kind: ``grad``, the mean magnitude of the gradient, or ``fisher``, its mean square.
        samples: How many rows are used at most, drawn without replacement by ``seed``.

    Returns:
        Module path -> (out, in) in float32 on the CPU, nowhere negative; transposed for GPT-2's Conv1D, like a vector.
    """
    chosen = _drawn(rows, samples, seed, "importance needs")
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    if packed := [name for name, weight in weights.items() if not weight.is_floating_point()]:
        raise VectorError(f"importance cannot be measured here: quantised weights have no gradient: {packed[0]}, ...")
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
def _added(weights: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor], kind: str) -> Iterator[None]:
    """Inside the ``with``, a gradient goes to the sums as soon as it is there, so that there is one at a time."""

    def add(total: Tensor, weight: Tensor) -> None:
        assert weight.grad is not None
        g, weight.grad = weight.grad.float(), None
        total.add_((g.abs() if kind == "grad" else g * g).to(total.device))

    with ExitStack() as hooks:
        for name, weight in weights.items():
            weight.grad = None
            hooks.enter_context(weight.register_post_accumulate_grad_hook(partial(add, sums[name])))  # type: ignore[no-untyped-call]
        yield


def _drawn(rows: Sequence[Encoded], samples: int, seed: int, what: str) -> list[Encoded]:
    """At most so many of the rows that have an answer; an error where there is none."""
    usable = with_answers(rows)
    if not usable:
        raise VectorError(f"{what} at least one sample with a token to learn")
    return usable if len(usable) <= samples else random.Random(seed).sample(usable, samples)


# -- a LoRA that begins where the forget set's knowledge is


class Begun(nn.Linear):
    """One factor of a LoRA that begins at B0 A0 and not at zero: with the other one it acts as B A - B0 A0.

    So the weights stay as they are, where LoKU takes B0 A0 off them.
    """

    start: Tensor

    def __init__(self, start: Tensor, device: torch.device) -> None:
        super().__init__(start.shape[1], start.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(start.to(device, copy=True))
        self.register_buffer("start", start.to(device, copy=True))  # kept in checkpoints


class BegunA(Begun):
    """A, of (r, in)."""

    def forward(self, x: Tensor) -> Tensor:
        """X A^T beside X A0^T, (..., 2r)."""
        return torch.cat([functional.linear(x, self.weight), functional.linear(x, self.start)], -1)

    def whole(self) -> Tensor:
        """A above A0, (2r, in)."""
        return torch.cat([self.weight.detach(), self.start])


class BegunB(Begun):
    """B, of (out, r)."""

    def forward(self, h: Tensor) -> Tensor:
        """The first half of h under B, less the second under B0."""
        ours, theirs = h.chunk(2, -1)
        return functional.linear(ours, self.weight) - functional.linear(theirs, self.start)

    def whole(self) -> Tensor:
        """B beside -B0, (out, 2r)."""
        return torch.cat([self.weight.detach(), -self.start], 1)


def fila(
    model: nn.Module,
    forget: Sequence[Encoded],
    retain: Sequence[Encoded],
    names: Sequence[str],
    rank: int,
    samples: int,
    seed: int,
) -> dict[str, LowRank]:
    """FILA's start (LoKU 2408.06621): of each weight W the B A that is closest to it where it matters.

    Minimised is |diag(f)(W - B A)|, f_i^2 the sum over row i of F_forget / (F_retain + 1e-5), F the mean square of
    gradients; the constants are those of the authors' code.
    """
    of_forget, of_retain = (gradients(model, rows, names, "fisher", samples, seed) for rows in (forget, retain))
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, weight in weights_of(model, names).items():
            f = (of_forget.pop(name) / (of_retain.pop(name) + 1e-5)).sum(1).sqrt()[:, None]  # (out, 1)
            most = min(rank + 16, *weight.shape)  # more than are kept, with which those are exact enough
            u, s, v = torch.svd_lowrank(f * weight.float().cpu(), most, niter=4)
            root = s[:rank].sqrt()
            found[name] = LowRank((v[:, :rank] * root).T, u[:, :rank] * root / (f + 1e-5))
    return found


def begin(model: nn.Module, starts: Mapping[str, LowRank]) -> None:
    """Let every LoRA of a PEFT model begin at a start; there is one for each module's path."""
    for name, layer in adapters(model):
        scale, device = math.sqrt(layer.scaling["default"]), layer.lora_A["default"].weight.device
        layer.lora_A["default"] = BegunA(starts[name].A / scale, device)
        layer.lora_B["default"] = BegunB(starts[name].B / scale, device)
