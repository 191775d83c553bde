"""What runs scored on a published benchmark, computed again from their per-item files alone, and the files to submit.

A run keeps lm-eval's files in ``benchmark/<who>/<model>``, who being the target, the edited model or the retain
reference. No aggregate is taken from a report: every number comes from ``samples_*.jsonl``.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from unlearn.errors import DataError, EvaluationError, RunFolderError
from unlearn.evidence.benchmarks import (
    MUSE_COLUMNS,
    SUITES,
    TOFU_COLUMNS,
    ZERO_AUC,
    Log,
    MuseLog,
    Row,
    TofuLog,
    read_samples,
)
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.evaluation import BenchmarkSpec
from unlearn.results import Who
from unlearn.store.files import explained, write_json_atomic, write_text_atomic

WHO: tuple[Who, ...] = ("target", "edited", "reference")
PUBLISHED = "published"  # as a reference: MUSE's authors' value
Reference = Log | Literal["published"] | None


@dataclass(frozen=True, slots=True, eq=False)
class BenchRun:
    """What a run's models scored.

    ``logs`` has the target, the edited model unless no coefficient passed the rule, and the reference if there is one.
    ``resamples`` and ``seed`` are the recipe's, for bootstraps.
    """

    folder: Path
    name: str
    spec: BenchmarkSpec
    logs: Mapping[Who, Log]
    resamples: int = 1000
    seed: int = 0

    def title(self) -> str:
        """``tofu forget10``."""
        return f"{self.spec.name} {self.spec.set}"


def read_run(folder: Path) -> BenchRun:
    """Read the run's benchmark; a run that is not finished, or has none, is an error."""
    recipe, spec = _benchmark(folder)
    there = [who for who in WHO if (folder / "benchmark" / who).is_dir()]
    needed = ("target",) if _nothing_chosen(folder) else ("target", "edited")
    if missing := [who for who in needed if who not in there]:
        which = " and ".join("the edited model" if who == "edited" else f"the {who}" for who in missing)
        raise EvaluationError(
            f"{folder}: {which} was not scored on {spec.name} {spec.set} (no benchmark/{missing[0]}): run the recipe "
            "to its end"
        )
    logs = {who: read_scored(folder / "benchmark" / who, spec) for who in there}
    name = str(recipe.get("name") or folder.resolve().name)
    settings = recipe.get("eval")
    resamples = settings.get("bootstrap") if isinstance(settings, Mapping) else None
    return BenchRun(folder, name, spec, logs, _whole(resamples, 1000), _whole(recipe.get("seed"), 0))


def read_reference(place: Path, name: str, forget_set: str | None = None) -> Log:
    """The retain reference of a run (a folder), or a log in the layout of TOFU's authors (a file).

    Args:
        name: The benchmark it is for, tofu or muse.
        forget_set: The set it is for (MUSE: the corpus), or None where that is not known.
    """
    if not place.is_dir():
        if name != "tofu":
            raise EvaluationError(f"--reference {place}: MUSE has no log files: give the folder of a run, or published")
        return read_log(place)
    _, spec = _benchmark(place)
    if spec.name != name or (forget_set is not None and spec.set != forget_set):
        wanted = f"{name} {forget_set}" if forget_set else name
        raise EvaluationError(
            f"--reference {place}: it was scored on {spec.name} {spec.set} and the model on {wanted}: a reference is "
            "scored on the same set"
        )
    scored = place / "benchmark" / "reference"
    if not scored.is_dir():
        raise EvaluationError(
            f"--reference {place}: this run has no retain reference (no benchmark/reference): give one that was run "
            f"with `reference:`{', or a log of TOFU (.json)' if name == 'tofu' else ''}"
        )
    return read_scored(scored, spec)


def read_log(path: Path) -> TofuLog:
    """A log in the layout of TOFU's authors."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file: give a log of TOFU (.json)") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        why = str(error) or type(error).__name__
        raise DataError(f"{path}: not JSON ({why}): give a log of TOFU as its authors' evaluation writes it") from error
    return TofuLog.from_json(data, str(path))


def rows(logs: Mapping[Who, Log], reference: Reference, method: str) -> dict[Who, Row]:
    """Each model's row by the benchmark's own column names, in the order of :data:`WHO`.

    Args:
        logs: What the models scored.
        reference: What they are compared with; it has a row of its own, in place of ``logs["reference"]``. None
            leaves forget quality (TOFU) or PrivLeak (MUSE) None. They are None in the reference's own row too, since
            there is nothing to compare it with, and wherever :func:`absent` says why.
        method: MUSE's name of the edited model.
    """
    compared = {**logs, "reference": reference} if isinstance(reference, TofuLog | MuseLog) else dict(logs)
    found: dict[Who, Row] = {}
    for who in (who for who in WHO if who in compared):
        log = compared[who]
        beside = None if log is reference else reference
        if isinstance(log, TofuLog) and not isinstance(beside, TofuLog | None):
            raise EvaluationError("TOFU has no published value; give a run's folder or a log (.json)")
        if isinstance(log, MuseLog) and isinstance(beside, TofuLog):
            raise EvaluationError("a log of TOFU is no reference for MUSE; give a run's folder")
        suite = SUITES["tofu" if isinstance(log, TofuLog) else "muse"]
        try:
            found[who] = suite.row(log, beside, {"edited": method, "reference": "retrain"}.get(who, who))
        except EvaluationError as error:
            named = f" (found with the {'edited model' if who == 'edited' else who})" if "target" in compared else ""
            raise EvaluationError(f"{error}{named}") from error
    return found


def absent(name: str, reference: Reference) -> str:
    """Why a benchmark's rows lack the figure that compares with a reference; empty where they have it."""
    figure = SUITES[name].figure
    if reference is None:
        return (
            f"{figure} compares with a model that never saw the forget set. Give one as reference: train, a run "
            "folder, a model or, for TOFU, a log."
        )
    if isinstance(reference, MuseLog) and reference.auc == 0:
        return f"{figure} is absent because {ZERO_AUC}."
    return ""


def read_scored(folder: Path, spec: BenchmarkSpec) -> Log:
    """What one model scored, from the samples in a folder."""
    samples, suite = read_samples(folder), SUITES[spec.name]
    if missing := [task for task in suite.tasks(spec.set) if task not in samples]:
        raise EvaluationError(
            f"{folder}: {spec.name} {spec.set} needs tasks that were not run: {', '.join(missing)}; run the recipe "
            "again"
        )
    try:
        return suite.read(samples, spec.set)
    except (DataError, EvaluationError) as error:
        raise type(error)(f"{folder}: {error}") from error


def _whole(value: Any, usual: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else usual


def _nothing_chosen(folder: Path) -> bool:
    """Whether the run is finished and no coefficient passed its rule, so that there is no edited model."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return bool(report["chosen"]["coefficient"] == 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _benchmark(folder: Path) -> tuple[Mapping[str, Any], BenchmarkSpec]:
    """The recipe of a run and its benchmark."""
    path = folder / "resolved.yaml"
    with explained(path):
        if not path.is_file():
            raise RunFolderError(
                f"{folder} is not the folder of a run (it has no resolved.yaml): give one of runs/, or what --out was"
            )
        content = path.read_bytes()
    try:
        recipe: Any = yaml_core.parse(content.decode("utf-8")).data
        given = recipe.get("benchmark")
        spec = None if given is None else BenchmarkSpec.model_validate(given)
    except (yaml_core.YamlSyntaxError, UnicodeDecodeError, AttributeError, ValidationError) as error:
        raise RunFolderError(f"{path}: cannot be read as a recipe, so it is unclear what was scored") from error
    if spec is None:
        raise EvaluationError(
            f"{folder}: this run has no benchmark: add `benchmark: {{name: tofu, set: forget10}}` (or muse: news, "
            "books) to its recipe and run it again"
        )
    return recipe, spec


# -- the files that leaderboards and other frameworks take, each whole or absent

# Our set's name -> how OpenUnlearning's metrics of it begin.
_SHORT = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


def tofu_csv(row: Row, method: str, submitted_by: str) -> str:
    """TOFU's submission: a header and one line, in the authors' columns and order. What is None is left empty."""
    return _csv(TOFU_COLUMNS, [{**row, "Method": _line(method), "Submitted By": _line(submitted_by)}])


def muse_csv(rows: Mapping[Who, Row]) -> str:
    """MUSE's evaluation: a line per model, in the authors' columns and order. What is None is left empty."""
    return _csv(MUSE_COLUMNS, [{**row, "name": _line(str(row["name"]))} for row in rows.values()])


def tofu_summary(log: TofuLog, row: Row) -> dict[str, float]:
    """OpenUnlearning's metrics of TOFU under its names, sorted as it writes them.

    It leaves out what it could not compute, and so does this: without a reference there is no ``forget_quality``.
    """
    named = {"model_utility": row["Model Utility"], "forget_quality": row["Forget Quality"]}
    found = {name: float(value) for name, value in named.items() if value is not None}
    for name, short in _SHORT.items():
        scored = log.sets[name]
        found[f"{short}_Q_A_Prob"] = scored.prob
        found[f"{short}_Q_A_ROUGE"] = float(scored.rouge.mean())
        found[f"{short}_Q_A_PERT_Prob"] = float(np.exp(-scored.perturbed_losses).mean())
        if short in ("forget", "retain"):  # the others have no paraphrase
            found[f"{short}_Q_A_PARA_Prob"] = float(np.exp(-scored.paraphrased_loss).mean())
        else:
            found[f"{short}_Q_A_Prob_normalised"] = scored.prob_choice
        if short == "forget":
            found["forget_truth_ratio"] = scored.truth_ratio_forget
        else:
            found[f"{short}_Truth_Ratio"] = scored.truth_ratio_kept
    return dict(sorted(found.items()))


def muse_summary(row: Row) -> dict[str, float]:
    """OpenUnlearning's metrics of MUSE under its names: ROUGE in [0, 1], ``privleak`` in percent if there is one."""
    names = {"forget_knowmem": "knowmem_f", "forget_verbmem": "verbmem_f", "retain_knowmem": "knowmem_r"}
    found = {f"{ours}_ROUGE": float(row[theirs] or 0) / 100 for ours, theirs in names.items()}
    found |= {} if row["privleak"] is None else {"privleak": float(row["privleak"])}
    return dict(sorted(found.items()))


def write_boards(
    folder: Path, logs: Mapping[Who, Log], rows: Mapping[Who, Row], method: str, submitted_by: str
) -> list[Path]:
    """Write all files of one run, replacing those of an earlier time; returns them in the order written.

    ``tofu.csv`` (of the edited model) or ``muse.csv`` (of all), and for each model in ``rows`` a folder with the
    summary and, for TOFU, the log in the authors' layout.
    """
    texts: dict[str, str] = {}
    objects: dict[str, Mapping[str, object]] = {}
    for who, row in rows.items():
        log = logs[who]
        _finite(row, who)
        if isinstance(log, TofuLog):
            if who == "edited":
                texts["tofu.csv"] = tofu_csv(row, method, submitted_by)
            objects[f"{who}/eval_log_aggregated.json"] = log.to_json()
            objects[f"{who}/TOFU_SUMMARY.json"] = tofu_summary(log, row)
        else:
            texts["muse.csv"] = muse_csv(rows)
            objects[f"{who}/MUSE_SUMMARY.json"] = muse_summary(row)
    with explained(folder):
        for name in (*texts, *objects):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    for name, content in objects.items():
        write_json_atomic(folder / name, content)
    return [folder / name for name in (*texts, *objects)]


def _csv(columns: tuple[str, ...], lines: list[Mapping[str, float | str | None]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([line[name] for name in columns] for line in lines)
    return out.getvalue()


def _finite(row: Row, who: str) -> None:
    """Refuse what JSON and the leaderboards have no way to say."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise EvaluationError(f"{name} of the {who} is {value}: the model is broken, and no leaderboard takes that")


def _line(text: str) -> str:
    """A name on one line. Spreadsheets compute a cell that begins like a formula, so a quote is put before it."""
    line = " ".join(text.split())
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
