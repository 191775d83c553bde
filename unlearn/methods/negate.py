"""Negation: theta - c * tau_f (Ilharco et al. 2212.04089, section 3)."""

from __future__ import annotations

from unlearn.vector import TaskVector


def negate(forget: TaskVector) -> TaskVector:
    """The vector that is subtracted: the forget vector as it is."""
    return forget
