"""A finished run in experiment trackers, through accelerate's classes: ``report_to`` of a recipe."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unlearn.console import say
from unlearn.recipe.load import leaves
from unlearn.recipe.schema import Recipe
from unlearn.results import RunReport
from unlearn.store.stages import TRACKERS, RunFolder

_RUN = {"wandb": "name", "mlflow": "run_name", "trackio": "name", "swanlab": "experiment_name"}  # a run, in a project


def track(recipe: Recipe, report: RunReport, folder: RunFolder) -> None:
    """Tell every tracker of a run, all at once when it is finished, so that a run with stops is one run there.

    A tracker that fails costs one warning.
    """
    if not recipe.report_to:
        return
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers that it is used
    shutil.rmtree(folder.root / TRACKERS, ignore_errors=True)
    for name in recipe.report_to:
        say(f"    telling {name}")
        try:
            _tell(name, recipe, report, folder.root)
        except Exception as e:
            said = str(e).strip().partition("\n")[0]
            say(f"report_to: {name} failed ({type(e).__name__}: {said}); the report is whole without it", "yellow")


def _tell(name: str, recipe: Recipe, report: RunReport, root: Path) -> None:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    from unlearn.train.trainer import recipe_decides

    kind = LOGGER_TYPE_TO_CLASS[name]
    options: dict[str, Any] = {_RUN[name]: root.name} if name in _RUN else {}
    if kind.requires_logging_directory:
        options["logging_dir"] = root / TRACKERS
    with recipe_decides():  # the environment may hold ranks of processes that are gone
        PartialState()  # what these classes log asks for it
        tracker = kind(recipe.name, **options)
        tracker.start()
        try:
            tracker.store_init_configuration(settings(recipe))
            for step, values in sorted(figures(report).items()):
                tracker.log(values, step=step)
            for file in ("report.json", "report.html"):
                if name == "mlflow":
                    tracker.log_artifact(str(root / file))
                elif name == "wandb":
                    tracker.tracker.log_artifact(str(root / file), name=file, type="report")
        finally:
            tracker.finish()


def settings(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe with its value, as text where it is none of the plain ones."""
    found = leaves(recipe.model_dump(mode="json", exclude={"cluster", "report_to"}))
    plain = {".".join(map(str, path)): value for path, value in found}
    return {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in plain.items()}


def figures(report: RunReport) -> Mapping[int, Mapping[str, float]]:
    """By step, which never falls, as some trackers want it: losses, the sweep by its coefficients' index, results.

    A training's first step is 1. The test rows and the chosen coefficient come one step after the last of all.
    """
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for training in report.training:
        for step, loss in enumerate(training["losses"], 1):
            found[step][f"loss/{training['stage']}"] = loss
    for index, point in enumerate(report.sweep):
        found[index] |= {"sweep/coefficient": point.coefficient, "sweep/within_bound": float(point.within_bound)}
        found[index] |= {f"sweep/{'/'.join(score.key)}": score.score.value for score in point.scores}
    last = found[max(found, default=0) + 1]
    last |= {"chosen/coefficient": report.chosen.coefficient, "chosen/bound_met": float(report.chosen.bound_met)}
    for row in report.scores:
        for when, score in (("before", row.before), ("after", row.after)):
            last[f"{row.split}/{row.set}/{row.name}/{row.metric}/{when}"] = score.value
    return {step: {k: v for k, v in values.items() if math.isfinite(v)} for step, values in found.items()}
