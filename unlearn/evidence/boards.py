"""Rows of published benchmarks from the per-item files of runs alone, and the files to submit: ``unlearn leaderboard``.

A run keeps lm-eval's files in ``benchmark/<who>/<model>``. No aggregate is taken from a report. Nothing here imports
numpy before a file is read, so that ``--help`` answers at once.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn import console
from unlearn.errors import EvaluationError, RunFolderError, UnlearnError
from unlearn.evidence.reference import WHO
from unlearn.recipe import yaml
from unlearn.recipe.evaluation import BenchmarkSpec
from unlearn.results import Who
from unlearn.store.files import explained, write_json_atomic, write_text_atomic
from unlearn.text import fitted

if TYPE_CHECKING:
    from unlearn.evidence.benchmarks import Figures, Log, Reference, Row

_PUBLISHED = "published"  # as a reference: MUSE's authors' value
_TESTS = ("Forget Quality", "KS Test PVal Forget")  # p-values, which may be anything down to 1e-300


# -- what a run's models scored


class _Eval(BaseModel):
    bootstrap: int = Field(1000, ge=1)


class _Recipe(BaseModel):
    """As much of a run's recipe as its benchmark needs."""

    name: str | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    benchmark: BenchmarkSpec | None = None
    eval: _Eval = _Eval()


@dataclass(frozen=True, slots=True, eq=False)
class BenchRun:
    """What a run's models scored: the target, and the edited model and the reference where there is one."""

    folder: Path
    name: str
    spec: BenchmarkSpec
    logs: Mapping[Who, Log]
    resamples: int
    seed: int


def read_run(folder: Path) -> BenchRun:
    """Read the run's benchmark; a run that is not finished, or has none, is an error."""
    from unlearn.evidence.benchmarks import read_scored

    recipe, spec = _benchmark(folder)
    scored = [who for who in WHO if (folder / "benchmark" / who).is_dir()]
    needed = ("target",) if _nothing_chosen(folder) else ("target", "edited")
    if missing := [who for who in needed if who not in scored]:
        which = " and ".join("the edited model" if who == "edited" else f"the {who}" for who in missing)
        raise EvaluationError(
            f"{folder}: {which} was not scored on {spec.name} {spec.set} (no benchmark/{missing[0]}): run the recipe "
            "to its end"
        )
    logs = {who: read_scored(folder / "benchmark" / who, spec) for who in scored}
    return BenchRun(folder, recipe.name or folder.resolve().name, spec, logs, recipe.eval.bootstrap, recipe.seed)


def read_reference(place: Path, name: str, forget_set: str | None = None) -> Figures:
    """The retain reference of a run (a folder), or a log (a file) of TOFU's authors or of open-unlearning.

    Args:
        name: The benchmark it is for, tofu or muse.
        forget_set: The set it is for (MUSE: the corpus), or None where that is not known.
    """
    from unlearn.evidence.benchmarks import read_scored, reference_log

    if not place.is_dir():
        return reference_log(place, name)
    _, spec = _benchmark(place)
    if spec.name != name or (forget_set is not None and spec.set != forget_set):
        raise EvaluationError(
            f"--reference {place}: it was scored on {spec.name} {spec.set} and the model on {name} {forget_set or ''}: "
            "a reference is scored on the same set"
        )
    scored = place / "benchmark" / "reference"
    if not scored.is_dir():
        raise EvaluationError(
            f"--reference {place}: this run has no retain reference (no benchmark/reference): give one that was run "
            f"with `reference:`{', or a log of TOFU (.json)' if name == 'tofu' else ''}"
        )
    return read_scored(scored, spec)


def _benchmark(folder: Path) -> tuple[_Recipe, BenchmarkSpec]:
    """The recipe of a run and its benchmark."""
    path = folder / "resolved.yaml"
    with explained(path):
        if not path.is_file():
            raise RunFolderError(
                f"{folder} is not the folder of a run (it has no resolved.yaml): give {_meant(folder)}"
            )
        content = path.read_bytes()
    try:
        recipe = _Recipe.model_validate(yaml.parse(content.decode("utf-8")).data)
    except (yaml.YamlSyntaxError, UnicodeDecodeError, ValidationError) as error:
        raise RunFolderError(f"{path}: cannot be read as a recipe, so it is unclear what was scored") from error
    if recipe.benchmark is None:
        raise EvaluationError(
            f"{folder}: this run has no benchmark: add `benchmark: {{name: tofu, set: forget10}}` (or muse: news, "
            "books) to its recipe and run it again"
        )
    return recipe, recipe.benchmark


def _meant(folder: Path) -> str:
    """What may be meant by a folder that is none of a run: a file of open-unlearning's in it, or below."""
    files = sorted(path for inner in ("", "*/") for path in folder.glob(f"{inner}*_SUMMARY.json"))
    return f"the file itself, {files[0]}" if files else "one of runs/, or what --out was"


def _nothing_chosen(folder: Path) -> bool:
    """Whether the run is finished and no coefficient passed its rule, so that there is no edited model."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return bool(report["chosen"]["coefficient"] == 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


# -- the files that leaderboards and other frameworks take, each whole or absent


def write_boards(
    folder: Path, logs: Mapping[Who, Figures], rows: Mapping[Who, Row], method: str, submitted_by: str
) -> list[Path]:
    """Write all files of one run, replacing those of an earlier time; returns them in the order written.

    ``tofu.csv`` (of the edited model: TOFU's submission) or ``muse.csv`` (of all), and for each model in ``rows`` a
    folder with OpenUnlearning's summary and, for TOFU, the log in the authors' layout. Figures without a reference are
    left empty.
    """
    from unlearn.evidence.benchmarks import TofuLog

    for who, row in rows.items():
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise EvaluationError(
                    f"{name} of the {who} is {value}: the model is broken, and no leaderboard takes that"
                )
    objects: dict[str, Mapping[str, object]] = {}
    for who, row in rows.items():
        log = logs[who]
        if isinstance(log, TofuLog):
            objects[f"{who}/eval_log_aggregated.json"] = log.to_json()
        objects[f"{who}/{log.benchmark.upper()}_SUMMARY.json"] = log.summary(row)
    if any(log.benchmark == "tofu" for log in logs.values()):
        edited = {name: value for name, value in rows["edited"].items() if not name.startswith("KS Test")}
        table, lines = "tofu.csv", [{**edited, "Method": method, "Submitted By": submitted_by}]
    else:
        table, lines = "muse.csv", list(rows.values())
    with explained(folder):
        for name in (table, *objects):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / table, csv_text(lines))
    for name, content in objects.items():
        write_json_atomic(folder / name, content)
    return [folder / name for name in (table, *objects)]


def csv_text(lines: Sequence[Row]) -> str:
    """A header and a line for each row, None left empty. Every text is one line, and no formula to a spreadsheet."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    for row in lines:
        texts = {name: " ".join(value.split()) for name, value in row.items() if isinstance(value, str)}
        safe = {name: f"'{text}" if text.startswith(("=", "+", "-", "@")) else text for name, text in texts.items()}
        writer.writerow({**row, **safe})
    return out.getvalue()


# -- the command


def print_rows(
    runs: Sequence[Path],
    tofu_log: Path | None,
    reference: str | None,
    out: Path | None,
    method: str | None,
    submitted_by: str,
) -> None:
    """What ``unlearn leaderboard`` does: rows of TOFU and MUSE, from the per-item files of runs or from logs."""
    if bool(runs) == (tofu_log is not None):
        raise UnlearnError("give either the folders of runs, or one log with --tofu-log LOG.json")
    if tofu_log is not None:
        method = method or tofu_log.stem
        logs, rows = _log_row(tofu_log, reference, method, submitted_by)
        if out is not None:
            _write(out, logs, rows, method, submitted_by)
        return
    # all are read before anything is printed or written: a mistake in the last one is said at once
    files = [_beside(path, reference) for path in runs if path.suffix == ".json"]
    folders = [path for path in runs if path.suffix != ".json"]
    if out is not None and not folders:
        raise UnlearnError("--out is for what runs scored: give the folder of a run as well")
    found = [(run, *_compared(run, reference, method or run.name)) for run in map(read_run, folders)]
    screen = console.results()
    places = _places(out, [run.folder for run, _, _ in found])
    for (run, logs, rows), place in zip(found, places, strict=True):
        screen.print(Text(fitted(f"{run.name} ({run.folder})", screen.encoding)))
        shown = [(str(who), row) for who, row in rows.items()]
        beside = [file for file in files if file.benchmark == run.spec.name]
        shown += [(file.name, file.row) for file in beside]
        scored = len(ratios.items) if (ratios := getattr(logs["target"], "ratios", None)) is not None else None
        for file in beside:
            if scored is not None and file.items not in (None, scored):
                console.say(
                    f"{file.name} is of {file.items} forget items and {run.name} of {scored}: not the same questions",
                    style="yellow",
                )
        _print_figures(f"{run.spec.name} {run.spec.set}", run.spec.name, shown, screen)
        _print_membership(run, screen)
        if place is not None:
            _write(place, logs, rows, method or run.name, submitted_by)
    alone = dict.fromkeys(file.benchmark for file in files)
    for benchmark in [name for name in alone if name not in {run.spec.name for run, _, _ in found}]:
        _print_figures(benchmark, benchmark, [(f.name, f.row) for f in files if f.benchmark == benchmark], screen)


@dataclass(frozen=True, slots=True)
class _File:
    """The row of a model that another program scored."""

    name: str
    benchmark: str
    row: Row
    items: int | None


def _beside(path: Path, given: str | None) -> _File:
    """The row of a file; compared with the reference where one is given and the file has values of every item."""
    from unlearn.evidence.benchmarks import TheirFigures, read_log

    log = read_log(path)
    compared = given not in (None, _PUBLISHED) and log.benchmark == "tofu" and log.ratios is not None
    same = given is not None and path.resolve() == Path(given).resolve()
    row = _row(path, log, given if compared and not same else None)
    place = path.resolve().parent
    name = place.parent.name if place.name.startswith("eval") else place.name
    items = len(log.ratios.items) if log.ratios is not None else None
    return _File(name if isinstance(log, TheirFigures) else path.stem, log.benchmark, row, items)


def _row(path: Path, log: Figures, given: str | None) -> Row:
    """The figures of a log, beside the reference that is given."""
    try:
        return log.row(None if given is None else read_reference(Path(given), "tofu"), "")
    except EvaluationError as error:
        raise EvaluationError(f"{path} beside {given}: {error}") from error


def _log_row(
    place: Path, given: str | None, method: str, submitted_by: str
) -> tuple[Mapping[Who, Figures], Mapping[Who, Row]]:
    """Print TOFU's row of a log, as JSON on stdout and nothing else there."""
    from unlearn.evidence.benchmarks import TheirFigures, read_log

    log = read_log(place)
    if log.benchmark != "tofu":
        raise UnlearnError(f"--tofu-log {place} is a file of MUSE: give it as it is, unlearn leaderboard {place}")
    if given == _PUBLISHED:
        raise UnlearnError("--reference published is MUSE's; for TOFU give the log (.json) of a retain model, or a run")
    if given is not None and isinstance(log, TheirFigures):
        log.need_ratios()
    row = _row(place, log, given)
    if given is None and row["Forget Quality"] is None:
        console.say(
            "Forget Quality is null: it compares with a model that never saw the forget set; give its log with "
            "--reference RETAIN.json (the authors' are in the data folder of locuslab/tofu), or the folder of a run",
            style="yellow",
        )
    whole = {**row, "Method": method, "Submitted By": submitted_by}
    sys.stdout.write(json.dumps(whole, indent=2, allow_nan=False) + "\n")
    return {"edited": log}, {"edited": row}


def _compared(run: BenchRun, given: str | None, method: str) -> tuple[Mapping[Who, Figures], Mapping[Who, Row]]:
    """The run's logs, the reference's among them, and their rows."""
    from unlearn.evidence.benchmarks import SUITES, Figures, absent, rows

    reference: Reference = run.logs.get("reference")
    if given is not None:
        reference = "published" if given == _PUBLISHED else read_reference(Path(given), run.spec.name, run.spec.set)
    elif reference is None:
        figure = SUITES[run.spec.name].figure
        more = "a log of a retain model (.json)" if run.spec.name == "tofu" else "published for the authors' value"
        console.say(
            f"{run.folder}: no retain reference, so {figure} is absent: give the folder of a run that has one "
            f"(`reference:` in its recipe) with --reference, or {more}",
            style="yellow",
        )
    try:
        found = rows(run.logs, reference, method)
    except EvaluationError as error:
        raise EvaluationError(f"{run.folder}: {error}") from error
    if reference is not None and (why := absent(run.spec.name, reference)):
        console.say(f"{run.folder}: {why}", style="yellow")
    return {**run.logs, **({"reference": reference} if isinstance(reference, Figures) else {})}, found


def _places(out: Path | None, folders: Sequence[Path]) -> list[Path | None]:
    """Where each run's files go: ``out`` itself for one, a folder in it, called like the run's, for each of several."""
    if out is None or len(folders) == 1:
        return [out] * len(folders)
    places: list[Path | None] = []
    for folder in folders:
        name, number = folder.resolve().name, 1
        while (place := out / (name if number == 1 else f"{name}-{number}")) in places:
            number += 1
        places.append(place)
    return places


def _write(place: Path, logs: Mapping[Who, Figures], rows: Mapping[Who, Row], method: str, submitted_by: str) -> None:
    if "edited" not in logs:
        raise EvaluationError(f"{place}: no coefficient passed the run's rule, so there is nothing to submit")
    for path in write_boards(place, logs, rows, method, submitted_by):
        console.say(f"wrote {path}")


def _print_membership(run: BenchRun, screen: Console) -> None:
    """Areas under the ROC curve of membership inference, where the run has it; from its per-item files as well."""
    from unlearn.evidence.membership import SAMPLES, areas

    paths = {who: run.folder / "membership" / who / SAMPLES for who in run.logs}
    files = {who: path for who, path in paths.items() if path.is_file()}
    if files:
        found = areas(files, run.resamples, run.seed)
        at = {(m.attack, m.who): f"{m.auc:.3f} ({m.low:.3f} to {m.high:.3f})" for m in found}
        names = dict.fromkeys(m.attack for m in found)
        _print("membership, AUC", list(files), {n: [at.get((n, who), "-") for who in files] for n in names}, screen)


def _print_figures(title: str, benchmark: str, rows: Sequence[tuple[str, Row]], screen: Console) -> None:
    """A column for each row, of which several may have one name."""
    names = [name for name in rows[0][1] if name != "name"]
    lines = {name: [_figure(name, row.get(name), benchmark) for _, row in rows] for name in names}
    _print(title, [who for who, _ in rows], lines, screen)


def _print(title: str, models: Sequence[str], lines: Mapping[str, Sequence[str]], screen: Console) -> None:
    """Figures downwards, a column for each model: fits a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim", pad_edge=False)
    table.add_column(title, no_wrap=True)
    for who in models:
        table.add_column(Text(fitted(who, screen.encoding)), justify="right", overflow="fold")
    for name, figures in lines.items():
        table.add_row(name, *figures)
    screen.print(table)
    screen.print()


def _figure(name: str, value: float | str | None, benchmark: str) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if name in _TESTS:
        return f"{value:.4g}"
    return f"{value:.4f}" if benchmark == "tofu" else f"{value:.2f}"
