"""Which rows of a batch are which process's, so that several take the very steps that one would take.

A batch is the batch of the recipe however many processes share it. Each takes every P-th row, and losses are sums over
the whole step divided by the whole step's count, so that gradients averaged over the processes are those of one: up to
the order of summation, whatever the batch size and however the last batch of an epoch falls. (accelerate's way, a whole
batch for each process, makes other and fewer steps, and fills up an epoch's end with rows seen before.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import Sampler

from unlearn.batches import IGNORE, Encoded

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Part:
    """Number ``index`` of ``count`` parts."""

    index: int = 0
    count: int = 1

    def of(self, rows: Sequence[_T]) -> list[_T]:
        """This part of some rows. There may be none in it."""
        return list(rows[self.index :: self.count])


def blank(row: Encoded) -> Encoded:
    """A row without a label: what a process runs that has no row of a batch, so that no other waits for it."""
    return Encoded(row.input_ids, (IGNORE,) * len(row.labels))


def labelled(rows: Sequence[Encoded]) -> int:
    """Tokens with a label in some rows; a row's first token has nothing before it."""
    return sum(label != IGNORE for row in rows for label in row.labels[1:])


class Dealt(Sampler[list[int]]):
    """The batches of one process.

    Args:
        order: Numbers of all rows, in the order of training.
        size: Rows of a batch, of all processes together.
        part: Which process this is.
        spare: The number of the row for a process that has none of a batch.
    """

    def __init__(self, order: Sampler[int], size: int, part: Part, spare: int) -> None:
        super().__init__()
        self._order = order
        self._size = size
        self._part = part
        self._spare = spare

    def __len__(self) -> int:
        return -(-len(self._order) // self._size)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        numbers = list(self._order)
        for start in range(0, len(numbers), self._size):
            yield self._part.of(numbers[start : start + self._size]) or [self._spare]
