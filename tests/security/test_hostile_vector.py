"""A vector or an adapter from a stranger: no pickle is opened, no shape is believed, no name moves the cursor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import ESCAPES, pickled, safetensors, torch_file
from safetensors.torch import save_file

from unlearn import cli
from unlearn.errors import VectorError
from unlearn.vector.change import LowRank
from unlearn.vector.interop import ADAPTER_WEIGHTS, from_adapter
from unlearn.vector.task_vector import ADAPTER_CONFIG, TaskVector

META = {"format": "unlearn.task_vector", "version": "2", "meta": "{}"}


def vector_file(path: Path, names: tuple[str, ...] = ("m",)) -> Path:
    tensors = {f"{n}.{k}": torch.ones(2, 3) if k == "A" else torch.ones(4, 2) for n in names for k in "AB"}
    save_file(tensors, path, META)
    return path


def adapter(folder: Path, module: str = "m", **config: Any) -> Path:
    folder.mkdir()
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "x"}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(known | config))
    name = f"base_model.model.{module}.lora_{{}}.weight".format
    save_file({name("A"): torch.ones(2, 3), name("B"): torch.ones(4, 2)}, folder / ADAPTER_WEIGHTS)
    return folder


def test_the_files_that_are_attacked_here_can_be_read(tmp_path: Path) -> None:
    assert list(TaskVector.load(vector_file(tmp_path / "v")).modules) == ["m"]
    assert list(from_adapter(adapter(tmp_path / "a")).modules) == ["m"]


@pytest.mark.parametrize("make", [pickled, torch_file])
def test_a_pickle_is_no_vector(tmp_path: Path, make: Callable[[Path], bytes]) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "v").write_bytes(make(canary))
    with pytest.raises(VectorError, match="cannot be read as a task vector"):
        TaskVector.load(tmp_path / "v")
    folder = adapter(tmp_path / "a")
    (folder / ADAPTER_WEIGHTS).write_bytes(make(canary))
    with pytest.raises(VectorError, match="damaged"):
        from_adapter(folder)
    (folder / ADAPTER_WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(make(canary))
    with pytest.raises(VectorError, match="pickled"):
        from_adapter(folder)
    assert not canary.exists()


def lie(dtype: str, shape: list[int], end: int, body: bytes = b"", **meta: str) -> bytes:
    """A vector of one dense matrix that is not as its header says."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [min(end, 0), max(end, 0)]}
    return safetensors({"__metadata__": META | meta, "m.W": entry}, body)


FOUR = b"\0" * 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        safetensors({}, length=2**63),
        safetensors({}, length=2**40),
        safetensors(b"[" * 100_000),
        safetensors(b'{"__metadata__": {"format": 1}}'),
        safetensors({"__metadata__": META}),
        lie("F32", [2**40, 2**40], 4, FOUR),
        lie("F32", [2**63, 2], 0),
        lie("F32", [1, 1], 2**62),
        lie("F32", [1, 1], -4),
        lie("Q99", [1, 1], 4, FOUR),
        lie("F4", [2, 4], 4, FOUR),
        lie("F8_E8M0", [1, 4], 4, FOUR),
        lie("C64", [1, 1], 8, FOUR * 2),
        lie("F32", [], 4, FOUR),
        lie("F32", [1, 1], 4, FOUR, meta="[" * 100_000),
        lie("F32", [1, 1], 4, FOUR, meta='{"a": 1}'),
        lie("F32", [1, 1], 4, FOUR, version="9"),
        lie("F32", [1, 1], 4, b"\0\0\xc0\x7f"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_headers_that_lie(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v").write_bytes(content)
    with pytest.raises(VectorError, match="/v: "):
        TaskVector.load(tmp_path / "v")
    folder = adapter(tmp_path / "a")
    (folder / ADAPTER_WEIGHTS).write_bytes(content)
    with pytest.raises(VectorError):
        from_adapter(folder)


def test_thin_factors_are_not_multiplied_out_whatever_they_claim(tmp_path: Path) -> None:
    empty = {"dtype": "F32", "data_offsets": [0, 0]}
    header = {"__metadata__": META, "m.A": empty | {"shape": [0, 2**40]}, "m.B": empty | {"shape": [2**40, 0]}}
    (tmp_path / "v").write_bytes(safetensors(header))
    vector = TaskVector.load(tmp_path / "v")
    assert vector.norm() == 0
    with pytest.raises(VectorError, match="larger than any weight"):
        vector.prune(0.5)
    wide = LowRank(torch.ones(1, 200_000), torch.ones(200_000, 1))
    with pytest.raises(VectorError, match="larger than any weight"):
        wide.delta()


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "a\nb", f"m{ESCAPES}", "m[red]", "\u202egnp.exe", "a" * 10_000]
)
def test_names_of_modules_are_only_names(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = vector_file(tmp_path / "v", (name,))
    assert cli.main(["vector", "info", str(place)]) == 0
    wrong = tmp_path / "w"
    save_file({f"{name}.A": torch.ones(1, 1)}, wrong, META)
    assert cli.main(["vector", "info", str(wrong)]) == 2
    folder = adapter(tmp_path / "a")
    save_file({name: torch.ones(1, 1)}, folder / ADAPTER_WEIGHTS)
    assert cli.main(["vector", "info", str(folder)]) == 2
    printed = capsys.readouterr()
    for said in (printed.out, printed.err):
        assert all(c.isprintable() or c == "\n" for c in said)
        assert len(said) < 100_000
    assert "a\nb" not in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "v", "w"]


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*b", "(.*)*x", ".*.*.*.*.*.*y", "a?" * 30 + "a" * 30, "(a|a)" * 30, "([a-z]+)*!", "((a)?){50}"],
)
def test_patterns_that_never_end_are_refused(tmp_path: Path, pattern: str) -> None:
    folder = adapter(tmp_path / "a", "a" * 60, rank_pattern={pattern: 2})
    with pytest.raises(VectorError, match="may take for ever"):
        from_adapter(folder)


@pytest.mark.parametrize(
    "config",
    [
        *({"rank_pattern": value} for value in ({"(": 2}, [1], {"m": {"a": 1}})),
        *({"r": value} for value in (10**400, "2", [2], 0, True)),
        *({"lora_alpha": value} for value in (float("nan"), 10**30)),
        {"peft_type": ["LORA"]},
        {"init_lora_weights": ["gaussian"]},
        {"init_lora_weights": {"a": 1}},
        {"megatron_config": {"a": 1}, "megatron_core": "os"},
        {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}, "lora_bias": True},
        {"modules_to_save": ["x" * 10_000 + ESCAPES]},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_configurations_that_make_no_sense(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(VectorError):
        from_adapter(adapter(tmp_path / "a", **config))
