"""Finished stages that many runs share, by content: ``pool/<key>/``, the stage as it stands in a run folder.

The key of a stage says everything its content depends on (:meth:`unlearn.stages.Stages.key`), so any run that needs it
may take it. Whoever comes first makes it; the others wait for that one, on whatever machine it is. Files are hard
links where the file system has them: a thousand runs then hold one copy of a taught model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unlearn.atomic import explained, sync, unique
from unlearn.collective import anyone
from unlearn.console import is_main_process, say
from unlearn.errors import RunFolderError
from unlearn.lock import Lock
from unlearn.stage import damage_of, read_record

_LOCKS, _TEMPORARY = ".locks", ".part-"
_TURN = 300.0  # seconds of waiting at a time; well below what the others of a group wait for (unlearn.distributed)


@dataclass(frozen=True, slots=True)
class Pool:
    """The pool in a folder, which need not be there yet."""

    root: Path

    def find(self, key: str) -> Path | None:
        """The stage of this key if it is there, whole and undamaged (every byte is read)."""
        place = self.root / key
        record = read_record(place)
        if record is None or record.key != key:
            return None
        damage = damage_of(place, record, "sha256")
        if damage:
            say(f"{place}: {damage}; this stage is made again", style="yellow")
            return None
        return place

    @contextmanager
    def making(self, key: str) -> Iterator[Lock | None]:
        """Nobody else makes the stage of this key meanwhile; waits for whoever does. Gives the main process the lock.

        Raises:
            RunFolderError: the pool cannot be written.
        """
        lock = None
        while not anyone(lock is not None):  # so that the others hear of the main process while it waits
            lock = self._turn(self.root / _LOCKS / f"{key}.lock") if is_main_process() else None
        try:
            yield lock
        finally:
            if lock is not None:
                lock.release()

    def _turn(self, path: Path) -> Lock | None:
        """A lock; None if another has it for a while yet."""
        with explained(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                return Lock.take(path, wait=_TURN)
            except RunFolderError:
                if Lock.alive(path) == "free":  # that is not the reason
                    raise
                return None

    def put(self, key: str, stage: Path, lock: Lock) -> None:
        """Share a finished stage; a damaged one of this key is replaced.

        Args:
            lock: What :meth:`making` gave, so that nobody who was taken for dead replaces anything.

        Raises:
            RunFolderError: the pool cannot be written, or is full, or the lock was lost.
        """
        place, beside = self.root / key, f"{_TEMPORARY}{key}."
        temporary = self.root / f"{beside}{unique()}"
        with explained(self.root):
            try:
                link_tree(stage, temporary)
                lock.check()
                if place.exists():
                    place.rename(self.root / f"{beside}{unique()}")
                temporary.rename(place)
                sync(self.root)
            finally:
                # what was replaced, and what others of this key were killed over: the lock is ours
                for left in self.root.glob(f"{beside}*"):
                    shutil.rmtree(left, ignore_errors=True)


def link_tree(source: Path, to: Path, leave_out: frozenset[str] = frozenset()) -> None:
    """A second name for every file of a folder, or a copy where the file system has no hard links.

    Stages are never written in place, so that one name cannot change what is under the other.

    Raises:
        OSError: it cannot be written, or is full.
    """
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.rglob("*")):
        target = to / path.relative_to(source)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.relative_to(source).as_posix() not in leave_out:
            try:
                target.hardlink_to(path)
            except OSError:
                shutil.copy2(path, target)
