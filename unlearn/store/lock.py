"""One process at a time in a folder, on whatever hosts: filelock's lease, and messages that name its holder.

The holder touches the lock's file from a thread. Its lock is taken over at once where its process is known to have
ended (same host and pid namespace), else after ``UNLEARN_LOCK_TIMEOUT`` seconds without a touch by the waiter's own
clock; time in which the waiter was stopped itself does not count. A holder that was suspended for longer than that
finds out by :meth:`Lock.check`, which is called before anything is put in place.
"""

from __future__ import annotations

import functools
import math
import os
import re
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from unlearn.console import say
from unlearn.errors import RunFolderError
from unlearn.store.files import unique

TIMEOUT = 90.0  # seconds
psutil: Any = import_module("psutil")  # comes with accelerate, without types
_SPEAK_AFTER, _SPEAK_EVERY, _PAUSE = 2.0, 60.0, 1.0  # seconds
# Seconds after which filelock itself would have taken over from a process that has ended, if it could: it keeps empty
# files, those of zombies, and all where the file system cannot exchange two names.
_SURELY = 3.0
_silent_hosts: set[str] = set()  # whose lock this process has taken over before: its other locks need less watching


class Lock:
    """A lock on a file, to be taken with :meth:`take` and held until :meth:`release` or the end of a ``with``."""

    def __init__(self, path: Path, what: str | None = None) -> None:
        self.path, self.what, self.pid = path, what or str(path.parent), os.getpid()
        self.lease = _lease(path, seconds_of_silence())

    @classmethod
    def take(cls, path: Path, *, wait: float | None = 0.0, what: str | None = None) -> Lock:
        """Take a lock, also from a process that has ended or fallen silent.

        Args:
            path: The lock's file, in a folder that exists; names that begin with the file's and a dot are the lock's.
            wait: Seconds to wait for a holder that is alive; None: for ever. One of which nothing is known from here
                is watched until it gives a sign of life or has been silent for the timeout.
            what: What the lock is for, in messages; its folder when not given.
        """
        lock = cls(path, what)
        began = changed = time.monotonic()
        speak_at, pause, alive, silent = began + _SPEAK_AFTER, 0.01, False, False
        sign, holder, owner = lock._sign(), lock._holder(), lock.lease.owner
        while not lock._attempt():
            now = time.monotonic()
            if (seen := lock._sign()) != sign:
                sign, changed, alive = seen, now, sign is not None and seen is not None
            holder, owner, process = lock._holder() or holder, lock.lease.owner, lock._process()
            alive = alive or process == "there"
            seconds = lock.lease.lease_duration
            if owner is None or process == "gone":
                enough = _SURELY
            else:  # of a host that was silent before, four touches that are missed; network disks show them late
                enough = seconds / 2 if owner.hostname in _silent_hosts else 1.2 * seconds
            if now - changed > enough + pause:
                lock._move_aside(owner)
                silent = owner is not None and process != "gone"
                continue
            if alive and wait is not None and now - began >= wait:
                by = f" by {holder}{lock._since()}" if holder else ""
                raise RunFolderError(f"{lock.what} is in use{by}: wait for it, stop it, or use another --out")
            if now >= speak_at:
                speak_at = now + _SPEAK_EVERY
                may = f"may be at work here; looking for a sign of life for {seconds:.3g} s"
                waiting = f"waiting for {holder}, at work{lock._since()}"
                say(f"{lock.what}: {waiting if alive else f'{holder} {may}'}")
            time.sleep(pause)
            if time.monotonic() - now > pause + seconds / 4:  # nothing was seen: that is no silence
                lock.lease, changed = _lease(path, seconds), time.monotonic()
            pause = min(1.5 * pause, _PAUSE, seconds / 16)
        passed = time.monotonic() - changed
        if holder and (silent or passed >= lock.lease.lease_duration):
            if owner is not None and owner.hostname != _this_host():
                _silent_hosts.add(owner.hostname)
            say(f"{lock.what}: going on after {holder}, which has given no sign of life for {passed:.0f} s", "yellow")
        elif holder and changed == began and pause == 0.01:
            say(f"{lock.what}: going on after {holder}, which has ended without finishing", "yellow")
        return lock

    @classmethod
    def attempt(cls, path: Path) -> Lock | None:
        """Take a lock that is free or whose holder's process has ended, else None; never waits."""
        lock = cls(path)
        return lock if lock._attempt() else None

    def check(self) -> None:
        """Raise where the lock is not this process's any more."""
        if os.getpid() != self.pid:
            raise RunFolderError(f"{self.what} belongs to process {self.pid}, from which this one was forked")
        owner = self.lease.owner
        if self.lease.compromise is None and owner is not None and owner.token == self.lease.token:
            return
        try:
            self.path.stat()
            why = f"it gave no sign of life for too long, and {self._holder()} has taken over"
        except FileNotFoundError:
            why = f"its lock {self.path} was removed"
        except OSError as e:
            raise RunFolderError(
                f"{self.what}: its lock {self.path} cannot be reached any more ({e.strerror}): is the disk still there?"
            ) from e
        raise RunFolderError(
            f"{self.what} is not this process's any more: {why}. Nothing more is written there by this process; run "
            "the same command again to go on from what is finished"
        )

    def lost(self) -> bool:
        """True when :meth:`check` raises."""
        try:
            self.check()
        except RunFolderError:
            return True
        return False

    def release(self) -> None:
        """Release it, if it is still this process's. Again, or from a forked child, it does nothing."""
        if os.getpid() == self.pid:
            with suppress(OSError):  # of a disk that is gone: the lock of a process that has ended is free
                self.lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def _attempt(self) -> bool:
        owner = self.lease.owner
        if owner and owner.lease_duration and owner.lease_duration != self.lease.lease_duration:
            self.lease = _lease(self.path, owner.lease_duration)  # filelock refuses to wait for less than was promised
        try:
            self.lease.acquire(blocking=False)
        except (Timeout, LeaseSettingsMismatch):  # the latter where another holder came in between
            return False
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(f"since={datetime.now(UTC).isoformat(timespec='seconds')}\n")  # for messages alone
        return True

    def _sign(self) -> tuple[int, int] | None:
        """What changes with every sign of life."""
        try:
            stat = os.lstat(self.path)
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _process(self) -> Literal["there", "gone", "unknown"]:
        owner = self.lease.owner
        if owner is None or owner.hostname != _this_host():
            return "unknown"
        return "there" if started(owner.pid) else "gone"

    def _holder(self) -> str:
        """The holder as messages name it; empty where the file does not tell."""
        owner = self.lease.owner
        if owner is None:
            return ""
        if owner.hostname != _this_host():
            return f"process {owner.pid} on host {owner.hostname.partition('?')[0]}"
        return "this very process" if owner.pid == os.getpid() else f"process {owner.pid}"

    def _since(self) -> str:
        with suppress(OSError):
            if found := re.search(r"^since=([\w:+-]+)$", self.path.read_text("utf-8", "replace"), re.MULTILINE):
                return f" since {found[1]}"
        return ""

    def _move_aside(self, judged: Any) -> None:
        """Take a dead holder's file away, and put back what another process has put in its place meanwhile."""
        aside = self.path.with_name(f"{self.path.name}.{unique()}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
            moved = SoftFileLease(aside).owner
            if moved and (judged is None or moved.token != judged.token):
                with suppress(OSError):
                    self.path.hardlink_to(aside)
            aside.unlink()


def started(pid: int) -> str:
    """When a process of this host started; empty when there is none."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time()}"
    except psutil.Error:
        return ""


def _lease(path: Path, seconds: float) -> SoftFileLease:
    return SoftFileLease(path, lease_duration=seconds, heartbeat_interval=seconds / 8, thread_local=False)


@functools.cache
def _this_host() -> str:
    """What filelock calls this host and its pid namespace; empty where it cannot tell, and holders are watched."""
    with suppress(OSError), tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "lock") as lease:
        return lease.owner.hostname if lease.owner else ""
    return ""


def is_lock_file(name: str, lock: str) -> bool:
    """Whether a file's name is that of a lock or of something that belongs to it."""
    return name == lock or name.startswith(f"{lock}.")


def seconds_of_silence() -> float:
    """After how many seconds without a sign of life a holder on another host is taken for dead."""
    given = os.environ.get("UNLEARN_LOCK_TIMEOUT", "")
    try:
        seconds = float(given) if given.strip() else TIMEOUT
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 24 * 3600:
        raise RunFolderError(f"UNLEARN_LOCK_TIMEOUT is a number of seconds up to a day ({TIMEOUT:g}), not {given!r}")
    return seconds
