"""Copies of a model: with an edit merged into the weights, and with those weights in 4 or 8 bits.

An edit is a small change of many weights, and rounding to a coarse grid may undo it: at 4 bits most of what had been
unlearned was there again (2410.16454).
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unlearn.attacks.values import quantisation
from unlearn.changes import edited
from unlearn.console import progress
from unlearn.errors import ModelError, VectorError
from unlearn.negate import fit
from unlearn.quiet import quietly
from unlearn.recipe_bench import Quantised
from unlearn.vector import TaskVector


@torch.no_grad()
def edited_copy(model: PreTrainedModel, vector: TaskVector | None, coefficient: float) -> PreTrainedModel:
    """A copy of its own with the weights of theta - coefficient * tau; coefficient 0 (or no vector): a plain copy.

    Each edited weight is the float32 sum, cast once to the weight's dtype: what a merged export holds. Under
    :class:`unlearn.negate.Edit` a 16-bit model has the change beside its weights, where neither quantisation nor
    further training would see it.

    Args:
        model: The unedited model, under no edit at the moment; not changed.
        vector: The change.
        coefficient: How much of it is subtracted.

    Raises:
        VectorError: the vector does not fit the model, or a weight that it changes is quantised.
    """
    twin = copy.deepcopy(model)
    twin.eval()
    if vector is None or coefficient == 0:
        return twin
    fitted = fit(twin, vector)
    packed = [n for n, (module, _) in fitted.items() if not module.get_parameter("weight").is_floating_point()]
    if packed:
        raise VectorError(f"an edit cannot be merged into quantised weights: {', '.join(packed)}")
    with progress("merging the edit", len(fitted)) as advance:
        for module, change in fitted.values():
            weight = module.get_parameter("weight")
            there = change.to(weight.device)
            weight.copy_(edited(weight.float(), there, -coefficient, isinstance(module, Conv1D)))
            advance(1)
    return twin


@contextmanager
def quantised(model: PreTrainedModel, kind: Quantised, work: Path | None = None) -> Iterator[PreTrainedModel]:
    """A quantised copy of a model as it is now; gone, with its files, after the ``with``.

    Args:
        model: With the edit in its weights (:func:`edited_copy`); not changed.
        kind: ``nf4`` (4-bit NormalFloat in blocks of 64, 2305.14314) or ``int8`` (LLM.int8(), 2208.07339). The head
            and the embeddings stay as they are.
        work: Folder that has room for the weights once more; the system's temporary one when not given.

    Raises:
        ModelError: bitsandbytes is missing, no room, or the copy has other weights than the model.
    """
    if find_spec("bitsandbytes") is None:
        raise ModelError(
            "robustness.quantize: quantised copies need the package bitsandbytes: install it, or set quantize to []"
        )
    with tempfile.TemporaryDirectory(prefix="quantise-", dir=work) as folder:
        with progress(quantisation(kind), 2) as advance, quietly():
            _save(model, Path(folder))
            advance(1)
            small = _read(model, Path(folder), kind)
            advance(1)
        with _without_advice():
            yield small


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence what is as it should be with every such copy.

    bitsandbytes says at every layer of every pass that 8-bit products are taken in 16 bits; and our scoring, that 8-bit
    models are not scored in packed rows: what is an outlier there depends on the rows beside it.
    """
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "unlearn.scoring")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _save(model: PreTrainedModel, folder: Path) -> None:
    before = model.config
    model.config = copy.deepcopy(before)  # saving writes into it
    # of several processes transformers has only the first one write, and here each has a copy and a folder of its own
    vars(model)["should_save_on_this_rank"] = lambda is_main_process: True
    try:
        model.save_pretrained(folder)
    except OSError as error:
        raise ModelError(f"robustness.quantize: cannot write a copy of the weights to {folder}: {error}") from error
    finally:
        model.config = before
        del vars(model)["should_save_on_this_rank"]


def _read(model: PreTrainedModel, folder: Path, kind: Quantised) -> PreTrainedModel:
    from transformers import BitsAndBytesConfig

    four: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": model.dtype,
    }
    config = BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}))
    small, report = type(model).from_pretrained(
        folder,
        dtype=model.dtype,
        quantization_config=config,
        device_map={"": model.device},
        use_safetensors=True,
        output_loading_info=True,
    )
    if wrong := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise ModelError(
            f"robustness.quantize: the quantised copy has other weights than the model: {', '.join(wrong)}"
        )
    for module in small.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # some CPUs would take products in bfloat16: what is to be seen is the rounding of the weights, everywhere
            module.support_avx512bf16_for_cpu = False
    small.eval()
    return small
