"""Why a tensor is not what it should be: another coefficient, no edit at all, other rounding, or damage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from unlearn.streamed.blocks import Block, Editor, Work, blocks_of
from unlearn.streamed.layout import Stored
from unlearn.wording import percent

_FEW = 0.001  # share of elements below which damage is likelier than another edit
_NEAR = 0.02  # relative difference of a least-squares coefficient from the true one that rounding can make
Place = tuple[Path, Stored]


@torch.no_grad()
def reason(base: Place, found: Place, work: Work | None, editor: Editor, count: int) -> tuple[str, float | None]:
    """A sentence, and the coefficient that the tensor has exactly, if there is such a one.

    Args:
        base, found: The file and the tensor in it, of the base and of the edited checkpoint.
        work: What should have been done to it; None: nothing.
        editor: That did it.
        count: Elements that differ from what should be.
    """
    total = max(1, math.prod(base[1].shape))
    differ = f"{count} of {total} elements differ"
    if work is None:
        return f"{differ} from the base's, which the vector does not change: damaged, or changed otherwise", None
    block = _telling(work)
    if block is None:
        return differ, None
    old, new = _read(base, block), _read((found[0], found[1]), block, found[1].begin - base[1].begin)
    if torch.equal(old, new) and editor.coefficient:
        return f"{differ}: it is the base's, without any edit", 0.0
    fitted = _fitted(work, block, old, new)
    for guess in _guesses(fitted):
        if _same(replace_coefficient(editor, guess), block, old, new):
            if guess == editor.coefficient:
                break
            return f"{differ}: it is exactly the edit with coefficient {guess!r}", guess
    if count <= max(1, _FEW * total):
        return f"{differ}: damaged?", None
    if math.isfinite(fitted) and abs(fitted - editor.coefficient) <= _NEAR * abs(editor.coefficient):
        return f"{differ}: it is about the right edit; rounded otherwise, or computed otherwise?", None
    if math.isfinite(fitted) and _explained(work, block, old, new, fitted) > 0.5:
        return f"{differ}: it looks like coefficient {fitted:.4g}", None
    return f"{differ} ({percent(count / total)}): another vector, or another base?", None


def replace_coefficient(editor: Editor, coefficient: float) -> Editor:
    """An editor of its own with another coefficient, which measures nothing."""
    return Editor(coefficient, editor.seed, measure=False)


def _telling(work: Work) -> Block | None:
    """The first block of a tensor; the whole of a small one."""
    return next((replace(b) for b in blocks_of(work, False) if b.end > b.first), None)


def _read(place: Place, block: Block, shift: int = 0) -> Tensor:
    """A block's bytes, uint8."""
    with place[0].open("rb") as file:
        file.seek(block.begin_byte + shift)
        return torch.frombuffer(bytearray(file.read(block.end_byte - block.begin_byte)), dtype=torch.uint8)


def _numbers(raw: Tensor, work: Work, block: Block) -> Tensor:
    return raw.view(work.dtype).view(block.end - block.first, -1).double()


def _delta(work: Work, block: Block) -> Tensor:
    delta = work.rows(block.first, block.end).delta()
    return (delta.T if work.target.transposed else delta).double()


def _fitted(work: Work, block: Block, old: Tensor, new: Tensor) -> float:
    """Least squares: how much of the vector was subtracted; nan where it does nothing here."""
    delta, change = _delta(work, block), _numbers(old, work, block) - _numbers(new, work, block)
    norm = float(delta.square().sum())
    return float((change * delta).sum()) / norm if norm else math.nan


def _explained(work: Work, block: Block, old: Tensor, new: Tensor, coefficient: float) -> float:
    """The share of the change's squares that this much of the vector explains."""
    change = _numbers(old, work, block) - _numbers(new, work, block)
    rest = change - coefficient * _delta(work, block)
    whole = float(change.square().sum())
    return 1 - float(rest.square().sum()) / whole if whole else 0.0


def _guesses(fitted: float) -> Iterator[float]:
    """Numbers that people write, near a fitted one."""
    if not math.isfinite(fitted):
        return
    seen = set()
    for digits in range(1, 8):
        guess = float(f"{fitted:.{digits - 1}e}")
        if guess not in seen:
            seen.add(guess)
            yield guess


def _same(editor: Editor, block: Block, old: Tensor, new: Tensor) -> bool:
    made = old.clone()
    editor.edit(block, made)
    return torch.equal(made, new)
