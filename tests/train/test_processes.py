"""Several processes, real ones, under torchrun: the same training as one process's, stops, and jobs of grids."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes_arena import fit
from waiting import torchrun, until

from unlearn import processes as collective
from unlearn.cluster.job import JobState
from unlearn.cluster.plan import Grid
from unlearn.errors import UnlearnError
from unlearn.model import locate as fetch
from unlearn.model import pico
from unlearn.model.load import Loaded, fingerprint
from unlearn.recipe.schema import ModelSpec
from unlearn.results import RunReport
from unlearn.store.cache import entry
from unlearn.store.lock import Lock
from unlearn.store.stages import STAGE_FILE
from unlearn.vector.task_vector import TaskVector

HERE = Path(__file__).parents[1]
SECONDS = 240
# float32: where gradients differ in the seventh digit, so do AdamW's steps; 2e-5 of a vector's norm was seen at most
TOLERANCE = 5e-4


def environment(**more: str) -> dict[str, str]:
    """No GPU, and the tests' modules within reach."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "SLURM_"))}
    return {
        **plain,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": within(HERE),
        **more,
    }


def within(folder: Path) -> str:
    """Modules of a folder within reach, and this project's."""
    return f"{folder}{os.pathsep}{HERE.parent}"


def started(line: Sequence[str], folder: Path, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and expect an exit code."""
    done = subprocess.run(
        line, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


# --- groups ---------------------------------------------------------------------------------------------------------


def test_alone_there_is_nothing_to_agree_on() -> None:
    assert collective.gathered("x") == ["x"]
    assert collective.from_main(lambda: 7) == 7
    assert collective.together([1, 2, 3], lambda some: [2 * n for n in some]) == [2, 4, 6]
    assert (collective.total(5), collective.anyone(False), collective.rank(), collective.count()) == (5, False, 0, 1)


LOSES = """
import os
from pathlib import Path
from unlearn import processes as collective
from unlearn.errors import UnlearnError
collective.join()
def says(when):
    try:
        with collective.all_there():
            if when == "other":
                raise RuntimeError("NCCL error: 5, invalid usage\\nException raised from somewhere in the sources")
            collective.wait()
    except UnlearnError as e:
        Path(f"{when}{collective.rank()}.txt").write_text(str(e))
says("other")
if collective.rank() == 0:
    says("dies")
os._exit(0)
"""


def test_of_a_process_that_is_gone_the_library_s_own_words_are_kept(tmp_path: Path) -> None:
    (tmp_path / "loses.py").write_text(LOSES)
    started([*torchrun(2), "loses"], tmp_path, PYTHONPATH=within(tmp_path))
    for when, shows in (("dies", "[Cc]onnection closed|reset"), ("other", "error: 5, invalid usage$")):
        said = (tmp_path / f"{when}0.txt").read_text()
        assert said.startswith("another process has ended early, or cannot be reached. ")
        assert re.search(shows, said)
        assert "\n" not in said


PATIENT = """
import sys
from datetime import timedelta
from pathlib import Path
from unlearn import processes as collective; from unlearn.store import stages as pool
collective._PATIENCE, pool._TURN = timedelta(seconds=5), 0.5
collective.join()
Path(f"joined{collective.rank()}").touch()
with pool.Pool(Path("pool")).making("key") as lock:
    Path(f"turn{collective.rank()}").touch()
    collective.wait()
collective.leave()
"""


def test_a_group_waits_for_another_run_longer_than_for_a_process(tmp_path: Path) -> None:
    (tmp_path / "patient.py").write_text(PATIENT)
    (tmp_path / "pool" / ".locks").mkdir(parents=True)
    line = [*torchrun(2), "patient"]
    lock = Lock.take(tmp_path / "pool" / ".locks" / "key.lock")
    with subprocess.Popen(line, cwd=tmp_path, env=environment(PYTHONPATH=within(tmp_path))) as process:
        try:
            until(lambda: all((tmp_path / f"joined{n}").exists() for n in (0, 1)) or process.poll() is not None)
            time.sleep(8)
            assert process.poll() is None
            assert not list(tmp_path.glob("turn*"))
        finally:
            lock.release()
        assert process.wait(SECONDS) == 0
    assert len(list(tmp_path.glob("turn*"))) == 2


IMPATIENT = """
import sys
from datetime import timedelta
from unlearn import cli, execute, processes as collective
collective._PATIENCE = timedelta(seconds=10)
execute._run = lambda *_: collective.wait()  # they have joined
sys.exit(cli.main())
"""


def test_models_are_fetched_before_the_group_is_joined(tmp_path: Path) -> None:
    """Here by yet another process, which takes its time."""
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    cache = tmp_path / "cache"
    line = [*torchrun(2), "impatient", "--recipe", "pico_smoke.yaml", "--set", "teach=null", "--out", "run"]
    line += ["--prepare", "--pool", "pool"]

    def fill(folder: Path) -> None:
        process = subprocess.Popen(
            line, cwd=tmp_path, env=environment(PYTHONPATH=within(tmp_path), UNLEARN_CACHE=str(cache))
        )
        waiting.append(process)
        until(lambda: (tmp_path / "run" / "recipe.yaml").exists() or process.poll() is not None)
        time.sleep(14)
        assert process.poll() is None
        pico.build("phi", folder)

    waiting: list[subprocess.Popen[bytes]] = []
    folder = fetch.locate(ModelSpec.model_validate({"path": "pico:phi"}), tmp_path, tmp_path / "elsewhere")
    entry(cache, Path(folder).name, fill)
    assert waiting[0].wait(SECONDS) == 0


def test_accelerate_on_cpus_is_said_to_start_one_process(tmp_path: Path) -> None:
    (tmp_path / "joins.py").write_text("from unlearn import processes\nprocesses.join()\n")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "joins"]
    done = started(line, tmp_path, PYTHONPATH=within(tmp_path))
    assert "accelerate launch --cpu starts one process. For several: torchrun --nproc_per_node N -m" in done.stderr


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_weights_are_not_spread_over_processes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(UnlearnError, match=f"every process holds the whole model: start without --use_{name}"):
        collective.join()


# --- training --------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_row": {"batch_size": 1, "accumulation": 2},
    "penalty-one": {"kind": "penalty-one", "batch_size": 2, "accumulation": 2},
    "penalty-two": {"kind": "penalty-two"},
    "gradient_ascent": {"kind": "gradient_ascent", "steps": 4},
    "gradient_difference": {"kind": "gradient_difference", "steps": 4},
    "npo": {"kind": "npo", "batch_size": 2, "accumulation": 2},
    "idk_dpo": {"kind": "idk_dpo", "steps": 4},
    "rmu": {"kind": "rmu", "steps": 4},
    "ihl": {"kind": "ihl", "steps": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "dropout": {"dropout": 0.2, "save_every": 100},
}


def trained(folder: Path, model: Path, cases: Mapping[str, Any], code: int = 0) -> str:
    """Let two processes train. Returns what they said."""
    asked = {"out": str(folder), "model": str(model), "cases": cases}
    return started([*torchrun(2), "processes_arena", json.dumps(asked)], folder, code).stderr


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, pico_phi: Path) -> Path:
    """What two processes have trained, and in the end were stopped in."""
    folder = tmp_path_factory.mktemp("two")
    last = {"stopped": {**CASES["dropout"], "happens": [4, "signal"]}}
    said = trained(folder, pico_phi, {**CASES, "weights": {"kind": "weights", "learning_rate": 1e-3}, **last}, code=1)
    (folder / "said").write_text(said)
    return folder


def told(folder: Path, name: str) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((folder / name / "log.json").read_text())
    return log


def distance(folder: Path, name: str, vector: TaskVector) -> float:
    """How far a vector is from that of a folder, in its own norm."""
    return (vector - TaskVector.load(folder / name / "vector.safetensors")).norm() / vector.norm()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.get("dropout")])
def test_two_processes_train_what_one_trains(
    two: Path, name: str, loaded: Callable[..., Loaded], pico_phi: Path, tmp_path: Path
) -> None:
    """Every loss, with a batch that leaves one of the processes without a row."""
    model = loaded(pico_phi)
    before = fingerprint(model.model)
    vector, log = fit(model, tmp_path, **CASES[name])
    assert vector is not None
    found = told(two, name)
    assert found["steps"] == log.steps
    assert found["losses"] == pytest.approx(log.losses, abs=2e-4)
    assert distance(two, name, vector) < TOLERANCE
    assert len(set(found["digests"])) == 1, "every process has the same vector"
    assert set(found["models"]) == {before}, "and its model back as it was, all of it"


def test_every_process_draws_its_own_masks(two: Path) -> None:
    found = told(two, "dropout")
    first, second = found["masks"]
    assert 0 < sum(first) < len(first)
    assert 0 < sum(second) < len(second)
    assert first != second
    assert len(set(found["digests"])) == 1


@pytest.mark.slow  # a job of two nodes is in tests/slurm
def test_two_machines_train_what_two_processes_train(two: Path, tmp_path: Path, pico_phi: Path) -> None:
    """Each with its own torchrun; here both are one machine."""
    asked = json.dumps({"out": str(tmp_path), "model": str(pico_phi), "cases": {"plain": CASES["plain"]}})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    begin = [sys.executable, "-m", "torch.distributed.run", *where]
    lines = [[*begin, f"--node-rank={node}", "-m", "processes_arena", asked] for node in (0, 1)]
    with subprocess.Popen(lines[1], cwd=tmp_path, env=environment()) as other:
        started(lines[0], tmp_path)
        assert other.wait(timeout=SECONDS) == 0
    assert told(tmp_path, "plain")["digests"] == told(two, "plain")["digests"]


def test_two_processes_train_all_weights_as_one_does(
    two: Path, loaded: Callable[..., Loaded], pico_phi: Path, tmp_path: Path
) -> None:
    _, log = fit(loaded(pico_phi), tmp_path, kind="weights", learning_rate=1e-3)
    found = told(two, "weights")
    assert found["losses"] == pytest.approx(log.losses, abs=2e-4)
    assert len(set(found["models"])) == 1


# --- stops and failures ----------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_after_one_step(two: Path, pico_phi: Path) -> None:
    """And what goes on from there ends as if it had not been stopped, bit for bit.

    In the training after that one of them has no memory left: it is heard, and nobody waits.
    """
    assert "stopped after step 5 of 7" in (two / "said").read_text()
    work = two / "stopped" / "work"
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-5"]
    files = json.loads((work / "checkpoint-5" / STAGE_FILE).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "adapter_model.safetensors"} <= set(files)
    said = trained(two, pico_phi, {"stopped": CASES["dropout"], "next": {"happens": [2, "memory"]}}, code=1)
    assert told(two, "stopped")["digests"] == told(two, "dropout")["digests"]
    assert told(two, "stopped")["losses"] == told(two, "dropout")["losses"]
    assert "error in process 1: vectors/forget: out of memory (DefaultCPUAllocator: can't alloc" in said
    assert "lower vector.forget.batch_size (and raise" in said


# --- a whole run -----------------------------------------------------------------------------------------------------


def values(report: RunReport) -> list[float | None]:
    """Every number of the report that the processes have computed."""
    found: list[float | None] = []
    for row in report.scores:
        found += [row.before.value, row.after.value, row.before.stderr, row.after.stderr]
    for point in report.sweep:
        found += [score.score.value for score in point.scores]
    for read in (how for example in report.examples for how in (example.before_fluency, example.after_fluency)):
        found += [] if read is None else [read.repetition, read.loss]
    return found


def texts(report: RunReport) -> list[tuple[str, ...]]:
    """The answers that were written, without how they read."""
    return [(e.set, e.name, e.prompt, e.target, e.before, e.after) for e in report.examples]


@pytest.mark.slow  # one that takes over what was trained is in tests/evidence
def test_two_processes_give_the_report_of_one(smoke: Path, tmp_path: Path) -> None:
    line = [*torchrun(2), "unlearn.run", "--recipe", "pico_smoke.yaml", "--out", "two"]
    done = started(line, tmp_path, UNLEARN_CACHE=os.environ["UNLEARN_CACHE"])
    assert done.stderr.count("2 processes share training and scoring") == 1
    assert "forgot" in done.stdout
    one, two = (RunReport.from_json(json.loads((f / "report.json").read_text())) for f in (smoke, tmp_path / "two"))
    assert two.chosen == one.chosen
    assert values(two) == pytest.approx(values(one), rel=1e-4, abs=1e-4)
    assert [(t["steps"], t["examples"]) for t in two.training] == [(t["steps"], t["examples"]) for t in one.training]
    assert texts(two) == texts(one)


@pytest.mark.slow  # a training alone is stopped above
def test_a_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """SIGTERM to torchrun in the middle of a training, as a batch system ends a job."""
    line = [*torchrun(2), "unlearn.run", "--recipe", "pico_smoke.yaml", "--out", "run", "--set"]
    line += ["vector.forget={steps: 200, batch_size: 12, learning_rate: 0.0001, save_every: 20}", "--set"]
    line += ["sweep.coefficients=[1]"]
    more = {"UNLEARN_CACHE": os.environ["UNLEARN_CACHE"], "PYTHONUNBUFFERED": "1"}
    work = tmp_path / "run" / ".unlearn-work"
    with subprocess.Popen(
        line, cwd=tmp_path, env=environment(**more), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        for words in process.stderr:
            said += words
            if "] finetune: " in words:
                until(lambda: any(work.glob(f"*forget*/*/{STAGE_FILE}")) or process.poll() is not None)
                process.terminate()
        assert process.wait(timeout=SECONDS) == 1, said
    assert "what is finished is kept, and the same command goes on from there" in said
    stopped = re.search(r"forget set: stopped after step (\d+) of 200", said)
    assert stopped is not None
    left = [p.name for p in work.glob("*forget*/checkpoint-*")]
    assert f"checkpoint-{stopped[1]}" in left
    started(line, tmp_path, **more)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"][1]["steps"] == 200


# --- jobs of grids ---------------------------------------------------------------------------------------------------

GRID_COMMAND = [sys.executable, "-m", "unlearn", "submit"]
FAILS = """
import os, sys, time
if "submitit.core._submit" in sys.orig_argv:
    from unlearn.cluster import job
    def fails(root, grid, one):
        if os.environ["RANK"] == "1":
            raise ValueError("enough of this")
        time.sleep(3)
        raise KeyboardInterrupt  # as the main process is stopped when another one has ended
    job._execute = fails
"""


def test_a_job_says_why_a_process_that_is_not_the_main_one_failed(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILS)
    line = [*GRID_COMMAND, "pico_smoke", "--grid", "seed=0", "--local", "--out", "grid", "--set", "cluster.processes=2"]
    done = started([*line, "--set", "teach=null"], tmp_path, code=1, PYTHONPATH=within(tmp_path))
    (job,) = Grid.load(tmp_path / "grid").jobs
    state = JobState.load(tmp_path / "grid", job.name)
    assert state is not None
    assert (state.state, state.error) == ("failed", "ValueError: enough of this"), done.stderr


@pytest.mark.slow  # in a real Slurm it is in tests/slurm
def test_a_job_of_several_processes_is_stopped_and_goes_on(tmp_path: Path) -> None:
    line = [*GRID_COMMAND, "pico_smoke", "--grid", "seed=0", "--local", "--out", "grid"]
    line += ["--set", "cluster.processes=2"]
    line += ["--set", "vector.method=negate", "--set", "sweep.coefficients=[1]"]
    line += ["--set", "vector.forget={steps: 120, batch_size: 12, learning_rate: 0.0001, save_every: 20}"]
    more = {"UNLEARN_CACHE": os.environ["UNLEARN_CACHE"]}
    with subprocess.Popen(line, cwd=tmp_path, env=environment(**more)) as runner:
        sealed = f"grid/jobs/*/.unlearn-work/*forget*/*/{STAGE_FILE}"
        until(lambda: any(tmp_path.glob(sealed)) or runner.poll() is not None)
        runner.terminate()
        assert runner.wait(SECONDS) == 130
    (job,) = Grid.load(tmp_path / "grid").jobs
    state = JobState.load(tmp_path / "grid", job.name)
    assert state is not None
    assert state.state == "stopped"
    done = started(line, tmp_path, **more)
    assert f"[1/1] {job.name}: done" in done.stderr  # its preparation was done before
    log = job.log(tmp_path / "grid").read_text()
    assert log.count("2 processes share training and scoring") == 2
    assert re.search(r"stopped after step \d+ of 120; it is kept", log)
