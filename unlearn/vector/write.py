"""Hand the edit back: as a PEFT adapter with the coefficient folded in, or as whole weights.

Both are theta - c * tau (Ilharco et al. 2212.04089, "negation"), c > 0. The adapter is exact in any dtype. Whole
weights in 16 bits are not: what they keep of the edit is measured and reported.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.pytorch_utils import Conv1D

from unlearn.console import quietly
from unlearn.errors import BrokenModelError, VectorError
from unlearn.model.checkpoint import INDEX, doubled_weights
from unlearn.processes import is_out_of_memory
from unlearn.vector.change import Survival, edited, generator_for, lost, round_stochastically, summary_of
from unlearn.vector.edit import fit, subtracted
from unlearn.vector.interop import require_factors, target_modules, write_adapter
from unlearn.vector.task_vector import TaskVector

_16_BITS = (torch.bfloat16, torch.float16)
# Nats per token that a forward pass in a number format may be off, and the share of an edit's effect that may be lost.
_FORWARD = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SHARE = 0.1
_WAYS_OUT = (
    "Set export.dtype to float32 or export.stochastic_rounding to true, or take the adapter, which is exact; "
    "export.accept_rounding: true writes them all the same"
)
Export = dict[str, Any]


def export_adapter(vector: TaskVector, coefficient: float, base_name: str, model: nn.Module, folder: Path) -> Export:
    """Write ``theta - coefficient * tau`` as a LoRA adapter for plain ``PeftModel.from_pretrained(base, folder)``.

    ``B' = -coefficient * B`` and ``A' = A`` per module, float32, with LoRA's scale alpha/r set to 1.

    Args:
        base_name: What the adapter is to be put on: a hub id or a folder.
        model: The unedited model, to fit the vector to; not changed.
    """
    require_factors(vector)
    scaled = -coefficient * vector
    fitted = fit(model, scaled)
    targets = target_modules(list(scaled.modules), [n for n, _ in model.named_modules()])
    write_adapter(scaled, folder, base_name, targets, any(isinstance(m, Conv1D) for m, _ in fitted.values()))
    done = {"coefficient": coefficient, "modules": len(scaled.modules), "rank": scaled.rank()}
    return {**done, **contents(folder)}


def export_merged(
    model: PreTrainedModel,
    vector: TaskVector,
    coefficient: float,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    dtype: torch.dtype | None = None,
    shard_size: str = "5GB",
    stochastic_rounding: bool = False,
    seed: int = 0,
    accept_rounding: bool = False,
) -> Export:
    """Write the weights of ``theta - coefficient * tau`` for plain ``AutoModelForCausalLM.from_pretrained(folder)``.

    Every edited weight is computed in float32 from the pristine one and then cast, one file at a time.

    Args:
        model: The unedited model; bit-identical afterwards.
        tokenizer: Saved beside the weights.
        dtype: Number format of all floating-point weights; None keeps each one's own.
        shard_size: Bytes (``5GB``) after which a new file begins. A larger single tensor gets a file of its own.
        stochastic_rounding: Round edited weights to 16 bits by chance (``seed``); the others to nearest.
        accept_rounding: Write also what rounding to nearest has made another edit of.

    Returns:
        What report.json has of it. ``survived`` is :func:`summary_of` the realised change, which is what is stored
        less the unedited weights in the same dtype (to nearest), against the intended one.
    """
    fitted = fit(model, vector)
    packed = [n for n in fitted if not model.get_parameter(f"{n}.weight").is_floating_point()]
    if packed or getattr(model, "hf_quantizer", None) is not None:
        raise VectorError(
            "whole weights cannot be written from a quantised model: load it without quantisation, or export the "
            "adapter only" + (f". Quantised: {', '.join(packed)}" if packed else "")
        )
    state, edits = _distinct(model), {f"{name}.weight": found for name, found in fitted.items()}

    @torch.no_grad()
    def value(name: str) -> Tensor:
        pristine = state[name]
        target = dtype if dtype is not None and pristine.is_floating_point() else pristine.dtype
        if name not in edits:
            stored = pristine.to(target)
        else:
            # the same operation that put the vector on the model while it was scored
            layer, change = edits[name]
            exact = edited(pristine.float(), change.to(pristine.device), -coefficient, isinstance(layer, Conv1D))
            by_chance = stochastic_rounding and target in _16_BITS
            stored = round_stochastically(exact, target, generator_for(seed, name)) if by_chance else exact.to(target)
        require_finite(name, stored)
        return stored

    measured = {}
    with torch.no_grad():
        for name, (module, change) in edits.items():
            stored = value(name)
            delta = change.to(stored.device).delta()
            intended = -coefficient * (delta.T if isinstance(module, Conv1D) else delta)
            measured[name.removesuffix(".weight")] = Survival.of(stored, state[name].to(stored.dtype), intended)
    survived = summary_of(measured)
    if not accept_rounding and not stochastic_rounding and (said := lost(survived, _WAYS_OUT)):
        raise VectorError(f"export.merged: {said}")
    folder.mkdir(parents=True, exist_ok=True)
    with quietly():
        _save(model, state, value, folder, dtype, shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if said := doubled_weights(folder):
        raise VectorError(said)
    done = {"coefficient": coefficient, "dtype": _called(dtype or model.dtype)}
    return {**done, "stochastic_rounding": stochastic_rounding, **contents(folder), "survived": survived}


def rescored(
    folder: Path,
    model: PreTrainedModel,
    vector: TaskVector,
    coefficient: float,
    log_probs: Callable[[PreTrainedModel], Sequence[np.ndarray[Any, Any]]],
    accept_rounding: bool = False,
) -> Mapping[str, float]:
    """Load merged weights as anybody would, and compare what they say with what the edited model in memory says.

    Args:
        folder: What :func:`export_merged` wrote of the other arguments.
        log_probs: Of a model: the log-probabilities of the answer tokens of some items.

    Returns:
        ``items``; ``difference``, the mean over answer tokens of |log p(reloaded) - log p(edited)|, in nats; ``edit``,
        the same between the edited and the unedited model; ``allowed``, what rounding explains of a difference:
        that of the coarser number format in a forward pass, and a tenth of what the edit does.
    """
    before = np.concatenate(log_probs(model))
    with subtracted(model, vector, coefficient):
        wanted = np.concatenate(rows := log_probs(model))
    with quietly():
        read: Any = AutoModelForCausalLM.from_pretrained
        again = read(folder, dtype="auto", use_safetensors=True, trust_remote_code=model.is_remote_code())
    again.eval()
    try:
        try:
            found = np.concatenate(log_probs(again.to(model.device)))
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
            found = np.concatenate(log_probs(again.to("cpu")))  # beside the other one there is no room for it
    except BrokenModelError as e:
        raise VectorError(f"{folder}: read again as {again.dtype}, the merged model does not work: {e}") from e
    difference, edit = float(np.abs(found - wanted).mean()), float(np.abs(wanted - before).mean())
    allowed = max(_FORWARD[model.dtype], _FORWARD[again.dtype]) + _SHARE * edit
    if difference > allowed and not accept_rounding:
        raise VectorError(
            f"export.merged: the merged model, read again, is not the one that was scored: on {len(rows)} items its "
            f"log-probabilities per token are {difference:.3f} nats off, where the edit changes them by {edit:.3f} and "
            f"rounding explains {allowed:.3f}. Write float32, or take the adapter, which is exact; "
            "export.accept_rounding writes it all the same"
        )
    return {"items": len(rows), "difference": difference, "edit": edit, "allowed": allowed}


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that its number format cannot hold."""
    finite = not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())
    if tensor.is_floating_point() and not finite:
        raise VectorError(
            f"{name}: as {_called(tensor.dtype)} it has values that are no finite numbers (or has them before): take "
            "float32, or bfloat16, which reaches as far, or change less"
        )


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _distinct(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict without the second names of tied weights, which loading ties again."""
    state = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    return {
        name: tensor
        for name, tensor in state.items()
        if name not in ignored
        and not (name in tied and tied[name] in state and state[tied[name]].data_ptr() == tensor.data_ptr())
    }


def _save(
    model: PreTrainedModel,
    state: Mapping[str, Tensor],
    value: Callable[[str], Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    shard_size: str,
) -> None:
    """Weights, configuration and custom code, leaving the model's own configuration as it was."""
    original = model.config
    model.config = copy.deepcopy(original)
    try:
        if getattr(model, "_weight_conversions", None):
            # its files name or lay out weights otherwise than the model does; only transformers can turn that back,
            # and for all weights at once
            model.save_pretrained(folder, state_dict={n: value(n) for n in state}, max_shard_size=shard_size)
        else:
            if model.is_remote_code():
                custom_object_save(model, folder, config=cast("Any", model.config))
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
            later = {
                n: torch.empty_like(t, dtype=dtype if t.is_floating_point() else None, device="meta")
                for n, t in state.items()
            }
            save_shards(later, value, folder, shard_size)
        model.config.architectures = [type(model).__name__]
        model.config.dtype = _called(dtype or model.dtype)
        model.config.save_pretrained(folder)
    finally:
        model.config = original


def save_shards(later: Mapping[str, Tensor], value: Callable[[str], Tensor], folder: Path, shard_size: str) -> None:
    """Write ``model.safetensors``, or numbered files with their index; one of them at a time is in memory.

    Args:
        later: Every tensor on the meta device: its shape and format.
        value: Of a name, the tensor.
    """
    plan = split_torch_state_dict_into_shards(dict(later), max_shard_size=shard_size)
    for file, names in plan.filename_to_tensors.items():
        tensors = {n: value(n).detach().cpu().contiguous() for n in names}
        save_file(tensors, folder / file, {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def contents(folder: Path) -> dict[str, Any]:
    """Size and names of all files in a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {"bytes": sum(p.stat().st_size for p in files), "files": [p.relative_to(folder).as_posix() for p in files]}
