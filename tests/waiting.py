"""Waiting for what other processes do, in the tests that start some."""

from __future__ import annotations

import os
import time
from collections.abc import Callable


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
