"""Several processes, real ones: the launcher, the same training as one process's, and stops."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from processes_arena import fit
from waiting import gone, until

from unlearn import accelerated, collective, launch, run
from unlearn.checkpoints import WHOLE
from unlearn.errors import UnlearnError
from unlearn.models import Loaded, fingerprint
from unlearn.report import RunReport
from unlearn.vector import TaskVector

HERE = Path(__file__).parent
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
        "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
        **more,
    }


def started(line: Sequence[str], folder: Path, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and expect an exit code."""
    done = subprocess.run(
        line, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == code, done.stderr[-4000:]
    return done


# --- the launcher ----------------------------------------------------------------------------------------------------

SHOWS = """
import json, os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
told = {**{n: os.environ[n] for n in names}, "pid": os.getpid(), "argv": sys.argv[1:]}
def tell():
    part = Path(f"{rank}.part")
    part.write_text(json.dumps(told))
    part.rename(f"{rank}.json")
def leave(number, frame):
    Path(f"signal{rank}.txt").write_text(str(int(number)))
    sys.exit(130)
does = {"heeds": leave, "deaf": signal.SIG_IGN, "stuck": signal.SIG_IGN if rank == "1" else leave}.get(sys.argv[1])
if does is not None:
    signal.signal(signal.SIGTERM, does)
    signal.signal(signal.SIGINT, does)
if sys.argv[1] == "seals":
    from unlearn import stopping
    stopping._ECHO = 0.1
    try:
        with stopping.held() as hold:
            tell()
            while not hold.requested and not (rank == "1" and Path("stop1").exists()):
                time.sleep(0.02)
            time.sleep(0.3)  # the rest of the step
            if rank == "0":
                time.sleep(1.2)  # the checkpoint
                Path("sealed").write_text("")
    except KeyboardInterrupt:
        pass
    sys.exit(130)
tell()
if sys.argv[1] == "fails" and rank == "1":
    sys.exit(3)
if sys.argv[1] == "dies" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] != "ends":
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shows.py").write_text(SHOWS)
    return tmp_path


def shown(folder: Path, count: int) -> list[dict[str, Any]]:
    """What so many processes say of themselves, once all have."""
    until(lambda: all((folder / f"{n}.json").is_file() for n in range(count)))
    return [json.loads((folder / f"{n}.json").read_text()) for n in range(count)]


def test_a_command_line_for_every_job() -> None:
    assert launch.command(1) == []
    two = launch.command(2)
    assert two[0] == sys.executable
    assert two[-1] == "-m"
    assert "--nodes" not in two
    there = launch.command(1, nodes=2, node_rank=1, main_host="node0", port=1234)
    assert there[there.index("--main-host") + 1] == "node0"
    assert there[there.index("--port") + 1] == "1234"
    assert there[there.index("--node-rank") + 1] == "1"
    for wrong in ((0,), (2, 0), (2, 2, 2), (2, 1, -1)):
        with pytest.raises(UnlearnError):
            launch.command(*wrong)


def test_all_nodes_come_to_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    first, second = (launch.command(4, 2, rank, "node0") for rank in (0, 1))
    port = first[first.index("--port") + 1]
    assert second[second.index("--port") + 1] == port
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    other = launch.command(4, 2, 0, "node0")
    assert other[other.index("--port") + 1] != port


def test_every_process_knows_its_place(folder: Path) -> None:
    started([*launch.command(3), "shows", "ends", "--port", "x"], folder)
    told = shown(folder, 3)
    assert [t["RANK"] for t in told] == [t["LOCAL_RANK"] for t in told] == ["0", "1", "2"]
    assert {t["WORLD_SIZE"] for t in told} == {t["LOCAL_WORLD_SIZE"] for t in told} == {"3"}
    assert len({t["MASTER_PORT"] for t in told}) == 1
    assert all(t["argv"] == ["ends", "--port", "x"] for t in told)


def test_two_nodes_on_one_machine(folder: Path) -> None:
    for node in (0, 1):
        started([*launch.command(2, 2, node, "localhost", 1234), "shows", "ends"], folder)
    told = shown(folder, 4)
    assert [t["LOCAL_RANK"] for t in told] == ["0", "1", "0", "1"]
    assert {(t["WORLD_SIZE"], t["MASTER_ADDR"], t["MASTER_PORT"]) for t in told} == {("4", "localhost", "1234")}


def test_one_that_fails_takes_the_others_with_it(folder: Path) -> None:
    done = started([*launch.command(2), "shows", "fails"], folder, code=3)
    assert "Traceback" not in done.stderr
    assert all(gone(t["pid"]) for t in shown(folder, 2))


def test_of_one_that_was_killed_the_launcher_speaks(folder: Path) -> None:
    done = started([*launch.command(2), "shows", "dies"], folder, code=128 + signal.SIGKILL)
    assert done.stderr == "process 1 was killed by signal 9: the others are stopped\n"
    assert all(gone(t["pid"]) for t in shown(folder, 2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_all(folder: Path, number: int) -> None:
    with subprocess.Popen([*launch.command(2), "shows", "heeds"], cwd=folder, env=environment()) as process:
        told = shown(folder, 2)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
    assert [(folder / f"signal{n}.txt").read_text() for n in (0, 1)] == [str(int(number))] * 2
    assert all(gone(t["pid"]) for t in told)


IMPATIENT = "import sys; from unlearn import launch; launch._GRACE = 0.5; sys.exit(launch.start('shows', ['{}'], 2))"


@pytest.mark.parametrize("to", ["launcher", "process 1"])
def test_the_main_process_seals_when_the_others_are_through(folder: Path, to: str) -> None:
    code = IMPATIENT.format("seals")
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment()) as process:
        shown(folder, 2)
        if to == "launcher":
            process.terminate()
        else:  # which alone was signalled
            (folder / "stop1").write_text("")
        assert process.wait(timeout=60) == 130
    assert (folder / "sealed").is_file()


def test_after_the_main_process_nobody_is_waited_for_long(folder: Path) -> None:
    code = IMPATIENT.format("stuck")
    with subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment()) as process:
        told = shown(folder, 2)
        process.terminate()
        assert process.wait(timeout=20) == 130
    assert all(gone(t["pid"]) for t in told)


def test_being_asked_to_stop_once_more_ends_all_and_an_echo_does_not(folder: Path) -> None:
    with subprocess.Popen([*launch.command(2), "shows", "deaf"], cwd=folder, env=environment()) as process:
        told = shown(folder, 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
            time.sleep(0.3)
        assert process.poll() is None
        time.sleep(2.0)
        process.terminate()
        assert process.wait(timeout=20) == 130
    assert all(gone(t["pid"]) for t in told)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent is gone")
def test_a_killed_launcher_leaves_nobody_behind(folder: Path) -> None:
    with subprocess.Popen([*launch.command(2), "shows", "heeds"], cwd=folder, env=environment()) as process:
        told = shown(folder, 2)
        process.kill()
    until(lambda: all(gone(t["pid"]) for t in told), 30)
    assert [(folder / f"signal{n}.txt").read_text() for n in (0, 1)] == [str(int(signal.SIGTERM))] * 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("python /bin/accelerate launch --cpu x", ["--cpu", "x"]),
        ("python /bin/accelerate-launch --cpu x", ["--cpu", "x"]),
        ("python -m accelerate.commands.launch --cpu x", ["--cpu", "x"]),
        ("python -m accelerate.commands.accelerate_cli launch x", ["x"]),
        ("python /lib/accelerate/commands/launch.py x", ["x"]),
        ("python /bin/accelerate config", None),
        ("bash -c launch", None),
    ],
)
def test_accelerate_is_known_however_it_is_spelt(line: str, found: list[str] | None) -> None:
    assert accelerated._after_launch(line.split()) == found


def test_alone_there_is_nothing_to_agree_on() -> None:
    assert collective.gathered("x") == ["x"]
    assert collective.from_main(lambda: 7) == 7
    assert collective.together([1, 2, 3], lambda some: [2 * n for n in some]) == [2, 4, 6]
    assert (collective.total(5), collective.anyone(False), collective.rank(), collective.count()) == (5, False, 0, 1)


LOSES = """
import os, sys
from unlearn import collective, distributed
from unlearn.errors import UnlearnError
distributed.join()
if sys.argv[1] == "dies" and collective.rank() == 1:
    os._exit(0)
try:
    if sys.argv[1] == "dies":
        collective.wait()
    with collective.all_there():
        raise RuntimeError("NCCL error: 5, invalid usage\\nException raised from somewhere in the sources")
except UnlearnError as e:
    open(f"said{collective.rank()}.txt", "w").write(str(e))
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("what", "shows"), [("dies", "[Cc]onnection closed|reset"), ("other", "error: 5, invalid usage$")]
)
def test_of_a_process_that_is_gone_the_library_s_own_words_are_kept(tmp_path: Path, what: str, shows: str) -> None:
    (tmp_path / "loses.py").write_text(LOSES)
    started([*launch.command(2), "loses", what], tmp_path, PYTHONPATH=str(tmp_path))
    said = (tmp_path / "said0.txt").read_text()
    assert said.startswith("another process has ended early, or cannot be reached. ")
    assert re.search(shows, said)
    assert "\n" not in said


# --- training --------------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_row": {"batch_size": 1, "accumulation": 2},
    "penalty-one": {"kind": "penalty-one", "batch_size": 2, "accumulation": 2},
    "penalty-two": {"kind": "penalty-two"},
    "gradient_ascent": {"kind": "gradient_ascent", "steps": 4},
    "gradient_difference": {"kind": "gradient_difference", "steps": 4},
    "npo": {"kind": "npo", "batch_size": 2, "accumulation": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "plain_again": {},
    "dropout": {"dropout": 0.2, "save_every": 100},
}


def trained(
    line: Sequence[str], folder: Path, model: Path, cases: Mapping[str, Any], code: int = 0, happens: Any = None
) -> subprocess.CompletedProcess[str]:
    """Let processes train."""
    asked = {"out": str(folder), "model": str(model), "cases": cases, "happens": happens}
    return started([*line, "processes_arena", json.dumps(asked)], folder, code)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, pico_phi: Path) -> Path:
    """What two processes have trained."""
    folder = tmp_path_factory.mktemp("two")
    trained(launch.command(2), folder, pico_phi, {**CASES, "weights": {"kind": "weights", "learning_rate": 1e-3}})
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


def test_two_machines_train_what_two_processes_train(two: Path, tmp_path: Path, pico_phi: Path) -> None:
    """Each with its own launcher; here both are one machine."""
    asked = json.dumps({"out": str(tmp_path), "model": str(pico_phi), "cases": {"plain": CASES["plain"]}})
    port = launch._free_port()
    lines = [[*launch.command(1, 2, node, port=port), "processes_arena", asked] for node in (0, 1)]
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


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_weights_are_not_spread_over_processes(name: str, tmp_path: Path, pico_phi: Path) -> None:
    asked = json.dumps({"out": str(tmp_path), "model": str(pico_phi), "cases": {"plain": {}}})
    line = [sys.executable, "-m", "processes_arena", asked]
    done = started(line, tmp_path, code=2, **{f"ACCELERATE_USE_{name}": "true"})
    assert done.stderr.startswith(f"error: every process holds the whole model: start without --use_{name.lower()}")
    assert not (tmp_path / "plain").exists()


# --- stops and failures ----------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_after_one_step(two: Path, tmp_path: Path, pico_phi: Path) -> None:
    """And what goes on from there ends as if it had not been stopped, bit for bit."""
    line, case = launch.command(2), {"dropout": CASES["dropout"]}
    done = trained(line, tmp_path, pico_phi, case, code=130, happens=[4, "signal"])
    assert "stopped after step 5 of 7" in done.stderr
    work = tmp_path / "dropout" / "work"
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-5"]
    files = json.loads((work / "checkpoint-5" / WHOLE).read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "adapter_model.safetensors"} <= set(files)
    trained(line, tmp_path, pico_phi, case)
    assert told(tmp_path, "dropout")["digests"] == told(two, "dropout")["digests"]
    assert told(tmp_path, "dropout")["losses"] == told(two, "dropout")["losses"]


def test_one_without_memory_is_heard_and_nobody_waits(tmp_path: Path, pico_phi: Path) -> None:
    done = trained(launch.command(2), tmp_path, pico_phi, {"x": {}}, code=2, happens=[2, "memory"])
    assert "error in process 1: vectors/forget: out of memory (DefaultCPUAllocator: can't alloc" in done.stderr
    assert "lower vector.forget.batch_size (and raise" in done.stderr


# --- a whole run -----------------------------------------------------------------------------------------------------


def values(report: RunReport) -> list[float | None]:
    """Every number of the report that the processes have computed."""
    found: list[float | None] = []
    for row in report.scores:
        found += [row.before.value, row.after.value, row.before.stderr, row.after.stderr]
    for point in report.sweep:
        found += [score.score.value for score in point.scores]
    return found


def test_accelerate_on_cpus_gives_the_report_of_one_process(tmp_path: Path) -> None:
    """accelerate itself starts one process there, whatever it is asked for."""
    line = ["--recipe", "pico_smoke.yaml", "--out"]
    done = started(
        ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "unlearn.run", *line, "two"],
        tmp_path,
        UNLEARN_CACHE=os.environ["UNLEARN_CACHE"],
    )
    assert done.stderr.count("2 processes share training and scoring") == 1
    assert run.main([*line, str(tmp_path / "one")]) == 0
    one, two = (RunReport.from_json(json.loads((tmp_path / n / "report.json").read_text())) for n in ("one", "two"))
    assert two.chosen == one.chosen
    assert values(two) == pytest.approx(values(one), rel=1e-4, abs=1e-4)
    assert [(t["steps"], t["examples"]) for t in two.training] == [(t["steps"], t["examples"]) for t in one.training]
    assert two.examples == one.examples


def test_a_run_that_is_stopped_goes_on(tmp_path: Path) -> None:
    """SIGTERM to the launcher in the middle of a training, as a batch system ends a job."""
    line = [*launch.command(2), "unlearn.run", "--recipe", "pico_smoke.yaml", "--out", "run", "--set"]
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
                until(lambda: any(work.glob(f"*forget*/*/{WHOLE}")) or process.poll() is not None)
                process.terminate()
        assert process.wait(timeout=SECONDS) == 130, said
    assert "Traceback" not in said
    stopped = re.search(r"forget set: stopped after step (\d+) of 200", said)
    assert stopped is not None
    left = [p.name for p in work.glob("*forget*/checkpoint-*")]
    assert f"checkpoint-{stopped[1]}" in left
    started(line, tmp_path, **more)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["training"][1]["steps"] == 200
