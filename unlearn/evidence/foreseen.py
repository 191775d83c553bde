"""The step that measures before the edit what it will cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unlearn.data.sets import LoadedSet
from unlearn.evidence.foresight import foresee
from unlearn.model import load as models
from unlearn.model.load import Loaded
from unlearn.recipe.methods import METHODS, TrainSpec
from unlearn.recipe.schema import Recipe
from unlearn.results import Foresight, Role, foresight_from_json
from unlearn.score.scorer import digests
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store
from unlearn.train.vectors import Vectors, fit_vector
from unlearn.vector.task_vector import TaskVector


def foresee_cost(
    target: Loaded, edit: TaskVector, vectors: Vectors, sets: Sequence[LoadedSet], recipe: Recipe, store: Store
) -> Foresight:
    """How the forgotten task correlates with every kept one, and the slope of every set's loss along the edit.

    A retain set that has no vector of its own gets one by a short fine-tuning. Sets that are not trained on, and the
    runs of baselines, which have no vector of the forget set, have slopes only.
    """
    spec = recipe.vector.correlation
    assert spec is not None  # asked for by who saw that it is there
    forgotten = [vectors.fitted[goal] for goal in sorted(vectors.fitted) if goal[0] == "forget"]
    near = {} if METHODS[recipe.vector.source()].role == "baseline" else _near(target, sets, vectors, recipe, store)
    vector = forgotten[0] if len(forgotten) == 1 else TaskVector.sum(forgotten)

    def make(tmp: Path) -> None:
        found = foresee(target.model, edit, vector, near, sets, target.tokenizer, spec.items)
        write_json_atomic(tmp / "foresight.json", asdict(found))

    others = [[*key, one.digest()] for key, one in sorted(near.items())]
    inputs = [target.fingerprint, edit.digest(), vector.digest(), others, digests(sets), spec.items]
    store.stage("foresight", inputs, make)
    return foresight_from_json(store.read("foresight", "foresight.json"))


def _near(
    target: Loaded, sets: Sequence[LoadedSet], vectors: Vectors, recipe: Recipe, store: Store
) -> dict[tuple[Role, str], TaskVector]:
    """A vector for every retain set that has items to train on."""
    spec = recipe.vector
    trained = [s for s in sets if s.role == "retain" and s.train]
    if vectors.retain is not None and len(trained) == 1 and not spec.uses("msa"):
        return {("retain", trained[0].name): vectors.retain}
    trainee = target
    if trained and recipe.model.quantize != "none":
        trainee = models.load(recipe.model, target.path, for_training=True)
    how = _short(recipe, spec.retain or spec.forget)
    return {
        ("retain", s.name): fit_vector(f"near-{s.name}", target.fingerprint, trainee, [s], how, recipe, store)
        for s in trained
    }


def _short(recipe: Recipe, spec: TrainSpec) -> TrainSpec:
    steps = recipe.vector.correlation.steps if recipe.vector.correlation else None
    if steps is None or (spec.steps is not None and spec.steps <= steps):
        return spec
    return spec.model_copy(update={"steps": steps, "epochs": None})
