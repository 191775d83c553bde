"""Rounding float32 to 16 bits by chance, so that an edit too small for them survives on average."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Each element goes to one of its two neighbours in ``dtype``, with the probability that makes the mean exact.

    ``P(up) = (x - down) / (up - down)`` (e.g. Gupta et al. 1502.02551, section 3). What ``dtype`` can hold exactly
    stays as it is, and so does what overflows.

    Args:
        x: float32, any shape, any device.
        dtype: bfloat16 or float16.
        generator: On the CPU: the same draws on every device.

    Raises:
        ValueError: another dtype.
    """
    if x.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"rounds float32 to bfloat16 or float16, not {x.dtype} to {dtype}")
    nearest = x.to(dtype)
    there = nearest.float()
    # of one sign, 16-bit floats are ordered as the integers their bits spell, so the other neighbour is one bit away
    step = torch.where(x.abs() > there.abs(), 1, -1).to(torch.int16)
    bits = nearest.contiguous().view(torch.int16)
    other = torch.where(x == there, bits, bits + step).view(dtype)
    gap = other.float() - there
    share = torch.where(gap == 0, 0.0, (x - there) / gap)
    draw = torch.rand(x.shape, generator=generator).to(x.device)
    # beside an infinity the share is 0 or not a number, and so nothing moves
    return torch.where(draw < share, other, nearest)


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator of its own for each weight, so that the order in which they are written does not matter."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
