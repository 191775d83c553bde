"""Two machines and a disk that both see: one run shared out, one run wanted by both, and one machine that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import Machine, Machines, why_not
from waiting import until

from unlearn import cli
from unlearn.results import RunReport
from unlearn.store.lock import is_lock_file
from unlearn.store.stages import LOCK, STAGE_FILE

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

SECONDS = 300
SMALL = ("--set", "teach.steps=20", "--set", "sweep.coefficients=[1]", "--set", "vector.method=negate")
LONG = (*SMALL, "--set", "vector.forget={steps: 120, batch_size: 12, learning_rate: 0.0001, save_every: 30}")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    with Machines(tmp_path_factory.mktemp("pair") / "machines") as two:
        yield two


def started(on: Machine, disk: Path, module: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """A command whose cache is on the disk."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_"))}
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "UNLEARN_CACHE": str(disk / "cache"), **more}
    return on.start(sys.executable, "-m", module, *arguments, env={**inherited, **own})


def pico(on: Machine, disk: Path, name: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    line = ("--recipe", "pico_smoke.yaml", "--out", str(disk / name), *arguments)
    return started(on, disk, "unlearn.run", *line, **more)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=SECONDS)[0]
    return process.returncode, said


def report(folder: Path) -> RunReport:
    return RunReport.from_json(json.loads((folder / "report.json").read_text()))


def same_as_alone(folder: Path, tmp_path: Path) -> bool:
    """Whether the run says what one on this machine says; no lock is left in it."""
    assert not [p for p in folder.iterdir() if is_lock_file(p.name, LOCK)]
    assert cli.main(["--recipe", "pico_smoke.yaml", "--out", str(tmp_path / "alone"), *LONG]) == 0
    one, two = report(folder), report(tmp_path / "alone")
    return (one.chosen, one.scores, one.sweep, one.vector) == (two.chosen, two.scores, two.sweep, two.vector)


@pytest.mark.slow  # two processes share one in tests/train, two machines a job in tests/slurm
def test_two_machines_share_a_run(pair: Machines, tmp_path: Path) -> None:
    line = ("--nnodes=2", "--nproc-per-node=1", "--master-addr=node1", "--master-port=29500")
    does = ("-m", "unlearn.run", "--recipe", "pico_smoke.yaml", "--out", str(pair.disk / "shared"), *SMALL)
    both = [
        started(one, pair.disk, "torch.distributed.run", *line, f"--node-rank={rank}", *does)
        for rank, one in enumerate(pair.all)
    ]
    (code, said), (other, told) = (ended(process) for process in both)
    assert (code, other) == (0, 0), said + told
    assert said.count("2 processes share training and scoring") == 1
    assert cli.main(["--recipe", "pico_smoke.yaml", "--out", str(tmp_path / "alone"), *SMALL]) == 0
    alone, shared = report(tmp_path / "alone"), report(pair.stored / "shared")
    assert shared.chosen == alone.chosen
    assert [row.after.value for row in shared.scores] == pytest.approx(
        [row.after.value for row in alone.scores], rel=1e-4, abs=1e-4
    )
    assert [t["steps"] for t in shared.training] == [t["steps"] for t in alone.training]


@pytest.mark.slow  # on one machine it is shown by others
def test_one_run_wanted_by_both_is_made_once(pair: Machines, tmp_path: Path) -> None:
    place = pair.stored / "wanted"
    first = pico(pair.all[0], pair.disk, "wanted", *LONG)
    until(lambda: list(place.glob(f".unlearn-work/*forget*/*/{STAGE_FILE}")) or first.poll() is not None)
    more = [pico(one, pair.disk, "wanted", *LONG) for one in pair.all]
    for process in more:
        code, said = ended(process)
        # the first may be through before they have made sure that it lives
        assert code == 0 or (code == 2 and "wanted is in use by process" in said), said
    code, said = ended(first)
    assert code == 0, said
    assert same_as_alone(place, tmp_path)


@pytest.mark.slow
def test_a_grid_of_one_machine_is_seen_from_the_other(pair: Machines) -> None:
    grid = ("submit", "pico_smoke.yaml", "--grid", "seed=0", *SMALL, "--local", "--out", str(pair.disk / "grid"))
    runner = started(pair.all[0], pair.disk, "unlearn", *grid)
    until(lambda: list((pair.stored / "grid" / "state").glob("0000*.json")) or runner.poll() is not None)
    code, said = ended(started(pair.all[1], pair.disk, "unlearn", *grid))
    assert code == 0, said
    assert "nothing to submit; " in said
    code, said = ended(started(pair.all[1], pair.disk, "unlearn", "status", str(pair.disk / "grid"), "--json"))
    assert code == 0, said
    assert {row["state"] for row in json.loads(said)["jobs"]} <= {"running", "queued", "done"}
    assert ended(runner)[0] == 0
    code, said = ended(started(pair.all[1], pair.disk, "unlearn", "compare", str(pair.disk / "grid")))
    assert code == 0, said
    assert len((pair.stored / "grid" / "compare.csv").read_text().splitlines()) == 2


def test_when_a_machine_dies_the_other_goes_on_from_there(tmp_path: Path) -> None:
    with Machines(tmp_path / "machines") as two:
        place = two.stored / "run"
        first = pico(two.all[0], two.disk, "run", *LONG, UNLEARN_LOCK_TIMEOUT="8")
        until(lambda: list(place.glob(f".unlearn-work/*forget*/*/{STAGE_FILE}")) or first.poll() is not None)
        two.all[0].crash()
        assert ended(first)[0] != 0
        assert not (place / "report.json").exists()
        code, said = ended(pico(two.all[1], two.disk, "run", *LONG, UNLEARN_LOCK_TIMEOUT="8"))
        assert code == 0, said
        assert "on host node1, which has given no sign of life for" in said
        assert "target: as before" in said
        assert same_as_alone(place, tmp_path)
