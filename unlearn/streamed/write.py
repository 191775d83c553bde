"""theta - coefficient * tau for a checkpoint of any size, file by file from disk to disk.

Every weight gets the bits that :func:`unlearn.export.export_merged` gives it in memory; everything else is copied
byte for byte. Files, their names and their layout stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from unlearn.atomic import sync
from unlearn.console import progress, say
from unlearn.errors import ModelError, VectorError
from unlearn.lock import Lock
from unlearn.streamed.blocks import Editor, Work, parts_equal_whole
from unlearn.streamed.files import Others, copy_file, new_file, others_of, require_space, written
from unlearn.streamed.folder import Edit, Finished, Journal, Origin, keep_journal, opened, seal
from unlearn.streamed.layout import Checkpoint, Shard, read_checkpoint
from unlearn.streamed.names import copies, targets_of
from unlearn.streamed.shard import Engine
from unlearn.survival import Survival, lost, summary_of
from unlearn.vector import TaskVector

_SMALLEST_TRIAL = 256 * 2**20  # bytes that trying out the arithmetic may always take
_MB = 10**6
_WAYS_OUT = (
    "Give the model in float32, round with --stochastic-rounding (to another folder), or put the vector on as an "
    "adapter, which is exact; --accept-rounding writes them all the same"
)


@dataclass(frozen=True, slots=True)
class Applied:
    """What was done.

    Attributes:
        edited: Tensors that were edited.
        copied: Tensors that were copied.
        size: Bytes of all files of weights.
        kept: Files of weights that an earlier attempt had finished.
        left_out: Files that are not in the output, with the reason.
        survived: As :func:`unlearn.survival.summary_of`; of large weights a part of the rows is measured.
    """

    edited: int
    copied: int
    size: int
    kept: int
    left_out: tuple[str, ...]
    survived: Mapping[str, Any]


def works_of(checkpoint: Checkpoint, vector: TaskVector) -> dict[str, Work]:
    """Stored name -> what is to be done to it.

    Raises:
        VectorError, ModelError: the vector does not fit, see :func:`unlearn.streamed.names.targets_of`.
    """
    targets = targets_of(checkpoint, {name: change.shape for name, change in vector.modules.items()})
    return {t.stored.name: Work(t, vector.modules[t.module]) for t in targets}


def write_edited(
    vector: TaskVector,
    model: Path,
    coefficient: float,
    out: Path,
    stochastic: bool = False,
    seed: int = 0,
    accept_rounding: bool = False,
) -> Applied:
    """Write ``theta - coefficient * tau`` to ``out``, or go on where an earlier attempt was cut off.

    Args:
        model: A folder with safetensors.
        stochastic: Round edited weights to 16 bits by chance instead of to nearest, by ``seed``.
        accept_rounding: Go on also where rounding to nearest has made another edit of it.

    Raises:
        ModelError: the checkpoint is damaged, quantised, or none.
        VectorError: the vector does not fit it, the result is not finite, or too little of the edit survived rounding.
        RunFolderError: the output's folder is not for it, is full, or cannot be written.
    """
    checkpoint = read_checkpoint(model)
    others = others_of(checkpoint)
    works = works_of(checkpoint, vector)
    copies(checkpoint)
    edit = Edit(vector.digest(), coefficient, f"stochastically, seed {seed}" if stochastic else "to nearest")
    names = [*(shard.name for shard in checkpoint.shards), *others.copied]
    editor = Editor(coefficient, seed if stochastic else None)
    with (
        opened(out, checkpoint.folder, edit, names) as (lock, journal),
        one_way(works, coefficient, checkpoint) as whole,
    ):
        writing = _Writing(out.resolve(), lock, journal, Engine(editor, whole), works)
        kept = writing.look_over(checkpoint, others)
        writing.write_weights(checkpoint)
        # before the configuration, without which the folder is no model; with --accept-rounding it goes on from here
        if not (accept_rounding or stochastic) and (said := lost(writing.survived(), _WAYS_OUT)):
            raise VectorError(f"{out}: {said}")
        writing.copy(others)
        survived = writing.finish(_about(vector, checkpoint))
    tensors = len(checkpoint.tensors())
    return Applied(len(works), tensors - len(works), checkpoint.size, kept, others.left_out, survived)


@contextmanager
def one_way(works: Mapping[str, Work], coefficient: float, checkpoint: Checkpoint) -> Iterator[bool]:
    """Set torch up for the work and back again; gives whether tensors must be computed whole."""
    threads = torch.get_num_threads()
    most = max(_SMALLEST_TRIAL, max(shard.size for shard in checkpoint.shards))
    try:
        with torch.no_grad():
            yield not parts_equal_whole(list(works.values()), coefficient, most)
    finally:
        torch.set_num_threads(threads)


@dataclass
class _Writing:
    place: Path
    lock: Lock
    journal: Journal
    engine: Engine
    works: Mapping[str, Work]

    def look_over(self, checkpoint: Checkpoint, others: Others) -> int:
        """Forget finished files that are damaged or whose origin has changed; how many weights are kept.

        Raises:
            RunFolderError: what is missing would not fit on the disk.
        """
        origins = {s.name: s.path for s in checkpoint.shards} | dict(others.copied)
        there = sum(f.size for f in self.journal.files.values())
        if there:
            with progress("checking what is finished, MB", there // _MB) as advance:
                counted = in_megabytes(advance)
                for name, finished in self.journal.files.items():
                    why = self._damage(name, finished, origins[name], counted)
                    if why:
                        say(f"{name} is written anew: {why}", style="yellow")
                        with written(self.place):  # first: a file that the journal does not know is a stranger's
                            (self.place / name).unlink(missing_ok=True)
                        self.journal = self.journal.without(name)
        done = self.journal.files
        with written(self.place):
            require_space(self.place, sum(p.stat().st_size for n, p in origins.items() if n not in done))
            if not done or set(done) != set(origins):
                keep_journal(self.place, self.journal)
        return sum(shard.name in done for shard in checkpoint.shards)

    def _damage(self, name: str, finished: Finished, origin: Path, advance: Callable[[int], None]) -> str | None:
        path = self.place / name
        try:
            now = Origin.of(origin)
            if not finished.origin.alike(now):
                return "the model's file has changed"
            if path.stat().st_size != finished.size:
                return f"it has {path.stat().st_size} bytes instead of {finished.size}"
            if self.engine.digest(path, finished.size, advance) != finished.sha256:
                return "its content has changed (SHA-256 differs)"
            if not finished.origin.same_file(now):
                if self.engine.digest(origin, now.size, lambda n: None) != finished.origin.sha256:
                    return "the model's file is another one (SHA-256 differs)"
                known = replace(finished, origin=replace(now, sha256=finished.origin.sha256))
                self.journal = self.journal.with_file(name, known)
        except OSError as e:
            return (e.strerror or str(e)).lower()
        return None

    def write_weights(self, checkpoint: Checkpoint) -> None:
        """Write the files that are not finished, each whole before it gets its name.

        Raises:
            ModelError, RunFolderError: see :func:`write_edited`.
        """
        todo = [shard for shard in checkpoint.shards if shard.name not in self.journal.files]
        if not todo:
            return
        with progress("writing, MB", sum(shard.size for shard in todo) // _MB) as advance:
            counted = in_megabytes(advance)
            for shard in todo:
                self._write(shard, counted)

    def _write(self, shard: Shard, advance: Callable[[int], None]) -> None:
        place, editor = self.place / shard.name, self.engine.editor
        editor.parts.clear()
        with written(place), new_file(place) as temporary:
            origin = Origin.of(shard.path)
            done = self.engine.write(shard, self.works, temporary, advance)
            if not origin.alike(Origin.of(shard.path)):
                raise ModelError(f"{shard.path}: it was changed while it was read: run the same command again")
            survived = {
                name: (s.dot, s.intended, s.realised, s.changed, s.elements) for name, s in editor.survived().items()
            }
            finished = Finished(replace(origin, sha256=done.source), done.size, done.sha256, survived)
            self._put(temporary, place, finished)

    def _put(self, temporary: Path, place: Path, finished: Finished) -> None:
        self.lock.check()
        self.journal = self.journal.with_file(place.relative_to(self.place).as_posix(), finished)
        keep_journal(self.place, self.journal)  # first: a file under its name is always one that the journal knows
        temporary.replace(place)
        sync(place.parent)

    def copy(self, others: Others) -> None:
        """Copy what is not finished of the other files, configuration and index last.

        Raises:
            RunFolderError: they cannot be read or written.
        """
        for name, path in others.copied.items():
            if name in self.journal.files:
                continue
            place = self.place / name
            with written(place), new_file(place) as temporary:
                place.parent.mkdir(parents=True, exist_ok=True)
                origin = Origin.of(path)
                size, sha256 = copy_file(path, temporary)
                self._put(temporary, place, Finished(replace(origin, sha256=sha256), size, sha256, {}))

    def survived(self) -> Mapping[str, Any]:
        """What rounding has left of the edit in the files that are finished."""
        measured = {
            name: Survival(v[0], v[1], v[2], int(v[3]), int(v[4]))
            for finished in self.journal.files.values()
            for name, v in finished.survived.items()
        }
        return summary_of(measured)

    def finish(self, about: Mapping[str, Any]) -> Mapping[str, Any]:
        """Write the record; gives what survived."""
        survived = self.survived()
        with written(self.place):
            seal(self.place, replace(self.journal, about={**about, "survived": survived}))
        return survived


def _about(vector: TaskVector, checkpoint: Checkpoint) -> dict[str, Any]:
    """For people: no paths of this machine."""
    try:
        own = version("lm-unlearn")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "vector": {"modules": len(vector.modules), "rank": vector.rank(), "meta": dict(vector.meta)},
        "base": checkpoint.folder.name,
        "versions": {"lm-unlearn": own, "torch": torch.__version__},
    }


def in_megabytes(advance: Callable[[int], None]) -> Callable[[int], None]:
    """``advance``, which counts megabytes, to be told of bytes."""
    rest = 0

    def more(count: int) -> None:
        nonlocal rest
        rest += count
        whole, rest = divmod(rest, _MB)
        if whole:
            advance(whole)

    return more
