"""Whole runs against what they found before: vectors, coefficients, scores, choices, stages, headings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from golden.record import CASES, HERE, REAL, found, kept

TOLERANCE = 2e-3  # other processors round differently; on the same one the digits are the same


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Every place where two plain values differ by more than rounding."""
    if isinstance(old, dict) and isinstance(new, dict):
        if old.keys() != new.keys():
            return [f"{where}: {sorted(old.keys() ^ new.keys())} in one only"]
        return [line for key in old for line in differences(old[key], new[key], f"{where}.{key}")]
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return [f"{where}: {len(old)} entries, now {len(new)}"]
        return [
            line for n, (a, b) in enumerate(zip(old, new, strict=True)) for line in differences(a, b, f"{where}[{n}]")
        ]
    if isinstance(old, float) and isinstance(new, int | float):
        close = math.isclose(old, new, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
        return [] if close else [f"{where}: {old}, now {new}"]
    # a vector's bits are those of the processor; what the data are is not
    rounded = where.endswith("digest") and where.startswith(".report.vector")
    return [] if old == new or rounded else [f"{where}: {old!r}, now {new!r}"]


@pytest.mark.parametrize("name", CASES)
def test_a_run_finds_what_it_found(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Two of the cases are the runs that many tests read."""
    old = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    if name == "smoke":
        new = kept(request.getfixturevalue("smoke"))
    elif name == "everything":
        new = kept(request.getfixturevalue("compared") / "run")
    else:
        new = found(name, tmp_path)
    assert not differences(old, new)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_quickstart_finds_what_it_found(name: str, tmp_path: Path) -> None:
    old = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    assert not differences(old, found(name, tmp_path))
