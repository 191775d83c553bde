"""One file of weights, edited on its way from disk to disk.

Reading, hashing what was read, editing, hashing what comes out and writing go on at the same time, each on another
range of the file. Memory is a handful of buffers, whatever the sizes of files and tensors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from unlearn.streamed.blocks import Block, Editor, Window, Work, windows
from unlearn.streamed.io import PAGE, Buffer, Flow, Sink, Source
from unlearn.streamed.layout import Shard

WINDOW = 8 * 2**20  # bytes of a file that are handled at once
_WINDOWS = 6  # of them at a time: one in each stage, and one to spare
_MOST_WORKERS = 8  # more would be faster than any disk


@dataclass(eq=False)
class Cell:
    """A range of a file with the buffer it is in, beginning ``at``."""

    window: Window
    buffer: Buffer
    at: int = 0
    begun: Any = None  # the hash of all that lies before it, where the first edit of a file is in it
    edits: list[Future[None]] = field(default_factory=list)

    @property
    def bytes(self) -> memoryview:
        """The range's bytes."""
        return self.buffer.view[self.at : self.at + self.window.end - self.window.begin]


class Buffers:
    """A few buffers that go round. A range too long for one gets memory of its own, and the place of one."""

    def __init__(self, count: int = _WINDOWS) -> None:
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(count):
            self._free.put(Buffer(WINDOW + 2 * PAGE))
        self._waiting: dict[int, Buffer] = {}  # the usual ones in whose place a longer one is in use

    def take(self, size: int) -> Buffer:
        """A buffer for ``size`` bytes from anywhere in a page; waits until one is free."""
        usual = self._free.get()
        if size + 2 * PAGE <= usual.size:
            return usual
        larger = Buffer(size + 2 * PAGE)
        self._waiting[id(larger)] = usual
        return larger

    def give_back(self, buffer: Buffer) -> None:
        """Make a buffer free for the next range."""
        self._free.put(self._waiting.pop(id(buffer), buffer))


@dataclass(frozen=True, slots=True)
class Written:
    """SHA-256 of a file as read and as written, and the size of the latter in bytes."""

    source: str
    sha256: str
    size: int


class Engine:
    """Edits files one after the other with the same buffers and threads.

    Args:
        editor: What is done to edited blocks.
        whole: Compute each tensor at once, one after the other.
    """

    def __init__(self, editor: Editor, whole: bool) -> None:
        alone = whole or editor.seed is not None  # the draws of a tensor come in order
        self.workers = 1 if alone else max(1, min(_MOST_WORKERS, os.cpu_count() or 1))
        self.editor, self.whole = editor, whole
        self.buffers = Buffers()

    def write(self, shard: Shard, works: Mapping[str, Work], to: Path, advance: Callable[[int], None]) -> Written:
        """Write the edited file to ``to``, which must not exist, and bring it to disk.

        Args:
            works: By stored name; those of other files do not matter.
            advance: Told how many bytes more are done.

        Raises:
            ModelError: the file has become shorter.
            OSError: it cannot be read or written.
        """
        before, after = hashlib.sha256(), None  # up to the first edit what is read is what is written
        with Source(shard.path, shard.size) as source, Sink(to) as sink, ThreadPoolExecutor(self.workers) as pool:
            reached = False

            def read(cell: Cell) -> None:
                cell.at = source.read(cell.window.begin, cell.window.end, cell.buffer)

            def edit(cell: Cell) -> None:
                nonlocal reached
                if cell.window.blocks and not reached:
                    reached, cell.begun = True, before.copy()
                before.update(cell.bytes)
                for blocks in _shares(cell.window.blocks, self.workers):
                    cell.edits.append(pool.submit(self._edit, cell, blocks))

            def check(cell: Cell) -> None:
                nonlocal after
                for one in cell.edits:
                    one.result()
                after = after or cell.begun
                if after is not None:
                    after.update(cell.bytes)

            def write(cell: Cell) -> None:
                sink.write(cell.buffer, cell.at, len(cell.bytes))
                advance(len(cell.bytes))

            def finish(cell: Cell) -> None:
                wait(cell.edits)
                self.buffers.give_back(cell.buffer)

            Flow(read, edit, check, write, finish=finish).run(self._cells(windows(shard, works, WINDOW, self.whole)))
            size = sink.finish()
        return Written(before.hexdigest(), (after or before).hexdigest(), size)

    def digest(self, path: Path, size: int, advance: Callable[[int], None]) -> str:
        """SHA-256 of a file, read past the cache.

        Raises:
            ModelError: it is shorter than ``size``.
            OSError: it cannot be read.
        """
        found = hashlib.sha256()
        with Source(path, size) as source:

            def read(cell: Cell) -> None:
                cell.at = source.read(cell.window.begin, cell.window.end, cell.buffer)

            def add(cell: Cell) -> None:
                found.update(cell.bytes)
                advance(len(cell.bytes))

            ranges = (Window(b, min(b + WINDOW, size), ()) for b in range(0, size, WINDOW))
            Flow(read, add, finish=lambda cell: self.buffers.give_back(cell.buffer)).run(self._cells(ranges))
        return found.hexdigest()

    def _cells(self, ranges: Iterable[Window]) -> Iterator[Cell]:
        for window in ranges:
            yield Cell(window, self.buffers.take(window.end - window.begin))

    def _edit(self, cell: Cell, blocks: Iterable[Block]) -> None:
        for block in blocks:
            first = cell.at + block.begin_byte - cell.window.begin
            raw = cell.buffer.tensor[first : first + block.end_byte - block.begin_byte]
            self.editor.edit(block, raw)


def _shares(blocks: tuple[Block, ...], workers: int) -> Iterator[tuple[Block, ...]]:
    """Blocks in as many runs as there are workers; all in one if there is one, in order."""
    size = max(1, -(-len(blocks) // workers))
    for first in range(0, len(blocks), size):
        yield blocks[first : first + size]
