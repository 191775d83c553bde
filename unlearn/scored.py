"""The stages that score: the sweep over coefficients on validation items with the choice, and the test items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM

from unlearn import search, tasks
from unlearn.answers import Answers
from unlearn.bisect_search import bisect, may_tie
from unlearn.console import is_main_process, say
from unlearn.data import LoadedSet
from unlearn.distributed import share_requests
from unlearn.early_stop import Values, beyond_doubt, worth_a_look
from unlearn.evaluate import evaluate
from unlearn.metrics import Key, default_metric, forget_metric
from unlearn.models import Loaded
from unlearn.negate import Edit
from unlearn.recipe import ChooseSpec, Recipe, Split
from unlearn.report import Chosen, Example, Score, SweepPoint, TaskScore
from unlearn.rundir import write_json_atomic
from unlearn.samples import complete
from unlearn.scoring import PackedLM
from unlearn.stages import Stages
from unlearn.tasks import TaskSet
from unlearn.vector import TaskVector


@dataclass(frozen=True)
class _Desk:
    """What the items of one split are scored with, the same at every coefficient.

    ``key`` is all that its scores depend on but the coefficient; ``vector`` the digest of what is subtracted.
    """

    split: Split
    lm: HFLM
    tasks: TaskSet
    edit: Edit
    sets: Sequence[LoadedSet]
    key: tuple[Any, ...]
    vector: str


class Scored(Stages):
    """Sweep and test of one run."""

    def sweep(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector
    ) -> tuple[tuple[SweepPoint, ...], Chosen]:
        """Validation scores at every coefficient, or at those the choice needs, each from the pristine weights."""
        spec, rule = self.recipe.sweep, self.recipe.choose
        forget = ("forget", self.recipe.forget.label(), forget_metric(self.recipe))
        _, *grid = spec.grid()
        what = f"{len(grid) + 1} coefficients on validation items"
        if spec.search == "bisect":
            what = f"bisection of {len(grid)} coefficients on validation items"
        with self.announced("sweep", what), Edit(target.model, vector) as edit:
            desk = self._desk("validation", target, sets, vector, edit, self.recipe.eval.generate == "sweep")
            kept = tasks.kept_metrics(self.recipe, desk.tasks)
            points = _Points(self, desk, kept, rule)
            if spec.search == "bisect":
                found = bisect(grid, points.base, points, lambda p: search.left(p, forget), ties=may_tie(forget[2]))
            else:
                found = (points.base, *(points.whole(c) for c in grid))
        chosen = search.choose(found, forget, kept, rule)
        return found, replace(chosen, search=spec.search, grid=tuple(grid))

    def test(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector, chosen: float
    ) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...], tuple[Example, ...]]:
        """Test scores of the target model and at the chosen coefficient, and how both answer a few items."""
        with self.announced("test", "test items, before and after"), Edit(target.model, vector) as edit:
            desk = self._desk("test", target, sets, vector, edit, self.recipe.eval.generate != "none")
            before, after = (self.score(desk, c) for c in (0.0, chosen))
        pairs = zip(_read(before, "completions"), _read(after, "completions"), strict=True)
        examples = tuple(Example(b["set"], b["name"], b["prompt"], b["target"], b["text"], a["text"]) for b, a in pairs)
        return _scores(before), _scores(after), examples

    def score(self, desk: _Desk, coefficient: float, part: TaskSet | None = None, known: Path | None = None) -> Path:
        """Score one coefficient on all items, or on a part of them. The folder of the stage, made or reused.

        Args:
            desk: What to score with.
            coefficient: How much of the vector is subtracted.
            part: The tasks with fewer items. Its folder keeps the model's answers as well.
            known: A folder with answers given at this coefficient; those are not asked for again.
        """
        stage, parts = self._stage(desk, coefficient, part)

        def make(tmp: Path) -> None:
            desk.edit.set(-coefficient)
            if isinstance(desk.lm, PackedLM):
                desk.lm.label = f"λ = {coefficient:g}"
            answers = Answers.load(known / "answers.json") if known else Answers() if part else None
            result = evaluate(
                desk.lm,
                part or desk.tasks,
                model_name=f"{self.recipe.name}@{coefficient:g}",
                bootstrap=self.recipe.eval.bootstrap if desk.split == "test" else 0,
                answers=answers,
            )
            if is_main_process():
                result.save(tmp)
            if part and answers:
                answers.save(tmp / "answers.json")
            texts = complete(desk.lm, desk.sets, self.recipe.eval.examples) if desk.split == "test" else []
            for name, found in (
                ("scores", [asdict(s) for s in result.scores]),
                ("values", [[*key, list(items.items())] for key, items in result.values().items()]),
                ("completions", texts),
            ):
                write_json_atomic(tmp / f"{name}.json", found)

        self.make(stage, parts, make)
        return self.folder.path(stage)

    def is_scored(self, desk: _Desk, coefficient: float) -> bool:
        """Whether all items were scored at a coefficient before."""
        stage, parts = self._stage(desk, coefficient, None)
        return self.folder.finished(stage, self.key(stage, parts)) is not None

    def _stage(self, desk: _Desk, coefficient: float, part: TaskSet | None) -> tuple[str, list[Any]]:
        """Name of a stage, and what it depends on."""
        parts = [*desk.key, desk.vector if coefficient else None, coefficient]
        name = f"eval/{coefficient:g}/{desk.split}"
        return (name, parts) if part is None else (f"{name}-{part.count()}", [*parts, part.samples])

    def _desk(
        self,
        split: Split,
        target: Loaded,
        sets: Sequence[LoadedSet],
        vector: TaskVector,
        edit: Edit,
        generate: bool,
    ) -> _Desk:
        spec = self.recipe.eval
        if spec.engine == "hf":
            # its cache of logits (on by default) scores a text that is cut in two places at the wrong one
            lm = HFLM(
                pretrained=target.model, tokenizer=target.tokenizer, batch_size=spec.batch_size, logits_cache=False
            )
        else:
            lm = PackedLM(target.model, target.tokenizer, spec.batch_tokens, batch_size=spec.batch_size)
        share_requests(lm)
        items = self.folder.path("items")
        built = tasks.build_tasks(sets, split, self.recipe, target.tokenizer, items, generate=generate)
        key = (target.fingerprint, [s.digest for s in sets], spec.model_dump(mode="json"), self.recipe.seed)
        return _Desk(split, lm, built, edit, sets, key, vector.digest())


class _Points:
    """The sweep's points: scores at a coefficient, judged by those at 0, which are taken first."""

    def __init__(self, stages: Scored, desk: _Desk, kept: Sequence[Key], rule: ChooseSpec) -> None:
        self._stages = stages
        self._desk = desk
        self._kept = kept
        self._rule = rule
        start = stages.score(desk, 0.0)
        self._start = _values(start)
        self._answered: dict[float, Path] = {}
        self.base = self._told(search.judge(0.0, _scores(start), _scores(start), kept, rule))

    def whole(self, coefficient: float) -> SweepPoint:
        """On all items."""
        place = self._stages.score(self._desk, coefficient, known=self._answered.get(coefficient))
        return self._told(search.judge(coefficient, _scores(place), self.base.scores, self._kept, self._rule))

    def __call__(self, coefficient: float, share: float) -> SweepPoint | None:
        """What :func:`unlearn.bisect_search.bisect` asks for."""
        if share >= 1:
            return self.whole(coefficient)
        desk, base = self._desk, self.base.scores
        if not worth_a_look(self._start, base, self._kept, share) or self._stages.is_scored(desk, coefficient):
            return None
        part = desk.tasks.part(share, self._stages.recipe.seed)
        place = self._stages.score(desk, coefficient, part, self._answered.get(coefficient))
        self._answered[coefficient] = place
        broken = beyond_doubt(_values(place), self._start, base, self._kept, self._rule)
        if not broken:
            return None
        seen = part.count() / desk.tasks.count()
        return self._told(SweepPoint(coefficient, _scores(place), False, broken, seen))

    def _told(self, point: SweepPoint) -> SweepPoint:
        out = "" if point.within_bound else "   out of bounds"
        some = "" if point.share >= 1 else f", all but certain after {point.share:.0%} of the items"
        say(f"    λ = {point.coefficient:<6g}{_brief(self._stages.recipe, point.scores)}{out}{some}")
        return point


def _read(place: Path, name: str) -> Any:
    return json.loads((place / f"{name}.json").read_text(encoding="utf-8"))


def _scores(place: Path) -> tuple[TaskScore, ...]:
    return tuple(TaskScore(**{**s, "score": Score(**s["score"])}) for s in _read(place, "scores"))


def _values(place: Path) -> dict[Key, Values]:
    return {(s, n, m): {item: (v, w) for item, (v, w) in items} for s, n, m, items in _read(place, "values")}


def _brief(recipe: Recipe, scores: Sequence[TaskScore]) -> str:
    """The metric that stands for each set, on one line."""
    main = {(role, data.label(), default_metric(data.kind)) for role, data in recipe.sets()}
    main |= {(spec.set, spec.task, spec.metric) for spec in recipe.eval.tasks}
    return "  ".join(f"{s.name} {s.metric} {s.score.value:.3g}" for s in scores if s.key in main)
