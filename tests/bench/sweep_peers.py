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

What loads a model runs as a process of its own (``--part prepare|ours|merge``), so that peaks are not mixed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import (
    QUICKSTART,
    REPOSITORY,
    command_line,
    console,
    environment,
    find_model,
    load_model,
    resident,
    write_json,
)
from rich.table import Table

from unlearn.errors import EvaluationError, UnlearnError

# No torch at import: Linux counts a parent's memory into its child's peak until the child has replaced itself by
# another program.
if TYPE_CHECKING:
    from unlearn.data.sets import LoadedSet
    from unlearn.model.load import Loaded
    from unlearn.score.evaluate import EvalResult
    from unlearn.score.packed import PackedLM
    from unlearn.score.tasks import TaskSet
    from unlearn.vector.edit import Edit
    from unlearn.vector.task_vector import TaskVector

LARGEST = 4.0  # the largest coefficient
GOAL = 6.0
TOLERANCE = 1e-3
RANK, RELATIVE_NORM = 16, 0.01  # of a made-up vector: LoRA's usual rank, and a change of 1 % of each weight
TASKS = {"mcq": ("unlearn_mcq",), "qa": ("unlearn_qa",), "text": ("unlearn_text", "unlearn_text_memory")}
COLUMNS = ("merge s", "score s", "whole sweep s", "times ours", "peak MB", "max |Δ| log-lik.", "max |Δ| metric")


def main() -> None:
    """Prepare, walk each road, compare, print; or be one of the processes that load a model."""
    options = _options()
    if options.part:
        print(json.dumps(_part(options)))
        return
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
    parser.add_argument("--part", choices=("prepare", "ours", "merge"), help=argparse.SUPPRESS)
    parser.add_argument("--vector", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--coefficient", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _compare(options: argparse.Namespace, work: Path) -> bool:
    """Everything; True if the roads disagree."""
    if options.run is not None:
        options.vector = options.run / "vectors" / "edit" / "vector.safetensors"
        if not options.vector.is_file():
            raise UnlearnError(f"{options.run}: no vectors/edit/vector.safetensors there; give a finished run's folder")
        taught = options.run / "target"  # the recipe taught the model first
        options.model = str(taught.resolve()) if taught.is_dir() else options.model
    if _run([options.mergekit, "-c", "import mergekit"], work, check=False) is None:
        raise UnlearnError(
            f"{Path(options.mergekit).name} has no mergekit: pip install -e '.[bench]', or give --mergekit PYTHON, the "
            "python of an environment that has it"
        )
    options.model = find_model(options.model, options.recipe)
    facts = json.loads(_process("prepare", work, options).output.splitlines()[-1])
    console.print("ours: the whole sweep")
    ran = _process("ours", work, options)
    ours = json.loads(ran.output.splitlines()[-1])
    grid = _grid(options.coefficients)
    step = max(1, len(grid) // max(1, options.measure))
    roads = [Road("mergekit + lm_eval"), Road("merged by us + lm_eval")]
    for coefficient in grid[step - 1 :: step][: options.measure]:  # in turn, so that both meet the same machine
        for road in roads:
            console.print(f"{road.name}: coefficient {coefficient:g}")
            _walk(road, coefficient, work, facts, options)
    costs = {}
    for road in roads:
        found = _agreement(road, ours["points"], facts["tasks"])
        costs[road.name] = {**road.costs(len(grid), ran.seconds), "largest_difference": found}
    worst = max(largest for cost in costs.values() for largest in cost["largest_difference"].values())
    _show(ran, ours, costs, worst, facts, options)
    points = [{name: value for name, value in point.items() if name != "items"} for point in ours["points"]]
    whole = {name: getattr(options, name) for name in ("coefficients", "batch_size", "threads")}
    whole["ours"] = {**ours, "points": points, "seconds": ran.seconds, "peak_bytes": ran.peak}
    write_json(options.json, {**whole, "roads": costs, "facts": facts, "environment": environment()})
    return worst > TOLERANCE


def _grid(number: int) -> list[float]:
    return [LARGEST * (i + 1) / number for i in range(number)]


# -- the slow roads ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A process that has ended: seconds from start to end, most memory, what it printed."""

    seconds: float
    peak: int
    output: str


@dataclass
class Road:
    """One slow road at the measured coefficients."""

    name: str
    merging: list[Ran] = field(default_factory=list)
    scoring: list[Ran] = field(default_factory=list)
    items: dict[float, dict[str, list[Any]]] = field(default_factory=dict)

    def costs(self, coefficients: int, ours: float) -> dict[str, Any]:
        """Seconds of each process and of a whole sweep, beside ``ours``, and the most memory of all its processes."""
        merging, scoring = ([r.seconds for r in way] for way in (self.merging, self.scoring))
        whole = coefficients * (statistics.mean(merging) + statistics.mean(scoring))
        peak = max(r.peak for r in (*self.merging, *self.scoring))
        shown = {"coefficients": list(self.items), "merge_s": merging, "score_s": scoring}
        return {**shown, "whole_sweep_s": whole, "ratio": whole / ours, "peak_bytes": peak}


def _walk(road: Road, coefficient: float, work: Path, facts: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Merge and save, then let lm-eval's command line load and score."""
    merged, out = work / "merged", work / "lm_eval"
    for folder in (merged, out):
        shutil.rmtree(folder, ignore_errors=True)
    if road.name.startswith("mergekit"):
        config = {
            "merge_method": "task_arithmetic",
            "base_model": options.model,
            "models": [{"model": str(work / "finetuned"), "parameters": {"weight": -coefficient}}],
            "parameters": {"normalize": False},
            "dtype": options.dtype,
        }
        (work / "mergekit.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        command = [options.mergekit, "-m", "mergekit.scripts.run_yaml", str(work / "mergekit.yaml"), str(merged)]
        road.merging.append(_must([*command, "--quiet"], work, options))
    else:
        road.merging.append(_process("merge", work, options, "--coefficient", f"{coefficient}"))
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
    road.items[coefficient] = {}
    for task in tasks:
        (path,) = out.rglob(f"samples_{task}_2*.jsonl")
        road.items[coefficient][task] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _process(part: str, work: Path, options: argparse.Namespace, *more: str) -> Ran:
    command = [sys.executable, __file__, options.recipe, "--part", part, "--work", str(work), "--model", options.model]
    command += ["--dtype", options.dtype, "--device", options.device, "--coefficients", str(options.coefficients)]
    command += ["--threads", str(options.threads)] if options.threads else []
    command += ["--vector", str(options.vector)] if options.vector else []
    return _must([*command, *more], work, options)


def _must(command: Sequence[str], work: Path, options: argparse.Namespace) -> Ran:
    done = _run(command, work, options.threads)
    assert done is not None  # check=True raises instead
    return done


def _run(command: Sequence[str], work: Path, threads: int | None = None, check: bool = True) -> Ran | None:
    """Run a program to its end; None if it failed and ``check`` is off."""
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


# -- whether they lead to the same scores, and what each costs ---------------------------------------------------------


def _agreement(road: Road, points: Sequence[Mapping[str, Any]], tasks: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Largest difference to ours: of a log-likelihood, and of a metric's mean over a set."""
    likelihood = metric = 0.0
    by_coefficient = {point["coefficient"]: point["items"] for point in points}
    for coefficient, found in road.items.items():
        ours = by_coefficient[coefficient]
        for task, samples in _split(found, ours, tasks).items():
            theirs = [_item(sample) for sample in samples]
            for mine, other in zip(ours[task], theirs, strict=True):
                pairs = zip(mine["likelihoods"], other["likelihoods"], strict=True)
                likelihood = max(likelihood, *(abs(a - b) for a, b in pairs))
            for name in ours[task][0]["metrics"]:
                a, b = (statistics.mean(row["metrics"][name] for row in rows) for rows in (ours[task], theirs))
                metric = max(metric, abs(a - b))
    return {"log-likelihood": likelihood, "metric": metric}


def _split(
    found: Mapping[str, list[Any]], ours: Mapping[str, list[Any]], tasks: Mapping[str, Sequence[str]]
) -> dict[str, list[Any]]:
    """lm-eval's samples by our task; it was given all sets of one kind in one file, in the order of the sets."""
    parts: dict[str, list[Any]] = {}
    for task, samples in found.items():
        _, kind, *suffix = task.split("_")  # unlearn_text_memory is our forget.books.memory
        ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
        for name in (".".join([name, *suffix]) for name in tasks[kind]):
            parts[name], ordered = ordered[: len(ours[name])], ordered[len(ours[name]) :]
    return parts


def _item(sample: dict[str, Any]) -> dict[str, Any]:
    """One item of lm-eval's samples: log-likelihood of each request, and each metric that is one number."""
    likelihoods = [float(r[0] if isinstance(r, list | tuple) else r) for r in sample["filtered_resps"]]
    numbers = {m: float(sample[m]) for m in sample["metrics"] if isinstance(sample[m], int | float)}
    return {"likelihoods": likelihoods, "metrics": numbers}


def _show(
    ran: Ran,
    ours: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, Any]],
    worst: float,
    facts: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    number = options.coefficients
    table = Table("road", title=f"Scores at {number} coefficients")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    scoring = [point["score_seconds"] for point in ours["points"]]
    on = [point["set_seconds"] for point in ours["points"]]
    each = f"{statistics.median(on):.3f}", f"{statistics.median(scoring):.2f}"
    table.add_row("ours", *each, f"{ran.seconds:.1f}", "1", f"{ran.peak / 1e6:,.0f}", "-", "-")
    for name, cost in costs.items():
        cells = [f"{statistics.mean(cost[way]):.2f}" for way in ("merge_s", "score_s")]
        cells += [f"{cost['whole_sweep_s']:.1f}", f"{cost['ratio']:.2f}", f"{cost['peak_bytes'] / 1e6:,.0f}"]
        table.add_row(name, *cells, *(f"{value:.1e}" for value in cost["largest_difference"].values()))
    console.print(table)
    if (measured := len(next(iter(costs.values()))["score_s"])) < number:
        console.print(f"The slow roads were measured at {measured} of {number} coefficients and scaled to all.")
    console.print(f"Goal: mergekit + lm_eval takes ≥ {GOAL:g} times as long as ours. Batch size {options.batch_size}.")
    console.print(f"ours: {ours['load_seconds']:.2f} s until the model is loaded and the requests can be built, once")
    share = statistics.median(a / b for a, b in zip(on, scoring, strict=True))
    console.print(
        f"vector on: {statistics.median(on) * 1e3:.1f} ms, off: {ours['off_seconds'] * 1e3:.1f} ms; on takes "
        f"{share:.2%} of that coefficient's scoring time (goal: < 1 %)"
    )
    sizes = {name: f"{size / 1e6:,.1f} MB" for name, size in facts["memory"].items()}
    console.print(
        f"memory: model {sizes['model']}; an edit added {sizes['edit']} (factors {sizes['factors']}, weights they "
        f"change {sizes['touched']})"
    )
    verdict = "All roads agree" if worst <= TOLERANCE else f"THE ROADS DIFFER by {worst:.1e}"
    first, last = (  # agreement says little where nothing changes
        [value for rows in ours["points"][at]["items"].values() for row in rows for value in row["likelihoods"]]
        for at in (0, -1)
    )
    moved = max(abs(a - b) for a, b in zip(first, last, strict=True))
    console.print(f"{verdict}; from the first coefficient to the last a log-likelihood moved by {moved:.1e}")


# -- parts that load a model, each in a process of its own -------------------------------------------------------------


def _part(options: argparse.Namespace) -> dict[str, Any]:
    """``prepare``, ``ours`` or ``merge``, with its vector and its model."""
    import torch

    from unlearn.vector.task_vector import TaskVector
    from unlearn.vector.write import export_merged

    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()
    loaded = load_model(options.model, options.dtype, options.device)
    file = options.work / "vector.safetensors"
    if options.part == "prepare":
        vector = TaskVector.load(options.vector) if options.vector else random_vector(loaded.model)
        vector.save(file)
        return _prepare(loaded, vector, file.stat().st_size, options)
    vector = TaskVector.load(file)
    if options.part == "ours":
        return _ours(loaded, vector, started, options)
    export_merged(loaded.model, vector, options.coefficient, loaded.tokenizer, options.work / "merged")
    return {}


def random_vector(model: Any) -> TaskVector:
    """A change of every linear layer but the head, of rank 16 and a hundredth of each weight's norm."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from unlearn.model.load import linear_modules
    from unlearn.vector.change import LowRank
    from unlearn.vector.task_vector import TaskVector

    generator = torch.Generator().manual_seed(0)
    modules = {}
    for name, module in linear_modules(model).items():
        weight: Any = module.weight
        weight = weight.detach().float()
        width, out = weight.shape if isinstance(module, Conv1D) else weight.shape[::-1]
        change = LowRank(torch.randn(RANK, width, generator=generator), torch.randn(out, RANK, generator=generator))
        modules[name] = LowRank(change.A, change.B * (RELATIVE_NORM * float(weight.norm()) / change.dot(change) ** 0.5))
    return TaskVector(modules)


@dataclass(frozen=True, slots=True)
class Point:
    """One coefficient scored: seconds to put it on the model, seconds to score it, and the scores."""

    coefficient: float
    set_seconds: float
    score_seconds: float
    result: EvalResult


def sweep(lm: PackedLM, built: TaskSet, edit: Edit, coefficients: Sequence[float]) -> Iterator[Point]:
    """Score at every coefficient as a run does, one after the other; nothing is kept here."""
    from unlearn.score.evaluate import evaluate

    for coefficient in coefficients:
        started = time.perf_counter()
        edit.subtract(coefficient)
        ready = time.perf_counter()
        result = evaluate(lm, built, model_name=f"bench@{coefficient:g}", bootstrap=0)
        yield Point(coefficient, ready - started, time.perf_counter() - ready, result)


def _prepare(loaded: Loaded, vector: TaskVector, factors: int, options: argparse.Namespace) -> dict[str, Any]:
    """What all roads start from: fine-tuned checkpoint, items; and what an edit costs in memory."""
    import torch

    from unlearn.data.sets import items_path, write_items
    from unlearn.model.load import linear_modules
    from unlearn.vector.edit import Edit
    from unlearn.vector.write import export_merged

    export_merged(loaded.model, vector, -1.0, loaded.tokenizer, options.work / "finetuned")  # theta + tau
    files: dict[str, list[str]] = {}
    tasks: dict[str, list[str]] = {}
    sets = _sets(options, loaded)
    write_items(sets, loaded.tokenizer, options.work / "items", ("validation",))
    for loaded_set in sets:
        path = items_path(options.work / "items", loaded_set, "validation")
        if path.is_file():
            files.setdefault(loaded_set.spec.kind, []).append(path.read_text(encoding="utf-8"))
            tasks.setdefault(loaded_set.spec.kind, []).append(f"{loaded_set.role}.{loaded_set.name}")
    for kind, texts in files.items():
        (options.work / f"{kind}.jsonl").write_text("".join(texts), encoding="utf-8")

    def memory() -> int:
        return torch.cuda.memory_allocated() if loaded.device.type == "cuda" else resident()

    before = memory()
    with Edit(loaded.model, vector) as edit:
        edit.subtract(1.0)
        added = memory() - before
    touched: list[Any] = [m.weight for name, m in linear_modules(loaded.model).items() if name in vector.modules]
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    changed = sum(int(w.numel() * w.element_size()) for w in touched)
    return {
        "tasks": tasks,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "memory": {"model": weights, "factors": factors, "touched": changed, "edit": added},
    }


def _ours(loaded: Loaded, vector: TaskVector, started: float, options: argparse.Namespace) -> dict[str, Any]:
    """Our whole sweep: load once, build requests once, score every coefficient, write lm-eval's files for each."""
    from unlearn.recipe.load import load_recipe
    from unlearn.score.packed import PackedLM
    from unlearn.score.tasks import build_tasks
    from unlearn.vector.edit import Edit

    recipe = load_recipe(options.recipe).recipe
    lm = PackedLM(loaded.model, loaded.tokenizer, batch_size=recipe.eval.batch_size)
    sets = _sets(options, loaded)
    built = build_tasks(sets, "validation", recipe, loaded.tokenizer, options.work / "items")
    loading = time.perf_counter() - started
    points, off = [], []
    with Edit(loaded.model, vector) as edit:
        for point in sweep(lm, built, edit, _grid(options.coefficients)):
            point.result.save(options.work / "ours")
            points.append(
                {
                    "coefficient": point.coefficient,
                    "set_seconds": point.set_seconds,
                    "score_seconds": point.score_seconds,
                    "scores": {f"{s.name} {s.metric}": s.score.value for s in point.result.scores},
                    "items": {task: [_item(row) for row in rows] for task, rows in point.result.samples.items()},
                }
            )
        for _ in range(3):
            edit.subtract(1.0)
            began = time.perf_counter()
            edit.subtract(0.0)
            off.append(time.perf_counter() - began)
    return {"load_seconds": loading, "off_seconds": statistics.median(off), "points": points}


def _sets(options: argparse.Namespace, loaded: Loaded) -> tuple[LoadedSet, ...]:
    from unlearn.data.sets import load_sets
    from unlearn.recipe.load import load_recipe

    found = load_recipe(options.recipe)
    if found.recipe.eval.tasks:
        raise EvaluationError(f"{found.source.name} scores lm-eval's own tasks; this benchmark compares the recipe's")
    return load_sets(found.recipe, found.source.parent, loaded.tokenizer)


if __name__ == "__main__":
    command_line(main)
