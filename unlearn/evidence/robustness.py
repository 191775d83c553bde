"""Attacks on every model that is compared: how much of what was forgotten comes back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet
from unlearn.evidence.attacks import ATTACKS, Attack, Scene
from unlearn.evidence.attacks_weights import edited_copy, parted
from unlearn.evidence.judge import Judge
from unlearn.evidence.subjects import Subjects
from unlearn.processes import told
from unlearn.results import AttackScore, Robustness
from unlearn.score.scorer import Questions
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store

_SCORING = "lower eval.batch_tokens (engine packed) or eval.batch_size (engine hf)"


def attack(subjects: Subjects, questions: Questions, store: Store) -> Robustness:
    """How much of what was forgotten comes back; of several requests, the first is attacked.

    Every attack of every model is a stage of its own.
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
                scene = Scene(who, loaded.model, judge, spec, questions.sets, again, Path(place))
                for one in ATTACKS.values():
                    found += [] if one.changes_weights else _scores(one, scene, subjects, questions, store)
            for one in ATTACKS.values():
                found += _scores(one, scene, subjects, questions, store) if one.changes_weights else []
    order = {key: n for n, key in reversed(list(enumerate((s.kind, s.attack) for s in found)))}
    found.sort(key=lambda s: order[s.kind, s.attack])
    return Robustness(forget.name, judge.metric, tuple(found), judge.chance)


def attacked_items(questions: Questions) -> tuple[LoadedSet, Sequence[Item]]:
    """The set that is attacked, and those of its test items that attacks are scored on at most."""
    spec = questions.recipe.robustness
    forget = next(s for s in questions.sets if s.role == "forget")
    return forget, forget.test[: spec.items if spec is not None else 0]


def _scores(one: Attack, scene: Scene, subjects: Subjects, questions: Questions, store: Store) -> list[AttackScore]:
    """The scores of one attack on one model, made or found again; none where it does not apply."""
    settings, who = one.settings(scene), scene.who
    if settings is None:
        return []
    asked: list[Any] = [[i.id, i.prompt, i.target, list(i.choices)] for i in scene.judge.items]
    engine = questions.recipe.eval.model_dump(mode="json", include={"engine", "batch_tokens", "batch_size"})

    def write(tmp: Path) -> None:
        here = replace(scene, folder=tmp)
        if one.changes_weights and who == "reference":
            assert subjects.reference is not None
            here = replace(here, model=edited_copy(subjects.reference.model, None, 0.0))
        elif one.changes_weights:
            coefficient = subjects.chosen if who == "edited" else 0.0
            here = replace(here, model=edited_copy(subjects.target.model, subjects.vector, coefficient))
        write_json_atomic(tmp / "scores.json", [asdict(score) for score in one.run(here)])

    stage = f"robustness/{who}/{one.name}"
    with told(stage, one.less or _SCORING):
        inputs = [*subjects.key(who), asked, settings, questions.scoring, engine]
        place = store.stage(stage, inputs, write, kind=f"robustness/{one.name}")
    found = json.loads((place / "scores.json").read_text(encoding="utf-8"))
    return [AttackScore(**{**score, "who": who}) for score in found]
