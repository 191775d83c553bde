"""What the tests of comparisons and attacks share: one small run that has them all, and the files it is made from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unlearn.cli import main
from unlearn.results import RunReport, Who

EVERYONE: tuple[Who, ...] = ("target", "edited", "reference")
NAMES = ("ada", "bob", "cyd", "dot", "eli", "fay", "gus", "hal", "ivy", "jon", "kit", "lou")
TOWNS = "miaville yanville nedville sueville gusville quyville wesville zoeville tomville danville louville ianville"
SETS = {"f": (0, 12), "r": (100, 12), "u": (200, 12), "h": (300, 10)}
TOFU = {"forget01": 6, "retain": 5, "real_authors": 4, "world_facts": 4}

RECIPE: dict[str, Any] = {
    "name": "compared",
    "model": {"path": "pico:llama"},
    "forget": {"kind": "qa", "path": "f.jsonl", "shares": {"train": "all", "validation": 0.5, "test": 0.5}},
    "retain": [{"kind": "qa", "path": "r.jsonl", "shares": {"train": "all", "validation": 0.5, "test": 0.5}}],
    "utility": [{"kind": "qa", "path": "u.jsonl", "name": "util"}],
    "holdout": {"kind": "qa", "path": "h.jsonl"},
    "teach": {"steps": 20, "learning_rate": 0.005, "batch_size": 8},
    "vector": {"forget": {"steps": 10, "learning_rate": 0.005}, "lora": {"rank": 4}},
    "sweep": {"coefficients": [0.5, 1.0]},
    "choose": {"keep": 0.0, "collapse": 100.0},
    "eval": {"bootstrap": 100, "examples": 1},
    "reference": "train",
    "benchmark": {"name": "tofu", "set": "forget01", "path": "tofu", "max_tokens": 6},
    "robustness": {
        "items": 8,
        "quantize": ["int8"],
        "relearn": {"items": 2, "steps": [1, 2], "learning_rate": 0.01},
        "probes": ["prefix", "few_shot"],
        "samples": 2,
    },
}
for _data in (RECIPE["forget"], *RECIPE["retain"], *RECIPE["utility"]):
    _data["continuation"] = 6


def rows(start: int, count: int) -> list[dict[str, Any]]:
    """Questions that have nothing in common with those of another hundred."""
    towns = TOWNS.split()
    return [
        {
            "question": f"Where was {NAMES[n % 12]}{start + n} born?",
            "answer": f"In {towns[(n + start // 25) % 12]} {start + n}.",
        }
        for n in range(count)
    ]


def write_rows(path: Path, made: Iterable[Any]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def write_data(folder: Path) -> None:
    """The recipe's four sets, and a folder with TOFU's files: its forget and retain items are the recipe's own."""
    for name, (start, count) in SETS.items():
        write_rows(folder / f"{name}.jsonl", rows(start, count))
    starts = {"forget01": 0, "retain": 100, "real_authors": 500, "world_facts": 600}
    for name, count in TOFU.items():
        made = rows(starts[name], count)
        for n, row in enumerate(made):
            row["perturbed_answer"] = [f"In {town} {n}." for town in TOWNS.split()[n : n + 3]]
            if name in ("forget01", "retain"):
                row["paraphrased_answer"] = "It was " + row["answer"].lower()
        write_rows(folder / "tofu" / f"{name}_perturbed.json", made)


def write_recipe(folder: Path, **changed: Any) -> Path:
    """The recipe with keys replaced (None: left out), beside the data."""
    path = folder / "recipe.yaml"
    recipe = {key: value for key, value in {**RECIPE, **changed}.items() if value is not None}
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path


def run(recipe: Path, out: Path, *extra: str) -> int:
    """The command line in this process; its exit code."""
    return main(["--recipe", str(recipe), "--out", str(out), *extra])


def read(out: Path) -> RunReport:
    """A run's report."""
    return RunReport.from_json(json.loads((out / "report.json").read_text(encoding="utf-8")))


def copied(compared: Path, place: Path, *without: str) -> Path:
    """The finished run once more, as a kill would have left it: without its report and some of its stages."""
    shutil.copytree(compared / "run", place)
    for name in ("report.json", "provenance.json", *without):
        path = place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return place


def stages(out: Path) -> set[str]:
    """The names of a run's stages."""
    return set(json.loads((out / "provenance.json").read_text(encoding="utf-8"))["stages"])


def made(out: Path, said: str) -> set[str]:
    """The stages that were made by the process that said so on stderr; the others were there or taken over."""
    return stages(out) - set(re.findall(r"^ {4}(\S+): (?:as before|taken from)", said, re.MULTILINE))


def same(out: Path) -> dict[str, Any]:
    """A report without what may differ between two runs of one recipe: times, and where the run lies."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for name in ("seconds", "provenance", "exports"):
        report.pop(name)
    for line in report["training"]:
        line.pop("seconds")
    return report
