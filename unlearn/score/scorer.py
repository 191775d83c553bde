"""A model under an edit, and what it scores: the sweep on validation items, the report on test items."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch.nn import functional

from unlearn.console import is_main_process, say
from unlearn.data.chat import Chat
from unlearn.data.encoding import encode_item, encode_pair, spaces_before
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet, plainly
from unlearn.errors import BrokenModelError
from unlearn.model.load import Loaded
from unlearn.recipe.data import SetRole, Split
from unlearn.recipe.schema import Key, Recipe, goal_metrics, kept_metrics
from unlearn.results import Chosen, Example, Fluency, Score, SweepPoint, TaskScore
from unlearn.score import search, tasks
from unlearn.score.evaluate import evaluate
from unlearn.score.packed import WholeLM, interface
from unlearn.score.tasks import TaskSet, quiet_harness
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store
from unlearn.text import percent
from unlearn.train.batches import Pad
from unlearn.train.losses import answer_logits
from unlearn.vector.edit import Edit
from unlearn.vector.task_vector import TaskVector

Goal = tuple[SetRole, str]
Compared = tuple[tuple[TaskScore, ...], tuple[TaskScore, ...], tuple[Example, ...]]  # before, after, and some answers
_RUN = 4  # tokens that are looked for again
_SPACED = 8  # items of a set on which is looked what a template has before an answer
_MCQ_TOKENS = 10  # of a completion, or as many as the answer has


# -- what is asked


@dataclass(frozen=True)
class Questions:
    """What is asked of models: lm-eval's tasks for the validation and the test items of all sets.

    ``scoring`` is what every score of lm-eval's depends on beside: the task pack, and files that tasks were told of.
    ``kept`` is what the search is bound by; nothing where an edited model is given, which needs none.
    """

    sets: Sequence[LoadedSet]
    recipe: Recipe
    validation: TaskSet
    test: TaskSet
    scoring: list[str]
    kept: tuple[Key, ...]

    def tasks(self, split: Split) -> TaskSet:
        """Those of one split."""
        return self.test if split == "test" else self.validation

    def key(self, split: Split) -> list[Any]:
        """What scores on a split depend on beside the model."""
        return [self.tasks(split).digest(), self.scoring, digests(self.sets), self.recipe.eval, self.recipe.seed]


def build_questions(
    recipe: Recipe,
    sets: Sequence[LoadedSet],
    tokenizer: Any,
    items: Path,
    scoring: list[str],
    chat: Chat | None = None,
) -> Questions:
    """Build every task before anything is trained, so that what is missing is said then; its items go to ``items``."""

    def build(split: Split, generate: bool) -> TaskSet:
        asked = plainly(sets) if split == "test" else sets
        return tasks.build_tasks(asked, split, recipe, tokenizer, items, generate=generate, chat=chat)

    asked = build("validation", recipe.eval.generate == "sweep"), build("test", recipe.eval.generate != "none")
    if recipe.robustness is not None and recipe.robustness.samples and recipe.eval.generate == "none":
        build("test", True)  # what is sampled is compared by its words as well
    kept = () if recipe.edited is not None else tasks.kept_metrics(recipe, asked[0])
    return Questions(sets, recipe, *asked, scoring, kept)


def unlikely_spaces(target: Loaded, sets: Sequence[LoadedSet]) -> str:
    """What to say of a model that does not write what its chat template has before an answer; empty where it does."""
    items = [item for s in sets if s.spec.kind == "qa" for item in (*s.test, *s.validation)[:_SPACED]]
    if not (rows := spaces_before(items, target.tokenizer)):
        return ""
    with torch.no_grad():
        logits, wanted, _ = answer_logits(target.model, Pad(target.tokenizer.pad_token_id)(rows))
    share = math.exp(-float(functional.cross_entropy(logits, wanted, reduction="sum")) / len(rows))
    if share >= 0.5:
        return ""
    return (
        f"the model gives the white space that its chat template has before an answer a probability of "
        f"{percent(share)}, and lm-eval counts it with the answer: prob, loss and exact of questions say little; pmi, "
        "where it cancels, tells more (choose: {metric: pmi})"
    )


def digests(sets: Iterable[LoadedSet]) -> list[list[str]]:
    """What scores depend on: all sets but the held-out one, which is never scored."""
    return [[s.role, s.name, s.digest] for s in sets if s.role != "holdout"]


# -- scores in a folder, and completions to show a person what a model says before and after


def score_model(loaded: Loaded, asked: TaskSet, label: str, recipe: Recipe, folder: Path) -> None:
    """Score a model as it is on some tasks; lm-eval's result files and ``scores.json`` go into the folder."""
    lm = interface(loaded.model, loaded.tokenizer, recipe.eval)
    _score(lm, asked, label, f"{recipe.name}-{label}", recipe.eval.bootstrap, folder)


def _score(lm: WholeLM, asked: TaskSet, label: str, name: str, bootstrap: int, folder: Path) -> None:
    lm.label = label
    result = evaluate(lm, asked, model_name=name, bootstrap=bootstrap)
    if is_main_process():
        result.save(folder)
    write_json_atomic(folder / "scores.json", [asdict(s) for s in result.scores])


def read_scores(place: Path) -> tuple[TaskScore, ...]:
    """All scores in a folder."""
    return tuple(TaskScore(**{**s, "score": Score(**s["score"])}) for s in _read(place, "scores"))


def _read(place: Path, name: str) -> Any:
    return json.loads((place / f"{name}.json").read_text(encoding="utf-8"))


def _compared(before: Path, after: Path) -> Compared:
    pairs = zip(_read(before, "completions"), _read(after, "completions"), strict=True)
    examples = tuple(
        Example(
            *(b["set"], b["name"], b["prompt"], b["target"], b["text"], a["text"]),
            *(Fluency(**c["fluency"]) if "fluency" in c else None for c in (b, a)),
        )
        for b, a in pairs
    )
    return read_scores(before), read_scores(after), examples


def complete(
    lm: HFLM, sets: Sequence[LoadedSet], count: int, judge: Callable[[], HFLM] | None = None
) -> list[dict[str, Any]]:
    """``set``, ``name``, ``prompt``, ``target`` and greedy ``text`` of the first ``count`` test items of every set.

    A text ends, as where ROUGE is taken, at the first stop that is no part of the right answer. ``judge`` gives the
    model under which the ``fluency`` of all texts is taken; none: the one that writes them.
    """
    chosen = [(s, item) for s in sets if s.role != "holdout" for item in s.test[:count]]
    requests = [Instance("generate_until", {}, (item.prompt, _limits(lm, s, item)), 0) for s, item in chosen]
    if not requests:
        return []
    with quiet_harness():
        texts = lm.generate_until(requests)
        read = _fluency(
            judge() if judge is not None else lm,
            [(item.prompt, text) for (_, item), text in zip(chosen, texts, strict=True)],
        )
    return [
        {"set": s.role, "name": s.name, "prompt": item.asked, "target": item.target, "text": text.strip()}
        | {"fluency": asdict(how)}
        for (s, item), text, how in zip(chosen, texts, read, strict=True)
    ]


def _fluency(lm: HFLM, written: Sequence[tuple[str, str]]) -> list[Fluency]:
    """Of each (prompt, text), under the model as it is."""
    known = [pair for pair in dict.fromkeys(written) if pair[1].strip()]
    scored = lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in known]) if known else []
    logprobs = {pair: logprob for pair, (logprob, _) in zip(known, scored, strict=True)}
    found = []
    for prompt, text in written:
        ids = lm.tokenizer.encode(text, add_special_tokens=False)
        runs = [tuple(ids[n : n + _RUN]) for n in range(len(ids) - _RUN + 1)]
        logprob = logprobs.get((prompt, text), math.nan)
        loss = -logprob / len(encode_pair(lm.tokenizer, prompt, text)[1]) if math.isfinite(logprob) else None
        found.append(Fluency(1 - len(set(runs)) / len(runs) if runs else 0.0, loss))
    return found


def _limits(lm: HFLM, loaded: LoadedSet, item: Item) -> dict[str, Any]:
    kind, tokens = loaded.spec.kind, loaded.spec.continuation
    until = ["\n\n"] if kind == "text" else loaded.stops(item)
    if kind == "mcq":
        until.append(".")
        tokens = max(_MCQ_TOKENS, len(encode_item(lm.tokenizer, item, kind)[1]))
    return {"until": [s for s in until if s not in item.target], "max_gen_toks": tokens, "do_sample": False}


def point_line(recipe: Recipe, point: SweepPoint, coefficients: str = "") -> str:
    """A point on one line: the metric that stands for each set, and what is wrong.

    ``coefficients`` stand in place of the one coefficient where several vectors have one each.
    """
    main = {*goal_metrics(recipe), *kept_metrics(recipe)}
    main |= {(spec.set, spec.task, spec.metric) for spec in recipe.eval.tasks}
    values = "  ".join(f"{s.name} {s.metric} {s.score.value:.3g}" for s in point.scores if s.key in main)
    where = f"{coefficients}  " if coefficients and point.coefficient else f"λ = {point.coefficient:<6g}"
    wrong = f"   collapsed: {point.collapsed}" if point.collapsed else "" if point.within_bound else "   out of bounds"
    return f"    {where}{values}{wrong}"


# -- one model under vectors and coefficients


class Scorer:
    """Scores of one model under vectors and coefficients, each taken from the pristine weights and kept as a stage.

    Scores at 0, at which all others are judged, are taken first where points are asked for. ``under`` is where those
    lie in the run's folder.
    """

    def __init__(self, target: Loaded, questions: Questions, store: Store, under: str = "eval") -> None:
        self._target, self._questions, self._store, self._under = target, questions, store, under
        self._recipe = questions.recipe
        self._lm = interface(target.model, target.tokenizer, self._recipe.eval)
        self._judge: Scorer = self  # of how answers read
        self._goals = goal_metrics(self._recipe)
        self._kept = questions.kept

    def scores(self, edit: Edit | None, vector: str, coefficient: float, split: Split, under: str = "eval") -> Path:
        """The folder with the scores of a split under θ − coefficient · τ, made or found again.

        ``vector`` is the edit's digest; at 0 neither is needed. ``under`` is where a new stage lies in the run's
        folder, on which its key does not depend.
        """
        recipe, sets, last = self._recipe, self._questions.sets, split == "test"

        def judge() -> HFLM:
            if edit is not None:
                edit.subtract(0)
            return self._judge._lm

        def make(tmp: Path) -> None:
            if edit is not None:
                edit.subtract(coefficient)
            bootstrap = recipe.eval.bootstrap if last else 0
            label, name = f"λ = {coefficient:g}", f"{recipe.name}@{coefficient:g}"
            _score(self._lm, self._questions.tasks(split), label, name, bootstrap, tmp)
            texts = complete(self._lm, sets, recipe.eval.examples, judge) if last else []
            write_json_atomic(tmp / "completions.json", texts)

        inputs = [self._target.fingerprint, *self._questions.key(split)]
        if last:  # what the completions depend on: how long they get, and by the prompt where they end
            shown = [s for s in sets if s.role != "holdout"]
            inputs += [[s.role, s.name, s.spec.continuation, s.spec.prompts("test")[0]] for s in shown]
            inputs += [] if self._judge is self else [self._judge._target.fingerprint]
        inputs += [vector if coefficient else None, coefficient]
        name = f"{coefficient:g}/{split}"
        return self._store.stage(f"{under if coefficient else self._under}/{name}", inputs, make, kind=f"eval/{name}")

    @functools.cached_property
    def start(self) -> SweepPoint:
        """The validation scores at 0; an error where they leave nothing to choose by."""
        found = read_scores(self.scores(None, "", 0.0, "validation"))
        start = self._announced(search.judge(0.0, found, found, self._kept, self._recipe.choose))
        for key, why in search.require_grounds(start, self._goals, self._kept, self._recipe.choose).items():
            say(f"    ! {search.say_key(key)} {why}", style="yellow")
        return start

    def point(
        self, edit: Edit, vector: str, coefficient: float, under: str = "eval", coefficients: str = ""
    ) -> SweepPoint:
        """The validation scores at a coefficient, judged by those at 0."""
        start, rule = self.start, self._recipe.choose
        try:
            scores = read_scores(self.scores(edit, vector, coefficient, "validation", under))
        except BrokenModelError:
            point = SweepPoint(coefficient, (), False, collapsed=search.BROKEN)
        else:
            point = search.judge(coefficient, scores, start.scores, self._kept, rule)
        return self._announced(point, coefficients)

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
        names, start = sorted(parts), self.start  # scored before the model is edited

        @functools.cache
        def point(coefficients: tuple[float, ...]) -> SweepPoint:
            largest, by_name = max(coefficients), dict(zip(names, coefficients, strict=True))
            vector = TaskVector.sum(parts[name] * (c / largest) for name, c in by_name.items())
            text = ", ".join(f"{name} {c:g}" for (_, name), c in by_name.items())
            with Edit(self._target.model, vector) as edit:
                digest = vector.digest()
                return self.point(edit, digest, largest, f"joint/{digest[:16]}", text)

        diagonal = None
        if self._recipe.sweep.search == "bisect":
            diagonal = [p.coefficient for p in self._bisect(grid, lambda c: point((c,) * len(names)))]

        def better(a: SweepPoint, b: SweepPoint) -> bool:
            return search.remaining(a, self._goals, start) < search.remaining(b, self._goals, start)

        weights, tried = search.balance(names, grid, point, better, diagonal)
        found = [[list(coefficients), self._left(p), p.within_bound] for coefficients, p in tried.items()]
        inputs = [self._target.fingerprint, self._questions.key("validation")]
        inputs += [[parts[n].digest() for n in names], found]
        what = {"names": names, "tried": found}
        self._store.stage("joint/trail", inputs, lambda tmp: write_json_atomic(tmp / "trail.json", what))
        return weights

    def test(self, vector: TaskVector, chosen: float) -> Compared:
        """Test scores of the target model and at the chosen coefficient, and how both answer a few items."""
        with Edit(self._target.model, vector) as edit:
            before, after = (self.scores(edit, vector.digest(), c, "test") for c in (0.0, chosen))
        return _compared(before, after)

    def compare(self, given: Loaded) -> Compared:
        """:meth:`test` of the target model and another one."""
        other = Scorer(given, self._questions, self._store, "eval/edited")
        other._judge = self
        return _compared(*(scorer.scores(None, "", 0.0, "test") for scorer in (self, other)))

    def _bisect(self, grid: Sequence[float], point: Callable[[float], SweepPoint]) -> tuple[SweepPoint, ...]:
        ties = all(search.may_tie(key[2]) for key in self._goals)
        return search.bisect(grid, self.start, point, self._left, ties=ties)

    def _left(self, point: SweepPoint) -> float:
        return search.remaining(point, self._goals, self.start)

    def _announced(self, point: SweepPoint, coefficients: str = "") -> SweepPoint:
        say(point_line(self._recipe, point, coefficients))
        return point
