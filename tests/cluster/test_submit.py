"""``python -m unlearn.cluster.command`` with real processes; and what a cluster block becomes in sbatch's words."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from test_grid_status import make, report, say

from unlearn import run
from unlearn.cluster import local_jobs, slurm_jobs
from unlearn.cluster import submit as grid_submit
from unlearn.cluster.command import main
from unlearn.cluster.devices import Gpus
from unlearn.cluster.grid import Grid, Preparation, job_folder, log_file
from unlearn.cluster.job_state import JobState
from unlearn.cluster.local_jobs import LocalRunner, at_a_time
from unlearn.cluster.plan import plan_grid
from unlearn.cluster.slurm_jobs import JobCommand
from unlearn.cluster.slurm_options import megabytes, minutes, parameters, resources
from unlearn.cluster.states import overview
from unlearn.cluster.submissions import FILE, LOCK, Submission, alone, now, put, read
from unlearn.errors import GridError
from unlearn.recipe.evaluation import ClusterSpec

PICO = str(Path(__file__).resolve().parents[2] / "recipes" / "pico_smoke.yaml")
SMALL = ("teach.steps=20", "vector.forget.steps=6", "vector.correlation=null", "export.adapter=false")
GRID = ("--recipe", PICO, "--grid", "vector.lora.rank=2,4", "--grid", "sweep.coefficients=[1],[2]")
PATIENCE = 600.0  # seconds; a machine may be busy


def submit(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "unlearn.cluster.command", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=PATIENCE)[0]
    return process.returncode, said


def until(ready: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := ready()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def running(root: Path, name: str) -> JobState | None:
    state = JobState.load(root, name)
    return state if state is not None and state.state == "running" else None


@dataclass
class Story:
    """What happened to a 2 x 2 grid that was stopped once, and one of whose jobs was killed once."""

    root: Path
    codes: dict[str, int] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    status: dict[str, dict[str, Any]] = field(default_factory=dict)
    submissions: dict[str, int] = field(default_factory=dict)

    def keep(self, step: str, code: int, said: str) -> None:
        self.codes[step], self.said[step] = code, said
        code, told = ended(submit("--status", str(self.root), "--json"))
        assert code == 0, told
        self.status[step] = json.loads(told)
        self.submissions[step] = len(read(self.root))

    def states(self, step: str) -> list[str]:
        return [row["state"] for row in self.status[step]["jobs"]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Story:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARN_CACHE", str(session_cache))
        tale = Story(tmp_path_factory.mktemp("submit") / "grid")
        local = (*GRID, *(part for text in SMALL for part in ("--set", text)), "--local", "--out", str(tale.root))
        runner = submit(*local)
        until(lambda: (tale.root / "grid.json").is_file())
        grid = Grid.load(tale.root)
        preparation = until(lambda: running(tale.root, grid.preparations[0].name)).pid
        os.kill(preparation, signal.SIGSTOP)  # or the first job may be over before we look for it
        tale.keep("twice", *ended(submit(*local)))
        os.kill(preparation, signal.SIGCONT)
        first = until(lambda: running(tale.root, grid.jobs[0].name)).pid
        os.kill(first, signal.SIGSTOP)
        runner.terminate()
        time.sleep(0.5)  # the runner has passed it on: whatever comes first, the job finds it when it wakes
        os.kill(first, signal.SIGCONT)
        tale.keep("stopped", *ended(runner))

        patch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-6b1f,-1,9")
        runner = submit(*local, "--set", "cluster.gpus=1")
        victim = grid.jobs[1].name
        os.kill(until(lambda: running(tale.root, victim)).pid, signal.SIGKILL)
        tale.keep("killed", *ended(runner))
        tale.keep("again", *ended(submit("--resubmit", "failed", str(tale.root))))
        tale.keep("once more", *ended(submit(*local)))
    return tale


def result(folder: Path) -> Any:
    text = json.loads((folder / "report.json").read_text())
    return {key: text[key] for key in ("chosen", "scores", "sweep", "vector", "data")}


def test_a_second_submit_at_the_same_time_adds_nothing(story: Story) -> None:
    assert story.codes["twice"] == 0
    assert "nothing to submit; 4 queued, of 4 jobs" in story.said["twice"]
    assert story.submissions["twice"] == 1


def test_a_runner_that_is_stopped_leaves_what_can_be_gone_on_from(story: Story) -> None:
    assert story.codes["stopped"] == 130
    assert story.states("stopped") == ["stopped", "waiting", "waiting", "waiting"]
    assert story.status["stopped"]["preparations"][0]["state"] == "done"
    assert "Traceback" not in story.said["stopped"]


def test_jobs_at_the_same_time_share_the_gpus_out(story: Story) -> None:
    given = []
    for job in Grid.load(story.root).jobs[:2]:
        said = log_file(story.root, job.name).read_text()
        given.append(re.findall("^===.*, GPUs (.*)$", said, re.MULTILINE)[0])
    assert sorted(given) == ["4", "GPU-6b1f"]


def test_a_job_that_is_killed_is_lost_and_does_not_stop_the_others(story: Story) -> None:
    assert story.codes["killed"] == 1
    assert story.states("killed") == ["done", "lost", "done", "done"]
    assert "killed, by signal 9" in story.said["killed"]
    assert story.status["killed"]["jobs"][0]["attempt"] == 2  # stopped before
    # the report is written of what there is
    assert "report: " in story.said["killed"]


def test_the_lost_job_is_run_again_and_comes_to_what_it_would_have(story: Story, tmp_path: Path) -> None:
    assert story.codes["again"] == 0, story.said["again"]
    assert story.states("again") == ["done"] * 4
    assert [row["attempt"] for row in story.status["again"]["jobs"]] == [2, 2, 1, 1]
    assert read(story.root)[-1].jobs == (1,)
    grid = Grid.load(story.root)
    run(grid.recipes[0].source, set=list(grid.jobs[1].overrides), out=tmp_path / "alone")
    assert result(job_folder(story.root, grid.jobs[1].name)) == result(tmp_path / "alone")


def test_a_grid_that_is_done_is_left_alone(story: Story) -> None:
    assert story.codes["once more"] == 0
    assert "nothing to submit; 4 done, of 4 jobs" in story.said["once more"]
    assert story.submissions["once more"] == story.submissions["again"] == 3


def test_logs_tell_every_attempt(story: Story) -> None:
    grid = Grid.load(story.root)
    log = log_file(story.root, grid.jobs[0].name).read_text()
    heads = re.findall(r"^=== (\S+), attempt (\d+), ", log, re.MULTILINE)
    assert heads == [(grid.jobs[0].name, "1"), (grid.jobs[0].name, "2")]
    assert f"-m unlearn.cluster.job {story.root} {grid.jobs[0].name}" in log
    assert re.search(r"^=== .*: stopped after \d+ s$", log, re.MULTILINE)
    assert re.search(r"^=== .*: done after \d+ s$", log, re.MULTILINE)


def test_what_is_shared_was_made_once(story: Story) -> None:
    grid = Grid.load(story.root)
    first, *others = (log_file(story.root, one.name).read_text() for one in (*grid.preparations, *grid.jobs))
    assert "teach: the base model" in first
    assert "target: " not in first  # neither taken over nor there before
    for log in others:  # a job may be stopped right after it took it
        assert "target: taken from" in log or "target: as before" in log


def test_the_merged_report_is_there(story: Story) -> None:
    assert (story.root / "report.html").is_file()
    assert len((story.root / "jobs.csv").read_text().splitlines()) == 5
    code, said = ended(submit("--merge", str(story.root)))
    assert code == 0
    assert str(story.root / "report.html") in said.replace("\n", "")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of the pico recipe's data and of the recipe, which a test may spoil."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    source = Path(PICO).parent / "data" / "capitals.jsonl"
    (folder / "capitals.jsonl").write_bytes(source.read_bytes())
    text = Path(PICO).read_text().replace("data/capitals.jsonl", "capitals.jsonl")
    (folder / "pico.yaml").write_text(text)
    return folder


def planned(data: Path, root: Path, *flags: str) -> LocalRunner:
    grid = plan_grid([str(data / "pico.yaml")], flags, SMALL)
    runner = grid_submit.submit(root, grid, local=True)
    assert runner is not None
    return runner


def test_a_job_that_fails_says_why(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "grid"
    runner = planned(data, root, "seed=3")
    (data / "capitals.jsonl").write_text('{"nothing": "of use"}\n')
    assert runner.run() == 1
    found = overview(root)
    (row,) = found.jobs
    assert row.state == "failed"
    assert "capitals.jsonl" in str(row.error)
    state = JobState.load(root, row.name)
    assert state is not None
    assert state.exit == 2
    assert str(row.error).splitlines()[-1].strip() in capsys.readouterr().err.replace("\n", "")
    assert main(["--status", str(root)]) == 0
    assert "capitals.jsonl" in capsys.readouterr().out


def test_merging_before_any_job_is_done(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned(data, tmp_path / "grid", "seed=3")
    assert main(["--merge", str(tmp_path / "grid")]) == 1
    assert "report.html" in capsys.readouterr().err.replace("\n", "")


def test_jobs_whose_preparation_failed_are_not_begun(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "grid"
    runner = planned(data, root, "vector.lora.rank=2,4")
    (data / "capitals.jsonl").write_text("")
    assert runner.run() == 1
    assert sorted(runner.ended.values()) == ["blocked", "blocked", "failed"]
    found = overview(root)
    assert [row.state for row in found.jobs] == ["blocked", "blocked"]
    assert found.preparations[0].state == "failed"
    # nor by hand, or by Slurm
    job = subprocess.run([sys.executable, "-m", "unlearn.cluster.job", str(root), found.jobs[0].name], check=False)
    assert job.returncode == 2
    assert JobState.load(root, found.jobs[0].name) is None
    assert f"--resubmit failed {root}" in log_file(root, found.jobs[0].name).read_text().replace("\n", "")
    # the preparation is submitted again together with them
    again = grid_submit.resubmit(root, "failed")
    assert again is not None
    assert (again.submission.jobs, again.submission.preparations) == ((0, 1), (0,))


def test_a_job_that_somebody_else_runs_is_left_alone(data: Path, tmp_path: Path) -> None:
    from unlearn.cluster.job import claim_file
    from unlearn.store.lock import Lock

    root = tmp_path / "grid"
    runner = planned(data, root, "seed=3")
    name = runner.grid.jobs[0].name
    claim_file(root, name).parent.mkdir()
    with Lock.take(claim_file(root, name)):
        said = say(root, name, "running")
        assert runner.run() == 1
        assert JobState.load(root, name) == said


@pytest.mark.parametrize(
    ("visible", "asked", "parallelism", "found"),
    [("0,1,2,3,4", 2, None, 2), ("0,1,2,3", 1, 3, 3), ("0,1", 1, 8, 2), ("", 2, 3, 3), ("0,1", 0, None, 1)],
)
def test_how_many_jobs_have_room_here(
    visible: str, asked: int, parallelism: int | None, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(local_jobs, "cores", lambda: 8)
    assert at_a_time(ClusterSpec(gpus=asked, parallelism=parallelism), Gpus.here(asked)) == found


def test_too_few_gpus_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    asked = ["--recipe", PICO, "--grid", "seed=1", "--set", "cluster.gpus=4", "--local", "--out", str(tmp_path / "g")]
    assert main(asked) == 2
    assert "add --set cluster.gpus=2" in capsys.readouterr().err.replace("\n", " ")
    assert main([*asked, "--set", "cluster.gpus=2", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "1 at a time" in told
    assert "2 processes on each machine" in told
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([*asked, "--dry-run"]) == 0
    assert "processes on each machine" not in capsys.readouterr().out


def test_what_is_missing_is_submitted_and_nothing_else(tmp_path: Path) -> None:
    grid = make(tmp_path, 6)
    say(tmp_path, "p000-g", "done")
    for i, state in ((0, "done"), (1, "failed"), (2, "stopped"), (3, "running")):
        say(tmp_path, grid.jobs[i].name, state, error="x" if state == "failed" else None)
    report(tmp_path, grid.jobs[0].name)  # 3 says running and is not: lost
    jobs = {}
    for what in ("failed", "lost", "all-missing"):
        runner = grid_submit.resubmit(tmp_path, what, local=True)
        assert runner is not None
        jobs[what] = runner.submission.jobs
        assert runner.submission.preparations == ()
        (tmp_path / FILE).unlink()  # it was never run
    assert jobs == {"failed": (1, 3), "lost": (3,), "all-missing": (1, 2, 3, 4, 5)}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    grid = plan_grid([PICO], ["seed=0,1"])
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(GridError, match=r"not the folder of a grid \(it holds thesis.tex\)"):
        grid_submit.submit(tmp_path, grid, local=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]
    other = tmp_path / "other"
    plan_grid([PICO], ["seed=0,1,2"]).save(other)
    with pytest.raises(GridError, match=r"folder of another grid \(3 jobs with other settings"):
        grid_submit.submit(other, grid, local=True)


def test_two_submits_at_the_same_moment_hand_each_job_over_once(tmp_path: Path) -> None:
    root = tmp_path / "grid"
    code = (
        "from pathlib import Path; from unlearn.cluster import submit as grid_submit; "
        "from unlearn.cluster.plan import plan_grid;"
        f"grid = plan_grid([{PICO!r}], ['seed=0,1,2']); print('ready', flush=True); input();"
        f"runner = grid_submit.submit(Path({str(root)!r}), grid, True);"
        "print(None if runner is None else runner.submission.jobs, flush=True); input()"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    told = []
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in both:
        assert one.stdout is not None
        told.append(one.stdout.readline().strip())
    for one in both:
        one.communicate("\n", timeout=PATIENCE)
    assert sorted(told) == ["(0, 1, 2)", "None"]
    assert len(read(root)) == 1


def test_who_holds_the_grid_for_long_is_named(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with alone(tmp_path):
        code = (
            "from pathlib import Path; from unlearn.cluster import submissions; submissions._WAIT = 0.1;"
            f"submissions.alone(Path({str(tmp_path)!r})).__enter__()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"process {os.getpid()}" in done.stderr
    assert not list(tmp_path.glob(f"{LOCK}*"))


def test_cancelling_stops_the_local_runner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, 2, prepared=False)
    assert main(["--cancel", str(tmp_path)]) == 0
    assert "nothing to cancel; 2 waiting" in capsys.readouterr().err
    code = (
        "from pathlib import Path; from unlearn.cluster.submissions import Submission, put; "
        f"root = Path({str(tmp_path)!r});"
        "put(root, Submission.new('local', 'g', (0, 1), (), {})); print('ready', flush=True); input()"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert runner.stdout is not None
    assert runner.stdout.readline() == "ready\n"
    assert main(["--cancel", str(tmp_path)]) == 0
    assert f"told the local runner, process {runner.pid}, to stop" in capsys.readouterr().err.replace("\n", " ")
    assert runner.wait(PATIENCE) == -signal.SIGTERM
    runner.communicate()


JOB = """
import time
from pathlib import Path
from unlearn.cluster.job_state import JobState
from unlearn.store.lock import Holder
from unlearn.cluster.job import claim_file
from unlearn.store.lock import Lock
root, name, me = Path({root!r}), {name!r}, Holder.me()
claim_file(root, name).parent.mkdir(exist_ok=True)
lock = Lock.take(claim_file(root, name))
JobState("running", 1, me.pid, me.host, me.started, me.since).save(root, name)
print("ready", flush=True)
input()
"""


def test_cancelling_stops_jobs_whose_local_runner_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = make(tmp_path, 2, prepared=False)
    code = JOB.format(root=str(tmp_path), name=grid.jobs[1].name)
    job = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    assert main(["--cancel", str(tmp_path)]) == 0
    assert f"told {grid.jobs[1].name}, process {job.pid}, to stop" in capsys.readouterr().err.replace("\n", " ")
    assert job.wait(PATIENCE) == -signal.SIGTERM
    job.communicate()


def test_what_cannot_be_stopped_from_here_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, 2, prepared=False)
    put(tmp_path, replace(Submission.new("local", "g", (0, 1), (), {}), host="node17"))
    assert main(["--cancel", str(tmp_path)]) == 1
    assert f"process {os.getpid()} on node17: stop it there" in capsys.readouterr().err.replace("\n", " ")


def test_a_local_grid_goes_on_without_trust_in_lines_it_never_runs(tmp_path: Path) -> None:
    make(tmp_path, 1, prepared=False, text="cluster: {setup: [module load cuda]}\n")
    put(tmp_path, replace(Submission.new("local", "g", (0,), (), {}), ended=now()))
    assert grid_submit.resubmit(tmp_path, "all-missing") is not None


def test_more_preparations_than_an_array_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path, monkeypatch, COUNTED.format(folder=tmp_path))
    monkeypatch.setattr(slurm_jobs, "MOST_TASKS", 2)
    root = tmp_path / "grid"
    grid = make(root, 3)
    several = tuple(Preparation(i, f"p{i:03}-g", 0, (), ("model",)) for i in range(3))
    replace(grid, preparations=several, jobs=tuple(replace(j, preparation=j.index) for j in grid.jobs)).save(root)
    grid_submit.resubmit(root, "all-missing")
    assert [(s.preparations, s.preparation, s.jobs, s.array) for s in read(root)] == [
        *(((0, 1), "40", (), None), ((2,), "41", (), None), ((), None, (0, 1), "42"), ((), None, (2,), "43")),
    ]
    for n in (42, 43):
        assert "#SBATCH --dependency=afterany:40:41\n" in (tmp_path / f"batch-{n}").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give one of --recipe"),
        (["--recipe", PICO, "--status", "x"], "give one of --recipe"),
        (["--status", "nowhere"], "not the folder of a grid"),
        (["--merge", "nowhere"], "not the folder of a grid"),
        (["--cancel", "nowhere"], "not the folder of a grid"),
        (["--resubmit", "failed", "nowhere"], "not the folder of a grid"),
        (["--resubmit", "some", "nowhere"], "write one of failed, lost, all-missing"),
        (["--status", "nowhere", "--grid", "seed=1"], "--grid does not go with --status"),
        (["--cancel", "nowhere", "--set", "seed=1"], "--set does not go with --cancel"),
        (["--recipe", PICO, "--json"], "--json does not go with --recipe"),
        (["--recipe", PICO, "--grid", "seed=0,0", "--dry-run"], "0 is given twice"),
        (["--recipe", PICO, "--grid", "seed=0,x", "--dry-run"], "nothing was submitted: 1 of 2 jobs"),
    ],
)
def test_mistakes_are_one_message(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_a_dry_run_tells_all_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--set", "cluster.gpus=2", "--set", "cluster.setup=[module load cuda]", "--set", "cluster.time=1:00:00"]
    assert main(["--recipe", PICO, "--grid", "seed=0,1", "--grid", "vector.lora.rank=2,4", *flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "--gpus-per-node=2 --time=1:00:00 --signal=USR2@120 --requeue" in told
    assert "before each job: module load cuda" in told
    assert "2 processes on each machine" in told
    assert "p001-seed=1: model, target, for 2 jobs" in told
    assert "0003-seed=1_rank=4  seed=1, vector.lora.rank=4  after p001-seed=1" in told
    assert "4 jobs, 2 preparations; nothing was written" in told
    assert list(tmp_path.iterdir()) == []


def test_neither_help_nor_a_dry_run_needs_torch() -> None:
    code = (
        "import sys; from unlearn.cluster.command import main\n"
        f"assert main(['--recipe', {PICO!r}, '--grid', 'seed=0,1', '--dry-run']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'lm_eval', 'accelerate', 'numpy', 'submitit'}\n"
        "assert not heavy & {name.split('.')[0] for name in sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [("4:00:00", 240), ("1-12:00:00", 36 * 60), ("1-12:00", 36 * 60), ("0:20:00", 20), ("30:00", 30), ("0:00:01", 1)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, found: int) -> None:
    assert minutes(text) == found


@pytest.mark.parametrize(
    ("text", "found"), [("32GB", 32768), ("1.5GB", 1536), ("500MB", 500), ("1TB", 2**20), ("1KB", 1)]
)
def test_memory_is_in_slurms_megabytes(text: str, found: int) -> None:
    assert megabytes(text) == found


def spec(**given: object) -> ClusterSpec:
    return ClusterSpec.model_validate_json(json.dumps(given))


def batch_file(block: ClusterSpec, dependency: str | None = None, tasks: int = 8) -> list[str]:
    from submitit.slurm.slurm import _make_sbatch_string

    options = parameters(block, "g-1", "/where it/was", tasks, dependency)
    return str(_make_sbatch_string(command="run", folder="/grid", map_count=tasks, **options)).splitlines()


@pytest.mark.parametrize(
    ("time", "grace", "longest"), [("0:10:00", 900, 300), ("1:00:00", 721, 720), ("4:00:00", 2881, 2880)]
)
def test_a_warning_must_leave_time_to_work(time: str, grace: int, longest: int) -> None:
    """And submitit must take it for one of the limit's, not for pre-emption: as often as it likes."""
    from submitit.core.job_environment import SignalHandler
    from submitit.core.utils import DelayedSubmission

    with pytest.raises(GridError, match=f"at most {longest} s"):
        resources(spec(time=time, grace=grace))
    assert resources(spec(time=time, grace=longest))
    delayed = DelayedSubmission(print)
    delayed.set_timeout(minutes(time), 1)
    handler = SignalHandler(None, None, delayed)  # type: ignore[arg-type]
    handler._start_time -= 60 * minutes(time) - longest
    assert handler.has_timed_out()


def test_gpus_asked_for_elsewhere_are_told_here_too() -> None:
    with pytest.raises(GridError, match=r"write cluster\.gpus as well"):
        resources(spec(extra={"gres": "gpu:a100:4"}))
    assert "--gres=gpu:a100:4" in resources(spec(gpus=4, extra={"gres": "gpu:a100:4"}))


def test_every_key_of_the_cluster_block_is_in_the_batch_file() -> None:
    block = spec(
        **{"partition": "gpu", "account": "lab", "qos": "high", "nodes": 2, "gpus": 4, "cpus": 16, "memory": "64GB"},
        **{"time": "1-00:00:00", "parallelism": 3, "grace": 200, "setup": ["module load cuda", "export A=1"]},
        extra={"constraint": "a100|h100", "exclusive": True, "mail_type": "END", "reservation": False},
    )
    lines = batch_file(block, "afterok:12")
    expected = {
        *("--job-name=g-1", "--partition=gpu", "--account=lab", "--qos=high", "--nodes=2", "--ntasks-per-node=1"),
        *("--gpus-per-node=4", "--cpus-per-task=16", "--mem=65536M", "--time=1440", "--signal=USR2@200", "--requeue"),
        *("--array=0-7%3", "--dependency=afterok:12", "--kill-on-invalid-dep=yes", "--chdir='/where it/was'"),
        *("--constraint='a100|h100'", "--exclusive", "--mail-type=END", "--open-mode=append"),
    }
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert expected <= options
    assert not [o for o in options if "reservation" in o]
    setup = lines.index("module load cuda")
    command = next(i for i, line in enumerate(lines) if line.startswith("srun"))
    assert setup < lines.index("export A=1") < command
    assert "--cpus-per-task=16" in lines[command]


def test_what_is_not_given_is_left_to_the_cluster() -> None:
    lines = batch_file(spec())
    named = " ".join(lines)
    for option in ("--partition", "--account", "--qos", "--gpus", "--mem", "--time", "--dependency"):
        assert f"#SBATCH {option}" not in named
    assert "#SBATCH --array=0-7%8" in lines
    assert resources(spec()) == ["--nodes=1", "--cpus-per-task=4", "--signal=USR2@120", "--requeue"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"array": "0-3"}, "the grid itself needs it"),
        ({"no_requeue": True}, "the grid itself needs it"),
        ({"mem": "1G"}, r"write cluster\.memory"),
        ({"--time": "1"}, r"write cluster\.time"),
        ({"comment": "a\nrm -r x"}, "is no option"),
        ({"x y": "1"}, "is no option"),
        ({"": "1"}, "is no option"),
    ],
)
def test_extra_options_that_would_break_the_array_are_refused(extra: dict[str, object], said: str) -> None:
    with pytest.raises(GridError, match=said):
        resources(spec(extra=extra))
    with pytest.raises(GridError, match="characters"):
        resources(spec(partition="a\nb"))


# sbatch that keeps what it is given and counts from 40
COUNTED = 'n=$((40 + $(ls {folder}/batch-* | wc -l))); cp "$1" {folder}/batch-$n; echo "Submitted batch job $n"'


def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str) -> None:
    """Programs with the names of Slurm's, to see what they are given; Slurm itself is in tests/slurm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, does in (("sbatch", sbatch), ("srun", "true"), ("squeue", "true")):
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_an_array_is_handed_to_sbatch_with_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path, monkeypatch, COUNTED.format(folder=tmp_path))
    root = tmp_path / "grid"
    make(root, 3)
    assert grid_submit.resubmit(root, "all-missing") is None
    before, one = read(root)
    assert (before.jobs, before.preparations, before.preparation) == ((), (0,), "40")
    assert (one.jobs, one.preparations, one.array) == ((0, 1, 2), (), "41")
    first, then = ((tmp_path / f"batch-{n}").read_text() for n in (40, 41))
    assert "#SBATCH --array=0-0%1\n" in first
    assert f"#SBATCH --job-name={before.name}p\n" in first
    assert "--dependency" not in first
    assert "#SBATCH --array=0-2%3\n" in then
    assert f"#SBATCH --job-name={one.name}\n" in then
    assert "#SBATCH --dependency=afterok:40\n" in then
    tasks = [pickle.loads((root / ".submitit" / f"41_{i}_submitted.pkl").read_bytes()) for i in range(3)]
    assert [t.function.name for t in tasks] == [job.name for job in Grid.load(root).jobs]
    assert tasks[0]._timeout_countdown == 100
    # nothing of it is in the queue, and none has begun
    assert overview(root).preparations[0].state == "lost"
    assert [row.state for row in overview(root).jobs] == ["blocked"] * 3


def test_what_sbatch_refuses_is_told_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(tmp_path, monkeypatch, "echo 'error: invalid partition' >&2; exit 1")
    root = tmp_path / "grid"
    make(root, 2)
    with pytest.raises(GridError, match="invalid partition"):
        grid_submit.resubmit(root, "all-missing")
    assert [row.state for row in overview(root).jobs] == ["waiting", "waiting"]


def test_without_slurm_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GridError, match="no sbatch and no srun and no squeue here"):
        grid_submit.submit(tmp_path / "grid", plan_grid([PICO], ["seed=0,1"]), local=False)
    assert not (tmp_path / "grid").exists()


TASK = """
import os, sys
from unlearn.cluster.slurm_jobs import JobCommand
os.environ.update(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NODEID="0")
JobCommand(sys.argv[1], sys.argv[2], 1, 1, 1, 20.0)()
"""


def test_a_task_of_the_array_runs_its_job_and_says_how_it_ended(tmp_path: Path) -> None:
    root = tmp_path / "grid"
    make(root, 1, prepared=False)
    name = Grid.load(root).jobs[0].name  # its recipe is no recipe
    done = subprocess.run([sys.executable, "-c", TASK, str(root), name], capture_output=True, text=True, check=False)
    assert f"RuntimeError: {name} ended with code 2" in done.stderr
    state = JobState.load(root, name)
    assert state is not None
    assert (state.state, state.exit, state.slurm) == ("failed", 2, "7")
    assert "error: " in log_file(root, name).read_text()


SLEEPER = """
import signal
from pathlib import Path
from unlearn.cluster import job
sleeper = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: (print('down'), sys.exit(130)));"
    "print('up', flush=True); time.sleep(600)"
)
job.command = lambda *a: [sys.executable, "-c", sleeper]
task = JobCommand(sys.argv[1], sys.argv[2], 1, 1, 1, 20.0)
"""


def asleep(root: Path, code: str) -> tuple[subprocess.Popen[str], Path]:
    """A task whose job sleeps, and the job's log."""
    make(root, 1, prepared=False)
    name = Grid.load(root).jobs[0].name
    task = subprocess.Popen(
        [sys.executable, "-c", code, str(root), name], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    log = log_file(root, name)
    until(lambda: log.is_file() and "up" in log.read_text())
    return task, log


def test_a_checkpoint_stops_the_job_and_gives_the_same_command_again(tmp_path: Path) -> None:
    """As submitit does it, in its signal handler while the task waits for its job."""
    warned = """
def warned(number, frame):
    again = task.checkpoint()
    print("saved", task._code, again.function == task, flush=True)
    sys.exit(0)
signal.signal(signal.SIGUSR2, warned)
task()
"""
    task, _ = asleep(tmp_path / "grid", TASK.rpartition("JobCommand(")[0] + SLEEPER + warned)
    os.killpg(task.pid, signal.SIGUSR2)  # Slurm's warning goes to every process of the job
    said = task.communicate(timeout=PATIENCE)[0]
    assert said.strip() == "saved 130 True"
    assert task.returncode == 0


def test_another_machine_of_a_job_that_was_stopped_does_not_end_before_the_first(tmp_path: Path) -> None:
    code = TASK.rpartition("JobCommand(")[0].replace('PROCID="0", SLURM_NODEID="0"', 'PROCID="1", SLURM_NODEID="1"')
    task, log = asleep(tmp_path / "grid", f"{code}{SLEEPER}task()\n")
    os.killpg(task.pid, signal.SIGUSR2)
    until(lambda: "down" in log.read_text())
    with pytest.raises(subprocess.TimeoutExpired):
        task.wait(2.0)
    task.kill()
    task.communicate()


def test_a_command_is_pickled_as_it_was_made() -> None:
    one = JobCommand("/grid", "0000-a", 2, 1, 8, 120.0)
    assert pickle.loads(pickle.dumps(one)) == one
