"""Task vectors from PEFT's LoRA folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Such an adapter is the change ``s * B @ A`` per module with s = alpha/r (Hu et al. 2106.09685), or alpha/sqrt(r) with
rsLoRA (Kalajdzievski 2312.03732). Only files are read: no model is loaded. What an adapter may hold beside that is
refused, because leaving it out would make another change than the one that was trained.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from unlearn.changes import LowRank, listed
from unlearn.errors import VectorError
from unlearn.vector import TaskVector
from unlearn.vector_file import UNREADABLE

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRANSPOSED = "fan_in_fan_out"  # metadata key: "true" where the base keeps its weights as (in, out), as GPT-2 does
_PICKLE = "adapter_model.bin"
_TOO_MUCH = 2**31  # for a rank or an alpha
_LONGEST_PATTERN, _MOST_REPEATS, _MOST_GROUPS, _LONGEST_NAME = 500, 3, 4, 200
_REACH = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")  # what PEFT finds modules by
_ROWS = 1024  # of a tensor that are compared at once
PREFIX = "base_model.model."
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Keys of a LoRA's configuration that are read here, or only matter while it is trained or found its modules.
_KNOWN = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
        *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
        *("modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision"),
        *("runtime_config", "target_modules", "task_type", "use_dora", "use_rslora"),
    )
)
# Starting values that leave the base model as it is. The others (PiSSA, OLoRA, LoftQ, ...) change its weights too.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def from_adapter(folder: Path) -> TaskVector:
    """The task vector of a LoRA adapter as PEFT saves it, in float32, with its scale folded into ``B``.

    The weights of the base that PEFT saves beside factors on the head are left out (:func:`unlike_base` compares them).

    Returns:
        The vector; its metadata name the base model, and whether that one keeps its weights transposed.

    Raises:
        VectorError: no such folder, damaged, pickled weights, or more than a plain LoRA on linear layers: DoRA,
            trained biases, ``modules_to_save``, embeddings, or a setting this program does not know; factors and
            configuration that do not belong together.
    """
    config = _read_config(folder)
    _refuse_more_than_lora(folder, config)
    factors = _factors(folder, _read_weights(folder))
    try:
        _refuse_unreached(config, factors)
        modules = {name: _module(name, a, b, config) for name, (a, b) in factors.items()}
        meta = {
            "source": "adapter",
            "base": str(config.get("base_model_name_or_path") or ""),
            TRANSPOSED: "true" if config.get("fan_in_fan_out") else "false",
        }
        return TaskVector(modules, meta)
    except VectorError as e:
        raise VectorError(f"{folder}: {e}") from e


def unlike_base(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """Weights that an adapter's folder keeps as they were in its base, and that are others in a model.

    Args:
        files: Name -> the file of safetensors that holds it, of the model.

    Raises:
        VectorError: the adapter's file is damaged.
        OSError: the model's file cannot be read.
    """
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as ours:
            kept = {key: name for key, name in _kept(set(ours.keys())).items() if name in files}
            return sorted(name for key, name in kept.items() if not same_values(ours.get_slice(key), files[name], name))
    except (SafetensorError, *UNREADABLE) as e:
        raise VectorError(f"{path}: damaged: {e}") from e


def refuse_misfit(folder: Path, model: nn.Module) -> None:
    """Refuse an adapter that does not fit a model in whole, as PEFT itself would put it on.

    Args:
        folder: An adapter that :func:`from_adapter` reads.
        model: The base; without memory (on the meta device) is enough.

    Raises:
        VectorError: factors that would be left out, modules that would stay without, or other shapes; all are named.
    """
    from peft import LoraConfig, PeftModel

    config = LoraConfig.from_pretrained(str(folder))
    config.init_lora_weights = True  # how its factors began does not matter
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # that nothing is copied to where there is no memory
            said = strangers(PeftModel.from_pretrained(model, str(folder), config=config), folder)
    except (ValueError, RuntimeError) as e:
        said = f"  {' '.join(str(e).split())[:_LONGEST_PATTERN]}"
    if said:
        raise VectorError(f"{folder}: the adapter does not fit the model:\n{said}")


def strangers(model: Any, folder: str | Path, revision: str | None = None) -> str:
    """What a model under an adapter of PEFT's has not taken of it, and what it lacks; empty where they fit.

    PEFT says so by a return value alone: factors for modules that its configuration does not reach are left out, and
    modules without factors of theirs stay as they are in the base.

    Args:
        model: A ``PeftModel`` that was made with the adapter.
        folder: The adapter's folder, or its name on the hub.
    """
    found = model.load_adapter(str(folder), "default", revision=revision)
    lacking, unused = (
        sorted({key.replace(".default.", ".").removeprefix(PREFIX).removesuffix(".weight") for key in keys})
        for keys in (found.missing_keys, found.unexpected_keys)
    )
    lines = [f"  it holds what the model has no place for: {listed(unused)}"] if unused else []
    lines += [f"  {ADAPTER_CONFIG} reaches what it holds nothing for: {listed(lacking)}"] if lacking else []
    return "\n".join(lines)


def same_values(ours: Any, path: Path, name: str) -> bool:
    """Whether a tensor has the same values in a file, but for the rounding to the coarser of both formats."""
    with safe_open(path, framework="pt") as file:
        theirs = file.get_slice(name)
        if not ours.get_shape() or ours.get_shape() != theirs.get_shape():
            return False
        for first in range(0, ours.get_shape()[0], _ROWS):
            one, two = ours[first : first + _ROWS], theirs[first : first + _ROWS]
            if not torch.equal(one.to(two.dtype), two) and not torch.equal(one, two.to(one.dtype)):
                return False
    return True


def _read_config(folder: Path) -> Mapping[str, Any]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise VectorError(f"{folder}: no adapter of PEFT's: it has no {ADAPTER_CONFIG}") from e
    except OSError as e:
        raise VectorError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise VectorError(f"{path}: damaged: it is not JSON ({e})") from e
    if not isinstance(config, dict):
        raise VectorError(f"{path}: damaged: it holds no JSON object")
    return config


def _refuse_more_than_lora(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    start = config.get("init_lora_weights")
    strange = sorted(key for key, value in config.items() if key not in _KNOWN and value)
    whys = {
        f"it is {kind or 'of no kind'}; only LORA is a sum with the weights": kind != "LORA",
        "it is a DoRA, which rescales whole weights; a vector holds sums only": bool(config.get("use_dora")),
        "it trained biases, which a vector cannot hold: train with bias none": (config.get("bias") or "none") != "none",
        f"it holds whole modules (modules_to_save: {config.get('modules_to_save')}), which a vector cannot":
            bool(config.get("modules_to_save")),
        f"it starts with init_lora_weights {start!r}, which changes the base model's own weights as well: save it with "
        "PEFT's path_initial_model_for_weight_conversion":
            start not in _PLAIN_STARTS,
        f"it uses {listed(strange)}, which this program does not know how to read": bool(strange),
    }  # fmt: skip
    for why, so in whys.items():
        if so:
            raise VectorError(f"{folder}: cannot become a task vector: {why}")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file() and (folder / _PICKLE).exists():
        raise VectorError(
            f"{folder} holds two sets of factors, {ADAPTER_WEIGHTS} and {_PICKLE}, and which of them is the adapter "
            "cannot be told: remove the old one"
        )
    if not path.is_file():
        if (folder / _PICKLE).exists():
            raise VectorError(
                f"{folder}: its weights are pickled ({_PICKLE}), which can run any code and is never opened: save it "
                "with PEFT's safe_serialization"
            )
        raise VectorError(f"{folder}: {ADAPTER_WEIGHTS} is missing")
    try:
        with safe_open(path, framework="pt") as f:
            keys = set(f.keys())
            kept = _kept(keys)
            return {key: f.get_tensor(key) for key in sorted(keys - kept.keys())}
    except (SafetensorError, OSError, *UNREADABLE) as e:
        raise VectorError(f"{path}: damaged: {e}") from e


def _kept(keys: Collection[str]) -> dict[str, str]:
    """Weights of the base that PEFT saves untouched beside factors on an embedding or the head: key -> name there."""
    found = {}
    for key in keys:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.base_layer\.(weight|bias)", key)
        if match and all(f"{PREFIX}{match[1]}.lora_{factor}.weight" in keys for factor in "AB"):
            found[key] = f"{match[1]}.{match[2]}"
    return found


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a module's path, as PEFT has it.

    Patterns are regular expressions out of somebody's file, and a short one can take longer than the universe: those
    with a repeated group, or with many repetitions and choices, are refused.

    Raises:
        VectorError: the pattern may take too long.
    """
    if pattern.isidentifier():  # most are, and so is what PEFT writes itself but for the dots
        return name == pattern or name.endswith(f".{pattern}")
    _check_pattern(pattern, name)
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_pattern(pattern: str, name: str) -> None:
    """Refuse a regular expression that may take too long.

    Raises:
        VectorError: it may.
    """
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "x", re.sub(r"\\.", "x", pattern))
    bare = re.sub(r"(?<=[*+?}])\?|(?<=\()\?<?[:=!]", "", bare)  # lazy, or a group that is not kept: no repetition
    repeats, groups = len(re.findall(r"[*+?{]", bare)), bare.count("(")
    long = len(pattern) > _LONGEST_PATTERN or len(name) > _LONGEST_NAME
    if repeats > _MOST_REPEATS or groups > _MOST_GROUPS or re.search(r"\)[*+?{]", bare) or (long and repeats + groups):
        raise VectorError(f"{ADAPTER_CONFIG}: the pattern {pattern[:80]!r} may take for ever on {name[:80]!r}")


def _factors(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B) as stored."""
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.dtype not in _FLOATS:
            strange.append(key)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    if strange:
        raise VectorError(f"{folder}: it holds what is no factor of a linear layer: {listed(sorted(strange))}")
    alone = sorted(name for name, pair in found.items() if len(pair) < 2)
    if alone:
        raise VectorError(f"{folder}: a factor is missing for {listed(alone)}")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _refuse_unreached(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse factors that PEFT would leave out, and targets that have none: by PEFT's own rule of what a target is."""
    from peft.tuners.tuners_utils import check_target_module_exists

    rule = {key: config.get(key) for key in _REACH}
    targets = rule["target_modules"]
    if not names or targets is None or targets == "all-linear":
        return
    try:
        for pattern in (p for value in rule.values() for p in (value if isinstance(value, list) else [value])):
            if isinstance(pattern, str):
                _check_pattern(pattern, max(names, key=len))
        unreached = sorted(n for n in names if not check_target_module_exists(SimpleNamespace(**rule), n))
        entries = [] if isinstance(targets, str) else sorted(set(targets))
        empty = [e for e in entries if not any(n == e or n.endswith(f".{e}") for n in names)]
        # an entry may be a name in every layer, or a module's full path, which other settings leave out again
        free = SimpleNamespace(**rule | {"layers_to_transform": None})
        empty = [e for e in empty if check_target_module_exists(free, e)]
    except (re.error, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise VectorError(f"{ADAPTER_CONFIG} does not tell which modules are meant: {e}") from e
    lines = (
        [f"  {', '.join(_REACH)} do not reach {listed(unreached)}: PEFT leaves these factors out"] if unreached else []
    )
    lines += [f"  target_modules names {listed(empty)}, for which there are no factors"] if empty else []
    if lines:
        raise VectorError("\n".join([f"its factors are not those that its {ADAPTER_CONFIG} means:", *lines]))


def _module(name: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> LowRank:
    rank, alpha = _setting(name, config, "r", "rank_pattern"), _setting(name, config, "lora_alpha", "alpha_pattern")
    if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank or rank < 1:
        raise VectorError(
            f"{name}: {ADAPTER_CONFIG} says rank {rank:g}, its factors are {tuple(a.shape)} and {tuple(b.shape)}"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(a.float(), b.float() * scale)


def _setting(name: str, config: Mapping[str, Any], key: str, patterns: str) -> float:
    """A number for one module: of the first pattern that matches the end of its path, as PEFT does, else the usual."""
    special = config.get(patterns) or {}
    try:
        value = next((v for k, v in special.items() if _matches(k, name)), config.get(key))
    except (re.error, AttributeError, RecursionError, OverflowError) as e:
        raise VectorError(f"{ADAPTER_CONFIG}: {patterns} is no mapping of patterns to numbers: {e}") from e
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _TOO_MUCH:
        raise VectorError(f"{ADAPTER_CONFIG}: {key} of {name} is {str(value)[:40]!r}, not a number that makes sense")
    return value
