"""How much of what was forgotten comes back: every attack is one entry here and a function of one model.

An attack from outside is registered in the same way::

    @attack("shouted", lambda scene: [])
    def shouted(scene: Scene) -> list[AttackScore]:
        items = [replace(item, prompt=item.prompt.upper()) for item in scene.judge.items]
        return [scene.judge.asking(items).score(scene.model).entry(scene.who, "shouting", "probe")]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel

from unlearn.console import say
from unlearn.data.encoding import Encoded
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet
from unlearn.evidence.attacks_ask import Wordings, ask, sample, wordings
from unlearn.evidence.attacks_weights import forgotten_rows, quantised, relearn, unrelated_rows
from unlearn.evidence.judge import Judge
from unlearn.evidence.lens import logit_lens, unavailable
from unlearn.recipe.evaluation import Probe, Quantised, RobustnessSpec
from unlearn.results import GREEDY, LENS, AttackScore, Who, probing, quantisation, relearning, sampling
from unlearn.store.files import write_json_atomic


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


ATTACKS: dict[str, Attack] = {}  # in the order of the table


def attack(name: str, settings: Settings, *, changes_weights: bool = False, less: str = "") -> Callable[[Run], Run]:
    """Register a function as an attack, see :class:`Attack`."""

    def register(run: Run) -> Run:
        ATTACKS[name] = Attack(name, run, settings, changes_weights, less)
        return run

    return register


# -- the model as it is, asked in other ways


@attack("plain", lambda scene: [])
def plain(scene: Scene) -> list[AttackScore]:
    """No attack: what the others are compared with."""
    return [scene.judge.score(scene.model, scene.who).entry(scene.who)]


def _worded(probe: Probe, scene: Scene) -> Wordings:
    judge = scene.judge
    asked_for = probe in scene.spec.probes
    return wordings(probe, judge.kind, judge.items, scene.sets, judge.recipe.seed) if asked_for else {}


def _prompts(probe: Probe, scene: Scene) -> list[Any] | None:
    return [[i.id, i.prompt] for items in _worded(probe, scene).values() for i in items] or None


def probed(probe: Probe, scene: Scene) -> list[AttackScore]:
    """Other prompts: their mean, and the one that gets most where there are several."""
    others = _worded(probe, scene)
    mean, best = ask(scene.model, scene.judge, others)
    scores = [mean.entry(scene.who, probing(probe), "probe")]
    return [*scores, best.entry(scene.who, probing(probe, best=True), "probe")] if len(others) > 1 else scores


for _probe in get_args(Probe):
    attack(_probe, partial(_prompts, _probe))(partial(probed, _probe))


def _sampled(scene: Scene) -> list[Any] | None:
    spec, data = scene.spec, scene.judge.loaded.spec
    written = [data.continuation, data.prompts("test")[0]]
    return [spec.samples, spec.temperature, written, scene.judge.recipe.seed] if spec.samples else None


@attack("samples", _sampled, less="lower robustness.samples, or set it to 0")
def samples(scene: Scene) -> list[AttackScore]:
    """The best of several samples, beside the greedy answer, which is the plain score of the same metric."""
    spec, judge = scene.spec, scene.judge
    found = sample(scene.model, judge, spec.samples, spec.temperature, judge.recipe.seed)
    texts = [{"id": item.id, "samples": text} for item, text in zip(judge.items, found.texts, strict=True)]
    write_json_atomic(scene.folder / "samples.json", texts)
    return [found.greedy.entry(scene.who, GREEDY), found.best.entry(scene.who, sampling(spec.samples), "sample")]


def _lensed(scene: Scene) -> list[Any] | None:
    if scene.spec.lens and (why := unavailable(scene.model, scene.judge)):
        say(f"    no logit lens: {why}", style="yellow")
        return None
    return [] if scene.spec.lens else None


@attack("lens", _lensed, less="lower eval.batch_tokens, or set robustness.lens to false")
def lens(scene: Scene) -> list[AttackScore]:
    """What every layer would answer."""
    layers = logit_lens(scene.model, scene.judge, label=f"{scene.who}: hidden layers") or ()
    return [score.entry(scene.who, LENS, "lens", layer=layer) for layer, score in layers]


# -- copies with other weights


def rounded(kind: Quantised, scene: Scene) -> list[AttackScore]:
    """The weights in 4 or 8 bits."""
    with quantised(scene.model, kind) as small:
        return [scene.judge.score(small, f"{scene.who} in {kind}").entry(scene.who, quantisation(kind), "quantise")]


def _is_rounded(kind: Quantised, scene: Scene) -> list[Any] | None:
    return [] if kind in scene.spec.quantize else None


for _kind in get_args(Quantised):
    less = "leave it out of robustness.quantize"
    attack(_kind, partial(_is_rounded, _kind), changes_weights=True, less=less)(partial(rounded, _kind))


def _relearned(unrelated: bool, scene: Scene) -> list[Encoded]:
    """The rows to train on; none where that is not asked for."""
    how, judge = scene.spec.relearn, scene.judge
    length = judge.recipe.vector.forget.max_length
    if how is None or (unrelated and not how.unrelated):
        return []
    if unrelated:
        return unrelated_rows(scene.sets, how.items, judge.recipe.seed, judge.tokenizer, length)
    return forgotten_rows(judge.loaded, scene.again, judge.tokenizer, length)


def _training(unrelated: bool, scene: Scene) -> list[Any] | None:
    rows, how = _relearned(unrelated, scene), scene.spec.relearn
    if not rows or how is None:
        return None
    return [how.model_dump(mode="json"), [asdict(row) for row in rows], scene.judge.recipe.seed]


def relearned(unrelated: bool, scene: Scene) -> list[AttackScore]:
    """A curve of fine-tuning on a few forgotten items, or on texts that have nothing to do with them."""
    rows, how, judge = _relearned(unrelated, scene), scene.spec.relearn, scene.judge
    assert how is not None
    name = relearning(len(rows) if unrelated else len(scene.again), unrelated)
    curve = relearn(scene.model, judge.tokenizer, rows, how, judge.recipe.seed, judge, f"{scene.who}: {name}")
    return [score.entry(scene.who, name, "relearn", steps=steps) for steps, score in curve]


for _name, _unrelated in (("relearn", False), ("relearn-unrelated", True)):
    less = "lower robustness.relearn.batch_size, or set robustness.relearn to null"
    attack(_name, partial(_training, _unrelated), changes_weights=True, less=less)(partial(relearned, _unrelated))
