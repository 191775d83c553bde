"""A data file from a stranger: whatever is in it is data, and what cannot be read is one clear message."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hostile import ESCAPES, JINJA, SCRIPT, Touch, pickled, torch_file

from unlearn.data.files import read_file, read_placed
from unlearn.data.sets import load_sets
from unlearn.errors import DataError
from unlearn.recipe import data as template
from unlearn.recipe.data import DataSet, Source
from unlearn.recipe.schema import Recipe


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def object_array(canary: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Touch(canary)], dtype=object), allow_pickle=True)
    return out.getvalue()


KNOWN = ("json", "jsonl", "csv", "parquet", "txt")


@pytest.mark.parametrize("make", [pickled, torch_file, object_array])
@pytest.mark.parametrize("name", [*KNOWN, "pkl", "pt", "npy", "npz", "bin", "arrow", "jsonl.pkl", "tar"])
def test_no_pickle_is_opened_whatever_its_name(tmp_path: Path, name: str, make: Callable[[Path], bytes]) -> None:
    canary, said = tmp_path / "canary", ""
    try:
        read_file(write(tmp_path / f"d.{name}", make(canary)))
    except DataError as error:
        said = str(error)
    assert said or name in ("txt", "csv")  # where any UTF-8 is a text
    assert ("cannot tell the format" in said) == (name not in KNOWN)
    assert not canary.exists()


def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.jsonl", "zero.json"):
        with pytest.raises(DataError, match="not a regular file"):
            read_file(tmp_path / name)


@pytest.mark.parametrize(
    "value", ["1" + "0" * 400, "-1" + "0" * 4000, "NaN", "Infinity", "1e999", '"' + "9" * 400 + '"']
)
def test_numbers_beyond_any_float_are_compared_all_the_same(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "d.jsonl", f'{{"n": {value}, "q": "a"}}\n{{"n": 1, "q": "b"}}\n')
    for where in ({"n": 1}, {"n": 1.0}, {"n": {"above": 0.5, "below": 2.5}}):
        rows = read_placed(Source.model_validate_json(json.dumps({"path": str(path), "where": where})), tmp_path)
        assert [row.values["q"] for row in rows] == ["b"]


@pytest.mark.parametrize("name", ["hub:..", "hub:../..", "hub:/etc", "hub:.", "hub:a/..", "hub:a/b/c", "hub:./a"])
def test_a_hub_name_is_no_way_to_local_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is written hub:OWNER/NAME"):
        read_placed(Source(path=name), tmp_path)


@pytest.mark.parametrize(
    "text", [JINJA, SCRIPT, ESCAPES, "{question.__class__}", "{0}", "{{question}}", "%s %(x)s", "$(touch x)"]
)
def test_what_looks_like_a_program_is_text(tmp_path: Path, text: str) -> None:
    rows = [{"question": f"{text} {n}", "answer": f"{text} a{n}"} for n in range(8)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    forget = {"kind": "qa", "path": "d.jsonl", "shares": {"train": "all", "test": 0.5, "validation": 0.5}}
    recipe = {"name": "x", "model": {"path": "pico:phi"}, "forget": forget | {"prompt": "{question}"}}
    (loaded,) = load_sets(Recipe.model_validate_json(json.dumps(recipe)), tmp_path)
    items = {(item.prompt, item.target) for item in loaded.train}
    assert items == {(f"{text} {n}".strip(), f"{text} a{n}".strip()) for n in range(8)}


@pytest.mark.parametrize(
    "prompt",
    [
        *("{question.__class__.__mro__}", "{question[0]}", "{question!r}", "{question:>1000000000}", "{}", "{question"),
        *("{0.__init__.__globals__}", "{__class__.__base__}", "{question:{question}}"),
    ],
)
def test_prompts_reach_into_no_object(prompt: str) -> None:
    with pytest.raises(ValueError):
        template.render(prompt, {"question": "a"})
    with pytest.raises(ValueError):
        DataSet.model_validate({"kind": "qa", "path": "x.jsonl", "prompt": prompt}) and template.template_fields(prompt)


def test_prompts_know_only_columns() -> None:
    with pytest.raises(ValueError, match="no column"):
        template.render("{__class__}", {"question": "a"})
    assert template.render("{question} {{x}}", {"question": "{answer} {{y}}", "answer": "b"}) == "{answer} {{y}} {x}"
