"""A few greedy completions, to show a person what a model says before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from unlearn.data.encoding import count_tokens
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet
from unlearn.recipe.data import stops
from unlearn.recipe.metrics import KEPT, Key, default_metric, goal_metrics
from unlearn.recipe.schema import Recipe
from unlearn.results import Score, SweepPoint, TaskScore
from unlearn.score.silence import quiet_harness

_MCQ_TOKENS = 10  # or as many as the answer has


def complete(lm: HFLM, sets: Sequence[LoadedSet], count: int) -> list[dict[str, str]]:
    """``set``, ``name``, ``prompt``, ``target`` and greedy ``text`` of the first ``count`` test items of every set.

    A text ends, as where ROUGE is taken, at the first stop that is no part of the right answer.
    """
    chosen = [(s, item) for s in sets if s.role != "holdout" for item in s.test[:count]]
    requests = [Instance("generate_until", {}, (item.prompt, _how(lm, s, item)), 0) for s, item in chosen]
    if not requests:
        return []
    with quiet_harness():
        texts = lm.generate_until(requests)
    return [
        {"set": s.role, "name": s.name, "prompt": item.prompt, "target": item.target, "text": text.strip()}
        for (s, item), text in zip(chosen, texts, strict=True)
    ]


def _how(lm: HFLM, loaded: LoadedSet, item: Item) -> dict[str, Any]:
    kind, tokens = loaded.spec.kind, loaded.spec.continuation
    until = ["\n\n"] if kind == "text" else stops(loaded.spec.prompts("test")[0])
    if kind == "mcq":
        until.append(".")
        tokens = max(_MCQ_TOKENS, count_tokens(lm.tokenizer, item.prompt, f" {item.target}"))
    return {"until": [s for s in until if s not in item.target], "max_gen_toks": tokens, "do_sample": False}


# -- what a scoring stage keeps beside lm-eval's files


def read(place: Path, name: str) -> Any:
    """One of a stage's files."""
    return json.loads((place / f"{name}.json").read_text(encoding="utf-8"))


def scores(place: Path) -> tuple[TaskScore, ...]:
    """All scores of a stage."""
    return tuple(TaskScore(**{**s, "score": Score(**s["score"])}) for s in read(place, "scores"))


def point_line(recipe: Recipe, point: SweepPoint, says: str = "") -> str:
    """A point on one line: the metric that stands for each set, and what is wrong.

    ``says`` stands in place of the coefficient, where several vectors have one each.
    """
    main: set[Key] = {(role, data.label(), default_metric(data.kind)) for role, data in recipe.sets() if role in KEPT}
    main |= {*goal_metrics(recipe), *((spec.set, spec.task, spec.metric) for spec in recipe.eval.tasks)}
    values = "  ".join(f"{s.name} {s.metric} {s.score.value:.3g}" for s in point.scores if s.key in main)
    where = f"{says}  " if says and point.coefficient else f"λ = {point.coefficient:<6g}"
    wrong = f"   collapsed: {point.collapsed}" if point.collapsed else "" if point.within_bound else "   out of bounds"
    return f"    {where}{values}{wrong}"
