"""``unlearn submit`` and ``status`` with real processes and stand-ins for Slurm's programs; Slurm is in tests/slurm."""

from __future__ import annotations

import json
import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from golden.record import HERE, kept
from golden.test_golden import differences
from gridfolder import dead, finish, make, say, submitted
from waiting import gone, until

from unlearn import run
from unlearn.cli import main
from unlearn.cluster.job import (
    JobState,
    Overview,
    check_slurm,
    gigabytes,
    minutes,
    overview,
    slots,
    slurm_parameters,
)
from unlearn.cluster.plan import Grid
from unlearn.errors import GridError
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.store.lock import Lock, started

ROOT = Path(__file__).resolve().parents[2]
PICO = str(ROOT / "recipes" / "pico_smoke.yaml")
SMALL = ("teach.steps=10", "vector.forget.steps=4", "vector.method=negate", "sweep.coefficients=[1]")
SETS = [part for text in (*SMALL, "export.adapter=false") for part in ("--set", text)]
PATIENCE = 600.0  # seconds; a machine may be busy
AGAIN = ["submit", "--resubmit", "all-missing"]
ALL = [*AGAIN, "--set", "cluster.time=30:00"]


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "unlearn", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=PATIENCE)[0]
    return process.returncode, said


def running(root: Path, name: str) -> int:
    """The process of a job, once it runs."""
    until(lambda: (s := JobState.load(root, name)) is not None and s.state == "running")
    state = JobState.load(root, name)
    assert state is not None
    return state.pid


def submissions(root: Path) -> list[dict[str, Any]]:
    return list(json.loads((root / "submissions.json").read_text()))


def states(found: Overview) -> list[str]:
    return [row.state for row in found.jobs]


def result(folder: Path) -> Any:
    text = json.loads((folder / "report.json").read_text())
    return {key: text[key] for key in ("chosen", "scores", "sweep", "vector", "data")}


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """``said()``: what was said since, on lines as long as they like."""
    return lambda: " ".join(capsys.readouterr().err.split())


# -- on this machine -------------------------------------------------------------------------------------------------


@dataclass
class Story:
    """What happened to a grid of two jobs that was stopped once, and one of whose jobs was killed once."""

    root: Path
    said: dict[str, str] = field(default_factory=dict)
    found: dict[str, Overview] = field(default_factory=dict)

    def keep(self, step: str, runner: subprocess.Popen[str], code: int) -> None:
        got, self.said[step] = ended(runner)
        assert got == code, self.said[step]
        self.found[step] = overview(self.root)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with pytest.MonkeyPatch.context() as patch:
        tale = Story(tmp_path_factory.mktemp("submit") / "grid")
        local = ("submit", PICO, "--grid", "vector.lora.rank=2,4", *SETS, "--local", "--out", str(tale.root))
        runner = start(*local)
        until(lambda: (tale.root / "grid.json").is_file())
        grid = Grid.load(tale.root)
        first = running(tale.root, grid.jobs[0].name)
        os.kill(first, signal.SIGSTOP)  # or it may be over before we look for it
        tale.keep("twice", start(*local), 0)
        os.killpg(runner.pid, signal.SIGINT)  # Ctrl-C, which a terminal sends to all
        time.sleep(0.5)  # the runner has passed it on: whatever comes first, the job finds it when it wakes
        os.kill(first, signal.SIGCONT)
        tale.keep("stopped", runner, 130)

        patch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-6b1f,-1,9")
        runner = start(*local)
        os.kill(running(tale.root, grid.jobs[1].name), signal.SIGKILL)
        tale.keep("killed", runner, 1)
        tale.keep("again", start("submit", "--resubmit", "failed", str(tale.root)), 0)
        yield tale


def test_a_second_submit_at_the_same_time_adds_nothing(story: Story) -> None:
    assert "nothing to submit; 1 running, 1 queued, of 2 jobs" in story.said["twice"]


def test_a_runner_that_is_stopped_leaves_what_can_be_gone_on_from(story: Story) -> None:
    assert states(story.found["stopped"]) == ["stopped", "waiting"]
    assert story.found["stopped"].preparations[0].state == "done"
    assert "Traceback" not in story.said["stopped"]


def test_a_job_that_is_killed_is_lost_and_does_not_stop_the_others(story: Story) -> None:
    """Jobs at the same time share the GPUs out."""
    assert states(story.found["killed"]) == ["done", "lost"]
    assert "lost, ended without a word (killed?)" in story.said["killed"]
    assert story.found["killed"].jobs[0].attempt == 2  # stopped before
    logs = [job.log(story.root).read_text() for job in Grid.load(story.root).jobs]
    assert sorted(re.findall("^===.*, GPUs (.*)$", log, re.MULTILINE)[0] for log in logs) == ["4", "GPU-6b1f"]


def test_the_lost_job_is_run_again_and_comes_to_what_it_would_have(story: Story, tmp_path: Path, said: Any) -> None:
    assert states(story.found["again"]) == ["done"] * 2
    assert [row.attempt for row in story.found["again"].jobs] == [2, 2]
    grid = Grid.load(story.root)
    assert submissions(story.root)[-1]["jobs"] == [grid.jobs[1].name]
    run(grid.recipes[0].source, set=list(grid.jobs[1].overrides), out=tmp_path / "alone")
    assert result(grid.jobs[1].folder(story.root)) == result(tmp_path / "alone")
    # and a grid that is done is left alone
    said()
    assert main([*AGAIN, "--local", str(story.root)]) == 0
    assert "nothing to submit; 2 done, of 2 jobs" in said()
    assert len(submissions(story.root)) == 3


def test_the_stopped_job_finds_what_it_found(story: Story) -> None:
    """``grid.json`` is of ``kept`` in tests/golden/record.py, of this job."""
    found = kept(Grid.load(story.root).jobs[0].folder(story.root))
    assert not differences(json.loads((HERE / "grid.json").read_text(encoding="utf-8")), found)


def test_logs_tell_every_attempt_and_that_what_is_shared_was_made_once(story: Story) -> None:
    grid = Grid.load(story.root)
    first, *others = (one.log(story.root).read_text() for one in (*grid.preparations, *grid.jobs))
    heads = re.findall(r"^=== (\S+), attempt (\d+), ", others[0], re.MULTILINE)
    assert heads == [(grid.jobs[0].name, "1"), (grid.jobs[0].name, "2")]
    for how in ("stopped", "done"):
        assert re.search(rf"^=== .*: {how} after \d+ s$", others[0], re.MULTILINE)
    assert "teach: the base model" in first
    for log in others:  # a job may be stopped right after it took it
        assert "target: taken from" in log or "target: as before" in log


def test_the_runs_are_compared(story: Story) -> None:
    assert main(["compare", str(story.root)]) == 0
    assert len((story.root / "compare.csv").read_text().splitlines()) == 3
    (family,) = json.loads((story.root / "report.json").read_text())["families"]
    assert [s["label"] for s in family["settings"]] == ["rank=2", "rank=4"]


@pytest.mark.slow  # in a real Slurm it is in tests/slurm
def test_a_job_that_is_warned_goes_back_in_the_queue_and_on_from_where_it_was(tmp_path: Path) -> None:
    """Before a time limit or a pre-emption; submitit's local queue begins it again at once."""
    root = tmp_path / "grid"
    long = "vector.forget={steps: 100, batch_size: 12, learning_rate: 0.0001, save_every: 10}"
    texts = (long, "teach=null", "vector.method=negate", "choose.keep=0", "sweep.coefficients=[1]")
    sets = [part for text in texts for part in ("--set", text)]
    runner = start("submit", PICO, "--grid", "seed=7", *sets, "--local", "--out", str(root))
    until(lambda: (root / "grid.json").is_file())
    (job,) = Grid.load(root).jobs
    pid = running(root, job.name)
    until(lambda: list(job.folder(root).glob(".unlearn-work/*forget*/checkpoint-*")) or gone(pid))
    os.kill(pid, signal.SIGUSR2)
    code, words = ended(runner)
    assert code == 0, words
    state = JobState.load(root, job.name)
    assert state is not None
    assert (state.state, state.attempt) == ("done", 2)
    assert re.search(r"stopped after step \d+ of 100; it is kept", job.log(root).read_text())


TASK = """
import os, signal, sys
from unlearn.cluster import job

def begin(*arguments, announce=job._announce):
    state = announce(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    return state

if "stopped at once" in sys.argv:
    job._announce = begin
os.environ.update(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NODEID="0", SLURM_NTASKS="1")
job.Task(sys.argv[1], sys.argv[2])()
"""


@pytest.mark.parametrize("how", ["fails", "its preparation failed", "stopped at once"])
def test_a_task_of_the_array_runs_its_job_and_says_how_it_ended(tmp_path: Path, how: str) -> None:
    """Its recipe is none. A job whose preparation failed is not begun, whoever begins it."""
    (job,) = make(tmp_path, 1, prepared=how == "its preparation failed").jobs
    if how == "its preparation failed":
        say(tmp_path, "p000-g", "failed", error="no such column")
    line = [sys.executable, "-c", TASK, str(tmp_path), job.name, how]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == (how != "stopped at once"), done.stderr
    state, log = JobState.load(tmp_path, job.name), " ".join(job.log(tmp_path).read_text().split())
    if how == "its preparation failed":
        assert state is None
        assert f"error: {job.name} was not begun: its preparation p000-g failed (no such column)" in log
        return
    assert state is not None
    assert (state.state, state.slurm) == ("stopped" if how == "stopped at once" else "failed", "7")
    if how == "fails":
        assert f"RuntimeError: {job.name} failed" in log
        assert "error: " in log
        assert str(state.error).splitlines()[0].strip() in log


def test_a_job_that_fails_says_why_and_blocks_those_that_need_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, data = tmp_path / "grid", tmp_path / "capitals.jsonl"
    data.write_bytes((Path(PICO).parent / "data" / "capitals.jsonl").read_bytes())
    (tmp_path / "pico.yaml").write_text(Path(PICO).read_text().replace("data/capitals.jsonl", "capitals.jsonl"))
    line = ["submit", str(tmp_path / "pico.yaml"), "--grid", "vector.lora.rank=2,4", *SETS, "--local"]
    runner = start(*line, "--out", str(root))
    until(lambda: (root / "submissions.json").is_file())
    data.write_text('{"nothing": "of use"}\n')
    code, words = ended(runner)
    assert code == 1, words
    found = overview(root)
    assert states(found) == ["blocked", "blocked"]
    assert found.preparations[0].state == "failed"
    assert "capitals.jsonl" in str(found.preparations[0].error)
    assert "capitals.jsonl" in words.replace("\n", "")
    assert main(["status", str(root)]) == 0
    out = capsys.readouterr().out
    assert "its preparation p000-pico_smoke is failed" in out
    assert f"unlearn submit --resubmit failed {root}" in out
    # the preparation is submitted again together with them
    assert ended(start("submit", "--resubmit", "failed", str(root)))[0] == 1
    grid = Grid.load(root)
    assert submissions(root)[-1]["jobs"] == [job.name for job in (*grid.preparations, *grid.jobs)]


# What submitit's process does instead of a job: told to stop it takes half a second to save, or it is deaf.
STANDS_IN = """
import os, signal, sys, time
from pathlib import Path
if "submitit.core._submit" in sys.orig_argv:
    root = Path(os.environ["STANDS_IN"])
    def save(number, frame):
        time.sleep(0.5)
        (root / "saved").touch()
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if os.environ["HOW"] == "deaf" else save)
    (root / "threads").write_text(os.environ["OMP_NUM_THREADS"])
    (root / "up").write_text(str(os.getpid()))
    time.sleep(60)
"""
RUNNER = """
import os, signal, sys
from unlearn.cli import main
from unlearn.cluster import job, plan
if os.environ["HOW"] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
print("ready", flush=True)
input()
sys.exit(main(["submit", "--resubmit", "all-missing", "--local", sys.argv[1]]))
"""


def runner_of_stand_ins(folder: Path, jobs: int, how: str = "") -> subprocess.Popen[str]:
    """``--local``, ready to begin."""
    (folder / "sitecustomize.py").write_text(STANDS_IN)
    if not (folder / "grid").exists():
        make(folder / "grid", jobs, prepared=False)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(folder / "grid")],
        env={**environment, "STANDS_IN": str(folder), "HOW": how},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("how", ["two signals", "nobody listens", "nohup", "deaf"])
def test_jobs_save_before_the_runner_ends(tmp_path: Path, how: str) -> None:
    """A terminal that closes sends two signals at once; Ctrl-C ends what the runner's words go through (tee) as well;
    a hang-up that is ignored stops nothing; and jobs that do not listen are ended when it is asked once more."""
    with runner_of_stand_ins(tmp_path, 1, how) as process:
        go(process)
        until(lambda: (tmp_path / "up").exists() and bool((tmp_path / "up").read_text()))
        assert (tmp_path / "threads").read_text() == str(len(os.sched_getaffinity(0)))
        if how == "nobody listens":
            assert process.stderr is not None
            process.stderr.close()
            process.send_signal(signal.SIGINT)
        else:
            process.send_signal(signal.SIGTERM if how == "deaf" else signal.SIGHUP)
            time.sleep({"two signals": 0.1, "nohup": 1.2, "deaf": 2.5}[how])
            if how != "two signals":
                assert process.poll() is None
                assert not (tmp_path / "saved").exists()
            process.terminate()
        assert process.wait(PATIENCE) == 130
    assert (tmp_path / "saved").exists() == (how != "deaf")
    assert submissions(tmp_path / "grid")[-1]["ended"]
    until(lambda: gone(int((tmp_path / "up").read_text())))


def test_two_submits_at_the_same_moment_hand_each_job_over_once(tmp_path: Path) -> None:
    both = [runner_of_stand_ins(tmp_path, 3) for _ in range(2)]
    for process in both:
        go(process)
    until(lambda: any(process.poll() is not None for process in both))
    (idle,) = (process for process in both if process.poll() is not None)
    (busy,) = (process for process in both if process is not idle)
    assert "nothing to submit; 3 queued" in idle.communicate()[1]
    assert idle.returncode == 0
    until(lambda: (tmp_path / "up").exists())
    busy.terminate()
    assert busy.wait(PATIENCE) == 130
    busy.communicate()
    (one,) = submissions(tmp_path / "grid")
    assert one["jobs"] == [job.name for job in Grid.load(tmp_path / "grid").jobs]


@pytest.mark.parametrize(
    ("visible", "block", "jobs", "places"),
    [
        ("0,1,2,3,4", {"gpus": 2}, None, ["0,1", "2,3"]),
        ("0,1,2,3", {"parallelism": 3}, None, ["0", "1", "2"]),
        ("0,GPU-6b,-1,2", {"parallelism": 8}, 3, ["0", "GPU-6b"]),
        ("", {"gpus": 8, "parallelism": 4}, None, [""] * 4),
        ("", {"gpus": 8}, 32, [""] * 6),
        ("", {"parallelism": 32, "processes": 4}, None, [""]),
        ("", {"processes": 9}, None, [""]),
    ],
)
def test_how_many_jobs_have_room_here(
    visible: str, block: dict[str, int], jobs: int | None, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert slots(ClusterSpec(**block), jobs) == places  # type: ignore[arg-type]


# -- how they stand --------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's programs: squeue prints ``queue``; sbatch keeps what it is given and counts from 40."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "queue").write_text("")
    counted = f'n=$((40 + $(ls {tmp_path}/batch-* 2>/dev/null | wc -l))); cp "$1" {tmp_path}/batch-$n; '
    does = {
        "squeue": f'echo "$@" >> {tmp_path}/asked; cat {tmp_path}/queue',
        "sbatch": f'{counted}echo "Submitted batch job $n"',
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
        "srun": "true",
    }
    for name, line in does.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return tmp_path


def test_each_job_stands_as_its_own_word_says(tmp_path: Path) -> None:
    grid = make(tmp_path, 7, prepared=False)
    names = [job.name for job in grid.jobs]
    say(tmp_path, names[0], "done", seconds=12.0)
    finish(tmp_path, grid.jobs[0])
    say(tmp_path, names[1], "failed", error="2 mistakes in the recipe:\n  one\n  two", attempt=3)
    say(tmp_path, names[2], "stopped")
    say(tmp_path, names[3], "running")
    say(tmp_path, names[4], "running", pid=dead())
    say(tmp_path, names[5], "done")  # and no report
    (tmp_path / "state" / f"{names[6]}.json").write_text('{"schema": 1, "sta')
    found = overview(tmp_path)
    assert states(found) == ["done", "failed", "stopped", "running", "lost", "lost", "waiting"]
    assert (found.jobs[1].attempt, found.jobs[1].error) == (3, "2 mistakes in the recipe:\n  one\n  two")
    assert "ended without a word" in str(found.jobs[4].error)
    assert found.totals() == "1 done, 1 running, 1 stopped, 1 failed, 2 lost, 1 waiting, of 7 jobs"
    say(tmp_path, names[3], "running", host="elsewhere")  # it cannot be seen from here
    assert overview(tmp_path).jobs[3].state == "running"
    for file in ("report.json", "provenance.json"):
        finish(tmp_path, grid.jobs[0])
        assert overview(tmp_path).jobs[0].state == "done"
        place = grid.jobs[0].folder(tmp_path) / file
        place.write_text(place.read_text() + " ")
        if file == "report.json":
            assert "not as the run wrote it" in str(overview(tmp_path).jobs[0].error)


def test_a_job_that_ends_while_it_is_looked_at_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = make(tmp_path, 1, prepared=False).jobs
    say(tmp_path, job.name, "running", pid=dead())

    def node() -> str:  # asked between its state, which says running, and its process
        finish(tmp_path, job)
        monkeypatch.undo()
        say(tmp_path, job.name, "done")
        return platform.node()

    monkeypatch.setattr("unlearn.cluster.job.platform.node", node)
    assert states(overview(tmp_path)) == ["done"]


def test_what_is_in_the_queue_is_seen_there(slurm: Path) -> None:
    root = slurm / "grid"
    names = [job.name for job in make(root, 6, prepared=False).jobs]
    submitted(root, [*reversed(names)])
    say(root, names[1], "stopped", slurm="12_4")
    say(root, names[0], "failed", error="x", slurm="12_5")
    say(root, names[5], "running", host="elsewhere", slurm="12_0")
    (slurm / "queue").write_text(
        "12_1|PENDING|g-0a1b|Priority\n12_2|RUNNING|g-0a1b|None\n12_4|PENDING|g-0a1b|BeginTime\n"
        "12_5|COMPLETING|g-0a1b|None\n12_3|RUNNING|someone-else|None\n"
    )
    found = overview(root)
    # tasks go by the order of submission; jobs 2 and 5 are not in the queue any more
    assert states(found) == ["failed", "queued", "lost", "running", "queued", "lost"]
    assert found.jobs[3].where == "12_2"
    assert len((slurm / "asked").read_text().splitlines()) == 1  # one call for all
    (slurm / "bin" / "squeue").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    found = overview(root)
    # nothing is lost because Slurm cannot be asked, and what may wait in the queue is not submitted twice
    assert states(found) == ["failed", "stopped", "queued", "queued", "queued", "running"]
    assert "Unable to contact slurm controller" in str(found.unasked)
    assert main([*AGAIN, str(root)]) == 2


def test_a_job_of_a_local_runner_within_an_allocation_elsewhere_is_not_lost(slurm: Path) -> None:
    (job,) = make(slurm / "grid", 1, prepared=False).jobs
    submitted(slurm / "grid", [job.name], "local", host="node17")
    say(slurm / "grid", job.name, "running", host="node17", slurm="777")
    assert states(overview(slurm / "grid")) == ["running"]


def test_a_single_job_is_no_array_and_queued_while_it_is_being_submitted(slurm: Path) -> None:
    (job,) = make(slurm / "grid", 1, prepared=False).jobs
    for since, state in ((started(os.getpid()), "queued"), ("of another process", "lost"), ("", "lost")):
        submitted(slurm / "grid", [job.name], started=since)
        assert states(overview(slurm / "grid")) == [state]
    (slurm / "queue").write_text("12|RUNNING|g-0a1b|None\n")
    assert states(overview(slurm / "grid")) == ["running"]


def test_a_local_runner_has_its_jobs_queued_while_it_lives(tmp_path: Path) -> None:
    names = [job.name for job in make(tmp_path, 3, prepared=False).jobs]
    say(tmp_path, names[0], "failed", error="x")
    time.sleep(0.01)
    one = submitted(tmp_path, names, "local")
    time.sleep(0.01)
    say(tmp_path, names[1], "failed", error="x")
    assert states(overview(tmp_path)) == ["queued", "failed", "queued"]
    for over in (replace(one, ended=True), replace(one, pid=dead())):
        submitted(tmp_path, names, "local", one=over)
        assert states(overview(tmp_path)) == ["failed", "failed", "waiting"]


def test_jobs_whose_preparation_failed_are_blocked(slurm: Path) -> None:
    root = slurm / "grid"
    grid = make(root, 3)
    submitted(root, ["p000-g"], name="g-p")
    submitted(root, [job.name for job in grid.jobs])
    say(root, grid.jobs[2].name, "done")
    finish(root, grid.jobs[2])
    queue = "12_0|PENDING|g-0a1b|{why}\n12_1|PENDING|g-0a1b|{why}\n"
    (slurm / "queue").write_text("11|RUNNING|g-p|None\n" + queue.format(why="Dependency"))
    assert (overview(root).preparations[0].state, states(overview(root))) == ("running", ["queued", "queued", "done"])
    say(root, "p000-g", "failed", error="no such column", slurm="11")
    (slurm / "queue").write_text(queue.format(why="DependencyNeverSatisfied"))
    assert states(overview(root)) == ["blocked", "blocked", "done"]
    (slurm / "queue").write_text("")
    assert overview(root).jobs[1].error == "its preparation p000-g is failed"


def test_the_table_has_the_last_line_of_an_error_and_json_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = make(tmp_path, 300, prepared=False)
    first, second, *_ = (job.name for job in grid.jobs)
    say(tmp_path, first, "failed", error="Traceback\nValueError: [bold]it \x1b[31mbroke", seconds=3.0)
    say(tmp_path, second, "stopped", seconds=61.0)
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert [first, "failed", "1", "3.0", "s", "ValueError:", "[bold]it", "\\x1b[31mbroke"] in lines
    assert "1 stopped, 1 failed, 298 waiting, of 300 jobs" in out.splitlines()
    assert [line[0] for line in lines if line and "-seed=" in line[0]] == [job.name for job in grid.jobs]
    for what in ("failed", "all-missing"):
        assert f"unlearn submit --resubmit {what} {tmp_path}" in out
    assert main(["status", str(tmp_path), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    found = [(row["name"], row["state"], row["seconds"]) for row in plain["jobs"][:2]]
    assert found == [(first, "failed", 3.0), (second, "stopped", 61.0)]


# -- the rest of them, and the end -----------------------------------------------------------------------------------


def test_what_is_missing_is_submitted_and_nothing_else(slurm: Path) -> None:
    root = slurm / "grid"
    grid = make(root, 6)
    names = [job.name for job in grid.jobs]
    say(root, "p000-g", "done")
    for name, state in zip(names, ("done", "failed", "stopped", "running"), strict=False):
        say(root, name, state, error="x" if state == "failed" else None, pid=dead())
    finish(root, grid.jobs[0])  # 3 says running and is not: lost
    for what, jobs in (("failed", (1, 3)), ("lost", (3,)), ("all-missing", (1, 2, 3, 4, 5))):
        assert main(["submit", "--resubmit", what, "--set", "cluster.time=1:00:00", str(root)]) == 0
        assert [one["jobs"] for one in submissions(root)] == [[names[n] for n in jobs]]
        (root / "submissions.json").unlink()  # it was never run
    assert Grid.load(root).cluster.time == "1:00:00"  # which lasts


def test_arrays_are_handed_to_sbatch_with_their_jobs(slurm: Path, said: Any) -> None:
    root = slurm / "grid"
    grid = make(root, 3, count_prepared=1)
    assert main([*AGAIN, str(root)]) == 2
    assert "cluster.time" in said()
    assert main([*ALL, str(root)]) == 0
    first, then = submissions(root)
    assert (first["jobs"], then["jobs"]) == (["p000-g"], [job.name for job in grid.jobs])
    prepared, jobs = ((slurm / f"batch-{n}").read_text() for n in (40, 41))
    assert f"#SBATCH --job-name={first['name']}\n" in prepared
    assert "--dependency" not in prepared
    assert "--array" not in prepared
    assert "#SBATCH --array=0-2%3\n" in jobs
    assert "#SBATCH --dependency=afterok:40\n" in jobs
    tasks = [pickle.loads((root / ".submitit" / f"41_{i}_submitted.pkl").read_bytes()) for i in range(3)]
    assert [t.function.name for t in tasks] == [job.name for job in grid.jobs]
    assert tasks[0].function.checkpoint().function == tasks[0].function
    # nothing of it is in the queue, and none has begun
    assert (overview(root).preparations[0].state, states(overview(root))) == ("lost", ["blocked"] * 3)
    # with several preparations, one that fails does not take the jobs of the others with it
    several = slurm / "several"
    make(several, 3, count_prepared=2)
    assert main([*ALL, str(several)]) == 0
    assert "#SBATCH --array=0-1%2\n" in (slurm / "batch-42").read_text()
    assert "#SBATCH --dependency=afterany:42\n" in (slurm / "batch-43").read_text()
    # what sbatch refuses is told and not kept
    (slurm / "bin" / "sbatch").write_text("#!/bin/sh\necho 'error: invalid partition' >&2; exit 1\n")
    assert main([*AGAIN, str(several)]) == 2
    assert "invalid partition" in said()
    assert "queued" not in states(overview(several))


def test_more_jobs_than_an_array_may_have(slurm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn.cluster.job._MOST_TASKS", 2)
    root = slurm / "grid"
    names = [job.name for job in make(root, 3, count_prepared=3).jobs]
    assert main([*ALL, str(root)]) == 0
    assert [one["jobs"] for one in submissions(root)] == [["p000-g", "p001-g"], ["p002-g"], names[:2], names[2:]]
    for n in (42, 43):
        assert "#SBATCH --dependency=afterany:40:41\n" in (slurm / f"batch-{n}").read_text()
    first, then = (one["name"] for one in submissions(root)[2:])
    (slurm / "queue").write_text(f"42_1|RUNNING|{first}|None\n43|PENDING|{then}|Dependency\n")
    assert [(row.state, row.where) for row in overview(root).jobs][1:] == [("running", "42_1"), ("queued", "43")]


def test_cancelling(slurm: Path, said: Any) -> None:
    root = slurm / "grid"
    names = [job.name for job in make(root, 3, prepared=False).jobs]
    cancel = ["submit", "--cancel", str(root)]
    assert main(cancel) == 0
    assert "nothing to cancel; 3 waiting" in said()
    # what is in the queue
    submitted(root, names)
    (slurm / "queue").write_text("12_0|PENDING|g-0a1b|None\n12_1|RUNNING|g-0a1b|None\n")
    assert main(cancel) == 0
    assert (slurm / "cancelled").read_text() == "12\n"
    (slurm / "queue").write_text("")
    assert states(overview(root)) == ["waiting"] * 3
    # a local runner; or jobs whose runner was killed; or what cannot be stopped from here
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        one = submitted(root, names[:1], "local", name="l", pid=sleeper.pid, started=started(sleeper.pid))
        assert main(cancel) == 0
        assert sleeper.wait(PATIENCE) == -signal.SIGTERM
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        say(root, names[1], "running", pid=sleeper.pid, started=started(sleeper.pid))
        assert main(cancel) == 0
        assert sleeper.wait(PATIENCE) == -signal.SIGTERM
    said()
    submitted(root, names[:1], "local", one=replace(one, host="node17"))
    assert main(cancel) == 1
    assert f"process {one.pid} on node17: stop it there" in said()


def test_who_holds_the_grid_for_long_is_named(tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1)
    monkeypatch.setattr("unlearn.cluster.job._PATIENCE", 0.1)
    with Lock.take(tmp_path / ".submit-lock"):
        assert main(["submit", "--cancel", str(tmp_path)]) == 2
    assert f"the grid {tmp_path} is in use by this very process" in said()
    assert not list(tmp_path.glob(".submit-lock*"))


def test_a_local_grid_goes_on_without_trust_in_lines_it_never_runs(
    slurm: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UNLEARN_TRUST_SETUP", raising=False)
    grid = make(slurm / "grid", 1, prepared=False)
    replace(grid, cluster=spec(setup=["module load cuda"])).save(slurm / "grid")
    line = ["submit", "--resubmit", "lost", str(slurm / "grid")]
    assert main(line) == 2
    assert "UNLEARN_TRUST_SETUP=1" in said()
    submitted(slurm / "grid", [grid.jobs[0].name], "local", ended=True)
    assert main(line) == 0
    assert "nothing to submit; 1 waiting" in said()


def test_a_folder_of_something_else_is_refused(tmp_path: Path, said: Any) -> None:
    line = ["submit", PICO, "--grid", "seed=0,1", "--local", "--out"]
    (tmp_path / "thesis.tex").write_text("x")
    assert main([*line, str(tmp_path)]) == 2
    assert "no grid's folder (it holds thesis.tex)" in said()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    make(tmp_path / "other", 2)
    assert main([*line, str(tmp_path / "other")]) == 2
    assert "folder of another grid" in said()
    damaged = tmp_path / "damaged"
    make(damaged, 1)
    (damaged / "submissions.json").write_text("[{")
    assert main(["status", str(damaged)]) == 2
    assert "damaged (" in said()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nowhere"], "not the folder of a grid"),
        (["submit", "--cancel", "nowhere"], "not the folder of a grid"),
        (["submit", "--resubmit", "failed", "nowhere"], "not the folder of a grid"),
        (["submit", "--cancel", "nowhere", "--grid", "seed=1"], "each take the grid's folder"),
        (["submit", PICO, "--grid", "seed=0,0", "--dry-run"], "0 is given twice"),
        (["submit", PICO, "--grid", "seed=0,x", "--dry-run"], "nothing was submitted: 1 of 2 jobs"),
        (["submit", PICO, "--local", "--set", "cluster.gpus=4", "--out", "g"], "add --set cluster.gpus=2"),
        (["submit", PICO], "cluster.time=4:00:00"),
    ],
)
def test_mistakes_are_one_message(
    arguments: list[str], message: str, said: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    words = said()
    assert message in words
    assert words.count("error: ") == 1


def test_a_dry_run_tells_all_writes_nothing_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from unlearn.cli import main\n"
        "for more in ([], ['--local']): assert main([*sys.argv[1:], *more]) == 0\n"
        "assert 'torch' not in sys.modules and 'submitit' not in sys.modules"
    )
    line = ["submit", PICO, "--grid", "seed=0,1", "--grid", "vector.lora.rank=2,4", "cluster.time=1:00:00", "--dry-run"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *line], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 jobs, 2 preparations; nothing was written"
    assert done.stdout.count("0003-seed=1_rank=4  seed=1, vector.lora.rank=4  after p001-seed=1") == 2
    assert list(tmp_path.iterdir()) == []


# -- the cluster block -----------------------------------------------------------------------------------------------


def spec(**given: object) -> ClusterSpec:
    return ClusterSpec.model_validate_json(json.dumps({"time": "4:00:00", **given}))


@pytest.mark.parametrize(
    ("text", "found"),
    [("4:00:00", 240), ("1-12:00:00", 36 * 60), ("1-12:00", 36 * 60), ("0:20:00", 20), ("30:00", 30), ("0:00:01", 1)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, found: int) -> None:
    assert minutes(text) == found


def batch_file(slurm: Path, block: ClusterSpec, tasks: int, *more: str) -> list[str]:
    """The lines that sbatch is given for an array of a block."""
    import submitit

    executor = submitit.AutoExecutor(slurm / "jobs", cluster="slurm")
    executor.update_parameters(**slurm_parameters(block, "g-1", "/where it/was", tasks, *more))
    executor.submit_array([submitit.helpers.DelayedSubmission(print, n) for n in range(tasks)])
    return (slurm / "batch-40").read_text().splitlines()


def test_every_key_of_the_cluster_block_is_in_the_batch_file(slurm: Path) -> None:
    block = spec(
        **{"partition": "gpu", "account": "lab", "qos": "high", "nodes": 2, "gpus": 4, "cpus": 16, "memory": "64GB"},
        **{"time": "1-00:00:00", "parallelism": 3, "grace": 200, "setup": ["module load cuda", "export A=1"]},
        extra={"constraint": "a100|h100", "exclusive": True, "mail_type": "END", "reservation": False},
    )
    lines = batch_file(slurm, block, 8, "afterok:12")
    expected = {
        *("--job-name=g-1", "--partition=gpu", "--account=lab", "--qos=high", "--nodes=2", "--ntasks-per-node=4"),
        *("--gpus-per-node=4", "--cpus-per-task=4", "--mem=64GB", "--time=1440", "--signal=USR2@200", "--requeue"),
        *("--array=0-7%3", "--dependency=afterok:12", "--kill-on-invalid-dep=yes", "--chdir='/where it/was'"),
        *("--constraint='a100|h100'", "--exclusive", "--mail-type=END", "--open-mode=append"),
    }
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert expected <= options
    assert not [o for o in options if "reservation" in o]
    command = next(i for i, line in enumerate(lines) if line.startswith("srun"))
    assert lines.index("module load cuda") < lines.index("export A=1") < command
    assert "--cpus-per-task=4" in lines[command]
    for name in ("slurm_partition", "slurm_account", "slurm_qos", "gpus_per_node", "mem_gb", "slurm_setup"):
        assert slurm_parameters(spec(), "g", ".", 1)[name] is None  # what is not given is left to the cluster


@pytest.mark.parametrize(
    ("text", "size", "found"),
    [
        ("32GB", 32, "32GB"),
        ("1.5GB", 1.5, "1536MB"),
        ("512MB", 0.5, "512MB"),
        ("1TB", 1024, "1024GB"),
        ("1KB", 1 / 1024, "1MB"),
    ],
)
def test_memory_is_in_slurms_units(slurm: Path, text: str, size: float, found: str) -> None:
    assert gigabytes(text) == size
    assert f"#SBATCH --mem={found}" in batch_file(slurm, spec(memory=text), 1)


@pytest.mark.parametrize(("time", "longest"), [("0:10:00", 300), ("1:00:00", 720), ("4:00:00", 2880)])
def test_a_warning_is_taken_for_that_of_the_time_limit(time: str, longest: int) -> None:
    """By submitit, which counts those alone: of pre-emption there may be as many as Slurm likes."""
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import DelayedSubmission

    assert slurm_parameters(spec(time=time, grace=longest), "g", ".", 1)["slurm_signal_delay_s"] == longest
    delayed = DelayedSubmission(print)
    delayed.set_timeout(minutes(time), 1)
    handler = SignalHandler(None, None, delayed)  # type: ignore[arg-type]
    handler._start_time -= 60 * minutes(time) - longest
    assert handler.has_timed_out()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"extra": {"array": "0-3"}}, "by the grid itself"),
        ({"extra": {"no_requeue": True}}, "by the grid itself"),
        ({"extra": {"mem": "1G"}}, "set by a key of the cluster block"),
        ({"extra": {"--time": "1"}}, "set by a key of the cluster block"),
        ({"extra": {"comment": "a\nrm -r x"}}, "no option"),
        ({"extra": {"x y": "1"}}, "no option"),
        ({"extra": {"": "1"}}, "no option"),
        ({"partition": "a\nb"}, "no option"),
        ({"time": None}, "cluster.time=4:00:00"),
        ({"time": "0:10:00", "grace": 900}, "at most 300 s"),
        ({"time": "1:00:00", "grace": 721}, "at most 720 s"),
        ({"setup": ["rm -rf ~"]}, r"rm -rf ~\n.*UNLEARN_TRUST_SETUP=1"),
    ],
)
def test_blocks_that_would_break_the_array_are_refused(
    block: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch, slurm: Path
) -> None:
    monkeypatch.delenv("UNLEARN_TRUST_SETUP", raising=False)
    with pytest.raises(GridError, match=message):
        check_slurm(spec(**block), ("cluster.memory=2GB",))
    if "setup" in block:
        check_slurm(spec(**block), ("cluster.setup=[rm -rf ~]",))  # the user's own words
        monkeypatch.setenv("UNLEARN_TRUST_SETUP", "1")
        check_slurm(spec(**block))


def test_without_slurm_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GridError, match="no sbatch and no srun and no squeue here"):
        check_slurm(spec())
