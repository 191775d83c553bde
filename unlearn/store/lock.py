"""One process at a time, on whatever hosts: a lock that names its holder and is taken over when the holder is gone.

A holder gives a sign of life from a thread of its own. Whether it is gone is told by its process id where that means
something (:mod:`unlearn.store.lock`), at once; elsewhere by silence: no sign of life for the timeout, measured by the
watcher's own clock while it really looks, so that neither clocks that differ, nor clocks that jump, nor a file system
that hangs for minutes make a living holder a dead one. ``UNLEARN_LOCK_TIMEOUT`` sets it, in seconds; a holder writes
its own into the lock, and the longer of the two counts.

A process that was stopped for longer than that finds its lock taken over when it wakes: :meth:`Lock.check` says so, and
is asked before anything is put in place. What a taker-over cannot know is that a process sleeps right between that
question and the rename after it; no lock of files can.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from unlearn.console import say
from unlearn.errors import RunFolderError

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


# -- the files of a lock, and all that is ever done to them


_fcntl: Any = import_module("fcntl") if os.name == "posix" else None
_NONCE = re.compile(r"[0-9a-f]{32}")
_NO_LINKS = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # whatever lies there, opening it does not hang
_LONGEST, _LONGEST_TIMEOUT = 2**16, 24 * 3600.0  # bytes, seconds: what a file may claim
_LIMIT = 1.0  # seconds to wait for others in the same few file operations, before going on without that guard


@dataclass(frozen=True, slots=True)
class Link:
    """One file of a chain.

    Attributes:
        nonce: Names it, and its successor's file; derived from the inode where the file cannot be read.
        holder: Who made it; None where the file cannot be read (its maker was killed, or is about to fill it).
        kind: ``old`` was written by a version of this program whose holders give no sign of life.
        timeout: Seconds without a sign of life after which its holder is taken for dead, as the holder saw it.
        sign: What changes with every sign of life: inode and time of modification, in whoever's clock.
        moved: The file is a copy of the one that its holder made, so that its holder may be at work elsewhere.
    """

    nonce: str
    holder: Holder | None
    kind: Literal["held", "released", "old", "unreadable"]
    timeout: float
    sign: tuple[int, int]
    moved: bool

    def verdict(self) -> Verdict:
        """Whether its holder runs: what can be known at once."""
        if self.holder is None:
            return "unknown"
        verdict = self.holder.verdict()
        return "unknown" if verdict == "there" and self.moved else verdict


def chain_of(path: Path, anew: bool = True) -> list[Link]:
    """The files of a lock, first to last; empty when it is free.

    Args:
        anew: Do not rely on what this host remembers of the folder (:func:`look_anew`).

    Raises:
        OSError: one of them is there and cannot be opened.
        RunFolderError: they lead in a circle.
    """
    if anew:
        look_anew(path.parent)
    links: list[Link] = []
    place = path
    while (link := read(place)) is not None:
        if any(link.nonce == earlier.nonce for earlier in links):
            raise RunFolderError(f"the lock {path} is damaged: if nothing is at work here, delete it")
        links.append(link)
        place = after(path, link.nonce)
    return links


def after(path: Path, nonce: str) -> Path:
    """The file of whoever comes after ``nonce`` in the chain of a lock."""
    return path.with_name(f"{path.name}.{nonce}")


def is_lock_file(name: str, lock: str) -> bool:
    """Whether a file's name is that of a lock or of something that belongs to it."""
    head, dot, rest = name.partition(f"{lock}.")
    return name == lock or (not head and bool(dot) and bool(_NONCE.fullmatch(rest.removesuffix(".new"))))


def read(place: Path) -> Link | None:
    """What a file of a chain says; None when there is none.

    Raises:
        OSError: it cannot be opened or read.
    """
    try:
        fd = os.open(place, _READ)  # not by path alone: opening is what makes NFS ask the server
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return _link(fd)
    finally:
        os.close(fd)


def _link(fd: int) -> Link:
    found = os.fstat(fd)
    raw = os.read(fd, _LONGEST)
    sign = (found.st_ino, found.st_mtime_ns)
    try:
        data = json.loads(raw)
        holder = Holder(int(data["pid"]), str(data["host"]), str(data["started"]), str(data["since"]))
        nonce = str(data.get("nonce", ""))
        if not _NONCE.fullmatch(nonce):
            return Link(_derived(raw, found.st_ino), holder, "old", 0.0, sign, False)
        timeout = min(max(float(data["timeout"]), 0.0), _LONGEST_TIMEOUT)
        kind: Literal["held", "released"] = "released" if data.get("released") else "held"
        return Link(nonce, holder, kind, timeout, sign, data["inode"] != found.st_ino)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Link(_derived(b"", found.st_ino), None, "unreadable", 0.0, sign, False)


def _derived(raw: bytes, inode: int) -> str:
    return hashlib.sha256(raw + f" {inode}".encode()).hexdigest()[:32]


def create(path: Path, place: Path, content: dict[str, Any]) -> bool:
    """Make ``place``, a file of the lock ``path``, whole and at once; False when there is one already.

    Args:
        content: What it says; has a ``nonce``. The file's inode is added.

    Raises:
        OSError: it cannot be made.
    """
    draft = path.with_name(f"{path.name}.{content['nonce']}.new")
    fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        _fill(fd, content)
        try:
            os.link(draft, place)
        except FileExistsError:
            # the answer to a link that was made can be lost on the way, and the link asked for once more
            there = read(place)
            return there is not None and there.nonce == content["nonce"]
        except FileNotFoundError:  # a draft of the past, to whoever got the lock meanwhile
            draft.parent.stat()
            return False
        except OSError as e:
            if e.errno not in _NO_LINKS:
                raise
            return _create_empty(path, place, content)
        return True
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def _create_empty(path: Path, place: Path, content: dict[str, Any]) -> bool:
    """Where there are no hard links. Somebody may see the file before it is filled, and take it over for that."""
    try:
        fd = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    inode = os.fstat(fd).st_ino
    try:
        _fill(fd, content)
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    if after(path, _derived(b"", inode)).exists():
        place.unlink(missing_ok=True)
        return False
    return True


def _fill(fd: int, content: dict[str, Any]) -> None:
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        json.dump({**content, "inode": os.fstat(fd).st_ino}, file)


def touch(place: Path, nonce: str, count: int) -> bool:
    """Give a sign of life through a file that has this nonce; False when it is no longer there.

    It goes to the very file that was read, whatever has its name by then. Only a change counts, in whoever's clock:
    ``count`` makes one also where the clock stands still.

    Raises:
        OSError: the file cannot be reached.
    """
    try:
        fd = os.open(place, _READ)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        if _link(fd).nonce != nonce:
            return False
        now = time.time_ns() + count
        os.utime(fd if os.utime in os.supports_fd else place, ns=(now, now))
    finally:
        os.close(fd)
    return True


def strays(path: Path, chain: Sequence[Link]) -> list[Path]:
    """What kills have left of earlier chains of a lock. They may be removed once one holds it, however late."""
    belongs = {path, *(after(path, link.nonce) for link in chain)}
    return [p for p in path.parent.iterdir() if is_lock_file(p.name, path.name) and p not in belongs]


def remove(places: Iterable[Path]) -> None:
    """Remove files in this order, as far as they are there."""
    for place in places:
        with suppress(FileNotFoundError):
            place.unlink()


def look_anew(folder: Path) -> None:
    """On NFS names may be remembered for a minute; opening their folder makes the system ask the server again."""
    if os.name == "posix":
        with suppress(OSError):  # whoever looks into it next meets the same
            os.close(os.open(folder, os.O_RDONLY))


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """One process of a host at a time, where the file system has flock and nobody dozes in here.

    Only an additional guard: many network file systems have none, or one that other hosts do not see.
    """
    if _fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        end = time.monotonic() + _LIMIT
        while True:
            try:
                _fcntl.flock(fd, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.002)
            except OSError:
                break
        yield
    finally:
        os.close(fd)


# -- waiting for a lock


TIMEOUT = 90.0  # seconds
BEATS = 8  # signs of life per timeout: every 11 s
_BEATS_OF_THE_DEAD = 3  # of a process that was silent for a whole timeout at another lock
_PATIENCE = 2.0  # seconds for another process between two neighbouring file operations
_SPEAK_AFTER, _SPEAK_EVERY = 2.0, 60.0  # seconds
_PAUSE = 1.0  # seconds at most between two looks
# Whom this process has found silent. A crashed machine leaves several locks of one process (the job's, its folder's,
# the cache's), and who goes on in its place comes to them one after the other.
_found_silent: set[tuple[int, str, str]] = set()


class Watch:
    """Decides about the holders of a lock by looking at them again and again."""

    def __init__(self, path: Path, what: str, wait: float | None, timeout: float) -> None:
        self.path, self.what, self.timeout = path, what, timeout
        self.last = time.monotonic()
        self.deadline = None if wait is None else self.last + wait
        self.next_word = self.last + _SPEAK_AFTER
        self.began = self.last
        self.pause = 0.01
        self.nonce = ""
        self.sign: tuple[int, int] | None = None
        self.silence = 0.0
        self.seen_alive = False

    def over(self, link: Link) -> bool:
        """True when the holder is dead, so that its lock may be taken over; else False, a moment later.

        Raises:
            RunFolderError: it lives, and the time to wait for it is over.
        """
        now = time.monotonic()
        if link.nonce != self.nonce:
            self.nonce, self.sign, self.silence, self.seen_alive = link.nonce, link.sign, 0.0, False
        elif link.sign != self.sign:
            self.sign, self.silence, self.seen_alive = link.sign, 0.0, True
        else:
            # a look that took long (a hanging file system, this process stopped) is no long look
            self.silence += min(now - self.last, 2 * self.pause)
        self.last = now
        verdict = link.verdict()
        if verdict == "gone" or (verdict == "unknown" and self._silent(link)):
            self._announce(link, verdict == "gone")
            return True
        if link.kind == "released":
            lives = self.silence >= _PATIENCE  # it is letting go right now
        else:
            lives = verdict == "there" or self.seen_alive or link.kind == "old"
        if lives and self.deadline is not None and now >= self.deadline:
            raise RunFolderError(self._taken(link))
        self._speak(link, now, lives)
        self.pause = min(self.pause * 1.5, _PAUSE, self.timeout / 16)
        time.sleep(self.pause)
        return False

    def _silent(self, link: Link) -> bool:
        if link.kind == "unreadable":
            return self.silence >= _PATIENCE  # made and never filled: its maker was killed in between
        return link.kind != "old" and self.silence >= self._enough(link)

    def _enough(self, link: Link) -> float:
        """Seconds without a sign of life that make its holder a dead one."""
        longest = max(self.timeout, link.timeout)
        return longest * _BEATS_OF_THE_DEAD / BEATS if link.holder and _who(link.holder) in _found_silent else longest

    def _announce(self, link: Link, certain: bool) -> None:
        if link.holder is not None and not certain:
            _found_silent.add(_who(link.holder))
        if link.holder is not None and link.kind != "released":
            why = "has ended without finishing" if certain else f"has given no sign of life for {self.silence:.0f} s"
            say(f"{self.what}: going on after {named(link.holder)}, which {why}", style="yellow")

    def _speak(self, link: Link, now: float, lives: bool) -> None:
        if link.holder is None or now < self.next_word:
            return
        self.next_word = now + _SPEAK_EVERY
        if lives:
            so_far = f", {now - self.began:.0f} s so far" if now - self.began > _SPEAK_EVERY else ""
            say(f"{self.what}: waiting for {named(link.holder)}, at work since {link.holder.since}{so_far}")
        else:
            enough = f"{self._enough(link):.3g} s"
            say(f"{self.what}: {named(link.holder)} may be at work here; looking for a sign of life for {enough}")

    def _taken(self, link: Link) -> str:
        if link.holder is None:
            return f"{self.what} is in use: wait, or use another --out"
        text = f"{self.what} is in use by {named(link.holder)} since {link.holder.since}: wait for it, "
        if link.kind == "old" and link.verdict() == "unknown":
            return f"{text}or use another --out; if it is certain that it runs no more, delete {self.path}"
        return f"{text}stop it, or use another --out"


def _who(holder: Holder) -> tuple[int, str, str]:
    return holder.pid, holder.host, holder.started


def named(holder: Holder) -> str:
    """A holder as messages name it."""
    if holder.verdict() == "there":
        return "this very process" if holder.pid == os.getpid() else f"process {holder.pid}"
    return f"process {holder.pid} on host {holder.host}"


def seconds_of_silence() -> float:
    """After how many seconds without a sign of life a holder is taken for dead.

    Raises:
        RunFolderError: ``UNLEARN_LOCK_TIMEOUT`` is no such number.
    """
    given = os.environ.get("UNLEARN_LOCK_TIMEOUT", "")
    try:
        seconds = float(given) if given.strip() else TIMEOUT
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 24 * 3600:
        raise RunFolderError(f"UNLEARN_LOCK_TIMEOUT is a number of seconds up to a day ({TIMEOUT:g}), not {given!r}")
    return seconds


# -- one process at a time, on whatever hosts


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

    ``nonces`` are those of its chain (:mod:`unlearn.store.lock`), its own last.
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
