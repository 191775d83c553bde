"""Which stored tensor a module of a vector changes: told by the model's own class, never by looks.

A checkpoint may name its tensors otherwise than the model does (without the prefix of its body, or by names of old that
transformers changes on loading), may lack a weight that transformers puts together from others, and may keep it as
(in, out). The class that ``config.json`` names knows all this without a weight being read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.errors import ModelError, VectorError
from unlearn.model.checkpoint import Checkpoint, Stored
from unlearn.vector.change import listed

if TYPE_CHECKING:
    from torch import nn

    from unlearn.model.load import Architecture

_HEADS = ("lm_head.weight", "embed_out.weight")
FLOATS = frozenset({"F32", "F16", "BF16"})
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Importing transformers and laying a model out takes seconds, more than editing a small one. For these families the
# names say it all, which a test holds against what their classes say: model_type -> linear layers, stored as (out, in).
_GATED = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
_LINEAR: Mapping[str, str] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _GATED),
    "phi": r"self_attn\.([qkv]_proj|dense)|mlp\.fc[12]",
}
# no other name may be there: transformers would rename it, perhaps to one of these
_STORED = re.compile(r"(model\.(layers\.\d+\.[a-z_.0-9]+|embed_tokens|norm|final_layernorm)|lm_head)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor that a module of the vector changes, and whether it is kept as (in, out), as GPT-2's Conv1D does."""

    module: str
    stored: Stored
    transposed: bool


def targets_of(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]]) -> tuple[Target, ...]:
    """Find the tensor of every module of a vector, given as module -> ``(out, in)``, in that order.

    Raises:
        VectorError: modules that have no tensor of their own in the checkpoint, or one of another shape, quantised or
            in float64; all of them are listed.
        ModelError: a quantised model, or an adapter's folder.
    """
    refuse_adapter(checkpoint.folder)
    there, config = checkpoint.tensors, _config(checkpoint.folder)
    for key in _LAYERS:  # a configuration can ask for any number of layers, each of which takes time to lay out
        if isinstance(count := config.get(key), int) and count > len(there):
            raise ModelError(
                f"{checkpoint.folder}: its config.json says {key} {count}, but there are only {len(there)} tensors"
            )
    if plain(config, there, shapes):
        found = [Target(module, there[f"{module}.weight"], False) for module in shapes]
        if all(t.stored.shape == shapes[t.module] and t.stored.format in FLOATS for t in found):
            return tuple(found)
    return asked(checkpoint, shapes)


def plain(config: Mapping[str, Any], stored: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether every module is certainly a linear layer with a stored weight ``MODULE.weight`` of its own."""
    linear, layers, names = _LINEAR.get(str(config.get("model_type"))), config.get("num_hidden_layers"), set(stored)
    if linear is None or type(layers) is not int or config.get("quantization_config") or config.get("auto_map"):
        return False
    known = re.compile(rf"model\.layers\.(0|[1-9][0-9]*)\.({linear})")
    found = [(known.fullmatch(module), f"{module}.weight" in names) for module in modules]
    return all(map(_STORED.fullmatch, names)) and all(m and int(m[1]) < layers and there for m, there in found)


def asked(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, int]]) -> tuple[Target, ...]:
    """:func:`targets_of` by the model's own class, whatever it is."""
    from unlearn.model.load import lay_out, model_of

    model = model_of(checkpoint.folder)
    if getattr(model.config, "quantization_config", None):
        raise ModelError(
            f"{checkpoint.folder}: it is quantised (quantization_config in its config.json): give the model in full "
            "precision"
        )
    layout = lay_out(model)
    names, made = _names(model, checkpoint.tensors)
    found: list[Target] = []
    wrong: list[str] = []
    taken: dict[str, str] = {}
    for module, shape in shapes.items():
        weight = layout.canonical(f"{module}.weight")
        owner = taken.setdefault(weight, module)
        stored = [checkpoint.tensors[name] for name in names.get(weight, ())]
        if owner != module:
            wrong.append(f"{module}: the same weight as {owner}")
        elif why := _misfit(weight, shape, layout, stored, made):
            wrong.append(f"{module}: {why}")
        else:
            found.append(Target(module, stored[0], layout.linear[weight]))
    if wrong:
        raise VectorError(
            f"the vector does not fit {checkpoint.folder}; was it made from another model? Nothing is written.\n  "
            + "\n  ".join(wrong)
        )
    return tuple(found)


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError where an adapter lies beside the weights, which transformers loads with them unasked."""
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder}: it holds an adapter (adapter_config.json), which would be put on the edited weights whenever "
            "they are loaded: merge it first, or move it elsewhere"
        )


def copies(checkpoint: Checkpoint) -> frozenset[str]:
    """Tensors that are stored a second time, under the name of a head that ``config.json`` ties to the embeddings.

    A head of other values is refused: transformers then does not tie it, other readers do.
    """
    there, files, config = checkpoint.tensors, checkpoint.files, _config(checkpoint.folder)
    # the class is asked only where it must be: those of the families that are known tie nothing unless they are told to
    tied = config.get("tie_word_embeddings", config.get("model_type") not in _LINEAR)
    if tied is False or not any(name.endswith(_HEADS) for name in there):
        return frozenset()
    from safetensors import safe_open

    from unlearn.model.load import architecture_of
    from unlearn.vector.interop import same_values

    layout = architecture_of(checkpoint.folder)
    stored = {layout.canonical(name): name for name in there}
    found = {stored[two]: stored[one] for two, one in layout.tied.items() if two in stored and one in stored}
    for second, first in found.items():
        with safe_open(files[there[second].file], framework="pt") as file:
            if not same_values(file.get_slice(second), files[there[first].file], first):
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


def _misfit(
    weight: str,
    shape: tuple[int, int],
    layout: Architecture,
    stored: list[Stored],
    made: Mapping[str, tuple[str, ...]],
) -> str | None:
    """Why a weight cannot be changed in the files, or None."""
    if weight not in layout.linear:
        return layout.why_not(weight)
    if weight in made:
        return f"transformers makes its weight out of {listed(made[weight])} on loading, so it is not in the files"
    if not stored:
        more = "; transformers makes weights of this model out of others on loading" if made else ""
        return f"the checkpoint holds no {weight}{more}"
    if len(stored) > 1:
        return f"the checkpoint holds its weight {len(stored)} times, as {listed([t.name for t in stored])}"
    tensor, wanted = stored[0], shape[::-1] if layout.linear[weight] else shape
    if tensor.format == "F64":
        return "its weight is stored as F64, and edits are computed in float32: convert the model to float32 first"
    if tensor.format not in FLOATS:
        return f"its weight is stored as {tensor.format}: give the model in full precision"
    if tensor.shape != wanted:
        return f"the vector changes {wanted}, the checkpoint has {tensor.shape}"
    return None


def _names(
    model: nn.Module, stored: Iterable[str]
) -> tuple[Mapping[str, tuple[str, ...]], Mapping[str, tuple[str, ...]]]:
    """Stored names by the model's, as loading names them, and the weights that loading makes out of several."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state: dict[str, Any] = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "")
    rules = get_model_conversion_mapping(model) or []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for name in sorted(stored, key=dot_natural_key):
        loaded, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if loaded not in state and name in state:
            loaded, pattern = rename_source_key(name, [], [], prefix, state)
        found[pattern is not None].setdefault(loaded, []).append(name)
    names, made = ({n: tuple(s) for n, s in part.items()} for part in found)
    return names, made
