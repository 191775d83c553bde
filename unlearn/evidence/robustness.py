"""Attacks on every model that is compared: how much of what was forgotten comes back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unlearn.console import say
from unlearn.data.items import Item
from unlearn.evidence.attacks import Judge
from unlearn.evidence.attacks_ask import ask, sample, wordings
from unlearn.evidence.attacks_weights import edited_copy, forgotten_rows, parted, quantised, relearn, unrelated_rows
from unlearn.evidence.lens import logit_lens, unavailable
from unlearn.evidence.subjects import Subjects
from unlearn.model.load import Loaded
from unlearn.processes import told
from unlearn.recipe.evaluation import RobustnessSpec
from unlearn.results import LENS, AttackScore, Robustness, Who, quantisation, relearning
from unlearn.score.scorer import Questions, written
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store

Scores = Sequence[AttackScore]
_SCORING = "lower eval.batch_tokens (engine packed) or eval.batch_size (engine hf)"
_RELEARNING = "lower robustness.relearn.batch_size, or set robustness.relearn to null"
_LESS = {
    "samples": "lower robustness.samples, or set it to 0",
    "lens": "lower eval.batch_tokens, or set robustness.lens to false",
    **dict.fromkeys(("nf4", "int8"), "leave it out of robustness.quantize"),
    **dict.fromkeys(("relearn", "relearn-unrelated"), _RELEARNING),
}


@dataclass(frozen=True)
class _Attacked:
    """One model under attack, and the attacks on it: each is a stage of its own."""

    subjects: Subjects
    who: Who
    judge: Judge
    questions: Questions
    store: Store

    def scores(self, name: str, settings: Any, make: Callable[[Path], Scores]) -> Scores:
        """The scores of one attack, made or found again."""
        recipe, stage = self.questions.recipe, f"robustness/{self.who}/{name}"
        engine = recipe.eval.model_dump(mode="json", include={"engine", "batch_tokens", "batch_size"})
        inputs = [*self.subjects.key(self.who), _asked(self.judge.items), settings, self.questions.scoring, engine]

        def write(tmp: Path) -> None:
            write_json_atomic(tmp / "scores.json", [asdict(score) for score in make(tmp)])

        with told(stage, _LESS.get(name, _SCORING)):
            place = self.store.stage(stage, inputs, write, kind=f"robustness/{name}")
        found = json.loads((place / "scores.json").read_text(encoding="utf-8"))
        return [AttackScore(**{**score, "who": self.who}) for score in found]

    def on_a_copy(self, name: str, settings: Any, make: Callable[[PreTrainedModel], Scores]) -> Scores:
        """The same of an attack that uses the model up."""
        subjects, who = self.subjects, self.who

        def write(tmp: Path) -> Scores:
            if who == "reference":
                assert subjects.reference is not None
                return make(edited_copy(subjects.reference.model, None, 0.0))
            return make(edited_copy(subjects.target.model, subjects.vector, subjects.chosen if who == "edited" else 0))

        return self.scores(name, settings, write)


def attack(subjects: Subjects, questions: Questions, store: Store) -> Robustness:
    """How much of what was forgotten comes back; of several requests, the first is attacked.

    Every attack of every model is a stage of its own, that of sampling with all texts.
    """
    recipe = questions.recipe
    spec = recipe.robustness
    assert spec is not None  # asked for by who saw that it is there
    forget, scored = attacked_items(questions)
    again: Sequence[Item] = ()
    if spec.relearn is not None:
        again, scored = parted(forget, scored, spec.relearn.items, recipe.seed)
    found: list[AttackScore] = []
    with tempfile.TemporaryDirectory(prefix="attacked-") as place:
        for who in subjects.who():
            with subjects.model(who) as loaded:
                judge = Judge(forget, scored, loaded.tokenizer, Path(place), recipe)
                attacked = _Attacked(subjects, who, judge, questions, store)
                found += _as_it_is(attacked, spec, loaded)
            found += _changed(attacked, spec, again)
    order = {key: n for n, key in reversed(list(enumerate((s.kind, s.attack) for s in found)))}
    found.sort(key=lambda s: order[s.kind, s.attack])
    return Robustness(forget.name, judge.metric, tuple(found), judge.chance)


def attacked_items(questions: Questions) -> tuple[Any, Sequence[Item]]:
    """The set that is attacked, and those of its test items that attacks are scored on at most."""
    spec = questions.recipe.robustness
    forget = next(s for s in questions.sets if s.role == "forget")
    return forget, forget.test[: spec.items if spec is not None else 0]


def _as_it_is(attacked: _Attacked, spec: RobustnessSpec, loaded: Loaded) -> Scores:
    """Attacks that leave the weights alone: other prompts, samples, hidden layers."""
    judge, who, sets = attacked.judge, attacked.who, attacked.questions.sets
    model, seed = loaded.model, attacked.questions.recipe.seed
    found = [*attacked.scores("plain", None, lambda tmp: [judge.score(model, who).entry(who)])]
    for probe in spec.probes:
        others = wordings(probe, judge.kind, judge.items, sets, seed)
        if not others:
            continue
        asked = [_asked(w.items) for w in others]
        found += attacked.scores(probe, asked, lambda tmp, p=probe, o=others: ask(model, judge, o).entries(p, who))  # type: ignore[misc]

    def draw(tmp: Path) -> Scores:
        got = sample(model, judge, spec.samples, spec.temperature, seed)
        texts = [{"id": i.id, "samples": t} for i, t in zip(judge.items, got.texts, strict=True)]
        write_json_atomic(tmp / "samples.json", texts)
        return got.entries(who)

    if spec.samples:
        found += attacked.scores("samples", [spec.samples, spec.temperature, written([judge.loaded]), seed], draw)
    if spec.lens:
        why = unavailable(model, judge)
        if why is not None:
            say(f"    no logit lens: {why}", style="yellow")
            return found

        def look(tmp: Path) -> Scores:
            layers = logit_lens(model, judge, label=f"{who}: hidden layers") or ()
            return [score.entry(who, LENS, "lens", layer=layer) for layer, score in layers]

        found += attacked.scores("lens", None, look)
    return found


def _changed(attacked: _Attacked, spec: RobustnessSpec, again: Sequence[Item]) -> Scores:
    """Attacks on copies of the weights: in fewer bits, or trained again."""
    judge, who, recipe = attacked.judge, attacked.who, attacked.questions.recipe
    length, seed, tokenizer, how = recipe.vector.forget.max_length, recipe.seed, judge.tokenizer, spec.relearn
    found: list[AttackScore] = []
    for kind in spec.quantize:

        def squeeze(model: PreTrainedModel, kind: Any = kind) -> Scores:
            with quantised(model, kind) as small:
                return [judge.score(small, f"{who} in {kind}").entry(who, quantisation(kind), "quantise")]

        found += attacked.on_a_copy(kind, None, squeeze)
    if how is None:
        return found
    rows = [(len(again), False, forgotten_rows(judge.loaded, again, tokenizer, length))] if again else []
    if how.unrelated and (others := unrelated_rows(attacked.questions.sets, how.items, seed, tokenizer, length)):
        rows.append((len(others), True, others))
    for shown, unrelated, data in rows:

        def train(model: PreTrainedModel, count: int = shown, other: bool = unrelated, data: Any = data) -> Scores:
            name = relearning(count, other)
            curve = relearn(model, tokenizer, data, how, seed, judge, f"{who}: {name}")
            return [score.entry(who, name, "relearn", steps=steps) for steps, score in curve]

        settings = [how.model_dump(mode="json"), [asdict(row) for row in data], seed]
        found += attacked.on_a_copy("relearn-unrelated" if unrelated else "relearn", settings, train)
    return found


def _asked(items: Sequence[Item]) -> list[list[Any]]:
    return [[i.id, i.prompt, i.target, list(i.choices)] for i in items]
