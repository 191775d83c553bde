"""The change of one weight matrix, ``(out, in)``: as two thin factors, or dense.

Both kinds hold float32 and have the same operations, so that sums, norms and cosines need not ask which one it is.
What can be computed on the factors is: ``B @ A`` is built only where the answer is itself a dense matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor, nn

from unlearn.errors import VectorError
from unlearn.text import one_line

LARGEST = 2**34  # elements of one weight; the largest ones in use have 2**31
_LONGEST = 200  # characters of a name in a message
_ROWS = 1024  # of a dense change that are in float64 at a time
_BLOCK = 2**19  # elements of a matrix that are edited at a time
_FEWEST = 64  # rows of a block: thin products are computed another way


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``delta = B @ A``: ``A`` is ``(r, in)``, ``B`` is ``(out, r)``, float32."""

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise VectorError(f"factors do not chain: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}")
        if self.A.dtype != torch.float32 or self.B.dtype != torch.float32:
            raise VectorError(f"factors must be float32, not {self.A.dtype} and {self.B.dtype}")

    @property
    def rank(self) -> int:
        """r, an upper bound of the rank of ``delta``."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight this changes."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.A.device

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the letter it is stored under."""
        return {"A": self.A, "B": self.B}

    def to(self, device: torch.device | str) -> LowRank:
        """The same on another device."""
        return LowRank(self.A.to(device), self.B.to(device))

    def delta(self) -> Tensor:
        """The dense change, ``(out, in)``; refused where thin factors in a small file claim an impossible shape."""
        rows, columns = self.shape
        if rows * columns > LARGEST:
            raise VectorError(f"a change of shape ({rows}, {columns}) is larger than any weight, so it is not built")
        return self.B @ self.A

    def dot(self, other: Change) -> float:
        """Frobenius inner product with another change, in float64, without building ``B @ A``.

        <B A, B' A'> = tr((B^T B') (A' A^T)), and <B A, W> = <A, B^T W>.
        """
        _same_shape(self, other)
        if isinstance(other, Dense):
            parts = zip(torch.split(self.B, _ROWS), torch.split(other.values, _ROWS), strict=True)
            projected = sum(b.double().T @ w.double() for b, w in parts)  # B^T W, (r, in)
            return float((self.A.double() * projected).sum())
        bb = self.B.double().T @ other.B.double()  # (r, r')
        aa = self.A.double() @ other.A.double().T  # (r, r')
        return float((bb * aa).sum())

    def scaled(self, c: float) -> LowRank:
        """c times the change: one factor is scaled (both would make it c squared)."""
        return LowRank(self.A, c * self.B)

    def act(self, x: Tensor) -> Tensor:
        """``delta @ x`` for inputs ``(..., in)``, through the factors: ``(..., out)``."""
        return nn.functional.linear(nn.functional.linear(x, self.A), self.B)


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A change that is kept whole: ``values`` is ``(out, in)``, float32."""

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise VectorError(f"a dense change must be a matrix, not {tuple(self.values.shape)}")
        if self.values.dtype != torch.float32:
            raise VectorError(f"a dense change must be float32, not {self.values.dtype}")

    @property
    def rank(self) -> int:
        """min(out, in), an upper bound of the rank."""
        return min(self.values.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight this changes."""
        return self.values.shape[0], self.values.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        return self.values.device

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the letter it is stored under."""
        return {"W": self.values}

    def to(self, device: torch.device | str) -> Dense:
        """The same on another device."""
        return Dense(self.values.to(device))

    def delta(self) -> Tensor:
        """The change itself, ``(out, in)``; not a copy."""
        return self.values

    def dot(self, other: Change) -> float:
        """Frobenius inner product with another change, in float64."""
        if isinstance(other, LowRank):
            return other.dot(self)
        _same_shape(self, other)
        parts = zip(torch.split(self.values, _ROWS), torch.split(other.values, _ROWS), strict=True)
        return float(sum((a.double() * b.double()).sum() for a, b in parts))

    def scaled(self, c: float) -> Dense:
        """c times the change."""
        return Dense(c * self.values)

    def act(self, x: Tensor) -> Tensor:
        """``delta @ x`` for inputs ``(..., in)``: ``(..., out)``."""
        return nn.functional.linear(x, self.values)


Change: TypeAlias = LowRank | Dense


def total(changes: Sequence[Change]) -> Change:
    """The exact sum of changes of one weight: ``[B B'] @ [A; A']`` of rank r + r' if all are low-rank, else dense."""
    first, *rest = changes
    for other in rest:
        _same_shape(first, other)
    if not rest:
        return first
    factored = [c for c in changes if isinstance(c, LowRank)]
    if len(factored) == len(changes):
        return LowRank(torch.cat([c.A for c in factored]), torch.cat([c.B for c in factored], dim=1))
    return Dense(reduce(torch.add, (c.delta() for c in changes)))


def edited(pristine: Tensor, change: Change, coefficient: float, transposed: bool, out: Tensor | None = None) -> Tensor:
    """``pristine + coefficient * delta`` in float32, the one way it is computed wherever weights are edited.

    On a CPU block by block of :func:`row_blocks`, which stay in its cache; so whoever edits a part of the rows, cut at
    the same places, has the bits of the whole.

    Args:
        pristine: ``(out, in)``, or ``(in, out)`` where ``transposed`` (Conv1D of GPT-2), float32.
        out: Write here instead of into new memory; may be ``pristine`` itself.
    """
    out = torch.empty_like(pristine) if out is None else out
    rows, columns = pristine.shape
    for first, end in row_blocks(rows, columns) if pristine.device.type == "cpu" else [(0, rows)]:
        part, old, new = rows_of(change, first, end, transposed), pristine[first:end], out[first:end]
        if isinstance(part, LowRank):
            left, right = (part.A.T, part.B.T) if transposed else (part.B, part.A)
            torch.addmm(old, left, right, alpha=coefficient, out=new)
        else:
            torch.add(old, part.values.T if transposed else part.values, alpha=coefficient, out=new)
    return out


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cut a matrix into blocks of rows of about half a million elements (2 MB in float32), none of them thin."""
    step = max(_FEWEST, _BLOCK // max(columns, 1) // 16 * 16)
    starts = list(range(0, max(rows - _FEWEST, 0) + 1, step)) or [0]
    return list(zip(starts, [*starts[1:], rows], strict=True))


def rows_of(change: Change, first: int, end: int, transposed: bool) -> Change:
    """The change of some rows of a weight as stored, which are its own columns where it is stored transposed."""
    if isinstance(change, LowRank):
        return LowRank(change.A[:, first:end], change.B) if transposed else LowRank(change.A, change.B[first:end])
    return Dense(change.values[:, first:end] if transposed else change.values[first:end])


def listed(names: Sequence[str], most: int = 8) -> str:
    """The first few of a long list, each on one line and cut where it is endless, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name[:_LONGEST]) for name in names[:most]) + more


def _same_shape(one: Change, other: Change) -> None:
    if one.shape != other.shape:
        raise VectorError(f"changes of {one.shape} and {other.shape} are not of the same weight")


# -- smaller changes


def check_terms(rank: int | None, energy: float | None) -> None:
    """Refuse what no truncation can mean."""
    if rank is not None and rank < 1:
        raise VectorError(f"rank must be at least 1, not {rank}")
    if energy is not None:
        check_share("energy", energy)


def check_share(what: str, value: float) -> None:
    """Refuse a share outside (0, 1]."""
    if not 0.0 < value <= 1.0:
        raise VectorError(f"{what} must be above 0 and at most 1, not {value}")


def check_rank(rank: int | None, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank that some of these matrices cannot have."""
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
    """
    if isinstance(change, LowRank) and rank is not None and rank >= change.rank:
        return change
    try:
        if isinstance(change, Dense):
            u, s, vh = torch.linalg.svd(change.values.double(), full_matrices=False)
        else:
            left, b = torch.linalg.qr(change.B.double())
            right, a = torch.linalg.qr(change.A.double().T)
            u, s, vh = torch.linalg.svd(b @ a.T, full_matrices=False)
            u, vh = left @ u, vh @ right.T
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined] # torch's stubs do not re-export it
        raise VectorError(f"the singular value decomposition does not converge: {e}") from e
    if rank is None:
        sums = s.square().cumsum(0)
        rank = int((sums < (1.0 if energy is None else energy) * sums[-1]).sum()) + 1 if sums[-1] else 1
    return LowRank(vh[:rank].float().contiguous(), (u[:, :rank] * s[:rank]).float())


def largest_entries(change: Change, keep: float) -> Dense:
    """The ``keep`` share (rounded, at least one) of the entries of ΔW of the largest magnitude, the others zero."""
    delta = change.delta()
    flat = delta.reshape(-1)
    kept = max(1, round(keep * flat.numel()))
    if kept == flat.numel():
        return Dense(delta)
    where = flat.abs().topk(kept, sorted=False).indices
    return Dense(torch.zeros_like(flat).index_copy_(0, where, flat[where]).reshape(delta.shape))


def largest_rows(change: Change, keep: float) -> Change:
    """The ``keep`` share (rounded, at least one) of the rows of ΔW of the largest norm, the others zero.

    Of factors the rows of ``B`` are set to zero, so that the change stays low-rank.
    """
    kept = max(1, round(keep * change.shape[0]))
    if kept == change.shape[0]:
        return change
    rows = change.B if isinstance(change, LowRank) else change.values
    where = row_lengths(change).topk(kept, sorted=False).indices
    left = torch.zeros_like(rows).index_copy_(0, where, rows[where])
    return LowRank(change.A, left) if isinstance(change, LowRank) else Dense(left)


def row_lengths(change: Change) -> Tensor:
    """Length of every row of ΔW, (out,), float64: of factors ``b (A A^T) b^T`` for each row b of ``B``."""
    if isinstance(change, Dense):
        return torch.linalg.vector_norm(change.values, dim=1, dtype=torch.float64)
    a, b = change.A.double(), change.B.double()
    return ((b @ (a @ a.T)) * b).sum(dim=1).clamp_min(0.0).sqrt()
