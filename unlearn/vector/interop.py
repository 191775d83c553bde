"""Task vectors from and to PEFT's LoRA folders, and from two checkpoints.

A LoRA is the change ``s * B @ A`` per module with s = alpha/r (Hu et al. 2106.09685), or alpha/sqrt(r) with rsLoRA
(Kalajdzievski 2312.03732). What an adapter may hold beside that is refused, because leaving it out would make another
change than the one that was trained. Only files are read: no model is loaded.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.console import progress
from unlearn.errors import VectorError
from unlearn.model.checkpoint import read_checkpoint
from unlearn.model.load import Architecture, architecture_of
from unlearn.store.files import some
from unlearn.vector.change import Change, Dense, LowRank, check_rank, check_terms, truncated
from unlearn.vector.task_vector import ADAPTER_CONFIG, UNREADABLE, TaskVector

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TRANSPOSED = "fan_in_fan_out"  # metadata key: "true" where the base keeps its weights as (in, out), as GPT-2 does
PREFIX = "base_model.model."
_PICKLE = "adapter_model.bin"
_TOO_MUCH = 2**31  # for a rank or an alpha
_LONGEST_PATTERN, _MOST_REPEATS, _MOST_GROUPS, _LONGEST_NAME = 500, 3, 4, 200
_REACH = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")  # what PEFT finds modules by
_ROWS = 1024  # of a tensor that are compared at once

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


# -- from an adapter


def from_adapter(folder: Path) -> TaskVector:
    """The task vector of a LoRA adapter as PEFT saves it, in float32, with its scale folded into ``B``.

    The weights of the base that PEFT saves beside factors on the head are left out (:func:`unlike_base` compares them).
    Its metadata name the base model, and whether that one keeps its weights transposed.
    """
    try:
        config = _read_config(folder)
        factors = _read_factors(folder)
        _refuse_unreached(config, factors)
        meta = {
            "source": "adapter",
            "base": str(config.get("base_model_name_or_path") or ""),
            TRANSPOSED: "true" if config.get("fan_in_fan_out") else "false",
        }
        return TaskVector({name: _change(name, a, b, config) for name, (a, b) in factors.items()}, meta)
    except VectorError as e:
        raise VectorError(f"{folder}: {e}") from e


def _read_config(folder: Path) -> Mapping[str, Any]:
    """The settings of a plain LoRA; anything more is refused."""
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError as e:
        raise VectorError(f"no adapter of PEFT's: it has no {ADAPTER_CONFIG}") from e
    except (OSError, ValueError, RecursionError) as e:
        raise VectorError(f"{ADAPTER_CONFIG}: damaged, or cannot be read: {e}") from e
    kind, start, saved = (config.get(key) for key in ("peft_type", "init_lora_weights", "modules_to_save"))
    strange = sorted(key for key, value in config.items() if key not in _KNOWN and value)
    reasons = (
        (kind != "LORA", f"it is {kind or 'of no kind'}; only LORA is a sum with the weights"),
        (config.get("use_dora"), "it is a DoRA, which rescales whole weights; a vector holds sums only"),
        ((config.get("bias") or "none") != "none", "it trained biases, which a vector cannot hold: use bias none"),
        (saved, f"it holds whole modules (modules_to_save: {saved}), which a vector cannot"),
        (
            start not in _PLAIN_STARTS,
            f"it starts with init_lora_weights {start!r}, which changes the base model's own weights as well: save it "
            "with PEFT's path_initial_model_for_weight_conversion",
        ),
        (strange, f"it uses {some(strange)}, which this program does not know how to read"),
    )
    if why := next((why for holds, why in reasons if holds), None):
        raise VectorError(f"cannot become a task vector: {why}")
    return config


def _read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (A, B) as stored."""
    path, pickled = folder / ADAPTER_WEIGHTS, (folder / _PICKLE).exists()
    if path.is_file() and pickled:
        raise VectorError(f"it holds two sets of factors, {ADAPTER_WEIGHTS} and {_PICKLE}: remove the old one")
    if pickled:
        raise VectorError(
            f"its weights are pickled ({_PICKLE}), which can run any code and is never opened: save it with PEFT's "
            "safe_serialization"
        )
    if not path.is_file():
        raise VectorError(f"{ADAPTER_WEIGHTS} is missing")
    try:
        with safe_open(path, framework="pt") as f:
            keys = set(f.keys())
            tensors = {key: f.get_tensor(key) for key in sorted(keys - _of_the_base(keys).keys())}
    except UNREADABLE as e:
        raise VectorError(f"{ADAPTER_WEIGHTS}: damaged: {e}") from e
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None or not tensor.is_floating_point():
            strange.append(key)
        else:
            found.setdefault(match[1], {})[match[2]] = tensor
    if strange:
        raise VectorError(f"it holds what is no factor of a linear layer: {some(strange)}")
    if alone := [name for name, pair in found.items() if len(pair) < 2]:
        raise VectorError(f"a factor is missing for {some(alone)}")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _of_the_base(keys: Collection[str]) -> dict[str, str]:
    """Weights of the base that PEFT saves untouched beside factors on an embedding or the head: key -> name there."""
    found = {}
    for key in keys:
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.base_layer\.(weight|bias)", key)
        if match and all(f"{PREFIX}{match[1]}.lora_{factor}.weight" in keys for factor in "AB"):
            found[key] = f"{match[1]}.{match[2]}"
    return found


def _refuse_unreached(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse factors that PEFT would leave out, and targets that have none: by PEFT's own rule of what a target is."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = config.get("target_modules")
    if not names or targets is None or targets == "all-linear":
        return
    try:
        given = {key: config[key] for key in _REACH if config.get(key) is not None}
        for value in given.values():
            for pattern in value if isinstance(value, list) else [value]:
                if isinstance(pattern, str):
                    _check_pattern(pattern, max(names, key=len))
        rule = LoraConfig(**given)
        unreached = sorted(n for n in names if not check_target_module_exists(rule, n))
        entries = [] if isinstance(targets, str) else sorted(set(targets))
        empty = [e for e in entries if not any(n == e or n.endswith(f".{e}") for n in names)]
        # an entry may be a name in every layer, or a module's full path, which other settings leave out again
        rule.layers_to_transform = None
        empty = [e for e in empty if check_target_module_exists(rule, e)]
    except (re.error, TypeError, AttributeError, ValueError, RecursionError, OverflowError) as e:
        raise VectorError(f"{ADAPTER_CONFIG} does not tell which modules are meant: {e}") from e
    lines = []
    if unreached:
        lines.append(f"  {', '.join(_REACH)} do not reach {some(unreached)}: PEFT leaves these factors out")
    if empty:
        lines.append(f"  target_modules names {some(empty)}, for which there are no factors")
    if lines:
        raise VectorError("\n".join([f"its factors are not those that its {ADAPTER_CONFIG} means:", *lines]))


def _change(name: str, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> LowRank:
    rank, alpha = _setting(name, config, "r", "rank_pattern"), _setting(name, config, "lora_alpha", "alpha_pattern")
    if a.ndim != 2 or b.ndim != 2 or len(a) != rank or b.shape[1] != rank or rank < 1:
        raise VectorError(
            f"{name}: {ADAPTER_CONFIG} says rank {rank:g}, its factors are {tuple(a.shape)} and {tuple(b.shape)}"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRank(a.float(), b.float() * scale)


def _setting(name: str, config: Mapping[str, Any], key: str, patterns: str) -> float:
    """A number for one module: of the first pattern that matches the end of its path, as PEFT does, else the usual."""
    try:
        value = next((v for k, v in (config.get(patterns) or {}).items() if _matches(k, name)), config.get(key))
    except (re.error, AttributeError, RecursionError, OverflowError) as e:
        raise VectorError(f"{ADAPTER_CONFIG}: {patterns} is no mapping of patterns to numbers: {e}") from e
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _TOO_MUCH:
        raise VectorError(f"{ADAPTER_CONFIG}: {key} of {name} is {str(value)[:40]!r}, not a number that makes sense")
    return value


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a module's path, as PEFT has it."""
    if pattern.isidentifier():  # most are, and so is what PEFT writes itself but for the dots
        return name == pattern or name.endswith(f".{pattern}")
    _check_pattern(pattern, name)
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _check_pattern(pattern: str, name: str) -> None:
    """Refuse a regular expression of somebody's file that may take longer than the universe."""
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "x", re.sub(r"\\.", "x", pattern))
    bare = re.sub(r"(?<=[*+?}])\?|(?<=\()\?<?[:=!]", "", bare)  # lazy, or a group that is not kept: no repetition
    repeats, groups = len(re.findall(r"[*+?{]", bare)), bare.count("(")
    long = len(pattern) > _LONGEST_PATTERN or len(name) > _LONGEST_NAME
    if repeats > _MOST_REPEATS or groups > _MOST_GROUPS or re.search(r"\)[*+?{]", bare) or (long and repeats + groups):
        raise VectorError(f"{ADAPTER_CONFIG}: the pattern {pattern[:80]!r} may take for ever on {name[:80]!r}")


# -- an adapter and a model


def unlike_base(folder: Path, files: Mapping[str, Path]) -> list[str]:
    """Weights that an adapter's folder keeps of its base, and that are others in a model, given as name -> file."""
    path = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as ours:
            kept = {key: name for key, name in _of_the_base(set(ours.keys())).items() if name in files}
            return sorted(name for key, name in kept.items() if not same_values(ours.get_slice(key), files[name], name))
    except UNREADABLE as e:
        raise VectorError(f"{path}: damaged: {e}") from e


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


def refuse_misfit(folder: Path, model: nn.Module) -> None:
    """Refuse an adapter that does not fit a model (on the meta device is enough) in whole, as PEFT would put it on."""
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
    """What a ``PeftModel`` has not taken of the adapter it was made with, and what it lacks; empty where they fit.

    PEFT says so by a return value alone.

    Args:
        folder: The adapter's folder, or its name on the hub.
    """
    found = model.load_adapter(str(folder), "default", revision=revision)
    lacking, unused = (
        sorted({key.replace(".default.", ".").removeprefix(PREFIX).removesuffix(".weight") for key in keys})
        for keys in (found.missing_keys, found.unexpected_keys)
    )
    lines = [f"  it holds what the model has no place for: {some(unused)}"] if unused else []
    lines += [f"  {ADAPTER_CONFIG} reaches what it holds nothing for: {some(lacking)}"] if lacking else []
    return "\n".join(lines)


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with an adapter of any kind merged into its weights by PEFT; what does not fit in whole is refused."""
    from peft import PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise VectorError(
            f"{folder}: {ADAPTER_WEIGHTS} is missing; pickled weights can run any code and are not opened"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is amiss is said below
            whole = PeftModel.from_pretrained(model, str(folder))
            prompts = whole.active_peft_config.is_prompt_learning
            said = "  it adds to the prompts, not to the weights" if prompts else strangers(whole, folder)
            if not said:
                _untie(model)
                found: PreTrainedModel = whole.merge_and_unload()
                return found
    except (ValueError, RuntimeError, TypeError, KeyError, AttributeError, OSError) as e:
        said = f"  {' '.join(str(e).split())[:_LONGEST_PATTERN]}"
    raise VectorError(f"{folder}: the adapter cannot be merged into the model:\n{said}")


def _untie(model: PreTrainedModel) -> None:
    """Give a head that shares the embeddings' weight one of its own, where an adapter is on either of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if any(isinstance(end, BaseTunerLayer) for end in ends):
        embedded, head = (end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends)
        if head is not None and head.weight is embedded.weight:
            head.weight = nn.Parameter(head.weight.detach().clone())
            model.config.tie_word_embeddings = False


# -- to an adapter


_TRANSPOSED_TYPES = ("gpt2", "openai-gpt")  # causal language models of transformers made of Conv1D


def to_adapter(vector: TaskVector, folder: Path, base: str, *, transposed: bool | None = None) -> None:
    """Write the vector as a LoRA adapter for ``PeftModel.from_pretrained(base, folder)``: exactly the same change.

    Args:
        folder: Where to; made if missing.
        base: What the adapter is to be put on: a hub id or a folder.
        transposed: Whether the base keeps its weights as (in, out) (GPT-2's Conv1D); None takes it from the folder
            ``base`` or the vector's metadata. When it is wrong PEFT warns, and does the right thing all the same.
    """
    if transposed is None:
        try:
            kind = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))["model_type"]
        except (OSError, ValueError, LookupError, TypeError):
            kind = None
        transposed = vector.meta.get(TRANSPOSED) == "true" or kind in _TRANSPOSED_TYPES
    names = list(vector.modules)
    write_adapter(vector, folder, base, target_modules(names, names, short=False), transposed)


def write_adapter(vector: TaskVector, folder: Path, base: str, targets: Sequence[str] | str, transposed: bool) -> None:
    """Write both files: factors in float32 and LoRA's scale alpha/r at 1 in every module."""
    from peft import LoraConfig, TaskType

    require_factors(vector)
    tensors, ranks = {}, {}
    for name, m in vector.modules.items():
        a, b = m.tensors()["A"], m.tensors()["B"]
        if not len(a):  # PEFT has no rank 0
            a, b = a.new_zeros(1, m.shape[1]), b.new_zeros(m.shape[0], 1)
        ranks[name] = len(a)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.clone(memory_format=torch.contiguous_format)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.clone(memory_format=torch.contiguous_format)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT reads these keys as regular expressions that may match the end of a name
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != usual}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=transposed,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()  # PEFT holds them as a set, which every process lists in its own order
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def require_factors(vector: TaskVector) -> None:
    """Refuse a vector that cannot be an adapter, because a module is dense."""
    if dense := [name for name, m in vector.modules.items() if isinstance(m, Dense)]:
        raise VectorError(
            f"an adapter holds low-rank factors, but the change is dense in {len(dense)} modules: {some(dense)}. "
            "Compress it with to_low_rank(rank) (unlearn vector low-rank) first, or export merged weights"
        )


def target_modules(names: Sequence[str], present: Sequence[str], *, short: bool = True) -> list[str] | str:
    """``target_modules`` that PEFT matches to exactly ``names``.

    An entry of a list also matches every module whose path ends with ``.entry``. So the last parts (``q_proj``) serve
    when they mean just these modules; else full paths; else, should a full path be the end of another, one regular
    expression, which must match the whole path.

    Args:
        present: All modules of the model, as far as they are known.
        short: Whether all are known, so that last parts may be used.
    """

    def matched(entries: Sequence[str]) -> set[str]:
        return {p for p in present if any(p == e or p.endswith(f".{e}") for e in entries)}

    shortest = sorted({n.rpartition(".")[2] for n in names})
    for entries in (shortest, list(names)) if short else (list(names),):
        if matched(entries) == set(names) and (short or all("." in e for e in entries)):
            return entries
    return "|".join(re.escape(n) for n in names)


# -- from two checkpoints


_STORED_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


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
        rank, energy: Truncate each difference at once (:func:`truncated`); else the vector is dense and as large as
            the changed weights in float32.
    """
    check_terms(rank, energy, required=False)
    model = architecture_of(base)
    old, new = _Weights(base, model), _Weights(finetuned, model)
    names = list(dict.fromkeys((*old.stored, *new.stored)))
    linear: dict[str, tuple[int, int]] = {}  # name -> (out, in)
    unchanged: list[str] = []
    unequal: dict[str, str] = {}
    squares = 0.0  # of the changes that are left out
    modules: dict[str, Change] = {}
    broken, rounded, elements, same = [], 0, 0, 0
    with progress("comparing", len(names)) as advance:
        for name in names:
            why, formats = _misfit(name, old, new, model), _formats(name, old, new)
            if why is None and name in model.linear and formats <= _STORED_FLOATS and len(old.stored[name].shape) == 2:
                rows, columns = old.stored[name].shape
                linear[name] = (columns, rows) if model.linear[name] else (rows, columns)
                continue
            if why is None and not _same_bits(one := old.read(name), two := new.read(name)):
                if formats <= _STORED_FLOATS:
                    size = float(_difference(one, two).double().square().sum())
                    squares += size if math.isfinite(size) else 0.0
                    why = model.why_not(name) if size else None
                else:
                    why = f"stored as {'/'.join(dict.fromkeys(w.stored[name].format for w in (old, new)))}"
            if why is None:
                unchanged.append(name)
            else:
                unequal[name] = why
            advance(1)
        if on_unequal == "error" and unequal:
            raise VectorError(_unequal_message(base, finetuned, unequal))
        check_rank(rank, linear)
        for name in linear:
            module, difference = name.removesuffix(".weight"), _difference(old.read(name), new.read(name))
            differing = int(difference.count_nonzero())
            if not bool(torch.isfinite(difference).all()):
                broken.append(module)
            elif not differing:
                unchanged.append(name)
            else:
                if _formats(name, old, new) & {"F16", "BF16"}:
                    rounded, elements = rounded + 1, elements + difference.numel()
                    same += difference.numel() - differing
                change = Dense((difference.T if model.linear[name] else difference).contiguous())
                whole = rank is None and energy is None
                modules[module] = change if whole else truncated(change, rank, energy)
            advance(1)
    if broken:
        raise VectorError(f"{finetuned} less {base} is not finite in {some(broken)}")
    if not modules:
        raise VectorError(f"{finetuned} and {base} do not differ in any linear layer: there is no vector")
    meta = {
        "source": "checkpoints",
        "base": base.resolve().name,
        "finetuned": finetuned.resolve().name,
        TRANSPOSED: "true" if any(model.linear[f"{name}.weight"] for name in modules) else "false",
    }
    warning = (
        f"{rounded} of the changed matrices are stored in 16 bits: their differences are of rounded numbers, and "
        f"{same / max(elements, 1):.0%} of their elements do not differ at all"
    )
    report = CheckpointReport(tuple(unchanged), unequal, squares**0.5, (warning,) if rounded else ())
    return TaskVector(modules, meta), report


class _Weights:
    """The tensors of a folder under the names the model gives them; each is read when it is asked for."""

    def __init__(self, folder: Path, model: Architecture) -> None:
        self._checkpoint = read_checkpoint(folder)
        self.stored = {model.canonical(n): t for n, t in self._checkpoint.tensors.items()}
        for second, first in model.tied.items():
            if second in self.stored and first not in self.stored:
                self.stored[first] = self.stored.pop(second)
            elif second in self.stored and _same_bits(self.read(first), self.read(second)):
                del self.stored[second]  # a copy: the model has the one weight

    def read(self, name: str) -> Tensor:
        """The values. The file is opened for them alone, so that its pages go when they do."""
        stored = self.stored[name]
        with safe_open(self._checkpoint.files[stored.file], framework="pt") as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor


def _misfit(name: str, old: _Weights, new: _Weights, model: Architecture) -> str | None:
    """Why a tensor of one checkpoint cannot be compared with the other's, or None."""
    one, two = old.stored.get(name), new.stored.get(name)
    if one is not None and two is not None:
        return None if one.shape == two.shape else f"shapes {one.shape} and {two.shape}"
    place = "fine-tuned checkpoint" if one is None else "base"
    if name in model.tied:
        return f"stored in the {place} with other values than {model.tied[name]}, to which config.json ties it"
    return f"in the {place} only"


def _formats(name: str, old: _Weights, new: _Weights) -> set[str]:
    return {weights.stored[name].format for weights in (old, new) if name in weights.stored}


def _difference(one: Tensor, two: Tensor) -> Tensor:
    """The second less the first in float32, computed in float64 where one of them is."""
    wide = torch.float64 if torch.float64 in (one.dtype, two.dtype) else torch.float32
    return (two.to(wide) - one.to(wide)).float()


def _same_bits(one: Tensor, two: Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, two)))


def _unequal_message(base: Path, finetuned: Path, unequal: Mapping[str, str]) -> str:
    """Grouped by reason: after full fine-tuning there are many of the same kind."""
    groups: dict[str, list[str]] = {}
    for name, why in unequal.items():
        groups.setdefault(why, []).append(name)
    first = (
        f"{finetuned} differs from {base} in {len(unequal)} tensors that a task vector cannot hold; skip them "
        '(on_unequal="skip"; --skip-unequal of the command, skip_unequal: true in a recipe) to take the linear layers '
        "alone:"
    )
    return "\n".join([first, *(f"  {why} ({len(names)}): {some(names)}" for why, names in groups.items())])
