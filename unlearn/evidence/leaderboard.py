"""Rows of published benchmarks from per-item files, and the files to submit.

Nothing here imports numpy before a file is read, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn import console
from unlearn.errors import EvaluationError, UnlearnError
from unlearn.results import Who

if TYPE_CHECKING:
    from unlearn.evidence.benchmarks import Log, Row
    from unlearn.evidence.boards import BenchRun

_WIDE = 1000  # columns of a pipe: every row stays one line, so that other programs can read it
_TESTS = ("Forget Quality", "KS Test PVal Forget")  # p-values, which may be anything down to 1e-300


@dataclass(frozen=True)
class _Options:
    """What the command line says beside the runs or the log."""

    reference: str | None
    out: Path | None
    method: str | None
    submitted_by: str


def leaderboard(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="the folder of a run whose recipe has a benchmark")
    ] = None,
    tofu_log: Annotated[
        Path | None, typer.Option(metavar="LOG.json", help="a log of TOFU: prints its row as JSON")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|LOG.json",
            help="the retain reference: a run that has one, a log of TOFU, or published (MUSE's authors' value); "
            "the run's own when not given",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write the files of leaderboards there")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="the method's name in them (default: the run's name)")
    ] = None,
    submitted_by: Annotated[str, typer.Option(metavar="NAME", help="who submits (TOFU's column)")] = "",
) -> None:
    """Print rows of TOFU and MUSE, from the per-item files of runs or from a log of TOFU's authors."""
    options = _Options(reference, out, method, submitted_by)
    if bool(runs) == (tofu_log is not None):
        raise UnlearnError("give either the folders of runs, or one log with --tofu-log LOG.json")
    if tofu_log is not None:
        _tofu_log(tofu_log, options)
    else:
        _runs(runs or [], options)


def _tofu_log(place: Path, arguments: _Options) -> None:
    """TOFU's row of a log, as JSON on stdout and nothing else there."""
    from unlearn.evidence.boards import PUBLISHED, read_log, read_reference, rows

    log = read_log(place)
    given: str | None = arguments.reference
    if given == PUBLISHED:
        raise UnlearnError("--reference published is MUSE's; for TOFU give the log (.json) of a retain model, or a run")
    reference = None if given is None else read_reference(Path(given), "tofu")
    method = arguments.method or place.stem
    try:
        row = rows({"edited": log}, reference, method)["edited"]
    except EvaluationError as error:
        raise EvaluationError(f"{place} beside {given}: {error}") from error
    whole = {**row, "Method": method, "Submitted By": arguments.submitted_by}
    try:
        text = json.dumps(whole, indent=2, allow_nan=False)
    except ValueError as error:
        raise EvaluationError(f"{place}: its row has numbers that are not finite: {row}") from error
    if reference is None:
        console.say(
            "Forget Quality is null: it compares with a model that never saw the forget set; give its log with "
            "--reference RETAIN.json (the authors' are in the data folder of locuslab/tofu), or the folder of a run",
            style="yellow",
        )
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        _write(arguments.out, {"edited": log}, {"edited": row}, method, arguments.submitted_by)


def _runs(places: Sequence[Path], arguments: _Options) -> None:
    """A table for every run, and its files."""
    from unlearn.evidence.boards import read_run

    # all are read before anything is printed or written: a mistake in the last one is said at once
    found = [(run, *_compared(run, arguments)) for run in map(read_run, places)]
    out = Console(highlight=False)
    out = out if out.is_terminal else Console(highlight=False, width=_WIDE)
    folders = _places(arguments.out, [run.folder for run, _, _ in found])
    for (run, logs, rows), place in zip(found, folders, strict=True):
        _show(run, rows, out)
        _show_membership(run, out)
        if place is not None:
            _write(place, logs, rows, _method(run, arguments), arguments.submitted_by)


def _compared(run: BenchRun, arguments: _Options) -> tuple[Mapping[Who, Log], Mapping[Who, Row]]:
    """The run's logs, the reference's among them, and their rows."""
    from unlearn.evidence.boards import PUBLISHED, absent, read_reference, rows

    given: str | None = arguments.reference
    reference: Log | str | None = run.logs.get("reference")
    if given is not None:
        reference = given if given == PUBLISHED else read_reference(Path(given), run.spec.name, run.spec.set)
    elif reference is None:
        lost, more = (
            ("forget quality", "or a log of a retain model (.json)")
            if run.spec.name == "tofu"
            else ("PrivLeak", "or published for the authors' value")
        )
        console.say(
            f"{run.folder}: no retain reference, so {lost} is absent: give the folder of a run that has one "
            f"(`reference:` in its recipe) with --reference, {more}",
            style="yellow",
        )
    logs: dict[Who, Log] = {**run.logs}
    if reference is not None and not isinstance(reference, str):
        logs["reference"] = reference
    try:
        if isinstance(reference, str):
            return logs, rows(logs, "published", _method(run, arguments))
        found = rows(logs, reference, _method(run, arguments))
    except EvaluationError as error:
        raise EvaluationError(f"{run.folder}: {error}") from error
    if reference is not None and (why := absent(run.spec.name, reference)):
        console.say(f"{run.folder}: {why}", style="yellow")
    return logs, found


def _method(run: BenchRun, arguments: _Options) -> str:
    return str(arguments.method or run.name)


def _places(out: Path | None, folders: Sequence[Path]) -> list[Path | None]:
    """Where each run's files go: ``out`` itself for one, a folder in it, called like the run's, for each of several."""
    if out is None or len(folders) == 1:
        return [out] * len(folders)
    names: list[Path | None] = []
    for folder in folders:
        name, number = folder.resolve().name, 1
        while (place := out / (name if number == 1 else f"{name}-{number}")) in names:
            number += 1
        names.append(place)
    return names


def _write(place: Path, logs: Mapping[Who, Log], rows: Mapping[Who, Row], method: str, submitted_by: str) -> None:
    from unlearn.evidence.boards import write_boards

    if "edited" not in logs:
        raise EvaluationError(f"{place}: no coefficient passed the run's rule, so there is nothing to submit")
    for path in write_boards(place, logs, rows, method, submitted_by):
        console.say(f"wrote {path}")


def _show(run: BenchRun, rows: Mapping[Who, Row], out: Console) -> None:
    """The benchmark's columns downwards, a column for each model: fits a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim", pad_edge=False)
    table.add_column(_safe(run.title(), out), no_wrap=True)
    for who in rows:
        table.add_column(who, justify="right", no_wrap=True)
    for name in next(iter(rows.values())):
        if name != "name":
            table.add_row(name, *(_figure(name, row[name], run.spec.name) for row in rows.values()))
    out.print(_safe(f"{run.name} ({run.folder})", out))
    out.print(table)
    out.print()


def _show_membership(run: BenchRun, out: Console) -> None:
    """Areas under the ROC curve of membership inference, where the run has it; from its per-item files as well."""
    from unlearn.evidence.membership import SAMPLES, areas

    there = {who: run.folder / "membership" / who / SAMPLES for who in run.logs}
    files = {who: path for who, path in there.items() if path.is_file()}
    if not files:
        return
    found = areas(files, run.resamples, run.seed)
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim", pad_edge=False)
    table.add_column("membership, AUC", no_wrap=True)
    for who in files:
        table.add_column(who, justify="right", no_wrap=True)
    at = {(m.attack, m.who): f"{m.auc:.3f} ({m.low:.3f} to {m.high:.3f})" for m in found}
    for attack in dict.fromkeys(m.attack for m in found):
        table.add_row(attack, *(at.get((attack, who), "-") for who in files))
    out.print(table)
    out.print()


def _figure(name: str, value: float | str | None, benchmark: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if name in _TESTS:
        return f"{value:.4g}"
    return f"{value:.4f}" if benchmark == "tofu" else f"{value:.2f}"


def _safe(value: str, out: Console) -> Text:
    """A name is no markup, moves no cursor, and must fit the terminal's encoding."""
    known = value.encode(out.encoding, "replace").decode(out.encoding)
    return Text("".join(c if c.isprintable() else "?" for c in known))
