"""Telling an exhausted memory from other errors."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and the CPU allocator's ways of saying so."""
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate" in text
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)
