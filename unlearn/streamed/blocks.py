"""The arithmetic of one edited tensor, block of rows by block of rows, with the bits of the whole at once.

A block of a few hundred thousand elements stays in the processor's cache from the moment it is read to the moment it is
written, and needs no memory worth speaking of. That a matrix product has the same bits in parts as at once is so with
the libraries we know as long as no part is thin, but nobody promises it: it is tried out, for every shape, before a
tensor is written, and where it is not so tensors are computed whole.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unlearn.changes import Change, Dense, LowRank, edited
from unlearn.errors import VectorError
from unlearn.rounding import generator_for, round_stochastically
from unlearn.streamed.layout import Shard
from unlearn.streamed.names import Target
from unlearn.survival import Survival

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROUNDED = (torch.bfloat16, torch.float16)
_ELEMENTS = 2**19  # of a block: 2 MB in float32
_FEWEST = 64  # rows of a block: thin products are computed another way
_MEASURED_WHOLE = 2**20  # elements of a tensor of which every row is measured
_EVERY_BLOCK, _EVERY_ROW = 16, 4  # of a larger one are measured: statistics over millions of elements


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A tensor with the change that goes on it."""

    target: Target
    change: Change

    @property
    def dtype(self) -> torch.dtype:
        """As stored."""
        return DTYPES[self.target.stored.format]

    @property
    def signature(self) -> tuple[int, int, int, bool]:
        """All that the way of computing depends on: rows and columns as stored, rank (-1: dense), transposed."""
        rows, columns = self.target.stored.shape
        return rows, columns, self.change.rank if isinstance(self.change, LowRank) else -1, self.target.transposed

    def rows(self, first: int, end: int, step: int = 1) -> Change:
        """The change of some rows of the tensor as stored."""
        return _rows(self.change, slice(first, end, step), self.target.transposed)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``first`` to ``end`` (excluded) of a tensor, its ``number``-th part, and the bytes of its file they take."""

    work: Work
    number: int
    first: int
    end: int
    begin_byte: int
    end_byte: int


@dataclass(frozen=True, slots=True)
class Window:
    """A range of a file that is handled at once, with the blocks in it that are edited; the rest stays as it is."""

    begin: int
    end: int
    blocks: tuple[Block, ...]


def row_ranges(rows: int, columns: int) -> list[tuple[int, int]]:
    """Cut a tensor into blocks of about half a million elements, none of them thin."""
    step = max(_FEWEST, _ELEMENTS // max(columns, 1) // 16 * 16)
    starts = list(range(0, max(rows - _FEWEST, 0) + 1, step)) or [0]
    return list(zip(starts, [*starts[1:], rows], strict=True))


def blocks_of(work: Work, whole: bool) -> Iterator[Block]:
    """The blocks of a tensor in order; one if it is to be computed ``whole``."""
    stored = work.target.stored
    rows, columns = stored.shape
    width = columns * work.dtype.itemsize
    for number, (first, end) in enumerate([(0, rows)] if whole else row_ranges(rows, columns)):
        yield Block(work, number, first, end, stored.begin + first * width, stored.begin + end * width)


def windows(shard: Shard, works: Mapping[str, Work], size: int, whole: bool) -> Iterator[Window]:
    """Cut a file into ranges of about ``size`` bytes, one after the other, no block in two of them."""
    begin, blocks = 0, list[Block]()
    edited_ones = (works[t.name] for t in shard.tensors if t.name in works and t.begin < t.end)
    for block in (b for work in edited_ones for b in blocks_of(work, whole)):
        while begin < block.begin_byte and block.end_byte - begin > size:
            cut = min(block.begin_byte, max(begin + size, blocks[-1].end_byte if blocks else 0))
            yield Window(begin, cut, tuple(blocks))
            begin, blocks = cut, []
        blocks.append(block)
    while begin < shard.size:
        cut = min(shard.size, max(begin + size, blocks[-1].end_byte if blocks else 0))
        yield Window(begin, cut, tuple(blocks))
        begin, blocks = cut, []


@dataclass(eq=False)
class Editor:
    """Puts blocks of ``theta - coefficient * tau`` in the place of theta's, and measures what rounding left of it.

    Blocks of several tensors may be edited at the same time, but with a ``seed`` the blocks of each in order.

    Attributes:
        coefficient: How much is subtracted.
        seed: Of stochastic rounding to 16 bits; None rounds to nearest.
        measure: Whether to measure what is left, and to refuse what is not finite.
        parts: Module -> what was measured.
    """

    coefficient: float
    seed: int | None = None
    measure: bool = True
    parts: dict[str, list[Survival]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._own = threading.local()
        self._lock = threading.Lock()
        self._generators: dict[str, torch.Generator] = {}

    def edit(self, block: Block, raw: Tensor) -> None:
        """Edit a block in place: ``raw`` holds its bytes, uint8.

        The sum is :func:`unlearn.changes.edited` in float32, then cast, as :func:`unlearn.export.export_merged` has it.

        Raises:
            VectorError: the number format cannot hold the result.
        """
        dtype, weight = block.work.dtype, block.work.target.weight
        aligned = raw.storage_offset() % dtype.itemsize == 0
        stored = (raw if aligned else raw.clone()).view(dtype).view(block.end - block.first, -1)
        step = self._step(block)
        before = stored[::step].clone() if step else None
        wide = self._room(stored.shape).copy_(stored)  # also of float32: products may depend on where memory begins
        change = block.work.rows(block.first, block.end)
        edited(wide, change, -self.coefficient, block.work.target.transposed, out=wide)
        if self.seed is not None and dtype in ROUNDED:
            if weight not in self._generators:
                self._generators[weight] = generator_for(self.seed, weight)
            stored.copy_(round_stochastically(wide, dtype, self._generators[weight]))
        else:
            stored.copy_(wide)
        if not aligned:
            raw.copy_(stored.view(-1).view(torch.uint8))
        if self.measure and not bool(stored.isfinite().all()):
            raise VectorError(
                f"{block.work.target.module}: with coefficient {self.coefficient!r} its weights are nothing that "
                f"{block.work.target.stored.format} can hold (or they are not finite before): take a smaller one"
            )
        if before is not None:
            self._note(block, before, stored[::step], step)

    def survived(self) -> dict[str, Survival]:
        """What was measured, by module, in the order of their names: not of the threads that were at work."""
        return {module: Survival.total(self.parts[module]) for module in sorted(self.parts)}

    def _step(self, block: Block) -> int:
        """Which rows of a block are measured: every one, every so many, or (0) none."""
        if not self.measure:
            return 0
        if math.prod(block.work.target.stored.shape) <= _MEASURED_WHOLE:
            return 1
        return _EVERY_ROW if block.number % _EVERY_BLOCK == 0 else 0

    def _note(self, block: Block, before: Tensor, after: Tensor, step: int) -> None:
        delta = block.work.rows(block.first, block.end, step).delta()
        intended = -self.coefficient * (delta.T if block.work.target.transposed else delta)
        part = Survival.of(after, before, intended)
        with self._lock:
            self.parts.setdefault(block.work.target.module, []).append(part)

    def _room(self, shape: Sequence[int]) -> Tensor:
        """Memory for a block in float32: each thread has its own, used again and again."""
        count = math.prod(shape)
        room: Tensor | None = getattr(self._own, "room", None)
        if room is None or room.numel() < count:
            self._own.room = room = torch.empty(count)
        return room[:count].view(*shape)


def parts_equal_whole(works: Sequence[Work], coefficient: float, most: int) -> bool:
    """Try out whether blocks on one thread have the bits of whole tensors on all, on random numbers of every shape.

    Sets torch to one thread if so; leaves it as it was if not.

    Args:
        most: Bytes that a trial may take; of a larger tensor fewer rows are tried.
    """
    threads = torch.get_num_threads()
    try:
        equal = all(_equal(s, coefficient, most, threads) for s in sorted({work.signature for work in works}))
    except BaseException:
        torch.set_num_threads(threads)
        raise
    torch.set_num_threads(1 if equal else threads)
    return equal


@torch.no_grad()
def _equal(signature: tuple[int, int, int, bool], coefficient: float, most: int, threads: int) -> bool:
    rows, columns, rank, transposed = signature
    if not rows * columns:
        return True
    rows = min(rows, max(_FEWEST, most // (4 * columns) // (2 if rank < 0 else 1)))
    g = torch.Generator().manual_seed(rows + columns)
    tile = torch.randn(_FEWEST, columns, generator=g) * 0.02
    if rank < 0:
        delta = torch.randn(_FEWEST, columns, generator=g).repeat(-(-rows // _FEWEST), 1)[:rows]
        change: Change = Dense(delta.T if transposed else delta)
    else:
        left, right = torch.randn(rows, rank, generator=g) * 0.01, torch.randn(rank, columns, generator=g)
        change = LowRank(left.T.contiguous(), right.T.contiguous()) if transposed else LowRank(right, left)
    whole = tile.repeat(-(-rows // _FEWEST), 1)[:rows]
    torch.set_num_threads(threads)
    edited(whole, change, -coefficient, transposed, out=whole)
    torch.set_num_threads(1)
    for first, end in row_ranges(rows, columns):
        part = tile[torch.arange(first, end) % _FEWEST]
        edited(part, _rows(change, slice(first, end), transposed), -coefficient, transposed, out=part)
        if not torch.equal(part.view(torch.int32), whole[first:end].view(torch.int32)):
            return False
    return True


def _rows(change: Change, part: slice, transposed: bool) -> Change:
    """The change of rows of a weight as stored, which are columns of the change where it is stored transposed."""
    if isinstance(change, LowRank):
        return LowRank(change.A[:, part], change.B) if transposed else LowRank(change.A, change.B[part])
    return Dense(change.values[:, part] if transposed else change.values[part])
