"""TOFU and MUSE from per-item values: what one model scored, and the row of figures that the authors would publish.

A benchmark is one class of :data:`SUITES`: its tasks, how one model's samples are read, and its row.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from unlearn.data.chat import Chat, chat_of
from unlearn.errors import DataError, EvaluationError
from unlearn.evidence.membership import auc
from unlearn.evidence.reference import WHO, Subjects, benchmark_folder, log_file, no_data
from unlearn.recipe.evaluation import FORGET_SETS, BenchmarkSpec
from unlearn.recipe.load import tasks_folder
from unlearn.results import Benchmark, Role, Who
from unlearn.score.scorer import Questions, score_model
from unlearn.score.tasks import TaskInfo, TaskSet, in_template, quiet_harness, task_manager
from unlearn.store.stages import Store
from unlearn.text import listing

Record = Mapping[str, Any]
Samples = Mapping[str, Sequence[Record]]
Row = dict[str, float | str | None]
Floats = NDArray[np.float64]
_SAME = 1e-6  # nats within which two logs of one model may differ, by how their numbers were written


class Figures(ABC):
    """What one model scored on a ``benchmark``, as its row of figures."""

    benchmark: str

    @abstractmethod
    def row(self, reference: Any, name: str) -> Row:
        """The figures by the authors' column names in their order; those that lack a reference are None."""

    @abstractmethod
    def summary(self, row: Row) -> dict[str, float]:
        """OpenUnlearning's metrics under its names, sorted as it writes them, without those that are None."""


class Log(Figures):
    """The same from values of every item. ``figure`` is the one that compares it with a retain reference."""

    figure: ClassVar[str]

    @classmethod
    @abstractmethod
    def tasks(cls, subset: str) -> tuple[str, ...]:
        """lm-eval's tasks of one of the benchmark's sets."""

    @classmethod
    @abstractmethod
    def from_samples(cls, samples: Samples, subset: str) -> Self:
        """From lm-eval's records of these tasks."""


# -- lm-eval's samples, read back


def read_samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All records of one model's evaluation, by task, in order of ``doc_id``; of several files of a task the newest.

    As many must be there as the results file of the same evaluation says.
    """
    found = {}
    for path in sorted(folder.rglob("samples_*.jsonl")):
        task, _, time = path.stem.removeprefix("samples_").rpartition("_")
        found[task] = _records(path, path.with_name(f"results_{time}.json"), task)
    if not found:
        raise DataError(f"{folder}: no samples_<task>_<time>.jsonl in it; run the recipe again")
    return dict(sorted(found.items()))


def _records(path: Path, results: Path, task: str) -> list[dict[str, Any]]:
    """Every line of a file, in order of its items, and as many as the results of the same evaluation say."""
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for n, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise DataError(f"{where}: not JSON ({error}); the file is damaged or cut off") from error
        doc_id = record.get("doc_id") if isinstance(record, dict) else None
        if type(doc_id) is not int:
            raise DataError(f"{where}: no record of an item, as lm-eval writes them: it has no whole number `doc_id`")
        key = (doc_id, str(record.get("filter")))
        if key in found:
            raise DataError(f"{where}: item {doc_id} is there twice; were two evaluations written to one file?")
        found[key] = record
    try:
        wanted = json.loads(results.read_bytes())["n-samples"][task]["effective"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: {results.name}, written with it, is not beside it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{results}: cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{results}: does not say how many items of {task} were scored (n-samples)") from error
    count = len({doc_id for doc_id, _ in found})
    if count != wanted:
        raise DataError(f"{path}: {count} items, but {results.name} says that {wanted} were scored; a file is cut off")
    return sorted(found.values(), key=lambda record: record["doc_id"])


def _doc(record: Record) -> Mapping[str, Any]:
    doc = record.get("doc")
    return doc if isinstance(doc, Mapping) else {}


def by_item(samples: Samples, task: str) -> dict[str, Record]:
    """The records of a task by the ``id`` in the item's data, or else by lm-eval's number for it."""
    if not samples.get(task):
        ran = ", ".join(sorted(name for name in samples if samples[name])) or "none"
        raise EvaluationError(f"task {task} was not run, and its scores are needed here; there are: {ran}")
    records = {str(_doc(record).get("id", record.get("doc_id"))): record for record in samples[task]}
    if len(records) < len(samples[task]):
        raise DataError(f"task {task}: {len(samples[task])} records of {len(records)} items; one for each was expected")
    return records


def numbers(samples: Samples, task: str, name: str) -> dict[str, float]:
    """One finite number of every item of a task."""
    return {i: _number(r.get(name), f"task {task}, item {i}: {name}") for i, r in by_item(samples, task).items()}


def _number(value: Any, where: str) -> float:
    if value is None:
        raise DataError(f"{where} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise DataError(f"{where} is {value!r}, which is no finite number")
    return float(value)


# -- TOFU (Maini et al. 2401.06121): model utility and forget quality. Losses are nats per token. The truth ratio is R =
# exp(mean of the perturbed answers' losses - the paraphrased answer's loss), as the authors' aggregator has it (a
# geometric mean of the wrong answers' probabilities); all is computed from log R, which cannot overflow.

# Our name of a set, the file of it in the authors' logs, its name in their columns, and how OpenUnlearning's metrics of
# it begin; in the columns' order.
SETS = {
    "real_authors": ("eval_real_author_wo_options.json", "Real Authors", "ra"),
    "world_facts": ("eval_real_world_wo_options.json", "Real World", "wf"),
    "retain": ("eval_log.json", "Retain", "retain"),
    "forget": ("eval_log_forget.json", "Forget", "forget"),
}
_LISTS = "average_perturb_loss"
_FIELDS = ("avg_gt_loss", "avg_paraphrased_loss", _LISTS, "rougeL_recall")  # of each file
_WITH_CHOICES = ("real_authors", "world_facts")  # their probability is that of the answer among the wrong ones


@dataclass(frozen=True, eq=False)
class TruthRatios:
    """log R of each forget item, (N,) in the order of ``items``: all that forget quality is made of.

    ``wrong`` is of how many perturbed answers each is, and ``questions`` what was asked; None where that is not known.
    """

    items: tuple[str, ...]
    values: Floats
    wrong: int | None
    questions: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class TofuSet:
    """One set's values, an entry per item: ``perturbed_losses`` is (N, P), the rest (N,) in the order of ``items``.

    ``questions`` are what was asked, None where the files do not say.
    """

    items: tuple[str, ...]
    loss: Floats
    paraphrased_loss: Floats
    perturbed_losses: Floats
    rouge: Floats
    questions: tuple[str, ...] | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], where: str) -> TofuSet:
        """From one file of a log, field -> item -> value, which messages call ``where``."""
        items: tuple[str, ...] = ()
        for name in _FIELDS:
            column = fields.get(name)
            if not isinstance(column, Mapping) or not column:
                raise DataError(f"{where}: no {name!r} with an entry per item")
            items = items or tuple(column)
            if other := set(items) ^ set(column):
                raise DataError(
                    f"{where}: {name!r} has {len(column)} items and {_FIELDS[0]!r} {len(items)}; "
                    f"item {min(other)!r} is in only one of them"
                )
        loss, paraphrased, rouge = (
            np.array([_number(fields[name][i], f"{where}, {name}, item {i!r}") for i in items])
            for name in _FIELDS
            if name != _LISTS
        )
        table: list[list[float]] = []
        for item in items:
            place, values = f"{where}, {_LISTS}, item {item!r}", fields[_LISTS][item]
            if not isinstance(values, list) or not values:
                raise DataError(f"{place}: no list of the perturbed answers' losses")
            table.append([_number(value, f"{place}, entry {n}") for n, value in enumerate(values, start=1)])
            if len(values) != len(table[0]):
                raise DataError(f"{place}: {len(values)} perturbed answers where others have {len(table[0])}")
        return cls(items, loss, paraphrased, np.array(table), rouge, _questions(fields, items))

    @property
    def log_truth_ratio(self) -> Floats:
        """log R, (N,)."""
        ratio: Floats = self.perturbed_losses.mean(axis=1) - self.paraphrased_loss
        return ratio

    @property
    def prob(self) -> float:
        """Mean probability of the answer, each to the power of one over its length."""
        return float(np.exp(-self.loss).mean())

    @property
    def prob_choice(self) -> float:
        """Mean share of the answer in the probabilities (as in :attr:`prob`) of it and the perturbed ones."""
        scores = -np.concatenate([self.loss[:, None], self.perturbed_losses], axis=1)  # (N, 1 + P)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))  # the largest is 1: no sum is 0
        return float((weights[:, 0] / weights.sum(axis=1)).mean())

    @property
    def truth_ratio_forget(self) -> float:
        """Mean min(R, 1/R): 1 where right and wrong answers are equally likely."""
        return float(np.exp(-np.abs(self.log_truth_ratio)).mean())

    @property
    def truth_ratio_kept(self) -> float:
        """Mean max(0, 1 - 1/R): 1 where only the right answer is likely."""
        return float(-np.expm1(-np.maximum(self.log_truth_ratio, 0.0)).mean())


@dataclass(frozen=True, eq=False)
class TofuLog(Log):
    """What one model scored on TOFU: its four sets, and which forget set it was (None where a log does not say)."""

    figure: ClassVar[str] = "Forget quality"
    benchmark = "tofu"
    sets: Mapping[str, TofuSet]
    forget_set: str | None = None

    @property
    def ratios(self) -> TruthRatios:
        """Of the forget set."""
        s = self.sets["forget"]
        return TruthRatios(s.items, s.log_truth_ratio, s.perturbed_losses.shape[1], s.questions)

    @classmethod
    def tasks(cls, subset: str) -> tuple[str, ...]:
        names = (subset, "retain", "real_authors", "world_facts")
        return tuple(f"tofu_{name}_{part}" for name in names for part in ("prob", "rouge"))

    @classmethod
    def from_samples(cls, samples: Samples, subset: str) -> TofuLog:
        sets = {}
        for name in SETS:
            task = f"tofu_{subset if name == 'forget' else name}"
            scored, generated = by_item(samples, f"{task}_prob"), by_item(samples, f"{task}_rouge")
            ours = ("loss", "paraphrased_loss", "perturbed_losses")
            fields = {f: {i: r.get(key) for i, r in scored.items()} for f, key in zip(_FIELDS, ours, strict=False)}
            fields["rougeL_recall"] = {i: r.get("rougeL") for i, r in generated.items()}
            fields["question"] = {i: _doc(r).get("question") for i, r in scored.items()}
            sets[name] = TofuSet.from_fields(fields, f"tasks {task}_prob and {task}_rouge")
        return cls(sets, subset)

    @classmethod
    def from_json(cls, data: Any, where: str) -> TofuLog:
        """The same from what was read, which messages call ``where``."""
        files = [file for file, *_ in SETS.values()]
        if not isinstance(data, Mapping) or not data.keys() & set(files):
            raise DataError(
                f"{where}: no log that is known here: give open-unlearning's TOFU_EVAL.json or MUSE_EVAL.json, the "
                "TOFU_SUMMARY.json or MUSE_SUMMARY.json beside it, or a log of TOFU's authors "
                f"(eval_log_aggregated.json, an object with {listing(files)})"
            )
        for file in files:
            if not isinstance(data.get(file), Mapping):
                raise DataError(f"{where}: no {file!r} in it; a TOFU log has {', '.join(files)}")
        return cls({name: TofuSet.from_fields(data[file], f"{where}, {file}") for name, (file, *_) in SETS.items()})

    def to_json(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The same layout, with the fields that the authors' aggregator reads, and the questions where known."""
        whole = {}
        for name, (file, *_) in SETS.items():
            s = self.sets[name]
            columns = zip(_FIELDS, (s.loss, s.paraphrased_loss, s.perturbed_losses, s.rouge), strict=True)
            whole[file] = {field: dict(zip(s.items, values.tolist(), strict=True)) for field, values in columns}
            if s.questions is not None:
                whole[file]["question"] = dict(zip(s.items, s.questions, strict=True))
        return whole

    def row(self, reference: Any = None, name: str = "") -> Row:
        """TOFU's row, by the authors' column names in their order, then the test that forget quality comes from.

        Model utility is the harmonic mean of the nine numbers of the sets to keep, 0 as soon as one of them is.
        """
        parts: dict[str, float] = {}
        for key, (_, title, _) in SETS.items():
            s = self.sets[key]
            parts[f"ROUGE {title}"] = float(s.rouge.mean())
            parts[f"Prob. {title}"] = s.prob_choice if key in _WITH_CHOICES else s.prob
            parts[f"Truth Ratio {title}"] = s.truth_ratio_forget if key == "forget" else s.truth_ratio_kept
        if broken := [column for column, value in parts.items() if not np.isfinite(value)]:
            raise EvaluationError(f"TOFU's figures cannot be computed: {', '.join(broken)}: no number, or no items")
        kept = [value for column, value in parts.items() if not column.endswith("Forget")]
        p_value, statistic = (None, None) if reference is None else forget_quality(self, reference)
        return {
            **parts,
            "Model Utility": len(kept) / sum(1 / v for v in kept) if min(kept) > 0 else 0.0,
            "Forget Quality": p_value,
            "KS Test PVal Forget": p_value,
            "KS Test Forget": statistic,
        }

    def summary(self, row: Row) -> dict[str, float]:
        found = {name: float(value) for column, name in _TOFU.items() if (value := row[column]) is not None}
        for name, (_, _, short) in SETS.items():  # and what is no column of TOFU's
            scored = self.sets[name]
            found[f"{short}_Q_A_Prob"] = scored.prob
            found[f"{short}_Q_A_PERT_Prob"] = float(np.exp(-scored.perturbed_losses).mean())
            if name not in _WITH_CHOICES:  # these have no paraphrase
                found[f"{short}_Q_A_PARA_Prob"] = float(np.exp(-scored.paraphrased_loss).mean())
        return dict(sorted(found.items()))


def _ratios(of: Any) -> TruthRatios:
    if isinstance(of, TheirFigures) and of.benchmark == "tofu":
        return of.need_ratios()
    if not isinstance(of, TofuLog):
        raise EvaluationError("TOFU has no published value; give a run's folder or a log (.json)")
    return of.ratios


def forget_quality(log: Any, reference: Any) -> tuple[float, float]:
    """How hard it is to tell the model's truth ratios from those of one that never saw the forget set.

    p-value and statistic of a two-sample Kolmogorov-Smirnov test on log R: it sees only the order of values, which the
    logarithm keeps.
    """
    ours, theirs = _ratios(log), _ratios(reference)
    known = [getattr(one, "forget_set", None) for one in (log, reference)]
    if all(known) and known[0] != known[1]:
        raise EvaluationError(
            f"the reference was scored on {known[1]} and the model on {known[0]}: forget quality compares the two on "
            "the same set"
        )
    refuse_other_items(theirs, ours.items, ours.questions, known[0] or known[1])
    if ours.wrong and theirs.wrong and ours.wrong != theirs.wrong:
        raise EvaluationError(
            f"the reference has {theirs.wrong} perturbed answers for each forget item and the model {ours.wrong}: "
            "these are different data"
        )
    if len(ours.items) == 1:
        raise EvaluationError("forget quality of a single item is 1 whatever was scored: score more of the forget set")
    place = {item: n for n, item in enumerate(theirs.items)}
    ratios = theirs.values[[place[item] for item in ours.items]]
    if np.allclose(ours.values, ratios, rtol=0, atol=_SAME):
        raise EvaluationError(
            f"the truth ratios of all {len(ours.items)} forget items are the reference's own: this is one model, and "
            "compared with itself it has a forget quality of 1; take a reference that never saw the forget set"
        )
    from scipy.stats import ks_2samp  # type: ignore[import-untyped]  # a second to import, for this line alone

    test = ks_2samp(ours.values, ratios)
    return float(test.pvalue), float(test.statistic)


def refuse_other_items(
    reference: TruthRatios, items: Sequence[str], questions: Sequence[str] | None, forget_set: str | None = None
) -> None:
    """Refuse a reference whose forget items are others than the model's ``items``, or ask other ``questions``."""
    cure = "take a reference of its set"
    if forget_set in FORGET_SETS:
        cure = f"TOFU's own reference for {forget_set} was trained on {FORGET_SETS[forget_set].reference}"
    if len(items) != len(reference.items):
        raise EvaluationError(
            f"the reference has {len(reference.items)} forget items and the model {len(items)}: forget quality "
            f"compares the two on the same ones; set benchmark.items to the number that both have, or {cure}"
        )
    if other := set(items) - set(reference.items):
        raise EvaluationError(
            f"{len(other)} of the {len(items)} forget items are not the reference's (such as {min(other)!r}): "
            "forget quality compares two models on the same items"
        )
    if questions is None or reference.questions is None:
        return
    theirs = dict(zip(reference.items, map(_asked, reference.questions), strict=True))
    ours = dict(zip(items, map(_asked, questions), strict=True))
    wrong = [item for item in items if ours[item] not in theirs[item] and theirs[item] not in ours[item]]
    if wrong:
        raise EvaluationError(
            f"{len(wrong)} of the {len(items)} forget items ask something else in the reference: item {wrong[0]!r} is "
            f"{theirs[wrong[0]]!r} there and {ours[wrong[0]]!r} here, so it was scored on another forget set; {cure}"
        )


def _questions(fields: Mapping[str, Any], items: Sequence[str]) -> tuple[str, ...] | None:
    """What a log says was asked: our field ``question``, or the first text of the authors' ``generated_text``."""
    for name in ("question", "generated_text"):
        column = fields.get(name)
        texts = [column.get(item) for item in items] if isinstance(column, Mapping) else []
        found = [text[0] if isinstance(text, list) and text else text for text in texts]
        if found and all(isinstance(text, str) for text in found):
            return tuple(map(str, found))
    return None


def _asked(prompt: str) -> str:
    """The question in a prompt, without the words and tags that the authors' templates put around it."""
    bare = re.sub(r"^\s*(\[INST\]|Question:)|(\[/INST\]|\bAnswer:)\s*$", "", prompt.strip())
    return " ".join(bare.split())


# -- MUSE (Shi et al. 2407.06460)

# AUC of the authors' retrained models, Llama-2 7B on News and ICLM 7B on Books; for other models it is a stand-in.
PUBLISHED_AUC = {"news": 0.4772, "books": 0.5393}
# Why there is no PrivLeak beside such a reference.
_ZERO_AUC = (
    "the reference's AUC is 0, by which it would be divided: every forget text looks better known to the reference "
    "than every hold-out text, as if it had been trained on them; take a model that was not"
)


@dataclass(frozen=True, eq=False)
class MuseLog(Log):
    """What one model scored on a corpus of MUSE, by item: ROUGE-L F1 in [0, 1], and Min-40 % in nats of the texts that
    are to be forgotten (``forget``) and that were held out.
    """

    figure: ClassVar[str] = "PrivLeak"
    benchmark = "muse"
    corpus: str
    verbmem: Mapping[str, float]
    knowmem_forget: Mapping[str, float]
    knowmem_retain: Mapping[str, float]
    forget: Mapping[str, float]
    holdout: Mapping[str, float]

    @classmethod
    def tasks(cls, subset: str) -> tuple[str, ...]:
        parts = ("verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout")
        return tuple(f"muse_{subset}_{part}" for part in parts)

    @classmethod
    def from_samples(cls, samples: Samples, subset: str) -> MuseLog:
        names = ("rougeL_f1", "rougeL_f1", "rougeL_f1", "min_40", "min_40")
        return cls(subset, *(numbers(samples, task, name) for task, name in zip(cls.tasks(subset), names, strict=True)))

    @property
    def auc(self) -> float:
        """In the authors' direction: how often a hold-out text looks better known than a forget text."""
        return auc(list(self.holdout.values()), list(self.forget.values()))

    def row(self, reference: Any = None, name: str = "") -> Row:
        rouge = (self.verbmem, self.knowmem_forget, self.knowmem_retain)
        verbatim, forgotten, kept = (float(np.mean(list(part.values()))) * 100 for part in rouge)
        leak = None if reference is None else privleak(self, reference)
        return {"name": name, "verbmem_f": verbatim, "privleak": leak, "knowmem_f": forgotten, "knowmem_r": kept}

    def summary(self, row: Row) -> dict[str, float]:
        names = {"forget_knowmem": "knowmem_f", "forget_verbmem": "verbmem_f", "retain_knowmem": "knowmem_r"}
        found = {f"{ours}_ROUGE": float(row[theirs] or 0) / 100 for ours, theirs in names.items()}
        found |= {} if row["privleak"] is None else {"privleak": float(row["privleak"])}
        return dict(sorted(found.items()))


def privleak(log: MuseLog, reference: MuseLog | TheirFigures | Literal["published"]) -> float | None:
    """(AUC - AUC_ref) / AUC_ref * 100; 0 is the reference's, negative remembers, positive over-forgot.

    None where AUC_ref is 0 and there is nothing to divide by. The reference is a retrained model's log, or
    ``"published"`` for the authors' value of that corpus.
    """
    if reference == "published":
        base = PUBLISHED_AUC[log.corpus]
    elif isinstance(reference, TheirFigures) and reference.benchmark == "muse":
        base = reference.auc
    elif not isinstance(reference, MuseLog):
        raise EvaluationError("a log of TOFU is no reference for MUSE; give a run's folder or MUSE_EVAL.json")
    else:
        _refuse_other_texts(log, reference)
        base = reference.auc
    return (log.auc - base) / base * 100 if base else None


def _refuse_other_texts(log: MuseLog, reference: MuseLog) -> None:
    """Refuse a reference that was scored on something else, or that is the model itself."""
    if log.corpus != reference.corpus:
        raise EvaluationError(f"the reference was scored on MUSE {reference.corpus} and the model on {log.corpus}")
    equal = []
    for part in ("forget", "holdout"):
        ours, theirs = getattr(log, part), getattr(reference, part)
        if len(ours) != len(theirs):
            raise EvaluationError(
                f"the reference has {len(theirs)} {part} texts and the model {len(ours)}: PrivLeak compares the two on "
                "the same ones"
            )
        if other := ours.keys() - theirs.keys():
            raise EvaluationError(f"{len(other)} {part} texts, such as {min(other)!r}, are not the reference's")
        equal.append(np.allclose(list(ours.values()), [theirs[item] for item in ours], rtol=0, atol=_SAME))
    if all(equal):
        raise EvaluationError(
            "the log-probabilities of all forget and hold-out texts are the reference's own: this is one model, and "
            "compared with itself it has a PrivLeak of 0; take a reference that never saw the forget set"
        )


# -- what open-unlearning writes: TOFU_EVAL.json and MUSE_EVAL.json (metric -> agg_value, value_by_index), and
# *_SUMMARY.json with the aggregated figures alone. Its truth ratio is wrong over right, 1/R of TOFU's; where it is told
# to aggregate by ``prob_mean``, right over right and wrong together.

_MUSE = {"verbmem_f": "forget_verbmem_ROUGE", "knowmem_f": "forget_knowmem_ROUGE", "knowmem_r": "retain_knowmem_ROUGE"}
_TOFU = {
    f"{kind} {title}": {
        "ROUGE": f"{short}_Q_A_ROUGE",
        "Prob.": f"{short}_Q_A_Prob{'_normalised' if key in _WITH_CHOICES else ''}",
        "Truth Ratio": "forget_truth_ratio" if key == "forget" else f"{short}_Truth_Ratio",
    }[kind]
    for key, (_, title, short) in SETS.items()
    for kind in ("ROUGE", "Prob.", "Truth Ratio")
} | {"Model Utility": "model_utility", "Forget Quality": "forget_quality", "KS Test PVal Forget": "forget_quality"}
_PARAPHRASED, _PERTURBED, _RATIO = "forget_Q_A_PARA_Prob", "forget_Q_A_PERT_Prob", "forget_truth_ratio"


@dataclass(frozen=True, eq=False)
class TheirFigures(Figures):
    """One model's figures under open-unlearning's names and, from its log of every item, the truth ratios."""

    benchmark: str
    where: str
    figures: Mapping[str, float]
    ratios: TruthRatios | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> TheirFigures | None:
        """From what was read, which messages call ``where``; None where it is something else."""
        names = {"tofu": {*_TOFU.values(), _PERTURBED}, "muse": {*_MUSE.values()}}
        benchmark = next((name for name, known in names.items() if data.keys() & known), None)
        if benchmark is None:
            return None
        found = {name: entry.get("agg_value") if isinstance(entry, Mapping) else entry for name, entry in data.items()}
        figures = {name: _number(value, f"{where}, {name}") for name, value in found.items() if value is not None}
        return cls(benchmark, where, figures, _their_ratios(data, where) if benchmark == "tofu" else None)

    def need_ratios(self) -> TruthRatios:
        """The truth ratios of the forget items, or an error."""
        if self.ratios is None:
            raise EvaluationError(
                f"{self.where} has no values of single forget items, which forget quality compares: give the "
                "TOFU_EVAL.json beside it"
            )
        return self.ratios

    @property
    def auc(self) -> float:
        """In the authors' direction, as :attr:`MuseLog.auc`; open-unlearning's own is one minus it."""
        if "mia_min_k" not in self.figures:
            raise EvaluationError(f"{self.where} has no mia_min_k, to which PrivLeak compares: give its MUSE_EVAL.json")
        return 1 - self.figures["mia_min_k"]

    def row(self, reference: Any = None, name: str = "") -> Row:
        """As published; where there are truth ratios, what is made of them is computed anew."""
        if self.benchmark == "muse":
            rouge = {column: self.figures.get(metric) for column, metric in _MUSE.items()}
            shown: Row = {column: None if value is None else 100 * value for column, value in rouge.items()}
            leak = self.figures.get("privleak")
            return {"name": name, "verbmem_f": shown["verbmem_f"], "privleak": leak, **shown}
        found: Row = {column: self.figures.get(metric) for column, metric in _TOFU.items()}
        statistic = None
        if self.ratios is not None:
            found["Truth Ratio Forget"] = float(np.exp(-np.abs(self.ratios.values)).mean())
            if reference is not None:
                found["Forget Quality"], statistic = forget_quality(self, reference)
                found["KS Test PVal Forget"] = found["Forget Quality"]
        return {**found, "KS Test Forget": statistic}

    def summary(self, row: Row) -> dict[str, float]:
        return dict(sorted(self.figures.items()))


def _their_ratios(data: Mapping[str, Any], where: str) -> TruthRatios | None:
    """From the losses that every log has, or else from the scores alone; None where no item's values are there."""
    right, wrong, scores = (
        entry.get("value_by_index") if isinstance(entry := data.get(name), Mapping) else None
        for name in (_PARAPHRASED, _PERTURBED, _RATIO)
    )
    if right and wrong:
        items = tuple(right)
        if right.keys() != wrong.keys():
            raise DataError(f"{where}: {_PARAPHRASED} and {_PERTURBED} are of different items")
        one = [_their_losses(right[i], f"{where}, {_PARAPHRASED}, item {i!r}") for i in items]
        others = [_their_losses(wrong[i], f"{where}, {_PERTURBED}, item {i!r}") for i in items]
        if len({len(losses) for losses in others}) > 1:
            raise DataError(f"{where}: {_PERTURBED}: some items have more perturbed answers than others")
        values = np.array([np.mean(b) - np.mean(a) for a, b in zip(one, others, strict=True)])
        return TruthRatios(items, values, len(others[0]))
    if not scores:
        return None
    ratio = np.array([_number(_of(v, "score"), f"{where}, {_RATIO}, item {i!r}: score") for i, v in scores.items()])
    if ratio.min() < 0 or ratio.max() <= 1:
        raise DataError(
            f"{where}: no score of {_RATIO} is above 1, so it cannot be told whether they are wrong over right answers "
            f"or shares of right ones: give a log that has {_PARAPHRASED} and {_PERTURBED} as well"
        )
    return TruthRatios(tuple(scores), -np.log(np.maximum(ratio, np.finfo(np.float64).tiny)), None)


def _of(entry: Any, name: str) -> Any:
    return entry.get(name) if isinstance(entry, Mapping) else None


def _their_losses(entry: Any, where: str) -> list[float]:
    found = _of(entry, "avg_loss")
    losses = found if isinstance(found, list) and found else [found]
    return [_number(loss, f"{where}: avg_loss") for loss in losses]


def read_log(path: Path) -> TofuLog | TheirFigures:
    """A log of TOFU's authors, or what open-unlearning wrote of a model."""
    data = _json(path)
    theirs = TheirFigures.from_json(data, str(path)) if isinstance(data, Mapping) else None
    return theirs or TofuLog.from_json(data, str(path))


def reference_log(path: Path, benchmark: str) -> TofuLog | TheirFigures:
    """The same, where a model scored on a benchmark can be compared with it."""
    found = read_log(path)
    if found.benchmark != benchmark:
        raise EvaluationError(
            f"{path} is a log of {found.benchmark.upper()}, and no reference for {benchmark.upper()}: give one of the "
            "same benchmark, or a run's folder"
        )
    if isinstance(found, TheirFigures):
        _ = found.need_ratios() if benchmark == "tofu" else found.auc
    return found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file: give a log of TOFU (.json)") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise DataError(
            f"{path}: not JSON ({error}): give a log of TOFU as its authors' or open-unlearning's evaluation writes it"
        ) from error


# -- any benchmark

SUITES: dict[str, type[Log]] = {"tofu": TofuLog, "muse": MuseLog}
Reference = Figures | Literal["published"] | None


def read_scored(folder: Path, spec: BenchmarkSpec) -> Log:
    """What one model scored, from the samples in a folder."""
    samples, suite = read_samples(folder), SUITES[spec.name]
    if missing := [task for task in suite.tasks(spec.set) if task not in samples]:
        raise EvaluationError(
            f"{folder}: {spec.name} {spec.set} needs tasks that were not run: {', '.join(missing)}; run the recipe "
            "again"
        )
    try:
        return suite.from_samples(samples, spec.set)
    except (DataError, EvaluationError) as error:
        raise type(error)(f"{folder}: {error}") from error


def rows(logs: Mapping[Who, Log], reference: Reference, method: str) -> dict[Who, Row]:
    """Each model's row by the benchmark's own column names: target, edited, reference.

    Args:
        logs: What the models scored.
        reference: What they are compared with; it has a row of its own, in place of ``logs["reference"]``, but nothing
            to be compared with.
        method: MUSE's name of the edited model.
    """
    compared: dict[Who, Figures] = {**logs}
    if isinstance(reference, Figures):
        compared["reference"] = reference
    found: dict[Who, Row] = {}
    for who in (who for who in WHO if who in compared):
        name = {"edited": method, "reference": "retrain"}.get(who, who)
        try:
            found[who] = compared[who].row(None if compared[who] is reference else reference, name)
        except EvaluationError as error:
            named = f" (found with the {'edited model' if who == 'edited' else who})" if "target" in compared else ""
            raise EvaluationError(f"{error}{named}") from error
    return found


def absent(name: str, reference: Reference) -> str:
    """Why a benchmark's rows lack the figure that compares with a reference; empty where they have it."""
    figure = SUITES[name].figure
    if reference is None:
        return (
            f"{figure} compares with a model that never saw the forget set. Give one as reference: train, a run "
            "folder, a model or, for TOFU, a log."
        )
    zero = name == "muse" and isinstance(reference, MuseLog | TheirFigures) and reference.auc == 0
    return f"{figure} is absent because {_ZERO_AUC}." if zero else ""


def build(spec: BenchmarkSpec, base: Path, tokenizer: str, seed: int, chat: Chat | None) -> TaskSet:
    """Every task of the benchmark, on all items.

    Args:
        base: The recipe's folder, for ``path``.
        tokenizer: Folder or name of the scored model's tokenizer; token counts are in its tokens.
        seed: For few-shot examples.
        chat: The conversations in which questions are asked, if the recipe has any.
    """
    folder = benchmark_folder(spec, base)
    metadata = {"tokenizer": tokenizer, "items": spec.items, "max_tokens": spec.max_tokens}
    metadata |= {"tag": spec.tag} if spec.name == "tofu" else {}
    metadata |= {spec.name: str(folder)} if folder is not None else {}
    known = {key: value for key, value in metadata.items() if value is not None}
    with quiet_harness():
        try:
            loaded = task_manager(paths=[tasks_folder()], metadata=known).load(f"{spec.name}_{spec.set}")["tasks"]
        except (OSError, ValueError, RuntimeError, ImportError, LookupError) as error:
            raise no_data(spec, error) from error
        if chat is not None:
            in_template(loaded, chat)
        for task in loaded.values():
            task.set_fewshot_seed(seed)
    return TaskSet(loaded, {}, {name: TaskInfo(_role(name), name, "test") for name in loaded}, {})


def _role(task: str) -> Role:
    if "_retain" in task:
        return "retain"
    return "utility" if "real_authors" in task or "world_facts" in task else "forget"


def run_benchmark(subjects: Subjects, questions: Questions, store: Store) -> Benchmark:
    """The rows of the recipe's benchmark, computed from lm-eval's sample files."""
    recipe = questions.recipe
    spec = recipe.benchmark
    assert spec is not None  # the caller looked
    tokenizer = subjects.target.tokenizer
    chat = chat_of(recipe.model, store.base, tokenizer)
    built = build(spec, store.base, tokenizer.name_or_path, recipe.seed, chat)
    how = recipe.eval.model_dump(mode="json", include={"engine", "batch_tokens", "batch_size", "bootstrap"})
    inputs: list[Any] = [built.digest(), questions.scoring, subjects.target.words]
    inputs += [spec.model_dump(mode="json", exclude={"path"}), how]
    places = subjects.each(
        "benchmark", inputs, store, lambda loaded, who, tmp: score_model(loaded, built, who, recipe, tmp)
    )
    logs = {who: read_scored(place, spec) for who, place in places.items()}
    reference: Reference = logs.get("reference")
    if recipe.reference == "published":
        reference = "published"
    elif (log := log_file(recipe, store.base)) is not None:
        reference = reference_log(log, spec.name)
    try:
        found, missing = rows(logs, reference, recipe.name), absent(spec.name, reference)
    except EvaluationError as error:  # what needs no reference is not lost with it
        found, missing = rows(logs, None, recipe.name), f"{SUITES[spec.name].figure} is absent because {error}."
    chosen_on = {item.target for s in questions.sets if s.role in ("forget", "retain") for item in s.validation}
    answers = {str(_doc(r).get("answer")) for records in read_samples(places["target"]).values() for r in records}
    shown = {str(who): found[who] for who in subjects.who()}
    return Benchmark(spec.name, spec.set, spec.items, shown, missing, len(answers & chosen_on))
