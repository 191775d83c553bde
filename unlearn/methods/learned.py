"""Learned coefficients: theta - c * sum_k w_k tau_k, one w_k per module or per rank-one component of a module.

aTLAS (2407.02880) learns one coefficient per parameter block; here a block can be as small as one term of a module's
singular value decomposition, dW = sum_k w_k s_k u_k v_k^T. The vector itself stays as it was fitted.
:mod:`unlearn.learn_weights` finds the w_k.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from unlearn.changes import Change, Dense, LowRank, listed
from unlearn.compress import truncated
from unlearn.errors import VectorError
from unlearn.methods.checks import check_left, check_moved
from unlearn.vector import TaskVector


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
