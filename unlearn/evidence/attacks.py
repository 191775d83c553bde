"""How much of what was forgotten comes back: attacks on every model that is compared, judged on one scale.

An attack is a function of one model, registered by :func:`attack`: the package's own are in ``attacks_ask``, ``lens``
and ``attacks_weights``. One from outside is registered in the same way::

    @attack("shouted", lambda scene: [])
    def shouted(scene: Scene) -> list[AttackScore]:
        items = [replace(item, prompt=item.prompt.upper()) for item in scene.judge.items]
        return [scene.judge.asking(items).score(scene.model).entry(scene.who, "shouting", "probe")]
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unlearn.data.items import Item, digest
from unlearn.data.sets import LoadedSet
from unlearn.errors import EvaluationError
from unlearn.evidence.reference import Subjects
from unlearn.processes import told
from unlearn.recipe.data import Kind
from unlearn.recipe.evaluation import Probe, RobustnessSpec
from unlearn.recipe.schema import Recipe
from unlearn.results import PLAIN, AttackKind, AttackScore, Robustness, Who
from unlearn.score.evaluate import evaluate
from unlearn.score.packed import WholeLM, interface
from unlearn.score.scorer import Questions
from unlearn.score.tasks import build_tasks, quiet_harness
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store

FORGET_METRIC: dict[Kind, str] = {"mcq": "acc", "qa": "prob", "text": "exact_memorisation"}
_SCORING = "lower eval.batch_tokens (engine packed) or eval.batch_size (engine hf)"


# -- the forget score of any model in memory, with any prompts, through lm-eval and on the very scale of the report


@dataclass(frozen=True, slots=True)
class Judged:
    """A score with its items' own, in their order; ``stderr`` of the mean, None for a single item."""

    metric: str
    higher_is_better: bool
    value: float
    stderr: float | None
    values: tuple[float, ...]

    @classmethod
    def mean(cls, metric: str, higher_is_better: bool, values: Sequence[float]) -> Judged:
        """Of at least one item; the standard error is s / sqrt(n), as lm-eval has it."""
        n = len(values)
        centre = math.fsum(values) / n
        spread = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
        return cls(metric, higher_is_better, centre, spread, tuple(values))

    def entry(self, who: Who, attack: str = PLAIN, kind: AttackKind = "none", **place: int) -> AttackScore:
        """This score as a line of the table of attacks, perhaps at a number of ``steps`` or at a ``layer``."""
        n = len(self.values)
        return AttackScore(attack, kind, who, self.metric, self.higher_is_better, self.value, self.stderr, n, **place)


class Judge:
    """Scores models on the same items: accuracy (mcq), answer probability (qa), exact memorisation (text).

    ``items`` are some of the forget set's, with whatever prompts; they are written into ``folder`` for lm-eval, each
    choice of them apart. The recipe has the seed and the engine.
    """

    def __init__(
        self, loaded: LoadedSet, items: Sequence[Item], tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: Recipe
    ) -> None:
        if not items:
            raise EvaluationError(f"robustness: there are no items of {loaded.role} set {loaded.name!r} to attack")
        self.loaded, self.items, self.tokenizer, self.recipe = loaded, tuple(items), tokenizer, recipe
        self.kind: Kind = loaded.spec.kind
        self.metric = FORGET_METRIC[self.kind]
        self.folder = folder
        self._others: dict[str, Judge] = {}
        # with the hf engine passages are recited only where that is asked for
        changed = {
            "eval": recipe.eval.model_copy(update={"tasks": ()}),
            "choose": recipe.choose.model_copy(update={"metric": self.metric}),
        }
        place = folder / _content(self.items)
        only = replace(loaded, test=self.items, reverse=())
        self._tasks = build_tasks([only], "test", recipe.model_copy(update=changed), tokenizer, place)

    @property
    def chance(self) -> float | None:
        """What guessing scores; None where the items are no choices."""
        return math.fsum(1 / len(i.choices) for i in self.items) / len(self.items) if self.kind == "mcq" else None

    def score(self, model: PreTrainedModel, label: str = "scoring") -> Judged:
        """The forget score of a model as it is now."""
        return self.read(self.lm(model, label))[self.metric]

    def read(self, lm: WholeLM) -> Mapping[str, Judged]:
        """Every metric of the set's tasks that is a mean over items, which perplexity is not, by name."""
        result = evaluate(lm, self._tasks, model_name="attacked", bootstrap=0)
        values = result.values()
        found: dict[str, Judged] = {}
        for score in result.scores:
            items = values.get(score.key)
            if items is not None and score.metric != "perplexity":
                in_order = [items[number][0] for number in sorted(items)]
                found[score.metric] = Judged.mean(score.metric, score.higher_is_better, in_order)
        return found

    def asking(self, items: Sequence[Item]) -> Judge:
        """A judge of the same set with other items or other prompts; the same one when it is asked for again."""
        name = _content(items)
        if name not in self._others:
            self._others[name] = Judge(self.loaded, items, self.tokenizer, self.folder, self.recipe)
        return self._others[name]

    def docs(self) -> list[dict[str, Any]]:
        """The items as lm-eval has them, with ``continuation`` (text): what generated text is compared with."""
        return [dict(doc) for doc in next(iter(self._tasks.tasks.values())).eval_docs]

    def lm(self, model: PreTrainedModel, label: str = "scoring") -> WholeLM:
        """lm-eval's interface to a model, by the recipe's engine."""
        with quiet_harness():
            lm = interface(model, self.tokenizer, self.recipe.eval)
        lm.label = label
        return lm


def _content(items: Sequence[Item]) -> str:
    return digest([[i.id, i.prompt, i.target, i.choices, i.answer] for i in items])[:16]


# -- what an attack is


@dataclass(frozen=True)
class Scene:
    """What an attack is given: one model, and the items that it is scored on.

    ``model`` is a copy that may be used up where the attack changes weights, else the model itself, to be left as it
    is. ``again`` are forget items that may be trained on; the judge scores none of them. ``folder`` is for files that
    are kept beside the scores.
    """

    who: Who
    model: PreTrainedModel
    judge: Judge
    spec: RobustnessSpec
    sets: Sequence[LoadedSet]
    again: Sequence[Item]
    folder: Path


Run = Callable[[Scene], Sequence[AttackScore]]
Settings = Callable[[Scene], list[Any] | None]


@dataclass(frozen=True)
class Attack:
    """``settings`` are what its scores depend on beside model and items, as JSON; None: it is not asked for, or cannot
    be made. ``less`` says which of the recipe's keys make it need less memory.
    """

    name: str
    run: Run
    settings: Settings
    changes_weights: bool
    less: str


ATTACKS: dict[str, Attack] = {}
_FIRST = (
    "plain",
    *get_args(Probe),
    "contrast",
    "samples",
    "lens",
)  # in the order of the table; after them, as registered


def attack(
    name: str, settings: Settings, *, changes_weights: bool = False, less: str = _SCORING
) -> Callable[[Run], Run]:
    """Register a function as an attack, see :class:`Attack`."""

    def register(run: Run) -> Run:
        ATTACKS[name] = Attack(name, run, settings, changes_weights, less)
        return run

    return register


@attack("plain", lambda scene: [])
def plain(scene: Scene) -> list[AttackScore]:
    """No attack: what the others are compared with."""
    return [scene.judge.score(scene.model, scene.who).entry(scene.who)]


# -- every attack on every model


def run_attacks(subjects: Subjects, questions: Questions, store: Store) -> Robustness:
    """How much of what was forgotten comes back; of several requests, the first is attacked.

    Every attack of every model is a stage of its own.
    """
    from unlearn.evidence import attacks_ask, attacks_weights, lens  # noqa: F401  each registers its attacks

    recipe = questions.recipe
    spec = recipe.robustness
    assert spec is not None  # the caller looked
    forget, scored = attacked_items(questions)
    again: Sequence[Item] = ()
    if spec.relearn is not None:
        again, scored = attacks_weights.parted(forget, scored, spec.relearn.items, recipe.seed)
    attacks = sorted(ATTACKS.values(), key=lambda one: [*_FIRST, one.name].index(one.name))
    found: list[AttackScore] = []
    with tempfile.TemporaryDirectory(prefix="attacked-") as place:
        for who in subjects.who():
            with subjects.model(who) as loaded:
                judge = Judge(forget, scored, loaded.tokenizer, Path(place), recipe)
                scene = Scene(who, loaded.model, judge, spec, questions.sets, again, Path(place))
                for one in attacks:
                    found += [] if one.changes_weights else _scores(one, scene, subjects, questions, store)
            for one in attacks:  # copies are made of models without an edit's hooks
                found += _scores(one, scene, subjects, questions, store) if one.changes_weights else []
    first = {(s.kind, s.attack): n for n, s in reversed(list(enumerate(found)))}
    found.sort(key=lambda s: first[s.kind, s.attack])
    return Robustness(forget.name, judge.metric, tuple(found), judge.chance)


def attacked_items(questions: Questions) -> tuple[LoadedSet, Sequence[Item]]:
    """The set that is attacked, and those of its test items that attacks are scored on at most."""
    spec = questions.recipe.robustness
    forget = next(s for s in questions.sets if s.role == "forget")
    return forget, forget.test[: spec.items if spec is not None else 0]


def _scores(one: Attack, scene: Scene, subjects: Subjects, questions: Questions, store: Store) -> list[AttackScore]:
    """The scores of one attack on one model, made or found again; none where it does not apply."""
    from unlearn.evidence.attacks_weights import edited_copy

    settings, who = one.settings(scene), scene.who
    if settings is None or (one.changes_weights and getattr(scene.model, "is_quantized", False)):
        return []
    asked: list[Any] = [[i.id, i.prompt, i.target, list(i.choices)] for i in scene.judge.items]
    engine = questions.recipe.eval.model_dump(mode="json", include={"engine", "batch_tokens", "batch_size"})

    def write(tmp: Path) -> None:
        model = scene.model
        if one.changes_weights:
            model = edited_copy(model, *subjects.edit(who))
        found = one.run(replace(scene, model=model, folder=tmp))
        write_json_atomic(tmp / "scores.json", [asdict(score) for score in found])

    stage = f"robustness/{who}/{one.name}"
    with told(stage, one.less):
        inputs = [*subjects.key(who), asked, settings, questions.scoring, engine]
        place = store.stage(stage, inputs, write, kind=f"robustness/{one.name}")
    found = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    return [AttackScore(**{**score, "who": who}) for score in found]
