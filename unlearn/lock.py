"""One process at a time, on whatever hosts: a lock that names its holder and is taken over when the holder is gone.

A holder gives a sign of life from a thread of its own. Whether it is gone is told by its process id where that means
something (:mod:`unlearn.holder`), at once; elsewhere by silence: no sign of life for the timeout, measured by the
watcher's own clock while it really looks, so that neither clocks that differ, nor clocks that jump, nor a file system
that hangs for minutes make a living holder a dead one. ``UNLEARN_LOCK_TIMEOUT`` sets it, in seconds; a holder writes
its own into the lock, and the longer of the two counts.

A process that was stopped for longer than that finds its lock taken over when it wakes: :meth:`Lock.check` says so, and
is asked before anything is put in place. What a taker-over cannot know is that a process sleeps right between that
question and the rename after it; no lock of files can.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from unlearn.errors import RunFolderError
from unlearn.holder import Holder
from unlearn.lock_file import Link, after, chain_of, create, guarded, look_anew, read, remove, strays, touch
from unlearn.lock_watch import BEATS, Watch, named, seconds_of_silence

__all__ = ["Holder", "Lock", "LockState"]

LockState = Literal["free", "held", "unknown"]


@dataclass(slots=True)
class _Pulse:
    """What the thread that gives signs of life and its lock share."""

    stop: threading.Event = field(default_factory=threading.Event)
    lost: threading.Event = field(default_factory=threading.Event)
    at_work: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True, eq=False)
class Lock:
    """A lock held by this process, until :meth:`release` or the end of a ``with``.

    ``nonces`` are those of its chain (:mod:`unlearn.lock_file`), its own last.
    """

    path: Path
    holder: Holder
    what: str
    nonces: tuple[str, ...]
    timeout: float
    _pulse: _Pulse

    @classmethod
    def take(cls, path: Path, *, wait: float | None = 0.0, what: str | None = None) -> Lock:
        """Take a lock, taking it over from a dead holder.

        Args:
            path: The lock's file. Its folder must exist; the file's name with more behind it is the lock's, too.
            wait: Seconds to wait for a living holder; None: for ever. A holder that cannot be judged at once is
                watched for up to the timeout in any case.
            what: What the lock is for, as messages name it; its folder when not given.

        Raises:
            RunFolderError: somebody else is at work; the message names them.
            OSError: the file cannot be made, or the lock's files cannot be read.
        """
        timeout = seconds_of_silence()
        watch = Watch(path, what or str(path.parent), wait, timeout)
        while True:
            chain = chain_of(path)
            if (not chain or watch.over(chain[-1])) and (lock := cls._follow(path, chain, watch.what, timeout)):
                return lock

    @classmethod
    def attempt(cls, path: Path, what: str | None = None) -> Lock | None:
        """Take a lock that is free or whose holder is certainly dead, else None; never waits and says nothing.

        Raises:
            OSError: as for :meth:`take`.
        """
        chain = chain_of(path)
        if chain and chain[-1].verdict() != "gone":
            return None
        return cls._follow(path, chain, what or str(path.parent), seconds_of_silence())

    @staticmethod
    def alive(path: Path) -> LockState:
        """Whether somebody holds a lock, without waiting and without touching it; a minute late on NFS, at worst.

        ``unknown``: there is a holder of which nothing can be told from here at once (on another host), or the lock
        cannot be read.
        """
        try:
            chain = chain_of(path, anew=False)
        except (OSError, RunFolderError):
            return "unknown"
        if not chain or chain[-1].kind == "released":
            return "free"
        states: dict[str, LockState] = {"gone": "free", "there": "held", "unknown": "unknown"}
        return states[chain[-1].verdict()]

    @classmethod
    def _follow(cls, path: Path, chain: Sequence[Link], what: str, timeout: float) -> Lock | None:
        """Make the file that comes after ``chain``; None when somebody was faster."""
        me, nonce = Holder.me(), secrets.token_hex(16)
        nonces = (*(link.nonce for link in chain), nonce)
        place = after(path, nonces[-2]) if chain else path
        lock = cls(path, me, what, nonces, timeout, _Pulse())
        with guarded(path.parent):
            left = strays(path, chain)
            if not create(path, place, {**asdict(me), "nonce": nonce, "timeout": timeout}):
                return None
            held = False
            try:
                # unless the chain that it was to follow has been let go of meanwhile: then it belongs to nothing
                held = tuple(link.nonce for link in chain_of(path)) == nonces
            finally:
                if not held and (link := read(place)) is not None and link.nonce == nonce:
                    place.unlink(missing_ok=True)
            remove(p for p in left if held and p != place)
        if not held:
            return None
        try:
            threading.Thread(target=lock._live, name=f"lock {path.name}", daemon=True).start()
        except BaseException:
            lock.release()
            raise
        return lock

    def check(self) -> None:
        """Make sure that the lock is still this process's.

        Raises:
            RunFolderError: it is not, because this process was stopped for so long that it was taken for dead, or
                because the lock was removed or cannot be reached; a forked child has none.
        """
        if os.getpid() != self.holder.pid:
            raise RunFolderError(f"{self.what} belongs to process {self.holder.pid}, from which this one was forked")
        try:
            if not self._pulse.lost.is_set() and self._mine():
                return
        except OSError as e:
            raise RunFolderError(
                f"{self.what}: its lock {self.path} cannot be reached any more ({e.strerror}): is the disk still there?"
            ) from e
        self._pulse.lost.set()
        raise RunFolderError(
            f"{self.what} is not this process's any more: {self._robber()}. Nothing more is written there by this "
            "process; run the same command again to go on from what is finished"
        )

    def lost(self) -> bool:
        """True when :meth:`check` raises."""
        try:
            self.check()
        except RunFolderError:
            return True
        return False

    def release(self) -> None:
        """Let go of it, if it is still this process's; a forked child's call does nothing, nor does a second one."""
        if os.getpid() != self.holder.pid or self._pulse.stop.is_set():
            return
        self._pulse.stop.set()
        # a disk that is gone or read-only now: once this process has ended, its lock is a dead one's
        with self._pulse.at_work, suppress(OSError), guarded(self.path.parent):
            if not self._mine():
                return
            nonce = secrets.token_hex(16)
            parting = {**asdict(self.holder), "nonce": nonce, "timeout": self.timeout, "released": True}
            if create(self.path, after(self.path, self.nonces[-1]), parting):
                remove((self.path, *(after(self.path, n) for n in self.nonces)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def _own(self) -> Path:
        return after(self.path, self.nonces[-2]) if len(self.nonces) > 1 else self.path

    def _mine(self) -> bool:
        """Whether the chain still begins as it did, still has this process's file, and goes on nowhere."""
        look_anew(self.path.parent)
        first = read(self.path)
        if first is None or first.nonce != self.nonces[0]:
            return False
        own = first if len(self.nonces) == 1 else read(self._own())
        return own is not None and own.nonce == self.nonces[-1] and read(after(self.path, own.nonce)) is None

    def _robber(self) -> str:
        with suppress(OSError, RunFolderError):
            chain = chain_of(self.path)
            if chain and chain[-1].holder is not None and chain[-1].nonce != self.nonces[-1]:
                return (
                    f"it gave no sign of life for too long (was it stopped, or the file system out of reach?), and "
                    f"{named(chain[-1].holder)} has taken over since {chain[-1].holder.since}"
                )
        return f"its lock {self.path} has been taken over or removed"

    def _live(self) -> None:
        """Give signs of life until the lock is released or lost."""
        count = 0
        while not self._pulse.stop.wait(self.timeout / BEATS):
            with self._pulse.at_work:
                if self._pulse.stop.is_set():
                    return
                count += 1
                try:
                    if not self._mine() or not touch(self._own(), self.nonces[-1], count):
                        self._pulse.lost.set()
                        return
                except OSError:
                    continue  # out of reach for a while; whoever watches is told by silence
