"""Is an edited checkpoint exactly theta - coefficient * tau? Tensor by tensor, bit by bit, from disk.

The edited weights are computed anew from the base, a block at a time, and compared with what is stored. Where they
differ, the likely reason is looked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from unlearn.atomic import some
from unlearn.console import progress
from unlearn.errors import ModelError, VectorError
from unlearn.streamed.blocks import Block, Editor, Window, Work, blocks_of
from unlearn.streamed.io import Buffer, Flow, Source
from unlearn.streamed.layout import BITS, Checkpoint, Stored, read_checkpoint
from unlearn.streamed.names import copies, refuse_adapter
from unlearn.streamed.reason import reason
from unlearn.streamed.shard import WINDOW, Buffers, Engine
from unlearn.streamed.write import in_megabytes, one_way, works_of
from unlearn.vector import TaskVector

CONFIG = "config.json"
_BY_THE_WAY = frozenset({"_name_or_path", "transformers_version"})  # of a configuration; nothing depends on them
_MB = 10**6
_PAIRS = 4  # of buffers in use at a time


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a comparison found.

    Attributes:
        tensors: How many tensors the base has, and how many of them are edited.
        wrong: Tensor, or ``config.json``, -> why it is not what it should be.
        coefficient: The coefficient that all edited tensors have instead, if there is one.
    """

    tensors: int
    edited: int
    wrong: Mapping[str, str]
    coefficient: float | None


@dataclass(eq=False)
class _Pair:
    """The same part of a tensor in both checkpoints: the base's bytes are at ``here`` and become what should be."""

    tensor: Stored
    begin: int  # of the part, in the tensor
    end: int
    block: Block | None
    base: Buffer
    edited: Buffer
    here: int = 0
    there: int = 0
    done: list[Future[None]] = field(default_factory=list)


def check_edited(
    vector: TaskVector, model: Path, coefficient: float, edited: Path, stochastic: bool = False, seed: int = 0
) -> Verdict:
    """Compare the checkpoint in ``edited``, however it is cut into files, with what it should be.

    Its ``config.json``, by which the weights are read, must say the same as the base's.

    Raises:
        ModelError: one of the checkpoints is damaged, or none, or an adapter lies in it.
        VectorError: the vector does not fit the base.
    """
    base, other = read_checkpoint(model), read_checkpoint(edited)
    works = works_of(base, vector)
    refuse_adapter(other.folder)
    editor = Editor(coefficient, seed if stochastic else None, measure=False)
    with one_way(works, coefficient, base) as whole:
        comparison = _Comparison(base, other, works, Engine(editor, whole))
        comparison.run()
        return comparison.verdict()


@dataclass
class _Comparison:
    base: Checkpoint
    other: Checkpoint
    works: Mapping[str, Work]
    engine: Engine

    def __post_init__(self) -> None:
        self.differing: dict[str, int] = {}
        self.lock = threading.Lock()
        self.there = self.other.tensors()
        here = self.base.tensors()
        self.missing = {name: "missing" for name in here if name not in self.there}
        self.missing |= {name: "the base has no such tensor" for name in self.there if name not in here}
        if self.missing:  # a head that is a copy of the embeddings may be stored or not
            for name in copies(self.base) ^ copies(self.other):
                self.missing.pop(name, None)
        for name in here.keys() & self.there.keys():
            one, two = here[name][1], self.there[name][1]
            if (one.format, one.shape) != (two.format, two.shape):
                self.missing[name] = f"{two.format} {two.shape} instead of {one.format} {one.shape}"

    def run(self) -> None:
        """Compare all tensors that can be."""
        bases, others = Buffers(_PAIRS), Buffers(_PAIRS)
        with ExitStack() as files, ThreadPoolExecutor(self.engine.workers) as pool:
            old = {s.name: files.enter_context(Source(s.path, s.size)) for s in self.base.shards}
            new = {s.name: files.enter_context(Source(s.path, s.size)) for s in self.other.shards}
            where = {name: shard.name for name, (shard, _) in self.base.tensors().items()}

            def read(pair: _Pair) -> None:
                at = pair.tensor.begin
                pair.here = old[where[pair.tensor.name]].read(at + pair.begin, at + pair.end, pair.base)

            def read_other(pair: _Pair) -> None:
                shard, tensor = self.there[pair.tensor.name]
                pair.there = new[shard.name].read(tensor.begin + pair.begin, tensor.begin + pair.end, pair.edited)
                pair.done.append(pool.submit(self._compare, pair))

            def settle(pair: _Pair) -> None:
                for one in pair.done:
                    one.result()
                counted(pair.end - pair.begin)

            def finish(pair: _Pair) -> None:
                wait(pair.done)
                bases.give_back(pair.base)
                others.give_back(pair.edited)

            with progress("comparing, MB", self.base.size // _MB) as advance:
                counted = in_megabytes(advance)
                Flow(read, read_other, settle, finish=finish).run(self._pairs(bases, others))

    def _pairs(self, bases: Buffers, others: Buffers) -> Iterator[_Pair]:
        for name, (_, tensor) in self.base.tensors().items():
            if name not in self.there or name in self.missing or tensor.begin == tensor.end:
                continue
            for part, block in self._parts(tensor):
                size = part.end - part.begin
                yield _Pair(tensor, part.begin, part.end, block, bases.take(size), others.take(size))

    def _parts(self, tensor: Stored) -> Iterator[tuple[Window, Block | None]]:
        if tensor.name in self.works:
            for block in blocks_of(self.works[tensor.name], self.engine.whole):
                yield Window(block.begin_byte - tensor.begin, block.end_byte - tensor.begin, ()), block
            return
        size = tensor.end - tensor.begin
        for begin in range(0, size, WINDOW):
            yield Window(begin, min(begin + WINDOW, size), ()), None

    @torch.no_grad()
    def _compare(self, pair: _Pair) -> None:
        size = pair.end - pair.begin
        wanted = pair.base.tensor[pair.here : pair.here + size]
        found = pair.edited.tensor[pair.there : pair.there + size]
        if pair.block is not None:
            self.engine.editor.edit(pair.block, wanted)
        if torch.equal(wanted, found):
            return
        width = max(1, BITS[pair.tensor.format] // 8)
        count = int((wanted != found).view(-1, width).any(dim=1).sum())
        with self.lock:
            self.differing[pair.tensor.name] = self.differing.get(pair.tensor.name, 0) + count

    def verdict(self) -> Verdict:
        """Reasons included."""
        wrong = dict(self.missing)
        if why_not := _config_differs(self.base.folder, self.other.folder):
            wrong[CONFIG] = why_not
        coefficients: dict[str, float | None] = {}
        for name, count in self.differing.items():
            shard, tensor = self.base.tensors()[name]
            other, there = self.there[name]
            why, coefficients[name] = reason(
                *((shard.path, tensor), (other.path, there), self.works.get(name), self.engine.editor),
                *(count, self.engine.whole),
            )
            wrong[name] = why
        edited = [coefficients.get(name) for name in self.works if name not in self.missing]
        one = edited[0] if edited and len(set(edited)) == 1 else None
        return Verdict(len(self.base.tensors()), len(self.works), dict(sorted(wrong.items())), one)


def _config_differs(base: Path, edited: Path) -> str | None:
    """How the model that a checkpoint is loaded as is another one than the base's; None: it is not."""
    if not (edited / CONFIG).is_file():
        return "missing"
    if (edited / CONFIG).read_bytes() == (base / CONFIG).read_bytes():
        return None
    from unlearn.architecture import config_of  # transformers' word: it may write the same in other words

    one = config_of(base).to_dict()
    try:
        two = config_of(edited).to_dict()
    except VectorError as e:
        return f"it is not the base's: {e}"
    keys = sorted(k for k in (one.keys() | two.keys()) - _BY_THE_WAY if one.get(k) != two.get(k))
    return f"it differs from the base's in {some(keys)}" if keys else None


def require_folder(place: Path) -> None:
    """Raise unless there is something to compare.

    Raises:
        ModelError: there is no such folder.
    """
    if not place.is_dir():
        raise ModelError(f"{place}: no such folder; --check compares the checkpoint in --out with what it should be")
