"""The result in the terminal: readable at 80 columns and, without colour, in a log file."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn.report.figures import (
    kept_figure,
    kept_keys,
    margin_of_change,
    missed,
    total_seconds,
    with_margin,
    worst_kept,
)
from unlearn.report.words import dearest, evidence_facts, headline, how_good, remarks
from unlearn.results import RunReport, Score, ScoreRow
from unlearn.text import coefficient, duration, fitted, short, signed

_COLOUR = {"forget": "dark_orange", "learn": "magenta", "retain": "blue", "utility": "green"}
_ASCII = str.maketrans({"λ": "lambda", "±": "+/-", "−": "-", "–": "-", "→": "->", "×": "x", "≥": ">=", "≤": "<=",
                        "↑": "^", "↓": "v", "∞": "inf", "α": "alpha", "⁻": "-", "…": "..."}
                       | {c: str(i) for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})  # fmt: skip


def render_table(report: RunReport, console: Console) -> None:
    """Print the headline, the before/after table, the rule and where the files are."""
    write = _Writer(console)
    write.line()
    write.line(headline(report), "bold")
    for line in (*remarks(report), *report.warnings):
        write.line(f"! {line}", "yellow")
    write.line()
    if report.scores:
        console.print(_scores(report, write))
        guess = "; chance is what guessing scores" if any(r.chance is not None for r in report.scores) else ""
        write.line(f"± is half of a 95 % confidence interval; kept is the share of the score before{guess}.", "dim")
        write.line()
    facts = [("coefficient", f"λ = {coefficient(report.chosen.coefficient)}"), ("rule", report.chosen.rule)]
    if report.chosen.search == "given":
        facts = [("before", str(report.vector["before"])), ("after", str(report.vector["after"]))]
    if row := worst_kept(report):
        facts.append(
            ("kept at worst", f"{kept_figure(report, row)} ({row.set}/{row.name} {row.metric}, {row.split} items)")
        )
    if foreseen := dearest(report):
        facts += [("foreseen", foreseen), ("prediction", how_good(report))]
    facts += evidence_facts(report)
    facts += [(name, value["path"]) for name, value in report.exports.items() if value and "path" in value]
    facts.append(("time", duration(total_seconds(report))))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(write.text(name), write.text(value))
    console.print(grid)


class _Writer:
    """Text without markup, in characters that the console's encoding has."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.ascii = not console.encoding.lower().startswith("utf")

    def text(self, value: str, style: str = "") -> Text:
        plain = value.translate(_ASCII) if self.ascii else value
        return Text(fitted(plain, self.console.encoding, "\n\t"), style=style)

    def line(self, value: str = "", style: str = "") -> None:
        self.console.print(self.text(value, style))


def _scores(report: RunReport, write: _Writer) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim", pad_edge=False)
    table.add_column("set", no_wrap=True)
    table.add_column("data", overflow="fold", min_width=6)
    table.add_column("metric", overflow="fold", min_width=6)
    guessed = any(row.chance is not None for row in report.scores)
    for head in ("before", "after", *(["chance"] if guessed else []), "change", "kept", "n"):
        table.add_column(head, justify="right", no_wrap=True)
    splits = {row.split for row in report.scores}
    if len(splits) > 1:
        table.add_column("items", no_wrap=True)
    else:
        table.title = write.text(f"{splits.copy().pop()} items", "dim")
        table.title_justify = "left"
    previous = ""
    for row in report.scores:
        cells = [write.text(cell, style) for cell, style in _cells(report, row, row.set == previous, guessed)]
        table.add_row(*(cells if len(splits) > 1 else cells[:-1]))
        previous = row.set
    return table


def _cells(report: RunReport, row: ScoreRow, repeated: bool, guessed: bool) -> list[tuple[str, str]]:
    change, noise, low = row.after.value - row.before.value, margin_of_change(row), row in missed(report)
    kept = kept_figure(report, row) if row.key in kept_keys(report) else ""
    n = str(row.after.n) if row.before.n == row.after.n else f"{row.before.n}/{row.after.n}"
    return [
        ("" if repeated else row.set, _COLOUR[row.set]),
        (row.name, ""),
        (f"{row.metric} {'↑' if row.higher_is_better else '↓'}", ""),
        (_compact(row.before), ""),
        (_compact(row.after), ""),
        *([("" if row.chance is None else short(row.chance), "dim")] if guessed else []),
        (signed(change), "dim" if noise is not None and abs(change) <= noise else "bold"),
        (f"{kept} !" if low else kept, "bold red" if low else ""),
        (n, "dim"),
        (row.split, ""),
    ]


def _compact(score: Score) -> str:
    """``0.46 ± 0.08`` where three decimals would not fit a line of 80 columns."""
    value, _, half = with_margin(score).partition(" ± ")
    return f"{value} ±{half.removeprefix('0')}" if half else value
