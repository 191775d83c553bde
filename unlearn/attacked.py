"""The stage that attacks the result: the same attacks on the target, the edited model and the retain reference."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from unlearn.attacks.judge import Judge
from unlearn.attacks.lens import logit_lens, unavailable
from unlearn.attacks.probes import ask, wordings
from unlearn.attacks.quantised import edited_copy, quantised
from unlearn.attacks.relearn import forgotten_rows, parted, relearn, unrelated_rows
from unlearn.attacks.sampling import sample
from unlearn.attacks.values import LENS, AttackScore, Robustness, quantisation, relearning
from unlearn.compared import Compared, Subjects
from unlearn.console import say
from unlearn.data import Item, LoadedSet
from unlearn.memory import told
from unlearn.models import Loaded
from unlearn.recipe_bench import RobustnessSpec
from unlearn.report import Who
from unlearn.rundir import write_json_atomic
from unlearn.stages import LESS, written

_Scores = Sequence[AttackScore]
_RELEARNING = "lower robustness.relearn.batch_size, or set robustness.relearn to null"
_LESS = {
    "samples": "lower robustness.samples, or set it to 0",
    "lens": "lower eval.batch_tokens, or set robustness.lens to false",
    **dict.fromkeys(("nf4", "int8"), "leave it out of robustness.quantize"),
    **dict.fromkeys(("relearn", "relearn-unrelated"), _RELEARNING),
}


class Attacked(Compared):
    """Attacks of one run."""

    def robustness(self, subjects: Subjects, sets: Sequence[LoadedSet]) -> Robustness | None:
        """How much of what was forgotten comes back; of several requests, the first is attacked.

        Every attack of every model is a stage of its own, that of sampling with all texts. None where the recipe asks
        for no attacks, or where no coefficient was chosen, so that nothing was forgotten.
        """
        spec = self.recipe.robustness
        if spec is None or subjects.chosen == 0:
            return None
        forget = next(s for s in sets if s.role == "forget")
        scored: Sequence[Item] = forget.test[: spec.items]
        again: Sequence[Item] = ()
        if spec.relearn is not None:
            again, scored = parted(forget, scored, spec.relearn.items, self.recipe.seed)
        what = f"attacks, scored on {len(scored)} items of {forget.name}"
        with self.announced("robustness", what), tempfile.TemporaryDirectory(prefix="attacked-") as place:
            found: list[AttackScore] = []
            for who in subjects.who():
                with subjects.model(who) as loaded:
                    judge = Judge(forget, scored, loaded.tokenizer, Path(place), self.recipe)
                    found += self._as_it_is(spec, subjects, who, loaded, judge, sets)
                found += self._changed(spec, subjects, who, judge, sets, again)
            order = {key: n for n, key in reversed(list(enumerate((s.kind, s.attack) for s in found)))}
            found.sort(key=lambda s: order[s.kind, s.attack])
        return Robustness(forget.name, judge.metric, tuple(found), judge.chance)

    def _as_it_is(
        self,
        spec: RobustnessSpec,
        subjects: Subjects,
        who: Who,
        loaded: Loaded,
        judge: Judge,
        sets: Sequence[LoadedSet],
    ) -> list[AttackScore]:
        """Attacks that leave the weights alone: other prompts, samples, hidden layers."""
        model = loaded.model

        def attack(name: str, settings: Any, make: Callable[[Path], _Scores]) -> list[AttackScore]:
            return self._attack(who, name, [*subjects.key(who), _asked(judge.items), settings], make)

        found = attack("plain", None, lambda tmp: [judge.score(model, who).entry(who)])
        for probe in spec.probes:
            others = wordings(probe, judge.kind, judge.items, sets, self.recipe.seed)
            if not others:
                continue
            asked = [_asked(w.items) for w in others]
            found += attack(probe, asked, lambda tmp, p=probe, o=others: ask(model, judge, o).entries(p, who))  # type: ignore[misc]

        def draw(tmp: Path) -> _Scores:
            got = sample(model, judge, spec.samples, spec.temperature, self.recipe.seed)
            texts = [{"id": i.id, "samples": t} for i, t in zip(judge.items, got.texts, strict=True)]
            write_json_atomic(tmp / "samples.json", texts)
            return got.entries(who)

        if spec.samples:
            length = written([judge.loaded])
            found += attack("samples", [spec.samples, spec.temperature, length, self.recipe.seed], draw)
        if spec.lens:
            why = unavailable(model, judge)
            if why is not None:
                say(f"    no logit lens: {why}", style="yellow")
                return found

            def look(tmp: Path) -> _Scores:
                layers = logit_lens(model, judge, label=f"{who}: hidden layers") or ()
                return [score.entry(who, LENS, "lens", layer=layer) for layer, score in layers]

            found += attack("lens", None, look)
        return found

    def _changed(
        self,
        spec: RobustnessSpec,
        subjects: Subjects,
        who: Who,
        judge: Judge,
        sets: Sequence[LoadedSet],
        again: Sequence[Item],
    ) -> list[AttackScore]:
        """Attacks on copies of the weights: in fewer bits, or trained again."""
        length, seed = self.recipe.vector.forget.max_length, self.recipe.seed
        tokenizer = judge.tokenizer

        def attack(name: str, settings: Any, make: Callable[[PreTrainedModel], _Scores]) -> list[AttackScore]:
            key = [*subjects.key(who), _asked(judge.items), settings]
            return self._attack(who, name, key, lambda tmp: make(_copy(subjects, who)))

        found: list[AttackScore] = []
        for kind in spec.quantize:

            def squeeze(model: PreTrainedModel, kind: Any = kind) -> _Scores:
                with quantised(model, kind) as small:
                    return [judge.score(small, f"{who} in {kind}").entry(who, quantisation(kind), "quantise")]

            found += attack(kind, None, squeeze)
        how = spec.relearn
        if how is None:
            return found
        rows = [(len(again), False, forgotten_rows(judge.loaded, again, tokenizer, length))] if again else []
        if how.unrelated and (others := unrelated_rows(sets, how.items, seed, tokenizer, length)):
            rows.append((len(others), True, others))
        for count, unrelated, data in rows:

            def train(model: PreTrainedModel, count: int = count, other: bool = unrelated, data: Any = data) -> _Scores:
                name = relearning(count, other)
                curve = relearn(model, tokenizer, data, how, seed, judge, f"{who}: {name}")
                return [score.entry(who, name, "relearn", steps=steps) for steps, score in curve]

            settings = [how.model_dump(mode="json"), [asdict(row) for row in data], seed]
            found += attack("relearn-unrelated" if unrelated else "relearn", settings, train)
        return found

    def _attack(self, who: Who, name: str, parts: list[Any], make: Callable[[Path], _Scores]) -> list[AttackScore]:
        """The scores of one attack on one model, made or reused."""
        stage = f"robustness/{who}/{name}"
        engine = self.recipe.eval.model_dump(mode="json", include={"engine", "batch_tokens", "batch_size"})

        def write(tmp: Path) -> None:
            write_json_atomic(tmp / "scores.json", [asdict(score) for score in make(tmp)])

        with told(stage, _LESS.get(name, LESS["test"])):
            self.make(stage, [*parts, self.scoring, engine], write, kind=f"robustness/{name}")
        found = json.loads((self.folder.path(stage) / "scores.json").read_text(encoding="utf-8"))
        return [AttackScore(**{**score, "who": who}) for score in found]


def _copy(subjects: Subjects, who: Who) -> PreTrainedModel:
    """A model of its own that an attack may use up."""
    if who == "reference":
        assert subjects.reference is not None
        return edited_copy(subjects.reference.model, None, 0.0)
    return edited_copy(subjects.target.model, subjects.vector, subjects.chosen if who == "edited" else 0.0)


def _asked(items: Sequence[Item]) -> list[list[Any]]:
    return [[i.id, i.prompt, i.target, list(i.choices)] for i in items]
