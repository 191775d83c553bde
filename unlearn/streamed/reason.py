"""Why a tensor is not what it should be: another coefficient, no edit at all, other rounding, or damage.

What is said to be exactly so was computed and compared to the last bit of the tensor; the rest is worded as likely.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unlearn.streamed.blocks import Block, Editor, Work, blocks_of
from unlearn.streamed.layout import Stored
from unlearn.wording import percent

_FEW = 0.001  # share of elements below which damage is likelier than another edit
_NEAR = 0.02  # relative difference of a least-squares coefficient from the true one that rounding can make
_STEPS = 4  # of the number format that rounding otherwise may move an element, on average
_LARGEST = 3e38  # within float32
Place = tuple[Path, Stored]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A tensor as it was and as it is found, with what should have been done to it; read block by block."""

    base: Place
    found: Place
    work: Work
    whole: bool

    def blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Every block with its bytes (uint8) there and here, in order."""
        shift = self.found[1].begin - self.base[1].begin
        with self.base[0].open("rb") as old, self.found[0].open("rb") as new:
            for block in blocks_of(self.work, self.whole):
                size = block.end_byte - block.begin_byte
                old.seek(block.begin_byte)
                new.seek(block.begin_byte + shift)
                yield block, _bytes(old.read(size)), _bytes(new.read(size))

    def unedited(self) -> bool:
        """Whether it is the base's, bit by bit."""
        return all(torch.equal(old, new) for _, old, new in self.blocks())

    def is_edit(self, editor: Editor) -> bool:
        """Whether it is what ``editor`` makes of the base's, bit by bit."""
        for block, old, new in self.blocks():
            editor.edit(block, old)
            if not torch.equal(old, new):
                return False
        return True

    def fitted(self) -> float:
        """Least squares in the first block that the vector changes: how much of it was subtracted; nan: in none."""
        for block, old, new in self.blocks():
            sums = _Sums.of(self.work, block, old, new)
            if sums.delta:
                return sums.fitted
        return math.nan

    def sums(self) -> _Sums:
        """Of all blocks."""
        total = _Sums()
        for block, old, new in self.blocks():
            total += _Sums.of(self.work, block, old, new)
        return total


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over elements of squares: of the change, of tau, and of the weights; and of the change times tau."""

    change: float = 0.0
    delta: float = 0.0
    weights: float = 0.0
    both: float = 0.0

    @classmethod
    def of(cls, work: Work, block: Block, old: Tensor, new: Tensor) -> _Sums:
        """Of one block, whose bytes are given."""
        tau = work.rows(block.first, block.end).delta()
        delta = (tau.T if work.target.transposed else tau).double()
        before, after = (raw.view(work.dtype).view(block.end - block.first, -1).double() for raw in (old, new))
        change = before - after
        return cls(
            float(change.square().sum()),
            float(delta.square().sum()),
            float(before.square().sum() + after.square().sum()),
            float((change * delta).sum()),
        )

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.change + other.change,
            self.delta + other.delta,
            self.weights + other.weights,
            self.both + other.both,
        )

    @property
    def fitted(self) -> float:
        """Least squares: how much of the vector was subtracted; nan where it does nothing."""
        return self.both / self.delta if self.delta else math.nan

    def rest(self, coefficient: float) -> float:
        """The squares of the change that this much of the vector leaves."""
        return self.change - 2 * coefficient * self.both + coefficient**2 * self.delta


@torch.no_grad()
def reason(
    base: Place, found: Place, work: Work | None, editor: Editor, count: int, whole: bool
) -> tuple[str, float | None]:
    """A sentence, and the coefficient that the tensor has exactly, if there is such a one.

    Args:
        base, found: The file and the tensor in it, of the base and of the edited checkpoint.
        work: What should have been done to it; None: nothing.
        editor: That did it.
        count: Elements that differ from what should be.
        whole: Whether it was computed at once.
    """
    total = max(1, math.prod(base[1].shape))
    differ = f"{count} of {total} elements differ"
    if work is None:
        return f"{differ} from the base's, which the vector does not change: damaged, or changed otherwise", None
    pair = _Pair(base, found, work, whole)
    if pair.unedited():
        return f"{differ}: it is the base's, without any edit", 0.0
    for guess in _guesses(pair.fitted()):
        if guess != editor.coefficient and pair.is_edit(Editor(guess, editor.seed, measure=False)):
            return f"{differ}: it is exactly the edit with coefficient {guess!r}", guess
    if count <= max(1, _FEW * total):
        return f"{differ}: damaged?", None
    sums = pair.sums()
    near = abs(sums.fitted - editor.coefficient) <= _NEAR * abs(editor.coefficient)
    if near and sums.rest(editor.coefficient) <= (_STEPS * torch.finfo(work.dtype).eps) ** 2 * sums.weights:
        return f"{differ}: it is about the right edit; rounded otherwise, or computed otherwise?", None
    if math.isfinite(sums.fitted) and sums.rest(sums.fitted) < 0.5 * sums.change:
        return f"{differ}: it looks like coefficient {sums.fitted:.4g}", None
    return f"{differ} ({percent(count / total)}): another vector, another base, or damage?", None


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _guesses(fitted: float) -> Iterator[float]:
    """Numbers that people write, near a fitted one."""
    if not abs(fitted) < _LARGEST:
        return
    seen = set()
    for digits in range(1, 8):
        guess = float(f"{fitted:.{digits - 1}e}")
        if guess not in seen:
            seen.add(guess)
            yield guess
