"""Starting other processes, and waiting for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


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


def start(code: str, *arguments: Path, **environment: str) -> subprocess.Popen[str]:
    """A Python process that runs ``code``; its host is called node17 where ``FAR`` is in its environment."""
    far = "import os, socket, sys, time\nif os.environ.get('FAR'):\n    socket.gethostname = lambda: 'node17'\n"
    return subprocess.Popen(
        [sys.executable, "-c", far + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **environment},
    )


@contextmanager
def running(code: str, *arguments: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed ``ready`` and goes on; killed at the end."""
    process = start(code, *arguments, **environment)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            process.kill()
            raise AssertionError(process.communicate())
        yield process
    finally:
        process.kill()
        process.communicate()
