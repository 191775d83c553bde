"""Ext-Sub, extraction before subtraction (2308.08090): keep what the negative vector has in common with the positive.

Row by row, with f_i the forget vector's row, r_i the retain vector's and ^ for unit length:

    u_i = (f^_i + r^_i) / |f^_i + r^_i|                 the direction common to both: their bisector
    e_i = f_i - (f_i . u_i) u_i                         what is subtracted

That is the published code's formula for LoRA. Written out it needs no bisector: f_i . u_i = |f_i| |f^_i + r^_i| / 2,
hence

    e_i = 1/2 (f_i - |f_i| / |r_i| r_i)

half of a contrast in which every retain row is given its forget row's length. So it is a scaling of rows, exact on
factors, and defined for opposite rows too, where the bisector is not and nothing is in common (e_i = f_i).
The paper besides *adds* the positive vector: that is ``ext_sub(f, r) - mu * r``, subtracted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unlearn.changes import Change, Dense, LowRank
from unlearn.methods.checks import check_left, check_pair
from unlearn.vector import TaskVector

_NONE = 1e-6  # a row shorter than this, against the longest, has no direction


def ext_sub(forget: TaskVector, retain: TaskVector) -> TaskVector:
    """The forget vector without its rows' parts along the two vectors' common directions.

    Low-rank vectors give one of rank at most r_f + r_r. Rows and modules that the retain vector leaves at zero have
    nothing in common with it and are kept whole.

    Raises:
        VectorError: vectors that do not belong together, zero vectors, or nothing is left.
    """
    check_pair("ext-sub", forget, retain)

    def shape(name: str, change: Change) -> Change:
        return _extract(change, retain.modules[name]) if name in retain.modules else change

    advice = "every row of it points where the retain vector's does"
    return check_left("ext-sub", forget.map(shape), forget, advice)


def _extract(forget: Change, retain: Change) -> Change:
    """One module: rows of the forget change and of the retain change, each times a number of its own."""
    f, r = _lengths(forget), _lengths(retain)
    shared = r > _NONE * r.max()
    own = torch.where(shared, 0.5, 1.0).float()[:, None]  # (out, 1)
    others = torch.where(shared, -0.5 * f / r, 0.0).float()[:, None]
    if isinstance(forget, LowRank) and isinstance(retain, LowRank):
        return LowRank(torch.cat([forget.A, retain.A]), torch.cat([own * forget.B, others * retain.B], dim=1))
    return Dense(own * forget.delta() + others * retain.delta())


def _lengths(change: Change) -> Tensor:
    """Length of every row, (out,), float64; of factors through ``b (A A^T) b^T``."""
    if isinstance(change, Dense):
        return change.values.double().norm(dim=1)
    a, b = change.A.double(), change.B.double()
    return ((b @ (a @ a.T)) * b).sum(dim=1).clamp_min(0.0).sqrt()
