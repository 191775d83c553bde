"""Task vectors written as LoRA folders of PEFT's, which :mod:`unlearn.vector_adapter` reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from unlearn.changes import listed
from unlearn.errors import VectorError
from unlearn.vector import Dense, TaskVector
from unlearn.vector_adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PREFIX, TRANSPOSED

_TRANSPOSED_TYPES = ("gpt2", "openai-gpt")  # causal language models of transformers made of Conv1D


def to_adapter(vector: TaskVector, folder: Path, base: str, *, transposed: bool | None = None) -> None:
    """Write the vector as a LoRA adapter for ``PeftModel.from_pretrained(base, folder)``: exactly the same change.

    Args:
        folder: Where to; made if missing.
        base: What the adapter is to be put on: a hub id or a folder.
        transposed: Whether the base keeps its weights as (in, out) (GPT-2's Conv1D); None takes it from the folder
            ``base`` or the vector's metadata. When it is wrong PEFT warns, and does the right thing all the same.

    Raises:
        VectorError: a module is dense.
    """
    if transposed is None:
        transposed = vector.meta.get(TRANSPOSED) == "true" or _keeps_transposed(Path(base))
    names = list(vector.modules)
    write_adapter(vector, folder, base, target_modules(names, names, short=False), transposed)


def write_adapter(vector: TaskVector, folder: Path, base: str, targets: Sequence[str] | str, transposed: bool) -> None:
    """Write both files: factors in float32 and LoRA's scale alpha/r at 1 in every module.

    Raises:
        VectorError: a module is dense.
    """
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
    _settle(folder / ADAPTER_CONFIG)
    save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt"})


def _settle(path: Path) -> None:
    """Modules in order: PEFT holds them as a set, which every process lists in an order of its own."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(settings["target_modules"], list):
        settings["target_modules"].sort()
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def require_factors(vector: TaskVector) -> None:
    """Refuse a vector that cannot be an adapter.

    Raises:
        VectorError: a module is dense.
    """
    dense = [name for name, m in vector.modules.items() if isinstance(m, Dense)]
    if dense:
        raise VectorError(
            f"an adapter holds low-rank factors, but the change is dense in {len(dense)} modules: {listed(dense)}. "
            "Compress it with to_low_rank(rank) (unlearn.vectors low-rank) first, or export merged weights"
        )


def target_modules(names: Sequence[str], present: Sequence[str], *, short: bool = True) -> list[str] | str:
    """``target_modules`` that PEFT matches to exactly ``names``.

    An entry of a list also matches every module whose path ends with ``.entry``. So the last parts (``q_proj``) serve
    when they mean just these modules, which is what other tools read best; else full paths; else, should a full
    path be the end of another, one regular expression, which must match the whole path.

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


def _keeps_transposed(base: Path) -> bool:
    """What a folder's ``config.json`` says of its model; False where there is none (a hub id)."""
    try:
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") in _TRANSPOSED_TYPES
