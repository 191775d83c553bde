"""What number formats of 16 bits do to an edit: rounding by chance, and how much is left of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each element goes to one of its two neighbours in ``dtype``, with the probability that makes the mean exact.

    ``P(up) = (x - down) / (up - down)`` (e.g. Gupta et al. 1502.02551, section 3). What ``dtype`` can hold exactly
    stays as it is, and so does what overflows.

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


# -- how much of an edit is left after rounding


LEAST = 0.9  # cosine to the intended change under which what is stored is not the edit that was scored
_ROWS = 1024  # of a weight compared in float64 at a time


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
        for start in range(0, len(stored), _ROWS):
            new, old, wish = (t[start : start + _ROWS] for t in (stored, before, intended))
            realised, wanted = new.cpu().double() - old.cpu().double(), wish.cpu().double()
            dot, intended_, realised_ = (
                float(x.sum()) for x in (realised * wanted, wanted.square(), realised.square())
            )
            parts.append(cls(dot, intended_, realised_, int((realised != 0).sum()), realised.numel()))
        return cls.total(parts)

    @classmethod
    def total(cls, parts: Sequence[Survival]) -> Survival:
        """Of several weights, or parts of one."""
        return cls(
            math.fsum(p.dot for p in parts),
            math.fsum(p.intended for p in parts),
            math.fsum(p.realised for p in parts),
            sum(p.changed for p in parts),
            sum(p.elements for p in parts),
        )

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
