"""A model under an edit, and what it scores: the sweep on validation items, the report on test items."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from unlearn.console import is_main_process, say
from unlearn.data.sets import LoadedSet
from unlearn.errors import BrokenModelError
from unlearn.model.load import Loaded
from unlearn.recipe.data import SetRole, Split
from unlearn.recipe.metrics import goal_metrics
from unlearn.recipe.schema import Recipe
from unlearn.results import Chosen, Example, SweepPoint, TaskScore
from unlearn.score import search, sweep, tasks
from unlearn.score.evaluate import evaluate
from unlearn.score.packed import PackedLM, interface
from unlearn.score.tasks import TaskSet
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store
from unlearn.vector.edit import Edit
from unlearn.vector.task_vector import TaskVector

Goal = tuple[SetRole, str]


@dataclass(frozen=True)
class Questions:
    """What is asked of models: lm-eval's tasks for the validation and the test items of all sets.

    ``scoring`` is what every score of lm-eval's depends on beside: the task pack, and files that tasks were told of.
    """

    sets: Sequence[LoadedSet]
    recipe: Recipe
    validation: TaskSet
    test: TaskSet
    scoring: list[str]

    def tasks(self, split: Split) -> TaskSet:
        """Those of one split."""
        return self.test if split == "test" else self.validation

    def key(self, split: Split) -> list[Any]:
        """What scores on a split depend on beside the model."""
        spec = self.recipe.eval.model_dump(mode="json")
        return [self.tasks(split).digest(), self.scoring, digests(self.sets), spec, self.recipe.seed]


def build_questions(
    recipe: Recipe, sets: Sequence[LoadedSet], tokenizer: Any, items: Path, scoring: list[str]
) -> Questions:
    """Build every task, before anything is trained: what is missing is said then.

    Args:
        items: The folder of the items' files (:func:`unlearn.data.sets.write_items`).
        scoring: See :class:`Questions`.

    Raises:
        EvaluationError: see :func:`unlearn.score.tasks.build_tasks`.
    """

    def build(split: Split, generate: bool) -> TaskSet:
        return tasks.build_tasks(sets, split, recipe, tokenizer, items, generate=generate)

    asked = build("validation", recipe.eval.generate == "sweep"), build("test", recipe.eval.generate != "none")
    if recipe.robustness is not None and recipe.robustness.samples and recipe.eval.generate == "none":
        build("test", True)  # what is sampled is compared by its words as well
    return Questions(sets, recipe, *asked, scoring)


def digests(sets: Iterable[LoadedSet]) -> list[list[str]]:
    """What scores depend on: all sets but the held-out one, which is never scored."""
    return [[s.role, s.name, s.digest] for s in sets if s.role != "holdout"]


def written(sets: Iterable[LoadedSet]) -> list[list[Any]]:
    """What texts that a model writes for the sets depend on: how long they get, and by the prompt where they end."""
    return [[s.role, s.name, s.spec.continuation, s.spec.prompts("test")[0]] for s in sets if s.role != "holdout"]


def score_model(loaded: Loaded, asked: TaskSet, who: str, recipe: Recipe, folder: Path) -> None:
    """Score a model as it is on some tasks; lm-eval's result files and ``scores.json`` go into the folder."""
    lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
    _score(lm, asked, who, f"{recipe.name}-{who}", recipe.eval.bootstrap, folder)


def _score(lm: HFLM, asked: TaskSet, label: str, name: str, bootstrap: int, folder: Path) -> None:
    if isinstance(lm, PackedLM):
        lm.label = label
    result = evaluate(lm, asked, model_name=name, bootstrap=bootstrap)
    if is_main_process():
        result.save(folder)
    write_json_atomic(folder / "scores.json", [asdict(s) for s in result.scores])


class Scorer:
    """Scores of one model under vectors and coefficients, each taken from the pristine weights and kept as a stage.

    Scores at 0, at which all others are judged, are taken first where points are asked for.
    """

    def __init__(self, target: Loaded, questions: Questions, store: Store) -> None:
        self._target, self._questions, self._store = target, questions, store
        self._recipe = questions.recipe
        self._lm = interface(target.model, target.tokenizer, self._recipe.eval)
        self._goals = goal_metrics(self._recipe)
        self._kept = tasks.kept_metrics(self._recipe, questions.validation)

    def scores(self, edit: Edit | None, vector: str, coefficient: float, split: Split, under: str = "eval") -> Path:
        """The folder with the scores of a split under θ − coefficient · τ, made or found again.

        Args:
            edit: The vector on the target model; none is needed at 0.
            vector: Its digest.
            under: Where a new stage lies in the run's folder. Its key does not depend on it.
        """
        asked, recipe = self._questions.tasks(split), self._recipe

        def make(tmp: Path) -> None:
            if edit is not None:
                edit.set(-coefficient)
            name, last = f"{recipe.name}@{coefficient:g}", split == "test"
            _score(self._lm, asked, f"λ = {coefficient:g}", name, recipe.eval.bootstrap if last else 0, tmp)
            texts = sweep.complete(self._lm, self._questions.sets, recipe.eval.examples) if last else []
            write_json_atomic(tmp / "completions.json", texts)

        inputs = [self._target.fingerprint, *self._questions.key(split)]
        inputs += written(self._questions.sets) if split == "test" else []
        inputs += [vector if coefficient else None, coefficient]
        name = f"{coefficient:g}/{split}"
        return self._store.stage(f"{under if coefficient else 'eval'}/{name}", inputs, make, kind=f"eval/{name}")

    @functools.cached_property
    def start(self) -> SweepPoint:
        """The validation scores at 0.

        Raises:
            EvaluationError: they leave nothing to choose by, see :func:`unlearn.score.search.require_grounds`.
        """
        found = sweep.scores(self.scores(None, "", 0.0, "validation"))
        start = self._said(search.judge(0.0, found, found, self._kept, self._recipe.choose))
        for key, why in search.require_grounds(start, self._goals, self._kept, self._recipe.choose).items():
            say(f"    ! {search.say_key(key)} {why}", style="yellow")
        return start

    def point(self, edit: Edit, vector: str, coefficient: float, under: str = "eval", says: str = "") -> SweepPoint:
        """The validation scores at a coefficient, judged by those at 0."""
        start, rule = self.start, self._recipe.choose
        try:
            place = self.scores(edit, vector, coefficient, "validation", under)
        except BrokenModelError:
            return self._said(SweepPoint(coefficient, (), False, collapsed=search.BROKEN), says)
        return self._said(search.judge(coefficient, sweep.scores(place), start.scores, self._kept, rule), says)

    def sweep(self, vector: TaskVector) -> tuple[tuple[SweepPoint, ...], Chosen]:
        """Validation scores at every coefficient, or at those the choice needs, and the choice."""
        _, *grid = self._recipe.sweep.grid()
        found: tuple[SweepPoint, ...] = (self.start,)
        with Edit(self._target.model, vector) as edit:
            digest = vector.digest()
            if self._recipe.sweep.search == "bisect":
                found = self._bisect(grid, lambda c: self.point(edit, digest, c))
            else:
                found += tuple(self.point(edit, digest, c) for c in grid)
        chosen = search.choose(found, self._goals, self._kept, self._recipe.choose)
        return found, replace(chosen, search=self._recipe.sweep.search, grid=tuple(grid))

    def balance(self, parts: Mapping[Goal, TaskVector]) -> Mapping[Goal, float]:
        """Relative weights of what is subtracted for each goal, found on validation items; the largest is 1.

        A single part has weight 1, and nothing is scored. What is scored here is not scored again by the sweep.
        """
        if len(parts) == 1:
            return dict.fromkeys(parts, 1.0)
        _, *grid = self._recipe.sweep.grid()
        names, start = sorted(parts), self.start

        @functools.cache
        def point(coefficients: tuple[float, ...]) -> SweepPoint:
            scale = max(coefficients)
            vector = search.direction(parts, {n: c / scale for n, c in zip(names, coefficients, strict=True)})
            says = ", ".join(f"{name} {c:g}" for (_, name), c in zip(names, coefficients, strict=True))
            with Edit(self._target.model, vector) as edit:
                digest = vector.digest()
                return self.point(edit, digest, scale, f"joint/{digest[:16]}", says)

        def better(a: SweepPoint, b: SweepPoint) -> bool:
            return search.remaining(a, self._goals, start) < search.remaining(b, self._goals, start)

        seen = None
        if self._recipe.sweep.search == "bisect":
            seen = [p.coefficient for p in self._bisect(grid, lambda c: point((c,) * len(names)))]
        weights, trail = search.balance(names, grid, point, better, seen)
        found = [[list(t.coefficients), self._left(t.point), t.point.within_bound] for t in trail]
        inputs = [self._target.fingerprint, self._questions.key("validation")]
        inputs += [[parts[n].digest() for n in names], found]
        what = {"names": names, "tried": found}
        self._store.stage("joint/trail", inputs, lambda tmp: write_json_atomic(tmp / "trail.json", what))
        return weights

    def test(
        self, vector: TaskVector, chosen: float
    ) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...], tuple[Example, ...]]:
        """Test scores of the target model and at the chosen coefficient, and how both answer a few items."""
        with Edit(self._target.model, vector) as edit:
            before, after = (self.scores(edit, vector.digest(), c, "test") for c in (0.0, chosen))
        texts = [json.loads((place / "completions.json").read_text(encoding="utf-8")) for place in (before, after)]
        examples = tuple(
            Example(b["set"], b["name"], b["prompt"], b["target"], b["text"], a["text"])
            for b, a in zip(*texts, strict=True)
        )
        return sweep.scores(before), sweep.scores(after), examples

    def _bisect(self, grid: Sequence[float], point: Callable[[float], SweepPoint]) -> tuple[SweepPoint, ...]:
        ties = all(search.may_tie(key[2]) for key in self._goals)
        return search.bisect(grid, self.start, point, self._left, ties=ties)

    def _left(self, point: SweepPoint) -> float:
        return search.remaining(point, self._goals, self.start)

    def _said(self, point: SweepPoint, says: str = "") -> SweepPoint:
        say(sweep.point_line(self._recipe, point, says))
        return point
