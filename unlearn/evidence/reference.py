"""The models that a result is set beside, first of all one that never saw the forget set; and a benchmark's folder.

All that a recipe names is looked up before anything is computed, so that a wrong path costs no training. No torch is
imported for that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.data.sets import LoadedSet
from unlearn.errors import DataError, EvaluationError, ModelError
from unlearn.model import locate as models
from unlearn.recipe.evaluation import FORGET_SETS, BenchmarkSpec
from unlearn.recipe.load import pack_module, tasks_folder
from unlearn.recipe.schema import ModelSpec, Recipe
from unlearn.results import TaskScore, Who
from unlearn.store.cache import hub_away, sha256
from unlearn.store.files import fingerprint

if TYPE_CHECKING:
    from unlearn.model.load import Loaded
    from unlearn.score.scorer import Questions
    from unlearn.store.stages import Store
    from unlearn.vector.task_vector import TaskVector

Row = Mapping[str, Any]
WHO: tuple[Who, ...] = ("target", "edited", "reference")
_TEXT = "Ann was born in 1987."
_TASK_FILES = ("items", "tofu", "muse", "classifier")  # what the pack's tasks read from their metadata


# -- what a recipe names


def check(recipe: Recipe, base: Path, *, hub: bool = False) -> None:
    """Look for what the recipe names from its folder ``base`` on; models are not fetched.

    ``hub``: also read a benchmark's data that come from the hub.
    """
    log, spec = log_file(recipe, base), recipe.benchmark
    if spec is not None:
        rows = benchmark_rows(spec, base)  # what can be told without the hub is told first
        if log is not None:
            _check_log(recipe, spec, log, rows)
        if hub and rows is None and (rows := benchmark_rows(spec, base, hub=True)) is not None and log is not None:
            _check_log(recipe, spec, log, rows)
    for key, other in others(recipe, base).items():
        with models.said_of(key):
            models.model_place(other, base)
    adapter_place(recipe, base, fetch=False)
    given = _model_given(recipe)
    if given is not None and recipe.teach is None and _same_place(given, recipe.model.path, base):
        raise ModelError(
            f"reference: {given} is the model that is to forget, and it has seen the forget set: give one that "
            "never did, or leave the reference out"
        )


def check_reach(recipe: Recipe, base: Path) -> None:
    """Ask for models that only the hub has whether the hub can be reached at all."""
    for key, other in others(recipe, base).items():
        with models.said_of(key):
            models.check_reach(other, base)


def is_model(recipe: Recipe) -> bool:
    """Whether the reference is a model, trained or given; else there is none, or only what one scored."""
    given = recipe.reference
    return given is not None and given != "published" and not given.endswith(".json")


def _model_given(recipe: Recipe) -> str | None:
    """The reference where it is the path of a run or a model."""
    return recipe.reference if is_model(recipe) and recipe.reference != "train" else None


def log_file(recipe: Recipe, base: Path) -> Path | None:
    """The reference's log; None where the reference is none."""
    given = recipe.reference
    if given is None or not given.endswith(".json"):
        return None
    found = _first(given, base, Path.is_file)
    if found is None:
        raise EvaluationError(
            f"reference: there is no file {given} here or in {base}{did_you_mean(given, base)}; give a log in the "
            "layout of TOFU's authors, or open-unlearning's TOFU_EVAL.json or MUSE_EVAL.json"
        )
    return found


def run_reference(given: str, base: Path) -> Path | None:
    """The folder of the reference that a run trained; None where ``given`` is no run's folder."""
    root = _first(given, base, lambda place: (place / "resolved.yaml").is_file())
    if root is None:
        return None
    if not (root / "reference" / "config.json").is_file():
        raise EvaluationError(
            f"reference: the run {given} trained no reference itself: give one whose recipe says reference: train "
            "and that came so far, or a model"
        )
    return root / "reference"


def others(recipe: Recipe, base: Path) -> dict[str, ModelSpec]:
    """The models that are given to be set beside the target, by the recipe's key: a reference, an edited one."""
    found = {}
    if (given := _model_given(recipe)) is not None:
        found["reference"] = recipe.model.other(str(run_reference(given, base) or given))
    if recipe.edited is not None and recipe.edited.model is not None:
        found["edited.model"] = recipe.model.other(recipe.edited.model, recipe.edited.revision)
    return found


def adapter_place(recipe: Recipe, base: Path, *, fetch: bool = True) -> Path | None:
    """The folder of the adapter that edits a model; None without one, or of one on the hub that is not fetched."""
    given = recipe.edited.adapter if recipe.edited is not None else None
    if given is None:
        return None
    with models.said_of("edited.adapter"):
        place = models.vector_place(recipe.model.other(given), base, fetch=fetch)
    if place is not None and not (place / "adapter_config.json").is_file():
        raise ModelError(f"edited.adapter: {given} is no folder of an adapter of PEFT's (adapter_config.json)")
    return place


def fetch(recipe: Recipe, base: Path) -> dict[str, tuple[ModelSpec, str]]:
    """The folder or hub id of each of :func:`others`; fetched where needed."""
    found = {}
    for key, other in others(recipe, base).items():
        with models.said_of(key):
            found[key] = other, models.locate(other, base)
    return found


def _same_place(one: str, other: str, base: Path) -> bool:
    """Whether two models' names are one hub id, or lead to one folder."""
    places = [place and place.resolve() for place in (_first(text, base, Path.exists) for text in (one, other))]
    return one == other or (places[0] is not None and places[0] == places[1])


def _first(given: str, base: Path, fits: Callable[[Path], bool]) -> Path | None:
    """In the recipe's folder or, where nothing fits there, in the current one."""
    path = Path(given).expanduser()
    return next((place for place in (base / path, path) if fits(place)), None)


def did_you_mean(given: str, base: Path) -> str:
    """``; did you mean data/tofu?``: files and folders whose names are near to one that is not there, or nothing."""
    path = Path(given).expanduser()
    names = {one.name for place in (base / path, path) if place.parent.is_dir() for one in place.parent.iterdir()}
    near = get_close_matches(path.name, sorted(names), n=3)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else ""


# -- a benchmark's data


def benchmark_folder(spec: BenchmarkSpec, base: Path) -> Path | None:
    """The folder with the benchmark's files; None where they come from the hub."""
    if spec.path is None:
        return None
    found = _first(spec.path, base, Path.is_dir)
    if found is None:
        raise EvaluationError(
            f"benchmark.path: there is no folder {spec.path} here or in {base}{did_you_mean(spec.path, base)}"
        )
    return found.resolve()


def benchmark_rows(spec: BenchmarkSpec, base: Path, *, hub: bool = False) -> Mapping[str, Sequence[Row]] | None:
    """The rows of each part that a benchmark scores; None where they are on the hub and not asked for."""
    folder = benchmark_folder(spec, base)
    if folder is None and not hub:
        whole = FORGET_SETS[spec.set].questions if spec.name == "tofu" else None
        if whole is not None and spec.items is not None and spec.items > whole:
            raise EvaluationError(f"benchmark.items is {spec.items}, and TOFU's {spec.set} has {whole} questions")
        return None
    where, reader = None if folder is None else str(folder), pack_module(f"{spec.name}/{spec.name}_items")
    try:
        if spec.name == "muse":
            parts = [("verbmem", "forget"), ("knowmem", "forget"), ("knowmem", "retain")]
            parts += [("privleak", split) for split in ("forget", "holdout", "retain")]
            return {f"{k}_{s}": reader.read_rows(spec.set, k, s, where, spec.items)[1] for k, s in parts}
        sets = (spec.set, "retain", "real_authors", "world_facts")
        found = {name: reader.read_rows(name, "prob", where, spec.items, tag=spec.tag) for name in sets}
    except (OSError, ValueError) as error:
        raise no_data(spec, error, hub_away() if folder is None else "") from error
    for name, rows in found.items():
        counts = [len(row["perturbed_answer"]) for row in rows]
        if other := [n for n, count in enumerate(counts) if count != counts[0]]:
            raise EvaluationError(
                f"benchmark: tofu {name}, row {other[0] + 1}: {counts[other[0]]} perturbed answers where row 1 has "
                f"{counts[0]}: truth ratios of some rows would be means of fewer"
            )
    return found


def no_data(spec: BenchmarkSpec, error: Exception, away: str = "") -> EvaluationError:
    """What to say where a benchmark's data cannot be read; ``away`` is why the hub cannot be reached."""
    return EvaluationError(
        f"benchmark: the data of {spec.name} {spec.set} cannot be had: {error}"
        + (f". {away[:1].upper()}{away[1:]}" if away else "")
        + ("" if spec.path else ". They come from the hub; benchmark.path names a local folder with them")
    )


def _check_log(recipe: Recipe, spec: BenchmarkSpec, path: Path, rows: Mapping[str, Sequence[Row]] | None) -> None:
    """Whether a log can be compared with the benchmark's rows; None where they are on the hub and not read yet."""
    from unlearn.evidence.benchmarks import reference_log, refuse_other_items  # numpy

    logged = reference_log(path, spec.name).ratios
    if logged is None:  # MUSE's PrivLeak compares with an area under a curve, which has no items
        return
    if rows is None:
        whole = FORGET_SETS[spec.set].questions
        items, questions = [str(n) for n in range(min(spec.items or whole, whole))], None
    else:
        items, questions = [row["id"] for row in rows[spec.set]], [row["question"] for row in rows[spec.set]]
    try:
        refuse_other_items(logged, items, questions, spec.set)
    except EvaluationError as error:
        raise EvaluationError(f"reference: {recipe.reference}: {error}") from error


# -- what these files are now


def state(recipe: Recipe, base: Path) -> list[Any]:
    """SHA-256 of the task pack, the benchmark's local files and the log; size and time of models and tasks' files."""
    found: list[Any] = [pack_digest(), *map(files_of, task_files(recipe))]
    if recipe.benchmark is not None:
        folder = benchmark_folder(recipe.benchmark, base)
        found.append("" if folder is None else content(folder, "*.json*"))
    if (log := log_file(recipe, base)) is not None:
        found.append(content(log))
    named = [spec.path.partition("#")[0] for spec in others(recipe, base).values()]
    named += [recipe.edited.adapter] if recipe.edited is not None and recipe.edited.adapter is not None else []
    places = [models.find(path, base) for path in named]
    return [*found, *([] if place is None else files_of(place) for place in places)]


def files_of(root: Path) -> list[list[Any]]:
    """Name, size and time of every file of a model."""
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files if p.is_file()]


def task_files(recipe: Recipe) -> list[Path]:
    """Files and folders that the settings of the recipe's tasks name, from the current folder on, as lm-eval has it."""
    named: list[Any] = [os.environ.get("UNLEARN_ITEMS")]
    for spec in recipe.eval.tasks:
        for value in (spec.metadata.get(name) for name in _TASK_FILES):
            named += value.values() if isinstance(value, Mapping) else [value]
    places = [Path(text).expanduser() for text in named if isinstance(text, str) and text]
    return [place for place in places if place.exists()]


def pack_digest() -> str:
    """SHA-256 of the task pack: what it asks and how it scores may be changed in place."""
    return content(tasks_folder(), "*.py", "*.yaml")


def content(place: Path, *patterns: str) -> str:
    """SHA-256 of a file, or of a folder's files by their names in it; of all files without a pattern."""
    if place.is_file():
        return _sha256(place).hex()
    whole = hashlib.sha256()
    for path in sorted({p for pattern in patterns or ("*",) for p in place.rglob(pattern) if p.is_file()}):
        whole.update(path.relative_to(place).as_posix().encode() + b"\0" + _sha256(path))
    return whole.hexdigest()


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# -- the models in memory


@dataclass(frozen=True)
class Subjects:
    """The models that are compared: the target, the edited one, the reference.

    The edited one is the target less ``chosen`` times ``vector``, if any was chosen, or a model of its own (``given``).
    """

    target: Loaded
    vector: TaskVector | None
    chosen: float
    reference: Loaded | None
    given: Loaded | None = None

    def who(self) -> tuple[Who, ...]:
        """The models there are."""
        present = {"edited": self.chosen > 0, "reference": self.reference is not None}
        return tuple(who for who in WHO if present.get(who, True))

    def loaded(self, who: Who) -> Loaded:
        """The weights in memory that one of them is made of."""
        found = {"reference": self.reference, "edited": self.given or self.target}.get(who, self.target)
        assert found is not None  # `who` is one of who()
        return found

    def edit(self, who: Who) -> tuple[TaskVector | None, float]:
        """The vector that one of them is under, and how much of it is subtracted."""
        return (self.vector, self.chosen) if who == "edited" and self.vector is not None else (None, 0.0)

    def key(self, who: Who) -> list[Any]:
        """All that the weights of one depend on."""
        vector, coefficient = self.edit(who)
        edit = [] if vector is None else [vector.digest(), coefficient]
        return [self.loaded(who).fingerprint, *edit]

    @contextmanager
    def model(self, who: Who) -> Iterator[Loaded]:
        """One of them, as it is inside the ``with``."""
        from unlearn.vector.edit import subtracted

        vector, coefficient = self.edit(who)
        if vector is None:
            yield self.loaded(who)
        else:
            with subtracted(self.target.model, vector, coefficient):
                yield self.target

    def each(
        self, name: str, inputs: Sequence[Any], store: Store, make: Callable[[Loaded, Who, Path], None]
    ) -> dict[Who, Path]:
        """One stage for each model, made or found again, that depends on its weights and ``inputs``."""
        places = {}
        for who in self.who():

            def write(tmp: Path, who: Who = who) -> None:
                with self.model(who) as loaded:
                    make(loaded, who, tmp)

            places[who] = store.stage(f"{name}/{who}", [*self.key(who), *inputs], write, kind=name)
        return places


def to_teach(sets: Sequence[LoadedSet]) -> list[LoadedSet]:
    """The sets that a trained reference learns."""
    learned = [s for s in sets if s.role == "retain" and s.train]
    if not learned:
        raise DataError(
            "reference: train has nothing to teach: no retain set has items to train on; raise its shares.train"
        )
    return learned


def load_reference(recipe: Recipe, sets: Sequence[LoadedSet], store: Store) -> Loaded:
    """A model that never saw the forget set: trained here on the retain sets, or given."""
    from unlearn.model.load import load
    from unlearn.train.vectors import teach

    if recipe.reference != "train":
        return load(*fetch(recipe, store.base)["reference"])
    base = load(recipe.model, models.locate(recipe.model, store.base))
    return load(recipe.model, str(teach("reference", base, to_teach(sets), recipe, store)))


def load_edited(recipe: Recipe, target: Loaded, base: Path) -> Loaded:
    """The model that was edited elsewhere, an adapter merged in float32: 16 bits would round much of it away."""
    from unlearn.model.load import load
    from unlearn.vector.interop import merged

    spec, where = fetch(recipe, base).get("edited.model") or (recipe.model, target.path)
    place = adapter_place(recipe, base)
    with models.said_of("edited.model"):
        loaded = load(spec if place is None else spec.model_copy(update={"dtype": "float32"}), where)
    if place is None:
        return loaded
    content = [sha256(path) for path in models.weight_files(place)]
    return replace(loaded, model=merged(loaded.model, place), fingerprint=fingerprint(loaded.fingerprint, content))


def require_same_tokens(recipe: Recipe, base: Path, ours: Any) -> None:
    """Refuse a given model with another tokenizer: its numbers per token would be about other tokens."""
    from unlearn.model.load import load_tokenizer

    for key, (spec, where) in fetch(recipe, base).items():
        with models.said_of(key):
            found = load_tokenizer(spec, where)
        if ours.get_vocab() != found.get_vocab():
            raise ModelError(
                f"{key}: this model has another tokenizer than the target, so that their scores per token cannot "
                "be compared: give one that was made from the same base model"
            )
        read = [one.convert_ids_to_tokens(one.encode(_TEXT)) for one in (ours, found)]
        if read[0] != read[1]:
            mine, theirs = (f"{len(tokens)} tokens ({' '.join(map(repr, tokens[:3]))} ...)" for tokens in read)
            raise ModelError(
                f"{key}: this model's tokenizer has the target's vocabulary and reads a text otherwise: {_TEXT!r} is "
                f"{theirs}, and {mine} to the target's: save the target's tokenizer beside it"
            )


def score_reference(subjects: Subjects, questions: Questions, store: Store) -> tuple[TaskScore, ...]:
    """What the reference scores on the test items of the recipe's own sets; empty without one."""
    from unlearn.score.scorer import read_scores, score_model

    loaded, recipe = subjects.reference, questions.recipe
    if loaded is None:
        return ()
    inputs = [*subjects.key("reference"), *questions.key("test")]
    place = store.stage(
        "eval/reference", inputs, lambda tmp: score_model(loaded, questions.test, "reference", recipe, tmp)
    )
    return read_scores(place)
