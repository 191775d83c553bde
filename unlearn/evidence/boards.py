"""What runs scored on a published benchmark, computed again from their per-item files alone.

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
from unlearn.evidence import benchmarks as muse
from unlearn.evidence import benchmarks as tofu
from unlearn.evidence.benchmarks import MuseLog, TofuLog, read_samples
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.evaluation import BenchmarkSpec
from unlearn.results import Who
from unlearn.store.files import explained, write_json_atomic, write_text_atomic

Log = TofuLog | MuseLog
Row = dict[str, float | str | None]

WHO: tuple[Who, ...] = ("target", "edited", "reference")
PUBLISHED = "published"  # as a reference: MUSE's authors' value
_KEPT = ("retain", "real_authors", "world_facts")  # TOFU's sets beside the forget set
_MUSE = ("verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout")


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


def tasks_of(spec: BenchmarkSpec) -> tuple[str, ...]:
    """The tasks in ``eval/`` that a benchmark's row is computed from."""
    if spec.name == "tofu":
        return tuple(f"tofu_{name}_{part}" for name in (spec.set, *_KEPT) for part in ("prob", "rouge"))
    return tuple(f"muse_{spec.set}_{part}" for part in _MUSE)


def read_run(folder: Path) -> BenchRun:
    """Read the run's benchmark.

    Raises:
        RunFolderError: the folder is no run's, or cannot be read.
        EvaluationError: the run has no benchmark, is not finished, or did not run all of the benchmark's tasks.
        DataError: a file with samples is missing or damaged.
    """
    recipe, spec = _benchmark(folder)
    there = [who for who in WHO if (folder / "benchmark" / who).is_dir()]
    needed = ("target",) if _nothing_chosen(folder) else ("target", "edited")
    if absent := [who for who in needed if who not in there]:
        which = " and ".join("the edited model" if who == "edited" else f"the {who}" for who in absent)
        raise EvaluationError(
            f"{folder}: {which} was not scored on {spec.name} {spec.set} (no benchmark/{absent[0]}): run the recipe "
            "to its end"
        )
    logs = {who: read_scored(folder / "benchmark" / who, spec) for who in there}
    name = str(recipe.get("name") or folder.resolve().name)
    settings = recipe.get("eval")
    resamples = settings.get("bootstrap") if isinstance(settings, Mapping) else None
    return BenchRun(folder, name, spec, logs, _whole(resamples, 1000), _whole(recipe.get("seed"), 0))


def read_reference(place: Path, name: str, forget_set: str | None = None) -> Log:
    """The retain reference: of a run, or a log in the layout of TOFU's authors.

    Args:
        place: A run's folder, whose ``benchmark/reference`` counts, or a ``.json`` file.
        name: The benchmark it is for, tofu or muse.
        forget_set: The set it is for (MUSE: the corpus), or None where that is not known.

    Raises:
        RunFolderError, EvaluationError, DataError: as :func:`read_run`; also when it is of another benchmark or set.
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
    """A log in the layout of TOFU's authors.

    Raises:
        DataError: there is no such file, it is not JSON, or has not what such a log has.
    """
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


def rows(logs: Mapping[Who, Log], reference: Log | Literal["published"] | None, method: str) -> dict[Who, Row]:
    """Each model's row by the benchmark's own column names, in the order of :data:`WHO`.

    Args:
        logs: What the models scored.
        reference: What they are compared with; it has a row of its own, in place of ``logs["reference"]``. None
            leaves forget quality (TOFU) or PrivLeak (MUSE) None. They are None in the reference's own row too, since
            there is nothing to compare it with, and wherever :func:`absent` says why.
        method: MUSE's name of the edited model.

    Raises:
        EvaluationError: the reference does not fit, or is one of the models.
    """
    compared = {**logs, "reference": reference} if isinstance(reference, TofuLog | MuseLog) else dict(logs)
    found: dict[Who, Row] = {}
    for who in WHO:
        log = compared.get(who)
        against = None if log is reference else reference
        try:
            if isinstance(log, TofuLog):
                if against is not None and not isinstance(against, TofuLog):
                    raise EvaluationError("TOFU has no published value; give a run's folder or a log (.json)")
                found[who] = {**tofu.tofu_row(log, against)}
            elif isinstance(log, MuseLog):
                if isinstance(against, TofuLog):
                    raise EvaluationError("a log of TOFU is no reference for MUSE; give a run's folder")
                found[who] = muse.muse_row(log, {"edited": method, "reference": "retrain"}.get(who, who), against)
        except EvaluationError as error:
            whom = f" (found with the {'edited model' if who == 'edited' else who})" if "target" in compared else ""
            raise EvaluationError(f"{error}{whom}") from error
    return found


def absent(name: str, reference: Log | Literal["published"] | None) -> str:
    """Why a benchmark's rows lack the figure that compares with a reference; empty where they have it."""
    figure = "Forget quality" if name == "tofu" else "PrivLeak"
    if reference is None:
        return (
            f"{figure} compares with a model that never saw the forget set. Give one as reference: train, a run "
            "folder, a model or, for TOFU, a log."
        )
    if isinstance(reference, MuseLog) and reference.auc == 0:
        return f"{figure} is absent because {muse.ZERO_AUC}."
    return ""


def read_scored(folder: Path, spec: BenchmarkSpec) -> Log:
    """What one model scored, from the samples in a folder.

    Raises:
        EvaluationError: not all of the benchmark's tasks were run.
        DataError: a file is missing or damaged.
    """
    samples = read_samples(folder)
    if absent := [task for task in tasks_of(spec) if task not in samples]:
        raise EvaluationError(
            f"{folder}: {spec.name} {spec.set} needs tasks that were not run: {', '.join(absent)}; run the recipe again"
        )
    try:
        if spec.name == "tofu":
            return TofuLog.from_samples(samples, spec.set)
        return MuseLog.from_samples(samples, "news" if spec.set == "news" else "books")
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
    """The recipe and its benchmark.

    Raises:
        RunFolderError: the folder is no run's, or its recipe cannot be read.
        EvaluationError: the recipe has no benchmark.
    """
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


def tofu_csv(row: Mapping[str, float | str | None], method: str, submitted_by: str) -> str:
    """TOFU's submission: a header and one line, in the authors' columns and order. What is None is left empty."""
    whole = {**row, "Method": _line(method), "Submitted By": _line(submitted_by)}
    return _csv(tofu.TOFU_COLUMNS, [whole])


def muse_csv(rows: Mapping[Who, Row]) -> str:
    """MUSE's evaluation: a line per model, in the authors' columns and order. What is None is left empty."""
    return _csv(muse.MUSE_COLUMNS, [{**row, "name": _line(str(row["name"]))} for row in rows.values()])


def tofu_summary(log: TofuLog, row: Mapping[str, float | str | None]) -> dict[str, float]:
    """OpenUnlearning's metrics of TOFU under its names, sorted as it writes them.

    It leaves out what it could not compute, and so does this: without a reference there is no ``forget_quality``.
    """
    found: dict[str, float] = {"model_utility": _number(row["Model Utility"])}
    if row["Forget Quality"] is not None:
        found["forget_quality"] = _number(row["Forget Quality"])
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


def muse_summary(row: Mapping[str, float | str | None]) -> dict[str, float]:
    """OpenUnlearning's metrics of MUSE under its names: ROUGE in [0, 1], ``privleak`` in percent if there is one."""
    found = {
        "forget_knowmem_ROUGE": _number(row["knowmem_f"]) / 100,
        "forget_verbmem_ROUGE": _number(row["verbmem_f"]) / 100,
        "retain_knowmem_ROUGE": _number(row["knowmem_r"]) / 100,
    }
    if row["privleak"] is not None:
        found["privleak"] = _number(row["privleak"])
    return dict(sorted(found.items()))


def write_boards(
    folder: Path, logs: Mapping[Who, Log], rows: Mapping[Who, Row], method: str, submitted_by: str
) -> list[Path]:
    """Write all files of one run, replacing those of an earlier time.

    Args:
        folder: Where to; made if missing. ``tofu.csv`` (of the edited model) or ``muse.csv`` (of all), and per model a
            folder with the summary and, for TOFU, the log in the authors' layout.
        logs: Of the models in ``rows``; others are not written.
        rows: As :func:`unlearn.evidence.boards.rows` gives them.

    Returns:
        The files, in the order written.

    Raises:
        EvaluationError: a number is not finite.
        RunFolderError: the place cannot be written.
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


def _number(value: float | str | None) -> float:
    if isinstance(value, str) or value is None:
        raise TypeError(f"a number was expected here: {value!r}")
    return float(value)


def _finite(row: Row, who: str) -> None:
    """Refuse what JSON and the leaderboards have no way to say."""
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise EvaluationError(f"{name} of the {who} is {value}: the model is broken, and no leaderboard takes that")


def _line(text: str) -> str:
    """A name on one line. Spreadsheets compute a cell that begins like a formula, so a quote is put before it."""
    line = " ".join(text.split())
    return f"'{line}" if line.startswith(("=", "+", "-", "@")) else line
