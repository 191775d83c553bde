"""θ − λτ for a checkpoint of any size, file by file from disk to disk.

Every weight gets the bits that ``export_merged`` gives it in memory, block of rows by block of rows, so that the memory
it takes is the vector's; everything else is copied byte for byte. Files, their names and their layout stay as they are.
``unlearn.json`` in the output says what it is, and which files are finished.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from unlearn.console import progress, say
from unlearn.errors import ModelError, RunFolderError, VectorError
from unlearn.model.checkpoint import Checkpoint, Stored, read_checkpoint, real_place
from unlearn.model.locate import INDEX
from unlearn.store.files import explained, some, sync, unique, write_json_atomic
from unlearn.store.lock import Lock
from unlearn.store.provenance import versions
from unlearn.vector.change import Change, edited, row_blocks, rows_of
from unlearn.vector.rounding import Survival, generator_for, lost, round_stochastically, summary_of
from unlearn.vector.stored_names import Target, copies, refuse_adapter, targets_of
from unlearn.vector.task_vector import TaskVector

T = TypeVar("T")
R = TypeVar("R")

RECORD, LOCK = "unlearn.json", ".unlearn-lock"
CONFIG = "config.json"
_LAST = (CONFIG, INDEX)  # so that a folder that looks like a model is one
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".pyc"})
_WEIGHTS = frozenset(
    {".safetensors", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".npy", ".tflite"}
)
_HALF_WRITTEN = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
_BY_THE_WAY = frozenset({"_name_or_path", "transformers_version"})  # of a configuration; nothing depends on them
_WAYS_OUT = (
    "Give the model in float32, round with --stochastic-rounding (to another folder), or put the vector on as an "
    "adapter, which is exact; --accept-rounding writes them all the same"
)
_CHUNK, _MB = 2**23, 10**6
_SPARE = 64 * 2**20  # bytes that stay free
_MEASURED_WHOLE = 2**20  # elements of a tensor of which every row is measured; of larger ones these are:
_EVERY_BLOCK, _EVERY_ROW = 16, 4


@dataclass(frozen=True, slots=True)
class Rounding:
    """How edited weights go to 16 bits: to nearest, or by chance with a seed."""

    seed: int | None = None

    def __str__(self) -> str:
        return "to nearest" if self.seed is None else f"stochastically, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done: tensors edited and copied, bytes of all weights, files that an earlier attempt had finished, files
    left out with the reason, and what survived rounding (of large weights a part of the rows is measured)."""

    edited: int
    copied: int
    size: int
    kept: int
    left_out: tuple[str, ...]
    survived: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison found: how many tensors the base has, how many are edited, and tensor, or ``config.json``, ->
    why it is not what it should be."""

    tensors: int
    edited: int
    wrong: Mapping[str, str]


def write_edited(
    vector: TaskVector,
    model: Path,
    coefficient: float,
    out: Path,
    rounding: Rounding = Rounding(),
    accept_rounding: bool = False,
) -> Applied:
    """Write ``theta - coefficient * tau`` to ``out``, or go on where an earlier attempt was cut off.

    Args:
        accept_rounding: Go on also where rounding to nearest has made another edit of it.

    Raises:
        ModelError: the checkpoint is damaged, quantised, or none.
        VectorError: the vector does not fit it, the result is not finite, or too little of the edit survived rounding.
        RunFolderError: the output's folder is not for it, is full, or cannot be written.
    """
    checkpoint = read_checkpoint(model)
    targets = _targets(checkpoint, vector)
    copies(checkpoint)
    others, left_out = _others(checkpoint)
    sources = {**checkpoint.files, **others}
    edit = {"coefficient": coefficient, "vector_sha256": vector.digest(), "rounding": str(rounding)}
    about = {
        **{"schema": 2, "made_by": "unlearn apply", "formula": "theta - coefficient * tau", **edit},
        **{"base": checkpoint.folder.name, "versions": versions(("lm-unlearn", "torch"))},
        "vector": {"modules": len(vector.modules), "rank": vector.rank(), "meta": dict(vector.meta)},
    }
    with _opened(out.resolve(), checkpoint.folder, edit, sources) as (place, lock, files):
        kept = sum(name in files for name in checkpoint.files)
        todo = {name: path for name, path in sources.items() if name not in files}
        needed = sum(path.stat().st_size for path in todo.values())

        def keep(**more: Any) -> None:
            write_json_atomic(place / RECORD, {**about, "finished": False, "files": files, **more})

        with explained(place):
            free = shutil.disk_usage(place).free
            if needed and free < needed + _SPARE:
                raise RunFolderError(
                    f"not enough space for {place}: {needed / 1e6:,.0f} MB are needed and {_SPARE / 1e6:,.0f} MB to "
                    f"spare, {free / 1e6:,.0f} MB are free. Make room, or choose a folder on another disk with --out"
                )
            keep()
        with progress("writing, MB", needed // _MB) as advance:
            for name, path in todo.items():
                insists = accept_rounding or rounding.seed is not None
                # before the configuration, without which the folder is no model
                if name not in checkpoint.files and not insists and (said := lost(_survived(files), _WAYS_OUT)):
                    raise VectorError(f"{out}: {said}")
                works = [(target, vector.modules[target.module]) for target in targets.get(name, ())]
                with explained(place), _hidden(place / name) as temporary:
                    files[name] = _write(path, temporary, works, coefficient, rounding)
                    lock.check()
                    keep()  # first: a file under its name is always one that the record knows
                    temporary.replace(place / name)
                    sync((place / name).parent)
                advance(path.stat().st_size // _MB)
        survived = _survived(files)
        with explained(place):
            keep(finished=True, survived=survived)
    size = sum(path.stat().st_size for path in checkpoint.files.values())
    count = len(vector.modules)
    return Applied(count, len(checkpoint.tensors) - count, size, kept, left_out, survived)


def check_edited(
    vector: TaskVector, model: Path, coefficient: float, out: Path, rounding: Rounding = Rounding()
) -> Verdict:
    """Compare the checkpoint in ``out``, however it is cut into files, with what it should be, bit by bit.

    Its ``config.json``, by which the weights are read, must say the same as the base's.

    Raises:
        ModelError: one of the checkpoints is damaged, or none, or an adapter lies in it.
        VectorError: the vector does not fit the base.
    """
    if not out.is_dir():
        raise RunFolderError(f"{out}: no such folder, so there is nothing to check")
    base, other = read_checkpoint(model), read_checkpoint(out)
    refuse_adapter(other.folder)
    works = {t.stored.name: (t, vector.modules[t.module]) for ts in _targets(base, vector).values() for t in ts}
    heads = copies(base) ^ copies(other)  # a head that is a copy of the embeddings may be stored or not
    wrong = dict.fromkeys(other.tensors.keys() - base.tensors.keys() - heads, "the base has no such tensor")
    with _one_thread(), progress("checking, tensors", len(base.tensors)) as advance:
        for name, mine in base.tensors.items():
            advance(1)
            theirs = other.tensors.get(name)
            if theirs is None:
                if name not in heads:
                    wrong[name] = "missing"
            elif (theirs.format, theirs.shape) != (mine.format, mine.shape):
                wrong[name] = f"{theirs.format} {theirs.shape} instead of {mine.format} {mine.shape}"
            else:
                with base.files[mine.file].open("rb") as one, other.files[theirs.file].open("rb") as two:
                    one.seek(mine.begin)
                    two.seek(theirs.begin)
                    if differ := _differing(one, two, mine, works.get(name), coefficient, rounding):
                        wrong[name] = f"{differ} of {math.prod(mine.shape)} elements differ"
    if said := _other_config(base.folder, other.folder):
        wrong[CONFIG] = said
    return Verdict(len(base.tensors), len(works), dict(sorted(wrong.items())))


def _targets(checkpoint: Checkpoint, vector: TaskVector) -> dict[str, list[Target]]:
    """File -> the tensors in it that the vector changes, in the file's order."""
    found: dict[str, list[Target]] = {}
    for target in targets_of(checkpoint, {name: change.shape for name, change in vector.modules.items()}):
        found.setdefault(target.stored.file, []).append(target)
    return {file: sorted(targets, key=lambda t: t.stored.begin) for file, targets in found.items()}


# -- the arithmetic --------------------------------------------------------------------------------------------------

Work = tuple[Target, Change]


def _write(source: Path, to: Path, works: Sequence[Work], coefficient: float, rounding: Rounding) -> dict[str, Any]:
    """Write one file with its tensors edited; what is to be recorded of it."""
    origin = source.stat()
    survived: dict[str, Survival] = {}
    with _one_thread(), source.open("rb") as old, to.open("xb") as new:
        for target, change in works:
            _copy(old, new, target.stored.begin - old.tell())
            parts: list[Survival] = []
            for rows in _edited(old, (target, change), coefficient, rounding, parts):
                new.write(rows.view(torch.uint8).numpy().data)
            survived[target.module] = Survival.total(parts)
        _copy(old, new, origin.st_size - old.tell())
        new.flush()
        os.fsync(new.fileno())
    if _state(source.stat()) != _state(origin):
        raise ModelError(f"{source}: it was changed while it was read: run the same command again")
    return {
        "made": _state(to.stat())[:3],
        "base": _state(origin),
        "survived": {name: astuple(sums) for name, sums in sorted(survived.items())},
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block is too small to share: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _edited(
    file: BufferedReader, work: Work, coefficient: float, rounding: Rounding, measured: list[Survival] | None = None
) -> Iterator[Tensor]:
    """The rows of an edited tensor as stored, block by block; ``file`` stands where the base's begin."""
    target, change = work
    stored = target.stored
    dtype, columns = _DTYPES[stored.format], stored.shape[1]
    by_chance = rounding.seed is not None and dtype != torch.float32
    generator = generator_for(rounding.seed or 0, f"{target.module}.weight") if by_chance else None
    whole = math.prod(stored.shape) <= _MEASURED_WHOLE

    beginning = file.tell()

    def edit(block: tuple[int, tuple[int, int]]) -> tuple[Tensor, Survival | None]:
        number, (first, end) = block
        raw = bytearray((end - first) * columns * dtype.itemsize)
        if os.preadv(file.fileno(), [raw], beginning + first * columns * dtype.itemsize) < len(raw):
            raise ModelError(f"{file.name}: it was cut off while it was read")
        before = torch.frombuffer(raw, dtype=dtype).view(-1, columns)
        part = rows_of(change, first, end, target.transposed)
        exact = edited(before.float(), part, -coefficient, target.transposed)
        after = round_stochastically(exact, dtype, generator) if generator else exact.to(dtype)
        if not bool(torch.isfinite(torch.stack(torch.aminmax(exact)).to(dtype)).all()):
            raise VectorError(
                f"{target.module}: with coefficient {coefficient!r} its weights are nothing that {stored.format} can "
                "hold (or they are not finite before): take a smaller one"
            )
        step = 1 if whole else 0 if number % _EVERY_BLOCK else _EVERY_ROW
        if measured is None or not step:
            return after, None
        delta = part.delta().T if target.transposed else part.delta()
        return after, Survival.of(after[::step], before[::step], -coefficient * delta[::step])

    workers = 1 if generator else _workers()
    for after, survival in _side_by_side(edit, enumerate(row_blocks(*stored.shape)), workers):
        if measured is not None and survival is not None:
            measured.append(survival)
        yield after
    file.seek(stored.end)


def _workers() -> int:
    """As many threads as there are processors for this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _side_by_side(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """The results in order, each made by one of some threads while items are read and earlier results are used."""
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:  # more would only fill the memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _differing(
    one: BufferedReader, two: BufferedReader, stored: Stored, work: Work | None, coefficient: float, rounding: Rounding
) -> int:
    """How many elements of a tensor are not what they should be, bit by bit; both files stand at its beginning."""
    size = stored.end - stored.begin
    width = max(size // max(math.prod(stored.shape), 1), 1)
    parts: Iterator[Any] = _bytes(one, size)
    if work is not None:
        parts = (rows.view(torch.uint8).numpy().data for rows in _edited(one, work, coefficient, rounding))
    differ = 0
    for part in parts:
        wanted, found = (np.frombuffer(p, np.uint8) for p in (part, two.read(memoryview(part).nbytes)))
        if not np.array_equal(wanted, found):
            differ += int((wanted.reshape(-1, width) != found.reshape(-1, width)).any(1).sum())
    return differ


def _copy(old: BufferedReader, new: Any, count: int) -> None:
    for part in _bytes(old, count):
        new.write(part)


def _bytes(file: BufferedReader, count: int) -> Iterator[bytes]:
    """The next bytes of a file, chunk by chunk."""
    while count:
        part = file.read(min(count, _CHUNK))
        if not part:
            raise ModelError(f"{file.name}: it was cut off while it was read")
        count -= len(part)
        yield part


# -- the folder ------------------------------------------------------------------------------------------------------


def _survived(files: Mapping[str, Any]) -> dict[str, Any]:
    """What rounding has left of the edit in the files that are finished."""
    measured = {n: Survival(*v) for entry in files.values() for n, v in entry["survived"].items()}
    return summary_of(dict(sorted(measured.items())))


def _state(status: os.stat_result) -> list[int]:
    """By which a file is known again without reading it: size, time, number; device and time of its status, which
    nobody may set (copies and images may keep one time for all files)."""
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, status.st_ctime_ns]


@contextmanager
def _hidden(place: Path) -> Iterator[Path]:
    """A hidden name beside ``place`` for what will be renamed to it; removed if it is still there at the end."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{unique()}.tmp")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _opened(
    place: Path, model: Path, edit: Mapping[str, Any], sources: Mapping[str, Path]
) -> Iterator[tuple[Path, Lock, dict[str, Any]]]:
    """Make the output's folder or go on in it, alone: gives it, the lock, and the files in it that are finished."""
    if place.is_relative_to(model):
        raise RunFolderError(f"{place} is the model's own folder, or in it: choose another --out")
    if place.exists() and not place.is_dir():
        raise RunFolderError(f"{place} is not a folder: choose another --out")
    new = not place.exists()
    with explained(place):
        place.mkdir(parents=True, exist_ok=True)
        _leftovers(place, read_record(place))  # before a lock is left in somebody's folder
        lock = Lock.take(place / LOCK)
    try:
        with explained(place):
            record = read_record(place)
            for path in _leftovers(place, record):
                path.unlink(missing_ok=True)
            differs = [f"{k} {record[k]} there, {v} here" for k, v in edit.items() if record.get(k, v) != v]
            differs += [f"{name} there, not here" for name in sorted(record["files"].keys() - sources.keys())]
            if differs:
                raise RunFolderError(
                    f"{place} holds another edit, or that of another model: {some(differs)}. Use another --out, or "
                    "remove that folder"
                )
            files = {}
            for name, entry in record["files"].items():
                made = place / name
                whole = made.is_file() and _state(made.stat())[:3] == entry["made"]
                if whole and _state(sources[name].stat()) == entry["base"]:
                    files[name] = entry
                else:
                    say(f"{name} is written anew: it, or the model's file, has changed", style="yellow")
                    made.unlink(missing_ok=True)
        yield place, lock, files
    finally:
        lock.release()
        if new:
            with suppress(OSError):
                place.rmdir()  # nothing came of it


def read_record(place: Path) -> dict[str, Any]:
    """What an earlier attempt recorded, ``{"files": {}}`` where there was none."""
    path = place / RECORD
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (record["made_by"], record["schema"]) != ("unlearn apply", 2):
            raise ValueError("another program or another version wrote it")
        for entry in record["files"].values():
            _ = entry["made"], entry["base"], [Survival(*v) for v in entry["survived"].values()]
        return record
    except FileNotFoundError:
        return {"files": {}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunFolderError(
            f"{path}: cannot be read ({error}), so it is unclear what lies beside it: use another --out, or remove "
            "that folder"
        ) from error


def _leftovers(place: Path, record: Mapping[str, Any]) -> list[Path]:
    """What a killed attempt left half written; refused where something lies there that this command did not write."""
    strangers, leftovers = [], []
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_symlink():
            strangers.append(f"{name} (a link)")
        elif path.is_dir() or name in record["files"] or name == RECORD or name.startswith(LOCK):
            continue
        elif _HALF_WRITTEN.fullmatch(path.name):
            leftovers.append(path)
        else:
            strangers.append(name)
    if strangers:
        raise RunFolderError(
            f"{place} is not empty and not only what this command wrote (it holds {some(strangers)}): choose another "
            "--out"
        )
    return leftovers


def _others(checkpoint: Checkpoint) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The files beside the weights, configuration and index last, and what is left out, in words."""
    found: dict[str, Path] = {}
    left_out: list[str] = []
    for folder, subfolders, names in os.walk(checkpoint.folder):
        here = Path(folder)
        links = [n for n in subfolders if (here / n).is_symlink()]
        left_out += [f"{(here / n).relative_to(checkpoint.folder)} (a link to a folder)" for n in links]
        subfolders[:] = sorted(n for n in subfolders if not n.startswith((".", "__")) and n not in links)
        for name in sorted(n for n in names if not n.startswith(".")):
            relative = (here / name).relative_to(checkpoint.folder).as_posix()
            if relative in checkpoint.files or relative == RECORD:
                continue
            if why := _why_not(here / name, checkpoint.indexed and relative == INDEX):
                left_out.append(f"{relative} ({why})")
            else:
                found[relative] = real_place(checkpoint.folder, here / name)
    order = sorted(found, key=lambda n: (_LAST.index(n) if n in _LAST else -1, n))
    return {name: found[name] for name in order}, tuple(left_out)


def _why_not(path: Path, is_index: bool) -> str | None:
    if path.suffix.lower() in _PICKLES:
        return "may be pickled, which can run any code"
    if path.suffix.lower() in _WEIGHTS or ".onnx_data" in path.name:
        return "unedited weights"
    if path.name.endswith(".index.json") and not is_index:
        return "the index of other weights"
    return None if path.is_symlink() or path.is_file() else "no file"


def _other_config(base: Path, edited: Path) -> str | None:
    """Why a configuration does not say what the base's says."""
    if not (edited / CONFIG).is_file():
        return "missing"
    one, two = (json.loads((folder / CONFIG).read_text(encoding="utf-8")) for folder in (base, edited))
    if one == two:
        return None
    from unlearn.model.load import config_of

    try:
        one, two = (config_of(folder).to_dict() for folder in (base, edited))
    except VectorError as error:
        return f"not the base's: {error}"
    other = sorted(k for k in (one.keys() | two.keys()) - _BY_THE_WAY if one.get(k) != two.get(k))
    return f"not the base's in {some(other)}" if other else None
