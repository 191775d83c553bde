"""What fuzzing found, one plain test each: inputs that were a crash once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from targets import GRID, REPORT, TARGETS, _wheel

from unlearn.cluster.grid import Grid
from unlearn.cluster.job_state import JobState
from unlearn.errors import DataError, GridError, ModelError, UnlearnError, VectorError
from unlearn.evidence import boards as board_runs
from unlearn.evidence import membership as member_files
from unlearn.model.locate import check_folder
from unlearn.model.wheel import WheelFile, extract
from unlearn.results import RunReport
from unlearn.vector import interop as checkpoint_vector


@pytest.mark.parametrize(
    "file", ["x" * 5000 + ".safetensors", "a\x00.safetensors", ".", "..", "a\nb.safetensors", 3, None, [1], {}]
)
def test_an_index_that_names_no_file(tmp_path: Path, file: Any) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a\nb": file}}))
    with pytest.raises(VectorError, match="which is no file in that folder") as caught:
        checkpoint_vector._files(tmp_path)
    assert str(caught.value).isprintable()
    with pytest.raises(ModelError, match=r"no safetensors file|incomplete"):
        check_folder(tmp_path)


def test_an_index_nested_beyond_reading(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="cannot be read as an index"):
        check_folder(tmp_path)


def test_an_archive_whose_places_cannot_be(tmp_path: Path) -> None:
    raw = bytearray(_wheel())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 42 : at + 46] = b"\xff\xff\xff\x7f"
    at = raw.index(b"PK\x01\x02")
    raw[at + 42 : at + 46] = b"\xff\xff\xff\xff"
    (tmp_path / "w.whl").write_bytes(raw)
    with pytest.raises(ModelError, match=r"damaged|not in the wheel"):
        extract(tmp_path / "w.whl", WheelFile("p", "1", "a/x.gguf", "0" * 64), tmp_path / "x")


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "1",
        "null",
        '{"member": true}',
        '{"member": [1], "id": 1}',
        '{"member": true, "id": []}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_lines_of_membership_inference_that_are_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(line.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match="not a line of membership inference"):
        member_files.judge({"target": path}, 5, 0)


def without(key: str) -> Any:
    data = json.loads(REPORT)
    del data[key]
    return data


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"schema": 1},
        {"schema": [1]},
        without("chosen"),
        without("examples"),
        json.loads(REPORT) | {"chosen": []},
        json.loads(REPORT) | {"scores": [1]},
        json.loads(REPORT) | {"sweep": {"a": 1}},
        json.loads(REPORT) | {"examples": [{"unknown": 1}]},
        json.loads(REPORT) | {"robustness": [1]},
        json.loads(REPORT) | {"foresight": "x"},
    ],
    ids=lambda value: repr(value)[:30],
)
def test_reports_that_are_none(data: Any) -> None:
    with pytest.raises(ValueError, match=r"not a report|schema"):
        RunReport.from_json(data)


@pytest.mark.parametrize(
    "text", ["name: x\nbenchmark: {name: tofu, set: forget01}\neval: [1]\n", "[]", "", "benchmark: 3", "\x00"]
)
def test_run_folders_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "resolved.yaml").write_text(text)
    with pytest.raises(UnlearnError):
        board_runs.read_run(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".x", "", "a\nb", "a\\b", 3, None])
@pytest.mark.parametrize("key", ["jobs", "preparations"])
def test_a_grid_whose_jobs_lead_elsewhere(tmp_path: Path, key: str, name: Any) -> None:
    """Folders, logs and states of jobs are called by these names."""
    data = json.loads(GRID)
    data[key][0]["name"] = name
    (tmp_path / "grid.json").write_text(json.dumps(data))
    with pytest.raises(GridError, match="no name of a job"):
        Grid.load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", '{"schema": 1}', '{"schema": 1, "state": 3, "x": 1}'])
def test_states_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "j.json").write_text(text)
    assert JobState.load(tmp_path, "j") is None


def test_choices_nested_too_deeply_in_a_csv_cell(tmp_path: Path) -> None:
    """One message, which the target expects; it was a RecursionError."""
    TARGETS["csv"].read(f'question,answer,choices,n\nq,A,"{"[" * 100_000}",1\n'.encode(), tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_true_inputs_are_read(name: str, tmp_path: Path) -> None:
    """A target that refused everything would find nothing."""
    for number, seed in enumerate(TARGETS[name].seeds):
        place = tmp_path / str(number)
        place.mkdir()
        TARGETS[name].read(seed, place)
