"""The files of a lock, and all that is ever done to them: made if absent, touched by their maker, removed at the end.

A lock is a chain of files. The first is the lock's own path. Who takes it over from a dead holder makes one more,
``<path>.<nonce of the dead one>``, and the last of the chain holds the lock. Nonces are random and never come back, and
making a file that must not exist yet (``link``, or ``O_EXCL`` where there are no hard links) is atomic on NFS. So of
any number who want to follow the same dead holder one does, without a file being replaced or moved, however long
somebody dozes in between. A holder lets go by first making its own successor, which says ``released`` (so that
either it or somebody who takes it for dead wins, never both), and then removing the chain from its first file on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from unlearn.errors import RunFolderError
from unlearn.holder import Holder, Verdict

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
