"""θ − λτ for a checkpoint of any size, file by file from disk to disk.

Every weight gets the bits that ``export_merged`` gives it in memory, block of rows by block of rows, so that the memory
it takes is the vector's; everything else is copied byte for byte. Files, their names and their layout stay as they are.
``unlearn.json`` in the output says what it is, and which files are finished.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from fcntl import F_GETFL, F_SETFL, fcntl
from functools import partial
from io import FileIO
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from unlearn.console import progress, say
from unlearn.errors import ModelError, RunFolderError, VectorError
from unlearn.model.checkpoint import INDEX, Checkpoint, Stored, read_checkpoint, real_place
from unlearn.store.files import explained, some, write_json_atomic, written_whole
from unlearn.store.lock import Lock
from unlearn.store.provenance import cores, versions
from unlearn.vector.change import (
    Change,
    Survival,
    edited,
    generator_for,
    lost,
    round_stochastically,
    row_blocks,
    rows_of,
    summary_of,
)
from unlearn.vector.task_vector import ADAPTER_CONFIG, VECTOR_FILE, TaskVector, read_vector

if TYPE_CHECKING:
    from unlearn.model.load import Architecture

RECORD, LOCK, CONFIG = "unlearn.json", ".unlearn-lock", "config.json"
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
_CHUNK, _MB = 2**22, 10**6
_AHEAD, _NEXT = 8, 2**25  # pieces that are edited before they are written, and bytes that are read before that
_Piece: TypeAlias = Callable[[], bytearray | memoryview]
_SPARE = 64 * 2**20  # bytes that stay free
_MEASURED_WHOLE = 2**20  # elements of a tensor of which every row is measured; of larger ones these are:
_EVERY_BLOCK, _EVERY_ROW = 16, 4


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


@contextmanager
def _one_thread() -> Iterator[None]:
    """A block is too small for torch to share: its threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def apply(
    vector: str | Path | TaskVector,
    model: str | Path,
    coefficient: float,
    out: str | Path,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
    accept_rounding: bool = False,
) -> Applied:
    """Write ``theta - coefficient * tau`` to a folder, or go on where an earlier attempt was cut off.

    Args:
        vector: A vector, its file, a folder with ``vector.safetensors``, or the folder of a LoRA adapter of PEFT's.
        model: A folder with safetensors.
        stochastic_rounding: Round edited weights to 16 bits by chance (``seed``) instead of to nearest.
        accept_rounding: Write also what rounding to nearest has made another edit of.
    """
    checkpoint = read_checkpoint(Path(model))
    vector = _vector_for(vector, checkpoint, coefficient)
    targets: dict[str, list[Target]] = {}
    for target in sorted(targets_of(checkpoint, vector), key=lambda t: t.stored.begin):
        targets.setdefault(target.stored.file, []).append(target)
    copies(checkpoint)
    others, left_out = _others(checkpoint)
    sources = {**checkpoint.files, **others}
    rounding = f"stochastically, seed {seed}" if stochastic_rounding else "to nearest"
    edit = {"coefficient": coefficient, "vector_sha256": vector.digest(), "rounding": rounding}
    about = {
        **{"schema": 2, "made_by": "unlearn apply", "formula": "theta - coefficient * tau", **edit},
        **{"base": checkpoint.folder.name, "versions": versions(("lm-unlearn", "torch"))},
        "vector": {"modules": len(vector.modules), "rank": vector.rank(), "meta": dict(vector.meta)},
    }
    with _opened(Path(out).resolve(), checkpoint.folder, edit, sources) as (place, lock, files):
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
                # before the configuration, without which the folder is no model
                measured = name not in checkpoint.files and not (accept_rounding or stochastic_rounding)
                if measured and (said := lost(_survived(files), _WAYS_OUT)):
                    raise VectorError(f"{out}: {said}")
                with explained(place):
                    (place / name).parent.mkdir(parents=True, exist_ok=True)
                with written_whole(place / name) as temporary:
                    chance = seed if stochastic_rounding else None
                    files[name] = _write(path, temporary, targets.get(name, ()), coefficient, chance)
                    lock.check()
                    keep()  # first: a file under its name is always one that the record knows
                advance(path.stat().st_size // _MB)
        survived = _survived(files)
        with explained(place):
            keep(finished=True, survived=survived)
    size = sum(path.stat().st_size for path in checkpoint.files.values())
    count = len(vector.modules)
    return Applied(count, len(checkpoint.tensors) - count, size, kept, left_out, survived)


@_one_thread()
def check(
    vector: str | Path | TaskVector,
    model: str | Path,
    coefficient: float,
    out: str | Path,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> Verdict:
    """Compare a checkpoint, however it is cut into files, with ``theta - coefficient * tau``, bit by bit.

    Its ``config.json``, by which the weights are read, must say the same as the base's.
    """
    if not Path(out).is_dir():
        raise RunFolderError(f"{out}: no such folder, so there is nothing to check")
    base, other = read_checkpoint(Path(model)), read_checkpoint(Path(out))
    vector = _vector_for(vector, base, coefficient)
    refuse_adapter(other.folder)
    targets = {target.stored.name: target for target in targets_of(base, vector)}
    heads = copies(base) ^ copies(other)  # a head that is a copy of the embeddings may be stored or not
    wrong = dict.fromkeys(other.tensors.keys() - base.tensors.keys() - heads, "the base has no such tensor")
    chance = seed if stochastic_rounding else None
    with progress("checking, tensors", len(base.tensors)) as advance:
        for name, mine in base.tensors.items():
            advance(1)
            theirs = other.tensors.get(name)
            if theirs is None:
                if name not in heads:
                    wrong[name] = "missing"
            elif (theirs.format, theirs.shape) != (mine.format, mine.shape):
                wrong[name] = f"{theirs.format} {theirs.shape} instead of {mine.format} {mine.shape}"
            else:
                with base.files[mine.file].open("rb", 0) as one, other.files[theirs.file].open("rb", 0) as two:
                    if differ := _differing(one, two, mine, theirs, targets.get(name), coefficient, chance):
                        wrong[name] = f"{differ} of {math.prod(mine.shape)} elements differ"
    if said := _other_config(base.folder, other.folder):
        wrong[CONFIG] = said
    return Verdict(len(base.tensors), len(targets), dict(sorted(wrong.items())))


def _vector_for(vector: str | Path | TaskVector, checkpoint: Checkpoint, coefficient: float) -> TaskVector:
    """The vector from wherever it is. An adapter that PEFT would not put on the model in whole is refused."""
    if not abs(coefficient) <= torch.finfo(torch.float32).max:
        raise VectorError(f"the coefficient must be a number within float32, not {coefficient}")
    if isinstance(vector, TaskVector):
        return vector
    place = Path(vector)
    found = read_vector(place)
    if place.is_dir() and not (place / VECTOR_FILE).is_file():
        from unlearn.model.load import model_of
        from unlearn.vector.interop import refuse_misfit, unlike_base

        refuse_misfit(place, model_of(checkpoint.folder))
        files = {name: checkpoint.files[stored.file] for name, stored in checkpoint.tensors.items()}
        if others := unlike_base(place, files):
            say(
                f"{place} keeps weights of the model it was trained on, and they are not this model's: {some(others)}. "
                "PEFT would put them in place of the model's; here its change goes on the model's own",
                style="yellow",
            )
    return found


# -- which stored tensor a module of the vector changes
#
# A checkpoint may name its tensors otherwise than the model does, may lack a weight that transformers puts together
# from others, and may keep it as (in, out). The class that config.json names knows this without reading a weight.

_HEADS = ("lm_head.weight", "embed_out.weight")
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Importing transformers and laying a model out takes seconds, more than editing a small one. For these families the
# names say it all, which a test holds against what their classes say: model_type -> linear layers, stored as (out, in).
_GATED = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
_LINEAR: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _GATED),
    "phi": r"self_attn\.([qkv]_proj|dense)|mlp\.fc[12]",
}
# no other name may be there: transformers would rename it, perhaps to one of these
_STORED = re.compile(r"(model\.(layers\.\d+\.[a-z_.0-9]+|embed_tokens|norm|final_layernorm)|lm_head)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that a module of the vector changes, and whether it is kept as (in, out), as GPT-2's Conv1D does."""

    module: str
    change: Change
    stored: Stored
    transposed: bool


def targets_of(checkpoint: Checkpoint, vector: TaskVector) -> list[Target]:
    """Find the tensor of every module of a vector; all that have none of their own, or a misfit, are named."""
    refuse_adapter(checkpoint.folder)
    there, config = checkpoint.tensors, _config(checkpoint.folder)
    for key in _LAYERS:  # a configuration can ask for any number of layers, each of which takes time to lay out
        if isinstance(count := config.get(key), int) and count > len(there):
            raise ModelError(
                f"{checkpoint.folder}: its config.json says {key} {count}, but there are only {len(there)} tensors"
            )
    if plain(config, there, vector.modules):
        found = [Target(n, change, there[f"{n}.weight"], False) for n, change in vector.modules.items()]
        if all(t.stored.shape == t.change.shape and t.stored.format in _DTYPES for t in found):
            return found
    return asked(checkpoint, vector)


def plain(config: Mapping[str, Any], stored: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether every module is certainly a linear layer with a stored weight ``MODULE.weight`` of its own."""
    linear, layers, names = _LINEAR.get(str(config.get("model_type"))), config.get("num_hidden_layers"), set(stored)
    if linear is None or type(layers) is not int or config.get("quantization_config") or config.get("auto_map"):
        return False
    known = re.compile(rf"model\.layers\.(0|[1-9][0-9]*)\.({linear})")
    found = [(known.fullmatch(module), f"{module}.weight" in names) for module in modules]
    return all(map(_STORED.fullmatch, names)) and all(m and int(m[1]) < layers and there for m, there in found)


def asked(checkpoint: Checkpoint, vector: TaskVector) -> list[Target]:
    """:func:`targets_of` by the model's own class, whatever it is."""
    from unlearn.model.load import lay_out, model_of

    model = model_of(checkpoint.folder)
    if getattr(model.config, "quantization_config", None):
        raise ModelError(
            f"{checkpoint.folder}: it is quantised (quantization_config in its config.json): give the model in full "
            "precision"
        )
    layout = lay_out(model)
    names, made = _names(model, checkpoint.tensors)
    found: list[Target] = []
    wrong: list[str] = []
    taken: dict[str, str] = {}
    for module, change in vector.modules.items():
        weight = layout.canonical(f"{module}.weight")
        owner = taken.setdefault(weight, module)
        stored = [checkpoint.tensors[name] for name in names.get(weight, ())]
        if owner != module:
            wrong.append(f"{module}: the same weight as {owner}")
        elif why := _misfit(weight, change.shape, layout, stored, made):
            wrong.append(f"{module}: {why}")
        else:
            found.append(Target(module, change, stored[0], layout.linear[weight]))
    if wrong:
        raise VectorError(
            f"the vector does not fit {checkpoint.folder}; was it made from another model? Nothing is written.\n  "
            + "\n  ".join(wrong)
        )
    return found


def _misfit(
    weight: str,
    shape: tuple[int, int],
    layout: Architecture,
    stored: list[Stored],
    made: Mapping[str, list[str]],
) -> str | None:
    """Why a weight cannot be changed in the files, or None."""
    if weight not in layout.linear:
        return layout.why_not(weight)
    if weight in made:
        return f"transformers makes its weight out of {some(made[weight])} on loading, so it is not in the files"
    if len(stored) != 1:
        found = f"{len(stored)} tensors, {some([t.name for t in stored])}, for" if stored else "no"
        more = "; transformers makes weights of this model out of others on loading" if made and not stored else ""
        return f"the checkpoint holds {found} {weight}{more}"
    tensor, wanted = stored[0], shape[::-1] if layout.linear[weight] else shape
    if tensor.format not in _DTYPES:
        advice = "edits are computed in float32: convert the model to it" if tensor.format == "F64" else "quantised?"
        return f"its weight is stored as {tensor.format}; {advice}"
    return None if tensor.shape == wanted else f"the vector changes {wanted}, the checkpoint has {tensor.shape}"


def _names(model: nn.Module, stored: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Stored names by the model's, as loading names them, and the weights that loading makes out of several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state: dict[str, Any] = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for name in sorted(stored, key=dot_natural_key):
        loaded, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if loaded not in state and name in state:
            loaded, pattern = rename_source_key(name, [], [], prefix, state)
        found[pattern is not None].setdefault(loaded, []).append(name)
    return found


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError where an adapter lies beside the weights, which transformers loads with them unasked."""
    if (folder / ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{folder}: it holds an adapter ({ADAPTER_CONFIG}), which would be put on the edited weights whenever "
            "they are loaded: merge it first, or move it elsewhere"
        )


def copies(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors that are stored a second time, under the name of a head that ``config.json`` ties to the embeddings.

    A head of other values is refused: transformers then does not tie it, other readers do.
    """
    there, files, config = checkpoint.tensors, checkpoint.files, _config(checkpoint.folder)
    # the class is asked only where it must be: those of the families that are known tie nothing unless they are told to
    tied = config.get("tie_word_embeddings", config.get("model_type") not in _LINEAR)
    if tied is False or not any(name.endswith(_HEADS) for name in there):
        return frozenset()
    from unlearn.model.load import architecture_of
    from unlearn.vector.interop import same_values

    layout = architecture_of(checkpoint.folder)
    stored = {layout.canonical(name): name for name in there}
    found = {stored[two]: stored[one] for two, one in layout.tied.items() if two in stored and one in stored}
    for second, first in found.items():
        with safe_open(files[there[second].file], framework="pt") as file:
            if not same_values(file.get_slice(second), files[there[first].file], first):
                raise ModelError(
                    f"{checkpoint.folder}: its config.json ties {second} to {first}, and both are stored, with other "
                    "values: set tie_word_embeddings to false there if the stored head is meant, as transformers does"
                )
    return frozenset(found)


def _config(folder: Path) -> Mapping[str, Any]:
    """Of a configuration that cannot be read nothing; reading it for good says that better."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


# -- the arithmetic


def _write(source: Path, to: Path, targets: Iterable[Target], coefficient: float, chance: int | None) -> dict[str, Any]:
    """Write one file with its tensors edited; what is to be recorded of it."""
    origin = source.stat()
    survived: dict[str, list[Survival]] = {}
    with source.open("rb", buffering=0) as old, _new_file(to) as write:
        pieces, place = list[_Piece](), 0
        for target in targets:
            pieces += _copied(old, place, target.stored.begin)
            pieces += _edited(old, target, coefficient, chance, survived.setdefault(target.module, []))
            place = target.stored.end
        pieces += _copied(old, place, origin.st_size)
        for data in _done_ahead(pieces, chance):
            write(data)
    if _state(source.stat()) != _state(origin):
        raise ModelError(f"{source}: it was changed while it was read: run the same command again")
    sums = {module: astuple(Survival.total(survived[module])) for module in sorted(survived)}
    return {"made": _state(to.stat())[:3], "base": _state(origin), "survived": sums}


def _copied(file: FileIO, begin: int, end: int) -> list[_Piece]:
    """Bytes of a file as they are."""
    return [partial(_read, file, place, min(_CHUNK, end - place)) for place in range(begin, end, _CHUNK)]


def _edited(
    file: FileIO, target: Target, coefficient: float, chance: int | None, measured: list[Survival] | None = None
) -> list[_Piece]:
    """The rows of an edited tensor as stored, block by block."""
    stored, transposed = target.stored, target.transposed
    dtype, columns = _DTYPES[stored.format], stored.shape[1]
    width = columns * dtype.itemsize
    by_chance = chance is not None and dtype != torch.float32
    generator = generator_for(chance or 0, f"{target.module}.weight") if by_chance else None
    whole = math.prod(stored.shape) <= _MEASURED_WHOLE

    def edit(number: int, first: int, end: int) -> memoryview:
        raw = _read(file, stored.begin + first * width, (end - first) * width)
        before = torch.frombuffer(raw, dtype=dtype).view(-1, columns)
        part, exact = rows_of(target.change, first, end, transposed), before.to(torch.float32, copy=True)
        edited(exact, part, -coefficient, transposed, out=exact)
        after = round_stochastically(exact, dtype, generator) if generator else exact.to(dtype)
        if not bool(torch.isfinite(torch.stack(torch.aminmax(exact)).to(dtype)).all()):
            raise VectorError(
                f"{target.module}: with coefficient {coefficient!r} its weights are nothing that {stored.format} can "
                "hold (or they are not finite before): take a smaller one"
            )
        step = 1 if whole else 0 if number % _EVERY_BLOCK else _EVERY_ROW
        if measured is not None and step:
            delta = part.delta().T if transposed else part.delta()
            measured.append(Survival.of(after[::step], before[::step], -coefficient * delta[::step]))
        return after.reshape(-1).view(torch.uint8).numpy().data

    return [partial(edit, number, *rows) for number, rows in enumerate(row_blocks(*stored.shape))]


def _done_ahead(pieces: Iterable[_Piece], chance: int | None) -> Iterator[bytearray | memoryview]:
    """What the pieces come to, in order, while some threads are at the next ones."""
    workers = cores() if chance is None else 1  # one generator draws for one block after the other
    waiting: deque[Future[bytearray | memoryview]] = deque()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for piece in pieces:
            waiting.append(pool.submit(piece))
            if len(waiting) > _AHEAD:  # more would only fill the memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _differing(
    one: FileIO,
    two: FileIO,
    mine: Stored,
    theirs: Stored,
    target: Target | None,
    coefficient: float,
    chance: int | None,
) -> int:
    """How many elements of a tensor are not what they should be, bit by bit."""
    differ, place = 0, theirs.begin
    pieces = _edited(one, target, coefficient, chance) if target else _copied(one, mine.begin, mine.end)
    for data in _done_ahead(pieces, chance):
        wanted, found = (np.frombuffer(part, np.uint8) for part in (data, _read(two, place, len(data))))
        place += len(data)
        if not np.array_equal(wanted, found):
            width = (mine.end - mine.begin) // math.prod(mine.shape)
            differ += int((wanted.reshape(-1, width) != found.reshape(-1, width)).any(1).sum())
    return differ


def _read(file: FileIO, begin: int, size: int) -> bytearray:
    """Some bytes of a file; those that come soon after them begin to be read from the disk."""
    raw = bytearray(size)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), begin + _NEXT, size, os.POSIX_FADV_WILLNEED)
    if os.preadv(file.fileno(), [raw], begin) < size:
        raise ModelError(f"{file.name}: it was cut off while it was read")
    return raw


@contextmanager
def _new_file(place: Path) -> Iterator[Callable[[bytearray | memoryview], None]]:
    """Gives what writes to a new file: past the page cache where the system can, in half the time that it takes
    through it, which asks for large pieces that begin at a page of memory and of the file."""
    with place.open("xb", buffering=0) as file:
        used, flags, buffer = 0, fcntl(file, F_GETFL), memoryview(mmap(-1, _CHUNK))

        def put(data: memoryview) -> None:
            while data:
                try:
                    data = data[file.write(data) :]
                except OSError as e:
                    if e.errno != errno.EINVAL or fcntl(file, F_GETFL) == flags:
                        raise
                    fcntl(file, F_SETFL, flags)  # not with these pieces, or the last one was cut off: as usual

        def write(data: bytearray | memoryview) -> None:
            nonlocal used
            left = memoryview(data)
            while left:
                count = min(_CHUNK - used, len(left))
                buffer[used : used + count] = left[:count]
                used, left = used + count, left[count:]
                if used == _CHUNK:
                    put(buffer)
                    used = 0

        with suppress(OSError):
            fcntl(file, F_SETFL, flags | getattr(os, "O_DIRECT", 0))
        yield write
        fcntl(file, F_SETFL, flags)
        put(buffer[:used])


# -- the folder


def _survived(files: Mapping[str, Any]) -> dict[str, Any]:
    """What rounding has left of the edit in the files that are finished."""
    return summary_of({n: Survival(*sums) for entry in files.values() for n, sums in entry["survived"].items()})


def _state(status: os.stat_result) -> list[int]:
    """By which a file is known again without reading it: size, time, number; device and time of its status, which
    nobody may set (copies and images may keep one time for all files)."""
    return [status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev, status.st_ctime_ns]


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
        _leftovers(place, _read_record(place))  # before a lock is left in somebody's folder
        lock = Lock.take(place / LOCK)
    try:
        with explained(place):
            record = _read_record(place)
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


def _read_record(place: Path) -> dict[str, Any]:
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
