"""Which layer of a model a module belongs to, read off its path."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)(?:\.|$)")


def layer_of(name: str) -> int | None:
    """The layer number in a module path (``model.layers.3.mlp.fc1``, ``transformer.h.3.attn.c_attn``), from 0."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None
