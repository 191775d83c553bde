"""What a scoring stage keeps beside lm-eval's files: scores and a few texts, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unlearn.metrics import KEPT, Key, default_metric, goal_metrics
from unlearn.recipe import Recipe
from unlearn.report import Score, SweepPoint, TaskScore


def read(place: Path, name: str) -> Any:
    """One of a stage's files."""
    return json.loads((place / f"{name}.json").read_text(encoding="utf-8"))


def scores(place: Path) -> tuple[TaskScore, ...]:
    """All scores of a stage."""
    return tuple(TaskScore(**{**s, "score": Score(**s["score"])}) for s in read(place, "scores"))


def told(recipe: Recipe, point: SweepPoint, says: str = "") -> str:
    """A point on one line: the metric that stands for each set, and what is wrong.

    Args:
        says: In place of the coefficient, where several vectors have one each.
    """
    where = f"{says}  " if says and point.coefficient else f"λ = {point.coefficient:<6g}"
    if point.collapsed:
        return f"    {where}{_brief(recipe, point.scores)}   collapsed: {point.collapsed}"
    out = "" if point.within_bound else "   out of bounds"
    return f"    {where}{_brief(recipe, point.scores)}{out}"


def _brief(recipe: Recipe, found: tuple[TaskScore, ...]) -> str:
    main: set[Key] = {(role, data.label(), default_metric(data.kind)) for role, data in recipe.sets() if role in KEPT}
    main |= set(goal_metrics(recipe))
    main |= {(spec.set, spec.task, spec.metric) for spec in recipe.eval.tasks}
    return "  ".join(f"{s.name} {s.metric} {s.score.value:.3g}" for s in found if s.key in main)
