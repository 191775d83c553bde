"""A run's folder: stages that are whole or absent, one writer at a time, nothing of anyone else's ever removed.

A stage is written beside its place, sealed with ``stage.json`` (the key of everything it depends on, and size and
SHA-256 of every file), and renamed in when whole. So a kill at any moment leaves either the finished stage or none,
and existence alone is never taken for completeness. Under ``accelerate launch`` only the main process locks, clears
and publishes; what the others write is thrown away.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from unlearn.atomic import (
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
from unlearn.console import is_main_process, say
from unlearn.errors import RunFolderError, UnlearnError
from unlearn.lock import Lock
from unlearn.ownership import (
    LOCK,
    TEMPORARY,
    WORK,
    clear,
    refuse_links,
    refuse_strangers,
    remove_leftovers,
    require_same_recipe,
)
from unlearn.recipe import Recipe
from unlearn.recipe_io import resolved_yaml
from unlearn.stage import StageRecord, damage_of, read_record, seal, strangers_in

__all__ = ["RunFolder", "StageRecord", "fingerprint", "write_json_atomic", "write_text_atomic"]

_STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True, slots=True, eq=False)
class RunFolder:
    """One run's folder, held by this process until :meth:`close` (or the end of a ``with``)."""

    root: Path
    _lock: Lock | None

    @classmethod
    def open(
        cls, root: Path | None, recipe: Recipe, text: str, fresh: bool = False, base: Path = Path("runs")
    ) -> RunFolder:
        """Make or reopen the folder of a recipe and take its lock.

        Processes other than the main one get the path at once and no lock; let them wait for the main one (a
        barrier) before they look for finished stages.

        Args:
            root: The folder itself (``--out``); None for ``base/<recipe name>-<first 8 hex of its fingerprint>``.
            recipe: With every default filled in; decides whether an existing folder is this run's.
            text: The recipe as the user wrote it.
            fresh: Remove what an earlier run left here, of whatever recipe.
            base: Where folders without a name of their own go.

        Raises:
            RunFolderError: another recipe's folder, a folder that is no run folder, a link in it, foreign files under
                ``fresh``, another process at work here, or a place that cannot be written.
        """
        what = recipe.model_dump(mode="json", exclude={"cluster"})  # what a batch system gives is no part of a run
        place = root if root is not None else base / f"{recipe.name}-{fingerprint(what)[:8]}"
        if not is_main_process():
            return cls(place, None)
        with explained(place):
            refuse_strangers(place)
            refuse_links(place)
            place.mkdir(parents=True, exist_ok=True)
            folder = cls(place, Lock.take(place / LOCK))
            try:
                folder._prepare(resolved_yaml(recipe), text, fresh)
            except BaseException:
                folder.close()
                raise
        return folder

    def check(self) -> None:
        """Make sure that the folder is still this process's: to be asked before anything in it is replaced.

        Raises:
            RunFolderError: this process was stopped for so long that another one has taken the folder over.
        """
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

    def record(self, name: str) -> StageRecord | None:
        """What a stage's seal says, unverified; None when there is no readable one."""
        return read_record(self.path(name))

    def finished(self, name: str, key: str, verify: Literal["sha256", "size"] = "sha256") -> Path | None:
        """The folder of a stage that was completed under ``key`` and is undamaged, else None.

        Args:
            verify: ``size`` trusts the size of files of 64 MiB and more instead of reading them.
        """
        place = self.path(name)
        if not place.is_dir():
            return None
        record = read_record(place)
        if record is not None and record.key != key:
            return None
        with explained(place):
            damage = "its stage.json is missing or unreadable" if record is None else damage_of(place, record, verify)
        if damage:
            say(f"{place}: {damage}; this stage is made again", style="yellow")
            return None
        return place

    @contextmanager
    def writing(self, name: str, key: str) -> Iterator[Path]:
        """Make a stage: yields an empty folder that becomes the stage if the block ends without an exception.

        An older stage of that name is replaced at the end; the stage's :meth:`work` folder is then removed.

        Raises:
            RunFolderError: the disk is full, the place cannot be written, files of someone else lie in the stage, or
                the folder is another process's by now (:meth:`check`).
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

        A folder left under another key is removed first.

        Raises:
            RunFolderError: it cannot be made, or the folder is another process's by now (:meth:`check`).
        """
        self.path(name)  # checks the name
        self.check()
        place = self.root / WORK / f"{_flat(name)}@{fingerprint(key)[:16]}"
        with explained(place):
            if is_main_process():
                self._drop_work(name, keep=place.name)
            place.mkdir(parents=True, exist_ok=True)
        return place

    def _prepare(self, resolved: str, text: str, fresh: bool) -> None:
        if fresh:
            clear(self.root)
        elif (self.root / "resolved.yaml").exists():
            require_same_recipe(self.root, resolved)
        remove_leftovers(self.root)
        write_text_atomic(self.root / "resolved.yaml", resolved)
        write_text_atomic(self.root / "recipe.yaml", text)

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
