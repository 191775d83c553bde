"""Which stored tensor a module of a vector changes: told by the model's own class, never by looks.

A checkpoint may name its tensors otherwise than the model does (without the prefix of its body, or by names of old that
transformers changes on loading), may lack a weight that transformers puts together from others, and may keep it as
(in, out). The class that ``config.json`` names knows all this without a weight being read. It
takes seconds to ask, so where it is known what it says (:mod:`unlearn.streamed.known`) it is not asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.changes import listed
from unlearn.errors import ModelError, VectorError
from unlearn.streamed.known import plain
from unlearn.streamed.layout import Checkpoint, Shard, Stored

if TYPE_CHECKING:
    from torch import nn

    from unlearn.architecture import Architecture

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_HEADS = ("lm_head.weight", "embed_out.weight")
FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that a module of the vector changes.

    Attributes:
        module: The vector's name of the module.
        weight: The model's name of its weight.
        shard, stored: Where it lies.
        transposed: Whether it is kept as (in, out), as GPT-2's Conv1D does.
    """

    module: str
    weight: str
    shard: Shard
    stored: Stored
    transposed: bool


@dataclass(frozen=True, slots=True)
class _Names:
    """Stored names by the model's names, and what transformers makes out of other tensors on loading."""

    stored: Mapping[str, tuple[str, ...]]
    made: Mapping[str, tuple[str, ...]]


def targets_of(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]]) -> tuple[Target, ...]:
    """Find the tensor of every module of a vector, in the vector's order.

    Args:
        shapes: Module -> ``(out, in)`` of its change.

    Raises:
        VectorError: modules that have no tensor of their own in the checkpoint, or one of another shape, quantised or
            in float64; all of them are listed.
        ModelError: a quantised model, or an adapter's folder.
    """
    refuse_adapter(checkpoint.folder)
    there = checkpoint.tensors()
    config = _config(checkpoint.folder)
    _refuse_endless(checkpoint.folder, config, len(there))
    if plain(config, there, shapes):
        found = [Target(module, f"{module}.weight", *there[f"{module}.weight"], False) for module in shapes]
        if all(t.stored.shape == shapes[t.module] and t.stored.format in FLOATS for t in found):
            return tuple(found)
    return asked(checkpoint, shapes)


def asked(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]]) -> tuple[Target, ...]:
    """The same by the model's own class, whatever it is.

    Raises:
        VectorError, ModelError: as above.
    """
    from unlearn.architecture import lay_out, model_of

    there = checkpoint.tensors()
    model = model_of(checkpoint.folder)
    if getattr(model.config, "quantization_config", None):
        raise ModelError(
            f"{checkpoint.folder}: it is quantised (quantization_config in its config.json): give the model in full "
            "precision"
        )
    layout = lay_out(model)
    names = _names(model, there)
    found: list[Target] = []
    wrong: list[str] = []
    taken: dict[str, str] = {}
    for module, shape in shapes.items():
        weight = _weight_of(module, layout)
        owner = taken.setdefault(weight, module)
        why = f"the same weight as {owner}" if owner != module else _misfit(weight, shape, layout, names, there)
        if why is None:
            shard, stored = there[names.stored[weight][0]]
            found.append(Target(module, weight, shard, stored, layout.linear[weight]))
        else:
            wrong.append(f"{module}: {why}")
    if wrong:
        lines = "\n  ".join(wrong)
        raise VectorError(
            f"the vector does not fit {checkpoint.folder}; was it made from another model? Nothing is written.\n"
            f"  {lines}"
        )
    return tuple(found)


def refuse_adapter(folder: Path) -> None:
    """Raise where an adapter lies beside the weights, which transformers loads with them unasked.

    Raises:
        ModelError: there is one.
    """
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: it holds an adapter (adapter_config.json), which would be put on the edited weights "
            "whenever they are loaded: merge it first, or move it elsewhere"
        )


def copies(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors that are stored a second time, under the name of a head that ``config.json`` ties to the embeddings.

    Raises:
        ModelError: such a head has other values. transformers then does not tie it, other readers do.
    """
    there, config = checkpoint.tensors(), _config(checkpoint.folder)
    if config.get("tie_word_embeddings") is False or not any(name.endswith(_HEADS) for name in there):
        return frozenset()  # the class is asked only where it must be
    from safetensors import safe_open

    from unlearn.architecture import architecture_of
    from unlearn.vector_adapter import same_values

    layout = architecture_of(checkpoint.folder)
    stored = {layout.canonical(name): name for name in there}
    found = {stored[two]: stored[one] for two, one in layout.tied.items() if two in stored and one in stored}
    for second, first in found.items():
        with safe_open(there[second][0].path, framework="pt") as file:
            if not same_values(file.get_slice(second), there[first][0].path, first):
                raise ModelError(
                    f"{checkpoint.folder}: its config.json ties {second} to {first}, and both are stored, with other "
                    "values: set tie_word_embeddings to false there if the stored head is meant, as transformers does"
                )
    return frozenset(found)


def _config(folder: Path) -> Mapping[str, Any]:
    """Of a configuration that cannot be read nothing; that is said better by who reads it for good."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _refuse_endless(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    """A configuration can ask for any number of layers, each of which takes time to lay out."""
    for key in _LAYERS:
        count = config.get(key)
        if isinstance(count, int) and count > tensors:
            raise ModelError(f"{folder}: its config.json says {key} {count}, but there are only {tensors} tensors")


def _weight_of(module: str, layout: Architecture) -> str:
    """The model's name of a module's weight; vectors of a model's body alone lack the prefix."""
    weight = f"{module}.weight"
    known = weight in layout.linear or weight in layout.others
    longer = layout.prefix + weight
    return longer if not known and longer in layout.linear else weight


def _misfit(
    weight: str,
    shape: tuple[int, int],
    layout: Architecture,
    names: _Names,
    there: Mapping[str, tuple[Shard, Stored]],
) -> str | None:
    """Why a weight cannot be changed in the files, or None."""
    if weight not in layout.linear:
        return layout.why_not(weight)
    parts = names.made.get(weight)
    if parts:
        return f"transformers makes its weight out of {listed(parts)} on loading, so it is not in the files as it is"
    stored = names.stored.get(weight, ())
    if not stored:
        more = "; transformers makes weights of this model out of others on loading" if names.made else ""
        return f"the checkpoint holds no {weight}{more}"
    if len(stored) > 1:
        return f"the checkpoint holds its weight {len(stored)} times, as {listed(stored)}"
    tensor = there[stored[0]][1]
    if tensor.format == "F64":
        return "its weight is stored as F64, and edits are computed in float32: convert the model to float32 first"
    if tensor.format not in FLOATS:
        return f"its weight is stored as {tensor.format}: give the model in full precision"
    wanted = shape[::-1] if layout.linear[weight] else shape
    if tensor.shape != wanted:
        return f"the vector changes {wanted}, the checkpoint has {tensor.shape}"
    return None


def _names(model: nn.Module, stored: Iterable[str]) -> _Names:
    """Name all tensors as loading them would: transformers' own rules, in its own order."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as e:
        raise ModelError(
            f"this version of transformers does not tell how it names weights on loading ({e}): use the versions of "
            "constraints.txt"
        ) from e
    state: dict[str, Any] = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    plain: dict[str, list[str]] = {}
    made: dict[str, list[str]] = {}
    for name in sorted(stored, key=dot_natural_key):
        loaded, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if loaded not in state and name in state:
            loaded, pattern = rename_source_key(name, [], [], prefix, state)
        (plain if pattern is None else made).setdefault(loaded, []).append(name)
    return _Names({n: tuple(s) for n, s in plain.items()}, {n: tuple(s) for n, s in made.items()})
