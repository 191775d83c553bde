"""The stage that fits vectors and shapes what is subtracted: one vector per request, made by the recipe's methods."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearn import fetch, finetune, models
from unlearn.batches import Encoded
from unlearn.console import say
from unlearn.data import LoadedSet
from unlearn.distributed import count, wait
from unlearn.encoding import cuts, encode
from unlearn.errors import DataError, ModelError, TrainingError
from unlearn.memory import told
from unlearn.methods.consensus import consensus
from unlearn.methods.msa import msa
from unlearn.methods.random_vector import random_like
from unlearn.models import Loaded, drops_out
from unlearn.precision import mixed_precision
from unlearn.recipe import LoraSpec, ModelSpec, Recipe, SetRole, TrainSpec
from unlearn.recipe_vector import (
    BASELINES,
    NEED_RETAIN,
    NEED_RETAIN_VECTOR,
    ConsensusSpec,
    GradientDifferenceSpec,
    MsaSpec,
    NpoSpec,
)
from unlearn.rundir import write_json_atomic
from unlearn.scored import Scored
from unlearn.shaping import SHAPERS, Materials, shape
from unlearn.stages import LESS, less_training
from unlearn.trainer import Against, Keep
from unlearn.vector import TaskVector
from unlearn.wording import counted

VECTOR_FILE = "vector.safetensors"
Goal = tuple[SetRole, str]
_TRAINED_AGAINST = ("gradient_ascent", "gradient_difference", "npo")


@dataclass(frozen=True)
class Vectors:
    """What was fitted, and what is made of it.

    ``parts`` has, per set to forget or to learn, what is subtracted for it (for a set to learn: minus its vector), and
    for an analogy one part. ``fitted`` are the vectors as they were trained, ``retain`` the one of the retain sets
    where a method needs it; ``stages`` are the names of their stages.
    """

    parts: Mapping[Goal, TaskVector]
    fitted: Mapping[Goal, TaskVector]
    retain: TaskVector | None
    stages: tuple[str, ...]

    def edit(self, weights: Mapping[Goal, float]) -> TaskVector:
        """The sum of the parts by weight: the same bits in whatever order the requests were made."""
        parts = [self.parts[goal] * weights[goal] for goal in sorted(self.parts)]
        return next(iter(self.parts.values())) if len(parts) == 1 else TaskVector.sum(parts)


def clean_checkpoint(recipe: Recipe, base: Path) -> tuple[ModelSpec, str] | None:
    """The clean checkpoint that ``msa`` was given, and where it is, fetched where needed; None without one.

    Raises:
        ModelError: there is none, or it cannot be fetched.
    """
    msa = recipe.vector.msa
    if not recipe.vector.uses("msa") or msa is None or msa.clean is None:
        return None
    spec = recipe.model.model_copy(update={"path": msa.clean, "revision": None})
    try:
        return spec, fetch.locate(spec, base)
    except ModelError as error:
        raise ModelError(str(error).replace("model.path", "vector.msa.clean")) from error


class Fitted(Scored):
    """Vectors of one run."""

    where = ""  # the target model's place
    where_base = ""  # the model's before it was taught anything

    def vectors(self, target: Loaded, sets: Sequence[LoadedSet]) -> Vectors:
        """Fine-tune on every set that the methods need, and shape what is subtracted.

        Raises:
            TrainingError, VectorError: see :mod:`unlearn.finetune` and the methods.
        """
        spec = self.recipe.vector
        with self.announced("finetune", self._what()):
            near = [s for s in sets if s.role == "retain" and s.train]
            clean, trainee = self._trainees(target)
            before = set(self.stages)
            retain = None
            if spec.uses(*NEED_RETAIN_VECTOR):
                retain = self.fit("retain", clean, trainee, near, spec.retain or spec.forget)
            fitted, parts = {}, {}
            for s in (s for s in sets if s.role in ("forget", "learn", "term") and s.train):
                goal = (s.role, s.name)
                fitted[goal] = self._source(s, clean, trainee, near, retain)
                parts[goal] = self._shaped(target, fitted[goal], retain, s, near)
            parts = self._signed(parts)
            stages = tuple(n for n in self.stages if n.startswith("vectors/") and n not in before)
        return Vectors(parts, fitted, retain, stages)

    def edit(self, vectors: Vectors, weights: Mapping[Goal, float]) -> TaskVector:
        """What is subtracted, kept as a stage of its own."""
        with told("finetune", LESS["finetune"]):
            edit = vectors.edit(weights)
            self.make("vectors/edit", [edit.digest(), dict(edit.meta)], lambda tmp: edit.save(tmp / VECTOR_FILE))
        return edit

    def training(self, vectors: Vectors) -> tuple[Mapping[str, Any], ...]:
        """What every fine-tuning of the run did, in order."""
        names = {"teach": "target"} if self.recipe.teach is not None else {}
        names |= {name.removeprefix("vectors/"): name for name in vectors.stages}
        logs = {n: json.loads((self.folder.path(p) / "training.json").read_text("utf-8")) for n, p in names.items()}
        return tuple({**log, "stage": name} for name, log in logs.items())  # another run may have called it otherwise

    # -- fitting -------------------------------------------------------------------------------------------------

    def fit(
        self,
        name: str,
        target: str,
        trainee: Loaded,
        sets: Sequence[LoadedSet],
        spec: TrainSpec,
        near: Sequence[LoadedSet] = (),
        *,
        run: int = 0,
        against: str = "",
        kind: str = "",
    ) -> TaskVector:
        """One fine-tuning, made or reused.

        Args:
            name: Of its stage, below ``vectors/``.
            target: Fingerprint of the model that is fine-tuned.
            trainee: That model, perhaps quantised.
            sets: Whose training items are learned.
            spec: The training.
            near: Retain sets that take part in the loss: of the penalty, or of a baseline.
            run: Added to the recipe's seed.
            against: A baseline's loss in place of cross-entropy.
            kind: What the stage's key calls it, where several names stand for one sort of vector.
        """
        digests = [s.digest for s in sets]
        lora, seed = self.recipe.vector.lora, self.recipe.seed + run
        penalty = self.recipe.penalty() if near and not against else None
        stage = f"vectors/{name}"

        def make(tmp: Path) -> None:
            rows = self.rows(sets, trainee.tokenizer, spec)
            beside = self.rows(near, trainee.tokenizer, spec) if penalty is not None or (against and near) else []
            work = self.folder.work(stage, self.stages[stage])
            wait()
            meta = {"base": target, "data": json.dumps(digests), "lora": json.dumps(_plain(lora))}
            vector, log = finetune.train_vector(
                trainee.model,
                trainee.tokenizer,
                rows,
                spec,
                lora,
                seed,
                work,
                f"{name} set",
                meta,
                Keep(beside, penalty) if penalty is not None else None,
                self._against(against, beside) if against else None,
            )
            wait()
            vector.save(tmp / VECTOR_FILE)
            write_json_atomic(tmp / "training.json", {**log.to_json(name), **cuts([*rows, *beside])})
            say(f"    {log.steps} steps, loss {log.losses[0]:.3f} to {log.losses[-1]:.3f}")

        parts: list[Any] = [target, digests, _plain(lora), _plain(spec), seed, self.recipe.model.quantize]
        parts.append(mixed_precision(trainee.model))
        if penalty is not None:
            parts += [_plain(penalty), [s.digest for s in near]]
        if against:
            settings = getattr(self.recipe.vector, against, None)
            parts += [against, _plain(settings) if settings else None, [s.digest for s in near]]
        parts += masks(trainee.model, lora)
        own = self.recipe.vector.retain is not None and (name == "retain" or name.startswith("near-"))
        with told(stage, less_training("vector.retain" if own else "vector.forget")):
            self.make(stage, parts, make, kind=f"vectors/{kind}" if kind else "", share=True)
        return TaskVector.load(self.folder.path(stage) / VECTOR_FILE)

    def encode(self, sets: Sequence[LoadedSet], tokenizer: Any, spec: TrainSpec) -> list[Encoded]:
        """Training rows of some sets.

        Raises:
            TrainingError: answers that do not fit into ``max_length``, or have no token to learn; names the set.
        """
        found: list[Encoded] = []
        for s in sets:
            try:
                found += encode(s.train, s.spec.kind, tokenizer, spec.max_length)
            except TrainingError as error:
                raise TrainingError(f"{s.role} set {s.name!r}: {error}") from error
        return found

    def trained(self, one: LoadedSet) -> list[TrainSpec]:
        """The fine-tunings that a set gives rows to."""
        spec, found = self.recipe.vector, list[TrainSpec]()
        if self.recipe.teach is not None and one.role in ("forget", "retain"):
            found.append(self.recipe.teach)
        if one.role in ("forget", "learn", "term") and not spec.uses("retain_only"):
            found.append(spec.forget)
        if one.role == "retain" and spec.uses(*NEED_RETAIN):
            found.append(spec.retain or spec.forget)
        if one.role == "retain" and (self.recipe.penalty() is not None or spec.uses("gradient_difference")):
            found.append(spec.forget)
        return found if one.train else []

    def rows(self, sets: Sequence[LoadedSet], tokenizer: Any, spec: TrainSpec) -> list[Encoded]:
        """The same, saying what does not fit into ``max_length``."""
        found = self.encode(sets, tokenizer, spec)
        limit, told = f"max_length ({spec.max_length} tokens)", cuts(found)
        if n := told.get("prompts_cut"):
            most = max(row.cut for row in found)
            say(
                f"    {counted(n, 'prompt')} of {len(found)} had to lose up to {counted(most, 'token')} of the "
                f"beginning to fit into {limit} beside the answer; answers are whole",
                style="yellow",
            )
        if n := told.get("passages_split"):
            say(f"    {counted(n, 'passage')} above {limit} became several rows: {len(found)} in all")
        return found

    def _source(
        self,
        one: LoadedSet,
        clean: str,
        trainee: Loaded,
        near: Sequence[LoadedSet],
        retain: TaskVector | None,
    ) -> TaskVector:
        """The vector that shaping begins with, of one set."""
        spec = self.recipe.vector
        source = spec.steps()[0]
        name = self._stage_name(one)

        def fit(run: int = 0, against: str = "") -> TaskVector:
            beside = near if one.role == "forget" and (against == "gradient_difference" or not against) else ()
            return self.fit(
                f"{name}-run{run}" if run else name,
                *(clean, trainee, [one], spec.forget, beside),
                run=run,
                against=against,
                kind=one.role,
            )

        if source == "retain_only":
            assert retain is not None  # the recipe is checked
            return -retain
        if source in _TRAINED_AGAINST:
            return -fit(against=source)  # theta + its vector is the method's model; what we subtract is minus that
        if source == "consensus":
            runs = (spec.consensus or ConsensusSpec()).runs
            return consensus([fit(run) for run in range(runs)])
        vector = fit()
        if source == "random":
            return random_like(vector, self.recipe.seed)
        if source == "msa":
            assert retain is not None  # the recipe is checked
            how = spec.msa or MsaSpec()
            return msa(vector, retain, how.alpha, how.beta)
        return vector

    def _against(self, loss: str, retain: Sequence[Encoded]) -> Against:
        spec, size = self.recipe.vector, self.recipe.vector.forget.batch_size
        if loss == "gradient_difference":
            weight = (spec.gradient_difference or GradientDifferenceSpec()).weight
            return Against("gradient_difference", retain, weight=weight, batch_size=size)
        if loss == "npo":
            return Against("npo", beta=(spec.npo or NpoSpec()).beta, batch_size=size)
        return Against("gradient_ascent", batch_size=size)

    def _trainees(self, target: Loaded) -> tuple[str, Loaded]:
        """The model that adapters are fitted on, by fingerprint, and as it is held for training."""
        spec = self.recipe.model
        if not self.recipe.vector.uses("msa"):
            if spec.quantize == "none":
                return target.fingerprint, target
            return target.fingerprint, models.load(spec, self.where, for_training=True)
        given = clean_checkpoint(self.recipe, self.base)
        spec, where = given if given is not None else (spec, self.where_base)
        clean = models.load(spec, where)
        trainee = clean if spec.quantize == "none" else models.load(spec, where, for_training=True)
        return clean.fingerprint, trainee

    # -- shaping -------------------------------------------------------------------------------------------------

    def _shaped(
        self,
        target: Loaded,
        fitted: TaskVector,
        retain: TaskVector | None,
        one: LoadedSet,
        near: Sequence[LoadedSet],
    ) -> TaskVector:
        """What the recipe's shapers make of a vector, kept.

        On a GPU ``learned`` and ``perta`` do not give the same bits again, and a run that goes on would find no scores.
        """
        spec, stage = self.recipe.vector, f"shaped/{self._stage_name(one)}"
        if not SHAPERS.keys() & set(spec.steps()):
            return fitted

        def make(tmp: Path) -> None:
            have = self._materials(target, fitted, retain, one, near)
            shape(fitted, spec.steps(), spec, have).save(tmp / VECTOR_FILE)

        vectors = [fitted.digest(), None if retain is None else retain.digest()]
        data = [one.digest, [s.digest for s in near]]
        self.make(stage, [target.fingerprint, vectors, data, _plain(spec), self.recipe.seed], make)
        return TaskVector.load(self.folder.path(stage) / VECTOR_FILE)

    def _materials(
        self,
        target: Loaded,
        fitted: TaskVector,
        retain: TaskVector | None,
        one: LoadedSet,
        near: Sequence[LoadedSet],
    ) -> Materials:
        spec = self.recipe.vector
        forget_rows: Sequence[Encoded] = ()
        retain_rows: Sequence[Encoded] = ()
        if spec.uses("perta", "learned"):
            forget_rows = self.encode([one], target.tokenizer, spec.forget)
            retain_rows = self.encode(near, target.tokenizer, spec.retain or spec.forget)
        pad = target.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return Materials(target.model, pad, self.recipe.seed, fitted, retain, forget_rows, retain_rows)

    def _signed(self, parts: Mapping[Goal, TaskVector]) -> dict[Goal, TaskVector]:
        """What is subtracted: vectors of sets to learn with a minus, the terms of an analogy as one."""
        analogy = self.recipe.analogy
        if analogy is None:
            return {goal: -part if goal[0] == "learn" else part for goal, part in parts.items()}
        a, b, c = (parts["term", data.label()] for data in (analogy.a, analogy.b, analogy.c))
        return {("learn", self.recipe.learn[0].label()): a - b - c}

    def _stage_name(self, one: LoadedSet) -> str:
        first = self.recipe.forget is not None and one.name == self.recipe.forget.label()
        return "forget" if one.role == "forget" and first else f"{one.role}-{one.name}"

    def require(self, sets: Sequence[LoadedSet]) -> None:
        """Training items of a retain set where they are needed, and validation items where training has seen them.

        Raises:
            DataError: there are none.
        """
        spec = self.recipe.vector
        near = [s for s in sets if s.role == "retain" and s.train]
        needy = next((f"vector.method {m}" for m in spec.steps() if m in NEED_RETAIN), None)
        needy = needy or ("vector.retain_kl" if spec.penalty() is not None else None)
        if needy and not near:
            raise DataError(
                f"no retain set has items to train on, and {needy} needs some: raise shares.train of a retain set"
            )
        if spec.uses("learned") and not any(s.validation for s in sets if s.role == "retain"):
            raise DataError(
                "vector.method learned fits its coefficients on the training items of the retain sets, and without "
                "validation items nothing would show that it overfits: raise shares.validation of a retain set"
            )

    def _what(self) -> str:
        spec = self.recipe.vector
        source = spec.steps()[0]
        if source in BASELINES and source not in ("random", "retain_only"):
            return f"the baseline {source.replace('_', ' ')}"
        alone = self.recipe.forget is not None and len(self.recipe.goals()) == 1
        more = " and on the retain sets" if spec.uses(*NEED_RETAIN_VECTOR) else ""
        return ("LoRA on the forget set" if alone else "a LoRA for each set") + more


def masks(model: Any, lora: LoraSpec | None) -> list[int]:
    """What a training depends on where several processes make it: each draws masks of its own, if any are drawn."""
    drawn = drops_out(model) or (lora is not None and lora.dropout > 0)
    return [count()] if count() > 1 and drawn else []


def _plain(spec: Any) -> Any:
    return spec.model_dump(mode="json")
