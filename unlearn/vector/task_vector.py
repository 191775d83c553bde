"""Task vectors: what a fine-tuning changed, as a value that can be added, scaled, compared and kept.

A task vector is the change weight by weight: tau = theta_finetuned - theta (Ilharco et al. 2212.04089, section 2).
After LoRA that change is ``B @ A`` per module, so it is kept as the two thin factors, in float32, with LoRA's scale
alpha/r already folded into ``B``. After full fine-tuning it is dense.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unlearn.errors import VectorError
from unlearn.vector.change import (
    Change,
    Dense,
    LowRank,
    check_rank,
    check_share,
    check_terms,
    largest_entries,
    largest_rows,
    listed,
    total,
    truncated,
)

FORMAT = "unlearn.task_vector"
VERSION = "2"
# What safetensors and torch say of a number format they do not know, of shapes beyond 64 bits and of a lack of memory.
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError)
_LETTERS = {"1": "AB", "2": "ABW"}  # version -> what its tensors' names may end with


def _write(path: Path, modules: Mapping[str, Change], meta: Mapping[str, str]) -> None:
    """Write a vector in the current version: the same bytes each time."""
    tensors = {f"{n}.{letter}": t for n, change in modules.items() for letter, t in change.tensors().items()}
    head = {"format": FORMAT, "version": VERSION, "meta": json.dumps(dict(meta))}
    save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path, head)
    with path.open("r+b") as file:  # the library writes metadata in an order of chance
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length)) | {"__metadata__": head}
        settled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(settled) <= length
        file.seek(8)
        file.write(settled.ljust(length))


def _read(path: Path) -> tuple[dict[str, Change], dict[str, str]]:
    """A vector's modules and metadata."""
    try:
        with safe_open(path, framework="pt") as f:
            head = f.metadata() or {}
            if head.get("format") != FORMAT:
                raise VectorError(f"{path}: not a task vector of this program")
            version = str(head.get("version"))
            if version not in _LETTERS:
                raise VectorError(f"{path}: written as version {version}, this program reads up to {VERSION}")
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - a safe_open has no __iter__
    except (SafetensorError, OSError, *UNREADABLE) as e:
        raise VectorError(f"{path}: cannot be read as a task vector: {e}") from e
    try:
        return _changes(tensors, _LETTERS[version]), _read_meta(head.get("meta", "{}"))
    except VectorError as e:
        raise VectorError(f"{path}: {e}") from e


def _changes(tensors: Mapping[str, Tensor], letters: str) -> dict[str, Change]:
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        name, _, letter = key.rpartition(".")
        if not name or len(letter) != 1 or letter not in letters:
            strange.append(key)
        parts.setdefault(name, {})[letter] = tensor
    if strange:
        raise VectorError(f"it holds tensors that are no part of a vector: {listed(sorted(strange))}")
    missing = [n for n, found in parts.items() if "W" not in found and len(found) == 1]
    if missing:
        raise VectorError(f"a factor is missing for {listed(sorted(missing))}")
    twice = [n for n, found in parts.items() if "W" in found and len(found) > 1]
    if twice:
        raise VectorError(f"both factors and a dense change are there for {listed(sorted(twice))}")
    return {n: Dense(p["W"]) if "W" in p else LowRank(p["A"], p["B"]) for n, p in parts.items()}


def _read_meta(text: str) -> dict[str, str]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise VectorError(f"its metadata is damaged: {text[:80]}")
    return meta


# -- task vectors


@dataclass(frozen=True, slots=True, eq=False)
class TaskVector:
    """A change of a model: module path -> :data:`Change`, with string metadata about where it came from.

    Vectors add and scale as the dense changes they stand for. Sums of factors concatenate along r, so they stay
    exact and low-rank; adding factors element by element, or negating both of them, would be wrong. A sum with a
    dense change is dense. A module that only one operand names is unchanged by the other.

    Raises:
        VectorError: no module, or a value that is not finite; also from every operation whose result would be so.
    """

    modules: Mapping[str, Change]
    meta: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            raise VectorError("a task vector without a single module changes nothing")
        bad = [n for n, m in self.modules.items() if not all(bool(t.isfinite().all()) for t in m.tensors().values())]
        if bad:
            raise VectorError(f"the vector holds values that are not finite in {len(bad)} modules: {listed(bad)}")
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    def map(self, change: Callable[[str, Change], Change]) -> TaskVector:
        """The vector whose change of each module is ``change(name, the change here)``; the metadata stays."""
        return TaskVector({n: change(n, m) for n, m in self.modules.items()}, self.meta)

    def __mul__(self, c: float) -> TaskVector:
        if not isinstance(c, Real):
            return NotImplemented
        return self.map(lambda _, m: m.scaled(float(c)))

    __rmul__ = __mul__

    def __truediv__(self, c: float) -> TaskVector:
        if not isinstance(c, Real):
            return NotImplemented
        if c == 0:
            raise VectorError("a task vector cannot be divided by 0")
        return self * (1.0 / float(c))

    def __neg__(self) -> TaskVector:
        return -1.0 * self

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector.sum((self, other))

    def __radd__(self, other: Any) -> TaskVector:
        """``0 + vector``, with which the builtin ``sum()`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return TaskVector.sum((self, -other))

    @classmethod
    def sum(cls, vectors: Iterable[TaskVector]) -> TaskVector:
        """The exact sum (Ilharco et al., "addition"). Metadata are the first one's wherever several speak."""
        summands = tuple(vectors)
        if not summands:
            raise VectorError("a sum of no task vectors at all has no modules")
        changes: dict[str, list[Change]] = {}
        for vector in summands:
            for name, m in vector.modules.items():
                changes.setdefault(name, []).append(m)
        _refuse_clashes(changes, "added")
        meta = {k: v for vector in reversed(summands) for k, v in vector.meta.items()}
        return cls({n: total(ms) for n, ms in changes.items()}, meta)

    def dot(self, other: TaskVector) -> float:
        """Inner product of two whole changes; modules that only one of them has count as zero in the other."""
        return sum(one.dot(two) for one, two in self._shared(other).values())

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the change, per module."""
        return {n: _norm(m) for n, m in self.modules.items()}

    def norm(self) -> float:
        """Frobenius norm of the whole change."""
        return math.hypot(*self.norms().values())

    def cosine(self, other: TaskVector) -> float:
        """Cosine similarity of two whole changes, of which Li et al.'s task correlation is the counterpart in outputs.

        Modules that only one of them has count as zero in the other. 0 where one of the changes is zero.
        """
        return _ratio(self.dot(other), self.norm() * other.norm())

    def cosines(self, other: TaskVector) -> dict[str, float]:
        """Cosine similarity per module, of the modules that both have."""
        return {n: _ratio(a.dot(b), _norm(a) * _norm(b)) for n, (a, b) in self._shared(other).items()}

    def _shared(self, other: TaskVector) -> dict[str, tuple[Change, Change]]:
        pairs = {n: (m, other.modules[n]) for n, m in self.modules.items() if n in other.modules}
        _refuse_clashes(pairs, "compared")
        return pairs

    def rank(self) -> int:
        """Largest r over the modules."""
        return max(m.rank for m in self.modules.values())

    def to_low_rank(self, rank: int | None = None, energy: float | None = None) -> TaskVector:
        """Every module truncated to its leading singular terms (:func:`unlearn.vector.change.truncated`).

        Args:
            rank: Terms to keep per module; one that has no more stays as it is.
            energy: Instead: the share of each module's squared norm to keep, in (0, 1].
        """
        if (rank is None) == (energy is None):
            raise VectorError("give either rank or energy to say how much is kept")
        check_terms(rank, energy)
        check_rank(rank, {n: m.shape for n, m in self.modules.items()})
        return self.map(lambda _, m: truncated(m, rank, energy))

    def prune(self, keep: float, by: Literal["magnitude", "rows"] = "magnitude") -> TaskVector:
        """The largest part of every matrix, the rest set to zero.

        Shares are taken per matrix, so no module vanishes because its entries are smaller than another's, and one
        dense matrix at a time is enough.

        Args:
            keep: Share to keep, in (0, 1].
            by: ``magnitude``: entries of ΔW with the largest absolute value; the result is dense. ``rows``: rows of ΔW
                with the largest norm (Li et al. 2504.10957, Corollary 2); factors stay factors.
        """
        check_share("keep", keep)
        if by == "magnitude":
            return self.map(lambda _, m: largest_entries(m, keep))
        if by == "rows":
            return self.map(lambda _, m: largest_rows(m, keep))
        raise VectorError(f"by must be magnitude or rows, not {by!r}")

    def digest(self) -> str:
        """SHA-256 over names, shapes and values (not metadata)."""
        h = hashlib.sha256()
        for name, m in self.modules.items():
            for letter, t in m.tensors().items():
                h.update(f"{name}{'.W' if letter == 'W' else ''}{tuple(t.shape)}".encode())
                h.update(t.cpu().contiguous().numpy().data)
        return h.hexdigest()

    def save(self, path: Path) -> None:
        """Write it as safetensors; read back it is the same bit for bit."""
        _write(path, self.modules, self.meta)

    @classmethod
    def load(cls, path: Path) -> TaskVector:
        """Read what :meth:`save` wrote, now or in version 1."""
        modules, meta = _read(path)
        try:
            return cls(modules, meta)
        except VectorError as e:
            raise VectorError(f"{path}: {e}") from e


def analogy(a: TaskVector, b: TaskVector, c: TaskVector) -> TaskVector:
    """tau_c + (tau_b - tau_a): "a is to b as c is to ..." (Ilharco et al. 2212.04089, section 5)."""
    return TaskVector.sum((c, b, -a))


def _refuse_clashes(changes: Mapping[str, Iterable[Change]], done: str) -> None:
    shapes = {n: list(dict.fromkeys(m.shape for m in ms)) for n, ms in changes.items()}
    clash = [f"{n} {' and '.join(map(str, s))}" for n, s in shapes.items() if len(s) > 1]
    if clash:
        raise VectorError(f"vectors of different models cannot be {done}: {listed(clash)}")


def _norm(m: Change) -> float:
    return max(m.dot(m), 0.0) ** 0.5


def _ratio(dot: float, scale: float) -> float:
    return max(-1.0, min(1.0, dot / scale)) if scale else 0.0
