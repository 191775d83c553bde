"""Give a shaped vector back the size that it had when it was fitted: tau * |like| / |tau|, Frobenius norm of the whole.

What shaping takes away makes the vector shorter: a projection leaves a half or a quarter. A grid of coefficients that
was right for the fitted vector is then too small, and two methods at one coefficient are edits of two sizes.
"""

from __future__ import annotations

from unlearn.methods.checks import check_moved
from unlearn.vector import TaskVector


def rescale(vector: TaskVector, like: TaskVector) -> TaskVector:
    """The vector in its own direction, as long as another.

    Args:
        vector: What was shaped.
        like: The fitted vector whose norm it is given.

    Raises:
        VectorError: one of them is zero.
    """
    check_moved("rescale", "the vector", vector)
    check_moved("rescale", "the fitted vector", like)
    return vector * (like.norm() / vector.norm())
