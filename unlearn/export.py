"""Hand the edit back: as a PEFT adapter with the coefficient folded in, or as whole weights.

Both are theta - c * tau (Ilharco et al. 2212.04089, "negation"), c > 0. The adapter is exact in any dtype. Whole
weights in 16 bits are not: what they keep of the edit is measured and reported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.pytorch_utils import Conv1D

from unlearn.adapter_writer import require_factors, target_modules, write_adapter
from unlearn.card import CardFacts, card
from unlearn.changes import Change, edited
from unlearn.errors import VectorError
from unlearn.negate import fit
from unlearn.quiet import quietly
from unlearn.rounding import generator_for, round_stochastically
from unlearn.shards import Slot, parse_size, write_shards
from unlearn.survival import Survival, summary_of
from unlearn.vector import TaskVector

_ROUNDED = (torch.bfloat16, torch.float16)


def export_adapter(
    vector: TaskVector,
    coefficient: float,
    base_name: str,
    model: nn.Module,
    folder: Path,
    about: CardFacts | None = None,
) -> Mapping[str, Any]:
    """Write ``theta - coefficient * tau`` as a LoRA adapter for plain ``PeftModel.from_pretrained(base, folder)``.

    ``B' = -coefficient * B`` and ``A' = A`` per module, float32, with LoRA's scale alpha/r set to 1. (With both
    factors negated the edit would be an addition.)

    Args:
        base_name: What the adapter is to be put on: a hub id or a folder.
        model: The unedited model, to fit the vector to; not changed.
        folder: Where to; made if missing.
        about: For the model card; None writes none.

    Returns:
        ``coefficient``, ``modules`` (how many), ``rank`` (the largest), ``bytes``, ``files``.

    Raises:
        VectorError: the vector does not fit the model, is dense, or scaled by ``coefficient`` is not finite.
    """
    require_factors(vector)
    scaled = -coefficient * vector
    fitted = fit(model, scaled)
    targets = target_modules(list(scaled.modules), [n for n, _ in model.named_modules()])
    conv1d = any(isinstance(module, Conv1D) for module, _ in fitted.values())
    write_adapter(scaled, folder, base_name, targets, conv1d)
    _readme(folder, about, "adapter", base_name)
    return {
        "coefficient": coefficient,
        "modules": len(scaled.modules),
        "rank": scaled.rank(),
        **_contents(folder),
    }


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
    base_name: str = "",
    about: CardFacts | None = None,
) -> Mapping[str, Any]:
    """Write the weights of ``theta - coefficient * tau`` for plain ``AutoModelForCausalLM.from_pretrained(folder)``.

    Every edited weight is computed in float32 from the pristine one and then cast, one at a time.

    Args:
        model: The unedited model; bit-identical afterwards.
        tokenizer: Saved beside the weights.
        folder: Where to; made if missing.
        dtype: Of all floating-point weights; None for each weight's own.
        shard_size: Largest file, ``5GB``.
        stochastic_rounding: Round edited weights to 16 bits by chance instead of to the nearest.
        seed: For stochastic rounding.
        base_name, about: For the model card; ``about`` None writes none.

    Returns:
        ``coefficient``, ``dtype``, ``stochastic_rounding``, ``bytes``, ``files``, and ``survived``: ``cosine`` and
        ``norm_ratio`` of the realised against the intended change, ``changed`` (share of the elements of edited
        weights), and the same per module under ``modules``. The realised change is the difference between what is
        stored and the unedited weights stored in the same dtype (to nearest). Where nothing is intended, cosine and
        ratio are None.

    Raises:
        VectorError: the vector does not fit the model, or a weight it changes is quantised.
    """
    fitted = fit(model, vector)
    packed = [n for n in fitted if not model.get_parameter(f"{n}.weight").is_floating_point()]
    if packed or getattr(model, "hf_quantizer", None) is not None:
        raise VectorError(
            "whole weights cannot be written from a quantised model: load it without quantisation, or export the "
            "adapter only" + (f". Quantised: {', '.join(packed)}" if packed else "")
        )
    folder.mkdir(parents=True, exist_ok=True)
    edits = {f"{n}.weight": _edit(n, module, change, coefficient) for n, (module, change) in fitted.items()}
    measured: dict[str, Survival] = {}
    state = _distinct(model)

    @torch.no_grad()
    def value(name: str) -> Tensor:
        pristine = state[name]
        target = dtype if dtype is not None and pristine.is_floating_point() else pristine.dtype
        if name not in edits:
            return pristine.to(target)
        edit = edits[name]
        exact, intended = edit(pristine.float())
        if stochastic_rounding and target in _ROUNDED:
            stored = round_stochastically(exact, target, generator_for(seed, name))
        else:
            stored = exact.to(target)
        measured[name.removesuffix(".weight")] = Survival.of(stored, pristine.to(target), intended)
        return stored

    with quietly():
        _save(model, state, value, folder, dtype, shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    survived = summary_of(measured)
    _readme(folder, about, "merged", base_name, survived)
    return {
        "coefficient": coefficient,
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
        "stochastic_rounding": stochastic_rounding,
        **_contents(folder),
        "survived": survived,
    }


def _edit(
    name: str, module: nn.Module, change: Change, coefficient: float
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from a pristine float32 weight to (the edited weight, the intended change), in its own layout."""

    def edit(pristine: Tensor) -> tuple[Tensor, Tensor]:
        transposed = isinstance(module, Conv1D)  # it keeps (in, out)
        if tuple(pristine.shape) != (change.shape[::-1] if transposed else change.shape):
            raise VectorError(f"{name}: its weight is stored as {tuple(pristine.shape)}, which cannot take the vector")
        here = change.to(pristine.device)
        intended = -coefficient * (here.delta().T if transposed else here.delta())
        # the same operation that put the vector on the model while it was scored
        return edited(pristine, here, -coefficient, transposed), intended

    return edit


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
    with _config_of(model):
        if getattr(model, "_weight_conversions", None):
            # its files name or lay out weights otherwise than the model does; only transformers can turn that back,
            # and for all weights at once
            model.save_pretrained(folder, state_dict={n: value(n) for n in state}, max_shard_size=shard_size)
        else:
            if model.is_remote_code():
                custom_object_save(model, folder, config=cast("Any", model.config))
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
            slots = [
                Slot(n, tuple(t.shape), dtype if dtype is not None and t.is_floating_point() else t.dtype)
                for n, t in state.items()
            ]
            write_shards(slots, value, folder, parse_size(shard_size))
        model.config.architectures = [type(model).__name__]
        model.config.dtype = str(dtype or model.dtype).removeprefix("torch.")
        model.config.save_pretrained(folder)


@contextmanager
def _config_of(model: PreTrainedModel) -> Iterator[None]:
    """Let saving write into a copy of the model's configuration."""
    original = model.config
    model.config = copy.deepcopy(original)
    try:
        yield
    finally:
        model.config = original


def _readme(
    folder: Path,
    about: CardFacts | None,
    export: Literal["adapter", "merged"],
    base_name: str,
    survived: Mapping[str, Any] | None = None,
) -> None:
    if about is not None:
        (folder / "README.md").write_text(card(about, export, base_name, survived), encoding="utf-8")


def _contents(folder: Path) -> dict[str, Any]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {"bytes": sum(p.stat().st_size for p in files), "files": [p.relative_to(folder).as_posix() for p in files]}
