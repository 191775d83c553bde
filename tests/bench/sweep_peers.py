"""A whole sweep over coefficients: ours against merging, saving, loading and scoring once per coefficient.

    python tests/bench/sweep_peers.py [RECIPE] [--run runs/quickstart-...] [--coefficients 8] [--measure 2]
                                      [--batch-size 8] [--mergekit PYTHON] [--json FILE]

Three roads to the scores of the recipe's validation items (quickstart by default) at each coefficient:

    ours       one process: one model, requests built once, the vector put on the weights and scored through PackedLM
    mergekit   for each: mergekit's task_arithmetic (base, and base + vector with weight -coefficient), saved;
               then ``lm_eval --model hf`` on what was saved
    merged     the same, merged and saved by this package instead of mergekit

mergekit comes with ``pip install -e '.[bench]'``, or lies in another environment, whose python ``--mergekit`` names.
The vector is the run's (``--run``), or without one a random vector of rank 16 and little norm: time does not depend on
its values. The coefficients are evenly spaced up to 4. The fine-tuned checkpoint that mergekit starts from is
saved beforehand and not counted. The two slow roads are measured at ``--measure`` of the coefficients and scaled to
all of them, which the table says; ours is always measured whole, from the start of its process to its end.

Printed: seconds and peak memory of each road; whether all give the same scores (log-likelihoods item by item, metrics
set by set); seconds to put a vector on and take it off against that coefficient's scoring time (goal: < 1 %); memory
of an edit. Exit code 1 when scores differ by more than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import QUICKSTART, REPOSITORY, command_line, console, write_json
from sweep_table import TOLERANCE, Ran, Road, agreement, show, to_json

from unlearn.errors import UnlearnError

# This process stays small on purpose: Linux counts a parent's memory into its child's peak until the child has
# replaced itself by another program.

LARGEST = 4.0  # the largest coefficient
PARTS = Path(__file__).with_name("sweeping.py")
TASKS = {"mcq": ("unlearn_mcq",), "qa": ("unlearn_qa",), "text": ("unlearn_text", "unlearn_text_memory")}


def main() -> None:
    """Prepare, walk each road, compare, print."""
    options = _options()
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        failed = _compare(options, options.work.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            failed = _compare(options, Path(folder))
    sys.exit(1 if failed else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipe", nargs="?", default=str(QUICKSTART), help="whose model and items (default: quickstart)"
    )
    parser.add_argument("--model", help="another model: a folder, or what a recipe's model.path may be")
    parser.add_argument("--run", type=Path, help="a finished run's folder: its vector is used")
    parser.add_argument("--coefficients", type=int, default=8, help="how many coefficients the sweep has")
    parser.add_argument("--measure", type=int, default=2, help="at how many of them the slow roads are measured")
    parser.add_argument("--batch-size", type=int, default=8, help="of lm-eval's model")
    parser.add_argument("--threads", type=int, help="CPU threads of every process (default: torch's choice)")
    parser.add_argument("--dtype", default="float32", help="of model, merges and scoring")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    parser.add_argument("--mergekit", default=sys.executable, metavar="PYTHON", help="a python that has mergekit")
    parser.add_argument("--work", type=Path, help="keep everything here (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def _compare(options: argparse.Namespace, work: Path) -> bool:
    """Everything; True if the roads disagree."""
    vector, model = _vector(options)
    if _run([options.mergekit, "-c", "import mergekit"], work, check=False) is None:
        raise UnlearnError(
            f"{Path(options.mergekit).name} has no mergekit: pip install -e '.[bench]', or give --mergekit PYTHON, the "
            "python of an environment that has it"
        )
    grid = [LARGEST * (i + 1) / options.coefficients for i in range(options.coefficients)]
    plan = {
        "model": model,
        "recipe": str(Path(options.recipe).resolve()) if Path(options.recipe).exists() else options.recipe,
        "vector": vector,
        "work": str(work),
        "coefficients": grid,
        "threads": options.threads,
        "dtype": options.dtype,
        "device": options.device,
    }
    (work / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    facts = json.loads(_part("prepare", work, options).output.splitlines()[-1])
    plan["model"] = facts["model"]
    (work / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    console.print("ours: the whole sweep")
    ran = _part("ours", work, options)
    ours = json.loads(ran.output.splitlines()[-1])
    step = max(1, len(grid) // max(1, options.measure))
    measured = grid[step - 1 :: step][: options.measure]
    roads = [Road("mergekit + lm_eval"), Road("merged by us + lm_eval")]
    for coefficient in measured:  # in turn, so that both meet the same machine
        for road in roads:
            console.print(f"{road.name}: coefficient {coefficient:g}")
            _walk(road, coefficient, plan, facts, options)
    agreements = {road.name: agreement(road, ours["points"], facts["tasks"]) for road in roads}
    show(ran, ours, roads, agreements, facts, options)
    write_json(options.json, to_json(ran, ours, roads, agreements, facts, options))
    return any(largest > TOLERANCE for found in agreements.values() for largest in found.values())


def _vector(options: argparse.Namespace) -> tuple[str | None, str | None]:
    """The vector's file, if a run is given, and its model, if it is another than the recipe's."""
    if options.run is None:
        return None, options.model
    vector = options.run / "vectors" / "edit" / "vector.safetensors"
    if not vector.is_file():
        raise UnlearnError(f"{options.run}: no {vector.relative_to(options.run)} there; give a finished run's folder")
    taught = options.run / "target"  # the recipe taught the model first
    return str(vector.resolve()), str(taught.resolve()) if taught.is_dir() else options.model


# -- the slow roads ----------------------------------------------------------------------------------------------------


def _walk(
    road: Road, coefficient: float, plan: Mapping[str, Any], facts: Mapping[str, Any], options: argparse.Namespace
) -> None:
    """Merge and save, then let lm-eval's command line load and score."""
    work = Path(plan["work"])
    merged, out = work / "merged", work / "lm_eval"
    for folder in (merged, out):
        shutil.rmtree(folder, ignore_errors=True)
    if road.name.startswith("mergekit"):
        road.merging.append(_mergekit(coefficient, merged, plan, options))
    else:
        road.merging.append(_part("merge", work, options, f"{coefficient}"))
    items = json.dumps({"items": {kind: str(work / f"{kind}.jsonl") for kind in facts["tasks"]}})
    tasks = [task for kind in facts["tasks"] for task in TASKS[kind]]
    arguments = f"pretrained={merged},dtype={facts['dtype']}"
    if "text" in facts["tasks"]:
        # else lm-eval 0.4.13 takes a passage's last token and the passage as a whole for one request, and scores the
        # former by the logits at the latter's first token
        arguments += ",logits_cache=False"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
    command += ["--device", facts["device"]]
    command += ["--include_path", str(REPOSITORY / "eval"), "--tasks", ",".join(tasks), "--metadata", items]
    command += ["--batch_size", str(options.batch_size), "--output_path", str(out), "--log_samples"]
    road.scoring.append(_must(command, work, options))
    found: dict[str, list[Any]] = {}
    for task in tasks:
        (path,) = out.rglob(f"samples_{task}_2*.jsonl")
        found[task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    road.items[coefficient] = found


def _mergekit(coefficient: float, merged: Path, plan: Mapping[str, Any], options: argparse.Namespace) -> Ran:
    work = Path(plan["work"])
    config = {
        "merge_method": "task_arithmetic",
        "base_model": plan["model"],
        "models": [{"model": str(work / "finetuned"), "parameters": {"weight": -coefficient}}],
        "parameters": {"normalize": False},
        "dtype": plan["dtype"],
    }
    path = work / "mergekit.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [options.mergekit, "-m", "mergekit.scripts.run_yaml", str(path), str(merged), "--quiet"]
    return _must(command, work, options)


def _part(part: str, work: Path, options: argparse.Namespace, *more: str) -> Ran:
    return _must([sys.executable, str(PARTS), part, str(work / "plan.json"), *more], work, options)


def _must(command: Sequence[str], work: Path, options: argparse.Namespace) -> Ran:
    done = _run(command, work, options.threads)
    assert done is not None  # check=True raises instead
    return done


def _run(command: Sequence[str], work: Path, threads: int | None = None, check: bool = True) -> Ran | None:
    """Run a program to its end; None if it failed and ``check`` is off.

    Raises:
        UnlearnError: it failed; with the end of what it said.
    """
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # everything is here already
    settings = {**os.environ, **quiet, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    log = work / "log.txt"
    with log.open("w+", encoding="utf-8") as said, (work / "out.txt").open("w+", encoding="utf-8") as out:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=settings, stdout=out, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)  # this child's own peak, which subprocess does not tell
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        output = out.read()
    if process.returncode == 0:
        return Ran(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output)
    if not check:
        return None
    tail = (output + log.read_text(encoding="utf-8"))[-2000:]
    raise UnlearnError(f"{' '.join(command[:6])} ... ended with code {process.returncode}:\n{tail}")


if __name__ == "__main__":
    command_line(main)
