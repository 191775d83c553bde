"""The linear layers of a few families, told by ``config.json`` and the stored names alone.

Importing transformers and laying a model out takes seconds, more than editing a small one. Only what the model's own
class would say is said here, which tests hold for every family; of anything else nothing is said, and it is asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_GATED = r"self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj"
# model_type -> the linear layers of a layer, each stored as (out, in) under its own name, neither fused nor shared
_LINEAR: Mapping[str, str] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "phi": r"self_attn\.([qkv]_proj|dense)|mlp\.fc[12]",
}
# no other name may be there: transformers would rename it, perhaps to one of these
_STORED = re.compile(r"(model\.(layers\.\d+\.[a-z_.0-9]+|embed_tokens|norm|final_layernorm)|lm_head)\.(weight|bias)")
_OTHERWISE = ("quantization_config", "auto_map")


def plain(config: Mapping[str, Any], stored: Iterable[str], modules: Iterable[str]) -> bool:
    """Whether every module is certainly a linear layer of the model with a stored weight ``MODULE.weight`` of its own.

    Args:
        config: The model's ``config.json``.
        stored: The names of all tensors of the checkpoint.
        modules: Names of modules of a vector.
    """
    linear, layers = _LINEAR.get(str(config.get("model_type"))), config.get("num_hidden_layers")
    names = set(stored)
    if linear is None or type(layers) is not int or any(config.get(key) for key in _OTHERWISE):
        return False
    if not all(_STORED.fullmatch(name) for name in names):
        return False
    known = re.compile(rf"model\.layers\.(0|[1-9][0-9]*)\.({linear})")
    found = [(known.fullmatch(module), f"{module}.weight" in names) for module in modules]
    return all(match is not None and int(match[1]) < layers and there for match, there in found)
