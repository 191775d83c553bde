"""The stages of a run, in order. Each is reused if it was finished under the same fingerprint, else made.

Recipe -> sets -> target model -> task vectors -> a score per coefficient -> the choice -> scores on test items ->
exports. What a stage depends on is in its key; what it found is in its folder; nothing passes between stages but that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unlearn import card, export, fetch, finetune, models
from unlearn.batches import Encoded
from unlearn.console import is_main_process, say
from unlearn.data import LoadedSet, load_sets
from unlearn.distributed import wait
from unlearn.errors import DataError
from unlearn.item_files import write_items
from unlearn.methods.contrast import contrast
from unlearn.methods.negate import negate
from unlearn.models import Loaded
from unlearn.recipe import TrainSpec
from unlearn.rundir import write_json_atomic
from unlearn.scored import Scored
from unlearn.trainer import Keep, TrainingLog
from unlearn.vector import TaskVector

VECTOR_FILE = "vector.safetensors"


@dataclass(frozen=True)
class Vectors:
    """The vector that is subtracted, and the ones it was made of."""

    edit: TaskVector
    forget: TaskVector
    retain: TaskVector | None
    logs: tuple[Mapping[str, Any], ...]


class Pipeline(Scored):
    """One run in one folder. Methods are stages; call them in the order of :data:`unlearn.stages.STAGES`."""

    # -- model and data ------------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Fetch (and convert) the model, and bring it into memory."""
        with self.announced("load", f"the model {self.recipe.model.path.partition('#')[0]}"):
            self.where = fetch.locate(self.recipe.model, self.base)
            loaded = models.load(self.recipe.model, self.where)
            size = sum(p.numel() for p in loaded.model.parameters())
            say(f"    {size / 1e6:,.0f} M parameters, {loaded.dtype}, on {loaded.device}".replace("torch.", ""))
        return loaded

    def data(self, tokenizer: Any) -> tuple[LoadedSet, ...]:
        """Read and split every set, and write the scored items where lm-eval (and anyone) can read them."""
        with self.announced("data", "the forget, retain and utility sets"):
            sets = load_sets(self.recipe, self.base, tokenizer)
            for s in sets:
                counts = f"{len(s.train)} train, {len(s.validation)} validation, {len(s.test)} test"
                say(f"    {s.role:8}{s.name}: {counts}")
            self.make(
                "items",
                [s.digest for s in sets],
                lambda tmp: write_items(sets, tokenizer, tmp, ("validation", "test")),
            )
        return sets

    def teach(self, base: Loaded, sets: Sequence[LoadedSet]) -> Loaded:
        """The target model: the base taught forget and retain sets together, or the base as it is."""
        spec = self.recipe.teach
        if spec is None:
            return base
        learned = [s for s in sets if s.role in ("forget", "retain") and s.train]
        with self.announced("teach", "the base model the forget and retain sets"):

            def make(tmp: Path) -> None:
                rows = self._encode(learned, base.tokenizer, spec)
                work = self.folder.work("target", self.stages["target"])
                wait()
                args = (base.model, base.tokenizer, rows, spec)
                if spec.lora is None:
                    log = finetune.train_weights(*args, self.recipe.seed, work, "teaching")
                else:
                    vector, log = finetune.train_vector(*args, spec.lora, self.recipe.seed, work, "teaching", {})
                    finetune.merge(base.model, vector)
                wait()
                if is_main_process():
                    base.model.save_pretrained(tmp)
                    base.tokenizer.save_pretrained(tmp)
                    write_json_atomic(tmp / "training.json", log.to_json("teach"))

            self.make("target", [base.fingerprint, [s.digest for s in learned], _plain(spec), self.recipe.seed], make)
            self.where = str(self.folder.path("target"))
            return models.load(self.recipe.model, self.where)

    # -- vectors -------------------------------------------------------------------------------------------------

    def vectors(self, target: Loaded, sets: Sequence[LoadedSet]) -> Vectors:
        """Fine-tune on the forget set, and on the retain sets when contrasting; shape what is subtracted."""
        spec = self.recipe.vector
        with self.announced("finetune", "LoRA on the forget set" + " and on the retain sets" * self._contrasts):
            trainee = target
            if self.recipe.model.quantize != "none":
                trainee = models.load(self.recipe.model, self.where, for_training=True)
            near = [s for s in sets if s.role == "retain" and s.train]
            if not near and (self._contrasts or spec.retain_kl is not None):
                raise DataError(
                    "no retain set has items to train on, and vector.method contrast and vector.retain_kl need some: "
                    "raise shares.train of a retain set"
                )
            forget = self._vector("forget", target.fingerprint, trainee, sets[:1], spec.forget, near)
            retain = None
            if self._contrasts:
                retain = self._vector("retain", target.fingerprint, trainee, near, spec.retain or spec.forget)
            edit = contrast(forget, retain, spec.mu) if retain is not None else negate(forget)
            self.make("vectors/edit", [edit.digest()], lambda tmp: edit.save(tmp / VECTOR_FILE))
        names = ["target"] * (self.recipe.teach is not None)
        names += ["vectors/forget"] + ["vectors/retain"] * (retain is not None)
        logs = tuple(json.loads((self.folder.path(n) / "training.json").read_text()) for n in names)
        return Vectors(edit, forget, retain, logs)

    @property
    def _contrasts(self) -> bool:
        return self.recipe.vector.method == "contrast"

    def _vector(
        self,
        name: str,
        target: str,
        trainee: Loaded,
        sets: Sequence[LoadedSet],
        spec: TrainSpec,
        near: Sequence[LoadedSet] = (),
    ) -> TaskVector:
        """One fine-tuning; ``near`` are the retain sets of its penalty, where the recipe has one."""
        digests = [s.digest for s in sets]
        lora, retain_kl = self.recipe.vector.lora, self.recipe.vector.retain_kl
        penalised = retain_kl is not None and bool(near)

        def make(tmp: Path) -> None:
            rows = self._encode(sets, trainee.tokenizer, spec)
            work = self.folder.work(stage, self.stages[stage])
            wait()
            meta = {"set": name, "base": target, "data": json.dumps(digests), "lora": json.dumps(_plain(lora))}
            keep = None
            if retain_kl is not None and near:
                keep = Keep(self._encode(near, trainee.tokenizer, spec), retain_kl)
            vector, log = finetune.train_vector(
                trainee.model, trainee.tokenizer, rows, spec, lora, self.recipe.seed, work, f"{name} set", meta, keep
            )
            wait()
            vector.save(tmp / VECTOR_FILE)
            write_json_atomic(tmp / "training.json", log.to_json(name))
            _say_training(log)

        stage = f"vectors/{name}"
        parts = [target, digests, _plain(lora), _plain(spec), self.recipe.seed, self.recipe.model.quantize]
        parts += [_plain(retain_kl), [s.digest for s in near]] if penalised else []
        self.make(stage, parts, make)
        return TaskVector.load(self.folder.path(stage) / VECTOR_FILE)

    def _encode(self, sets: Sequence[LoadedSet], tokenizer: Any, spec: TrainSpec) -> list[Encoded]:
        return [row for s in sets for row in finetune.encode(s.train, s.spec.kind, tokenizer, spec.max_length)]

    # -- exports -------------------------------------------------------------------------------------------------

    def export(self, target: Loaded, vector: TaskVector, about: card.CardFacts) -> dict[str, Any]:
        """Write what the recipe asks for; nothing when no coefficient was chosen."""
        spec, c = self.recipe.export, about.chosen.coefficient
        wanted = [n for n, on in (("adapter", spec.adapter), ("merged", spec.merged)) if on and c > 0]
        found: dict[str, Any] = {}
        if not wanted:
            return found
        with self.announced("export", " and ".join(wanted)):

            def adapter(tmp: Path) -> None:
                facts = export.export_adapter(vector, c, self.where, target.model, tmp, about)
                write_json_atomic(tmp / "export.json", facts)

            def merged(tmp: Path) -> None:
                dtype = None if spec.dtype == "auto" else getattr(torch, spec.dtype)
                facts = export.export_merged(
                    target.model,
                    vector,
                    c,
                    target.tokenizer,
                    tmp,
                    dtype=dtype,
                    shard_size=spec.shard_size,
                    stochastic_rounding=spec.stochastic_rounding,
                    seed=self.recipe.seed,
                    base_name=self.where,
                    about=about,
                )
                write_json_atomic(tmp / "export.json", facts)

            parts = [target.fingerprint, vector.digest(), c, _plain(spec), [asdict(row) for row in about.scores]]
            for name in wanted:
                self.make(f"export/{name}", parts, adapter if name == "adapter" else merged)
                facts = json.loads((self.folder.path(f"export/{name}") / "export.json").read_text())
                found[name] = {"path": f"export/{name}", **facts}
        return found


def _plain(spec: Any) -> Any:
    return spec.model_dump(mode="json")


def _say_training(log: TrainingLog) -> None:
    say(f"    {log.steps} steps, loss {log.losses[0]:.3f} to {log.losses[-1]:.3f}")
