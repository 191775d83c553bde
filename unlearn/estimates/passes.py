"""The batches of a fine-tuning, counted without making them: how many rows, how wide, how many places are predicted.

Rows of like length stand together, as :class:`unlearn.batches.ByLength` has them; only the random numbers are others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unlearn.estimates.tokens import TrainRow, cut_rows
from unlearn.recipe import TrainSpec

_MOST = 400  # steps that are laid out; of a longer training the rest is like them


@dataclass(frozen=True, slots=True)
class Pass:
    """One batch through the model: ``rows`` x ``width`` padded tokens, the head at ``heads`` places."""

    rows: int
    width: int
    heads: int

    @property
    def tokens(self) -> int:
        """Padded tokens."""
        return self.rows * self.width


@dataclass(frozen=True, slots=True)
class Training:
    """A fine-tuning: ``steps`` of the optimiser, and some of its batches, each of which stands for ``weight``."""

    steps: int
    passes: tuple[Pass, ...]
    weight: float

    @property
    def tokens(self) -> float:
        """Padded tokens of the whole training."""
        return self.weight * sum(p.tokens for p in self.passes)

    @property
    def heads(self) -> float:
        """Places where the head runs, in the whole training."""
        return self.weight * sum(p.heads for p in self.passes)

    @property
    def batches(self) -> float:
        """Batches in all."""
        return self.weight * len(self.passes)

    @property
    def largest(self) -> Pass:
        """The batch that needs most memory."""
        return max(self.passes, key=lambda p: (p.tokens, p.heads))


@dataclass(frozen=True, slots=True)
class Beside:
    """Retain rows in every batch: ``count`` of them, each as often as ``copies`` says."""

    rows: Sequence[TrainRow]
    count: int
    copies: int


def training(
    rows: Sequence[TrainRow], spec: TrainSpec, beside: Beside | None = None, everywhere: bool = True, copies: int = 1
) -> Training:
    """Lay out a fine-tuning on one device.

    Args:
        rows: Training rows, not cut yet.
        spec: The recipe's.
        beside: What every batch has besides, of a penalty or a baseline.
        everywhere: The head runs at every place of a batch, and not only where something is predicted.
        copies: How often each row stands in its batch.
    """
    own = cut_rows(rows, spec.max_length) or (TrainRow(1, 1),)
    near = cut_rows(beside.rows, spec.max_length) if beside is not None else ()
    epochs, most = spec.duration()
    per_epoch = math.ceil(math.ceil(len(own) / spec.batch_size) / spec.accumulation)
    steps = most if most > 0 else math.ceil(per_epoch * epochs)
    draw = random.Random(0)
    passes = []
    for batch in _batches(own, spec, draw, min(steps, _MOST)):
        drawn = draw.sample(near, min(beside.count, len(near))) if beside is not None and near else []
        again = beside.copies if beside is not None else 0
        width = max(row.tokens for row in (*batch, *drawn))
        count = copies * len(batch) + again * len(drawn)
        labels = copies * sum(row.labels for row in batch) + again * sum(row.labels for row in drawn)
        passes.append(Pass(count, width, count * width if everywhere else labels))
    return Training(steps, tuple(passes), max(steps / _MOST, 1.0))


def _batches(rows: Sequence[TrainRow], spec: TrainSpec, draw: random.Random, steps: int) -> Iterator[list[TrainRow]]:
    """The batches of the first ``steps`` steps, epoch after epoch: shuffled, sorted within stretches, the longest row
    first. An epoch's last step has only the batches that are left."""
    size = spec.batch_size * spec.accumulation
    stretch = size * max(min(len(rows) // (size * 4), 50), 1)
    done = 0
    while True:
        order = draw.sample(rows, len(rows))
        parts = [
            sorted(order[at : at + stretch], key=lambda row: row.tokens, reverse=True)
            for at in range(0, len(order), stretch)
        ]
        longest = max(range(len(parts)), key=lambda n: parts[n][0].tokens)
        parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
        flat = [row for part in parts for row in part]
        for step in range(0, len(flat), size):
            for at in range(step, min(step + size, len(flat)), spec.batch_size):
                yield flat[at : at + spec.batch_size]
            done += 1
            if done == steps:
                return
