"""The figures of the benchmarks' tables that are means over unlike cells."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from methods_table import LEAST, _in_pmi, _lines, _means, _reached, selectivity


def cell(pair: str, lost: float, paid: float, after: float = 0.3) -> dict[str, Any]:
    row = {"pair": pair, "forget_nats": lost, "kept_nats": paid, "forget_before": 0.9, "forget_after": after}
    row |= {"kept_before": 1.0, "kept_after": 1.0, "general_nats": 0.0, "acc_pmi_after": 0.5}
    return row | {"pmi_before": 8.0, "pmi_after": 8.0 - lost, "kept_pmi_before": 9.0, "kept_pmi_after": 9.0 - paid}


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


def test_goals_are_judged_by_pointwise_information_and_change_nothing_reaches_none() -> None:
    rows = [cell("capitals", 7.2, 0.3), cell("passages", 7.2, 0.3, after=0.8)]
    means = _means(rows, {"capitals": 1.0, "passages": 1.0})
    assert means["pmi"] == pytest.approx(0.1)
    assert means["kept_pmi"] == pytest.approx(8.7 / 9)
    assert (means["selectivity"], means["acc_pmi"]) == (pytest.approx(24.0), 0.5)
    found = _reached(rows, {"capitals": 1.0, "passages": 1.0})
    assert found == ["pmi", "kept", "kept_pmi", "general", "selectivity", "forget"]
    assert _in_pmi([rows[0] | {"forget_nats": 50.0}])[0]["forget_nats"] == pytest.approx(7.2)
    idle = [cell("capitals", 0.0, 0.0, after=0.9)]
    assert _reached(idle, {"capitals": 1.0}) == []


def test_methods_are_set_against_plain_negation_in_the_same_cells_only() -> None:
    def of(method: str, pair: str, area: float) -> dict[str, Any]:
        made = {"method": method, "pair": pair, "seed": 0, "area": area, "coefficient": 1.0, "seconds": 1.0}
        return cell(pair, 4.0, 1.0) | made | {"acc_pmi_before": 1.0}

    rows = [of("negate", "capitals", 0.1), of("shrink", "capitals", 0.3), of("shrink", "currencies", 0.9)]
    head, before, first, second = _lines(rows)
    assert (first[0], first[head.index("over `negate`")]) == ("shrink", "+0.20")
    assert (second[0], second[head.index("over `negate`")]) == ("negate", "")
    assert (before[1], first[1], second[2]) == ("0.90", "0.30 (1)", "")
