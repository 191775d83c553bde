"""``--local`` and what may befall it: hang-ups, readers that leave, jobs that do not listen, the runner's own death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_grid_status import make
from waiting import gone, torchrun, until

from unlearn.cluster import local_jobs
from unlearn.cluster.devices import Gpus
from unlearn.cluster.grid import log_file
from unlearn.cluster.job import claim_file
from unlearn.cluster.job_state import JobState
from unlearn.cluster.local_jobs import LocalRunner, at_a_time, cores
from unlearn.cluster.submissions import Submission, read
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.store.lock import Lock

SECONDS = 60
# Jobs are stood in for by this: it says that it is there, and takes half a second to save when told to stop.
JOB = """
import os, signal, sys, time
from pathlib import Path
root = Path(sys.argv[2])
def save(number, frame):
    time.sleep(0.5)
    (root / "saved").write_text("")
    sys.exit(130)
signal.signal(signal.SIGTERM, save if sys.argv[1] == "saves" else signal.SIG_IGN)
part = root / f"{os.getpid()}.part"
part.write_text("")
part.rename(root / f"pid-{os.getpid()}")
time.sleep(20)
"""
RUNNER = """
import os, sys
from pathlib import Path
from unlearn.cluster import job, command as submit
what, root, prefix = sys.argv[1], Path(sys.argv[2]), sys.argv[3:] or [sys.executable, "-m"]
os.environ["PYTHONPATH"] = str(root)
job.command = lambda *a, **k: [*prefix, "stands_in", what, str(root)]
sys.exit(submit.main(["--resubmit", "all-missing", str(root), "--local", "--set", "cluster.grace=10"]))
"""
LAUNCHED = torchrun(2)


def runner(root: Path, what: str, *prefix: str, before: str = "", stderr: int | None = None) -> subprocess.Popen[bytes]:
    """``--local`` over a grid of one job."""
    make(root, 1, prepared=False)
    (root / "stands_in.py").write_text(JOB)
    line = [sys.executable, "-c", before + RUNNER, what, str(root), *prefix]
    return subprocess.Popen(line, stderr=stderr, start_new_session=True)


def processes(root: Path, count: int = 1) -> list[int]:
    """The processes of the job, once there are so many."""
    until(lambda: len(list(root.glob("pid-*"))) == count)
    return [int(path.name.removeprefix("pid-")) for path in root.glob("pid-*")]


def test_a_hang_up_that_is_ignored_stops_nothing(tmp_path: Path) -> None:
    """As ``nohup`` has it."""
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with runner(tmp_path, "saves", before=ignoring) as process:
        processes(tmp_path)
        process.send_signal(signal.SIGHUP)
        time.sleep(1.2)
        assert process.poll() is None
        assert not (tmp_path / "saved").exists()
        process.terminate()
        assert process.wait(SECONDS) == 130
    assert (tmp_path / "saved").exists()


def test_jobs_save_though_nobody_listens_to_the_runner(tmp_path: Path) -> None:
    """``2>&1 | tee log``: Ctrl-C ends tee as well."""
    with runner(tmp_path, "saves", stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        processes(tmp_path)
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 130
    assert (tmp_path / "saved").exists()
    assert read(tmp_path)[-1].ended is not None


def test_two_signals_at_once_are_one_request(tmp_path: Path) -> None:
    """A terminal that closes sends both."""
    with runner(tmp_path, "saves") as process:
        processes(tmp_path)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        process.terminate()
        assert process.wait(SECONDS) == 130
    assert (tmp_path / "saved").exists()


def test_being_asked_once_more_ends_all_processes_of_a_job(tmp_path: Path) -> None:
    with runner(tmp_path, "is deaf", *LAUNCHED) as process:
        found = processes(tmp_path, 2)
        process.terminate()
        time.sleep(2.2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(SECONDS) == 130
    until(lambda: all(gone(one) for one in found))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent is gone")
@pytest.mark.parametrize("prefix", [[], LAUNCHED])
def test_jobs_of_a_killed_runner_save_and_end(tmp_path: Path, prefix: Sequence[str]) -> None:
    with runner(tmp_path, "saves", *prefix) as process:
        found = processes(tmp_path, 2 if prefix else 1)
        process.kill()
    until(lambda: all(gone(one) for one in found))
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ({"parallelism": 32}, 6),
        ({"parallelism": 4}, 4),
        ({"parallelism": 32, "processes": 4}, 1),
        ({"processes": 9}, 1),
    ],
)
def test_a_block_for_a_cluster_does_not_overload_this_machine(
    block: dict[str, int], found: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(local_jobs, "cores", lambda: 6)
    spec = ClusterSpec(gpus=8, **block)  # type: ignore[arg-type]
    here = Gpus.here(spec.gpus)
    capsys.readouterr()
    assert at_a_time(spec, here) == found
    capped = block.get("parallelism", 1) > found
    assert ("6 cores here" in capsys.readouterr().err) == capped


def test_jobs_without_gpus_have_one_process_and_the_cores_they_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the block asks for eight GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        "unlearn.cluster.job.command",
        lambda root, name, count: [sys.executable, "-c", f"import os; print({count}, os.environ['OMP_NUM_THREADS'])"],
    )
    grid, spec = make(tmp_path, 2, prepared=False), ClusterSpec(gpus=8)
    one = Submission.new("local", "g", (0,), (), {})
    assert LocalRunner(tmp_path, grid, spec, one, Gpus.here(spec.gpus)).run() == 0
    assert log_file(tmp_path, grid.jobs[0].name).read_text().split() == ["1", str(cores())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_job_that_waits_for_another_process_can_be_stopped(tmp_path: Path, number: int) -> None:
    name = make(tmp_path, 1, prepared=False).jobs[0].name
    claim_file(tmp_path, name).parent.mkdir()
    with Lock.take(claim_file(tmp_path, name)):
        waiting = subprocess.Popen(
            [sys.executable, "-m", "unlearn.cluster.job", str(tmp_path), name],
            env={**os.environ, "SLURM_JOB_ID": "5"},
            start_new_session=True,
        )
        log = log_file(tmp_path, name)
        until(lambda: log.is_file() and "wait" in log.read_text())
        waiting.send_signal(number)
        assert waiting.wait(SECONDS) == 130
        assert "Traceback" not in log.read_text()
        assert f"stopped before {name} began" in log.read_text()
        assert JobState.load(tmp_path, name) is None
