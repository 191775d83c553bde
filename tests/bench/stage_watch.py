"""Peak memory, processor time and time of every stage of a run, watched from outside.

The run is a process of its own that announces its stages ("[3/8] teach: ..."). What it holds is read from /proc some
fifty times a second; pages of mapped files, which the system can take back, are counted apart.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_STAGE = re.compile(r"^\[\d+/\d+\] (\w+):")
_TICKS = os.sysconf("SC_CLK_TCK")
_EVERY = 0.02  # seconds


@dataclass
class Watched:
    """One stage. Memory in bytes: ``own`` is what the process allocated, ``mapped`` pages of files it has open."""

    stage: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    own: int = 0
    mapped: int = 0
    both: int = 0


def watch(command: Sequence[str], log: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run a command to its end; what every stage of it took. ``start`` is the time before the first stage.

    Raises:
        subprocess.CalledProcessError: the command failed; ``log`` has what it said.
    """
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            list(command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        )
        stages = [Watched("start")]
        began, used = time.monotonic(), 0.0
        reader = threading.Thread(target=_read, args=(process, said, stages), daemon=True)
        reader.start()
        while process.poll() is None:
            held, now = _memory(process.pid), time.monotonic()
            current, spent = stages[-1], _cpu(process.pid)
            current.seconds += now - began
            current.cpu_seconds += max(spent - used, 0.0)
            began, used = now, max(spent, used)
            current.own = max(current.own, held[0])
            current.mapped = max(current.mapped, held[1])
            current.both = max(current.both, sum(held))
            time.sleep(_EVERY)
        reader.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return [asdict(stage) for stage in stages]


def _read(process: subprocess.Popen[str], said: Any, stages: list[Watched]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.write(line)
        said.flush()
        found = _STAGE.match(line)
        if found:
            stages.append(Watched(found[1]))


def _memory(pid: int) -> tuple[int, int]:
    """(allocated, mapped files) in bytes; zeros when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0, 0
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return found.get("RssAnon", 0) + found.get("RssShmem", 0), found.get("RssFile", 0)


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


if __name__ == "__main__":
    import json

    print(json.dumps(watch(sys.argv[2:], Path(sys.argv[1]), {}), indent=1))
