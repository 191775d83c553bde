"""Projection off the retain vector's row space: per module dW_f (I - V_k V_k^T).

V_k are the leading right singular vectors of dW_r, as many as have ``energy`` of its squared singular values. They
are the directions of a module's *input* to which fine-tuning on the retain sets answered; a change that is blind to
them leaves the retain sets' own features alone. UNLEARN (2408.04140) takes the subspaces of neighbouring tasks out of
the one it removes in the same spirit.
"""

from __future__ import annotations

from torch import Tensor

from unlearn.changes import Change, Dense, LowRank
from unlearn.compress import truncated
from unlearn.methods.checks import check_left, check_number, check_pair
from unlearn.vector import TaskVector


def project(forget: TaskVector, retain: TaskVector, energy: float = 0.9) -> TaskVector:
    """The part of the forget vector whose rows are orthogonal to the retain vector's leading row directions.

    Of a low-rank change only ``A`` is altered, and neither vector's matrices are built. Modules that the retain vector
    does not change stay as they are.

    Args:
        forget: Vector of the forget set.
        retain: Vector of the retain sets, of the same model.
        energy: Share of the retain vector's squared norm, per module, that the directions must have; above 0, at
            most 1. However small, it takes one direction per module.

    Raises:
        VectorError: vectors that do not belong together, zero vectors, ``energy`` out of range, or nothing is left.
    """
    check_pair("project", forget, retain)
    check_number("project", "energy", energy, 0.0, 1.0, above=True)
    norms = retain.norms()

    def shape(name: str, change: Change) -> Change:
        if norms.get(name, 0.0) == 0.0:
            return change
        return _without(change, truncated(retain.modules[name], energy=energy).A)

    advice = "it lies in the retain vector's row space, so lower energy or use contrast"
    return check_left("project", forget.map(shape), forget, advice)


def _without(change: Change, directions: Tensor) -> Change:
    """The change with its rows' parts along some orthonormal directions, (k, in), removed."""
    rows = (change.A if isinstance(change, LowRank) else change.values).double()  # (r or out, in)
    v = directions.double()
    left = (rows - (rows @ v.T) @ v).float()
    return LowRank(left, change.B) if isinstance(change, LowRank) else Dense(left)
