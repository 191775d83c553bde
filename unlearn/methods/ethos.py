"""Ethos (2403.08994): filter the vector in the singular basis of the weights it changes.

With W = U S V^T the weight before the edit,

    S' = U^T dW V                      the change, component by component of what the weight knows
    S'_ij = 0 where |S'_ij| < threshold * max |S'|
    dW' = U S' V^T                     what is subtracted

Small entries are taken for general ability that the fine-tuning brushed against, the large ones for the task. The
paper uses thresholds of .03 and finds the basis in the base weight plus an auxiliary vector of a harmless task; to do
the same give that sum as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unlearn.changes import Change, Dense
from unlearn.errors import VectorError
from unlearn.methods.checks import check_matrices, check_moved, check_number
from unlearn.vector import TaskVector


def ethos(vector: TaskVector, weights: Mapping[str, Tensor], threshold: float = 0.03) -> TaskVector:
    """The vector with its small components in the weights' singular bases removed; dense.

    Of a matrix that is not square the thin basis is used, and the part of the change outside of it, where the weight
    has no component to be filtered by, is kept.

    Args:
        vector: Vector of the forget set.
        weights: Module path -> (out, in), what the bases are taken from; for GPT-2's Conv1D the transposed weight.
        threshold: Share of a module's largest component below which one is dropped, 0 to 1; 0 drops none.

    Raises:
        VectorError: a zero vector, weights that are missing or of another shape, ``threshold`` out of range, or a
            weight without a singular value decomposition.
    """
    check_moved("ethos", "the vector", vector)
    check_matrices("ethos", "weight", vector, weights)
    check_number("ethos", "threshold", threshold, 0.0, 1.0)
    return vector.map(lambda name, change: _filtered(name, change, weights[name], threshold))


def _filtered(name: str, change: Change, weight: Tensor, threshold: float) -> Dense:
    delta = change.delta()  # (out, in)
    try:
        u, _, vh = torch.linalg.svd(weight.detach().to(delta.device, torch.float32), full_matrices=False)
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined] # torch's stubs do not re-export it
        raise VectorError(f"ethos: the singular value decomposition of {name} does not converge: {e}") from e
    components = u.T @ delta @ vh.T  # (k, k), k = min(out, in)
    small = components.abs() < threshold * components.abs().max()
    # subtracting what is dropped, rather than adding up what is kept, leaves the part outside the basis alone
    return Dense(delta - u @ (components * small) @ vh)
