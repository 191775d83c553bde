"""The number formats in which a model is trained and differentiated.

What learns is held in float32: a bfloat16 weight has eight bits, so that a step below 1/512 of it is rounded away, as
nearly every step of a full fine-tuning is (Micikevicius et al. 1710.03740). float16 has no gradients below 6e-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import nn

Mixed = Literal["no", "bf16", "fp16"]


def mixed_precision(model: nn.Module) -> Mixed:
    """The autocast under which a model is trained, from its weights as they were loaded.

    Only on CUDA: elsewhere there is no scaled loss, which float16 needs, and products of 16 bits are seldom faster.
    Quantised weights are multiplied in a format of their own, and all else beside them is in float32.
    """
    weight = next(model.parameters())
    if weight.device.type != "cuda" or getattr(model, "is_quantized", False):
        return "no"
    formats: dict[torch.dtype, Mixed] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    return formats.get(weight.dtype, "no")


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` weights of 16 bits are held in float32; after it they are rounded to the format they had.

    A weight that was not changed comes back with the same bits.
    """
    narrow = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
    config = getattr(model, "config", None)
    said = getattr(config, "dtype", None)
    try:
        for parameter, _ in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrow:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        if config is not None and said is not None:
            config.dtype = said  # a checkpoint's saving has written float32 there


def range_for_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """float16 weights in float32 inside the ``with``, where gradients are taken of a loss that is not scaled up.

    Other models stay as they are: bfloat16 has float32's range, and what is summed up over gradients is float32.
    """
    narrow = any(p.dtype == torch.float16 for p in model.parameters())
    return float32_weights(model) if narrow else nullcontext()
