"""The terminal's result: everything that matters, in 80 columns, in any encoding, whatever the names hold."""

from __future__ import annotations

import io
from dataclasses import replace

from reports import with_evidence
from rich.console import Console

from unlearn.report.terminal import render_table
from unlearn.report.words import evidence_facts
from unlearn.results import Chosen, Foresight, RunReport, Score, ScoreRow, SetForesight, SweepPoint, TaskScore


def report(
    name: str = "asia", metric: str = "acc_norm", after: float = 0.857, stderr: float | None = 0.05
) -> RunReport:
    kept = TaskScore("retain", name, "validation", metric, True, Score(0.88, None, 40))
    return RunReport(
        name="quickstart",
        description="",
        chosen=Chosen(1.5, True, "most forgetting within the bound", metric, 0.95, 0.5, (("retain", name, metric),)),
        scores=(
            ScoreRow("forget", "europe", "test", metric, True, Score(0.917, 0.04, 48), Score(0.458, 0.072, 48)),
            ScoreRow("retain", name, "test", metric, True, Score(0.878, stderr, 49), Score(after, stderr, 49)),
        ),
        sweep=(SweepPoint(0.0, (kept,), True),),
        examples=(),
        data=(),
        vector={},
        training=(),
        exports={"adapter": {"path": "runs/q/export/adapter", "bytes": 12}, "hub": {"repo": "a/b"}, "merged": None},
        seconds={"load": 4.0, "search": 129.0},
        provenance={},
        warnings=("Two rows were cut.",),
    )


def printed(what: RunReport, width: int = 80, colour: bool = False, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    render_table(
        what, Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    )
    file.flush()
    return raw.getvalue().decode(encoding)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_everything_that_matters_is_there_in_80_columns() -> None:
    text = printed(report())
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "\x1b" not in text
    flat = squeezed(text)
    assert "The model still answers 46 % of what it was asked to forget: europe accuracy fell from 0.92" in flat
    assert "forget europe acc_norm ↑ 0.917 ±.078 0.458 ±.141 −0.459 48" in flat
    assert "retain asia acc_norm ↑ 0.878 ±.098 0.857 ±.098 −0.021 97.6 % 49" in flat
    for fact in ("test items", "coefficient λ = 1.5", "rule most forgetting within the bound", "time 2 min 13 s",
                 "adapter runs/q/export/adapter", "kept at worst 97.6 % (retain/asia acc_norm, test items)",
                 "! Two rows were cut."):  # fmt: skip
        assert fact in flat
    assert "merged" not in flat
    assert "nan" not in flat.lower()


def test_a_bound_missed_on_test_items_is_flagged() -> None:
    text = squeezed(printed(report(after=0.7)))
    assert "79.7 % !" in text
    assert "on test items not that of retain/asia acc_norm (79.7 %, bound 95 %)." in text


def test_chance_has_a_column_where_choices_were_scored() -> None:
    base = report()
    rows = (replace(base.scores[0], chance=0.25), base.scores[1])
    text = printed(replace(base, scores=rows))
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    flat = squeezed(text)
    assert "set data metric before after chance change kept n" in flat
    assert "forget europe acc_norm ↑ 0.917 ±.078 0.458 ±.141 0.25 −0.459 48" in flat
    assert "retain asia acc_norm ↑ 0.878 ±.098 0.857 ±.098 −0.021 97.6 % 49" in flat
    assert "chance is what guessing scores" in flat
    assert "where guessing would give 25 %" in flat
    assert "chance" not in printed(base)


def test_missing_error_estimates_and_values() -> None:
    text = squeezed(printed(report(after=float("nan"), stderr=None)))
    assert "retain asia acc_norm ↑ 0.878 – – – ! 49" in text, "what is no number is within no bound"
    assert "nan" not in text.lower()


def test_nothing_passed() -> None:
    base = report()
    text = squeezed(printed(replace(base, chosen=replace(base.chosen, coefficient=0.0, bound_met=False), exports={})))
    assert "No coefficient passed the rule; the model is unchanged." in text
    assert "coefficient λ = 0" in text


def test_an_old_encoding_gets_plain_characters() -> None:
    text = printed(report(name="東京"), encoding="ascii")
    assert "lambda = 1.5" in text
    assert "+/-" in text
    assert "-0.459" in text
    assert "??" in text


def test_names_cannot_style_or_move_the_terminal() -> None:
    text = printed(report(name="[red]a[/red]\x1b[2J\r\x07"), width=120)
    assert "[red]a[/red]?[2J" in text
    assert not set(text) & {"\x1b", "\r", "\x07"}


def test_colour_only_adds_escape_codes() -> None:
    coloured = printed(report(), colour=True)
    assert "\x1b[" in coloured
    assert "0.458 ±.141" in coloured


def test_a_report_without_scores_and_mixed_splits() -> None:
    base = report()
    assert "coefficient" in printed(replace(base, scores=()))
    mixed = replace(
        base, scores=(base.scores[0], replace(base.scores[1], split="validation", before=Score(0.9, None, 7)))
    )
    flat = squeezed(printed(mixed, width=100))
    assert "items" in flat
    assert "7/49 validation" in flat
    assert "48 test" in flat


def test_huge_perplexities_fit() -> None:
    base = report()
    big = ScoreRow("retain", "book", "test", "perplexity", False, Score(30.0, 1.0, 9), Score(1.2e12, 3e11, 9))
    text = printed(replace(base, scores=(base.scores[0], big)))
    assert "1.2×10¹²" in text
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())


def test_what_was_foreseen_takes_two_lines() -> None:
    base = report()
    foresight = Foresight(
        (SetForesight("forget", "europe", "logprob", 4.0, 36),),
        (
            SetForesight("utility", "general", "loss", 0.01, 64),
            SetForesight("retain", "asia", "logprob", 0.25, 35, 0.99, 0.42, 0.03, 0.2, {}, "aligned"),
        ),
    )
    sweep = tuple(
        SweepPoint(c, (TaskScore("retain", "asia", "validation", "logprob", True, Score(-2.0 - c, 0.1, 40)),), True)
        for c in (0.0, 1.5)
    )
    text = printed(replace(base, foresight=foresight, sweep=sweep))
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    flat = squeezed(text)
    dearest = "retain/asia aligned (α +0.420), +0.375 nats predicted, +1.500 measured at λ = 1.5"
    assert f"foreseen {dearest}; utility/general, +0.010 nats per unit of λ" in flat, "of each unit the dearest"
    assert "prediction At λ = 1.5 the straight line was off by 1.125 nats per answer on average" in flat
    early = squeezed(printed(replace(base, foresight=foresight), encoding="ascii"))
    assert "retain/asia aligned (alpha +0.420), +0.250 nats per unit of lambda" in early
    assert "foreseen" not in printed(base)


def test_comparisons_and_attacks_are_told() -> None:
    text = squeezed(printed(with_evidence(), width=2000))
    for name, line in evidence_facts(with_evidence()):
        assert f"{name} {line}" in text
    assert all(len(line.rstrip()) <= 80 for line in printed(with_evidence()).splitlines())
