"""The stage that measures before the edit what it will cost: see :mod:`unlearn.foresight`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unlearn import models
from unlearn.data import LoadedSet
from unlearn.fitted import Fitted, Vectors
from unlearn.foresight import foresee
from unlearn.models import Loaded
from unlearn.recipe import TrainSpec
from unlearn.recipe_vector import BASELINES
from unlearn.report import Foresight, Role, foresight_from_json
from unlearn.rundir import write_json_atomic
from unlearn.stages import digests
from unlearn.vector import TaskVector


class Foreseen(Fitted):
    """Correlations and slopes of one run."""

    def foresee(
        self, target: Loaded, sets: Sequence[LoadedSet], vectors: Vectors, edit: TaskVector
    ) -> Foresight | None:
        """How the forgotten task correlates with every kept one, and the slope of every set's loss along the edit.

        A retain set that has no vector of its own gets one by a short fine-tuning. Sets that are not trained on, and
        the runs of baselines, which have no vector of the forget set, have slopes only. None where the recipe does not
        want it or forgets nothing.
        """
        spec = self.recipe.vector.correlation
        forgotten = [vectors.fitted[goal] for goal in sorted(vectors.fitted) if goal[0] == "forget"]
        if spec is None or not forgotten:
            return None
        with self.announced("foresee", "what the edit will cost, before it is made"):
            baseline = self.recipe.vector.steps()[0] in BASELINES
            near = {} if baseline else self._near(target, sets, vectors)
            vector = forgotten[0] if len(forgotten) == 1 else TaskVector.sum(forgotten)

            def make(tmp: Path) -> None:
                found = foresee(target.model, edit, vector, near, sets, target.tokenizer, spec.items)
                write_json_atomic(tmp / "foresight.json", asdict(found))

            others = [[*key, one.digest()] for key, one in sorted(near.items())]
            parts = [target.fingerprint, edit.digest(), vector.digest(), others, digests(sets), spec.items]
            self.make("foresight", parts, make)
            found = self.folder.path("foresight") / "foresight.json"
            return foresight_from_json(json.loads(found.read_text("utf-8")))

    def _near(self, target: Loaded, sets: Sequence[LoadedSet], vectors: Vectors) -> dict[tuple[Role, str], TaskVector]:
        """A vector for every retain set that has items to train on."""
        spec = self.recipe.vector
        trained = [s for s in sets if s.role == "retain" and s.train]
        if vectors.retain is not None and len(trained) == 1 and not spec.uses("msa"):
            return {("retain", trained[0].name): vectors.retain}
        trainee = target
        if trained and self.recipe.model.quantize != "none":
            trainee = models.load(self.recipe.model, self.where, for_training=True)
        how = self._short(spec.retain or spec.forget)
        return {("retain", s.name): self.fit(f"near-{s.name}", target.fingerprint, trainee, [s], how) for s in trained}

    def _short(self, spec: TrainSpec) -> TrainSpec:
        steps = self.recipe.vector.correlation.steps if self.recipe.vector.correlation else None
        if steps is None or (spec.steps is not None and spec.steps <= steps):
            return spec
        return spec.model_copy(update={"steps": steps, "epochs": None})
