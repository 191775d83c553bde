"""A task vector from two checkpoints: tau = theta_finetuned - theta, one weight at a time.

Ilharco et al. (2212.04089, section 2) define it so, for full fine-tuning. Both folders are safetensors, which are
mapped into memory: at no time is more than one weight of each held as numbers, beside the vector itself.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unlearn.architecture import Architecture, architecture_of
from unlearn.changes import Change, Dense, listed
from unlearn.compress import check_rank, check_terms, truncated
from unlearn.console import progress
from unlearn.errors import VectorError
from unlearn.fetch import INDEX as _INDEX
from unlearn.fetch import SINGLE as _SINGLE
from unlearn.fetch import doubled_weights
from unlearn.vector import TaskVector
from unlearn.vector_adapter import TRANSPOSED

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_ROUNDED = frozenset({"F16", "BF16"})


@dataclass(frozen=True)
class CheckpointReport:
    """What became of the tensors of two checkpoints.

    Attributes:
        unchanged: Tensors that are the same in both, so left out.
        unequal: Tensors that differ and cannot be in the vector -> why.
        left_out: Frobenius norm of the changes of ``unequal`` tensors, of those that can be subtracted.
        warnings: What to know before the vector is used.
    """

    unchanged: tuple[str, ...]
    unequal: Mapping[str, str]
    left_out: float
    warnings: tuple[str, ...]


def from_checkpoints(
    base: Path,
    finetuned: Path,
    *,
    on_unequal: Literal["error", "skip"],
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[TaskVector, CheckpointReport]:
    """Subtract two folders of safetensors in float32, weight by weight of the linear layers.

    Args:
        base: A model's folder; its ``config.json`` says which weights are linear and how they are stored.
        finetuned: The same model after fine-tuning.
        on_unequal: What to do about tensors that differ but cannot be in a vector (norms, embeddings, biases, tied
            weights, no floating-point numbers, other shapes, in one checkpoint only): raise, or leave them out and
            name them in the report.
        rank, energy: Truncate each difference at once (:func:`unlearn.compress.truncated`), so that no dense one is
            kept; else the vector is dense and as large as the changed weights in float32.

    Raises:
        VectorError: a folder that is no checkpoint in safetensors; unequal tensors; nothing changed; a difference
            that is not finite; a rank above a matrix.
    """
    if rank is not None and energy is not None:
        raise VectorError("give rank or energy, not both, to say how much is kept")
    check_terms(rank, energy)
    model = architecture_of(base)
    comparison = _Comparison(_weights(base, model), _weights(finetuned, model), model)
    with progress("comparing", comparison.tensors) as advance:
        linear = comparison.sort_out(advance)
        if on_unequal == "error" and comparison.unequal:
            raise VectorError(_unequal_message(base, finetuned, comparison.unequal))
        check_rank(rank, {name: comparison.shape(name) for name in linear})
        modules: dict[str, Change] = {}
        for name, difference in comparison.differences(linear):
            if difference is not None:
                change = Dense(difference)
                modules[name] = truncated(change, rank, energy) if rank or energy else change
            advance(1)
    if comparison.not_finite:
        raise VectorError(f"{finetuned} less {base} is not finite in {listed(comparison.not_finite)}")
    if not modules:
        raise VectorError(f"{finetuned} and {base} do not differ in any linear layer: there is no vector")
    meta = {
        "source": "checkpoints",
        "base": base.resolve().name,
        "finetuned": finetuned.resolve().name,
        TRANSPOSED: "true" if any(model.linear[f"{name}.weight"] for name in modules) else "false",
    }
    return TaskVector(modules, meta), comparison.report()


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of a file: number format (``BF16``) and shape as the file's header gives them."""

    path: Path
    name: str
    format: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The values. The file is opened for them alone, so that its pages go when they do."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
            return tensor


def _weights(folder: Path, model: Architecture) -> dict[str, _Stored]:
    """The tensors of a folder under the names the model gives them; only headers are read."""
    found: dict[str, _Stored] = {}
    for file, wanted in _files(folder).items():
        with _opened(folder / file) as opened:
            there = list(opened.keys())
            if missing := sorted(set(wanted) - set(there)):
                raise VectorError(f"{folder / file}: {_INDEX} says it holds {listed(missing)}, which it does not")
            for name in wanted or there:
                part = opened.get_slice(name)
                stored = _Stored(folder / file, name, part.get_dtype(), tuple(part.get_shape()))
                found[model.canonical(name)] = stored
    for second, first in model.tied.items():
        if second in found and first not in found:
            found[first] = found.pop(second)
        elif second in found and _alike(found[first], found[second]):
            del found[second]  # a copy: the model has the one weight
    return found


def _alike(one: _Stored, two: _Stored) -> bool:
    """Whether two tensors are the same, in the same format."""
    return (one.format, one.shape) == (two.format, two.shape) and torch.equal(_bytes(one.read()), _bytes(two.read()))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as e:
        raise VectorError(f"{path}: cannot be read: {e}") from e


@dataclass
class _Comparison:
    """What is found out along the way."""

    old: Mapping[str, _Stored]
    new: Mapping[str, _Stored]
    model: Architecture
    unchanged: list[str] = field(default_factory=list)
    unequal: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    left_out: float = 0.0  # squared
    rounded: int = 0  # matrices in 16 bits that differ, their elements, and how many of these do not
    elements: int = 0
    same: int = 0

    @property
    def tensors(self) -> int:
        return len({*self.old, *self.new})

    def shape(self, name: str) -> tuple[int, int]:
        """``(out, in)`` of a linear weight."""
        rows, columns = self.old[name].shape
        return (columns, rows) if self.model.linear[name] else (rows, columns)

    def sort_out(self, advance: Any) -> list[str]:
        """Decide on all tensors but the weights of linear layers, which are returned by name."""
        linear = []
        for name in dict.fromkeys((*self.old, *self.new)):
            why = self._misfit(name)
            if why is not None:
                self.unequal[name] = why
            elif name in self.model.linear and len(self.old[name].shape) == 2 and self._floating(name):
                linear.append(name)
                continue
            elif self._equal(name):
                self.unchanged.append(name)
            else:
                formats = "/".join(dict.fromkeys(self._formats(name)))
                self.unequal[name] = self.model.why_not(name) if self._floating(name) else f"stored as {formats}"
            advance(1)
        return linear

    def differences(self, linear: Iterable[str]) -> Iterator[tuple[str, Tensor | None]]:
        """Module and change ``(out, in)`` in float32; None where there is none, or no finite one."""
        for name in linear:
            difference = self._subtract(name)
            module = name.removesuffix(".weight")
            if not bool(torch.isfinite(difference).all()):
                self.not_finite.append(module)
                yield module, None
                continue
            differing = int(difference.count_nonzero())
            if not differing:
                self.unchanged.append(name)
                yield module, None
                continue
            if not _ROUNDED.isdisjoint(self._formats(name)):
                self.rounded += 1
                self.elements += difference.numel()
                self.same += difference.numel() - differing
            yield module, (difference.T if self.model.linear[name] else difference).contiguous()

    def report(self) -> CheckpointReport:
        warnings = []
        if self.rounded:
            warnings.append(
                f"{self.rounded} of the changed matrices are stored in 16 bits: their differences are of rounded "
                f"numbers, and {self.same / self.elements:.0%} of their elements do not differ at all"
            )
        return CheckpointReport(tuple(self.unchanged), dict(self.unequal), self.left_out**0.5, tuple(warnings))

    def _misfit(self, name: str) -> str | None:
        first = self.model.tied.get(name)
        if first is not None and not (name in self.old and name in self.new):
            folder = "base" if name in self.old else "fine-tuned checkpoint"
            return f"stored in the {folder} with other values than {first}, to which config.json ties it"
        if name not in self.new:
            return "in the base only"
        if name not in self.old:
            return "in the fine-tuned checkpoint only"
        one, two = self.old[name].shape, self.new[name].shape
        return None if one == two else f"shapes {one} and {two}"

    def _formats(self, name: str) -> tuple[str, str]:
        return self.old[name].format, self.new[name].format

    def _floating(self, name: str) -> bool:
        return _FLOATS.issuperset(self._formats(name))

    def _equal(self, name: str) -> bool:
        one, two = self.old[name].read(), self.new[name].read()
        if one.dtype == two.dtype and torch.equal(_bytes(one), _bytes(two)):
            return True
        if not self._floating(name):
            return False
        difference = self._subtract(name)
        norm = float(difference.double().square().sum())
        self.left_out += norm if norm < float("inf") else 0.0
        return norm == 0.0

    def _subtract(self, name: str) -> Tensor:
        wide = torch.float64 if "F64" in self._formats(name) else torch.float32
        return (self.new[name].read().to(wide) - self.old[name].read().to(wide)).float()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _files(folder: Path) -> dict[str, list[str]]:
    """Weight file -> the tensors its index expects in it; none listed means all it holds."""
    if (folder / _SINGLE).is_file():
        _refuse_doubled(folder, ())
        return {_SINGLE: []}
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        placed = dict(index["weight_map"])
    except FileNotFoundError as e:
        pickled = " (weights pickled as .bin can run any code and are never opened)" if _has_pickle(folder) else ""
        raise VectorError(f"{folder}: it has neither {_SINGLE} nor {_INDEX}{pickled}") from e
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise VectorError(f"{folder / _INDEX}: damaged: {e!r}") from e
    files: dict[str, list[str]] = {}
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name, file in placed.items():
        if not isinstance(file, str) or file not in there or not file.endswith(".safetensors"):
            said = f"{listed([str(name)])} is said to be in {listed([repr(file)])}"
            raise VectorError(f"{folder / _INDEX}: {said}, which is no file in that folder")
        files.setdefault(file, []).append(name)
    _refuse_doubled(folder, files)
    return files


def _refuse_doubled(folder: Path, shards: Collection[str]) -> None:
    if said := doubled_weights(folder, shards):
        raise VectorError(said)


def _has_pickle(folder: Path) -> bool:
    return any(folder.glob("*.bin"))


def _unequal_message(base: Path, finetuned: Path, unequal: Mapping[str, str]) -> str:
    """Grouped by reason: after full fine-tuning there are many of the same kind."""
    groups: dict[str, list[str]] = {}
    for name, why in unequal.items():
        groups.setdefault(why, []).append(name)
    lines = [f"  {why} ({len(names)}): {listed(names)}" for why, names in groups.items()]
    return "\n".join(
        [
            f"{finetuned} differs from {base} in {len(unequal)} tensors that a task vector cannot hold; skip them "
            "(--skip-unequal) to take the linear layers alone:",
            *lines,
        ]
    )
