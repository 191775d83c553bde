"""A Slurm of two nodes: a job on both of them is stopped and goes on, and one whose node dies is done by the other."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machines
import pytest
import throwaway
from machines import Machines
from submitted import Submitted, Trained, command, finished, recipe, start, training, until, without_times
from throwaway import Throwaway

from unlearn import cli
from unlearn.cluster.job import JobState
from unlearn.cluster.plan import Grid

WHY_NOT = throwaway.why_not() or machines.why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


@dataclass(frozen=True)
class Pair:
    """Two machines, and the Slurm that has them as its nodes."""

    machines: Machines
    slurm: Throwaway

    def submit(self, name: str, text: str, *grid: str) -> Submitted:
        disk, stored = self.machines.disk, self.machines.stored
        (stored / f"{name}.yaml").write_text(text)
        done = command(self.slurm, "submit", str(disk / f"{name}.yaml"), *grid, "--out", str(disk / name))
        assert done.returncode == 0, done.stderr
        return Submitted(stored / name, self.slurm, done.stderr)

    def log(self, grid: Submitted, name: str) -> str:
        return Grid.load(grid.root).job(name).log(grid.root).read_text()


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    with Machines(tmp_path / "machines") as two:
        monkeypatch.setenv("UNLEARN_CACHE", str(two.disk / "cache"))
        monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "15")
        with Throwaway(tmp_path / "slurm", machines=two) as slurm:
            yield Pair(two, slurm)


def test_a_job_on_two_machines_saves_where_it_is_and_goes_on(pair: Pair) -> None:
    text = recipe(160, nodes=2, cpus=1).replace("teach: {", "choose: {keep: 0}\n# {")
    grid = pair.submit("spanning", text, "--grid", "seed=7")
    name = Grid.load(grid.root).jobs[0].name
    task = until(lambda: training(grid, name, "vectors+forget*"), "the training", grid)
    time.sleep(1)
    job = Trained(grid, name, task)
    pair.slurm.run("scancel", "--signal=USR2", task)  # what Slurm sends both of them before the time limit
    until(job.stopped_once, "the stop", grid)
    until(lambda: finished(grid) or start(pair.slurm, task), "the end", grid)
    job.went_on_from_where_it_was()
    assert pair.log(grid, name).count("2 processes share training and scoring") == 2
    assert not re.search(r'File ".*/unlearn/', pair.log(grid, name))  # torchrun has one of its own for a signal


@pytest.mark.slow
def test_a_job_whose_node_dies_is_done_by_the_other(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, session_cache: Path
) -> None:
    grid = pair.submit("dying", recipe(200, nodes=1, cpus=2), "--grid", "seed=0,1")  # a whole node for each

    def on_the_second() -> tuple[str, str] | None:
        for one in Grid.load(grid.root).jobs:
            state, task = JobState.load(grid.root, one.name), training(grid, one.name, "vectors+forget*/checkpoint-*")
            if state is not None and state.host == "node2" and task:
                return one.name, task
        return None

    name, task = until(on_the_second, "the training on the second node", grid)
    pair.machines.all[1].crash()
    until(lambda: finished(grid) or start(pair.slurm, task), "the end of both jobs", grid)
    state = JobState.load(grid.root, name)
    assert state is not None
    assert (state.host, state.attempt) == ("node1", 2)
    log = pair.log(grid, name)
    silent = [
        int(seconds) for seconds in re.findall(r"on host node2, which has given no sign of life for (\d+) s", log)
    ]
    assert silent
    assert silent[0] >= 15
    assert min(silent) >= 7  # a machine that is known to be dead is waited for less
    assert "vectors/retain: as before" in log

    monkeypatch.setenv("UNLEARN_CACHE", str(session_cache))
    job = next(one for one in Grid.load(grid.root).jobs if one.name == name)
    line = ["--recipe", str(pair.machines.stored / "dying.yaml"), "--out", str(tmp_path / "alone")]
    assert cli.main([*line, *(part for text in job.overrides for part in ("--set", text))]) == 0
    assert without_times(job.folder(grid.root)) == without_times(tmp_path / "alone")
