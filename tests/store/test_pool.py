"""Stages that runs share: made once, taken by content, never damaged by who takes them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn import errors, run
from unlearn.recipe.schema import Recipe
from unlearn.store.stages import Pool, read_record, seal

KEY = "5" * 64
SPLIT = {"train": "all", "validation": 0.5, "test": 0.5}
RECIPE = {
    "name": "shared",
    "model": {"path": "pico:llama"},
    "forget": {"kind": "qa", "path": "forget.jsonl", "shares": SPLIT},
    "retain": [{"kind": "qa", "path": "retain.jsonl", "shares": SPLIT}],
    "teach": {"steps": 4, "batch_size": 4},
    "vector": {"forget": {"steps": 2}, "lora": {"rank": 2}},
    "sweep": {"coefficients": [1.0]},
    "choose": {"keep": 0.0},
    "export": {"merged": False, "adapter": False},
    "reference": "train",
}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "target"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "inner" / "note.txt").write_text("a")
    seal(folder, KEY, 1.5)
    return folder


def put(pool: Pool, stage: Path) -> None:
    with pool.making(KEY) as lock:
        assert lock is not None
        pool.put(KEY, stage, lock)


def test_what_is_put_costs_no_copy_and_is_found_until_it_is_damaged(
    tmp_path: Path, stage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, copy = Pool(tmp_path / "pool"), shutil.copytree(stage, tmp_path / "copy")
    assert pool.find(KEY) is None
    put(pool, stage)
    found = pool.find(KEY)
    assert found is not None
    assert (found / "weights.bin").stat().st_ino == (stage / "weights.bin").stat().st_ino
    assert (found / "inner" / "note.txt").read_text() == "a"
    assert read_record(found) == read_record(stage)
    assert sorted(p.name for p in pool.root.iterdir()) == [".locks", KEY]
    found.rename(pool.root / ("6" * 64))
    assert pool.find("6" * 64) is None  # it is another key's
    put(pool, stage)
    (pool.root / KEY / "weights.bin").write_bytes(bytes(256))
    assert pool.find(KEY) is None
    assert "SHA-256 differs" in capsys.readouterr().err
    put(pool, copy)
    assert pool.find(KEY) == pool.root / KEY


def test_without_hard_links_files_are_copied(tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    pool = Pool(tmp_path / "pool")
    put(pool, stage)
    found = pool.find(KEY)
    assert found is not None
    assert (found / "weights.bin").stat().st_nlink == 1
    assert (found / "weights.bin").read_bytes() == bytes(range(256))


def test_a_pool_that_is_a_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "pool").write_text("")
    with pytest.raises(errors.RunFolderError, match="pool"), Pool(tmp_path / "pool").making(KEY):
        pass


def _recipe(folder: Path) -> Recipe:
    for name, answer in (("forget", "x"), ("retain", "y")):
        rows = [{"question": f"{name} {i}", "answer": f"{answer}{i}"} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Recipe.model_validate_json(json.dumps(RECIPE))


def test_runs_take_what_a_preparation_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def taken() -> set[str]:
        return {line.split(":")[0].strip() for line in capsys.readouterr().err.splitlines() if "taken from" in line}

    monkeypatch.chdir(tmp_path)
    first = _recipe(tmp_path)
    other = first.model_copy(update={"sweep": first.sweep.model_copy(update={"coefficients": (2.0,)})})
    assert run(first, out="prepared", pool="pool", prepare=True) is None
    assert {p.name for p in Path("prepared").iterdir()} >= {"target", "reference"}
    assert not Path("prepared/vectors").exists()
    taken()

    shared = run(first, out="a", pool="pool")
    assert taken() == {"target", "reference"}
    assert Path("a/target/model.safetensors").stat().st_nlink >= 3  # the preparation, the pool, this run
    alone = run(first, out="alone")
    assert taken() == set()  # not asked to share
    assert shared is not None
    assert alone is not None
    assert (shared.scores, shared.vector) == (alone.scores, alone.vector)

    run(other, out="c", pool="pool")
    # with what was fitted, by the first run that needed it
    assert taken() == {"target", "reference", "vectors/forget", "vectors/near-retain"}
    run(first.model_copy(update={"seed": 1}), out="d", pool="pool", prepare=True)
    assert taken() == set()  # another seed is another teaching


@pytest.mark.slow  # two processes, 20 seconds
def test_two_runs_at_once_make_a_shared_stage_once(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    (tmp_path / "shared.yaml").write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    command = [sys.executable, "-m", "unlearn.run", "--recipe", "shared.yaml", "--pool", "pool", "--prepare", "--out"]
    both = [
        subprocess.Popen([*command, name], cwd=tmp_path, stderr=subprocess.PIPE, text=True) for name in ("one", "two")
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    taken = [sum("target: taken from" in line for line in text.splitlines()) for text in said]
    assert sorted(taken) == [0, 1]
    inodes = {(tmp_path / name / "target" / "model.safetensors").stat().st_ino for name in ("one", "two")}
    assert len(inodes) == 1
