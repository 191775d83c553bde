"""What every stage shares: a key of all it depends on, a folder that is whole or absent, its announcement, its time."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from unlearn.console import is_main_process, say
from unlearn.data.encoding import Encoded, cuts, encode, reach, scored_rows
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet, at_prefixes, load_sets, write_items
from unlearn.errors import BrokenModelError, DataError, EvaluationError, ModelError, RunFolderError, TrainingError
from unlearn.evidence import benchmarks as benchmark_tasks
from unlearn.evidence import reference as references
from unlearn.evidence.attacks import Judge
from unlearn.evidence.attacks_ask import ask, sample, wordings
from unlearn.evidence.attacks_weights import edited_copy, forgotten_rows, parted, quantised, relearn, unrelated_rows
from unlearn.evidence.benchmarks import read_samples
from unlearn.evidence.boards import Log, absent, read_log, read_scored, rows
from unlearn.evidence.foresight import foresee
from unlearn.evidence.lens import logit_lens, unavailable
from unlearn.evidence.membership import SAMPLES, judge, members_of, require_rows, save, tell
from unlearn.model import load as models
from unlearn.model import locate as fetch
from unlearn.model.load import Loaded, drops_out, numbers, place
from unlearn.processes import count, told, wait
from unlearn.recipe.data import SetRole, Split
from unlearn.recipe.evaluation import ChooseSpec, PushSpec, RobustnessSpec
from unlearn.recipe.methods import (
    BASELINES,
    NEED_RETAIN,
    NEED_RETAIN_VECTOR,
    ConsensusSpec,
    GradientDifferenceSpec,
    LoraSpec,
    MsaSpec,
    NpoSpec,
    TeachSpec,
    TrainSpec,
)
from unlearn.recipe.metrics import Key, goal_metrics
from unlearn.recipe.schema import ModelSpec, Recipe
from unlearn.report import publish as card
from unlearn.report.publish import able, push
from unlearn.results import (
    LENS,
    AttackScore,
    Benchmark,
    Chosen,
    Example,
    Foresight,
    Membership,
    Robustness,
    Role,
    SweepPoint,
    TaskScore,
    Who,
    foresight_from_json,
    quantisation,
    relearning,
)
from unlearn.score import search, tasks
from unlearn.score import search as joint
from unlearn.score import sweep as score_files
from unlearn.score.evaluate import evaluate
from unlearn.score.packed import PackedLM, interface
from unlearn.score.search import BROKEN, bisect, may_tie
from unlearn.score.sweep import complete
from unlearn.score.tasks import TaskSet
from unlearn.store.files import fingerprint, some, write_json_atomic
from unlearn.store.provenance import surroundings, tidy
from unlearn.store.stages import STAGE_FILE, Pool, RunFolder, damage_of, link_tree, read_record
from unlearn.text import counted
from unlearn.train import fit as finetune
from unlearn.train.losses import Against, Keep
from unlearn.train.precision import mixed_precision
from unlearn.vector import write as export
from unlearn.vector.edit import Edit
from unlearn.vector.methods import consensus, msa, random_like
from unlearn.vector.shaping import SHAPERS, Materials, shape
from unlearn.vector.task_vector import TaskVector

STAGES = (
    *("load", "data", "teach", "finetune", "balance", "foresee", "sweep", "test"),
    *("reference", "benchmark", "membership", "robustness", "export"),
)

_SCORING = "lower eval.batch_tokens (engine packed) or eval.batch_size (engine hf)"
# What makes a stage need less memory: the recipe's keys.
LESS = {
    "load": "choose a smaller model",
    "finetune": "shape the vector by fewer of vector.method's steps",
    "balance": _SCORING,
    "foresee": "set vector.correlation to null, which leaves the foresight out",
    "sweep": _SCORING,
    "test": _SCORING,
    "reference": f"{_SCORING}, or leave reference out",
    "benchmark": f"{_SCORING}, or leave benchmark out",
    "membership": "leave holdout out, and with it membership inference",
    "robustness": "set robustness to null",
    "export": "set export.merged to false: the adapter alone needs no whole weights",
}


def less_training(key: str) -> str:
    """The same for a training, by the recipe's key."""
    return (
        f"lower {key}.batch_size (and raise {key}.accumulation by as much) or {key}.max_length, or set "
        f"{key}.gradient_checkpointing to true"
    )


def digests(sets: Iterable[LoadedSet]) -> list[list[str]]:
    """What scores depend on: all sets but the held-out one, which is never scored."""
    return [[s.role, s.name, s.digest] for s in sets if s.role != "holdout"]


def written(sets: Iterable[LoadedSet]) -> list[list[Any]]:
    """What texts that a model writes for the sets depend on: how long they get, and by the prompt where they end."""
    return [[s.role, s.name, s.spec.continuation, s.spec.prompts("test")[0]] for s in sets if s.role != "holdout"]


class Stages:
    """The stages of one run, made or reused.

    ``stages`` collects the key of every stage, ``seconds`` what each took (also when it took it in an earlier run).
    """

    def __init__(self, recipe: Recipe, base: Path, folder: RunFolder, pool: Pool | None = None) -> None:
        self.recipe = recipe
        self.base = base
        self.folder = folder
        self.pool = pool
        self.stages: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._surroundings = [surroundings(), numbers(place(recipe.model.device))]

    def key(self, name: str, parts: Sequence[Any]) -> str:
        """The key of a stage that depends on ``parts``."""
        return fingerprint(self._surroundings, name, *parts)

    def make(
        self,
        name: str,
        parts: Sequence[Any],
        make: Callable[[Path], object],
        kind: str = "",
        *,
        share: bool = False,
    ) -> None:
        """Make a stage unless it is there already under the same key.

        ``kind`` stands for the name in the key, where stages of several names may hold one thing. ``share`` puts it
        into the pool, for other runs that would make the same.
        """
        key = self.key(kind or name, parts)
        self.stages[name] = key
        done = self.folder.finished(name, key)
        wait()  # nobody may look for a stage that another process is writing
        if done is not None:
            say(f"    {name}: as before", style="dim")
            return
        pool = self.pool if share else None
        with pool.making(key) if pool is not None else nullcontext() as lock:
            wait()  # the main process has its turn: from here on the pool does not change under this key
            pooled = pool.find(key) if pool is not None else None
            found = pooled or self._elsewhere(key)
            with self.folder.writing(name, key) as tmp:
                if found is None:
                    make(tmp)
                elif is_main_process() and found == pooled:
                    link_tree(found, tmp, frozenset({STAGE_FILE}))
                elif is_main_process():  # another run's folder is its owner's: nothing is shared with it
                    _copy_stage(found, tmp)
            wait()
            if pool is not None and pooled is None and lock is not None:
                pool.put(key, self.folder.path(name), lock)
        if found is not None:
            say(f"    {name}: taken from {tidy(str(found))}", style="dim")

    def _elsewhere(self, key: str) -> Path | None:
        """A whole and undamaged stage of this key in one of the run folders that the recipe lets us take from.

        Raises:
            RunFolderError: one of them is not there.
        """
        for given in self.recipe.reuse:
            root = self.base / given
            if not root.is_dir():
                raise RunFolderError(f"reuse: there is no run folder {root}; remove it from the recipe")
            for seal in sorted(root.rglob(STAGE_FILE)):
                record = read_record(seal.parent)
                if record is not None and record.key == key and not damage_of(seal.parent, record, "sha256"):
                    return seal.parent
        return None

    @contextmanager
    def announced(self, stage: str, what: str) -> Iterator[None]:
        """Say which stage begins, and what it took, in this run or in the one that made it."""
        absent = {
            "teach": self.recipe.teach is None,
            "balance": len(self.recipe.goals()) < 2,
            "foresee": self.recipe.vector.correlation is None or self.recipe.forget is None,
            "reference": not references.is_model(self.recipe),
            "benchmark": self.recipe.benchmark is None,
            "membership": self.recipe.holdout is None,
            "robustness": self.recipe.robustness is None,
        }
        stages = [s for s in STAGES if not absent.get(s)]
        say(f"[{stages.index(stage) + 1}/{len(stages)}] {stage}: {what}", style="bold")
        before = set(self.stages)
        started = time.monotonic()
        with told(stage, LESS.get(stage, "lower limit of the largest sets")):
            yield
        took = time.monotonic() - started
        say(f"    {took:.1f} s", style="dim")
        made = [r.seconds for n in set(self.stages) - before if (r := self.folder.record(n)) is not None]
        self.seconds[stage] = round(max(took, sum(made)), 2)


def _copy_stage(found: Path, to: Path) -> None:
    """Copy what a stage's seal lists. Whatever else lies there, links above all, is not of the stage.

    Raises:
        RunFolderError: a file of the stage is a link, or its name leads out of the stage's folder.
    """
    record = read_record(found)
    for name in record.files if record is not None else ():
        source = found / name
        if not source.resolve().is_relative_to(found.resolve()) or source.is_symlink() or ".." in Path(name).parts:
            raise RunFolderError(f"reuse: {found} is no stage that a run made: {some([name])} leads out of it")
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, to / name)


# -- the stages that score


@dataclass(frozen=True)
class _Desk:
    """What the items of one split are scored with, the same at every coefficient.

    ``key`` is all that its scores depend on but the coefficient; ``vector`` the digest of what is subtracted. A
    combination of vectors has a ``place`` of its own and says which one it is.
    """

    split: Split
    lm: HFLM
    tasks: TaskSet
    edit: Edit
    sets: Sequence[LoadedSet]
    key: tuple[Any, ...]
    vector: str
    place: str = "eval"
    says: str = ""


class Scored(Stages):
    """Balance, sweep and test of one run."""

    def __init__(self, recipe: Recipe, base: Path, folder: RunFolder, pool: Pool | None = None) -> None:
        super().__init__(recipe, base, folder, pool)
        self._twins: dict[tuple[str, float], Path] = {}  # validation scores that the balance took, by vector
        self._built: dict[tuple[Split, bool], TaskSet] = {}

    def balance(
        self, target: Loaded, sets: Sequence[LoadedSet], parts: Mapping[tuple[SetRole, str], TaskVector]
    ) -> Mapping[tuple[SetRole, str], float]:
        """Relative weights of what is subtracted for each goal, found on validation items; the largest is 1.

        A single part has weight 1, and nothing is scored. What is scored here is not scored again by the sweep.
        """
        if len(parts) == 1:
            return dict.fromkeys(parts, 1.0)
        _, *grid = self.recipe.sweep.grid()
        goals, names = goal_metrics(self.recipe), sorted(parts)
        equal = joint.direction(parts, dict.fromkeys(parts, 1.0))
        with self.announced("balance", f"coefficients of {len(parts)} vectors, together, on validation items"):
            with Edit(target.model, equal) as edit:
                desk = self._desk("validation", target, sets, equal, edit, self.recipe.eval.generate == "sweep")
                points = _Points(self, desk, goals, tasks.kept_metrics(self.recipe, desk.tasks), self.recipe.choose)

            def left(point: SweepPoint) -> float:
                return search.left(point, goals, points.base)

            @functools.cache
            def score(coefficients: tuple[float, ...]) -> SweepPoint:
                scale = max(coefficients)
                vector = joint.direction(parts, {n: c / scale for n, c in zip(names, coefficients, strict=True)})
                digest = vector.digest()
                says = ", ".join(f"{name} {c:g}" for (_, name), c in zip(names, coefficients, strict=True))
                with Edit(target.model, vector) as edit:
                    there = replace(desk, edit=edit, vector=digest, place=f"joint/{digest[:16]}", says=says)
                    point = points.at(there)(scale)
                    self._twins[digest, scale] = self.folder.path(self._stage(there, scale)[0])
                return point

            def diagonal(coefficient: float) -> SweepPoint:
                return score((coefficient,) * len(names))

            seen = None
            if self.recipe.sweep.search == "bisect":
                ties = all(may_tie(key[2]) for key in goals)
                seen = [p.coefficient for p in bisect(grid, points.base, diagonal, left, ties=ties)]
            weights, trail = joint.balance(names, grid, score, lambda a, b: left(a) < left(b), seen)
            found = [[list(t.coefficients), left(t.point), t.point.within_bound] for t in trail]
            self.make(
                "joint/trail",
                [desk.key, [parts[name].digest() for name in names], found],
                lambda tmp: write_json_atomic(tmp / "trail.json", {"names": names, "tried": found}),
            )
        return weights

    def sweep(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector
    ) -> tuple[tuple[SweepPoint, ...], Chosen]:
        """Validation scores at every coefficient, or at those the choice needs, each from the pristine weights."""
        spec, rule = self.recipe.sweep, self.recipe.choose
        goals = goal_metrics(self.recipe)
        _, *grid = spec.grid()
        what = f"{len(grid) + 1} coefficients on validation items"
        if spec.search == "bisect":
            what = f"bisection of {len(grid)} coefficients on validation items"
        with self.announced("sweep", what), Edit(target.model, vector) as edit:
            desk = self._desk("validation", target, sets, vector, edit, self.recipe.eval.generate == "sweep")
            kept = tasks.kept_metrics(self.recipe, desk.tasks)
            points = _Points(self, desk, goals, kept, rule)
            if spec.search == "bisect":
                ties = all(may_tie(key[2]) for key in goals)
                found = bisect(grid, points.base, points, lambda p: search.left(p, goals, points.base), ties=ties)
            else:
                found = (points.base, *(points(c) for c in grid))
        chosen = search.choose(found, goals, kept, rule)
        return found, replace(chosen, search=spec.search, grid=tuple(grid))

    def test(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector, chosen: float
    ) -> tuple[tuple[TaskScore, ...], tuple[TaskScore, ...], tuple[Example, ...]]:
        """Test scores of the target model and at the chosen coefficient, and how both answer a few items."""
        with self.announced("test", "test items, before and after"), Edit(target.model, vector) as edit:
            desk = self._desk("test", target, sets, vector, edit, self.recipe.eval.generate != "none")
            before, after = (self.score(desk, c) for c in (0.0, chosen))
        pairs = zip(score_files.read(before, "completions"), score_files.read(after, "completions"), strict=True)
        examples = tuple(Example(b["set"], b["name"], b["prompt"], b["target"], b["text"], a["text"]) for b, a in pairs)
        return score_files.scores(before), score_files.scores(after), examples

    def score(self, desk: _Desk, coefficient: float) -> Path:
        """Score one coefficient. The folder of the stage, made or reused."""
        stage, parts, kind = self._stage(desk, coefficient)

        def make(tmp: Path) -> None:
            twin = self._twin(desk, coefficient)
            if twin is not None:
                if is_main_process():
                    shutil.copytree(twin, tmp, ignore=shutil.ignore_patterns(STAGE_FILE), dirs_exist_ok=True)
                return
            desk.edit.set(-coefficient)
            if isinstance(desk.lm, PackedLM):
                desk.lm.label = f"λ = {coefficient:g}"
            result = evaluate(
                desk.lm,
                desk.tasks,
                model_name=f"{self.recipe.name}@{coefficient:g}",
                bootstrap=self.recipe.eval.bootstrap if desk.split == "test" else 0,
            )
            if is_main_process():
                result.save(tmp)
            texts = complete(desk.lm, desk.sets, self.recipe.eval.examples) if desk.split == "test" else []
            write_json_atomic(tmp / "scores.json", [asdict(s) for s in result.scores])
            write_json_atomic(tmp / "completions.json", texts)

        self.make(stage, parts, make, kind)
        return self.folder.path(stage)

    def _twin(self, desk: _Desk, coefficient: float) -> Path | None:
        """The stage with the same scores that the balance made."""
        wanted = desk.split == "validation" and desk.place == "eval"
        return self._twins.get((desk.vector, coefficient)) if wanted else None

    def _stage(self, desk: _Desk, coefficient: float) -> tuple[str, list[Any], str]:
        """Name of a stage, what it depends on, and the name that its key has wherever it lies."""
        parts = [*desk.key, desk.vector if coefficient else None, coefficient]
        name = f"{coefficient:g}/{desk.split}"
        return f"{desk.place if coefficient else 'eval'}/{name}", parts, f"eval/{name}"

    def built(self, split: Split, sets: Sequence[LoadedSet], tokenizer: Any, generate: bool) -> TaskSet:
        """All that is scored on one split, built the first time it is asked for: before anything is trained.

        Raises:
            EvaluationError: see :func:`unlearn.score.tasks.build_tasks`.
        """
        if (split, generate) not in self._built:
            items = self.folder.path("items")
            self._built[split, generate] = tasks.build_tasks(
                sets, split, self.recipe, tokenizer, items, generate=generate
            )
        return self._built[split, generate]

    def asked(self, built: TaskSet, sets: Sequence[LoadedSet]) -> list[Any]:
        """What scores depend on beside the model: what is asked, and how it is scored."""
        spec = self.recipe.eval.model_dump(mode="json")
        return [built.digest(), self.scoring, digests(sets), spec, self.recipe.seed]

    @functools.cached_property
    def scoring(self) -> list[str]:
        """What every score of lm-eval's depends on: the task pack, and files that tasks were told of."""
        return [references.pack_digest(), *map(references.content, references.task_files(self.recipe))]

    def lm(self, loaded: Loaded) -> HFLM:
        """lm-eval's interface to a model, by the recipe's engine."""
        return interface(loaded.model, loaded.tokenizer, self.recipe.eval)

    def _desk(
        self,
        split: Split,
        target: Loaded,
        sets: Sequence[LoadedSet],
        vector: TaskVector,
        edit: Edit,
        generate: bool,
    ) -> _Desk:
        lm = self.lm(target)
        built = self.built(split, sets, target.tokenizer, generate)
        key = (target.fingerprint, *self.asked(built, sets), *(written(sets) if split == "test" else []))
        return _Desk(split, lm, built, edit, sets, key, vector.digest())


class _Points:
    """The sweep's points: scores at a coefficient, judged by those at 0, which are taken first.

    Raises:
        EvaluationError: the scores at 0 leave nothing to choose by, see :func:`unlearn.score.search.require_grounds`.
    """

    def __init__(
        self, stages: Scored, desk: _Desk, goals: Sequence[Key], kept: Sequence[Key], rule: ChooseSpec
    ) -> None:
        self._stages = stages
        self._desk = desk
        self._kept = kept
        self._rule = rule
        start = stages.score(desk, 0.0)
        self.base = self._told(search.judge(0.0, score_files.scores(start), score_files.scores(start), kept, rule))
        for key, why in search.require_grounds(self.base, goals, kept, rule).items():
            say(f"    ! {search.say_key(key)} {why}", style="yellow")

    def at(self, desk: _Desk) -> _Points:
        """The same for another vector, judged by the same start."""
        other = copy.copy(self)
        other._desk = desk
        return other

    def __call__(self, coefficient: float) -> SweepPoint:
        try:
            place = self._stages.score(self._desk, coefficient)
        except BrokenModelError:
            return self._told(SweepPoint(coefficient, (), False, collapsed=BROKEN))
        return self._told(
            search.judge(coefficient, score_files.scores(place), self.base.scores, self._kept, self._rule)
        )

    def _told(self, point: SweepPoint) -> SweepPoint:
        say(score_files.told(self._stages.recipe, point, self._desk.says))
        return point


# -- the stage that fits vectors and shapes what is subtracted


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
            TrainingError, VectorError: see :mod:`unlearn.train.fit` and the methods.
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


# -- the stage that measures before the edit what it will cost


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


# -- stages that set the result beside others


@dataclass(frozen=True)
class Subjects:
    """The models that are compared: the target, the target under the edit (if one was chosen), the reference."""

    target: Loaded
    vector: TaskVector
    chosen: float
    reference: Loaded | None

    def __post_init__(self) -> None:
        """Refuse a reference whose numbers per token would be about other tokens.

        Raises:
            ModelError: its tokenizer is another one.
        """
        if self.reference is not None:
            refuse_another(self.target.tokenizer, self.reference.tokenizer)

    def who(self) -> tuple[Who, ...]:
        """Those there are."""
        edited: tuple[Who, ...] = ("edited",) if self.chosen > 0 else ()
        reference: tuple[Who, ...] = ("reference",) if self.reference is not None else ()
        return ("target", *edited, *reference)

    def key(self, who: Who) -> list[Any]:
        """All that the weights of one depend on."""
        if who == "reference":
            assert self.reference is not None
            return [self.reference.fingerprint]
        return [self.target.fingerprint, *([self.vector.digest(), self.chosen] if who == "edited" else [])]

    @contextmanager
    def model(self, who: Who) -> Iterator[Loaded]:
        """One of them, as it is inside the ``with``."""
        if who == "reference":
            assert self.reference is not None
            yield self.reference
        elif who == "target":
            yield self.target
        else:
            with Edit(self.target.model, self.vector) as edit:
                edit.set(-self.chosen)
                yield self.target


def refuse_another(ours: PreTrainedTokenizerFast, theirs: PreTrainedTokenizerFast) -> None:
    """Refuse a reference with another tokenizer.

    Raises:
        ModelError: it has.
    """
    if ours.get_vocab() != theirs.get_vocab():
        raise ModelError(
            "reference: this model has another tokenizer than the target, so that their scores per token cannot "
            "be compared: give one that was made from the same base model"
        )


class Compared(Foreseen):
    """Comparisons of one run."""

    # -- teaching and the retain reference -----------------------------------------------------------------------

    def taught(self, name: str, base: Loaded, learned: Sequence[LoadedSet], spec: TeachSpec, label: str) -> str:
        """The folder of the base model fine-tuned on some sets, made or reused. The base in memory is used up."""

        def make(tmp: Path) -> None:
            rows = self.rows(learned, base.tokenizer, spec)
            work = self.folder.work(name, self.stages[name])
            wait()
            args = (base.model, base.tokenizer, rows, spec)
            if spec.lora is None:
                log = finetune.train_weights(*args, self.recipe.seed, work, label)
            else:
                vector, log = finetune.train_vector(*args, spec.lora, self.recipe.seed, work, label, {})
                finetune.merge(base.model, vector)
            wait()
            if is_main_process():
                base.model.save_pretrained(tmp)
                base.tokenizer.save_pretrained(tmp)
                line = log.to_json("teach" if name == "target" else name)
                write_json_atomic(tmp / "training.json", {**line, **cuts(rows)})

        parts = [base.fingerprint, [s.digest for s in learned], spec.model_dump(mode="json"), self.recipe.seed]
        parts.append(["learned in float32", mixed_precision(base.model)])
        parts += masks(base.model, spec.lora)
        less = less_training("teach") + ("" if spec.lora else ", or give teach.lora")
        with told(name, less):
            self.make(name, parts, make, kind="target", share=True)
        return str(self.folder.path(name))

    def reference(self, sets: Sequence[LoadedSet]) -> Loaded | None:
        """The retain reference in memory; None without one, or where only its log was given.

        Raises:
            DataError: no retain set has items to teach.
            ModelError: it is not there, or not a model of the same tokenizer.
        """
        if not references.is_model(self.recipe):
            return None
        with self.announced("reference", "a model that never saw the forget set"):
            if self.recipe.reference == "train":
                learned = references.to_teach(sets)
                spec = self.recipe.teach
                assert spec is not None  # the recipe is checked
                base = models.load(self.recipe.model, self.where_base)
                where = self.taught("reference", base, learned, spec, "teaching the reference")
            else:
                where = references.locate(self.recipe, self.base)
            return models.load(self.recipe.model, where)

    def reference_scores(self, subjects: Subjects, sets: Sequence[LoadedSet]) -> tuple[TaskScore, ...]:
        """What the reference scores on the test items of the recipe's own sets; empty without one."""
        if subjects.reference is None:
            return ()
        loaded = subjects.reference
        with told("reference", LESS["reference"]):
            built = self.built("test", sets, loaded.tokenizer, self.recipe.eval.generate != "none")
            parts = [*subjects.key("reference"), *self.asked(built, sets)]
            self.make("eval/reference", parts, lambda tmp: self._score(loaded, built, "reference", tmp))
        return score_files.scores(self.folder.path("eval/reference"))

    # -- benchmark -----------------------------------------------------------------------------------------------

    def benchmark(self, subjects: Subjects, sets: Sequence[LoadedSet]) -> Benchmark | None:
        """The rows of a published benchmark, computed from lm-eval's sample files; None where none is asked for."""
        spec = self.recipe.benchmark
        if spec is None:
            return None
        with self.announced("benchmark", f"{spec.name} {spec.set}: {', '.join(subjects.who())}"):
            place, words = subjects.target.tokenizer.name_or_path, subjects.target.words
            built = benchmark_tasks.build(spec, self.base, place, self.recipe.seed)
            engine = {"engine", "batch_tokens", "batch_size", "bootstrap"}
            how = self.recipe.eval.model_dump(mode="json", include=engine)
            asked = [built.digest(), self.scoring, words, spec.model_dump(mode="json", exclude={"path"}), how]
            for who in subjects.who():

                def make(tmp: Path, who: Who = who) -> None:
                    with subjects.model(who) as loaded:
                        self._score(loaded, built, who, tmp)

                self.make(f"benchmark/{who}", [*subjects.key(who), *asked], make, kind="benchmark")
            return self._rows(subjects, sets)

    def _score(self, loaded: Loaded, built: tasks.TaskSet, who: Who, tmp: Path) -> None:
        lm = self.lm(loaded)
        if hasattr(lm, "label"):
            lm.label = who
        result = evaluate(lm, built, model_name=f"{self.recipe.name}-{who}", bootstrap=self.recipe.eval.bootstrap)
        if is_main_process():
            result.save(tmp)
        write_json_atomic(tmp / "scores.json", [asdict(s) for s in result.scores])

    def _rows(self, subjects: Subjects, sets: Sequence[LoadedSet]) -> Benchmark:
        spec, given = self.recipe.benchmark, self.recipe.reference
        assert spec is not None
        logs = {who: read_scored(self.folder.path(f"benchmark/{who}"), spec) for who in subjects.who()}
        reference: Log | Literal["published"] | None = logs.get("reference")
        if given == "published":
            reference = "published"
        elif (log := references.log_file(self.recipe, self.base)) is not None:
            reference = read_log(log)
        try:
            found, missing = rows(logs, reference, self.recipe.name), absent(spec.name, reference)
        except EvaluationError as error:  # what needs no reference is not lost with it
            figure = "Forget quality" if spec.name == "tofu" else "PrivLeak"
            found, missing = rows(logs, None, self.recipe.name), f"{figure} is absent because {error}."
        chosen_on = {item.target for s in sets if s.role in ("forget", "retain") for item in s.validation}
        samples = read_samples(self.folder.path("benchmark/target"))
        asked = {str(row["doc"].get("answer")) for records in samples.values() for row in records}
        shown = {str(who): found[who] for who in subjects.who()}
        return Benchmark(spec.name, spec.set, spec.items, shown, missing, len(asked & chosen_on))

    # -- membership inference ------------------------------------------------------------------------------------

    def membership(self, subjects: Subjects, sets: Sequence[LoadedSet]) -> tuple[Membership, ...]:
        """Whether the forget sets' training items can be told from held-out ones, by model and attack."""
        others = next((s for s in sets if s.role == "holdout"), None)
        if others is None:
            return ()
        forgotten = [s for s in sets if s.role == "forget"]
        members = [(item, s.spec.kind) for s in forgotten for item in members_of(s.train)]
        held = [(item, others.spec.kind) for item in members_of(others.test)]
        what = [*(s.digest for s in forgotten), others.digest]
        with self.announced("membership", f"{len(members)} forget items against {len(held)} held out"):
            for who in subjects.who():

                def make(tmp: Path, who: Who = who) -> None:
                    with subjects.model(who) as loaded:
                        rows = [tell(loaded, items, who) for items in (members, held)]
                    if is_main_process():
                        save(tmp / SAMPLES, *rows)

                self.make(f"membership/{who}", [*subjects.key(who), what], make, kind="membership")
            files = {who: self.folder.path(f"membership/{who}") / SAMPLES for who in subjects.who()}
            return judge(files, self.recipe.eval.bootstrap, self.recipe.seed)


# -- the stage that attacks the result


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
        for shown, unrelated, data in rows:

            def train(model: PreTrainedModel, count: int = shown, other: bool = unrelated, data: Any = data) -> _Scores:
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


# -- the stages of a run, in order. each is reused if it was finished under the same fingerprint, else ma


_FEW = 4  # items of a set that an export is compared on


class Pipeline(Attacked):
    """One run in one folder. Methods are stages; call them in the order of :data:`unlearn.pipeline_stages.STAGES`."""

    # -- model and data ------------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Fetch (and convert) the model, and bring it into memory."""
        # float32 is no TF32, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE or our caller has set
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with self.announced("load", f"the model {self.recipe.model.path.partition('#')[0]}"):
            models.place(self.recipe.model.device)  # before anything is downloaded
            self.where = self.where_base = fetch.locate(self.recipe.model, self.base)
            loaded = models.load(self.recipe.model, self.where)
            size = sum(p.numel() for p in loaded.model.parameters())
            say(f"    {size / 1e6:,.0f} M parameters, {loaded.dtype}, on {loaded.device}".replace("torch.", ""))
        return loaded

    def data(self, base: Loaded) -> tuple[LoadedSet, ...]:
        """Read and split every set, and write the scored items where lm-eval (and anyone) can read them."""
        tokenizer = base.tokenizer
        with self.announced("data", "the forget, retain and utility sets"):
            sets = load_sets(self.recipe, self.base, tokenizer)
            if self.recipe.reference == "train":
                references.to_teach(sets)  # said before anything is trained
            for s in sets:
                counts = f"{len(s.train)} train, {len(s.validation)} validation, {len(s.test)} test"
                say(f"    {s.role:8}{s.name}: {', '.join([counts, *s.left_out()])}")
            self.make(
                "items",
                [base.words, [[s.role, s.name, s.digest, s.spec.continuation] for s in sets]],
                lambda tmp: write_items(at_prefixes(sets, tokenizer), tokenizer, tmp, ("validation", "test")),
            )
        return sets

    def look(self, base: Loaded, sets: Sequence[LoadedSet]) -> None:
        """Get hold of all that later stages ask for: what is missing is said before anything is trained.

        Raises:
            UnlearnError: no such task, benchmark, reference, layer or token; no items where some are needed.
        """
        recipe = self.recipe
        for lora in (recipe.vector.lora, recipe.teach.lora if recipe.teach is not None else None):
            if lora is not None:
                finetune.lora_modules(base.model, lora)
        self.require(sets)
        for one in sets:
            for spec in self.trained(one):
                self.encode([one], base.tokenizer, spec)  # an answer that no row can hold
        self.built("validation", sets, base.tokenizer, recipe.eval.generate == "sweep")
        self.built("test", sets, base.tokenizer, recipe.eval.generate != "none")
        if recipe.robustness is not None and recipe.robustness.samples:
            self.built("test", sets, base.tokenizer, generate=True)  # what is sampled is compared by its words as well
        if recipe.benchmark is not None and recipe.benchmark.name == "tofu":
            place = base.tokenizer.name_or_path  # MUSE's take long to cut into tokens, and its rows were read
            benchmark_tasks.build(recipe.benchmark, self.base, place, recipe.seed)
        if references.is_model(recipe) and recipe.reference != "train":
            where = references.locate(recipe, self.base)
            refuse_another(base.tokenizer, references.tokenizer(recipe, where))
        clean_checkpoint(recipe, self.base)
        if recipe.holdout is not None:
            require_rows(sets, base)
        if recipe.export.push_to_hub is not None:
            able(recipe.export.push_to_hub)

    def teach(self, base: Loaded, sets: Sequence[LoadedSet]) -> Loaded:
        """The target model: the base taught forget and retain sets together, or the base as it is."""
        spec = self.recipe.teach
        if spec is None:
            return base
        learned = [s for s in sets if s.role in ("forget", "retain") and s.train]
        with self.announced("teach", "the base model the forget and retain sets"):
            self.where = self.taught("target", base, learned, spec, "teaching")
            return models.load(self.recipe.model, self.where)

    # -- exports -------------------------------------------------------------------------------------------------

    def export(
        self, target: Loaded, sets: Sequence[LoadedSet], vector: TaskVector, about: card.CardFacts
    ) -> dict[str, Any]:
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
                    accept_rounding=spec.accept_rounding,
                    base_name=self.where,
                    about=about,
                )
                rows = _a_few(sets, target)
                again = export.rescored(tmp, target.model, vector, c, target.tokenizer, rows, spec.accept_rounding)
                say(f"    read again, it is {again['difference']:.2g} nats per token off the edited model")
                write_json_atomic(tmp / "export.json", {**facts, "rescored": again})

            edited = [target.fingerprint, vector.digest(), c]
            settings = {"dtype", "stochastic_rounding", "shard_size", "accept_rounding"}
            how = spec.model_dump(mode="json", include=settings)
            parts = {
                "adapter": [*edited, self.where, card.card(about, "adapter", self.where)],
                "merged": [*edited, how, self.recipe.seed, digests(sets), card.card(about, "merged", self.where)],
            }
            for name in wanted:
                self.make(f"export/{name}", parts[name], adapter if name == "adapter" else merged)
                facts = json.loads((self.folder.path(f"export/{name}") / "export.json").read_text("utf-8"))
                found[name] = {"path": f"export/{name}", **facts}
            if spec.push_to_hub is not None:
                found["hub"] = self._push(spec.push_to_hub, parts[spec.push_to_hub.what])
        return found

    def _push(self, spec: PushSpec, parts: Sequence[Any]) -> dict[str, Any]:
        """Put an export on the hub, once: the same export is not pushed again to the same place."""
        folder = self.folder.path(f"export/{spec.what}")
        if spec.dry_run:
            push(folder, spec)
            return {"repo": spec.repo, "dry_run": True}

        def make(tmp: Path) -> None:
            write_json_atomic(tmp / "pushed.json", {"repo": spec.repo, "url": push(folder, spec).url})

        self.make("export/hub", [*parts, spec.model_dump(mode="json")], make)
        facts: dict[str, Any] = json.loads((self.folder.path("export/hub") / "pushed.json").read_text("utf-8"))
        return facts


def _a_few(sets: Sequence[LoadedSet], target: Loaded) -> list[Encoded]:
    """Some scored items of every set, to compare two models on."""
    most = reach(target.model, target.tokenizer)
    return [
        row for s in sets for row in scored_rows((*s.test, *s.validation)[:_FEW], s.spec.kind, target.tokenizer, most)
    ]
