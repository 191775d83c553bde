"""Several processes under ``accelerate launch``: they train together, then the main one goes on alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(days=7)  # the others wait while one downloads, converts or writes


@contextmanager
def started() -> Iterator[None]:
    """Join the process group if there is one to join, and leave it at the end. Alone, nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accelerate import PartialState

    PartialState(timeout=_PATIENCE)
    dist.barrier()  # the main process has opened the run folder
    try:
        yield
        dist.barrier()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
