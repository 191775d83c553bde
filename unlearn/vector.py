"""Task vectors kept as low-rank factors.

A task vector is the change a fine-tuning made, weight by weight: tau = theta_finetuned - theta
(Ilharco et al. 2212.04089, section 2). After LoRA that change is ``B @ A`` per module, so it is kept as the two
thin factors, in float32, with LoRA's scale alpha/r already folded into ``B``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unlearn.errors import VectorError

FORMAT = "unlearn.task_vector"
VERSION = "1"


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The change of one weight matrix, ``delta = B @ A``: ``A`` is ``(r, in)``, ``B`` is ``(out, r)``, float32.

    Raises:
        VectorError: shapes do not chain, the dtype is not float32, or a value is not finite.
    """

    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.A.shape[0] != self.B.shape[1]:
            raise VectorError(f"factors do not chain: A {tuple(self.A.shape)}, B {tuple(self.B.shape)}")
        if self.A.dtype != torch.float32 or self.B.dtype != torch.float32:
            raise VectorError(f"factors must be float32, not {self.A.dtype} and {self.B.dtype}")

    @property
    def rank(self) -> int:
        """r, an upper bound of the rank of ``delta``."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the weight this changes."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Tensor:
        """The dense change, ``(out, in)``. For tests and merging one weight; sums and norms never need it."""
        return self.B @ self.A

    def dot(self, other: LowRank) -> float:
        """Frobenius inner product <B A, B' A'> = tr((B^T B') (A' A^T)), in float64, without building either."""
        bb = self.B.double().T @ other.B.double()  # (r, r')
        aa = self.A.double() @ other.A.double().T  # (r, r')
        return float((bb * aa).sum())


@dataclass(frozen=True, slots=True, eq=False)
class TaskVector:
    """A change of a model: module path -> :class:`LowRank`, with string metadata about where it came from.

    Vectors add and scale as the dense changes they stand for. Sums concatenate along r, so they stay exact;
    adding factors element by element, or negating both of them, would be wrong.

    Raises:
        VectorError: no module, or a value that is not finite.
    """

    modules: Mapping[str, LowRank]
    meta: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.modules:
            raise VectorError("a task vector without a single module changes nothing")
        bad = [
            name
            for name, m in self.modules.items()
            if not (bool(torch.isfinite(m.A).all()) and bool(torch.isfinite(m.B).all()))
        ]
        if bad:
            raise VectorError(f"the vector holds values that are not finite in {len(bad)} modules: {_some(bad)}")
        object.__setattr__(self, "modules", MappingProxyType(dict(sorted(self.modules.items()))))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    def __rmul__(self, c: float) -> TaskVector:
        return TaskVector({n: LowRank(m.A, c * m.B) for n, m in self.modules.items()}, self.meta)

    def __neg__(self) -> TaskVector:
        return -1.0 * self

    def __add__(self, other: TaskVector) -> TaskVector:
        return concatenate(self, other)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return concatenate(self, -other)

    def norms(self) -> dict[str, float]:
        """Frobenius norm of the change, per module."""
        return {n: max(m.dot(m), 0.0) ** 0.5 for n, m in self.modules.items()}

    def norm(self) -> float:
        """Frobenius norm of the whole change."""
        return sum(v * v for v in self.norms().values()) ** 0.5

    def cosine(self, other: TaskVector) -> float:
        """Cosine similarity of two whole changes; modules that only one of them has count as zero in the other."""
        dot = sum(m.dot(other.modules[n]) for n, m in self.modules.items() if n in other.modules)
        scale = self.norm() * other.norm()
        return dot / scale if scale else 0.0

    def rank(self) -> int:
        """Largest r over the modules."""
        return max(m.rank for m in self.modules.values())

    def digest(self) -> str:
        """SHA-256 over names, shapes and values (not metadata)."""
        h = hashlib.sha256()
        for name, m in self.modules.items():
            for t in (m.A, m.B):
                h.update(f"{name}{tuple(t.shape)}".encode())
                h.update(t.contiguous().numpy().data)
        return h.hexdigest()

    def save(self, path: Path) -> None:
        """Write safetensors: ``<module>.A``, ``<module>.B`` and the metadata. No pickle anywhere."""
        tensors = {f"{n}.{k}": getattr(m, k).contiguous() for n, m in self.modules.items() for k in "AB"}
        save_file(tensors, path, {"format": FORMAT, "version": VERSION, "meta": json.dumps(dict(self.meta))})

    @classmethod
    def load(cls, path: Path) -> TaskVector:
        """Read what :meth:`save` wrote.

        Raises:
            VectorError: not such a file, damaged, or of a later version.
        """
        try:
            with safe_open(path, framework="pt") as f:
                head = f.metadata() or {}
                if head.get("format") != FORMAT:
                    raise VectorError(f"{path}: not a task vector of this program")
                if head.get("version") != VERSION:
                    raise VectorError(f"{path}: written as version {head.get('version')}, this program reads {VERSION}")
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 - a safe_open has no __iter__
        except (SafetensorError, OSError) as e:
            raise VectorError(f"{path}: cannot be read as a task vector: {e}") from e
        names = {k.rpartition(".")[0] for k in tensors}
        missing = [n for n in sorted(names) if f"{n}.A" not in tensors or f"{n}.B" not in tensors]
        if missing:
            raise VectorError(f"{path}: a factor is missing for {_some(missing)}")
        try:
            modules = {n: LowRank(tensors[f"{n}.A"], tensors[f"{n}.B"]) for n in names}
            return cls(modules, _read_meta(head.get("meta", "{}")))
        except VectorError as e:
            raise VectorError(f"{path}: {e}") from e


def concatenate(first: TaskVector, second: TaskVector) -> TaskVector:
    """Exact sum: per module ``[B1 B2] @ [A1; A2]``, of rank at most r1 + r2.

    Raises:
        VectorError: a module of both has different shapes.
    """
    clash = [
        f"{n} {first.modules[n].shape} and {m.shape}"
        for n, m in second.modules.items()
        if n in first.modules and first.modules[n].shape != m.shape
    ]
    if clash:
        raise VectorError(f"vectors of different models cannot be added: {_some(clash)}")
    modules = dict(first.modules)
    for name, m in second.modules.items():
        if name in modules:
            one = modules[name]
            modules[name] = LowRank(torch.cat([one.A, m.A]), torch.cat([one.B, m.B], dim=1))
        else:
            modules[name] = m
    return TaskVector(modules, {**second.meta, **first.meta})


def _read_meta(text: str) -> dict[str, str]:
    """The metadata of a file, which is a JSON object of strings."""
    try:
        meta = json.loads(text)
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise VectorError(f"its metadata is damaged: {text[:80]}")
    return meta


def _some(names: list[str], most: int = 8) -> str:
    """The first few of a long list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
