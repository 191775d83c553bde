"""What a job of a grid says about itself, in ``state/<job>.json``: for the status table and for going on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from unlearn.store.files import write_json_atomic
from unlearn.text import hide

State = Literal["running", "done", "stopped", "failed"]
STATE_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class JobState:
    """One job's last word.

    ``running`` is only what it said last: a killed job says so for ever. ``stopped``: it was told to stop (time limit,
    pre-emption, Ctrl-C) and goes on from its last finished stage or checkpoint. ``attempt`` counts from 1. ``pid``,
    ``host`` and ``started`` identify the process (``Holder``); ``slurm`` is the job's name in the
    queue (``123_4``). ``error`` is the message (the end of the traceback for a crash) of a failed job.
    """

    state: State
    attempt: int
    pid: int
    host: str
    started: str
    since: str
    slurm: str | None = None
    exit: int | None = None
    error: str | None = None
    seconds: float | None = None

    def save(self, root: Path, name: str) -> None:
        """Write it.

        Raises:
            RunFolderError: the place cannot be written, or is full.
        """
        path = state_file(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        error = None if self.error is None else hide(self.error)
        write_json_atomic(path, {"schema": STATE_SCHEMA, **asdict(self), "error": error})

    @classmethod
    def load(cls, root: Path, name: str) -> JobState | None:
        """What the job said last; None when it never began, or when the file is damaged."""
        try:
            data = json.loads(state_file(root, name).read_text(encoding="utf-8"))
            if data.pop("schema") != STATE_SCHEMA:
                return None
            return cls(**data)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None


def state_file(root: Path, name: str) -> Path:
    """Where a job's state is kept."""
    return root / "state" / f"{name}.json"
