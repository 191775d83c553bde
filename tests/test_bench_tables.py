"""The figures of the benchmarks' tables that are means over unlike cells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from methods_table import LEAST, _reached, selectivity


def cell(pair: str, lost: float, paid: float, after: float = 0.3) -> dict[str, Any]:
    row = {"pair": pair, "forget_nats": lost, "kept_nats": paid, "forget_before": 0.9, "forget_after": after}
    return row | {"kept_before": 1.0, "kept_after": 1.0, "general_nats": 0.0}


def test_selectivity_does_not_depend_on_the_units_of_nats() -> None:
    """Per answer or per token: a pair in small units must not vanish beside one in large ones."""
    rows = [cell("answers", 9.0, 3.0), cell("tokens", 0.9, 0.1)]
    found = selectivity(rows, {"answers": 9.0, "tokens": 0.9}, draws=50)[1]
    assert found == pytest.approx(2 / (1 / 3 + 1 / 9))
    finer = [rows[0], cell("tokens", 90.0, 10.0)]
    assert selectivity(finer, {"answers": 9.0, "tokens": 90.0}, draws=50)[1] == pytest.approx(found)
    free = [cell("answers", 9.0, 0.0), cell("tokens", 0.9, 0.0)]
    assert selectivity(free, {"answers": 9.0, "tokens": 0.9}, draws=50)[1] == pytest.approx(
        1 / ((LEAST / 9 + LEAST / 0.9) / 2)
    )


def test_the_goal_for_what_is_left_is_one_of_choices() -> None:
    """A share of tokens recited is no accuracy of four choices."""
    rows = [cell("capitals", 1.0, 1.0, after=0.3), cell("passages", 1.0, 1.0, after=0.8)]
    assert "forget" in _reached(rows, {"capitals": 1.0, "passages": 1.0})
