"""Task vectors: what a fine-tuning changed, as a value that can be added, scaled, compared and kept.

A task vector is the change weight by weight: tau = theta_finetuned - theta (Ilharco et al. 2212.04089, section 2).
After LoRA it is ``B @ A`` per module, kept as the two thin factors, in float32, with LoRA's scale alpha/r folded into
``B``. After full fine-tuning it is dense.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from numbers import Real
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unlearn.errors import ModelError, VectorError
from unlearn.store.files import some
from unlearn.vector.change import (
    Change,
    Dense,
    LowRank,
    check_rank,
    check_share,
    check_terms,
    largest_entries,
    largest_rows,
    total,
    truncated,
)

FORMAT = "unlearn.task_vector"
VERSION = "2"
VECTOR_FILE, ADAPTER_CONFIG = "vector.safetensors", "adapter_config.json"
# What safetensors and torch say of a damaged file, an unknown number format, shapes beyond 64 bits, a lack of memory.
UNREADABLE = (
    *(SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError),
    MemoryError,
)
_KINDS = {"1": [["A", "B"]], "2": [["A", "B"], ["W"]]}  # version -> what the tensors of a module may be called


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TaskVector:
    """A change of a model: module path -> :data:`Change`, with string metadata about where it came from.

    Vectors add and scale as the dense changes they stand for. Sums of factors concatenate along r, so they stay exact
    and low-rank; a sum with a dense change is dense. A module that only one operand names is unchanged by the other.
    A vector without a module, or with a value that is not finite, is refused, also as the result of an operation.
    """

    modules: Mapping[str, Change]
    meta: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            raise VectorError("a task vector without a single module changes nothing")
        bad = [n for n, m in self.modules.items() if not all(bool(t.isfinite().all()) for t in m.tensors().values())]
        if bad:
            raise VectorError(f"the vector holds values that are not finite in {len(bad)} modules: {some(bad)}")
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    def map(self, change: Callable[[str, Change], Change]) -> TaskVector:
        """The vector whose change of each module is ``change(name, the change here)``; the metadata stays."""
        return TaskVector({n: change(n, m) for n, m in self.modules.items()}, self.meta)

    def __mul__(self, c: float) -> TaskVector:
        return self.map(lambda _, m: m.scaled(float(c))) if isinstance(c, Real) else NotImplemented

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
        return TaskVector.sum((self, other)) if isinstance(other, TaskVector) else NotImplemented

    def __radd__(self, other: Any) -> TaskVector:
        """``0 + vector``, with which the builtin ``sum()`` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: TaskVector) -> TaskVector:
        return TaskVector.sum((self, -other)) if isinstance(other, TaskVector) else NotImplemented

    @classmethod
    def sum(cls, vectors: Iterable[TaskVector]) -> TaskVector:
        """The exact sum (Ilharco et al., "addition"). Metadata are the first one's wherever several speak."""
        changes: dict[str, list[Change]] = {}
        meta: dict[str, str] = {}
        for vector in vectors:
            meta = {**vector.meta, **meta}
            for name, m in vector.modules.items():
                changes.setdefault(name, []).append(m)
        _refuse_clashes(changes, "added")
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
        """Cosine similarity of two whole changes; 0 where one of them is zero."""
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
        check_terms(rank, energy, required=True)
        check_rank(rank, {n: m.shape for n, m in self.modules.items()})
        return self.map(lambda _, m: truncated(m, rank, energy))

    def prune(self, keep: float, by: Literal["magnitude", "rows"] = "magnitude") -> TaskVector:
        """The largest part of every matrix, the rest set to zero. Shares are taken per matrix, so no module vanishes.

        Args:
            keep: Share to keep, in (0, 1].
            by: ``magnitude``: entries of ΔW with the largest absolute value; the result is dense. ``rows``: rows of ΔW
                with the largest norm (Li et al. 2504.10957, Corollary 2); factors stay factors.
        """
        check_share("keep", keep)
        smaller: Callable[[Change, float], Change] = {"magnitude": largest_entries, "rows": largest_rows}[by]
        return self.map(lambda _, m: smaller(m, keep))

    def __repr__(self) -> str:
        head = {"rank": str(self.rank())} if all(m.rank < min(m.shape) for m in self.modules.values()) else {}
        facts = {"modules": str(len(self.modules)), **head, "norm": f"{self.norm():.4g}"}
        return f"TaskVector({', '.join(f'{key}={value}' for key, value in facts.items())})"

    def _repr_html_(self) -> str:
        """A small table for notebooks: the modules by what they are called within their layer."""
        kinds: dict[str, list[str]] = {}
        for name in self.modules:
            kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
        norms = self.norms()
        rows = "".join(
            f"<tr><td>{escape(kind)}</td><td>{len(names)}</td><td>{max(self.modules[n].rank for n in names)}</td>"
            f"<td>{math.hypot(*(norms[n] for n in names)):.4g}</td></tr>"
            for kind, names in kinds.items()
        )
        head = "<tr><th>modules</th><th>number</th><th>rank</th><th>norm</th></tr>"
        return f"<div>{escape(repr(self))}</div><table>{head}{rows}</table>"

    @classmethod
    def from_peft(cls, adapter: str | Path) -> TaskVector:
        """Of a LoRA adapter as PEFT saves it: a folder, or a hub id."""
        from unlearn.model.locate import vector_place
        from unlearn.recipe.schema import ModelSpec
        from unlearn.vector.interop import from_adapter

        try:
            place = vector_place(ModelSpec(path=str(adapter)), Path.cwd())
        except ModelError as e:
            raise VectorError(str(e).removeprefix("model.path: ")) from e
        assert place is not None  # a hub id was fetched
        return from_adapter(place)

    @classmethod
    def from_peft_model(cls, model: Any) -> TaskVector:
        """Of the active LoRA of a ``PeftModel`` in memory."""
        from peft import PeftModel

        from unlearn.vector.interop import from_adapter

        if not isinstance(model, PeftModel):
            raise VectorError(f"a {type(model).__name__} is no PeftModel: there is no adapter to be read")
        names = list(model.active_adapters)
        if len(names) != 1:
            raise VectorError(f"one adapter must be active, and {len(names)} are: model.set_adapter(name) chooses one")
        with TemporaryDirectory(prefix="unlearn-") as folder:
            # its own files say all that an adapter may hold beside factors, which is then refused
            model.save_pretrained(folder, selected_adapters=names, save_embedding_layers=False)
            place = Path(folder, *([] if names == ["default"] else names))
            try:
                vector = from_adapter(place)
            except VectorError as e:
                raise VectorError(f"adapter {names[0]!r}: {str(e).removeprefix(f'{place}: ')}") from e
        if vector.norm() == 0.0:
            raise VectorError(f"adapter {names[0]!r} changes nothing: it was not trained")
        return vector

    @classmethod
    def from_checkpoints(cls, base: str | Path, finetuned: str | Path, *, rank: int | None = None) -> TaskVector:
        """What a fine-tuning changed, from two folders of safetensors; ``rank`` truncates every module's change."""
        from unlearn.vector.interop import from_checkpoints

        return from_checkpoints(Path(base), Path(finetuned), on_unequal="error", rank=rank)[0]

    def digest(self) -> str:
        """SHA-256 over names, shapes and values (not metadata)."""
        h = hashlib.sha256()
        for name, m in self.modules.items():
            for letter, t in m.tensors().items():
                h.update(f"{name}{'.W' if letter == 'W' else ''}{tuple(t.shape)}".encode())
                h.update(t.cpu().contiguous().numpy().data)
        return h.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, the same bytes each time; read back it is the same bit for bit."""
        path = Path(path)
        tensors = {f"{n}.{letter}": t for n, m in self.modules.items() for letter, t in m.tensors().items()}
        head = {"format": FORMAT, "version": VERSION, "meta": json.dumps(dict(self.meta))}
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path, head)
        with path.open("r+b") as file:  # the library writes metadata in an order of chance
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) | {"__metadata__": head}
            settled = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            assert len(settled) <= length
            file.seek(8)
            file.write(settled.ljust(length))

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Read what :meth:`save` wrote, now or in version 1."""
        if Path(path).is_dir():
            raise VectorError(f"{path}: a folder, and no file of a vector; from_peft reads that of an adapter")
        try:
            with safe_open(path, framework="pt") as f:
                head = f.metadata() or {}
                if head.get("format") != FORMAT:
                    raise VectorError("not a task vector of this program; an adapter of PEFT's is read from its folder")
                version = head.get("version")
                if version not in _KINDS:
                    raise VectorError(f"written as version {version}, this program reads up to {VERSION}")
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - a safe_open has no __iter__
            return cls(_changes(tensors, _KINDS[version]), _meta(head.get("meta", "{}")))
        except VectorError as e:
            raise VectorError(f"{path}: {e}") from e
        except UNREADABLE as e:
            raise VectorError(f"{path}: cannot be read as a task vector: {e}") from e


def read_vector(place: Path) -> TaskVector:
    """A vector from its file, the folder of its stage, or that of a LoRA adapter of PEFT's."""
    if place.is_dir() and not (place / VECTOR_FILE).is_file():
        from unlearn.vector.interop import from_adapter  # brings transformers, which takes seconds

        return from_adapter(place)
    return TaskVector.load(place / VECTOR_FILE if place.is_dir() else place)


def analogy(a: TaskVector, b: TaskVector, c: TaskVector) -> TaskVector:
    """tau_c + (tau_b - tau_a): "a is to b as c is to ..." (Ilharco et al. 2212.04089, section 5)."""
    return TaskVector.sum((c, b, -a))


def _changes(tensors: Mapping[str, Tensor], kinds: Sequence[list[str]]) -> dict[str, Change]:
    """The changes that a file's tensors, ``MODULE.A`` and ``MODULE.B`` or ``MODULE.W``, make up."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, letter = key.rpartition(".")
        parts.setdefault(name, {})[letter] = tensor
    if strange := [n for n, found in parts.items() if not n or sorted(found) not in kinds]:
        keys = sorted(key for key in tensors if key.rpartition(".")[0] in strange)
        needed = "A and B" + (", or W" if ["W"] in kinds else "")
        raise VectorError(f"of every module it must hold {needed}, and nothing else; it is otherwise for {some(keys)}")
    return {n: Dense(p["W"]) if "W" in p else LowRank(p["A"], p["B"]) for n, p in parts.items()}


def _meta(text: str) -> dict[str, str]:
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise VectorError(f"its metadata is damaged: {text[:80]}")
    return meta


def _refuse_clashes(changes: Mapping[str, Iterable[Change]], done: str) -> None:
    shapes = {n: list(dict.fromkeys(m.shape for m in ms)) for n, ms in changes.items()}
    clash = [f"{n} {' and '.join(map(str, s))}" for n, s in shapes.items() if len(s) > 1]
    if clash:
        raise VectorError(f"vectors of different models cannot be {done}: {some(clash)}")


def _norm(m: Change) -> float:
    return max(m.dot(m), 0.0) ** 0.5


def _ratio(dot: float, scale: float) -> float:
    return max(-1.0, min(1.0, dot / scale)) if scale else 0.0
