"""NegMerge (2410.05583): several fine-tunings of one forget task, averaged where they agree.

    tau_ij = mean over s of tau^s_ij   where all tau^s_ij have the same sign, and 0 elsewhere

The fine-tunings differ in seed or hyperparameters; what they do not agree on has little to do with the task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unlearn.changes import Change, Dense, listed
from unlearn.errors import VectorError
from unlearn.methods.checks import check_moved
from unlearn.vector import TaskVector


def consensus(vectors: Sequence[TaskVector]) -> TaskVector:
    """The mean of vectors of the same task at the entries whose signs are the same in all of them; dense.

    Args:
        vectors: One or more, of the same modules. Of one alone nothing is masked.

    Raises:
        VectorError: no vector, a zero one, other modules or shapes, or no entry on which they agree.
    """
    if not vectors:
        raise VectorError("consensus needs at least one vector")
    first = vectors[0]
    for number, vector in enumerate(vectors):
        check_moved("consensus", f"vector {number + 1} of {len(vectors)}", vector)
        differing = [
            name
            for name in sorted({*first.modules, *vector.modules})
            if name not in vector.modules
            or name not in first.modules
            or vector.modules[name].shape != first.modules[name].shape
        ]
        if differing:
            raise VectorError(
                f"consensus: vectors 1 and {number + 1} are not of the same modules: {listed(differing)} are missing "
                "in one or have another shape"
            )
    merged = first.map(lambda name, _: _agreed([vector.modules[name] for vector in vectors]))
    if merged.norm() == 0.0:
        raise VectorError(f"consensus: the {len(vectors)} vectors agree in sign nowhere; use fewer of them")
    return merged


def _agreed(changes: Sequence[Change]) -> Dense:
    """One module, one dense matrix at a time."""
    total = torch.zeros(changes[0].shape, device=changes[0].device)
    signs = torch.zeros_like(total)
    for change in changes:
        delta = change.delta()
        total += delta
        signs += delta.sign()
    return Dense(torch.where(signs.abs() == len(changes), total / len(changes), 0.0))
