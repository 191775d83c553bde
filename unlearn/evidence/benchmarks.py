"""TOFU and MUSE from per-item values: what one model scored, and the row of figures that the authors would publish.

A benchmark is one entry of :data:`SUITES`: its tasks, how one model's samples are read, and its row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unlearn.errors import DataError, EvaluationError
from unlearn.evidence.membership import auc
from unlearn.evidence.reference import benchmark_folder
from unlearn.recipe.evaluation import FORGET_SETS, BenchmarkSpec
from unlearn.recipe.load import tasks_folder
from unlearn.results import Role
from unlearn.score.silence import quiet_harness
from unlearn.score.tasks import TaskInfo, TaskSet, task_manager

Record = Mapping[str, Any]
Samples = Mapping[str, Sequence[Record]]
Row = dict[str, float | str | None]
Floats = NDArray[np.float64]
_SAME = 1e-6  # nats within which two logs of one model may differ, by how their numbers were written

# -- lm-eval's samples, read back


def read_samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All records of one model's evaluations, by task, in order of ``doc_id``; of several files of a task the newest.

    ``folder`` has the files, or is around the folder of a single model that has them. As many records must be there as
    the results file of the same evaluation says.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one in which lm-eval wrote results and samples")
    where = folder
    if not any(folder.glob("samples_*.jsonl")):
        inner = sorted({path.parent for path in folder.glob("*/samples_*.jsonl")})
        if len(inner) > 1:
            models = ", ".join(p.name for p in inner)
            raise DataError(f"{folder}: evaluations of {len(inner)} models ({models}); name one")
        where = inner[0] if inner else folder
    newest: dict[str, tuple[str, Path]] = {}
    for path in where.glob("samples_*.jsonl"):
        task, _, time = path.stem.removeprefix("samples_").rpartition("_")
        if task:
            newest[task] = max(newest.get(task, ("", path)), (time, path))
    if not newest:
        raise DataError(f"{where}: no samples_<task>_<time>.jsonl in it; evaluate with --log_samples")
    found = {}
    for task, (time, path) in sorted(newest.items()):
        found[task] = _records(path)
        _counted(path, where / f"results_{time}.json", task, found[task])
    return found


def _records(path: Path) -> list[dict[str, Any]]:
    """Every line of a file, checked, in order of its items."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for n, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {n}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise DataError(f"{where}: not JSON ({error}); the file is damaged or cut off") from error
        doc_id = record.get("doc_id") if isinstance(record, dict) else None
        if not isinstance(doc_id, int) or isinstance(doc_id, bool):
            raise DataError(f"{where}: no record of an item, as lm-eval writes them: it has no whole number `doc_id`")
        key = (doc_id, str(record.get("filter")))
        if key in found:
            raise DataError(f"{where}: item {doc_id} is there twice; were two evaluations written to one file?")
        found[key] = record
    return sorted(found.values(), key=lambda record: record["doc_id"])


def _counted(path: Path, results: Path, task: str, records: Sequence[Record]) -> None:
    """Compare with what the same evaluation's results say of the task."""
    try:
        whole = json.loads(results.read_bytes())
        wanted = whole["n-samples"][task]["effective"]
    except FileNotFoundError as error:
        raise DataError(f"{path}: {results.name}, written with it, is not beside it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{results}: cannot be read: {error}") from error
    except (KeyError, TypeError) as error:
        raise DataError(f"{results}: does not say how many items of {task} were scored (n-samples)") from error
    count = len({record["doc_id"] for record in records})
    if count != wanted:
        raise DataError(f"{path}: {count} items, but {results.name} says that {wanted} were scored; a file is cut off")


def _doc(record: Record) -> Mapping[str, Any]:
    doc = record.get("doc")
    return doc if isinstance(doc, Mapping) else {}


def by_item(samples: Samples, task: str) -> dict[str, Record]:
    """The records of a task by the ``id`` in the item's data, or else by lm-eval's number for it."""
    if task not in samples:
        ran = ", ".join(sorted(samples)) or "none"
        raise EvaluationError(f"task {task} was not run, and its scores are needed here; there are: {ran}")
    records: dict[str, Record] = {}
    for record in samples[task]:
        own = _doc(record).get("id")
        records[str(record.get("doc_id") if own is None else own)] = record
    if not records:
        raise EvaluationError(f"task {task} has no items")
    if len(records) < len(samples[task]):
        raise DataError(f"task {task}: {len(samples[task])} records of {len(records)} items; one for each was expected")
    return records


def numbers(records: Mapping[str, Record], task: str, name: str) -> Floats:
    """One finite number of every item, (N,), in the records' order."""
    return np.array([_number(r.get(name), f"task {task}, item {i}: {name}") for i, r in records.items()])


def _number(value: Any, where: str) -> float:
    if value is None:
        raise DataError(f"{where} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise DataError(f"{where} is {value!r}, which is no finite number")
    return float(value)


# -- TOFU (Maini et al. 2401.06121): model utility and forget quality. Losses are nats per token. The truth ratio is R =
# exp(mean of the perturbed answers' losses - the paraphrased answer's loss), as the authors' aggregator has it (a
# geometric mean of the wrong answers' probabilities); all is computed from log R, which cannot overflow.

# Our name of a set, the file of it in the authors' logs, and its name in their columns; in the columns' order.
SETS = {
    "real_authors": ("eval_real_author_wo_options.json", "Real Authors"),
    "world_facts": ("eval_real_world_wo_options.json", "Real World"),
    "retain": ("eval_log.json", "Retain"),
    "forget": ("eval_log_forget.json", "Forget"),
}
_LISTS = "average_perturb_loss"
_FIELDS = ("avg_gt_loss", "avg_paraphrased_loss", _LISTS, "rougeL_recall")  # of each file
_WITH_CHOICES = ("real_authors", "world_facts")  # their probability is that of the answer among the wrong ones
_PARTS = tuple(f"{kind} {title}" for _, title in SETS.values() for kind in ("ROUGE", "Prob.", "Truth Ratio"))
# The columns of a submission to TOFU's leaderboard, as the authors' aggregator writes them.
TOFU_COLUMNS = (*_PARTS, "Model Utility", "Forget Quality", "Method", "Submitted By")


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

    @cached_property
    def log_truth_ratio(self) -> Floats:
        """log R, (N,)."""
        ratio: Floats = self.perturbed_losses.mean(axis=1) - self.paraphrased_loss
        return ratio

    @cached_property
    def prob(self) -> float:
        """Mean probability of the answer, each to the power of one over its length."""
        return float(np.exp(-self.loss).mean())

    @cached_property
    def prob_choice(self) -> float:
        """Mean share of the answer in the probabilities (as in :attr:`prob`) of it and the perturbed ones."""
        scores = -np.concatenate([self.loss[:, None], self.perturbed_losses], axis=1)  # (N, 1 + P)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))  # the largest is 1: no sum is 0
        return float((weights[:, 0] / weights.sum(axis=1)).mean())

    @cached_property
    def truth_ratio_forget(self) -> float:
        """Mean min(R, 1/R): 1 where right and wrong answers are equally likely."""
        return float(np.exp(-np.abs(self.log_truth_ratio)).mean())

    @cached_property
    def truth_ratio_kept(self) -> float:
        """Mean max(0, 1 - 1/R): 1 where only the right answer is likely."""
        return float(-np.expm1(-np.maximum(self.log_truth_ratio, 0.0)).mean())


@dataclass(frozen=True, eq=False)
class TofuLog:
    """What one model scored on TOFU: its four sets, and which forget set it was (None where a log does not say)."""

    sets: Mapping[str, TofuSet]
    forget_set: str | None = None

    @classmethod
    def from_json(cls, data: Any, where: str) -> TofuLog:
        """A log in the authors' layout, file name -> field -> item -> value, which messages call ``where``."""
        if not isinstance(data, Mapping):
            raise DataError(f"{where}: not a log in the layout of TOFU's authors: no object of files")
        files = ", ".join(file for file, _ in SETS.values())
        for file, _ in SETS.values():
            if not isinstance(data.get(file), Mapping):
                raise DataError(f"{where}: no {file!r} in it; a TOFU log has {files}")
        return cls({name: _tofu_set(data[file], f"{where}, {file}") for name, (file, _) in SETS.items()})

    def to_json(self) -> dict[str, dict[str, dict[str, Any]]]:
        """The same layout, with the fields that the authors' aggregator reads, and the questions where known."""
        whole = {}
        for name, (file, _) in SETS.items():
            s = self.sets[name]
            columns = zip(_FIELDS, (s.loss, s.paraphrased_loss, s.perturbed_losses, s.rouge), strict=True)
            whole[file] = {field: dict(zip(s.items, values.tolist(), strict=True)) for field, values in columns}
            if s.questions is not None:
                whole[file]["question"] = dict(zip(s.items, s.questions, strict=True))
        return whole

    @classmethod
    def from_samples(cls, samples: Samples, forget_set: str) -> TofuLog:
        """The samples of the tasks ``tofu_<set>_prob`` and ``tofu_<set>_rouge``, joined by item."""
        sets = {}
        for name in SETS:
            task = f"tofu_{forget_set if name == 'forget' else name}"
            scored, generated = by_item(samples, f"{task}_prob"), by_item(samples, f"{task}_rouge")
            ours = ("loss", "paraphrased_loss", "perturbed_losses")
            fields = {f: {i: r.get(key) for i, r in scored.items()} for f, key in zip(_FIELDS, ours, strict=False)}
            fields["rougeL_recall"] = {i: r.get("rougeL") for i, r in generated.items()}
            fields["question"] = {i: _doc(r).get("question") for i, r in scored.items()}
            sets[name] = _tofu_set(fields, f"tasks {task}_prob and {task}_rouge")
        return cls(sets, forget_set)


@dataclass(frozen=True, slots=True)
class ForgetQuality:
    """Two-sample Kolmogorov-Smirnov test of the truth ratios on the forget set: p-value, statistic, items."""

    p_value: float
    statistic: float
    n: int


def forget_quality(log: TofuLog, reference: TofuLog) -> ForgetQuality:
    """How hard it is to tell the model's truth ratios from those of one that never saw the forget set: a p-value.

    Computed on log R; the test sees only the order of values, which the logarithm keeps.
    """
    from scipy.stats import ks_2samp  # type: ignore[import-untyped]

    ours, theirs = log.sets["forget"], reference.sets["forget"]
    if log.forget_set and reference.forget_set and log.forget_set != reference.forget_set:
        raise EvaluationError(
            f"the reference was scored on {reference.forget_set} and the model on {log.forget_set}: "
            "forget quality compares the two on the same set"
        )
    refuse_other_items(theirs, ours.items, ours.questions, log.forget_set or reference.forget_set)
    if ours.perturbed_losses.shape != theirs.perturbed_losses.shape:
        counts = [s.perturbed_losses.shape[1] for s in (theirs, ours)]
        raise EvaluationError(
            f"the reference has {counts[0]} perturbed answers for each forget item and the model {counts[1]}: "
            "these are different data"
        )
    if len(ours.items) == 1:
        raise EvaluationError("forget quality of a single item is 1 whatever was scored: score more of the forget set")
    place = {item: n for n, item in enumerate(theirs.items)}
    ratios = theirs.log_truth_ratio[[place[item] for item in ours.items]]
    if np.allclose(ours.log_truth_ratio, ratios, rtol=0, atol=_SAME):
        raise EvaluationError(
            f"the truth ratios of all {len(ours.items)} forget items are the reference's own: this is one model, and "
            "compared with itself it has a forget quality of 1; take a reference that never saw the forget set"
        )
    test = ks_2samp(ours.log_truth_ratio, ratios)
    return ForgetQuality(float(test.pvalue), float(test.statistic), len(ours.items))


def refuse_other_items(
    reference: TofuSet, items: Sequence[str], questions: Sequence[str] | None, forget_set: str | None = None
) -> None:
    """Refuse a reference whose forget items are others than the model's ``items``, or ask other ``questions``."""
    cure = "score the model on as many, or take a reference of its set"
    if forget_set in FORGET_SETS:
        cure = f"TOFU's own reference for {forget_set} was trained on {FORGET_SETS[forget_set].reference}"
    if len(items) != len(reference.items):
        raise EvaluationError(
            f"the reference has {len(reference.items)} forget items and the model {len(items)}: forget quality "
            f"compares the two on the same ones; {cure}"
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
        first = wrong[0]
        raise EvaluationError(
            f"{len(wrong)} of the {len(items)} forget items ask something else in the reference: item {first!r} is "
            f"{theirs[first]!r} there and {ours[first]!r} here, so it was scored on another forget set; {cure}"
        )


def tofu_row(log: TofuLog, reference: TofuLog | None = None) -> dict[str, float | None]:
    """TOFU's row, by the authors' column names in their order, then the test that forget quality comes from.

    Model utility is the harmonic mean of the nine numbers of the sets to keep, 0 as soon as one of them is. Without a
    reference there is no forget quality, and it and the test are None.
    """
    parts = _parts(log)
    kept = [value for name, value in parts.items() if not name.endswith("Forget")]
    quality = None if reference is None else forget_quality(log, reference)
    return {
        **parts,
        "Model Utility": len(kept) / sum(1 / v for v in kept) if min(kept) > 0 else 0.0,
        "Forget Quality": quality.p_value if quality else None,
        "KS Test PVal Forget": quality.p_value if quality else None,
        "KS Test Forget": quality.statistic if quality else None,
    }


def _parts(log: TofuLog) -> dict[str, float]:
    """The twelve columns before the aggregates: a mean of fewer would be another figure."""
    values: list[float] = []
    for name in SETS:
        s = log.sets[name]
        values.append(float(s.rouge.mean()))
        values.append(s.prob_choice if name in _WITH_CHOICES else s.prob)
        values.append(s.truth_ratio_forget if name == "forget" else s.truth_ratio_kept)
    parts = dict(zip(_PARTS, values, strict=True))
    if broken := [name for name, value in parts.items() if not np.isfinite(value)]:
        raise EvaluationError(f"TOFU's figures cannot be computed: {', '.join(broken)}: no number, or no items")
    return parts


def _tofu_set(fields: Mapping[str, Any], where: str) -> TofuSet:
    """One file of a log, field -> item -> value."""
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
    table = _table({i: fields[_LISTS][i] for i in items}, f"{where}, {_LISTS}")
    return TofuSet(items, loss, paraphrased, table, rouge, _questions_in(fields, items))


def _questions_in(fields: Mapping[str, Any], items: Sequence[str]) -> tuple[str, ...] | None:
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


def _table(column: Mapping[str, Any], where: str) -> Floats:
    """(N, P) of a list of P numbers per item."""
    rows = []
    for item, values in column.items():
        if not isinstance(values, list) or not values:
            raise DataError(f"{where}, item {item!r}: no list of the perturbed answers' losses")
        rows.append([_number(v, f"{where}, item {item!r}, entry {n}") for n, v in enumerate(values, start=1)])
        if len(rows[-1]) != len(rows[0]):
            raise DataError(f"{where}, item {item!r}: {len(values)} perturbed answers where others have {len(rows[0])}")
    return np.array(rows)


# -- MUSE (Shi et al. 2407.06460)

Corpus = Literal["news", "books"]

MUSE_COLUMNS = ("name", "verbmem_f", "privleak", "knowmem_f", "knowmem_r")
_MUSE = ("verbmem", "knowmem_forget", "knowmem_retain", "privleak_forget", "privleak_holdout")
# AUC of the authors' retrained models, Llama-2 7B on News and ICLM 7B on Books; for other models it is a stand-in.
PUBLISHED_AUC: dict[Corpus, float] = {"news": 0.4772, "books": 0.5393}
# Why there is no PrivLeak beside such a reference.
ZERO_AUC = (
    "the reference's AUC is 0, by which it would be divided: every forget text looks better known to the reference "
    "than every hold-out text, as if it had been trained on them; take a model that was not"
)


@dataclass(frozen=True, eq=False)
class MuseLog:
    """What one model scored on a corpus of MUSE: per item, ROUGE-L F1 in [0, 1] and Min-40 % in nats.

    ``forget_items`` and ``holdout_items`` name the items of ``min_forget`` and ``min_holdout``.
    """

    corpus: Corpus
    verbmem: Floats
    knowmem_forget: Floats
    knowmem_retain: Floats
    min_forget: Floats
    min_holdout: Floats
    forget_items: tuple[str, ...]
    holdout_items: tuple[str, ...]

    @classmethod
    def from_samples(cls, samples: Samples, corpus: Corpus) -> MuseLog:
        """The samples of the tasks ``muse_<corpus>_*``."""

        def column(part: str, name: str) -> Floats:
            task = f"muse_{corpus}_{part}"
            return numbers(by_item(samples, task), task, name)

        return cls(
            corpus,
            column("verbmem", "rougeL_f1"),
            column("knowmem_forget", "rougeL_f1"),
            column("knowmem_retain", "rougeL_f1"),
            column("privleak_forget", "min_40"),
            column("privleak_holdout", "min_40"),
            tuple(by_item(samples, f"muse_{corpus}_privleak_forget")),
            tuple(by_item(samples, f"muse_{corpus}_privleak_holdout")),
        )

    @property
    def auc(self) -> float:
        """In the authors' direction: how often a hold-out text looks better known than a forget text."""
        return auc(self.min_holdout, self.min_forget)


def privleak(log: MuseLog, reference: MuseLog | Literal["published"]) -> float | None:
    """(AUC - AUC_ref) / AUC_ref * 100; 0 is the reference's, negative remembers, positive over-forgot.

    None where AUC_ref is 0 and there is nothing to divide by, see :data:`ZERO_AUC`. The reference is a retrained
    model's log, or ``"published"`` for the authors' value of that corpus.
    """
    if reference == "published":
        base = PUBLISHED_AUC[log.corpus]
    else:
        _same(log, reference)
        base = reference.auc
    return (log.auc - base) / base * 100 if base else None


def muse_row(
    log: MuseLog, name: str, reference: MuseLog | Literal["published"] | None = None
) -> dict[str, str | float | None]:
    """MUSE's row by the authors' column names in their order. Without a reference ``privleak`` is None."""
    return {
        "name": name,
        "verbmem_f": float(log.verbmem.mean()) * 100,
        "privleak": None if reference is None else privleak(log, reference),
        "knowmem_f": float(log.knowmem_forget.mean()) * 100,
        "knowmem_r": float(log.knowmem_retain.mean()) * 100,
    }


def _same(log: MuseLog, reference: MuseLog) -> None:
    """Refuse a reference that was scored on something else, or that is the model itself."""
    if log.corpus != reference.corpus:
        raise EvaluationError(f"the reference was scored on MUSE {reference.corpus} and the model on {log.corpus}")
    equal = []
    for part in ("forget", "holdout"):
        ours, theirs = getattr(log, f"{part}_items"), getattr(reference, f"{part}_items")
        if len(ours) != len(theirs):
            raise EvaluationError(
                f"the reference has {len(theirs)} {part} texts and the model {len(ours)}: PrivLeak compares the two on "
                "the same ones"
            )
        if other := set(ours) - set(theirs):
            raise EvaluationError(f"{len(other)} {part} texts, such as {min(other)!r}, are not the reference's")
        order = [theirs.index(item) for item in ours]
        lowest = getattr(reference, f"min_{part}")[order]
        equal.append(np.allclose(getattr(log, f"min_{part}"), lowest, rtol=0, atol=_SAME))
    if all(equal):
        raise EvaluationError(
            "the log-probabilities of all forget and hold-out texts are the reference's own: this is one model, and "
            "compared with itself it has a PrivLeak of 0; take a reference that never saw the forget set"
        )


# -- what a recipe's benchmark is

Log = TofuLog | MuseLog


@dataclass(frozen=True)
class Suite:
    """A published benchmark. ``figure`` is the one that compares with a model that never saw the forget set."""

    figure: str
    tasks: Callable[[str], tuple[str, ...]]
    read: Callable[[Samples, str], Log]
    row: Callable[[Any, Any, str], Row]


SUITES: dict[str, Suite] = {
    "tofu": Suite(
        "Forget quality",
        lambda forget_set: tuple(
            f"tofu_{name}_{part}"
            for name in (forget_set, "retain", "real_authors", "world_facts")
            for part in ("prob", "rouge")
        ),
        TofuLog.from_samples,
        lambda log, reference, name: {**tofu_row(log, reference)},
    ),
    "muse": Suite(
        "PrivLeak",
        lambda corpus: tuple(f"muse_{corpus}_{part}" for part in _MUSE),
        lambda samples, corpus: MuseLog.from_samples(samples, "news" if corpus == "news" else "books"),
        lambda log, reference, name: {**muse_row(log, name, reference)},
    ),
}


def build(spec: BenchmarkSpec, base: Path, tokenizer: str, seed: int) -> TaskSet:
    """Every task of the benchmark, on all items.

    Args:
        base: The recipe's folder, for ``path``.
        tokenizer: Folder or name of the scored model's tokenizer; token counts are in its tokens.
        seed: For few-shot examples.
    """
    folder = benchmark_folder(spec, base)
    metadata = {"tokenizer": tokenizer, "items": spec.items, "max_tokens": spec.max_tokens}
    metadata |= {"tag": spec.tag} if spec.name == "tofu" else {}
    metadata |= {spec.name: str(folder)} if folder is not None else {}
    known = {key: value for key, value in metadata.items() if value is not None}
    with quiet_harness():
        try:
            loaded = task_manager(paths=[tasks_folder()], metadata=known).load(f"{spec.name}_{spec.set}")
        except (OSError, ValueError, RuntimeError, ImportError, LookupError) as error:
            raise EvaluationError(
                f"benchmark: the data of {spec.name} {spec.set} cannot be had: {error}"
                + ("" if spec.path else ". They come from the hub; benchmark.path names a local folder with them")
            ) from error
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed)
    info = {name: TaskInfo(_role(name), name, "test") for name in loaded["tasks"]}
    return TaskSet(loaded["tasks"], {}, info, {})


def _role(task: str) -> Role:
    if "_retain" in task:
        return "retain"
    return "utility" if "real_authors" in task or "world_facts" in task else "forget"
