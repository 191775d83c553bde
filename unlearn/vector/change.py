"""The change of one weight matrix, ``(out, in)``, as two thin factors or dense, and what a number format keeps of it.

Both kinds hold float32 and have the same operations. What can be computed on the factors is: ``B @ A`` is built only
where the answer is itself a dense matrix.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unlearn.errors import VectorError
from unlearn.store.files import some

LARGEST = 2**34  # elements of one weight; the largest ones in use have 2**31
_ROWS = 1024  # of a matrix that are in float64 at a time
_BLOCK = 2**19  # elements of a matrix that are edited at a time
_FEWEST = 64  # rows of a block: thin products are computed another way
LEAST = 0.9  # cosine to the intended change under which what is stored is not the edit that was scored


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

    On a CPU block by block of :func:`row_blocks`, so that an edit of some of the blocks has the bits of the whole.

    Args:
        pristine: ``(out, in)``, or ``(in, out)`` where ``transposed`` (Conv1D of GPT-2), float32.
        out: Where to write, if not into new memory; may be ``pristine`` itself.
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


def _same_shape(one: Change, other: Change) -> None:
    if one.shape != other.shape:
        raise VectorError(f"changes of {one.shape} and {other.shape} are not of the same weight")


# -- smaller changes


def check_terms(rank: int | None, energy: float | None, *, required: bool) -> None:
    """Refuse what no truncation can mean."""
    if (rank is not None and energy is not None) or (required and rank is None and energy is None):
        raise VectorError("give either rank or energy, not both, to say how much is kept")
    if rank is not None and rank < 1:
        raise VectorError(f"rank must be at least 1, not {rank}")
    check_share("energy", energy)


def check_share(what: str, value: float | None) -> None:
    """Refuse a share outside (0, 1]."""
    if value is not None and not 0.0 < value <= 1.0:
        raise VectorError(f"{what} must be above 0 and at most 1, not {value}")


def check_rank(rank: int | None, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a rank that some of these matrices cannot have."""
    small = [f"{name} {shape}" for name, shape in shapes.items() if rank is not None and rank > min(shape)]
    if small:
        raise VectorError(f"rank {rank} is above what these matrices can have: {some(small)}")


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``u, s, vh`` of a matrix, thin."""
    try:
        return tuple(torch.linalg.svd(matrix, full_matrices=False))
    except torch.linalg.LinAlgError as e:  # type: ignore[attr-defined] # torch's stubs do not re-export it
        raise VectorError(f"the singular value decomposition does not converge: {e}") from e


def truncated(change: Change, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The nearest change of a lower rank in Frobenius norm (Eckart-Young): the leading terms of the SVD.

    Of factors the SVD is that of the small ``R R'^T``, with ``B = Q R`` and ``A^T = Q' R'``. In float64. The result's
    ``A`` has orthonormal rows, the singular values are in ``B``. Factors of at most ``rank`` terms come back unchanged.

    Args:
        rank: Terms to keep.
        energy: Instead: the share of the squared Frobenius norm that the terms kept must have, in (0, 1].
    """
    if isinstance(change, LowRank) and rank is not None and rank >= change.rank:
        return change
    if isinstance(change, Dense):
        u, s, vh = svd(change.values.double())
    else:
        left, b = torch.linalg.qr(change.B.double())
        right, a = torch.linalg.qr(change.A.double().T)
        u, s, vh = svd(b @ a.T)
        u, vh = left @ u, vh @ right.T
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


# -- what a number format of 16 bits keeps


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each element goes to one of its two neighbours in ``dtype``, with the probability that makes the mean exact.

    ``P(up) = (x - down) / (up - down)`` (Gupta et al. 1502.02551, section 3). What ``dtype`` holds exactly stays as it
    is, and so does what overflows.

    Args:
        x: float32, any shape, any device.
        dtype: bfloat16 or float16.
        generator: On the CPU: the same draws on every device.
    """
    nearest = x.to(dtype)
    there = nearest.float()
    # of one sign, 16-bit floats are ordered as the integers their bits spell, so the other neighbour is one bit away
    step = torch.where(x.abs() > there.abs(), 1, -1).to(torch.int16)
    bits = nearest.contiguous().view(torch.int16)
    other = torch.where(x == there, bits, bits + step).view(dtype)
    gap = other.float() - there
    share = torch.where(gap == 0, 0.0, (x - there) / gap)
    draw = torch.rand(x.shape, generator=generator).to(x.device)
    # beside an infinity the share is 0 or not a number, and so nothing moves
    return torch.where(draw < share, other, nearest)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each weight, so that the order in which they are written does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True, slots=True)
class Survival:
    """Sums over one weight, from which cosine, norm ratio and share follow; they add up over weights."""

    dot: float
    intended: float
    realised: float
    changed: int
    elements: int

    @classmethod
    def of(cls, stored: Tensor, before: Tensor, intended: Tensor) -> Survival:
        """Compare one weight as stored with the unedited one in the same dtype, and with the change meant for it."""
        parts = []
        for new, old, wish in zip(*(torch.split(t, _ROWS) for t in (stored, before, intended)), strict=True):
            realised, wanted = new.cpu().double() - old.cpu().double(), wish.cpu().double()
            dot, squares, length = (float(x.sum()) for x in (realised * wanted, wanted.square(), realised.square()))
            parts.append(cls(dot, squares, length, int((realised != 0).sum()), realised.numel()))
        return cls.total(parts)

    @classmethod
    def total(cls, parts: Sequence[Survival]) -> Survival:
        """Of several weights, or parts of one."""
        dot, intended, realised, changed, elements = zip(*map(astuple, parts), strict=True) if parts else ((),) * 5
        return cls(math.fsum(dot), math.fsum(intended), math.fsum(realised), sum(changed), sum(elements))

    def summary(self) -> dict[str, float | None]:
        """Cosine and norm ratio (None where nothing was intended), and the share of changed elements."""
        scale = math.sqrt(self.intended) * math.sqrt(self.realised)
        return {
            "cosine": None if self.intended == 0 else self.dot / scale if scale else 0.0,
            "norm_ratio": None if self.intended == 0 else math.sqrt(self.realised / self.intended),
            "changed": self.changed / self.elements,
        }


def summary_of(measured: Mapping[str, Survival]) -> dict[str, Any]:
    """The overall summary, and under ``modules`` each module's own."""
    total = Survival.total(list(measured.values()))
    return {**total.summary(), "modules": {name: measured[name].summary() for name in sorted(measured)}}


def lost(survived: Mapping[str, Any], ways_out: str) -> str:
    """What to say where rounding to nearest has left another edit than the intended one; empty where it has not."""
    cosine = survived["cosine"]
    if cosine is None or cosine >= LEAST:
        return ""
    return (
        f"rounded to the stored number format, the edit has cosine {cosine:.3f} to the intended one "
        f"({survived['changed']:.1%} of the elements changed): these weights would be another model. {ways_out}"
    )
