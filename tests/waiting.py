"""Waiting for what other processes do, in the tests that start some."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path


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


def connected(process: int, port: int) -> bool:
    """Whether a connection with this port at either end is open in the network that a process is in. Linux only."""
    tables = (Path(f"/proc/{process}/net/{name}") for name in ("tcp", "tcp6"))
    lines = (line for table in tables if table.exists() for line in table.read_text().splitlines())
    return any(f":{port:04X} " in line and " 01 " in line for line in lines)
