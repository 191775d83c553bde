"""MSA, model state arithmetic: theta - alpha * tau_f + beta * tau_r (2506.20941).

Both vectors are fitted from a clean checkpoint, one that never saw the forget set: taken from the model that has it
all memorised already they are small and say little. The paper uses alpha of 1 to 2 and beta = 1. At beta = alpha * mu
the same sum as contrast; what differs is where the vectors come from, and that alpha is fixed before the sweep.
"""

from __future__ import annotations

from unlearn.methods.checks import check_left, check_number, check_pair
from unlearn.vector import TaskVector


def msa(forget: TaskVector, retain: TaskVector, alpha: float = 1.0, beta: float = 1.0) -> TaskVector:
    """alpha * tau_f - beta * tau_r: what is subtracted, at coefficient 1 as in the paper, or at any other.

    Args:
        forget: Vector of the forget set from the clean checkpoint.
        retain: Vector of the retain sets from the same checkpoint.
        alpha: Weight of the forget vector, above 0.
        beta: Weight of the retain vector, 0 or more.

    Raises:
        VectorError: vectors that do not belong together, zero vectors, weights out of range, or nothing is left.
    """
    check_pair("msa", forget, retain)
    check_number("msa", "alpha", alpha, 0.0, above=True)
    check_number("msa", "beta", beta, 0.0)
    advice = "at these weights the retain vector cancels the forget vector"
    return check_left("msa", alpha * forget - beta * retain, forget, advice)
