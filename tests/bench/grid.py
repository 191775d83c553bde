"""What a grid of 10, 100 and 1,000 jobs costs beside its jobs: planning, status, the merged report, and locks.

    python tests/bench/grid.py [--sizes 10,100,1000] [--out tests/bench/results/grid.json]

The jobs are stubs. One pico recipe is really run, and its report is written for every job with scores varied by seeded
noise (:mod:`grid_stub`); a stub job's folder has that report and its seal, and none of the stages. The grid itself is
planned by the program. Every command is a process of its own: its seconds include Python's start, and its memory is the
kernel's largest resident set of that process. Seconds on a shared machine say little; processor seconds say more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grid_stub import stub
from measure import command_line, console, environment, write_json
from rich.table import Table

from unlearn.cluster.grid import Grid
from unlearn.errors import UnlearnError

RECIPE = "pico_smoke.yaml"
LAMBDAS = (0.5, 1, 1.5, 2, 3, 4, 6, 8)
SEEDS = 5
FAILED = 37  # one job in so many has failed
PROCESSES = 8  # that contend for a lock
# A small process between this one and the command: what a process had in memory when it made another counts for that
# other one as well (getrusage(2) keeps the mark across exec), and this one has more than the commands.
_LAUNCHER = """
import json, os, subprocess, sys, time
began = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
seconds = time.perf_counter() - began
print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss, child.returncode]))
"""
COMMANDS = ("dry run", "status", "status --json", "merged report")


@dataclass(frozen=True)
class Cost:
    """Of one process: seconds on the clock, seconds of processor, largest resident set in bytes."""

    seconds: float
    processor: float
    memory: int


def main() -> None:
    """Measure every size, print one table and keep the result."""
    parser = argparse.ArgumentParser(description="What a grid costs beside its jobs.")
    parser.add_argument("--sizes", default="10,100,1000", help="jobs per grid, multiples of 10")
    parser.add_argument("--repeat", type=int, default=3, help="times each command is run; the middle one counts")
    parser.add_argument("--takes", type=int, default=50, help="times each process takes the lock")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the result as JSON")
    given = parser.parse_args()
    sizes = [int(size) for size in given.sizes.split(",")]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        report = _real_report(Path(scratch))
        for size in sizes:
            found.append(_measure(Path(scratch) / str(size), size, report, given.repeat))
            console.print(f"{size} jobs: done")
        locks = contend(Path(scratch) / "locks", given.takes)
    show(found, locks)
    write_json(given.out, {"sizes": found, "locks": locks, "environment": environment()})


def _real_report(scratch: Path) -> dict[str, Any]:
    """The report of one real run, by the program itself."""
    out = scratch / "real"
    flags = ["--recipe", RECIPE, "--out", str(out), "--set", f"sweep.coefficients={list(LAMBDAS)}"]
    run(["unlearn.run", *flags])
    found: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return found


def flags_of(size: int) -> list[str]:
    """``--grid`` flags of so many jobs: seeds times ranks times learning rates."""
    settings = size // SEEDS
    ranks = min(settings, 10)
    rates = settings // ranks
    axes = (
        ("seed", range(SEEDS)),
        ("vector.lora.rank", range(2, 2 + ranks)),
        ("vector.forget.learning_rate", [round(0.002 + 0.0005 * i, 5) for i in range(rates)]),
    )
    return [f"{key}={','.join(str(v) for v in values)}" for key, values in axes]


def _measure(root: Path, size: int, report: dict[str, Any], repeat: int) -> dict[str, Any]:
    from unlearn.cluster.plan import plan_grid

    grids, sets = flags_of(size), [f"sweep.coefficients={list(LAMBDAS)}"]
    began = time.perf_counter()
    grid = plan_grid([RECIPE], grids, sets)
    planning = time.perf_counter() - began
    if len(grid.jobs) != size:
        raise UnlearnError(f"{size} jobs cannot be made of {SEEDS} seeds, whole ranks and whole rates")
    lost = [job.index for job in grid.jobs if job.index % FAILED == FAILED - 1]
    stub(root, grid, report, LAMBDAS, lost)
    given = [f"--grid={flag}" for flag in grids] + [f"--set={flag}" for flag in sets]
    commands = {
        "dry run": ["unlearn.cluster.command", "--recipe", RECIPE, *given, "--dry-run"],
        "status": ["unlearn.cluster.command", "--status", str(root)],
        "status --json": ["unlearn.cluster.command", "--status", str(root), "--json"],
        "merged report": ["unlearn.cluster.report", str(root)],
    }
    stubbed = _files(root)
    costs = {name: _middle([run(command) for _ in range(repeat)]) for name, command in commands.items()}
    _check(root, grid, len(lost))
    made = {p.name: p.stat().st_size for p in root.iterdir() if p.is_file()}
    return {
        "jobs": size,
        "settings": size // SEEDS,
        "failed": len(lost),
        "plan_seconds": planning,
        **{name: asdict(cost) for name, cost in costs.items()},
        "stub_files": stubbed,
        "files": made,
    }


def _check(root: Path, grid: Grid, failed: int) -> None:
    """The merged report holds what was written for it."""
    merged = json.loads((root / "report.json").read_text(encoding="utf-8"))["jobs"]
    if merged != {"planned": len(grid.jobs), "finished": len(grid.jobs) - failed, "set_aside": 0, "missing": failed}:
        raise UnlearnError(f"the merged report of {len(grid.jobs)} jobs, {failed} failed, says {merged}")


def run(command: Sequence[str]) -> Cost:
    """Run a module as a process of its own.

    Raises:
        UnlearnError: it failed.
    """
    with tempfile.TemporaryFile() as said:
        launched = [sys.executable, "-S", "-E", "-c", _LAUNCHER, sys.executable, "-m", *command]
        done = subprocess.run(launched, stdout=subprocess.PIPE, stderr=said, check=True)
        seconds, processor, kibibytes, code = json.loads(done.stdout)
        if code:
            said.seek(0)
            words = said.read().decode(errors="replace")[-500:]
            raise UnlearnError(f"{' '.join(command[:2])} ended with code {code}: {words}")
    return Cost(seconds, processor, kibibytes * 1024)


def _middle(costs: Sequence[Cost]) -> Cost:
    return Cost(
        statistics.median(c.seconds for c in costs),
        statistics.median(c.processor for c in costs),
        max(c.memory for c in costs),
    )


def _files(root: Path) -> dict[str, int]:
    sizes = [p.stat().st_size for p in root.rglob("*") if p.is_file()]
    return {"count": len(sizes), "bytes": sum(sizes)}


# -- locks -------------------------------------------------------------------------------------------------------------


def contend(folder: Path, takes: int) -> dict[str, Any]:
    """Many processes take one lock many times, counting in a file that two at once would miscount."""
    folder.mkdir()
    (folder / "count").write_text("0", encoding="ascii")
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    with context.Pool(PROCESSES) as pool:
        waits = [w for found in pool.starmap(_take, [(str(folder), takes)] * PROCESSES, chunksize=1) for w in found]
    seconds = time.perf_counter() - began
    counted, wanted = int((folder / "count").read_text(encoding="ascii")), PROCESSES * takes
    if counted != wanted:
        raise UnlearnError(f"the lock let two in at once: {counted} counted, {wanted} taken")
    left = [p.name for p in folder.iterdir() if p.name != "count"]
    return {
        "processes": PROCESSES,
        "takes": wanted,
        "seconds": seconds,
        "wait_median": statistics.median(waits),
        "wait_longest": max(waits),
        "files_left": len(left),
        "alone": statistics.median(_take(str(folder), 20)),
    }


def _take(folder: str, takes: int) -> list[float]:
    """Take and release; the seconds that each take took."""
    from unlearn.store.lock import Lock

    place, counter, waits = Path(folder) / ".lock", Path(folder) / "count", []
    for _ in range(takes):
        began = time.perf_counter()
        lock = Lock.take(place, wait=None)
        waits.append(time.perf_counter() - began)
        counter.write_text(str(int(counter.read_text(encoding="ascii")) + 1), encoding="ascii")
        lock.release()
    return waits


# -- the table ---------------------------------------------------------------------------------------------------------


def show(found: Sequence[dict[str, Any]], locks: dict[str, Any]) -> None:
    """Print one table, a column per size."""
    table = Table(title="stub jobs: one real pico report, varied; seconds (of processor), largest memory")
    table.add_column("")
    for size in found:
        table.add_column(f"{size['jobs']} jobs", justify="right")
    table.add_row("settings x seeds", *(f"{s['settings']} x {SEEDS}, {s['failed']} failed" for s in found))
    table.add_row("plan (in process)", *(f"{s['plan_seconds']:.2f} s" for s in found))
    for name in COMMANDS:
        table.add_row(name, *(_cost(s[name]) for s in found))
    table.add_row(
        "stub files", *(f"{s['stub_files']['count']}, {s['stub_files']['bytes'] / 1e6:.1f} MB" for s in found)
    )
    for name in ("grid.json", "report.html", "report.json", "jobs.csv", "frontier.csv"):
        table.add_row(name, *(f"{s['files'][name] / 1e6:.3f} MB" for s in found))
    console.print(table)
    console.print(
        f"locks: {locks['processes']} processes took one lock {locks['takes']} times in {locks['seconds']:.1f} s "
        f"(their start included), never two at once; waited {1e3 * locks['wait_median']:.1f} ms (median), "
        f"{locks['wait_longest']:.2f} s (longest); a free lock: {1e3 * locks['alone']:.1f} ms; "
        f"files left: {locks['files_left']}"
    )


def _cost(cost: dict[str, Any]) -> str:
    return f"{cost['seconds']:.2f} ({cost['processor']:.2f}) s, {cost['memory'] / 1e6:.0f} MB"


if __name__ == "__main__":
    command_line(main)
