"""Which process somebody was: told apart over hosts, containers, reboots and process ids that are given out again."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Literal

Verdict = Literal["gone", "there", "unknown"]
_HIDDEN = "?"  # in place of a start time: the process is there, and this system tells no more about it
_UNTOLD = "-"  # in place of a boot or a namespace that this system does not tell


@dataclass(frozen=True, slots=True)
class Holder:
    """A process.

    ``started`` tells two processes apart that had the same id one after the other, or have it in two containers: on
    Linux it is the boot's id, the pid namespace and the start in clock ticks since boot, with blanks between.
    ``since`` is for people to read; hosts' clocks differ, and nothing is decided by it.
    """

    pid: int
    host: str
    started: str
    since: str

    @classmethod
    def me(cls) -> Holder:
        """This process, from now on."""
        pid = os.getpid()
        return cls(pid, platform.node(), started(pid), datetime.now(UTC).isoformat(timespec="seconds"))

    def verdict(self) -> Verdict:
        """Whether it still runs, as far as that can be known from here at once.

        A process id means something only on its own host, since its boot, in its own pid namespace. Elsewhere, and
        where the system hides what would tell (the boot's id, other users' processes), the answer is ``unknown``.
        """
        if self.host != platform.node():
            return "unknown"
        parts = self.started.split()
        if len(parts) == 3 and (tuple(parts[:2]) != _place(os.getpid()) or _UNTOLD in parts):
            return "unknown"
        now = _start_of(self.pid)
        if now is None:
            return "gone"
        if now == _HIDDEN:
            return "unknown"
        if len(parts) == 2:  # as it was written before namespaces were
            return "there" if parts == [_place(os.getpid())[0], now] else "gone"
        return "there" if parts and parts[-1] == now else "gone"

    def gone(self) -> bool:
        """True when it certainly runs no more."""
        return self.verdict() == "gone"


def started(pid: int) -> str:
    """:attr:`Holder.started` of a process of this host and namespace; empty when there is none."""
    now = _start_of(pid)
    if now is None:
        return ""
    return " ".join((*_place(os.getpid()), now)) if _has_proc() else now


def this_boot() -> str:
    """What is the same for all processes of this host until it starts anew; the host's name where that is not told."""
    boot = _place(os.getpid())[0]
    return platform.node() if boot == _UNTOLD else boot


@lru_cache(maxsize=1)
def _place(pid: int) -> tuple[str, str]:
    """The boot's id and the pid namespace of this process (``pid``: a forked child may be in another one)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:  # some sandboxes hide it
        boot = ""
    try:
        namespace = f"{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        namespace = ""
    return boot or _UNTOLD, namespace or _UNTOLD


def _has_proc() -> bool:
    return Path("/proc/self/stat").is_file()


def _start_of(pid: int) -> str | None:
    """When a process started, in whatever form this system tells; None when there is no such (live) process."""
    if not _has_proc():
        return _start_by_psutil(pid)
    try:
        # the name in parentheses may hold anything; after it: state is field 3, start time field 22
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _HIDDEN if _answers(pid) else None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _answers(pid: int) -> bool:
    """Clusters often hide other users' processes (hidepid), which are not dead for that."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _start_by_psutil(pid: int) -> str | None:
    psutil = import_module("psutil")  # comes with accelerate
    try:
        return str(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
