"""What a sweep costs as it grows: items x1, x4, x16, and coefficients x1, x4, x16.

    python tests/bench/growth.py [MODEL] [--items 32] [--threads N] [--repeats 3] [--json FILE]

MODEL is a folder, or anything a recipe's model.path may be (``pico:llama`` for a try); without it the quickstart's.
Every size is a process of its own, in which the package scores made-up four-choice items at each coefficient of a
random vector, as a run's sweep does. It first does so once, untimed, on a few items.

Printed for each size: seconds (median, least..most), seconds per item and coefficient, and the peak memory beyond the
loaded model. For each of the two ways to grow: the ratio of seconds from one size to the next (4 is linear), the line
seconds = a + b * amount through them with its largest deviation, and how many megabytes each size needs more than the
one before. (A size that does not fill one forward pass needs less than one that does; beyond that nothing should grow
but the questions themselves.)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measure import (
    Seconds,
    command_line,
    console,
    environment,
    find_model,
    load_model,
    peak_memory,
    run_child,
    write_json,
)
from rich.table import Table

if TYPE_CHECKING:
    from unlearn.model.load import Loaded
    from unlearn.score.tasks import TaskSet

FACTORS = (1, 4, 16)
WARM_UP = 2  # items
LARGEST = 4.0  # coefficient


@dataclass(frozen=True, slots=True)
class Cell:
    """One size, measured."""

    items: int
    coefficients: int
    seconds: Seconds
    peak_growth_bytes: int


def main() -> None:
    """Measure every size, print, or be one of the measuring processes."""
    options = _options()
    where = find_model(options.model)
    if options.cell:
        items, coefficients = options.cell
        print(json.dumps(_measure(where, items, coefficients, options)))
        return
    sizes = [(options.items * factor, 1) for factor in FACTORS]
    sizes += [(options.items, factor) for factor in FACTORS[1:]]
    cells = {size: _apart(where, *size, options) for size in sizes}
    by_items = [cells[options.items * factor, 1] for factor in FACTORS]
    by_coefficients = [cells[options.items, factor] for factor in FACTORS]
    table = Table("items", "coefficients", "seconds", "ms each", "peak growth MB", title="What a sweep costs")
    for cell in cells.values():
        each = cell.seconds.median / cell.items / cell.coefficients
        numbers = f"{cell.items}", f"{cell.coefficients}", f"{cell.seconds}"
        table.add_row(*numbers, f"{each * 1e3:.2f}", f"{cell.peak_growth_bytes / 1e6:,.1f}")
    console.print(table)
    ways = {"items": by_items, "coefficients": by_coefficients}
    fits = {name: _fit([getattr(c, name) for c in found], found) for name, found in ways.items()}
    for name, fit in fits.items():
        steps = ", ".join(f"x{ratio:.2f}" for ratio in fit["ratios"])
        line = f"seconds = {fit['a']:.3f} + {fit['b']:.5f} * {name}, off by at most {fit['deviation']:.1%}"
        memory = ", ".join(f"{step / 1e6:+,.1f}" for step in fit["memory_growth_bytes"])
        console.print(f"{name}: each x{FACTORS[1]} costs {steps}; {line}; memory {memory} MB")
    result = {"cells": [asdict(cell) for cell in cells.values()], "fits": fits, "environment": environment()}
    write_json(options.json, result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder (default: the quickstart's model)")
    parser.add_argument("--items", type=int, default=32, help="items of the smallest size")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each size, in its process")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--cell", type=int, nargs=2, metavar="N", help="measure one size here: items, coefficients")
    return parser.parse_args()


def _fit(amounts: Sequence[int], cells: Sequence[Cell]) -> dict[str, Any]:
    """Least squares ``seconds = a + b * amount``, relative errors weighted alike; the largest of them."""
    x, seconds = np.array(amounts), np.array([cell.seconds.median for cell in cells])
    b, a = np.polyfit(x, seconds, 1, w=1 / seconds)
    return {
        "ratios": (seconds[1:] / seconds[:-1]).tolist(),
        "a": float(a),
        "b": float(b),
        "deviation": float(np.abs((a + b * x) / seconds - 1).max()),
        "memory_growth_bytes": np.diff([cell.peak_growth_bytes for cell in cells]).tolist(),
    }


def _apart(where: str, items: int, coefficients: int, options: argparse.Namespace) -> Cell:
    console.print(f"{items} items, {coefficients} coefficients")
    command = [sys.executable, __file__, where, "--cell", str(items), str(coefficients)]
    command += ["--repeats", str(options.repeats), "--dtype", options.dtype, "--device", options.device]
    command += ["--threads", str(options.threads)] if options.threads else []
    found = run_child(command)
    return Cell(items, coefficients, Seconds(tuple(found["seconds"])), found["memory"])


# -- one size, in its own process --------------------------------------------------------------------------------------


def _measure(where: str, items: int, coefficients: int, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from sweep_peers import random_vector, sweep

    from unlearn.score.packed import PackedLM
    from unlearn.vector.edit import Edit

    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load_model(where, options.dtype, options.device)
    grid = [LARGEST * (i + 1) / coefficients for i in range(coefficients)]
    seconds: list[float] = []

    def score(number: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            built = _tasks(number, loaded, Path(folder))
            lm = PackedLM(loaded.model, loaded.tokenizer)
            started = time.perf_counter()
            for _ in sweep(lm, built, edit, grid):
                pass
            seconds.append(time.perf_counter() - started)

    with Edit(loaded.model, random_vector(loaded.model)) as edit:
        score(WARM_UP)
        with peak_memory(loaded.device) as peak:
            for _ in range(options.repeats):
                score(items)
    return {"seconds": seconds[1:], "memory": peak.growth}


def _tasks(number: int, loaded: Loaded, folder: Path) -> TaskSet:
    """Made-up four-choice questions as a recipe's forget set, all of them validation items."""
    from material import questions

    from unlearn.data.sets import load_sets
    from unlearn.recipe.schema import Recipe
    from unlearn.score.tasks import build_tasks

    docs = [
        {"question": d["context"], "choices": d["choices"], "answer": d["answer"]} for d in questions(number + 2, 0)
    ]
    parts = {"train": docs[:1], "test": docs[1:2], "validation": docs[2:]}  # no split may be empty
    for split, part in parts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in part), encoding="utf-8")
    forget = {"name": "questions", "kind": "mcq", "path": "train.jsonl", "prompt": "{question}"}
    others = {split: {"path": f"{split}.jsonl"} for split in ("validation", "test")}
    recipe = Recipe.model_validate({"name": "growth", "model": {"path": "made-up"}, "forget": {**forget, **others}})
    sets = load_sets(recipe, folder, loaded.tokenizer)
    assert len(sets[0].validation) == number, "two made-up questions are the same"
    return build_tasks(sets, "validation", recipe, loaded.tokenizer, folder)


if __name__ == "__main__":
    command_line(main)
