"""A finished file is the same bytes in every run, whatever order a process has its sets in."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn.vector.change import LowRank
from unlearn.vector.task_vector import TaskVector

# files that hold a time, the command line or the machine, and nobody's result
EXCEPTIONS = ("stage.json", "training.json", "results_*.json", "report.*", "provenance.json", ".unlearn-lock*")
_DATE = re.compile(r"_\d{4}-\d\d-\d\dT[\d.-]+(?=\.jsonl?$)")  # in the names of lm-eval's files


def files(run: Path) -> dict[str, str]:
    """SHA-256 of every file of a run, by its name without lm-eval's dates."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in EXCEPTIONS):
            name = _DATE.sub("", path.relative_to(run).as_posix())
            assert name not in found
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def start(place: Path, seed: int, recipe: str, *options: str) -> Path:
    """The command line in a process of its own, whose sets have an order of their own."""
    place.mkdir()
    line = [sys.executable, "-m", "unlearn.run", "--recipe", recipe, "--out", "run", *options]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return place / "run"


@pytest.mark.slow  # the next one shows it for all but merged weights
def test_two_runs_leave_the_same_bytes(tmp_path: Path) -> None:
    merged = ("--set", "export.merged=true", "--set", "export.shard_size=200KB")
    one, two = (files(start(tmp_path / f"{seed}", seed, "pico_smoke.yaml", *merged)) for seed in (1, 2))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
    kept = "items/*.jsonl target/model.safetensors target/tokenizer.json vectors/*/vector.safetensors foresight/*.json"
    kept += " eval/*/validation/scores.json eval/*/test/*/samples_*.jsonl export/adapter/adapter_model.safetensors"
    for pattern in (*kept.split(), "export/adapter/README.md", "export/merged/model-00002-*.safetensors"):
        assert any(fnmatch.fnmatch(name, pattern) for name in one), pattern


def test_a_compared_and_attacked_run_leaves_the_same_bytes(compared: Path, tmp_path: Path) -> None:
    one, two = files(compared / "run"), files(start(tmp_path / "again", 3, str(compared / "recipe.yaml")))
    adapter = {f"export/adapter/{name}" for name in ("adapter_config.json", "README.md", "export.json")}
    runs = (compared / "run", tmp_path / "again" / "run")
    configs = [(run / "export" / "adapter" / "adapter_config.json").read_text() for run in runs]
    here, there = ({**json.loads(text), "base_model_name_or_path": ""} for text in configs)
    assert here == there  # with modules in one order, which PEFT keeps in a set
    assert len(here["target_modules"]) > 1
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= adapter  # it names its base by the run's folder
    stages = {"eval/reference/", "benchmark/edited/", "membership/edited/", "robustness/edited/samples/"}
    assert all(any(name.startswith(stage) for name in one) for stage in stages)


def test_a_vector_s_file_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    import torch

    a = torch.arange(12.0).reshape(3, 4)
    # two factors that are views of one matrix, in one of them not in its own order
    vector = TaskVector({"m.a": LowRank(a, a.T), "m.b": LowRank(a[:2], a[:2].T.contiguous())}, {"base": "x", "é": "1"})
    for n in range(20):  # by chance alone a header of three entries came out alike in one of six
        vector.save(tmp_path / f"{n}.safetensors")
    assert len({(tmp_path / f"{n}.safetensors").read_bytes() for n in range(20)}) == 1
    back = TaskVector.load(tmp_path / "0.safetensors")
    assert back.digest() == vector.digest()
    assert dict(back.meta) == {"base": "x", "é": "1"}
