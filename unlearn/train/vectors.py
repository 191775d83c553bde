"""Every fine-tuning of a run: what the model is taught, and the vectors of the sets to forget or to learn.

transformers' Trainer trains and peft makes the adapter (Hu et al. 2106.09685), off which a task vector is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from unlearn.console import is_main_process, say
from unlearn.data.encoding import Encoded, cuts, encode
from unlearn.data.items import refusals
from unlearn.data.sets import LoadedSet
from unlearn.errors import DataError, ModelError, TrainingError, VectorError, prefixed
from unlearn.model import load as models
from unlearn.model import locate
from unlearn.model.load import Loaded, drops_out, layer_at, layer_of, resolve_targets
from unlearn.processes import count, told, wait
from unlearn.recipe.data import SetRole
from unlearn.recipe.methods import LoraSpec, RmuSpec, TrainSpec
from unlearn.recipe.schema import DENSE_ADAPTER, KEPT, ModelSpec, Recipe
from unlearn.store.cache import sha256
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store
from unlearn.text import counted
from unlearn.train.learned import BegunA, BegunB, begin, fila, materials
from unlearn.train.losses import Against, Keep, adapters
from unlearn.train.moments import Inside, SecondOrder, curvature, put_inside, shrinkers
from unlearn.train.teacher import ignorant, refusing
from unlearn.train.trainer import (
    TrainingLog,
    check_passed_on,
    float32_weights,
    mixed_precision,
    range_for_gradients,
    train,
)
from unlearn.vector.change import Dense, LowRank, check_rank
from unlearn.vector.edit import fit, shape_of
from unlearn.vector.interop import from_checkpoints
from unlearn.vector.methods import consensus, msa, random_like, shape
from unlearn.vector.task_vector import TaskVector, read_vector

VECTOR_FILE = "vector.safetensors"
Goal = tuple[SetRole, str]


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

    def combined(self, weights: Mapping[Goal, float]) -> TaskVector:
        """The sum of the parts by weight: the same bits in whatever order the requests were made."""
        parts = [self.parts[goal] * weights[goal] for goal in sorted(self.parts)]
        return next(iter(self.parts.values())) if len(parts) == 1 else TaskVector.sum(parts)


# -- one training, and the vector that is read off it


def lora_modules(model: PreTrainedModel, lora: LoraSpec, rmu: RmuSpec | None = None) -> tuple[str, ...]:
    """Full paths of the modules that a LoRA is put on; an error where there are none, or its rank is above theirs."""
    targets = resolve_targets(model, lora.targets, lora.depth)
    if rmu is not None:
        last, first = rmu.layer, max(0, rmu.layer - rmu.layers + 1)
        with prefixed("vector.rmu.layer", ModelError):
            layer_at(model, last)
        targets = tuple(name for name in targets if (number := layer_of(name)) is not None and first <= number <= last)
        if not targets:
            raise ModelError(
                f"vector.rmu: vector.lora has no module in the layers {first} to {last} that learn: widen its depth or "
                "targets, or take another layer"
            )
    shapes = {name: shape_of(model.get_submodule(name)) for name in targets}
    check_rank(lora.rank, shapes)
    for key, given in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for end, value in given.items():
            meant = {name: shape for name, shape in shapes.items() if name == end or name.endswith(f".{end}")}
            if not meant:
                raise ModelError(f"vector.lora.{key}: none of the modules with an adapter is called {end}")
            if key == "rank_pattern":
                check_rank(int(value), meant)
    return targets


def train_vector(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Encoded],
    spec: TrainSpec,
    lora: LoraSpec,
    seed: int,
    work: Path,
    label: str,
    meta: Mapping[str, str],
    keep: Keep | None = None,
    against: Against | None = None,
    inside: tuple[Sequence[Encoded], float] | None = None,
) -> tuple[TaskVector, TrainingLog]:
    """LoRA on ``rows``; the model comes back without the adapter, its own weights untouched.

    Args:
        work: Folder for checkpoints; training goes on from the last whole one it finds there.
        label: What the progress bar says.
        meta: Goes into the vector's metadata.
        keep: Retain rows on which the model's predictions must not change.
        against: A baseline's loss in place of cross-entropy. With these losses theta + tau is the model that has
            forgotten ``rows``: who subtracts vectors negates it first.
        inside: Retain rows by whose activations the adapter is shrunk while it is fitted, and mu.
    """
    targets = lora_modules(model, lora, against.how if against is not None and against.loss == "rmu" else None)
    shrunk = starts = None
    if inside is not None:
        say(f"    {label}: reading the activations of {counted(len(inside[0]), 'retain row')}")
        shrunk = shrinkers(model, inside[0], targets, tokenizer.pad_token_id, inside[1])
    factors = None
    if keep is not None and keep.spec.estimate == "kfac":
        say(f"    {label}: reading the curvature of {counted(len(keep.rows), 'retain row')}")
        factors = curvature(model, keep.rows, targets, tokenizer.pad_token_id, seed)
    if against is not None and against.loss == "ihl" and against.how.fila:
        say(f"    {label}: reading gradients, of up to {counted(against.how.samples, 'row')} of either side")
        starts = fila(model, rows, against.retain, targets, lora.rank, against.how.samples, seed)
    quantised = bool(getattr(model, "is_quantized", False))
    mixed = mixed_precision(model)
    if quantised:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=spec.gradient_checkpointing)
    set_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        use_rslora=lora.rslora,
        init_lora_weights=lora.init_lora_weights,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        fan_in_fan_out=isinstance(model.get_submodule(targets[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    with range_for_gradients(model) if mixed == "no" else nullcontext():
        peft_model = get_peft_model(model, config)
        assert isinstance(peft_model, PeftModel)
        if shrunk is not None:
            put_inside(peft_model, shrunk)
        if keep is not None and factors is not None:
            keep = replace(keep, curvature=SecondOrder(peft_model, factors))
        if starts is not None:
            begin(peft_model, starts)
        try:
            log = train(peft_model, tokenizer, rows, spec, seed, work, label, keep, against, mixed)
            rank = lora.rank * (1 if starts is None else 2)
            vector = read_adapter(peft_model, {**meta, "rank": str(rank), "alpha": str(lora.alpha)})
        finally:
            peft_model.unload()
    if vector.norm() == 0.0:
        raise TrainingError(f"{label}: the adapter did not move from zero; raise learning_rate or steps")
    return vector, log


def train_weights(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[Encoded], spec: TrainSpec, seed: int, work: Path, label: str
) -> TrainingLog:
    """Fine-tune all weights in place (teach without a LoRA), in float32; then they are rounded to their format."""
    set_seed(seed)
    mixed = mixed_precision(model)
    try:
        with float32_weights(model):
            model.requires_grad_(True)
            return train(model, tokenizer, rows, spec, seed, work, label, mixed=mixed)
    finally:
        model.requires_grad_(False)


def read_adapter(model: nn.Module, meta: Mapping[str, str]) -> TaskVector:
    """The task vector of a PEFT model's active LoRA: delta = scaling * B @ A per module, float32.

    ``scaling`` is alpha/r, or alpha/sqrt(r) with rsLoRA; peft has it per layer.
    """
    modules: dict[str, LowRank] = {}
    for name, layer in adapters(model):
        inner, outer = layer.lora_A["default"], layer.lora_B["default"]
        a = inner.shrunk() if isinstance(inner, Inside) else inner.weight  # (r, in)
        b = outer.weight  # (out, r)
        if isinstance(inner, BegunA) and isinstance(outer, BegunB):
            a, b = inner.whole(), outer.whole()
        modules[name] = LowRank(a.detach().float().cpu().clone(), b.detach().float().cpu() * layer.scaling["default"])
    return TaskVector(modules, meta)


def merge(model: nn.Module, vector: TaskVector) -> None:
    """Add a vector to the weights for good, in float32, rounded once to the weights' dtype."""
    with torch.no_grad():
        for module, low_rank in fit(model, vector).values():
            weight = module.get_parameter("weight")
            delta = low_rank.delta().to(weight.device)
            weight.add_(delta.T if isinstance(module, Conv1D) else delta)


# -- what is known to fail before anything is trained


def check_trainable(recipe: Recipe, base: Loaded, sets: Sequence[LoadedSet], where: Path) -> None:
    """Refuse what a training would refuse later: no such layer, no items where some are needed, answers too long.

    ``where`` is the recipe's folder.
    """
    spec = recipe.vector
    fits = recipe.edited is None
    if fits:
        lora_modules(base.model, spec.lora, spec.settings("rmu") if spec.uses("rmu") else None)
    if recipe.teach is not None and recipe.teach.lora is not None:
        lora_modules(base.model, recipe.teach.lora)
    for key, training in (("teach", recipe.teach), ("vector.forget", spec.forget), ("vector.retain", spec.retain)):
        if training is not None:
            check_passed_on(training, base.model, key)
    near = [s for s in sets if s.role == "retain" and s.train]
    if fits and (needy := spec.needy()) and not near:
        raise DataError(
            f"no retain set has items to train on, and {needy} needs some: raise shares.train of a retain set"
        )
    if fits and spec.uses("learned") and not any(s.validation for s in sets if s.role == "retain"):
        raise DataError(
            "vector.method learned fits its coefficients on the training items of the retain sets, and without "
            "validation items nothing would show that it overfits: raise shares.validation of a retain set"
        )
    for one in sets:
        for training in _trainings(recipe, one):
            encoded([one], base.tokenizer, training)
        if fits and one.role == "forget" and spec.uses("ignorance"):
            ignorant(one, base.tokenizer, spec.forget, spec.settings("ignorance"))
        if fits and one.role == "forget" and spec.uses("idk_dpo"):
            with prefixed("vector.idk_dpo.refusals", TrainingError):
                refusing(one, base.tokenizer, spec.forget, refusals(spec.settings("idk_dpo").refusals, where))


def _trainings(recipe: Recipe, one: LoadedSet) -> list[TrainSpec]:
    """The fine-tunings that a set gives rows to."""
    spec, found = recipe.vector, list[TrainSpec]()
    if recipe.teach is not None and one.role in ("forget", "retain"):
        found.append(recipe.teach)
    if recipe.edited is not None:
        return found if one.train else []
    if one.role in ("forget", "learn", "term") and spec.reads_forget_rows() and not spec.uses("retain_only"):
        found.append(spec.forget)
    shaped_by = spec.needs("retain") if one.role == "retain" else spec.needs("rows", "activations")
    if one.role in KEPT and shaped_by:
        found.append(spec.retain or spec.forget)
    if one.role in KEPT and (spec.beside() or spec.holds()):
        found.append(spec.forget)
    return found if one.train else []


def clean_checkpoint(recipe: Recipe, base: Path) -> tuple[ModelSpec, str] | None:
    """The clean checkpoint that the recipe gives, and where it is, fetched where needed; None without one."""
    key, given = recipe.vector.clean() or ("", None)
    if given is None:
        return None
    spec = recipe.model.other(given)
    with locate.said_of(key):
        return spec, locate.locate(spec, base)


def load_clean(recipe: Recipe, base: Path) -> Loaded:
    """The model that never saw the forget set: the checkpoint given, or the base before the teaching."""
    spec, where = clean_checkpoint(recipe, base) or (recipe.model, locate.locate(recipe.model, base))
    return models.load(spec, where)


# -- a vector that the recipe brings


def given_places(recipe: Recipe, base: Path) -> tuple[Path, ...]:
    """Where it lies, fetched where needed: its file or folder, or the checkpoints before and after."""
    given = recipe.vector.given()
    if given is None:
        return ()
    model = recipe.model
    if given.path is not None:
        with locate.said_of("vector.from"):
            place = locate.vector_place(model.other(given.path, given.revision), base)
            assert place is not None  # it is fetched
            return (place,)
    assert given.finetuned is not None  # the recipe is checked
    with locate.said_of("vector.from.base"):
        before = locate.model_folder(model if given.base is None else model.other(given.base), base)
    with locate.said_of("vector.from.finetuned"):
        return before, locate.model_folder(model.other(given.finetuned, given.revision), base)


def given_vector(recipe: Recipe, store: Store) -> TaskVector | None:
    """The vector that the recipe brings, kept in the run's folder; None where it is to be fitted."""
    given, places = recipe.vector.given(), given_places(recipe, store.base)
    if given is None:
        return None

    def make(tmp: Path) -> None:
        if given.path is not None:
            vector = read_vector(places[0])
        else:
            vector, report = from_checkpoints(*places, on_unequal="skip" if given.skip_unequal else "error")
            left = f"{counted(len(report.unequal), 'changed tensor')} left out, of norm {report.left_out:.3g}"
            for said in (*report.warnings, *([left] if report.unequal else [])):
                say(f"    ! vector.from: {said}", style="yellow")
        (-vector if given.negate else vector).save(tmp / VECTOR_FILE)

    content = [[[path.name, sha256(path)] for path in locate.weight_files(place)] for place in places]
    elsewhere = told("vectors/given", "shape the vector elsewhere (unlearn vector low-rank)")
    with elsewhere, prefixed("vector.from", VectorError):
        place = store.stage("vectors/given", [content, given.negate, given.skip_unequal], make, share=True)
    vector = TaskVector.load(place / VECTOR_FILE)
    if vector.norm() == 0.0:
        raise VectorError(f"vector.from: {given.words()} changes nothing")
    dense = any(isinstance(change, Dense) for change in vector.modules.values())
    if dense and recipe.export.adapter and not recipe.vector.uses("low_rank"):
        raise VectorError(f"vector.from: {DENSE_ADAPTER}")
    return vector


def require_fit(base: Loaded, given: TaskVector) -> None:
    """Refuse a vector that does not fit the model, naming every module: before anything is trained."""
    with prefixed("vector.from", VectorError):
        fit(base.model, given)


def other_base(given: TaskVector, recipe: Recipe, target: Loaded) -> str:
    """What to say of a vector that names another model than the one it is put on; empty where it does not."""
    named = given.meta.get("base", "")
    if re.fullmatch("[0-9a-f]{64}", named):
        same = named == target.fingerprint
        named = "a model with other weights, number format or tokenizer"
    else:
        names = {Path(path).name.lower() for path in (recipe.model.path, target.path)}
        same = not named or Path(named).name.lower() in names
    return "" if same else f"vector.from: it was made for {named}, and is put on {recipe.model.path}"


# -- rows


def encoded(sets: Sequence[LoadedSet], tokenizer: Any, spec: TrainSpec) -> list[Encoded]:
    """Training rows of some sets; an error names the set whose answers have no token to learn, or too many."""
    found: list[Encoded] = []
    for s in sets:
        with prefixed(f"{s.role} set {s.name!r}", TrainingError):
            found += encode(s.train, s.spec.kind, tokenizer, spec.max_length)
    return found


def training_rows(sets: Sequence[LoadedSet], tokenizer: Any, spec: TrainSpec) -> list[Encoded]:
    """The same, saying what does not fit into ``max_length``."""
    found = encoded(sets, tokenizer, spec)
    limit, lost = f"max_length ({spec.max_length} tokens)", cuts(found)
    if n := lost.get("prompts_cut"):
        most = max(row.cut for row in found)
        say(
            f"    {counted(n, 'prompt')} of {len(found)} had to lose up to {counted(most, 'token')} of the "
            f"beginning to fit into {limit} beside the answer; answers are whole",
            style="yellow",
        )
    if n := lost.get("passages_split"):
        say(f"    {counted(n, 'passage')} above {limit} became several rows: {len(found)} in all")
    return found


# -- teaching


def teach(name: str, base: Loaded, learned: Sequence[LoadedSet], recipe: Recipe, store: Store) -> Path:
    """The folder of the base model fine-tuned on some sets (``recipe.teach``). The base in memory is used up."""
    spec = recipe.teach
    assert spec is not None  # asked for by who saw that it is there
    label = "teaching" if name == "target" else f"teaching the {name}"

    def make(tmp: Path) -> None:
        rows = training_rows(learned, base.tokenizer, spec)
        work = store.work(name)
        wait()
        args = (base.model, base.tokenizer, rows, spec)
        if spec.lora is None:
            log = train_weights(*args, recipe.seed, work, label)
        else:
            vector, log = train_vector(*args, spec.lora, recipe.seed, work, label, {})
            merge(base.model, vector)
        wait()
        if is_main_process():
            base.model.save_pretrained(tmp)
            base.tokenizer.save_pretrained(tmp)
            line = log.to_json("teach" if name == "target" else name)
            write_json_atomic(tmp / "training.json", {**line, **cuts(rows)})

    inputs = [base.fingerprint, [s.digest for s in learned], spec, recipe.seed]
    inputs += [["learned in float32", mixed_precision(base.model)], *masks(base.model, spec.lora)]
    with told(name, less_training("teach") + ("" if spec.lora else ", or give teach.lora")):
        return store.stage(name, inputs, make, kind="target", share=True)


# -- fitting


def fit_vectors(
    target: Loaded, sets: Sequence[LoadedSet], recipe: Recipe, store: Store, given: TaskVector | None = None
) -> Vectors:
    """Fine-tune on every set that the methods need, and shape what is subtracted.

    ``given`` stands for the vector of the one set to forget or to learn.
    """
    spec = recipe.vector
    near = [s for s in sets if s.role == "retain" and s.train]
    # not fine-tuned on, as retain sets are for a retain vector: only read beside them
    beside = [*near, *(s for s in sets if s.role == "utility" and s.train)]
    trainee, before = _trainee(target, recipe, store), set(store.keys)
    retain = None
    if spec.needs("retain_vector"):
        retain = fit_vector("retain", trainee, near, spec.retain or spec.forget, recipe, store)
    fitted, parts = dict[Goal, TaskVector](), dict[Goal, TaskVector]()
    for one in sets:
        if one.role in ("forget", "learn", "term") and (one.train or given is not None):
            goal = (one.role, one.name)
            if given is not None:  # as those fitted here are: of the target
                given = TaskVector(given.modules, {**given.meta, "base": target.fingerprint})
            fitted[goal] = _source(one, trainee, beside, retain, recipe, store, given)
            parts[goal] = _shaped(one, target, fitted[goal], retain, beside, recipe, store)
    stages = tuple(n for n in store.keys if n.startswith("vectors/") and n not in before)
    return Vectors(_signed(parts, recipe), fitted, retain, stages)


def what_is_fitted(recipe: Recipe) -> str:
    """The fitting in words, for its announcement."""
    spec = recipe.vector
    source = spec.steps()[0]
    if (given := spec.given()) is not None:
        return f"the vector of {given.words()}{', LoRA on the retain sets' if spec.needs('retain_vector') else ''}"
    if spec.loss():
        return f"the baseline {source.replace('_', ' ')}"
    alone = recipe.forget is not None and len(recipe.goals()) == 1
    more = " and on the retain sets" if spec.needs("retain_vector") else ""
    return ("LoRA on the forget set" if alone else "a LoRA for each set") + more


def fit_vector(
    name: str,
    trainee: Loaded,
    sets: Sequence[LoadedSet],
    spec: TrainSpec,
    recipe: Recipe,
    store: Store,
    near: Sequence[LoadedSet] = (),
    *,
    run: int = 0,
    against: str = "",
    kind: str = "",
) -> TaskVector:
    """One fine-tuning, made or found again.

    Args:
        name: Of its stage, below ``vectors/``.
        trainee: The model that is fine-tuned (:func:`as_trained`).
        sets: Whose training items are learned.
        near: Retain and utility sets that take part in the loss: of the penalty, or of a baseline.
        run: Added to the recipe's seed.
        against: A baseline's loss in place of cross-entropy.
        kind: What the stage's key calls it, where several names stand for one sort of vector.
    """
    digests, lora, seed = [s.digest for s in sets], recipe.vector.lora, recipe.seed + run
    penalty = recipe.penalty() if near and against in ("", "ignorance") else None
    stage = f"vectors/{name}"
    asks_clean = against == "ignorance" and recipe.vector.settings(against).teacher == "clean"
    clean = load_clean(recipe, store.base) if asks_clean else None
    said = refusals(recipe.vector.settings(against).refusals, store.base) if against == "idk_dpo" else ()

    def make(tmp: Path) -> None:
        rows = training_rows(sets, trainee.tokenizer, spec)
        inside = recipe.vector.inside if near else None
        needed = penalty is not None or recipe.vector.holds() or inside is not None
        beside = training_rows(near, trainee.tokenizer, spec) if near and needed else []
        other = _against(recipe, against, beside, sets[0], trainee, clean, said) if against else None
        work = store.work(stage)
        of = {"data": json.dumps(digests), "lora": json.dumps(lora.model_dump(mode="json"))}
        meta = {"base": trainee.fingerprint, **of}
        wait()
        vector, log = train_vector(
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
            other,
            (beside, inside) if inside is not None else None,
        )
        wait()
        vector.save(tmp / VECTOR_FILE)
        write_json_atomic(tmp / "training.json", {**log.to_json(name), **cuts([*rows, *beside])})
        say(f"    {log.steps} steps, loss {log.losses[0]:.3f} to {log.losses[-1]:.3f}")

    inputs: list[Any] = [trainee.fingerprint, digests, lora, spec, seed, recipe.model.quantize]
    inputs.append(mixed_precision(trainee.model))
    if penalty is not None:
        inputs += [penalty, [s.digest for s in near]]
    if against:
        settings = getattr(recipe.vector, against, None)
        inputs += [against, settings, [s.digest for s in near if against != "ignorance"]]
    if against == "ignorance":  # whose teacher's prompts are made of the wordings
        inputs += [[s.spec.prompts("train") for s in sets], clean.fingerprint if clean is not None else None]
    if said:
        inputs.append(said)
    if near and recipe.vector.inside is not None:
        inputs += ["inside", recipe.vector.inside, [s.digest for s in near]]
    inputs += masks(trainee.model, lora)
    own = recipe.vector.retain is not None and (name == "retain" or name.startswith("near-"))
    with told(stage, less_training("vector.retain" if own else "vector.forget")):
        place = store.stage(stage, inputs, make, kind=f"vectors/{kind}" if kind else "", share=True)
    return TaskVector.load(place / VECTOR_FILE)


def save_edit(vector: TaskVector, store: Store) -> TaskVector:
    """Keep what is subtracted as a stage of its own."""
    store.stage("vectors/edit", [vector.digest(), dict(vector.meta)], lambda tmp: vector.save(tmp / VECTOR_FILE))
    return vector


def training_logs(vectors: Vectors | None, recipe: Recipe, store: Store) -> tuple[Mapping[str, Any], ...]:
    """What every fine-tuning of the run did, in order."""
    names = {"teach": "target"} if recipe.teach is not None else {}
    names |= {name.removeprefix("vectors/"): name for name in (vectors.stages if vectors is not None else ())}
    # another run, from which a stage was taken, may have called it otherwise
    return tuple({**store.read(stage, "training.json"), "stage": name} for name, stage in names.items())


def as_trained(model: Loaded, spec: ModelSpec) -> Loaded:
    """A model, known by its own fingerprint, as adapters are fitted on it: quantised where the recipe says so."""
    if spec.quantize == "none":
        return model
    return replace(models.load(spec, model.path, for_training=True), fingerprint=model.fingerprint)


def _trainee(target: Loaded, recipe: Recipe, store: Store) -> Loaded:
    """The model that adapters are fitted on."""
    spec = recipe.vector
    if spec.from_ is not None and not spec.needs("retain_vector"):
        return target  # nothing is fitted
    return as_trained(load_clean(recipe, store.base) if spec.uses("msa") else target, recipe.model)


def _source(
    one: LoadedSet,
    trainee: Loaded,
    near: Sequence[LoadedSet],
    retain: TaskVector | None,
    recipe: Recipe,
    store: Store,
    given: TaskVector | None,
) -> TaskVector:
    """The vector that shaping begins with, of one set: fitted, or the one given."""
    spec = recipe.vector
    source, name = spec.steps()[0], _stage_name(one, recipe)

    def fit(run: int = 0, against: str = "") -> TaskVector:
        beside = near if one.role == "forget" and (not spec.loss() or (against and spec.holds())) else ()
        label = f"{name}-run{run}" if run else name
        asked = (label, trainee, [one], spec.forget, recipe, store, beside)
        return fit_vector(*asked, run=run, against=against, kind=one.role)

    if source == "retain_only":
        assert retain is not None  # the recipe is checked
        return -retain
    if source == "ignorance" or spec.loss():
        return -fit(against=source)  # theta + its vector is the method's model; what we subtract is minus that
    if source == "consensus":
        return consensus([fit(run) for run in range(spec.settings("consensus").runs)])
    vector = fit() if given is None else given
    if source == "random":
        return random_like(vector, recipe.seed)
    if source == "msa":
        assert retain is not None  # the recipe is checked
        how = spec.settings("msa")
        return msa(vector, retain, how.alpha, how.beta)
    return vector


def _writes_in(model: Loaded) -> tuple[str, int]:
    """The tokenizer, and how many tokens the head speaks of."""
    return model.words, int(model.model.get_output_embeddings().weight.shape[0])


def _against(
    recipe: Recipe,
    loss: Any,
    retain: Sequence[Encoded],
    one: LoadedSet,
    trainee: Loaded,
    clean: Loaded | None,
    sentences: Sequence[str],
) -> Against:
    spec, how = recipe.vector, recipe.vector.settings(loss)
    if loss == "ignorance":
        if clean is not None and clean.fingerprint == trainee.fingerprint:
            raise ModelError("vector.ignorance.clean: that is the model itself, which knows what is to be forgotten")
        if clean is not None and _writes_in(clean) != _writes_in(trainee):
            raise ModelError(f"vector.ignorance.clean: {clean.path} has another tokenizer or vocabulary than the model")
        teacher = ignorant(one, trainee.tokenizer, spec.forget, how, clean.model if clean is not None else None)
        return Against("ignorance", how, teacher=teacher)
    asked = refusing(one, trainee.tokenizer, spec.forget, sentences) if sentences else None
    return Against(loss, how, retain, asked, spec.forget.batch_size, recipe.seed)


def _shaped(
    one: LoadedSet,
    target: Loaded,
    fitted: TaskVector,
    retain: TaskVector | None,
    near: Sequence[LoadedSet],
    recipe: Recipe,
    store: Store,
) -> TaskVector:
    """What the recipe's shapers make of a vector, kept.

    On a GPU ``learned`` and ``perta`` do not give the same bits again, and a run that goes on would find no scores.
    """
    spec = recipe.vector
    if not spec.steps()[1:]:
        return fitted

    def make(tmp: Path) -> None:
        forget_rows: Sequence[Encoded] = ()
        retain_rows: Sequence[Encoded] = ()
        if spec.needs("rows", "activations"):
            forget_rows = encoded([one], target.tokenizer, spec.forget)
            retain_rows = encoded(near, target.tokenizer, spec.retain or spec.forget)
        pad = target.tokenizer.pad_token_id
        assert isinstance(pad, int)
        have = materials(target.model, pad, recipe.seed, fitted, retain, forget_rows, retain_rows)
        shape(fitted, spec, have).save(tmp / VECTOR_FILE)

    digests = [fitted.digest(), None if retain is None else retain.digest()]
    inputs = [target.fingerprint, digests, [one.digest, [s.digest for s in near]], spec, recipe.seed]
    inputs += spec.sources()
    return TaskVector.load(store.stage(f"shaped/{_stage_name(one, recipe)}", inputs, make) / VECTOR_FILE)


def _signed(parts: Mapping[Goal, TaskVector], recipe: Recipe) -> dict[Goal, TaskVector]:
    """What is subtracted: vectors of sets to learn with a minus, the terms of an analogy as one."""
    analogy = recipe.analogy
    if analogy is None:
        return {goal: -part if goal[0] == "learn" else part for goal, part in parts.items()}
    a, b, c = (parts["term", data.label()] for data in (analogy.a, analogy.b, analogy.c))
    return {("learn", recipe.learn[0].label()): a - b - c}


def _stage_name(one: LoadedSet, recipe: Recipe) -> str:
    first = recipe.forget is not None and one.name == recipe.forget.label()
    return "forget" if one.role == "forget" and first else f"{one.role}-{one.name}"


def masks(model: Any, lora: LoraSpec | None) -> list[int]:
    """What a training depends on where several processes make it: each draws masks of its own, if any are drawn."""
    drawn = drops_out(model) or (lora is not None and lora.dropout > 0)
    return [count()] if count() > 1 and drawn else []


def less_training(key: str) -> str:
    """What makes a training need less memory, by the recipe's key."""
    return (
        f"lower {key}.batch_size (and raise {key}.accumulation by as much) or {key}.max_length, or set "
        f"{key}.gradient_checkpointing to true"
    )
