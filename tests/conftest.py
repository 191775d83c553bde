"""Shared by all tests: pico models built once, no network, a cache of the session's own."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from facts import capital_rows

if TYPE_CHECKING:
    from unlearn.model.load import Loaded

# The hub's client reads this once, when it is imported: hence here, and the imports of it inside the functions.
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """A shell starts what runs in its background deaf to Ctrl-C, and whoever is deaf to it stays so.

    Of several workers, whose files would come in the order of their numbers of tests: the few tests in a real Slurm
    take longest, and would be left to one worker at the end.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes minutes is run when it is asked for."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow") is not None:
                item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m slow"))


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache folder of this test session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, session_cache: Path) -> None:
    """Nobody's own cache is read or written, no test goes online, and tests share the machine politely."""
    monkeypatch.setenv("UNLEARN_CACHE", str(session_cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("UNLEARN_OFFLINE", raising=False)
    import torch

    torch.set_num_threads(1)


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


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> Path:
    """A folder with data, ``recipe.yaml`` and a finished ``run`` that is compared and attacked. Read only."""
    import torch
    from compared_arena import run, write_data, write_recipe

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compared")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNLEARN_CACHE", str(session_cache))
        assert run(write_recipe(folder), folder / "run") == 0
    return folder


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
