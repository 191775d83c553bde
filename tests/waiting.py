"""Starting other processes, and waiting for what they do."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable


def torchrun(processes: int) -> list[str]:
    """What stands before a module's name and arguments to start it in several processes of this machine."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", *launcher, "-m"]


def until(true: Callable[[], bool], seconds: float = 240) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def gone(process: int) -> bool:
    """Whether a process has ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False
