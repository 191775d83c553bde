"""Where an estimate gets a model's ``config.json`` and tokenizer without fetching anything: here, in a cache, or known.

Nothing is downloaded and no weight is read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unlearn import pico
from unlearn.cache import cache_folder
from unlearn.errors import ModelError
from unlearn.recipe import ModelSpec

# Sizes as published in the models' own config.json.
_LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": False}
_SMOLLM2: dict[str, Any] = {
    **_LLAMA,
    **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    **{"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
}
_PHI15: dict[str, Any] = {
    **{"model_type": "phi", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24},
    **{"num_attention_heads": 32, "vocab_size": 51200, "max_position_embeddings": 2048},
}
_GPT2_LARGE: dict[str, Any] = {
    **{"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20, "vocab_size": 50257, "n_positions": 1024},
}
KNOWN: Mapping[str, Mapping[str, Any]] = {
    "microsoft/phi-1_5": _PHI15,
    "locuslab/tofu_ft_phi-1.5": _PHI15,
    "openai-community/gpt2-large": _GPT2_LARGE,
    "gpt2-large": _GPT2_LARGE,
    "HuggingFaceTB/SmolLM2-135M": _SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2,
}
_DIGEST = re.compile(r"#sha256=([0-9a-fA-F]{64})$")
_BITS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Found:
    """A configuration.

    ``where`` says in words where it stands, ``tokenizer`` is the ``tokenizer.json`` beside it, ``stored`` the bytes of
    a weight on disk, and ``own`` whether the model is a folder of the user's, which a run reads where it is.
    """

    config: Mapping[str, Any]
    where: str
    tokenizer: Path | None
    stored: int
    own: bool = False


def find_config(spec: ModelSpec, base: Path, given: Path | None = None) -> Found:
    """The configuration of a recipe's model.

    Args:
        spec: The recipe's model.
        base: Folder of the recipe.
        given: A config.json that stands for the model's, or a folder with one.

    Raises:
        ModelError: it is not on this machine and not among the known ones, or cannot be read.
    """
    made = spec.path.startswith("wheel:") or spec.path.partition("#")[0].lower().endswith(".gguf")
    if given is not None:
        file = given / "config.json" if given.is_dir() else given
        return _read(file, made)
    if spec.path.startswith("pico:"):
        return _pico(spec.path.removeprefix("pico:"))
    for folder in _folders(spec, base, made):
        if (folder / "config.json").is_file():
            return replace(_read(folder / "config.json", made), own=folder in _own(spec, base))
    known = _known(spec.path)
    if known is None:
        raise ModelError(
            f"model.path: the config.json of {spec.path.partition('#')[0]} is not on this machine, and an estimate "
            "downloads nothing: give it with --config FILE (its config.json is a page of text on the model's page)"
        )
    name, config = known
    return Found(config, f"sizes known of {name}", None, 4 if made else 2)


def _folders(spec: ModelSpec, base: Path, made: bool) -> list[Path]:
    """Where the model, or what it was converted to, would be."""
    if made:
        digest = _DIGEST.search(spec.path)
        # a conversion is kept under the beginning of its file's checksum
        return sorted(cache_folder().glob(f"gguf-{digest[1].lower()[:32]}-*")) if digest else []
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    snapshots = sorted((hub / f"models--{spec.path.replace('/', '--')}" / "snapshots").glob("*"))
    return [*_own(spec, base), *snapshots]


def _own(spec: ModelSpec, base: Path) -> tuple[Path, Path]:
    given = Path(spec.path).expanduser()
    return given, base / given


def _known(path: str) -> tuple[str, Mapping[str, Any]] | None:
    """By the id on the hub, or by the name of a GGUF file (SmolLM2-135M-Instruct.Q4_1.gguf)."""
    if path in KNOWN:
        return path, KNOWN[path]
    stem = path.partition("#")[0].rpartition("/")[2].split(".")[0].casefold()
    for name, config in KNOWN.items():
        if path.partition("#")[0].lower().endswith(".gguf") and name.rpartition("/")[2].casefold() == stem:
            return name, config
    return None


def _pico(name: str) -> Found:
    """A pico model's sizes, without building it."""
    if name not in pico.NAMES:
        raise ModelError(f"model.path: there is no pico:{name} (there are {', '.join(pico.NAMES)})")
    for folder in sorted(cache_folder().glob(f"pico-{name}-*")):
        if (folder / "config.json").is_file():
            return _read(folder / "config.json", False)
    grouped = name in ("llama", "qwen2")
    config: dict[str, Any] = {
        **{"model_type": name, "vocab_size": pico.VOCABULARY, "tie_word_embeddings": name == "llama"},
        **{"hidden_size": pico.WIDTH, "intermediate_size": 2 * pico.WIDTH, "num_hidden_layers": pico.LAYERS},
        **{"num_attention_heads": pico.HEADS, "max_position_embeddings": pico.POSITIONS},
        **({"num_key_value_heads": pico.HEADS // 2} if grouped else {}),
        **{"n_embd": pico.WIDTH, "n_inner": 2 * pico.WIDTH, "n_layer": pico.LAYERS, "n_head": pico.HEADS},
        **{"n_positions": pico.POSITIONS},
    }
    return Found(config, "a pico model's sizes", None, 4)


def _read(file: Path, made: bool) -> Found:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ModelError(f"{file}: cannot be read as a config.json ({e})") from e
    if not isinstance(config, dict):
        raise ModelError(f"{file}: no config.json of a model: it should be a JSON object")
    beside = file.parent / "tokenizer.json"
    stored = _BITS.get(str(config.get("dtype", config.get("torch_dtype"))), 4 if made else 2)
    return Found(config, str(file), beside if beside.is_file() else None, stored)
