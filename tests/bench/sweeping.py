"""The parts of the sweep benchmarks that load a model, each in a process of its own, so that peaks are not mixed.

    python tests/bench/sweeping.py prepare|ours|merge PLAN.json [COEFFICIENT]

Called by ``sweep_peers.py``, which writes the plan; ``growth.py`` uses the functions.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measure import command_line, find_model, items_of, load_model, resident
from transformers.pytorch_utils import Conv1D

from unlearn.data.sets import LoadedSet, items_path, load_sets, write_items
from unlearn.errors import EvaluationError
from unlearn.model.load import Loaded, linear_modules
from unlearn.recipe.load import load_recipe
from unlearn.score.evaluate import EvalResult, evaluate
from unlearn.score.packed import PackedLM
from unlearn.score.tasks import TaskSet, build_tasks
from unlearn.vector.change import LowRank
from unlearn.vector.edit import Edit
from unlearn.vector.task_vector import TaskVector
from unlearn.vector.write import export_merged

VECTOR = "vector.safetensors"
RANK, RELATIVE_NORM = 16, 0.01  # of a made-up vector: LoRA's usual rank, and a change of 1 % of each weight


@dataclass(frozen=True, slots=True)
class Plan:
    """What all roads of one comparison share; a JSON file between the processes.

    ``model`` None means the recipe's; ``prepare`` finds it, and the plan then has its folder.
    """

    model: str | None
    recipe: str
    vector: str | None
    work: str
    coefficients: tuple[float, ...]
    threads: int | None
    dtype: str
    device: str

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what ``sweep_peers.py`` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**data, "coefficients": tuple(data["coefficients"])})

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        return Path(self.work)


def main() -> None:
    """One part, and its result as one line of JSON."""
    part, plan = sys.argv[1], Plan.read(Path(sys.argv[2]))
    if plan.threads:
        torch.set_num_threads(plan.threads)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "prepare": lambda: prepare(plan),
        "ours": lambda: ours(plan),
        "merge": lambda: merge(plan, float(sys.argv[3])),
    }
    print(json.dumps(parts[part]()))


def random_vector(model: Any, seed: int = 0) -> TaskVector:
    """A change of every linear layer but the head, of rank 16 and a hundredth of each weight's norm."""
    generator = torch.Generator().manual_seed(seed)
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
    for coefficient in coefficients:
        started = time.perf_counter()
        edit.set(-coefficient)
        ready = time.perf_counter()
        result = evaluate(lm, built, model_name=f"bench@{coefficient:g}", bootstrap=0)
        yield Point(coefficient, ready - started, time.perf_counter() - ready, result)


# -- the parts ---------------------------------------------------------------------------------------------------------


def prepare(plan: Plan) -> dict[str, Any]:
    """What all roads start from: model, vector, fine-tuned checkpoint, items; and what an edit costs in memory."""
    plan = replace(plan, model=find_model(plan.model, plan.recipe))
    loaded = _load(plan)
    vector = TaskVector.load(Path(plan.vector)) if plan.vector else random_vector(loaded.model)
    vector.save(plan.folder / VECTOR)
    started = time.perf_counter()
    export_merged(loaded.model, vector, -1.0, loaded.tokenizer, plan.folder / "finetuned")  # theta + tau
    merged = time.perf_counter() - started
    files: dict[str, list[str]] = {}
    tasks: dict[str, list[str]] = {}
    sets = _sets(plan, loaded)
    write_items(sets, loaded.tokenizer, plan.folder / "items", ("validation",))
    for loaded_set in sets:
        path = items_path(plan.folder / "items", loaded_set, "validation")
        if path.is_file():
            files.setdefault(loaded_set.spec.kind, []).append(path.read_text(encoding="utf-8"))
            tasks.setdefault(loaded_set.spec.kind, []).append(f"{loaded_set.role}.{loaded_set.name}")
    for kind, texts in files.items():
        (plan.folder / f"{kind}.jsonl").write_text("".join(texts), encoding="utf-8")
    return {
        "model": plan.model,
        "tasks": tasks,
        "finetuned_seconds": merged,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "memory": _edit_memory(loaded, vector, (plan.folder / VECTOR).stat().st_size),
    }


def _edit_memory(loaded: Loaded, vector: TaskVector, factors: int) -> dict[str, int]:
    """Bytes of the model, of the vector's file, of the weights it changes, and what an edit really added."""
    on_gpu = loaded.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else resident()
    with Edit(loaded.model, vector) as edit:
        edit.set(-1.0)
        after = torch.cuda.memory_allocated() if on_gpu else resident()
    touched: list[Any] = [m.weight for name, m in linear_modules(loaded.model).items() if name in vector.modules]
    return {
        "model": sum(p.numel() * p.element_size() for p in loaded.model.parameters()),
        "factors": factors,
        "touched": sum(int(w.numel() * w.element_size()) for w in touched),
        "edit": after - before,
    }


def ours(plan: Plan) -> dict[str, Any]:
    """Our whole sweep: load once, build requests once, score every coefficient, write lm-eval's files for each."""
    started = time.perf_counter()
    loaded = _load(plan)
    vector = TaskVector.load(plan.folder / VECTOR)
    recipe = load_recipe(plan.recipe).recipe
    lm = PackedLM(loaded.model, loaded.tokenizer, batch_size=recipe.eval.batch_size)
    built = build_tasks(_sets(plan, loaded), "validation", recipe, loaded.tokenizer, plan.folder / "items")
    loading = time.perf_counter() - started
    points, off = [], []
    with Edit(loaded.model, vector) as edit:
        for point in sweep(lm, built, edit, plan.coefficients):
            point.result.save(plan.folder / "ours")
            points.append(_plain(point))
        for _ in range(3):
            edit.set(-1.0)
            began = time.perf_counter()
            edit.set(0.0)
            off.append(time.perf_counter() - began)
    return {"load_seconds": loading, "off_seconds": statistics.median(off), "points": points}


def merge(plan: Plan, coefficient: float) -> dict[str, Any]:
    """Our own merging: whole weights at one coefficient, saved."""
    loaded = _load(plan)
    folder = plan.folder / "merged"
    shutil.rmtree(folder, ignore_errors=True)
    export_merged(loaded.model, TaskVector.load(plan.folder / VECTOR), coefficient, loaded.tokenizer, folder)
    return {}


def _plain(point: Point) -> dict[str, Any]:
    """A point as JSON: per item its log-likelihoods, and the metrics that are plain numbers."""
    scores = {f"{s.name} {s.metric}": s.score.value for s in point.result.scores}
    items = {task: [items_of(row) for row in rows] for task, rows in point.result.samples.items()}
    return {
        "coefficient": point.coefficient,
        "set_seconds": point.set_seconds,
        "score_seconds": point.score_seconds,
        "scores": scores,
        "items": items,
    }


def _load(plan: Plan) -> Loaded:
    assert plan.model is not None  # the plan has it once everything is prepared
    return load_model(plan.model, plan.dtype, plan.device)


def _sets(plan: Plan, loaded: Loaded) -> tuple[LoadedSet, ...]:
    found = load_recipe(plan.recipe)
    if found.recipe.eval.tasks:
        raise EvaluationError(f"{found.source.name} scores lm-eval's own tasks; this benchmark compares the recipe's")
    return load_sets(found.recipe, found.source.parent, loaded.tokenizer)


if __name__ == "__main__":
    command_line(main)
