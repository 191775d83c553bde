"""An estimate beside what was measured, stage by stage.

    python tests/bench/estimate.py measure NAME --recipe R [--set KEY=VALUE]...    # runs it on one core, takes minutes
    python tests/bench/estimate.py show                                            # every run in results/estimate.json
    python tests/bench/estimate.py plan                                            # README's table for 7, 70 and 405 B

A run is measured by its process: pages it holds (its own and of mapped files) and the processor time it uses, which
is what one core takes when nobody else wants it; the clock is shown as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from stage_watch import watch

from unlearn.estimates.estimate import Estimate, estimate
from unlearn.estimates.machine import MACHINES
from unlearn.estimates.options import Options
from unlearn.estimates.text import size, span
from unlearn.recipe_io import load_recipe

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "estimate.json"
SHAPES = ("llama-2-7b", "llama-3-70b", "llama-3.1-405b")


def measure(name: str, recipe: str, overrides: list[str]) -> None:
    """Run a recipe on one core and keep what its stages took, beside what is estimated for it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "unlearn.run", "--recipe", recipe, "--out", f"{folder}/run"]
        command += [word for one in overrides for word in ("--set", one)]
        stages = watch(["nice", "-n", "19", *command], Path(folder) / "log", {"OMP_NUM_THREADS": "1"})
        chosen = json.loads(Path(folder, "run", "report.json").read_text(encoding="utf-8"))["chosen"]["coefficient"]
    keep(name, recipe, overrides, stages, chosen > 0)


def keep(name: str, recipe: str, overrides: list[str], stages: list[dict[str, Any]], chosen: bool) -> None:
    """Put a measured run beside the others, with the estimate of today.

    Args:
        chosen: A coefficient passed the rule. If none did, test items were scored once and nothing was exported.
    """
    found = estimate(load_recipe(recipe, overrides), Options(MACHINES["cpu1"]))
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    known[name] = {
        "recipe": Path(recipe).name,
        "measured": stages,
        "estimated": [
            {
                "stage": s.name,
                "memory": s.peak,
                "seconds": s.work.seconds / (2 if s.name == "test" and not chosen else 1),
                "operations": s.work.operations,
            }
            for s in found.stages
            if chosen or s.name != "export"
        ],
    }
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def show() -> None:
    """Every measured run beside its estimate."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    print("| run, stage | memory, estimated | measured | ratio | time, estimated | processor | ratio | clock |")
    print("|---|---|---|---|---|---|---|---|")
    for name, run in known.items():
        estimated = {one["stage"]: one for one in run["estimated"]}
        start = next(one for one in run["measured"] if one["stage"] == "start")
        for one in run["measured"]:
            guess = estimated.get(one["stage"])
            if guess is None:
                continue
            cpu, clock = one["cpu_seconds"], one["seconds"]
            if one["stage"] == "load":  # the imports before it count as its
                cpu, clock = cpu + start["cpu_seconds"], clock + start["seconds"]
            print(
                f"| {name}, {one['stage']} | {size(guess['memory'])} | {size(one['both'])} | "
                f"{guess['memory'] / one['both']:.2f} | {span(guess['seconds'])} | {span(cpu)} | "
                f"{guess['seconds'] / cpu:.2f} | {span(clock)} |"
            )


def planned(shape: str) -> Estimate:
    """The plan's recipe for one shape on an H100."""
    recipe = load_recipe(str(HERE / "shapes" / "plan.yaml"))
    return estimate(recipe, Options(MACHINES["h100-80"], HERE / "shapes" / f"{shape}.json"))


def plan() -> None:
    """README's tables."""
    found = {shape: planned(shape) for shape in SHAPES}
    print("| " + " | ".join(["", *(f"{shape}: memory, GPUs, time" for shape in SHAPES)]) + " |")
    print("|---" * (len(SHAPES) + 1) + "|")
    for at, stage in enumerate(next(iter(found.values())).stages):
        cells = [e.stages[at] for e in found.values()]
        row = [
            f"{size(s.peak)}, {e.devices(s.peak)}, {span(s.work.seconds)}"
            for s, e in zip(cells, found.values(), strict=True)
        ]
        print("| " + " | ".join([stage.name, *row]) + " |")
    for title, cells in (
        ("disk", [size(e.disk) for e in found.values()]),
        ("whole run", [span(e.seconds) for e in found.values()]),
        ("`unlearn.apply`", [f"{span(e.applying.seconds)}, {size(e.applying.held)}" for e in found.values()]),
    ):
        print("| " + " | ".join([title, *cells]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("name")
    measuring.add_argument("--recipe", required=True)
    measuring.add_argument("--set", action="append", default=[])
    measuring.add_argument("--stages", type=Path, help="what stage_watch.py printed of an earlier run, instead of one")
    measuring.add_argument("--none-chosen", action="store_true", help="with --stages: no coefficient passed the rule")
    commands.add_parser("show")
    commands.add_parser("plan")
    arguments = parser.parse_args()
    if arguments.command == "measure" and arguments.stages is not None:
        stages = json.loads(arguments.stages.read_text(encoding="utf-8"))
        keep(arguments.name, arguments.recipe, arguments.set, stages, not arguments.none_chosen)
    elif arguments.command == "measure":
        measure(arguments.name, arguments.recipe, arguments.set)
    elif arguments.command == "show":
        show()
    else:
        plan()


if __name__ == "__main__":
    main()
