"""Shared by all tests: pico models built once, no network, a cache of the session's own."""

from __future__ import annotations

import csv
import functools
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from facts import capital_rows

if TYPE_CHECKING:
    from unlearn.model.load import Loaded

# The hub's client reads this once, when it is imported: hence here, and the imports of it inside the functions.
os.environ["HF_HUB_OFFLINE"] = "1"
# bitsandbytes would have torch import its compiler in every process that is started: seconds, and nothing is compiled
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


HERE = Path(__file__).parent
LONGEST = (
    *("faults/", "train/test_processes.py", "slurm/", "cluster/test_submit.py", "store/test_machines.py"),
    *("store/", "golden/", "evidence/", "test_run.py", "test_requests.py", "train/", "security/", "fuzz/"),
)


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and whoever is deaf to it stays so.

    Several workers get their files in the order of ``LONGEST``, not in that of their numbers of tests.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, but that the tests of faults share one process, and so go to one worker."""
    if config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "faults" if "/faults/" in nodeid else super()._split_scope(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes is run when it is asked for; what takes longest of the rest is not left to the end."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow") is not None:
                item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))
    place = {item: item.path.relative_to(HERE).as_posix() for item in items}
    rank = {folder: n for n, folder in enumerate(LONGEST)}
    items.sort(key=lambda item: min((n for start, n in rank.items() if place[item].startswith(start)), default=99))


def pytest_collection_finish() -> None:
    """What all the imports have left stays: nobody has to look through it for garbage after every training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this test session: nobody's own is read or written, and no test goes online.

    lm-eval asks ten programs about the machine in every evaluation; once is enough.
    """
    from torch.utils import collect_env

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect_env, "get_pretty_env_info", functools.cache(collect_env.get_pretty_env_info))
        patch.setenv("UNLEARN_CACHE", str(folder))
        patch.delenv("UNLEARN_OFFLINE", raising=False)
        yield folder


@pytest.fixture(autouse=True)
def _politely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests share the machine.

    Figures for papers, a third of a small run, are drawn by tests of them and by the runs that many tests read.
    """
    import torch

    torch.set_num_threads(1)
    if "unlearn.pipeline" in sys.modules:
        monkeypatch.setattr("unlearn.pipeline.save_figures", lambda report, folder: None)


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where transformers copies a model's own code in this test alone: not the user's folder, nor another test's.

    It reads its variable once, on import, and puts the folder on ``sys.path`` for good; a second such folder behind
    the first would not be found.
    """
    from transformers import dynamic_module_utils

    folder = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def _pico(name: str, factory: pytest.TempPathFactory) -> Path:
    from unlearn.model import pico

    return pico.build(name, factory.mktemp(f"pico-{name}") / name)


@pytest.fixture(scope="session")
def pico_phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Phi: untied, biases, the six linear modules of Phi-1.5. Read only."""
    return _pico("phi", tmp_path_factory)


@pytest.fixture(scope="session")
def pico_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Llama: tied embeddings, gated MLP, grouped keys and values. Read only."""
    return _pico("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def pico_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico GPT-2: Conv1D with transposed, fused weights, learned positions. Read only."""
    return _pico("gpt2", tmp_path_factory)


@pytest.fixture(scope="session")
def pico_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico Qwen2: biases on q, k and v only. Read only."""
    return _pico("qwen2", tmp_path_factory)


@pytest.fixture(scope="session")
def pico_gpt_neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pico GPT-NeoX: fused query_key_value, parallel residual. Read only."""
    return _pico("gpt_neox", tmp_path_factory)


def _once(name: str, factory: pytest.TempPathFactory, make: Callable[[Path], int]) -> Path:
    """A folder that the first of a session's workers fills by a run, for all of them."""
    import torch
    from filelock import FileLock

    shared = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, whole = shared / name, shared / f"{name}.whole"
    with FileLock(shared / f"{name}.lock"):
        if not whole.exists():
            torch.set_num_threads(1)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            assert make(folder) == 0
            whole.touch()
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of ``pico_smoke.yaml``. Read only, or left as it is."""
    from unlearn.cli import main

    line = ["--recipe", "pico_smoke.yaml", "--out"]
    return _once("smoke", tmp_path_factory, lambda folder: main([*line, str(folder / "run")])) / "run"


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, ``recipe.yaml`` and a finished ``run`` that is compared and attacked. Read only."""
    from compared_arena import run, write_data, write_recipe

    def make(folder: Path) -> int:
        write_data(folder)
        return run(write_recipe(folder), folder / "run")

    return _once("compared", tmp_path_factory, make)


@pytest.fixture
def loaded() -> Callable[..., Loaded]:
    """``loaded(folder, dtype="float32")``: a fresh model on the CPU, the test's own to change."""

    from unlearn.model.load import load
    from unlearn.recipe.schema import ModelSpec

    def fresh(folder: Path, dtype: str = "float32") -> Loaded:
        spec = ModelSpec.model_validate({"path": str(folder), "device": "cpu", "dtype": dtype})
        return load(spec, str(folder))

    return fresh


@pytest.fixture
def phi(loaded: Callable[..., Loaded], pico_phi: Path) -> Loaded:
    """A fresh pico Phi in fp32 on the CPU."""
    return loaded(pico_phi)


@pytest.fixture
def llama(loaded: Callable[..., Loaded], pico_llama: Path) -> Loaded:
    """A fresh pico Llama in fp32 on the CPU."""
    return loaded(pico_llama)


@pytest.fixture
def gpt2(loaded: Callable[..., Loaded], pico_gpt2: Path) -> Loaded:
    """A fresh pico GPT-2 in fp32 on the CPU."""
    return loaded(pico_gpt2)


@pytest.fixture
def capitals(tmp_path: Path) -> Callable[..., Path]:
    """``capitals("x.jsonl", start=0, stop=20)``: a data file of capitals, as .json, .jsonl or .csv, for qa and mcq.

    For mcq map the column: ``columns: {answer: correct}``. In CSV the choices are four columns, choice0 to choice3.
    """

    def write(name: str = "capitals.jsonl", start: int = 0, stop: int = 20) -> Path:
        rows, path = capital_rows()[start:stop], tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps(rows), "utf-8")
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        elif path.suffix == ".csv":
            flat = []
            for row in rows:
                choices = row.pop("choices")
                assert isinstance(choices, list)
                flat.append(row | {f"choice{i}": choice for i, choice in enumerate(choices)})
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(flat[0]))
                writer.writeheader()
                writer.writerows(flat)
        else:
            raise ValueError(f"no such kind of data file: {name}")
        return path

    return write
