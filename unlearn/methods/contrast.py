"""Contrast: theta - c * (tau_f - mu * tau_r).

What forget and retain fine-tuning have in common (the form of the task, the neighbourhood of the facts) cancels, so
subtracting the rest spares the neighbours. With mu = 1 the two-vector form of MSA (2506.20941) at beta = alpha.
"""

from __future__ import annotations

from unlearn.vector import TaskVector


def contrast(forget: TaskVector, retain: TaskVector, mu: float) -> TaskVector:
    """tau_f - mu * tau_r, exact, of rank at most r_f + r_r.

    Args:
        forget: Vector of the forget set.
        retain: Vector of the retain sets, of the same model.
        mu: Weight of the retain vector; 0 is plain negation.
    """
    return forget - mu * retain if mu else forget
