"""Several processes under ``accelerate launch``: they train together, then the main one goes on alone.

Alone, from the start, all of this does nothing and imports nothing.
"""

from __future__ import annotations

import os
from datetime import timedelta

_PATIENCE = timedelta(days=7)  # the others wait while one downloads, converts or writes


def several() -> bool:
    """Whether there are other processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> None:
    """Join the others, and wait until all of them are there."""
    if several():
        from accelerate import PartialState

        PartialState(timeout=_PATIENCE)
        wait()


def wait() -> None:
    """Until every process is here. After :func:`leave` there is nobody to wait for."""
    if several():
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()


def leave() -> None:
    """Part from the others. Calling it again does nothing."""
    if several():
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
