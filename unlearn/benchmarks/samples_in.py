"""lm-eval's per-item files, read back: what every aggregate here is computed from.

A folder of one model holds ``results_<time>.json`` and, per task, ``samples_<task>_<time>.jsonl`` with one record per
item and filter. Where a task was evaluated more than once, its newest file counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlearn.errors import DataError, EvaluationError

Record = Mapping[str, Any]
Samples = Mapping[str, Sequence[Record]]


def read_samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All records of one model's evaluations, by task, in order of ``doc_id``.

    Args:
        folder: Where the files are, or the folder around it if it holds those of a single model.

    Raises:
        DataError: no such files, a record that cannot be read, an item twice, or another number of items than the
            results file of the same evaluation says.
    """
    where = _folder(folder)
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


def item_id(record: Record) -> str:
    """What an item is called across models: the ``id`` in its data, or else lm-eval's number for it."""
    doc = record.get("doc")
    own = doc.get("id") if isinstance(doc, Mapping) else None
    return str(record.get("doc_id") if own is None else own)


def by_item(samples: Samples, task: str) -> dict[str, Record]:
    """The records of a task by :func:`item_id`.

    Raises:
        EvaluationError: the task was not run, or ran on nothing.
        DataError: two records of one item.
    """
    if task not in samples:
        ran = ", ".join(sorted(samples)) or "none"
        raise EvaluationError(f"task {task} was not run, and its scores are needed here; there are: {ran}")
    records = {item_id(record): record for record in samples[task]}
    if not records:
        raise EvaluationError(f"task {task} has no items")
    if len(records) < len(samples[task]):
        raise DataError(f"task {task}: {len(samples[task])} records of {len(records)} items; one for each was expected")
    return records


def numbers(records: Mapping[str, Record], task: str, name: str) -> NDArray[np.float64]:
    """One number of every item, (N,), in the records' order.

    Raises:
        DataError: it is missing somewhere or is no finite number.
    """
    return np.array([number(r.get(name), f"task {task}, item {i}: {name}") for i, r in records.items()])


def number(value: Any, where: str) -> float:
    """The value as a finite float.

    Raises:
        DataError: it is none; ``where`` says which it is.
    """
    if value is None:
        raise DataError(f"{where} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise DataError(f"{where} is {value!r}, which is no finite number")
    return float(value)


def _folder(folder: Path) -> Path:
    """The folder with the files: this one or, where there is but one, that of a model in it."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; give one in which lm-eval wrote results and samples")
    if any(folder.glob("samples_*.jsonl")):
        return folder
    inner = sorted({path.parent for path in folder.glob("*/samples_*.jsonl")})
    if len(inner) > 1:
        raise DataError(f"{folder}: evaluations of {len(inner)} models ({', '.join(p.name for p in inner)}); name one")
    return inner[0] if inner else folder


def _records(path: Path) -> list[dict[str, Any]]:
    """Every line of a file, checked, in order of its items."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    found: list[dict[str, Any]] = []
    seen: set[tuple[int, str]] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise DataError(f"{where}: not JSON ({error}); the file is damaged or cut off") from error
        doc_id = record.get("doc_id") if isinstance(record, dict) else None
        if not isinstance(doc_id, int) or isinstance(doc_id, bool):
            raise DataError(f"{where}: no record of an item, as lm-eval writes them: it has no whole number `doc_id`")
        key = (doc_id, str(record.get("filter")))
        if key in seen:
            raise DataError(f"{where}: item {doc_id} is there twice; were two evaluations written to one file?")
        seen.add(key)
        found.append(record)
    return sorted(found, key=lambda record: record["doc_id"])


def _counted(path: Path, results: Path, task: str, records: Sequence[Record]) -> None:
    """Compare with what the same evaluation's results say of the task.

    Raises:
        DataError: another number of items, or no results to compare with.
    """
    try:
        whole = json.loads(results.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: {results.name}, written with it, is not beside it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{results}: cannot be read: {error}") from error
    try:
        wanted = whole["n-samples"][task]["effective"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{results}: does not say how many items of {task} were scored (n-samples)") from error
    count = len({record["doc_id"] for record in records})
    if count != wanted:
        raise DataError(f"{path}: {count} items, but {results.name} says that {wanted} were scored; a file is cut off")
