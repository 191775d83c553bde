"""The stages that score: coefficients of several vectors, the sweep on validation items with the choice, test items."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from unlearn import joint, references, score_files, search, tasks
from unlearn.bisect_search import bisect, may_tie
from unlearn.collapse import BROKEN
from unlearn.console import is_main_process, say
from unlearn.data import LoadedSet
from unlearn.errors import BrokenModelError
from unlearn.evaluate import evaluate
from unlearn.metrics import Key, goal_metrics
from unlearn.models import Loaded
from unlearn.negate import Edit
from unlearn.pool import Pool
from unlearn.recipe import ChooseSpec, Recipe, SetRole, Split
from unlearn.report import Chosen, Example, SweepPoint, TaskScore
from unlearn.rundir import RunFolder, write_json_atomic
from unlearn.samples import complete
from unlearn.scoring import PackedLM, interface
from unlearn.stage import STAGE_FILE
from unlearn.stages import Stages, digests, written
from unlearn.tasks import TaskSet
from unlearn.vector import TaskVector


@dataclass(frozen=True)
class _Desk:
    """What the items of one split are scored with, the same at every coefficient.

    ``key`` is all that its scores depend on but the coefficient; ``vector`` the digest of what is subtracted. A
    combination of vectors has a ``place`` of its own and says which one it is.
    """

    split: Split
    lm: HFLM
    tasks: TaskSet
    edit: Edit
    sets: Sequence[LoadedSet]
    key: tuple[Any, ...]
    vector: str
    place: str = "eval"
    says: str = ""


class Scored(Stages):
    """Balance, sweep and test of one run."""

    def __init__(self, recipe: Recipe, base: Path, folder: RunFolder, pool: Pool | None = None) -> None:
        super().__init__(recipe, base, folder, pool)
        self._twins: dict[tuple[str, float], Path] = {}  # validation scores that the balance took, by vector
        self._built: dict[tuple[Split, bool], TaskSet] = {}

    def balance(
        self, target: Loaded, sets: Sequence[LoadedSet], parts: Mapping[tuple[SetRole, str], TaskVector]
    ) -> Mapping[tuple[SetRole, str], float]:
        """Relative weights of what is subtracted for each goal, found on validation items; the largest is 1.

        A single part has weight 1, and nothing is scored. What is scored here is not scored again by the sweep.
        """
        if len(parts) == 1:
            return dict.fromkeys(parts, 1.0)
        _, *grid = self.recipe.sweep.grid()
        goals, names = goal_metrics(self.recipe), sorted(parts)
        equal = joint.direction(parts, dict.fromkeys(parts, 1.0))
        with self.announced("balance", f"coefficients of {len(parts)} vectors, together, on validation items"):
            with Edit(target.model, equal) as edit:
                desk = self._desk("validation", target, sets, equal, edit, self.recipe.eval.generate == "sweep")
                points = _Points(self, desk, goals, tasks.kept_metrics(self.recipe, desk.tasks), self.recipe.choose)

            def left(point: SweepPoint) -> float:
                return search.left(point, goals, points.base)

            @functools.cache
            def score(coefficients: tuple[float, ...]) -> SweepPoint:
                scale = max(coefficients)
                vector = joint.direction(parts, {n: c / scale for n, c in zip(names, coefficients, strict=True)})
                digest = vector.digest()
                says = ", ".join(f"{name} {c:g}" for (_, name), c in zip(names, coefficients, strict=True))
                with Edit(target.model, vector) as edit:
                    there = replace(desk, edit=edit, vector=digest, place=f"joint/{digest[:16]}", says=says)
                    point = points.at(there)(scale)
                    self._twins[digest, scale] = self.folder.path(self._stage(there, scale)[0])
                return point

            def diagonal(coefficient: float) -> SweepPoint:
                return score((coefficient,) * len(names))

            seen = None
            if self.recipe.sweep.search == "bisect":
                ties = all(may_tie(key[2]) for key in goals)
                seen = [p.coefficient for p in bisect(grid, points.base, diagonal, left, ties=ties)]
            weights, trail = joint.balance(names, grid, score, lambda a, b: left(a) < left(b), seen)
            found = [[list(t.coefficients), left(t.point), t.point.within_bound] for t in trail]
            self.make(
                "joint/trail",
                [desk.key, [parts[name].digest() for name in names], found],
                lambda tmp: write_json_atomic(tmp / "trail.json", {"names": names, "tried": found}),
            )
        return weights

    def sweep(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector
    ) -> tuple[tuple[SweepPoint, ...], Chosen]:
        """Validation scores at every coefficient, or at those the choice needs, each from the pristine weights."""
        spec, rule = self.recipe.sweep, self.recipe.choose
        goals = goal_metrics(self.recipe)
        _, *grid = spec.grid()
        what = f"{len(grid) + 1} coefficients on validation items"
        if spec.search == "bisect":
            what = f"bisection of {len(grid)} coefficients on validation items"
        with self.announced("sweep", what), Edit(target.model, vector) as edit:
            desk = self._desk("validation", target, sets, vector, edit, self.recipe.eval.generate == "sweep")
            kept = tasks.kept_metrics(self.recipe, desk.tasks)
            points = _Points(self, desk, goals, kept, rule)
            if spec.search == "bisect":
                ties = all(may_tie(key[2]) for key in goals)
                found = bisect(grid, points.base, points, lambda p: search.left(p, goals, points.base), ties=ties)
            else:
                found = (points.base, *(points(c) for c in grid))
        chosen = search.choose(found, goals, kept, rule)
        return found, replace(chosen, search=spec.search, grid=tuple(grid))

    def test(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector, chosen: float
    ) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...], tuple[Example, ...]]:
        """Test scores of the target model and at the chosen coefficient, and how both answer a few items."""
        with self.announced("test", "test items, before and after"), Edit(target.model, vector) as edit:
            desk = self._desk("test", target, sets, vector, edit, self.recipe.eval.generate != "none")
            before, after = (self.score(desk, c) for c in (0.0, chosen))
        pairs = zip(score_files.read(before, "completions"), score_files.read(after, "completions"), strict=True)
        examples = tuple(Example(b["set"], b["name"], b["prompt"], b["target"], b["text"], a["text"]) for b, a in pairs)
        return score_files.scores(before), score_files.scores(after), examples

    def score(self, desk: _Desk, coefficient: float) -> Path:
        """Score one coefficient. The folder of the stage, made or reused."""
        stage, parts, kind = self._stage(desk, coefficient)

        def make(tmp: Path) -> None:
            twin = self._twin(desk, coefficient)
            if twin is not None:
                if is_main_process():
                    shutil.copytree(twin, tmp, ignore=shutil.ignore_patterns(STAGE_FILE), dirs_exist_ok=True)
                return
            desk.edit.set(-coefficient)
            if isinstance(desk.lm, PackedLM):
                desk.lm.label = f"λ = {coefficient:g}"
            result = evaluate(
                desk.lm,
                desk.tasks,
                model_name=f"{self.recipe.name}@{coefficient:g}",
                bootstrap=self.recipe.eval.bootstrap if desk.split == "test" else 0,
            )
            if is_main_process():
                result.save(tmp)
            texts = complete(desk.lm, desk.sets, self.recipe.eval.examples) if desk.split == "test" else []
            write_json_atomic(tmp / "scores.json", [asdict(s) for s in result.scores])
            write_json_atomic(tmp / "completions.json", texts)

        self.make(stage, parts, make, kind)
        return self.folder.path(stage)

    def _twin(self, desk: _Desk, coefficient: float) -> Path | None:
        """The stage with the same scores that the balance made."""
        wanted = desk.split == "validation" and desk.place == "eval"
        return self._twins.get((desk.vector, coefficient)) if wanted else None

    def _stage(self, desk: _Desk, coefficient: float) -> tuple[str, list[Any], str]:
        """Name of a stage, what it depends on, and the name that its key has wherever it lies."""
        parts = [*desk.key, desk.vector if coefficient else None, coefficient]
        name = f"{coefficient:g}/{desk.split}"
        return f"{desk.place if coefficient else 'eval'}/{name}", parts, f"eval/{name}"

    def built(self, split: Split, sets: Sequence[LoadedSet], tokenizer: Any, generate: bool) -> TaskSet:
        """All that is scored on one split, built the first time it is asked for: before anything is trained.

        Raises:
            EvaluationError: see :func:`unlearn.tasks.build_tasks`.
        """
        if (split, generate) not in self._built:
            items = self.folder.path("items")
            self._built[split, generate] = tasks.build_tasks(
                sets, split, self.recipe, tokenizer, items, generate=generate
            )
        return self._built[split, generate]

    def asked(self, built: TaskSet, sets: Sequence[LoadedSet]) -> list[Any]:
        """What scores depend on beside the model: what is asked, and how it is scored."""
        spec = self.recipe.eval.model_dump(mode="json")
        return [built.digest(), self.scoring, digests(sets), spec, self.recipe.seed]

    @functools.cached_property
    def scoring(self) -> list[str]:
        """What every score of lm-eval's depends on: the task pack, and files that tasks were told of."""
        return [references.pack_digest(), *map(references.content, references.task_files(self.recipe))]

    def lm(self, loaded: Loaded) -> HFLM:
        """lm-eval's interface to a model, by the recipe's engine."""
        return interface(loaded.model, loaded.tokenizer, self.recipe.eval)

    def _desk(
        self,
        split: Split,
        target: Loaded,
        sets: Sequence[LoadedSet],
        vector: TaskVector,
        edit: Edit,
        generate: bool,
    ) -> _Desk:
        lm = self.lm(target)
        built = self.built(split, sets, target.tokenizer, generate)
        key = (target.fingerprint, *self.asked(built, sets), *(written(sets) if split == "test" else []))
        return _Desk(split, lm, built, edit, sets, key, vector.digest())


class _Points:
    """The sweep's points: scores at a coefficient, judged by those at 0, which are taken first.

    Raises:
        EvaluationError: the scores at 0 leave nothing to choose by, see :func:`unlearn.search.require_grounds`.
    """

    def __init__(
        self, stages: Scored, desk: _Desk, goals: Sequence[Key], kept: Sequence[Key], rule: ChooseSpec
    ) -> None:
        self._stages = stages
        self._desk = desk
        self._kept = kept
        self._rule = rule
        start = stages.score(desk, 0.0)
        self.base = self._told(search.judge(0.0, score_files.scores(start), score_files.scores(start), kept, rule))
        for key, why in search.require_grounds(self.base, goals, kept, rule).items():
            say(f"    ! {search.say_key(key)} {why}", style="yellow")

    def at(self, desk: _Desk) -> _Points:
        """The same for another vector, judged by the same start."""
        other = copy.copy(self)
        other._desk = desk
        return other

    def __call__(self, coefficient: float) -> SweepPoint:
        try:
            place = self._stages.score(self._desk, coefficient)
        except BrokenModelError:
            return self._told(SweepPoint(coefficient, (), False, collapsed=BROKEN))
        return self._told(
            search.judge(coefficient, score_files.scores(place), self.base.scores, self._kept, self._rule)
        )

    def _told(self, point: SweepPoint) -> SweepPoint:
        say(score_files.told(self._stages.recipe, point, self._desk.says))
        return point
