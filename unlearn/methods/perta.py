"""PerTA, per-parameter task arithmetic (2601.22030): theta - c * w * tau, with a weight for every single parameter.

    grad      w = |g_f| / (|g_f| + |g_r| + eps)
    fisher    w = F_f / (F_f + alpha * F_r + eps)

g and F are the importances of :mod:`unlearn.importance` on the forget and the retain set, taken at the model before
the edit. Both are one formula, with alpha = 1 for ``grad``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from unlearn.changes import Change, Dense, listed
from unlearn.errors import VectorError
from unlearn.methods.checks import check_left, check_matrices, check_moved, check_number
from unlearn.vector import TaskVector


def perta(
    vector: TaskVector,
    forget_importance: Mapping[str, Tensor],
    retain_importance: Mapping[str, Tensor],
    alpha: float = 1.0,
    eps: float = 1e-20,
) -> TaskVector:
    """The vector with every entry scaled by its importance for forgetting against that for retaining; dense.

    Args:
        vector: Vector of the forget set.
        forget_importance: Module path -> (out, in), nowhere negative.
        retain_importance: The same on the retain sets.
        alpha: Weight of the retain importance, 0 or more.
        eps: Added to the denominator, above 0. It decides where neither set has a gradient (w = 0 there) and must be
            far below the importances: squares of the gradients of a language model are 1e-8 and less.

    Raises:
        VectorError: a zero vector, importances that are missing, negative or of another shape, ``alpha`` or ``eps``
            out of range, or nothing is left.
    """
    check_moved("perta", "the vector", vector)
    check_number("perta", "alpha", alpha, 0.0)
    check_number("perta", "eps", eps, 0.0, above=True)
    for what, found in (("forget importance", forget_importance), ("retain importance", retain_importance)):
        check_matrices("perta", what, vector, found)
        negative = [name for name in vector.modules if bool((found[name] < 0).any())]
        if negative:
            raise VectorError(f"perta: a {what} must not be negative, as it is in {listed(negative)}")

    def shape(name: str, change: Change) -> Dense:
        delta = change.delta()
        f, r = (found[name].to(delta.device).float() for found in (forget_importance, retain_importance))
        return Dense(delta * (f / (f + alpha * r + eps)))

    advice = "nothing that it changes matters for the forget set; are eps and the importances in one unit?"
    return check_left("perta", vector.map(shape), vector, advice)
