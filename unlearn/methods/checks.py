"""What the ways of shaping a vector refuse, each with one message that says what to do instead."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from unlearn.changes import listed
from unlearn.errors import VectorError
from unlearn.vector import TaskVector


def check_pair(method: str, forget: TaskVector, retain: TaskVector) -> None:
    """Two vectors of one model that have something to do with each other.

    Raises:
        VectorError: one of them is zero, they share no module, or a module has different shapes.
    """
    check_moved(method, "the forget vector", forget)
    check_moved(method, "the retain vector", retain)
    both = [name for name in forget.modules if name in retain.modules]
    if not both:
        raise VectorError(
            f"{method}: the forget and the retain vector share no module ({next(iter(forget.modules))}, ... and "
            f"{next(iter(retain.modules))}, ...): make both from the same model with the same LoRA targets"
        )
    clash = [
        f"{name} {forget.modules[name].shape} and {retain.modules[name].shape}"
        for name in both
        if forget.modules[name].shape != retain.modules[name].shape
    ]
    if clash:
        raise VectorError(f"{method}: the forget and the retain vector are of different models: {listed(clash)}")


def check_moved(method: str, what: str, vector: TaskVector) -> None:
    """A vector that changes something.

    Raises:
        VectorError: every change is zero.
    """
    if vector.norm() == 0.0:
        raise VectorError(f"{method}: {what} is zero, there is nothing in it to shape")


def check_left(method: str, result: TaskVector, source: TaskVector, advice: str) -> TaskVector:
    """``result``, if more of ``source`` is left in it than rounding leaves.

    Raises:
        VectorError: nothing is left.
    """
    if result.norm() <= 1e-6 * source.norm():
        raise VectorError(f"{method}: nothing is left of the vector; {advice}")
    return result


def check_number(
    method: str, name: str, value: float, low: float = -math.inf, high: float = math.inf, *, above: bool = False
) -> None:
    """A finite number from ``low``, or with ``above`` above it, to ``high``.

    Raises:
        VectorError: it is not.
    """
    if math.isfinite(value) and low <= value <= high and not (above and value == low):
        return
    bounds = [f"above {low:g}" if above else f"at least {low:g}"] if math.isfinite(low) else []
    bounds += [f"at most {high:g}"] if math.isfinite(high) else []
    raise VectorError(f"{method}: {name} must be {' and '.join(bounds) or 'a finite number'}, not {value}")


def check_matrices(method: str, what: str, vector: TaskVector, matrices: Mapping[str, Tensor]) -> None:
    """One finite matrix per module of the vector, of the shape of its change.

    Args:
        what: What a matrix is, for the message.
        matrices: Module path -> (out, in). More than the vector's modules may be there.

    Raises:
        VectorError: modules without one, other shapes or values that are not finite; all of them are named.
    """
    missing = [name for name in vector.modules if name not in matrices]
    if missing:
        raise VectorError(f"{method}: there is no {what} for {listed(missing)}")
    wrong = [
        f"{name}: {tuple(matrices[name].shape)} where the vector changes {m.shape}"
        for name, m in vector.modules.items()
        if tuple(matrices[name].shape) != m.shape
    ]
    if wrong:
        raise VectorError(f"{method}: a {what} must be (out, in) like the change of its module: {listed(wrong)}")
    bad = [name for name in vector.modules if not bool(torch.isfinite(matrices[name]).all())]
    if bad:
        raise VectorError(f"{method}: a {what} holds values that are not finite: {listed(bad)}")
