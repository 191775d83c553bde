"""Finished work on disk: sealed stages, the folder of a run that holds them, and the pool that runs share."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from unlearn.console import is_main_process, say
from unlearn.errors import RunFolderError, UnlearnError
from unlearn.processes import anyone, told, wait
from unlearn.store.cache import sha256, verify_always
from unlearn.store.files import (
    explained,
    fingerprint,
    refused,
    some,
    sync,
    unique,
    unwritable,
    write_json_atomic,
    write_text_atomic,
)
from unlearn.store.lock import Lock, is_lock_file
from unlearn.store.provenance import tidy

STAGE_FILE, STAGE_SCHEMA = "stage.json", 1
LOCK, TEMPORARY, WORK = ".unlearn-lock", ".unlearn-tmp", ".unlearn-work"
_SMALL = 64 * 2**20  # bytes; below this a hash costs nothing worth saving
TRACKERS = "trackers"  # what trackers write that keep files
_FILES = frozenset({"recipe.yaml", "resolved.yaml", "provenance.json", "report.json", "report.html"})
_HALF_WRITTEN = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")
_POOL_LOCKS, _POOL_TEMPORARY = ".locks", ".part-"
_TURN = 300.0  # seconds of waiting at a time; well below what the others of a group wait for (unlearn.processes)


# -- the seal on a finished stage: what it was made from, and every file's size and SHA-256


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What ``stage.json`` says: the key, the seconds the stage took, and per file (relative) its bytes and SHA-256."""

    key: str
    seconds: float
    files: Mapping[str, tuple[int, str]]


def seal(folder: Path, key: str, seconds: float) -> None:
    """Bring all files to disk, then write ``stage.json``."""
    files = {}
    for path in sorted(folder.rglob("*")):
        sync(path)
        if path.is_file() and path != folder / STAGE_FILE:
            files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    record = {"schema": STAGE_SCHEMA, "key": key, "seconds": round(seconds, 3), "files": files}
    write_json_atomic(folder / STAGE_FILE, {**record, "seal": fingerprint(record)})


def read_record(place: Path) -> StageRecord | None:
    """The seal of a stage's folder; None when it is missing, damaged or of another schema."""
    try:
        data = json.loads((place / STAGE_FILE).read_text(encoding="utf-8"))
        wanted = data.pop("seal", None)  # those of earlier versions have none
        if data["schema"] != STAGE_SCHEMA or wanted not in (None, fingerprint(data)):
            return None
        files = {str(n): (int(f["bytes"]), str(f["sha256"])) for n, f in data["files"].items()}
        return StageRecord(str(data["key"]), float(data["seconds"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def damage_of(place: Path, record: StageRecord, verify: Literal["sha256", "size"]) -> str | None:
    """What is wrong with a stage's files, or None. Files that are not of the stage do not matter here.

    ``sha256`` reads every file; ``size`` trusts the size of files of 64 MiB and more, unless ``UNLEARN_VERIFY`` is
    ``full``.
    """
    by_size = verify == "size" and not verify_always()
    for name, (size, digest) in record.files.items():
        path = place / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if (size < _SMALL or not by_size) and sha256(path) != digest:
            return f"the content of {name} has changed (SHA-256 differs)"
    return None


def _whole(place: Path, key: str, verify: Literal["sha256", "size"] = "sha256") -> Path | None:
    """A stage's folder, if it was completed under ``key`` and is undamaged; damage is said."""
    record = read_record(place)
    if not place.is_dir() or (record is not None and record.key != key):
        return None
    damage = "its stage.json is missing or unreadable" if record is None else damage_of(place, record, verify)
    if damage:
        say(f"{place}: {damage}; this stage is made again", style="yellow")
    return None if damage else place


def strangers_in(place: Path, root: Path | None = None) -> list[str]:
    """Files in a stage that its seal does not list. With a damaged seal none can be told apart, so none are named."""
    record = read_record(place)
    files = [p for p in place.rglob("*") if p.is_symlink() or not p.is_dir()] if record is not None else []
    ours = {place / STAGE_FILE, *(place / name for name in (record.files if record is not None else ()))}
    return [str(p.relative_to(root or place)) for p in files if p not in ours]


def _take(found: Path, to: Path, names: Iterable[str], link: bool) -> None:
    """Bring sealed files of a stage into another folder: as second names (where the file system has them), or copied.

    Stages are never written in place, so that one name cannot change what is under the other.
    """
    for name in names:
        source, target = found / name, to / name
        if not source.resolve().is_relative_to(found.resolve()) or source.is_symlink() or ".." in Path(name).parts:
            raise RunFolderError(f"{found} is no stage that a run made: {some([name])} leads out of it")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            if link:
                target.hardlink_to(source)
                continue
        except OSError:
            pass
        shutil.copyfile(source, target)


# -- whose a folder is


def _passing(name: str) -> bool:
    """Files beside a run's own that come and go: of its lock, and half written."""
    return is_lock_file(name, LOCK) or _HALF_WRITTEN.fullmatch(name) is not None


def _made(names: Iterable[str]) -> bool:
    """Whether a run's folder has more in it than a run leaves that a mistake ended before it had made anything."""
    return any(name not in ("recipe.yaml", "resolved.yaml", TEMPORARY) and not _passing(name) for name in names)


def _require_own(place: Path) -> None:
    """A place may be used if it is new, empty, a run's folder without links, or what a kill left of one."""
    if not place.exists() and not place.is_symlink():
        return
    if not place.is_dir():
        raise RunFolderError(f"{place} is not a folder: choose another --out")
    names = {p.name for p in place.iterdir()}  # looked at once: a run may be starting in it right now
    others = [name for name in names if name not in (TEMPORARY, WORK) and not _passing(name)]
    if others and "resolved.yaml" not in names:
        raise RunFolderError(
            f"{place} is not empty and not the folder of a run (it holds {some(sorted(others))}): choose another --out"
        )
    # a link that somebody put here would have the run write, or remove, elsewhere
    links: list[str] = []
    for folder, subfolders, files in os.walk(place):
        here = Path(folder)
        links += [str((here / n).relative_to(place)) for n in (*subfolders, *files) if (here / n).is_symlink()]
    if links:
        raise RunFolderError(
            f"{place} holds links, and a run makes none: {some(links)}. Remove them, or use another --out"
        )


def _clear(root: Path) -> None:
    """Remove what runs wrote here, or nothing where something else lies here too. Only for the holder of the lock."""
    stages = [Path(d) for d, _, names in os.walk(root) if STAGE_FILE in names]
    ours = {root / n for n in _FILES}
    strangers = []
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        if here in stages:
            strangers += strangers_in(here, root)
            subfolders[:] = []
            continue
        files = [here / n for n in (*names, *(s for s in subfolders if (here / s).is_symlink()))]
        if here == root:
            subfolders[:] = [s for s in subfolders if s not in (TEMPORARY, WORK, TRACKERS)]
            files = [p for p in files if p not in ours and not _passing(p.name)]
        elif here == root / "figures":
            files = [p for p in files if p.suffix not in (".pdf", ".png") and not _passing(p.name)]
        strangers += [str(p.relative_to(root)) for p in files]
    if strangers:
        raise RunFolderError(
            f"{root}: --fresh removes only what a run wrote, and these are not of a run: {some(sorted(strangers))}. "
            "Move them elsewhere, or use another --out"
        )
    # out of the way by renaming, which is atomic, and the file that makes this a run's folder last: after a kill in
    # the middle the folder is still one that may be used
    heap = root / TEMPORARY
    heap.mkdir(exist_ok=True)
    for child in sorted(root.iterdir(), key=lambda p: p.name == "resolved.yaml"):
        if child.name != TEMPORARY and not is_lock_file(child.name, LOCK):
            child.rename(heap / f"{child.name}.{unique()}")


# -- a run's folder


@dataclass(frozen=True, slots=True, eq=False)
class RunFolder:
    """One run's folder, held by this process until :meth:`close` (or the end of a ``with``)."""

    root: Path
    _lock: Lock | None

    @classmethod
    def open(
        cls, place: Path, resolved: str, text: str, require_same: Callable[[Path, str], None], fresh: bool = False
    ) -> RunFolder:
        """Make or reopen a run's folder and take its lock; processes other than the main one get the path at once.

        Args:
            resolved: The recipe with every default filled in, kept as ``resolved.yaml``.
            text: The recipe as the user wrote it.
            require_same: Raises where the ``resolved.yaml`` of a folder with anything made is of another recipe.
            fresh: Remove what an earlier run left here, of whatever recipe.
        """
        if not is_main_process():
            return cls(place, None)
        with explained(place):
            _require_own(place)
            place.mkdir(parents=True, exist_ok=True)
            folder = cls(place, Lock.take(place / LOCK))
            try:
                if fresh:
                    _clear(place)
                elif "resolved.yaml" in (names := {child.name for child in place.iterdir()}) and _made(names):
                    require_same(place, resolved)
                shutil.rmtree(place / TEMPORARY, ignore_errors=True)  # what a killed run left half written
                for child in (*place.iterdir(), *(place / "figures").glob("*")):
                    if _HALF_WRITTEN.fullmatch(child.name):
                        child.unlink()
                write_text_atomic(place / "resolved.yaml", resolved)
                write_text_atomic(place / "recipe.yaml", text)
            except BaseException:
                folder.close()
                raise
        return folder

    def check(self) -> None:
        """Raise where the folder was taken over: to be called before anything in it is replaced."""
        if self._lock is not None:
            self._lock.check()

    def close(self) -> None:
        """Give the lock back. Calling it again does nothing."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def path(self, name: str) -> Path:
        """Where a stage or file has its place, whether it is there or not."""
        if not _STAGE_NAME.fullmatch(name):
            raise ValueError(f"not a name inside a run folder: {name!r}")
        return self.root / name

    def finished(self, name: str, key: str, verify: Literal["sha256", "size"] = "sha256") -> Path | None:
        """The folder of a stage that was completed under ``key`` and is undamaged (:func:`damage_of`), else None."""
        with explained(self.root):  # a name may come from a damaged file
            return _whole(self.root / name, key, verify) if _STAGE_NAME.fullmatch(name) else None

    @contextmanager
    def writing(self, name: str, key: str) -> Iterator[Path]:
        """Make a stage: yields an empty folder that becomes the stage if the block ends without an exception.

        An older stage of that name is replaced at the end; the stage's :meth:`work` folder is then removed.
        """
        place = self.path(name)
        self.check()
        began = time.monotonic()
        with explained(place):
            if strangers := strangers_in(place):
                raise RunFolderError(
                    f"{place}: this stage has to be made again, but holds files that the run did not write "
                    f"({some(strangers)}). Move them elsewhere"
                )
            temporary = self._temporary(name)
            temporary.mkdir(parents=True)
        try:
            yield temporary
            with explained(place):
                if is_main_process():
                    seal(temporary, key, time.monotonic() - began)
                    self.check()
                    self._publish(temporary, place)
                    self._drop_work(name, keep=None)
        except BaseException as e:
            if isinstance(e, Exception):
                self.check()  # who takes the folder over removes what is half written in it, and that is then the cause
                if not isinstance(e, UnlearnError) and (said := unwritable(e, self.root)) is not None:
                    raise refused(said, place) from e
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def work(self, name: str, key: str) -> Path:
        """A scratch folder for a stage that survives a kill (checkpoints), and is removed with the stage's end.

        A folder of another key is removed first.
        """
        self.path(name)  # checks the name
        self.check()
        place = self.root / WORK / f"{_flat(name)}@{fingerprint(key)[:16]}"
        with explained(place):
            if is_main_process():
                self._drop_work(name, keep=place.name)
            place.mkdir(parents=True, exist_ok=True)
        return place

    def _temporary(self, name: str) -> Path:
        return self.root / TEMPORARY / f"{_flat(name)}.{unique()}"

    def _publish(self, temporary: Path, place: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        old = self._temporary(f"{place.name}.old")
        if place.exists():
            place.rename(old)
        try:
            temporary.rename(place)
        except BaseException:
            if old.exists():
                old.rename(place)
            raise
        sync(place.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _drop_work(self, name: str, keep: str | None) -> None:
        for child in (self.root / WORK).glob(f"{_flat(name)}@*"):
            if child.name != keep:
                # renamed first: a kill in the middle of removing must not leave half a checkpoint under its name
                gone = self._temporary(name)
                gone.parent.mkdir(parents=True, exist_ok=True)
                child.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)


def _flat(name: str) -> str:
    return name.replace("/", "+")  # no stage name has a plus


# -- finished stages that many runs share, by key


@dataclass(frozen=True, slots=True)
class Pool:
    """The pool in a folder, which need not be there yet."""

    root: Path

    def find(self, key: str) -> Path | None:
        """The stage of this key if it is there, whole and undamaged (every byte is read)."""
        return _whole(self.root / key, key)

    @contextmanager
    def making(self, key: str) -> Iterator[Lock | None]:
        """Nobody else makes the stage of this key meanwhile; waits for whoever does. The main process gets the lock."""
        lock = None
        while not anyone(lock is not None):  # so that the others hear of the main process while it waits
            lock = self._turn(self.root / _POOL_LOCKS / f"{key}.lock") if is_main_process() else None
        with lock if lock is not None else nullcontext():
            yield lock

    def _turn(self, path: Path) -> Lock | None:
        """A lock; None if another process still holds it."""
        with explained(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return Lock.take(path, wait=_TURN)
            except RunFolderError:
                return None

    def put(self, key: str, stage: Path, lock: Lock) -> None:
        """Share a finished stage; a damaged one of this key is replaced.

        ``lock`` is what :meth:`making` gave, so that nobody who was taken for dead replaces anything.
        """
        place, beside = self.root / key, f"{_POOL_TEMPORARY}{key}."
        temporary = self.root / f"{beside}{unique()}"
        with explained(self.root):
            try:
                record = read_record(stage)
                _take(stage, temporary, (STAGE_FILE, *(record.files if record is not None else ())), link=True)
                lock.check()
                if place.exists():
                    place.rename(self.root / f"{beside}{unique()}")
                temporary.rename(place)
                sync(self.root)
            finally:
                # what was replaced, and what others of this key were killed over: the lock is ours
                for rest in self.root.glob(f"{beside}*"):
                    shutil.rmtree(rest, ignore_errors=True)


# -- the stages of one run, found by key


class Store:
    """The stages of one run. Each is found by its key, in the run's own folder, in the pool, or in runs that the recipe
    names under ``reuse``; if nowhere, it is made.

    ``keys`` has the key of every stage that was asked for, ``seconds`` what each step took, also in an earlier run;
    ``base`` is the recipe's folder, where its relative paths begin.
    """

    def __init__(
        self,
        folder: RunFolder,
        versions: Sequence[Any] = (),
        base: Path = Path(),
        pool: Pool | None = None,
        reuse: Sequence[str] = (),
        steps: Sequence[str] = (),
    ) -> None:
        self.base = base
        self.keys: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._folder, self._versions, self._pool, self._reuse, self._steps = folder, list(versions), pool, reuse, steps

    def stage(
        self, name: str, inputs: Sequence[Any], make: Callable[[Path], object], *, kind: str = "", share: bool = False
    ) -> Path:
        """The folder of a finished stage, found by key, or made by ``make`` in an empty folder and sealed.

        Args:
            inputs: All that the stage depends on, beside the versions of libraries.
            make: Is called on every process, since training is collective; only the main one's files are kept.
            kind: Stands for the name in the key, where stages of several names may hold one thing.
            share: Put it into the pool, for other runs that would make the same.
        """
        key = self.keys[name] = self.key(kind or name, inputs)
        done = self._folder.finished(name, key)
        wait()  # nobody may look for a stage that another process is writing
        if done is not None:
            say(f"    {name}: as before", style="dim")
            return done
        pool = self._pool if share else None
        with pool.making(key) if pool is not None else nullcontext() as lock:
            wait()  # the main process has its turn: from here on the pool does not change under this key
            pooled = pool.find(key) if pool is not None else None
            found = pooled or self._twin(name, key) or self._elsewhere(key)
            with self._folder.writing(name, key) as tmp:
                if found is None:
                    make(tmp)
                elif is_main_process() and (record := read_record(found)) is not None:
                    _take(found, tmp, record.files, link=found == pooled)  # another run's folder is its owner's
            wait()
            if pool is not None and pooled is None and lock is not None:
                pool.put(key, self._folder.path(name), lock)
        if found is not None:
            say(f"    {name}: taken from {tidy(str(found))}", style="dim")
        return self._folder.path(name)

    def key(self, name: str, inputs: Sequence[Any]) -> str:
        """The key of a stage that depends on ``inputs``."""
        return fingerprint(self._versions, name, *inputs)

    def work(self, name: str) -> Path:
        """A scratch folder of a stage in the making: it survives a kill (checkpoints), and goes in the end."""
        return self._folder.work(name, self.keys[name])

    def path(self, name: str) -> Path:
        """Where a stage has its place."""
        return self._folder.path(name)

    def read(self, name: str, file: str) -> Any:
        """A JSON file of a finished stage."""
        return json.loads((self._folder.path(name) / file).read_text(encoding="utf-8"))

    @contextmanager
    def step(self, name: str, what: str, to_need_less: str) -> Iterator[None]:
        """Announce a step, and afterwards what it took, in this run or in the one that made its stages.

        ``to_need_less`` is what to do where memory is exhausted.
        """
        say(f"[{self._steps.index(name) + 1}/{len(self._steps)}] {name}: {what}", style="bold")
        before, started = set(self.keys), time.monotonic()
        with told(name, to_need_less):
            yield
        took = time.monotonic() - started
        say(f"    {took:.1f} s", style="dim")
        records = [read_record(self._folder.path(n)) for n in set(self.keys) - before]
        self.seconds[name] = round(max(took, sum(r.seconds for r in records if r is not None)), 2)

    def _twin(self, name: str, key: str) -> Path | None:
        """The same stage under another name in this run."""
        other = next((self._folder.path(n) for n, k in self.keys.items() if k == key and n != name), None)
        return other if other is not None and read_record(other) is not None else None

    def _elsewhere(self, key: str) -> Path | None:
        """A whole and undamaged stage of this key in one of the run folders that the recipe lets us take from."""
        for given in self._reuse:
            root = self.base / given
            if not root.is_dir():
                raise RunFolderError(f"reuse: there is no run folder {root}; remove it from the recipe")
            for found in sorted(root.rglob(STAGE_FILE)):
                record = read_record(found.parent)
                if record is not None and record.key == key and not damage_of(found.parent, record, "sha256"):
                    return found.parent
        return None
