"""How every job of a grid stands: what it said last, what was submitted, and what is in the queue, put together.

They are read in an order that keeps a job which moves on meanwhile from being taken for lost: first what was submitted,
then the queue, then the jobs' own words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unlearn.cluster.grid import Grid, Job, Preparation, job_folder
from unlearn.cluster.job import claim_file
from unlearn.cluster.job_state import JobState
from unlearn.cluster.runs import sealed
from unlearn.cluster.slurm_queue import NEVER, Entry, ask
from unlearn.cluster.submissions import Submission, read
from unlearn.store.lock import Lock

Standing = Literal["done", "running", "queued", "requeued", "stopped", "failed", "lost", "blocked", "waiting"]
STANDINGS: tuple[Standing, ...] = (
    *("done", "running", "queued", "requeued", "stopped", "failed", "lost", "blocked", "waiting"),
)
ACTIVE = frozenset({"running", "queued", "requeued"})
_HEAD = 16_384  # characters of a report in which its choice stands
_CHOSEN = re.compile(r'"chosen":\s*\{\s*"coefficient":\s*([0-9.eE+-]+),\s*"bound_met":\s*(true|false)')


@dataclass(frozen=True, slots=True)
class Row:
    """One job or preparation.

    ``since`` is of its last word; ``seconds`` what its last attempt took; ``coefficient`` the chosen λ of a done job, 0
    where none passed the rule and its model is unchanged; ``bound_met`` whether one passed; ``where`` its number in
    Slurm's queue, or process and host; ``error`` why it is not done, if there is a reason.
    """

    name: str
    settings: Mapping[str, str]
    state: Standing
    attempt: int = 0
    since: str | None = None
    seconds: float | None = None
    coefficient: float | None = None
    bound_met: bool | None = None
    where: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Overview:
    """All of a grid at one moment.

    ``remarks`` are what could not be found out; ``unasked`` is why Slurm did not answer, if it should have.
    """

    root: Path
    grid: Grid
    jobs: tuple[Row, ...]
    preparations: tuple[Row, ...]
    submissions: tuple[Submission, ...]
    queue: Mapping[tuple[str, int], Entry]
    remarks: tuple[str, ...]
    unasked: str | None

    def count(self, *states: str) -> int:
        """How many jobs stand so."""
        return sum(row.state in states for row in self.jobs)


def overview(root: Path) -> Overview:
    """How a grid stands.

    Raises:
        GridError: it is no grid's folder, or one of its files is damaged.
        RunFolderError: it cannot be read.
    """
    grid = Grid.load(root)
    submissions = read(root)
    answer = ask([name for s in submissions if s.kind == "slurm" for name in (f"{s.name}p", s.name)])
    seen = _Seen.of(root, grid, submissions, answer)
    preparations = tuple(seen.row(p, None) for p in grid.preparations)
    jobs = tuple(seen.row(j, preparations[j.preparation] if j.preparation is not None else None) for j in grid.jobs)
    remarks = []
    unasked = answer if isinstance(answer, str) else None
    if unasked is not None:
        remarks.append(f"Slurm cannot be asked: {unasked}. Of what is in its queue this is the last that was heard")
    if far := sorted({row.where or "" for row in (*preparations, *jobs) if row.state == "running" and seen.far(row)}):
        remarks.append(f"whether these still run cannot be seen from here: {', '.join(far[:5])}")
    queue = {} if isinstance(answer, str) else answer
    return Overview(root, grid, jobs, preparations, tuple(submissions), queue, tuple(remarks), unasked)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was submitted and what the queue says, by the names of jobs and preparations."""

    root: Path
    last: Mapping[str, Submission]
    numbers: Mapping[str, str]
    queue: Mapping[str, Entry]
    asked: bool
    unclear: set[str]

    @classmethod
    def of(
        cls, root: Path, grid: Grid, submissions: Sequence[Submission], answer: Mapping[tuple[str, int], Entry] | str
    ) -> _Seen:
        last: dict[str, Submission] = {}
        numbers: dict[str, str] = {}
        queue: dict[str, Entry] = {}
        for one in submissions:
            jobs = [(one.name, k, grid.jobs[i].name, one.array) for k, i in enumerate(one.jobs)]
            jobs += [
                (f"{one.name}p", k, grid.preparations[i].name, one.preparation) for k, i in enumerate(one.preparations)
            ]
            for array, task, name, number in jobs:
                last[name] = one
                numbers[name] = f"{number}_{task}" if number else ""
                if not isinstance(answer, str) and (entry := answer.get((array, task))) is not None:
                    queue[name] = entry
        return cls(root, last, numbers, queue, not isinstance(answer, str), set())

    def far(self, row: Row) -> bool:
        """Whether it is taken to run only because nothing else is known."""
        return row.name in self.unclear

    def row(self, one: Job | Preparation, prepared: Row | None) -> Row:
        """How one job or preparation stands; ``prepared`` is the row of the preparation that it needs."""
        said = JobState.load(self.root, one.name)
        report = job_folder(self.root, one.name) / "report.json" if isinstance(one, Job) else None
        state, error = self._judge(one.name, said, report)
        if state == "lost" and (later := JobState.load(self.root, one.name)) != said:  # it ended while we looked
            said = later
            state, error = self._judge(one.name, said, report)
        never = said is None and state in ("waiting", "lost", "queued")
        if never and prepared is not None and state != "queued" and _hopeless(prepared.state, state):
            state, error = "blocked", f"its preparation {prepared.name} is {prepared.state}"
        settings = one.settings if isinstance(one, Job) else {"makes": ", ".join(one.what)}
        entry = self.queue.get(one.name)
        where = entry.id if entry is not None else None
        if where is None and said is not None and state == "running":
            where = f"process {said.pid} on {said.host}"
        if said is None:
            return Row(one.name, settings, state, where=where, error=error)
        chosen = _chosen(report) if report is not None and state == "done" else (None, None)
        return Row(one.name, settings, state, said.attempt, said.since, said.seconds, *chosen, where, error)

    def _judge(self, name: str, said: JobState | None, report: Path | None) -> tuple[Standing, str | None]:
        if said is not None and said.state == "done" and (report is None or sealed(report.parent)):
            return "done", None
        entry = self.queue.get(name)
        if entry is not None and not (entry.ending and said is not None and said.state != "running"):
            if entry.reason == NEVER:
                return "blocked", "Slurm: what it waits for has failed"
            if not entry.waits:
                return "running", None
            again = said is not None and said.slurm == entry.id
            return "requeued" if again else "queued", entry.reason if entry.reason.startswith("launch") else None
        handed = self.last.get(name)
        if handed is not None and self._may_still_begin(handed, name, said):
            return "queued", None
        if said is None:
            return self._never_began(handed, name)
        if said.state == "failed":
            return "failed", said.error
        if said.state == "stopped":
            return "stopped", None
        if said.state == "done":
            return "lost", "said that it is done, but its report.json is gone, or not as the run wrote it"
        return self._says_running(handed, name, said)

    def _may_still_begin(self, handed: Submission, name: str, said: JobState | None) -> bool:
        """Whether somebody has it on a list that cannot be seen in the queue."""
        if said is not None and said.attempt > handed.attempts.get(name, 0):
            return False
        if handed.kind == "local" or not self.numbers[name]:
            return handed.at_work()
        return not self.asked and handed.ended is None

    def _never_began(self, handed: Submission | None, name: str) -> tuple[Standing, str | None]:
        if handed is None or handed.ended is not None:
            return "waiting", None
        if handed.kind == "local":
            return "lost", "never began: its local runner was killed"
        if number := self.numbers[name]:
            return "lost", f"never began: Slurm does not know {number} any more"
        return "lost", "perhaps submitted: whoever submitted it was killed before Slurm's answer, and it never began"

    def _says_running(self, handed: Submission | None, name: str, said: JobState) -> tuple[Standing, str | None]:
        lock = Lock.alive(claim_file(self.root, name))
        # a local runner's jobs may be within an allocation of Slurm's, which is no array of ours
        in_slurm = said.slurm is not None and handed is not None and handed.kind == "slurm"
        if lock == "unknown" and not (in_slurm and self.asked):
            self.unclear.add(name)
            return "running", None
        if lock == "held":
            return "running", None
        return "lost", f"ended without a word (killed?), on {said.host}" + (f", Slurm {said.slurm}" if in_slurm else "")


def _hopeless(preparation: str, state: str) -> bool:
    """Whether a job that never began cannot begin: Slurm drops those whose preparation came to nothing."""
    return preparation == "failed" or (state == "lost" and preparation in ("lost", "stopped", "blocked"))


def _chosen(report: Path) -> tuple[float | None, bool | None]:
    """The chosen λ and whether the rule was met, from the beginning of the file: a thousand whole reports take long."""
    try:
        with report.open(encoding="utf-8") as file:
            found = _CHOSEN.search(file.read(_HEAD))
        return (float(found[1]), found[2] == "true") if found else (None, None)
    except (OSError, ValueError):
        return None, None
