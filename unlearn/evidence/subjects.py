"""The models that a result is set beside, and what each of them scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unlearn.console import is_main_process
from unlearn.data.sets import LoadedSet
from unlearn.errors import EvaluationError, ModelError
from unlearn.evidence import benchmarks, boards
from unlearn.evidence import membership as inference
from unlearn.evidence import reference as references
from unlearn.model import load as models
from unlearn.model import locate
from unlearn.model.load import Loaded
from unlearn.recipe.schema import Recipe
from unlearn.results import Benchmark, Membership, TaskScore, Who
from unlearn.score import sweep
from unlearn.score.scorer import Questions, score_model
from unlearn.store.stages import Store
from unlearn.train.vectors import teach
from unlearn.vector.edit import Edit
from unlearn.vector.task_vector import TaskVector


@dataclass(frozen=True)
class Subjects:
    """The models that are compared: the target, the target under the edit (if one was chosen), the reference.

    Raises:
        ModelError: the reference's tokenizer is another one, so that its numbers per token are about other tokens.
    """

    target: Loaded
    vector: TaskVector
    chosen: float
    reference: Loaded | None

    def __post_init__(self) -> None:
        if self.reference is not None:
            require_same_tokens(self.target.tokenizer, self.reference.tokenizer)

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


def require_same_tokens(ours: Any, theirs: Any) -> None:
    """Refuse a reference with another tokenizer."""
    if ours.get_vocab() != theirs.get_vocab():
        raise ModelError(
            "reference: this model has another tokenizer than the target, so that their scores per token cannot "
            "be compared: give one that was made from the same base model"
        )


def load_reference(recipe: Recipe, sets: Sequence[LoadedSet], store: Store) -> Loaded:
    """A model that never saw the forget set: trained here on the retain sets, or given.

    Raises:
        DataError: no retain set has items to teach.
        ModelError: it is not there.
    """
    if recipe.reference != "train":
        return models.load(recipe.model, references.locate(recipe, store.base))
    base = models.load(recipe.model, locate.locate(recipe.model, store.base))
    return models.load(recipe.model, str(teach("reference", base, references.to_teach(sets), recipe, store)))


def score_reference(subjects: Subjects, questions: Questions, store: Store) -> tuple[TaskScore, ...]:
    """What the reference scores on the test items of the recipe's own sets; empty without one."""
    loaded, recipe = subjects.reference, questions.recipe
    if loaded is None:
        return ()
    inputs = [*subjects.key("reference"), *questions.key("test")]
    place = store.stage(
        "eval/reference", inputs, lambda tmp: score_model(loaded, questions.test, "reference", recipe, tmp)
    )
    return sweep.scores(place)


def run_benchmark(subjects: Subjects, questions: Questions, store: Store) -> Benchmark:
    """The rows of a published benchmark, computed from lm-eval's sample files."""
    recipe = questions.recipe
    spec = recipe.benchmark
    assert spec is not None  # asked for by who saw that it is there
    built = benchmarks.build(spec, store.base, subjects.target.tokenizer.name_or_path, recipe.seed)
    how = recipe.eval.model_dump(mode="json", include={"engine", "batch_tokens", "batch_size", "bootstrap"})
    asked: list[Any] = [built.digest(), questions.scoring, subjects.target.words]
    asked += [spec.model_dump(mode="json", exclude={"path"}), how]
    places = subjects.each(
        "benchmark", asked, store, lambda loaded, who, tmp: score_model(loaded, built, who, recipe, tmp)
    )
    logs = {who: boards.read_scored(place, spec) for who, place in places.items()}
    reference: benchmarks.Log | Literal["published"] | None = logs.get("reference")
    if recipe.reference == "published":
        reference = "published"
    elif (log := references.log_file(recipe, store.base)) is not None:
        reference = boards.read_log(log)
    try:
        found, missing = boards.rows(logs, reference, recipe.name), boards.absent(spec.name, reference)
    except EvaluationError as error:  # what needs no reference is not lost with it
        figure = "Forget quality" if spec.name == "tofu" else "PrivLeak"
        found, missing = boards.rows(logs, None, recipe.name), f"{figure} is absent because {error}."
    chosen_on = {item.target for s in questions.sets if s.role in ("forget", "retain") for item in s.validation}
    samples = benchmarks.read_samples(places["target"])
    answers = {str(row["doc"].get("answer")) for records in samples.values() for row in records}
    shown = {str(who): found[who] for who in subjects.who()}
    return Benchmark(spec.name, spec.set, spec.items, shown, missing, len(answers & chosen_on))


def infer_membership(subjects: Subjects, questions: Questions, store: Store) -> tuple[Membership, ...]:
    """Whether the forget sets' training items can be told from held-out ones, by model and attack."""
    recipe = questions.recipe
    others = next(s for s in questions.sets if s.role == "holdout")
    forgotten = [s for s in questions.sets if s.role == "forget"]
    members = [(item, s.spec.kind) for s in forgotten for item in inference.members_of(s.train)]
    held = [(item, others.spec.kind) for item in inference.members_of(others.test)]

    def score(loaded: Loaded, who: Who, tmp: Path) -> None:
        rows = [inference.score_items(loaded, items, who) for items in (members, held)]
        if is_main_process():
            inference.save(tmp / inference.SAMPLES, *rows)

    data = [*(s.digest for s in forgotten), others.digest]
    places = subjects.each("membership", [data], store, score)
    files = {who: place / inference.SAMPLES for who, place in places.items()}
    return inference.areas(files, recipe.eval.bootstrap, recipe.seed)
