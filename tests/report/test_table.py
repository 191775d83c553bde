"""The terminal's result: everything that matters, in 80 columns, in any encoding, whatever the names hold."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
from reports import FORESIGHT, foreseen, make, row, with_evidence
from rich.console import Console

from unlearn.report.terminal import render_table
from unlearn.report.words import evidence_facts
from unlearn.results import RunReport, Score


def printed(what: RunReport, width: int = 80, colour: bool = False, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    render_table(
        what, Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    )
    file.flush()
    return raw.getvalue().decode(encoding)


def other(**asia: Any) -> RunReport:
    """The small report with another row of what is kept."""
    forget, kept, _ = make().scores
    return make(scores=(forget, replace(kept, **asia)))


FORGET = "forget europe acc_norm ↑ 0.917 ±.098 0.458 ±.098 "
CASES: dict[str, tuple[RunReport, list[str], list[str]]] = {  # what is said of a report, and what is not
    "everything that matters": (
        make(),
        [
            "The model still answers 46 % of what it was asked to forget: europe accuracy fell from 0.92",
            *("! Two rows were cut.", "test items", f"{FORGET}−0.459 48"),
            "retain asia acc_norm ↑ 0.878 ±.098 0.857 ±.098 −0.021 97.6 % 48",
            *("coefficient λ = 1.5", "rule most forgetting within the bound", "time 2 min 13 s"),
            *("adapter export/adapter", "kept at worst 97.6 % (retain/asia acc_norm, test items)"),
        ],
        ["merged", "chance", "foreseen", "\x1b"],
    ),
    "a bound missed on test items": (
        other(after=Score(0.7, 0.05, 48)),
        ["79.7 % !", "on test items not that of retain/asia acc_norm (79.7 %, bound 95 %)."],
        [],
    ),
    "choices have a column for chance": (
        make(scores=(replace(make().scores[0], chance=0.25), make().scores[1])),
        [
            *("set data metric before after chance change kept n", f"{FORGET}0.25 −0.459 48"),
            "retain asia acc_norm ↑ 0.878 ±.098 0.857 ±.098 −0.021 97.6 % 48",
            *("chance is what guessing scores", "where guessing would give 25 %"),
        ],
        [],
    ),
    "no error estimates, and no number, which is within no bound": (
        other(before=Score(0.878, None, 48), after=Score(math.nan, None, 48)),
        ["retain asia acc_norm ↑ 0.878 – – – ! 48"],
        [],
    ),
    "nothing passed": (
        make(chosen=replace(make().chosen, coefficient=0.0, bound_met=False), exports={}),
        ["No coefficient passed the rule; the model is unchanged.", "coefficient λ = 0"],
        [],
    ),
    "no scores": (make(scores=()), ["coefficient"], ["set data"]),
    "items of several splits": (
        other(split="validation", before=Score(0.9, None, 7)),
        ["n items", "7/48 validation", "48 test"],
        [],
    ),
    "huge perplexities": (
        make(scores=(make().scores[0], row("retain", "book", 30.0, 1.2e12, "perplexity", False))),
        ["1.2×10¹²"],
        [],
    ),
    "what was foreseen, of each unit the dearest": (
        foreseen(),
        [
            "foreseen retain/asia aligned (α +0.420), +2.250 nats predicted, +0.750 measured at λ = 1.5; "
            "utility/general, −0.021 nats predicted, +0.188 measured at λ = 1.5",
            "prediction At λ = 1.5 the straight line was off by 1.500 nats per answer on average",
        ],
        [],
    ),
    "what was foreseen of losses that were not scored": (
        make(foresight=FORESIGHT),
        ["retain/asia aligned (α +0.420), +1.500 nats per unit of λ"],
        [],
    ),
    "comparisons and attacks": (
        with_evidence(),
        [f"{name} {line}" for name, line in evidence_facts(with_evidence())],
        [],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_printed(name: str) -> None:
    report, said, unsaid = CASES[name]
    width = 100 if "splits" in name else 80
    text = printed(report, width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    flat = " ".join(printed(report, 2000 if "comparisons" in name else width).split())
    assert [part for part in said if part not in flat] == []
    assert [part for part in (*unsaid, "nan") if part in text.lower()] == []


def test_an_old_encoding_gets_plain_characters() -> None:
    text = printed(other(name="東京"), encoding="ascii")
    for plain in ("lambda = 1.5", "+/-", "-0.459", "??"):
        assert plain in text


def test_names_cannot_style_or_move_the_terminal() -> None:
    text = printed(other(name="[red]a[/red]\x1b[2J\r\x07"), width=120)
    assert "[red]a[/red]?[2J" in text
    assert not set(text) & {"\x1b", "\r", "\x07"}


def test_colour_only_adds_escape_codes() -> None:
    coloured = printed(make(), colour=True)
    assert "\x1b[" in coloured
    assert "0.458 ±.098" in coloured
