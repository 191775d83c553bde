"""A grid in the queue of a throwaway Slurm, and what may be asked of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from throwaway import Throwaway

from unlearn.cluster.job import JobState
from unlearn.cluster.plan import Grid

PICO = Path(__file__).resolve().parents[2] / "recipes" / "pico_smoke.yaml"
CLUSTER = """
cluster:
  memory: 2GB
  time: 0:20:00
  grace: 20
  setup: ["export OMP_NUM_THREADS=1"]
"""
_PATIENCE = 240.0


@dataclass(frozen=True)
class Submitted:
    """A grid in the queue: its folder as the tests see it, the cluster, what submit printed."""

    root: Path
    node: Throwaway
    said: str


def command(node: Throwaway, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command ``unlearn``, on the machine of the cluster's controller."""
    trusted = {**node.environment, "UNLEARN_TRUST_SETUP": "1"}
    return node.ask(sys.executable, "-m", "unlearn", *arguments, env=trusted, timeout=300)


def until(ready: Callable[[], Any], what: str, submitted: Submitted) -> Any:
    end = time.monotonic() + _PATIENCE
    while not (found := ready()):
        if time.monotonic() > end:
            files = [p for kind in ("*.log", "*.err", "*.out") for p in submitted.root.rglob(kind)]
            files += submitted.node.logs()
            logs = "\n".join(f"--- {p}\n{p.read_text(errors='replace')[-3000:]}" for p in files if p.is_file())
            pytest.fail(f"{what} did not happen:\n{submitted.node.run('squeue')}\n{logs}")
        time.sleep(0.1)
    return found


def recipe(steps: int, **cluster: int) -> str:
    """The pico recipe with a cluster block, and so many steps of its last training that there is a mid-way."""
    text = PICO.read_text().replace("path: data/", f"path: {PICO.parent}/data/").replace("steps: 30", f"steps: {steps}")
    return text + CLUSTER + "".join(f"  {key}: {value}\n" for key, value in cluster.items())


def training(submitted: Submitted, name: str, stage: str) -> str | None:
    """The number in the queue of a job that is in the middle of a training, which has left ``stage`` in its work."""
    state = JobState.load(submitted.root, name)
    at_work = list((Grid.load(submitted.root).job(name).folder(submitted.root) / ".unlearn-work").glob(stage))
    return state.slurm if state is not None and state.state == "running" and at_work else None


def finished(submitted: Submitted) -> bool:
    states = [JobState.load(submitted.root, job.name) for job in Grid.load(submitted.root).jobs]
    assert not [s for s in states if s is not None and s.state == "failed"], states
    return all(s is not None and s.state == "done" for s in states)


def without_times(folder: Path) -> Any:
    report = json.loads((folder / "report.json").read_text())
    return {k: report[k] for k in ("chosen", "scores", "sweep", "vector", "data")}


@dataclass(frozen=True)
class Trained:
    """A grid of one job that is in the middle of its training; ``task`` is its number in the queue."""

    grid: Submitted
    name: str
    task: str

    @property
    def state(self) -> JobState | None:
        return JobState.load(self.grid.root, self.name)

    def stopped_once(self) -> bool:
        return self.state is not None and (self.state.state == "stopped" or self.state.attempt == 2)

    def went_on_from_where_it_was(self) -> None:
        log = Grid.load(self.grid.root).job(self.name).log(self.grid.root).read_text()
        stop = re.search(r"stopped after step (\d+) of \d+; it is kept", log)
        assert stop is not None, log
        assert int(stop[1]) > 0
        assert self.state is not None
        assert self.state.attempt == 2


def waits(node: Throwaway, task: str) -> bool:
    return f"{task} PENDING" in node.run("squeue", "-h", "-r", "-o", "%i %T")


def start(node: Throwaway, task: str) -> None:
    """Slurm leaves a requeued job alone for two minutes, for the sake of broken nodes; here nobody has to wait.

    But for the credential of the attempt before, which the node has revoked up to the second it was told so: what
    begins in that very second is refused, and the job is gone.
    """
    if waits(node, task):
        time.sleep(3)
        node.ask("scontrol", "update", f"JobId={task}", "StartTime=now")
        time.sleep(1)
