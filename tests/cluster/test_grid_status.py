"""How the jobs of a grid stand, from what they said, what was submitted and what the queue says."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from unlearn.cluster import status as grid_status
from unlearn.cluster.grid import Axis, FrozenRecipe, Grid, Job, Preparation, job_folder
from unlearn.cluster.job import claim_file
from unlearn.cluster.job_state import JobState
from unlearn.cluster.runs import read_runs
from unlearn.cluster.states import Overview, overview
from unlearn.cluster.submissions import FILE, Submission, alone, now, put, read
from unlearn.cluster.submit import resubmit
from unlearn.errors import GridError
from unlearn.results import Chosen
from unlearn.store.lock import Holder, Lock

QUEUE = "g-0a1b2c3d"


def make(root: Path, count: int = 4, prepared: bool = True, text: str = "name: g\n") -> Grid:
    """A grid folder whose jobs were never run."""
    grid = Grid(
        name="g",
        created=now(),
        cwd=str(root),
        recipes=(FrozenRecipe("g", str(root / "g.yaml"), text),),
        axes=(Axis("seed", tuple(map(str, range(count)))),),
        preparations=(Preparation(0, "p000-g", 0, (), ("model",)),) if prepared else (),
        jobs=tuple(Job(i, f"{i:04}-seed={i}", 0, (), {"seed": str(i)}, 0 if prepared else None) for i in range(count)),
    )
    grid.save(root)
    return grid


def dead() -> Holder:
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    from unlearn.store.lock import started

    found = replace(Holder.me(), pid=child.pid, started=started(child.pid))
    child.communicate("\n")
    return found


def say(root: Path, name: str, state: str, holder: Holder | None = None, attempt: int = 1, **more: object) -> JobState:
    """Write a job's state, as the job would."""
    who = holder or Holder.me()
    said = JobState(state, attempt, who.pid, who.host, who.started, now(), **more)  # type: ignore[arg-type]
    said.save(root, name)
    return said


def report(root: Path, name: str, chosen: float = 1.5) -> None:
    """A report as a run seals it: its chosen coefficient is 0 where none passed the rule."""
    place = job_folder(root, name)
    place.mkdir(parents=True, exist_ok=True)
    rule = Chosen(chosen, chosen > 0, "most forgetting", "acc")
    text = json.dumps({"schema": 1, "name": "g", "description": "x", "chosen": asdict(rule)}, indent=2)
    (place / "report.json").write_text(text)
    (place / "provenance.json").write_text(json.dumps({"report_sha256": hashlib.sha256(text.encode()).hexdigest()}))


def submitted(root: Path, jobs: tuple[int, ...], kind: str = "slurm", **more: object) -> Submission:
    who = more.pop("holder", None) or dead()
    assert isinstance(who, Holder)
    one = Submission(
        **{  # type: ignore[arg-type]
            **{"when": now(), "kind": kind, "name": QUEUE, "jobs": jobs, "preparations": ()},
            **{"pid": who.pid, "host": who.host, "started": who.started, **more},
        }
    )
    put(root, one)
    return one


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``squeue`` prints in this test: a program of that name that prints a file. Slurm itself has a test of its
    own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    said = tmp_path / "queue.txt"
    said.write_text("")
    (folder / "squeue").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/asked.txt"\ncat "{said}"\n')
    (folder / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return said


def states(found: Overview) -> list[str]:
    return [row.state for row in found.jobs]


def test_each_job_stands_as_its_own_word_says(tmp_path: Path) -> None:
    grid = make(tmp_path, 5, prepared=False)
    names = [job.name for job in grid.jobs]
    say(tmp_path, names[0], "done", seconds=12.0)
    report(tmp_path, names[0], 2.5)
    say(tmp_path, names[1], "failed", error="2 mistakes in the recipe:\n  one\n  two", seconds=1.0, attempt=3)
    say(tmp_path, names[2], "stopped")
    say(tmp_path, names[3], "running")
    claim_file(tmp_path, names[3]).parent.mkdir(exist_ok=True)
    with Lock.take(claim_file(tmp_path, names[3])):
        found = overview(tmp_path)
    assert states(found) == ["done", "failed", "stopped", "running", "waiting"]
    assert found.jobs[0].coefficient == 2.5
    assert (found.jobs[1].attempt, found.jobs[1].error) == (3, "2 mistakes in the recipe:\n  one\n  two")
    assert found.jobs[4].attempt == 0
    assert grid_status.totals(found) == "1 done, 1 running, 1 stopped, 1 failed, 1 waiting, of 5 jobs"


def test_done_without_a_report_is_lost(tmp_path: Path) -> None:
    grid = make(tmp_path, 1, prepared=False)
    say(tmp_path, grid.jobs[0].name, "done")
    assert states(overview(tmp_path)) == ["lost"]
    report(tmp_path, grid.jobs[0].name)
    assert states(overview(tmp_path)) == ["done"]


@pytest.mark.parametrize("file", ["report.json", "provenance.json"])
def test_done_with_a_report_that_no_merge_would_take_is_lost(tmp_path: Path, file: str) -> None:
    grid = make(tmp_path, 2, prepared=False)
    for job in grid.jobs:
        say(tmp_path, job.name, "done")
        report(tmp_path, job.name)
    damaged = job_folder(tmp_path, grid.jobs[1].name) / file
    damaged.write_text(damaged.read_text() + " x")
    found = overview(tmp_path)
    assert states(found) == ["done", "lost"]
    assert "not as the run wrote it" in str(found.jobs[1].error)
    assert [type(one).__name__ for one in read_runs(tmp_path, grid)][1] == "Missing"


def test_a_job_that_ends_while_it_is_looked_at_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = make(tmp_path, 1, prepared=False)
    name = grid.jobs[0].name
    say(tmp_path, name, "running")
    look = Lock.alive

    def alive(path: Path) -> str:  # between its state, which says running, and its lock
        report(tmp_path, name)
        say(tmp_path, name, "done")
        return look(path)

    monkeypatch.setattr(Lock, "alive", alive)
    assert states(overview(tmp_path)) == ["done"]


def test_who_says_running_and_holds_no_lock_is_lost(tmp_path: Path) -> None:
    grid = make(tmp_path, 1, prepared=False)
    say(tmp_path, grid.jobs[0].name, "running", dead())
    found = overview(tmp_path)
    assert states(found) == ["lost"]
    assert "ended without a word" in str(found.jobs[0].error)


def test_a_state_that_is_no_json_counts_as_none(tmp_path: Path) -> None:
    grid = make(tmp_path, 1, prepared=False)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / f"{grid.jobs[0].name}.json").write_text('{"schema": 1, "sta')
    assert states(overview(tmp_path)) == ["waiting"]


def test_what_is_in_the_queue_is_seen_there(tmp_path: Path, queue: Path) -> None:
    root = tmp_path / "grid"
    grid = make(root, 5, prepared=False)
    submitted(root, (4, 3, 2, 1, 0), array="12")
    say(root, grid.jobs[1].name, "stopped", slurm="12_3")
    say(root, grid.jobs[0].name, "failed", error="x", slurm="12_4")
    queue.write_text(
        f"12_0|PENDING|{QUEUE}|Priority\n12_1|RUNNING|{QUEUE}|None\n12_3|PENDING|{QUEUE}|BeginTime\n"
        f"12_4|COMPLETING|{QUEUE}|None\n12_2|RUNNING|someone-else|None\n"
    )
    found = overview(root)
    # tasks go by the order of submission; job 2's is not in the queue and it never began
    assert states(found) == ["failed", "requeued", "lost", "running", "queued"]
    assert found.jobs[3].where == "12_1"
    assert "Slurm does not know 12_2" in str(found.jobs[2].error)
    asked = (tmp_path / "asked.txt").read_text().splitlines()
    assert len(asked) == 1  # one call for all
    assert f"--name={QUEUE}p,{QUEUE}" in asked[0]


def test_a_job_of_another_host_that_is_not_in_the_queue_is_lost(tmp_path: Path, queue: Path) -> None:
    root = tmp_path / "grid"
    grid = make(root, 1, prepared=False)
    submitted(root, (0,), array="12")
    say(root, grid.jobs[0].name, "running", Holder(1, "elsewhere", "a b c", now()), slurm="12_0")
    assert states(overview(root)) == ["lost"]
    queue.write_text(f"12_0|RUNNING|{QUEUE}|None\n")
    assert states(overview(root)) == ["running"]


def test_a_local_runners_job_within_an_allocation_is_not_lost_elsewhere(tmp_path: Path, queue: Path) -> None:
    root = tmp_path / "grid"
    grid = make(root, 1, prepared=False)
    elsewhere = Holder(1, "node17", "a b c", now())
    submitted(root, (0,), "local", holder=elsewhere)
    say(root, grid.jobs[0].name, "running", elsewhere, slurm="777")
    lock = "filelock/2\npid=1\nhost=node17\nmode=lease\ntoken=0\nduration=90.0\n"
    claim_file(root, grid.jobs[0].name).write_text(lock)
    found = overview(root)
    assert states(found) == ["running"]
    assert "cannot be seen from here" in found.remarks[0]


def test_nothing_is_lost_because_slurm_cannot_be_asked(tmp_path: Path, queue: Path) -> None:
    root = tmp_path / "grid"
    grid = make(root, 2, prepared=False)
    submitted(root, (0, 1), array="12")
    elsewhere = Holder(1, "elsewhere", "a b c", now())
    say(root, grid.jobs[0].name, "running", elsewhere, slurm="12_0")
    lock = claim_file(root, grid.jobs[0].name)
    lock.write_text("filelock/2\npid=1\nhost=elsewhere\nmode=lease\ntoken=0\nduration=90.0\n")
    (queue.parent / "bin" / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    found = overview(root)
    assert states(found) == ["running", "queued"]
    assert "Unable to contact slurm controller" in found.remarks[0]
    # the second job has met its time limit and waits in the queue again: nobody may submit it a second time
    say(root, grid.jobs[1].name, "stopped", slurm="12_1")
    for name in ("sbatch", "srun"):
        (queue.parent / "bin" / name).write_text("#!/bin/sh\nexit 9\n")
        (queue.parent / "bin" / name).chmod(0o755)
    assert states(overview(root)) == ["running", "stopped"]
    with pytest.raises(GridError, match="submitted twice, as squeue says: Unable to contact"):
        resubmit(root, "all-missing")


def test_a_submission_whose_number_was_never_written_is_found_by_name(tmp_path: Path, queue: Path) -> None:
    root = tmp_path / "grid"
    make(root, 2, prepared=False)
    submitted(root, (0, 1))
    found = overview(root)
    assert states(found) == ["lost", "lost"]
    assert "perhaps submitted" in str(found.jobs[0].error)
    queue.write_text(f"77_0|PENDING|{QUEUE}|None\n77_1|RUNNING|{QUEUE}|None\n")
    assert states(overview(root)) == ["queued", "running"]


def test_while_it_is_being_submitted_a_job_is_queued(tmp_path: Path, queue: Path) -> None:
    root = tmp_path / "grid"
    make(root, 1, prepared=False)
    submitted(root, (0,), holder=Holder.me())
    assert states(overview(root)) == ["queued"]


def test_a_local_runner_has_its_jobs_queued_while_it_lives(tmp_path: Path) -> None:
    grid = make(tmp_path, 3, prepared=False)
    say(tmp_path, grid.jobs[0].name, "failed", error="x", attempt=2)
    say(tmp_path, grid.jobs[1].name, "failed", error="x", attempt=2)
    # job 0 had been tried twice before; job 1 once, so that its second attempt is this runner's
    attempts = {grid.jobs[0].name: 2, grid.jobs[1].name: 1}
    one = submitted(tmp_path, (0, 1, 2), "local", holder=Holder.me(), attempts=attempts)
    assert states(overview(tmp_path)) == ["queued", "failed", "queued"]
    put(tmp_path, replace(one, ended=now()))
    assert states(overview(tmp_path)) == ["failed", "failed", "waiting"]
    gone = dead()
    put(tmp_path, replace(one, pid=gone.pid, started=gone.started))
    assert states(overview(tmp_path)) == ["failed", "failed", "lost"]


def test_jobs_whose_preparation_failed_are_blocked(tmp_path: Path, queue: Path) -> None:
    root = tmp_path / "grid"
    grid = make(root, 3)
    submitted(root, (0, 1, 2), preparations=(0,), preparation="11", array="12")
    say(root, grid.jobs[2].name, "done")
    report(root, grid.jobs[2].name)
    queue.write_text(f"11_0|RUNNING|{QUEUE}p|None\n12_0|PENDING|{QUEUE}|Dependency\n12_1|PENDING|{QUEUE}|Dependency\n")
    found = overview(root)
    assert found.preparations[0].state == "running"
    assert states(found) == ["queued", "queued", "done"]
    say(root, "p000-g", "failed", error="no such column", slurm="11_0")
    queue.write_text(f"12_0|PENDING|{QUEUE}|DependencyNeverSatisfied\n")
    found = overview(root)
    assert found.preparations[0].state == "failed"
    assert states(found) == ["blocked", "blocked", "done"]
    assert found.jobs[1].error == "its preparation p000-g is failed"


def test_the_table_has_the_last_line_of_an_error_and_what_to_do(tmp_path: Path) -> None:
    grid = make(tmp_path, 2, prepared=False)
    say(tmp_path, grid.jobs[0].name, "failed", error="Traceback\nValueError: [bold]it \x1b[31mbroke", seconds=3.0)
    report(tmp_path, grid.jobs[1].name, 2.0)
    say(tmp_path, grid.jobs[1].name, "done", seconds=61.0)
    out = io.StringIO()
    grid_status.render(overview(tmp_path), Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    row = next(line for line in lines if line.startswith(grid.jobs[0].name))
    assert "seed=0" in row
    assert "failed" in row
    assert r"ValueError: [bold]it \x1b[31mbroke" in row
    assert "\x1b[31m" not in out.getvalue()
    assert any(line.split()[-2:] == ["s", "2"] for line in lines)  # 1 min 01 s, λ = 2
    assert "1 done, 1 failed, of 2 jobs" in out.getvalue()
    assert f"--resubmit failed {tmp_path}" in out.getvalue()
    narrow = io.StringIO()
    grid_status.render(overview(tmp_path), Console(file=narrow, width=60))
    assert "failed" in narrow.getvalue()


def test_a_job_none_of_whose_coefficients_passed_says_so(tmp_path: Path) -> None:
    grid = make(tmp_path, 3, prepared=False)
    for job, chosen in zip(grid.jobs, (0.0, 1.5), strict=False):
        report(tmp_path, job.name, chosen)
        say(tmp_path, job.name, "done", seconds=3.0)
    found = overview(tmp_path)
    out = io.StringIO()
    grid_status.render(found, Console(file=out, width=200))
    row = {line.split()[0]: line.split()[-1] for line in out.getvalue().splitlines() if "seed=" in line}
    assert [row[job.name] for job in grid.jobs] == ["none", "1.5", "waiting"]
    told = [(job["coefficient"], job["bound_met"]) for job in grid_status.to_json(found)["jobs"]]
    assert told == [(0.0, False), (1.5, True), (None, None)]


def test_what_stopped_is_not_forgotten_beside_what_failed(tmp_path: Path) -> None:
    grid = make(tmp_path, 2, prepared=False)
    say(tmp_path, grid.jobs[0].name, "failed", error="x")
    say(tmp_path, grid.jobs[1].name, "stopped")
    out = io.StringIO()
    grid_status.render(overview(tmp_path), Console(file=out, width=200))
    assert f"--resubmit failed {tmp_path}" in out.getvalue()
    assert f"all of them: python -m unlearn.cluster.command --resubmit all-missing {tmp_path}" in out.getvalue()


def test_as_json_it_is_all_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = make(tmp_path, 2)
    say(tmp_path, grid.jobs[0].name, "stopped", seconds=2.0)
    grid_status.print_json(overview(tmp_path))
    data = json.loads(capsys.readouterr().out)
    assert data["totals"]["stopped"] == 1
    assert data["jobs"][0]["name"] == grid.jobs[0].name
    assert data["jobs"][0]["settings"] == {"seed": "0"}
    assert data["preparations"][0]["state"] == "waiting"


def test_a_thousand_jobs_are_all_in_the_table(tmp_path: Path) -> None:
    grid = make(tmp_path, 1000, prepared=False)
    for job in grid.jobs[:400]:
        say(tmp_path, job.name, "done", seconds=1.0)
        report(tmp_path, job.name)
    out = io.StringIO()
    found = overview(tmp_path)
    grid_status.render(found, Console(file=out, width=200))
    assert grid_status.totals(found) == "400 done, 600 waiting, of 1000 jobs"
    assert sum(line.startswith(("0", "1")) for line in out.getvalue().splitlines()) >= 1000


def test_submissions_are_replaced_by_name_and_kept_in_order(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with alone(tmp_path):
        first = Submission.new("slurm", "g", (0,), (), {"a": 0, "b": 2})
        second = Submission.new("local", "g", (0,), (0,), {})
        put(tmp_path, first)
        put(tmp_path, second)
        put(tmp_path, replace(first, array="12"))
    there = read(tmp_path)
    assert [s.name for s in there] == [first.name, second.name]
    assert there[0] == replace(first, array="12")
    assert there[0].attempts == {"b": 2}
    assert first.name != second.name


def test_damaged_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(GridError, match="not the folder of a grid"):
        overview(tmp_path)
    make(tmp_path, 1)
    (tmp_path / FILE).write_text('[{"when": ')
    with pytest.raises(GridError, match=r"submissions\.json: damaged"):
        overview(tmp_path)
