"""A random vector of the same size: Ilharco et al.'s control (2212.04089, section 3).

If subtracting noise of the same norm in every module forgets as much, the task vector's direction has done nothing.
"""

from __future__ import annotations

import random

import torch

from unlearn.changes import Change, Dense, LowRank
from unlearn.errors import VectorError
from unlearn.methods.checks import check_moved
from unlearn.vector import TaskVector


def random_like(vector: TaskVector, seed: int) -> TaskVector:
    """Independent normal entries, scaled to the vector's Frobenius norm in every module.

    Low-rank changes become low-rank ones of the same rank (both factors are normal), dense ones dense ones.

    Args:
        vector: Whose modules, ranks and norms are matched.
        seed: Decides the draw, on the CPU.

    Raises:
        VectorError: a zero vector, or a negative seed.
    """
    check_moved("random vector", "the vector", vector)
    if seed < 0:
        raise VectorError(f"random vector: seed must be 0 or more, not {seed}")
    # not the seed itself, with which the vector's own fit may have begun: its first draws would come again
    generator = torch.Generator().manual_seed(random.Random(f"random vector {seed}").getrandbits(63))
    norms = vector.norms()

    def shape(name: str, change: Change) -> Change:
        drawn = _normal(change, generator)
        return drawn.scaled(norms[name] / drawn.dot(drawn) ** 0.5)

    return vector.map(shape)


def _normal(change: Change, generator: torch.Generator) -> Change:
    out, width = change.shape
    if isinstance(change, LowRank):
        a, b = (torch.randn(shape, generator=generator) for shape in ((change.rank, width), (out, change.rank)))
        return LowRank(a, b).to(change.device)
    return Dense(torch.randn((out, width), generator=generator)).to(change.device)
