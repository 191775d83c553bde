"""Stages that set the result beside others: a retain reference, a published benchmark, membership inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerFast

from unlearn import benchmark_tasks, finetune, models, references, score_files, tasks
from unlearn.benchmarks.samples_in import read_samples
from unlearn.board_runs import Log, absent, read_log, read_scored, rows
from unlearn.console import is_main_process
from unlearn.data import LoadedSet
from unlearn.distributed import wait
from unlearn.encoding import cuts
from unlearn.errors import EvaluationError, ModelError
from unlearn.evaluate import evaluate
from unlearn.fitted import masks
from unlearn.foreseen import Foreseen
from unlearn.member_files import SAMPLES, judge, save
from unlearn.members import members_of, tell
from unlearn.memory import told
from unlearn.models import Loaded
from unlearn.negate import Edit
from unlearn.precision import mixed_precision
from unlearn.recipe import TeachSpec
from unlearn.report import Benchmark, Membership, TaskScore, Who
from unlearn.rundir import write_json_atomic
from unlearn.stages import LESS, less_training
from unlearn.vector import TaskVector


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
