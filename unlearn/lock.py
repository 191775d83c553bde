"""One process at a time: a lock file that names its holder, and is taken over when the holder is gone.

The file holds the holder's process id, host and start time, so that a killed run (SIGKILL, power cut) never blocks
the next one, and a process id that has been given to another program is not taken for the holder.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from unlearn.console import say
from unlearn.errors import RunFolderError

_fcntl: Any = import_module("fcntl") if os.name == "posix" else None
_PATIENCE = 2.0  # seconds for another process between creating its lock file and filling it


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. ``started`` tells two processes apart that had the same id one after the other."""

    pid: int
    host: str
    started: str
    since: str

    @classmethod
    def me(cls) -> Holder:
        """This process, from now on."""
        pid = os.getpid()
        return cls(pid, platform.node(), _start_of(pid) or "", datetime.now(UTC).isoformat(timespec="seconds"))

    def gone(self) -> bool:
        """True when the holder certainly runs no more; what happens on another host cannot be known from here."""
        return self.host == platform.node() and _start_of(self.pid) != self.started


@dataclass(frozen=True, slots=True)
class Lock:
    """A lock held by this process."""

    path: Path
    holder: Holder

    @classmethod
    def take(cls, path: Path) -> Lock:
        """Create the lock file, taking over that of a dead process.

        Raises:
            RunFolderError: somebody else is at work; the message names them.
            OSError: the file cannot be created.
        """
        me = Holder.me()
        patience = time.monotonic() + _PATIENCE
        with _alone(path.parent):
            while True:
                try:
                    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                except FileExistsError:
                    _make_way(path, patience)
                    continue
                with os.fdopen(fd, "w", encoding="utf-8") as f:
                    json.dump(asdict(me), f)
                    f.flush()
                    os.fsync(f.fileno())
                return cls(path, me)

    def release(self) -> None:
        """Remove the lock file if it is still this process's own; a forked child's call does nothing."""
        if os.getpid() == self.holder.pid and _read(self.path) == self.holder:
            self.path.unlink(missing_ok=True)


def _make_way(path: Path, patience: float) -> None:
    """Remove a lock whose holder is gone; wait a little for one that is being written; raise for a live one."""
    holder = _read(path)
    if holder is None:
        if time.monotonic() < patience:
            time.sleep(0.05)
            return
        # created and never filled: its maker was killed in between
    elif not holder.gone():
        raise RunFolderError(_taken(path, holder))
    else:
        say(f"{path.parent}: going on after process {holder.pid}, which has ended without finishing", style="yellow")
    path.unlink(missing_ok=True)


def _taken(path: Path, holder: Holder) -> str:
    if holder.host == platform.node():
        who = "this very process" if holder.pid == os.getpid() else f"process {holder.pid}"
        return f"{path.parent} is in use by {who} since {holder.since}: wait for it, stop it, or use another --out"
    return (
        f"{path.parent} is in use by process {holder.pid} on host {holder.host} since {holder.since}: "
        f"wait for it, or use another --out; if it is certain that it runs no more, delete {path}"
    )


def _read(path: Path) -> Holder | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Holder(int(data["pid"]), str(data["host"]), str(data["started"]), str(data["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep two processes from removing the same dead lock, the slower one then removing the faster one's new lock."""
    if _fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            _fcntl.flock(fd, _fcntl.LOCK_EX)
        except OSError as e:
            # a few network file systems know no flock; O_EXCL alone then leaves a window of microseconds
            say(f"{folder}: no file locks here ({e.strerror}); do not start two runs in it at the same moment")
        yield
    finally:
        os.close(fd)


def _start_of(pid: int) -> str | None:
    """When a process started, in whatever form this system tells; None when there is no such (live) process."""
    if not Path("/proc/self").is_dir():
        return _start_by_psutil(pid)
    try:
        # the name in parentheses may hold anything; after it: state is field 3, start time field 22
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # some sandboxes hide it; a reboot within the same clock tick is then not noticed
        boot = ""
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _start_by_psutil(pid: int) -> str | None:
    psutil = import_module("psutil")  # comes with accelerate
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
