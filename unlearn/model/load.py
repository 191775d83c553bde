"""Load a model and its tokenizer, know which ones they are, and find the modules a vector can go on."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.pytorch_utils import Conv1D

from unlearn.console import quietly
from unlearn.errors import ModelError, VectorError
from unlearn.model.checkpoint import doubled_weights
from unlearn.model.locate import check_trust, hub_failure
from unlearn.processes import cpus_only, is_out_of_memory, told
from unlearn.recipe.schema import ModelSpec
from unlearn.store import files as atomic
from unlearn.store.cache import NETWORK_LIBRARIES, condensed, hub_away, sha256, vanished
from unlearn.text import first_line, shorten

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(\d+)(?:\.|$)")
_SHOWN = 12  # names in a message
_NO_LANGUAGE_MODEL = (  # in what transformers says
    *("Unrecognized model", "Unrecognized configuration class", "does not recognize this architecture"),
    *("should have a `model_type`", "instantiate the backend tokenizer", "does not support an attention"),
)
_PLACES = frozenset({"_name_or_path", "transformers_version"})  # of a configuration: where it lay, and who wrote it
_READS = (  # what a tokenizer goes by beside its tokenizer.json and its special tokens
    *("padding_side", "truncation_side", "model_max_length", "model_input_names", "clean_up_tokenization_spaces"),
    *("split_special_tokens", "add_prefix_space", "chat_template"),
)


@dataclass(frozen=True)
class Loaded:
    """A model in memory, in evaluation mode, with its tokenizer.

    ``fingerprint`` is of all that its answers depend on: the weights as loaded (so it depends on ``dtype``), the
    configuration and how it writes, code of its own, and the tokenizer. ``words`` is the tokenizer's alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    words: str = ""
    path: str = ""  # the folder or hub id it was loaded from


def load(spec: ModelSpec, where: str, *, for_training: bool = False) -> Loaded:
    """Load what :func:`unlearn.model.locate.locate` found: a local folder or a hub id.

    Only ``for_training`` ``spec.quantize`` is applied; edits and scores always use full precision.
    """
    check_trust(spec)
    device = place(spec.device)
    dtype = number_format(spec.dtype, device)
    quantize = spec.quantize if for_training else "none"
    options = _options(spec, where)
    if Path(where).is_dir() and (said := doubled_weights(Path(where))):
        raise ModelError(f"model.path: {said}")
    with told(f"model.path: {where}", "choose a smaller model"), _explained(where, spec), quietly(downloads=True):
        tokenizer = _fast_tokenizer(where, options)
        model, report = _read_weights(where, options | _kept(spec), dtype, device, quantize)
    _check_split(model, spec)
    _check_weights(where, report)
    check_tokenizer(where, tokenizer, model)
    untie(model)
    model.eval()
    words = _words(tokenizer)
    whole = atomic.fingerprint(fingerprint(model), _settings(model), _code(model, tokenizer), words)
    first = model.get_input_embeddings().weight.device if spec.device_map else device
    return Loaded(model, tokenizer, whole, dtype, first, words, where)


def load_tokenizer(spec: ModelSpec, where: str) -> PreTrainedTokenizerFast:
    """The tokenizer alone of what :func:`unlearn.model.locate.locate` found."""
    check_trust(spec)
    with _explained(where, spec), quietly(downloads=True):
        return _fast_tokenizer(where, _options(spec, where))


def _fast_tokenizer(where: str, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokenizer: Any = AutoTokenizer.from_pretrained(where, use_fast=True, **options)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"model.path: {where} has no fast tokenizer (tokenizer.json), which is needed")
    found: PreTrainedTokenizerFast = tokenizer
    return found


def _options(spec: ModelSpec, where: str) -> dict[str, Any]:
    """What transformers is told of a folder or hub id."""
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if Path(where).is_dir():
        return options
    return options | {"revision": spec.revision, "local_files_only": bool(hub_away())}


def _kept(spec: ModelSpec) -> dict[str, Any]:
    """How transformers is to hold the weights."""
    found: dict[str, Any] = {}
    if spec.attn_implementation is not None:
        found["attn_implementation"] = spec.attn_implementation
    if spec.device_map is not None:
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ModelError(
                "model.device_map: several processes were started here, and each would split a model over all "
                "of its GPUs: start one process, or leave device_map out"
            )
        found["device_map"] = spec.device_map
        if spec.max_memory:
            found["max_memory"] = {int(k) if k.isdecimal() else k: size for k, size in spec.max_memory.items()}
    return found


def _check_split(model: Any, spec: ModelSpec) -> None:
    """Refuse a model of which a part waits in main memory or on disk until it is needed: nothing can be added there."""
    away = sorted(name for name, tensor in model.named_parameters() if tensor.device.type == "meta")
    if away and spec.device_map is not None:
        raise ModelError(
            f"model.device_map: {len(away)} weights have no place on a device ({atomic.some(away, 3)}), and an edit "
            "needs all of them there: give it more devices or memory, a smaller model.dtype, or set device: cpu"
        )


def untie(model: PreTrainedModel) -> None:
    """Have a model's configuration say so where its head is stored with other values than the embeddings.

    transformers leaves such a head untied and the configuration as it is: ``tie_weights``, which lm-eval calls, or a
    reader of what is saved would then lose the head.
    """
    if not getattr(model.config, "tie_word_embeddings", False) or getattr(model, "all_tied_weights_keys", True):
        return
    head, first = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not first.weight:
        model.config.tie_word_embeddings = False


def place(name: str) -> torch.device:
    """The device that ``model.device`` means to this process."""
    if name == "auto":
        if cpus_only():
            return torch.device("cpu")
        if torch.cuda.is_available():
            # under `accelerate launch` each process has its own
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.index is not None and processes > 1:
        raise ModelError(
            f"model.device: {name} is one GPU, and {processes} processes were started on this machine, which would all "
            "use it: set auto or cuda, and each has its own"
        )
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise ModelError(f"model.device: there is no {name} here (CUDA devices: {there}); use cpu or auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("model.device: there is no mps here; use cpu or auto")
    return device


def number_format(name: str, device: torch.device) -> torch.dtype:
    """The number format that ``model.dtype`` means on a device."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        with torch.cuda.device(device):  # machines with GPUs of several kinds
            # older GPUs only emulate bfloat16, slower than float32; float16 would overflow (65,504) in such models
            own = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if own else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _read_weights(
    where: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device, quantize: str
) -> tuple[Any, Mapping[str, Any]]:
    """The model, and what transformers reports of weights that do not fit."""
    if quantize != "none":
        from transformers import BitsAndBytesConfig

        four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        config = BitsAndBytesConfig(**(four if quantize == "nf4" else {"load_in_8bit": True}))
        options = {"device_map": {"": device}} | options | {"quantization_config": config}
    # wrong shapes are ignored so that they come back in the report, all of them
    options = options | {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    return (model if "device_map" in options else model.to(device)), report


@contextmanager
def _explained(where: str, spec: ModelSpec) -> Iterator[None]:
    """Turn a failure that a user can mend into one message."""
    try:
        yield
    except Exception as error:
        gone, whole = vanished(where), str(error)
        library, kind = type(error).__module__.split(".")[0], type(error).__name__
        if gone:
            raise ModelError(f"model.path: {gone}") from error
        if is_out_of_memory(error):
            raise
        if "trust_remote_code" in whole and not spec.trust_remote_code:
            raise ModelError(
                f"model.path: {where} comes with Python code of its own. If you trust its authors, set "
                "model.trust_remote_code to true and UNLEARN_TRUST_REMOTE_CODE=1 in the environment"
            ) from error
        if (isinstance(error, OSError) or library in NETWORK_LIBRARIES) and not Path(where).is_dir():
            raise ModelError(hub_failure(spec, error)) from error
        signs = isinstance(error, ImportError | OSError) or kind == "SafetensorError"
        if signs or library in NETWORK_LIBRARIES or any(sign in whole for sign in _NO_LANGUAGE_MODEL):
            raise ModelError(
                f"model.path: {where} cannot be opened as a causal language model: {condensed(error)}"
            ) from error
        raise


def _check_weights(where: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit: transformers would fill the gaps with random numbers and go on."""
    wrong = report.get("mismatched_keys") or ()
    failures = report.get("conversion_errors") or {}
    found = {
        "missing": report.get("missing_keys") or (),
        "unexpected": report.get("unexpected_keys") or (),
        "wrong shape": [f"{name} has {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in wrong],
        "other": [*map(str, report.get("error_msgs") or ()), *(f"{k}: {v}" for k, v in failures.items())],
    }
    problems = [f"\n  {what}: {atomic.some(sorted(names), _SHOWN)}" for what, names in found.items() if names]
    if problems:
        raise ModelError(f"model.path: the weights in {where} do not fit its config.json{''.join(problems)}")


def check_tokenizer(where: str, tokenizer: Any, model: Any) -> None:
    """Give a tokenizer a padding token where it has none; refuse one that is not the model's."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"model.path: the tokenizer in {where} has neither a padding nor an end token: give it one"
            )
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere: any token that exists will do
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"model.path: the tokenizer in {where} has {len(tokenizer)} tokens, its model only {rows}: they do not "
            "belong together"
        )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 in hex over the hashes of every tensor of the state (name, dtype, shape, bytes), tied ones once."""
    tensors: dict[object, tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            same = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
            tensors.setdefault(same, (name, tensor))
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib releases the interpreter
        return hashlib.sha256(b"".join(pool.map(_digest, tensors.values()))).hexdigest()


def _digest(named: tuple[str, torch.Tensor]) -> bytes:
    name, tensor = named
    sha = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    sha.update(flat.numpy().data)
    return sha.digest()


def _settings(model: Any) -> list[Any]:
    """What a model's answers depend on beside its weights: its configuration, and how it writes and when it stops."""
    writes = model.generation_config.to_dict() if getattr(model, "generation_config", None) is not None else {}
    attention = getattr(model.config, "_attn_implementation", None)
    return [_placeless(model.config.to_dict()), _placeless(writes), str(attention)]


def _placeless(value: Any) -> Any:
    """Plain JSON types, without what depends on where a file lay."""
    if isinstance(value, Mapping):
        return {str(k): _placeless(v) for k, v in value.items() if k not in _PLACES}
    if isinstance(value, list | tuple):
        return [_placeless(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _code(model: Any, tokenizer: Any) -> list[str]:
    """SHA-256 of the Python files that came with a model or tokenizer and are run."""
    generate = getattr(getattr(model, "generate", None), "func", None)  # a function of its own takes its place
    names = {str(one.__module__) for one in (model, model.config, tokenizer, generate) if one is not None}
    names = {name for name in names if name.startswith("transformers_modules.")}
    files = {str(sys.modules[name].__file__) for name in names}
    files |= {file for first in files for file in get_relative_import_files(first)}
    return sorted(sha256(Path(file)) for file in files)


def _words(tokenizer: Any) -> str:
    """SHA-256 of all that decides how a text becomes tokens and tokens a text; of a tokenizer that was not used yet."""
    reads = {name: _placeless(getattr(tokenizer, name, None)) for name in _READS}
    return atomic.fingerprint(tokenizer.backend_tokenizer.to_str(), _placeless(tokenizer.special_tokens_map), reads)


def numbers(device: torch.device) -> dict[str, str]:
    """What results depend on by more than the order of sums, and no recipe says: where torch computes, and how exactly.

    Threads, processes and kinds of processors change that order alone; and no run uses TF32.
    """
    settings = {
        "device": device.type,
        "dtype": torch.get_default_dtype(),
        "sums in 16 bits": getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False),
        "autocast": torch.is_autocast_enabled(device.type),
    }
    return {name: str(value) for name, value in settings.items()}


def drops_out(model: Any) -> bool:
    """Whether the model, in training, leaves states out by chance, as its configuration has it."""
    settings = model.config.to_dict().items()
    return any(isinstance(value, float) and value > 0 for name, value in settings if "drop" in name)


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its full path, in the model's order: ``nn.Linear`` and GPT-2's ``Conv1D``, but no head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }


def resolve_targets(
    model: nn.Module, targets: Literal["all-linear"] | tuple[str, ...], depth: tuple[float, float] = (0.0, 1.0)
) -> tuple[str, ...]:
    """Full paths of the modules a recipe's ``vector.lora.targets`` means, in the model's order.

    ``targets`` is ``all-linear``, or names: a full path or its end (``q_proj``, ``mlp.fc1``). Of L layers those with
    depth[0] <= (l + .5) / L <= depth[1] are taken, and modules outside the layers only with the whole depth.
    """
    linear = tuple(linear_modules(model))
    if targets == "all-linear":
        chosen, unmatched = set(linear), []
    else:
        matches = {t: {path for path in linear if path == t or path.endswith(f".{t}")} for t in targets}
        chosen = set().union(*matches.values())
        unmatched = [target for target, paths in matches.items() if not paths]
    if unmatched or not chosen:
        kinds = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in linear))
        close = {target: difflib.get_close_matches(target.rsplit(".", 1)[-1], kinds, 1, 0.5) for target in unmatched}
        named = [t + (f" (did you mean {close[t][0]}?)" if close[t] else "") for t in unmatched] or ["(no name given)"]
        raise ModelError(
            f"vector.lora.targets: no linear layer of this {type(model).__name__} is called {', '.join(named)}. "
            f"It has {', '.join(kinds) or 'none'}"
        )
    if depth != (0.0, 1.0):
        layers = {path: number for path in linear if (number := layer_of(path)) is not None}
        count = 1 + max(layers.values(), default=-1)
        within = {path for path, number in layers.items() if depth[0] <= (number + 0.5) / count <= depth[1]}
        if not within:
            raise ModelError(
                f"vector.lora.depth: none of the {count} layers lies between {depth[0]:g} and {depth[1]:g} of the depth"
            )
        chosen &= within
    return tuple(path for path in linear if path in chosen)


def layer_of(name: str) -> int | None:
    """The layer number in a module path (``model.layers.3.mlp.fc1``, ``transformer.h.3.attn.c_attn``), from 0."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def layer_at(model: nn.Module, number: int) -> nn.Module:
    """The layer of a number, counted from 0."""
    names = (found for name, _ in model.named_modules() if (found := _LAYER.search(name)))
    layers = {int(found.group(1)): found.string[: found.end(1)] for found in names}
    if number not in layers:
        raise ModelError(f"this {type(model).__name__} has no layer {number}: there are {len(layers)}, counted from 0")
    return model.get_submodule(layers[number])


# -- what a model folder's weights are, told from its configuration alone


@dataclass(frozen=True)
class Architecture:
    """The weights of a causal language model by name."""

    kind: str  # the model's class
    linear: Mapping[str, bool]  # weights of linear layers that stand alone -> whether stored as (in, out), as Conv1D is
    others: Mapping[str, str]  # all other tensors -> what they are, in words
    prefix: str  # what the model's names begin with where those of its body, saved alone, do not (``transformer.``)
    tied: Mapping[str, str]  # second names of weights, which need not be stored -> the first

    def canonical(self, name: str) -> str:
        """A stored tensor's name as the model has it: some checkpoints are of the body alone, without the prefix."""
        longer = self.prefix + name
        known = name in self.linear or name in self.others
        return longer if not known and (longer in self.linear or longer in self.others) else name

    def why_not(self, name: str) -> str:
        """Why a weight is not one a task vector can change."""
        return self.others.get(name, f"a {self.kind} has no such weight")


def architecture_of(folder: Path) -> Architecture:
    """The weights that a folder's ``config.json`` speaks of."""
    return lay_out(model_of(folder))


def config_of(folder: Path) -> PretrainedConfig:
    """A folder's ``config.json`` as transformers reads it."""
    if not (folder / "config.json").is_file():
        raise VectorError(f"{folder}: no folder of a model: it has no config.json")
    with _understood(folder):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config


def model_of(folder: Path) -> nn.Module:
    """The model of a folder's ``config.json`` without memory for its weights."""
    config = config_of(folder)
    with _understood(folder), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


@contextmanager
def _understood(folder: Path) -> Iterator[None]:
    try:
        with quietly():
            yield
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, RuntimeError) as e:
        said = shorten(first_line(e), 200)
        raise VectorError(
            f"{folder}: transformers cannot tell from its config.json what the weights are ({said})"
        ) from e


def lay_out(model: nn.Module) -> Architecture:
    """The weights of a model by name, whatever device it is on."""
    linear, others = {}, {}
    # of tied weights every name counts
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for short, tensor in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{short}" if path else short
            if tensor is None:
                pass
            elif short != "weight" or not isinstance(module, nn.Linear | Conv1D):
                others[name] = f"{type(module).__name__}'s {short}, not a linear layer's weight"
            elif owners[id(tensor)] > 1:
                others[name] = "a weight that several layers share, so that it would change twice"
            else:
                linear[name] = isinstance(module, Conv1D)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return Architecture(type(model).__name__, linear, others, prefix if len(prefix) > 1 else "", tied)
