"""The files that leaderboards and other frameworks take, each whole or absent.

- TOFU (2401.06121): the CSV of a submission, and ``eval_log_aggregated.json``, from which the authors' own aggregator
  computes that CSV.
- MUSE (2407.06460): the CSV of its evaluation, a line per model.
- OpenUnlearning: ``TOFU_SUMMARY.json`` and ``MUSE_SUMMARY.json``, one object of {metric: number} under its names.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from unlearn.atomic import explained, write_json_atomic, write_text_atomic
from unlearn.benchmarks import muse, tofu
from unlearn.benchmarks.tofu import TofuLog
from unlearn.board_runs import Log, Row
from unlearn.errors import EvaluationError
from unlearn.report import Who

# Our set's name -> how OpenUnlearning's metrics of it begin.
_SHORT = {"forget": "forget", "retain": "retain", "real_authors": "ra", "world_facts": "wf"}


def tofu_csv(row: Mapping[str, float | str | None], method: str, submitted_by: str) -> str:
    """TOFU's submission: a header and one line, in the authors' columns and order. What is None is left empty."""
    whole = {**row, "Method": _line(method), "Submitted By": _line(submitted_by)}
    return _csv(tofu.COLUMNS, [whole])


def muse_csv(rows: Mapping[Who, Row]) -> str:
    """MUSE's evaluation: a line per model, in the authors' columns and order. What is None is left empty."""
    return _csv(muse.COLUMNS, [{**row, "name": _line(str(row["name"]))} for row in rows.values()])


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
        rows: As :func:`unlearn.board_runs.rows` gives them.

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
