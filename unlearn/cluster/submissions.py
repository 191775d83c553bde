"""``submissions.json``: what was handed to Slurm or to a local runner, and when. The queue itself is asked for states.

The intention is written before anything is handed over, the queue's number after it. Whoever is killed in between
leaves a submission without a number, and its jobs are found in the queue by their name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from unlearn.errors import GridError
from unlearn.store.files import explained, write_json_atomic
from unlearn.store.lock import Holder, Lock

FILE, LOCK = "submissions.json", ".submit-lock"
_WAIT = 60.0  # seconds for another command on the same grid; none of them holds the lock for long


@dataclass(frozen=True, slots=True)
class Submission:
    """Jobs handed over together, and the preparations before them.

    ``jobs`` and ``preparations`` are indices into the grid, in the order of the array's tasks. ``name`` is what the
    jobs are called in the queue (``name + "p"``: the preparations), never the same twice. ``array`` and
    ``preparation`` are Slurm's numbers, None until they are known. ``attempts`` is how often jobs (by their names)
    had begun before, zeros left out. ``pid``, ``host`` and ``started`` are of the process that submitted them, or that
    runs them; ``ended`` is when that local runner had nothing left to do.
    """

    when: str
    kind: Literal["slurm", "local"]
    name: str
    jobs: tuple[int, ...]
    preparations: tuple[int, ...]
    pid: int
    host: str
    started: str
    attempts: Mapping[str, int] = field(default_factory=dict)
    preparation: str | None = None
    array: str | None = None
    ended: str | None = None

    @classmethod
    def new(
        cls,
        kind: Literal["slurm", "local"],
        grid: str,
        jobs: Sequence[int],
        preparations: Sequence[int],
        attempts: Mapping[str, int],
    ) -> Submission:
        """A submission by this process, now."""
        me = Holder.me()
        name = f"{grid}-{secrets.token_hex(4)}"
        begun = {name: count for name, count in attempts.items() if count}
        return cls(now(), kind, name, tuple(jobs), tuple(preparations), me.pid, me.host, me.started, begun)

    def at_work(self) -> bool:
        """Whether the process that submitted it (or runs it) may still be at it."""
        return self.ended is None and not Holder(self.pid, self.host, self.started, self.when).gone()


def now() -> str:
    """The time as all files of a grid have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(root: Path) -> list[Submission]:
    """All submissions of a grid, the first one first.

    Raises:
        GridError: the file is damaged.
        RunFolderError: it cannot be read.
    """
    path = root / FILE
    try:
        with explained(path):
            data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [Submission(**{**d, **{k: tuple(d[k]) for k in ("jobs", "preparations")}}) for d in data]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise GridError(
            f"{path}: damaged: {e}. It says what is in the queue; see that nothing of this grid is, remove the file, "
            "and submit the grid again"
        ) from e


def put(root: Path, one: Submission) -> None:
    """Add a submission, or replace that of the same name. For who holds :func:`alone`.

    Raises:
        GridError, RunFolderError: the file is damaged, or cannot be written.
    """
    there = read(root)
    found = [one if old.name == one.name else old for old in there]
    write_json_atomic(root / FILE, [asdict(s) for s in (found if one in found else [*there, one])])


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Nobody else submits, cancels or writes about this grid meanwhile.

    Raises:
        RunFolderError: somebody else does, and for long; or the folder cannot be written.
    """
    with explained(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = Lock.take(root / LOCK, wait=_WAIT, what=f"the grid {root}")
    try:
        yield
    finally:
        lock.release()
