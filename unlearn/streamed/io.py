"""Bytes from files and into files, past the page cache where they are not in it already, and stages that overlap.

A model of hundreds of gigabytes that goes through the page cache pushes everything else out of it, and finding pages
for it can take longer than the disk. What is in the cache is taken from there; else files are read and written directly
where the system can, and as usual where it cannot.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch

from unlearn.errors import ModelError

PAGE = 4096  # direct reads and writes begin and end at multiples of this
_DIRECT = getattr(os, "O_DIRECT", 0)
# what systems say that cannot do one or the other for a file
_CANNOT = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM})
T = TypeVar("T")


class Buffer:
    """Memory that begins at a page, as bytes and as a tensor of uint8."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self._map = mmap.mmap(-1, self.size)
        self.view = memoryview(self._map)
        self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)


class Source:
    """A file to read, any range of it into a :class:`Buffer`, by several threads at once."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self._usual = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._cache = _Cache.of(self._usual, size) if _DIRECT else None
        self._direct = _opened(path, os.O_RDONLY | _DIRECT) if self._cache else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._usual)
        if self._direct is not None:
            os.close(self._direct)
        if self._cache is not None:
            self._cache.close()

    def read(self, begin: int, end: int, into: Buffer) -> int:
        """Read bytes ``begin`` to ``end`` (excluded), and say where in the buffer the first of them is.

        Raises:
            ModelError: the file has become shorter.
            OSError: it cannot be read.
        """
        start = begin // PAGE * PAGE
        view = into.view[: -(-end // PAGE) * PAGE - start]
        past = self._direct is not None and self._cache is not None and not self._cache.holds(start, end)
        done = self._directly(view, start) if past else 0
        while done < end - start:
            count = os.preadv(self._usual, [view[done:]], start + done)
            if not count:
                raise ModelError(f"{self.path}: it has become shorter while it was read")
            done += count
        return begin - start

    def _directly(self, view: memoryview, start: int) -> int:
        assert self._direct is not None
        try:
            return os.preadv(self._direct, [view], start)
        except OSError as e:
            if e.errno not in _CANNOT:
                raise
            return 0


class _Cache:
    """Which pages of a file are in memory. Asking by a read that must not wait would bring them there."""

    _libc: Any = None

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size

    @classmethod
    def of(cls, fd: int, size: int) -> _Cache | None:
        """None where the system cannot tell."""
        try:
            libc = cls._libc or ctypes.CDLL(None, use_errno=True)
            libc.mmap.restype = ctypes.c_void_p
            libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
            libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
            libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
        except (OSError, AttributeError):
            return None
        cls._libc = libc
        address = (
            libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0) if size and PAGE == mmap.PAGESIZE else -1
        )
        return cls(address, size) if address not in (None, -1, ctypes.c_void_p(-1).value) else None

    def holds(self, begin: int, end: int) -> bool:
        """Whether all bytes from ``begin``, where a page begins, to ``end`` are in memory."""
        length = min(end, self._size) - begin
        found = ctypes.create_string_buffer(max(1, -(-length // PAGE)))
        if length <= 0 or self._libc.mincore(self._address + begin, length, found):
            return False
        return all(byte & 1 for byte in found.raw)

    def close(self) -> None:
        """Forget the file."""
        self._libc.munmap(self._address, self._size)


class Sink:
    """A new file that is written from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        self.path = path
        self._usual = os.open(path, flags, 0o666)
        self._direct = _opened(path, os.O_WRONLY | _DIRECT) if _DIRECT else None
        self._rest = b""  # what follows the last whole page
        self._at = 0  # where it goes, a multiple of a page

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._usual)
        if self._direct is not None:
            os.close(self._direct)

    def write(self, buffer: Buffer, where: int, count: int) -> None:
        """Append ``count`` bytes of a buffer. ``where`` they begin must be as far into a page as in the file.

        The buffer's bytes before ``where`` are overwritten.

        Raises:
            OSError: no space left, and the like.
        """
        assert where == len(self._rest)
        buffer.view[:where] = self._rest
        whole = (where + count) // PAGE * PAGE
        self._put(buffer.view[:whole], self._at)
        self._at += whole
        self._rest = bytes(buffer.view[whole : where + count])

    def finish(self) -> int:
        """Write what is left, bring the file to disk, and return its size.

        Raises:
            OSError: no space left, and the like.
        """
        done = 0
        while done < len(self._rest):
            done += os.pwrite(self._usual, self._rest[done:], self._at + done)
        os.fsync(self._usual)
        return self._at + len(self._rest)

    def _put(self, view: memoryview, at: int) -> None:
        done = 0
        while done < len(view):
            if self._direct is not None and not done % PAGE:
                try:
                    done += os.pwrite(self._direct, view[done:], at + done)
                    continue
                except OSError as e:
                    if e.errno not in _CANNOT:
                        raise
                    os.close(self._direct)
                    self._direct = None
            done += os.pwrite(self._usual, view[done:], at + done)


def _opened(path: Path, flags: int) -> int | None:
    """A descriptor, or None where a file system does not have such access."""
    try:
        return os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except OSError as e:
        if e.errno not in _CANNOT:
            raise
        return None


class Flow(Generic[T]):
    """Items that go through stages, each in a thread of its own, one after the other and in order.

    An error in a stage ends the flow: later items pass without being worked on.

    Args:
        stages: Called with each item.
        finish: Called with each item at the end, whatever became of it.
    """

    def __init__(self, *stages: Callable[[T], None], finish: Callable[[T], None]) -> None:
        self._error: BaseException | None = None
        self._over = threading.Event()  # every stage has passed on its last item
        self._first: SimpleQueue[T | None] = SimpleQueue()
        self._threads = []
        queue = self._first
        for stage in stages:
            following: SimpleQueue[T | None] = SimpleQueue()
            self._threads.append(threading.Thread(target=self._work, args=(stage, queue, following), daemon=True))
            queue = following
        self._threads.append(threading.Thread(target=self._end, args=(finish, queue), daemon=True))

    def run(self, items: Iterable[T]) -> None:
        """Send all items through. They are asked for here, so whoever makes them can hold them back.

        Raises:
            BaseException: what a stage raised, or the items.
        """
        for thread in self._threads:
            thread.start()
        try:
            for item in items:
                self._first.put(item)
                if self._error is not None:
                    break
        except BaseException as e:
            self._error = self._error or e
        finally:
            self._settle()
        if self._error is not None:
            raise self._error

    def _settle(self) -> None:
        """Wait until no stage is at work any more, whatever interrupts: their files are closed next.

        Not by join(): an interrupted one takes the thread for ended (Python 3.11 and 3.12).
        """
        while not self._over.is_set():
            try:
                self._first.put(None)
                self._over.wait()
            except BaseException as e:  # raised again by run()
                self._error = self._error or e

    def _work(self, stage: Callable[[T], None], mine: SimpleQueue[T | None], following: SimpleQueue[T | None]) -> None:
        while (item := mine.get()) is not None:
            if self._error is None:
                try:
                    stage(item)
                except BaseException as e:  # raised again by run()
                    self._error = self._error or e
            following.put(item)
        following.put(None)

    def _end(self, finish: Callable[[T], None], mine: SimpleQueue[T | None]) -> None:
        while (item := mine.get()) is not None:
            try:
                finish(item)
            except BaseException as e:  # raised again by run()
                self._error = self._error or e
        self._over.set()
