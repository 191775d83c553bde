"""How much of an edit is left after rounding: what was realised against what was intended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
            parts.append(
                cls(
                    float((realised * wanted).sum()),
                    float(wanted.square().sum()),
                    float(realised.square().sum()),
                    int((realised != 0).sum()),
                    realised.numel(),
                )
            )
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
    """What to say where rounding to nearest has left another edit than the intended one; empty where it has not.

    Args:
        survived: From :func:`summary_of`.
        ways_out: What to do about it.
    """
    cosine = survived["cosine"]
    if cosine is None or cosine >= LEAST:
        return ""
    return (
        f"rounded to the stored number format, the edit has cosine {cosine:.3f} to the intended one "
        f"({survived['changed']:.1%} of the elements changed): these weights would be another model. {ways_out}"
    )
