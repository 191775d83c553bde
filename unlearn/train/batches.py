"""The order in which rows are trained on, and how some of them become one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from unlearn.data.encoding import IGNORE, Encoded


class ByLength(LengthGroupedSampler):
    """Rows of like length together, in an order that ``seed`` and ``epoch`` alone decide.

    transformers' own draws from the global random state, which a resumed training cannot wind back to the start of
    its epoch: from the second epoch on it would go on with other batches than the training that was interrupted.

    Args:
        rows: What is trained on.
        size: Rows that should be of like length: batch size times accumulation.
        seed: The recipe's.
    """

    def __init__(self, rows: Sequence[Encoded], size: int, seed: int) -> None:
        super().__init__(size, lengths=[len(row.input_ids) for row in rows])
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order: Iterator[int] = super().__iter__()
        return order


@dataclass(frozen=True)
class Pad:
    """Right-pad a batch; returns input_ids, attention_mask, labels, each (B, T)."""

    pad_id: int

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        width = max(len(row.input_ids) for row in rows)

        def fill(values: Sequence[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*v, *[value] * (width - len(v))] for v in values])

        return {
            "input_ids": fill([row.input_ids for row in rows], self.pad_id),
            "attention_mask": fill([[1] * len(row.input_ids) for row in rows], 0),
            "labels": fill([row.labels for row in rows], IGNORE),
        }


def answers(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where the labelled tokens of a batch are predicted, and what they are.

    Args:
        labels: (B, T), :data:`IGNORE` where a token carries no loss. The first token has nothing before it.

    Returns:
        Booleans (B, T), true where the next token has a label; those labels (N,); the row each of them is in (N,).
    """
    predicts = functional.pad(labels[:, 1:] != IGNORE, (0, 1))
    return predicts, labels[:, 1:][predicts[:, :-1]], predicts.nonzero()[:, 0]


def together(blocks: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """One batch of several, each with input_ids, attention_mask and labels (B, T), as wide as the widest."""
    width, device = max(block["input_ids"].shape[1] for block in blocks), blocks[0]["input_ids"].device
    fills = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE}
    return {
        key: torch.cat(
            [functional.pad(block[key].to(device), (0, width - block[key].shape[1]), value=fill) for block in blocks]
        )
        for key, fill in fills.items()
    }


# -- which rows of a batch are which process's, so that several take the very steps that one would take


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


def grouped(items: Iterable[_T], most: float, size: Callable[[list[_T]], float]) -> Iterator[list[_T]]:
    """Items in order, together while their size allows it; a larger one goes alone."""
    group: list[_T] = []
    for item in items:
        if group and size([*group, item]) > most:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


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
