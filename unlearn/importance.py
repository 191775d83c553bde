"""How much each weight matters for a set of examples: mean |gradient|, or the diagonal of the empirical Fisher matrix.

    grad      g_ij = mean over samples of |d loss / d W_ij|
    fisher    F_ij = mean over samples of (d loss / d W_ij)^2

with the loss of one sample at a time, its mean over labelled tokens. PerTA (2601.22030) estimates both from 64 samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from unlearn.batches import Encoded, Pad
from unlearn.errors import VectorError
from unlearn.frozen import answer_logits, frozen, with_answers
from unlearn.precision import range_for_gradients

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
