"""What of a grid is in Slurm's queue, by the names its arrays have there; and taking it out of the queue."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unlearn.errors import GridError

_PATIENCE = 60.0  # seconds for Slurm to answer
_FORM = "%i|%T|%j|%r"
NEVER = "DependencyNeverSatisfied"


@dataclass(frozen=True, slots=True)
class Entry:
    """A task in the queue: ``id`` as Slurm has it (``12_3``), ``state`` (RUNNING, PENDING, ...) and why it waits."""

    id: str
    state: str
    reason: str

    @property
    def ending(self) -> bool:
        """Whether its process has ended, or is about to: what it said itself is then the later word."""
        return self.state == "COMPLETING"

    @property
    def waits(self) -> bool:
        """Whether it has not begun, or not begun again."""
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED")


Queue = Mapping[tuple[str, int], Entry]


def ask(names: Sequence[str]) -> Queue | str:
    """What is in the queue under these names, by name and task; or why Slurm cannot be asked.

    By name and not by number: numbers may not be known, and Slurm forgets old ones.
    """
    if not names:
        return {}
    command = ["squeue", "-h", "-r", "--all", f"--name={','.join(names)}", "-o", _FORM]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except FileNotFoundError:
        return "there is no squeue here"
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"squeue does not answer ({e})"
    if done.returncode:
        return f"squeue says: {_first(done.stderr)}"
    found: dict[tuple[str, int], Entry] = {}
    for line in done.stdout.splitlines():
        number, state, name, reason = (*line.strip().split("|", 3), "", "", "")[:4]
        task = number.partition("_")[2]
        if task.isdecimal():
            found[name, int(task)] = Entry(number, state, reason)
    return found


def cancel(arrays: Sequence[str]) -> None:
    """Take whole arrays out of the queue, running tasks included.

    Raises:
        GridError: Slurm refuses.
    """
    try:
        done = subprocess.run(["scancel", *arrays], capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise GridError(f"scancel cannot be run: {e}") from e
    if done.returncode:
        raise GridError(f"Slurm did not cancel {', '.join(arrays)}: {_first(done.stderr)}")


def _first(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "nothing, but it failed")
