"""Smaller changes: truncated to a lower rank, or with their small entries or rows set to zero.

That little of a task vector carries its effect is shown for one layer by Li et al. (2504.10957): a rank-1
approximation suffices (Corollary 1), and rows of small norm can be pruned (Corollary 2).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unlearn.changes import Change, Dense, LowRank, listed
from unlearn.errors import VectorError


def check_terms(rank: int | None, energy: float | None) -> None:
    """Refuse what no truncation can mean.

    Raises:
        VectorError: ``rank`` below 1, or ``energy`` outside (0, 1].
    """
    if rank is not None and rank < 1:
        raise VectorError(f"rank must be at least 1, not {rank}")
    if energy is not None:
        check_share("energy", energy)


def check_share(what: str, value: float) -> None:
    """Refuse a share outside (0, 1].

    Raises:
        VectorError: it is.
    """
    if not 0.0 < value <= 1.0:
        raise VectorError(f"{what} must be above 0 and at most 1, not {value}")


def check_rank(rank: int | None, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank that some of these matrices cannot have.

    Raises:
        VectorError: ``rank`` is above min(out, in) of some; all are named.
    """
    small = [f"{name} {shape}" for name, shape in shapes.items() if rank is not None and rank > min(shape)]
    if small:
        raise VectorError(f"rank {rank} is above what these matrices can have: {listed(small)}")


def truncated(change: Change, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The nearest change of a lower rank in Frobenius norm (Eckart-Young): the leading terms of the SVD.

    Factors are taken apart by the QR of each, ``B = Q R`` and ``A^T = Q' R'``, and the SVD of the small ``R R'^T``;
    only a dense change has an SVD of its whole matrix. In float64. The result's ``A`` has orthonormal rows, the
    singular values are in ``B``. Factors of no more than ``rank`` terms come back as they are.

    Args:
        rank: Terms to keep.
        energy: Instead: keep as few terms as have this share of the squared Frobenius norm, in (0, 1]; at least one.

    Raises:
        VectorError: the values have no SVD.
    """
    if isinstance(change, LowRank) and rank is not None and rank >= change.rank:
        return change
    try:
        u, s, vh = _svd(change)
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined]
        raise VectorError(f"the singular value decomposition does not converge: {e}") from e
    k = rank if rank is not None else _terms(s, 1.0 if energy is None else energy)
    return LowRank(vh[:k].float().contiguous(), (u[:, :k] * s[:k]).float())


def largest_entries(change: Change, keep: float) -> Dense:
    """The ``keep`` share of the entries of ΔW with the largest magnitude; the others are zero.

    Args:
        keep: In (0, 1]; the number of entries is rounded, and at least one.
    """
    delta = change.delta()
    flat = delta.reshape(-1)
    kept = _count(keep, flat.numel())
    if kept == flat.numel():
        return Dense(delta)
    where = flat.abs().topk(kept, sorted=False).indices
    return Dense(torch.zeros_like(flat).index_copy_(0, where, flat[where]).reshape(delta.shape))


def largest_rows(change: Change, keep: float) -> Change:
    """The ``keep`` share of the rows of ΔW (one per output) with the largest norm; the others are zero.

    Of factors the rows of ``B`` are set to zero, so that the change stays low-rank.

    Args:
        keep: In (0, 1]; the number of rows is rounded, and at least one.
    """
    kept = _count(keep, change.shape[0])
    if kept == change.shape[0]:
        return change
    rows = change.B if isinstance(change, LowRank) else change.values
    where = _row_norms(change).topk(kept, sorted=False).indices
    left = torch.zeros_like(rows).index_copy_(0, where, rows[where])
    return LowRank(change.A, left) if isinstance(change, LowRank) else Dense(left)


def _svd(change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), singular values (k,) and V^T (k, in) of ΔW, float64, where k = min(r, out, in)."""
    if isinstance(change, Dense):
        u, s, vh = torch.linalg.svd(change.values.double(), full_matrices=False)
        return u, s, vh
    left, b = torch.linalg.qr(change.B.double())
    right, a = torch.linalg.qr(change.A.double().T)
    u, s, vh = torch.linalg.svd(b @ a.T, full_matrices=False)
    return left @ u, s, vh @ right.T


def _terms(s: Tensor, energy: float) -> int:
    """How few of the singular values (falling) have this share of the sum of squares."""
    sums = s.square().cumsum(0)
    if sums[-1] == 0.0:
        return 1
    return int((sums < energy * sums[-1]).sum()) + 1


def _row_norms(change: Change) -> Tensor:
    """Squared norm of every row of ΔW, float64: of factors ``b (A A^T) b^T`` for each row b of ``B``."""
    if isinstance(change, Dense):
        return torch.linalg.vector_norm(change.values, dim=1, dtype=torch.float64).square()
    a, b = change.A.double(), change.B.double()
    return ((b @ (a @ a.T)) * b).sum(dim=1)


def _count(keep: float, most: int) -> int:
    return max(1, round(keep * most))
