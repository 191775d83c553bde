"""The cache never serves half an entry, whatever happened to the process that made it."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from unlearn.cache import MANIFEST, cache_folder, check_sha256, entry, offline, require_space, whole
from unlearn.errors import ModelError


def _fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("abc")


def _never(folder: Path) -> None:
    raise AssertionError("filled again")


def test_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNLEARN_CACHE")
    assert cache_folder() == tmp_path / ".cache" / "unlearn"
    assert offline()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert not offline()
    monkeypatch.setenv("UNLEARN_OFFLINE", "1")
    assert offline()


def test_entry_is_made_once_with_sizes_and_checksums(tmp_path: Path) -> None:
    folder = entry(tmp_path / "new", "k", _fill)
    assert entry(tmp_path / "new", "k", _never) == folder == tmp_path / "new" / "k"
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert json.loads((folder / MANIFEST).read_text())["files"] == {"sub/a.txt": {"size": 3, "sha256": abc}}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["k"]


@pytest.mark.parametrize("damage", ["no manifest", "file cut", "file gone", "manifest cut", "not a folder"])
def test_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = entry(tmp_path, "k", _fill)
    if damage == "no manifest":
        (folder / MANIFEST).unlink()
    elif damage == "file cut":
        (folder / "sub" / "a.txt").write_text("ab")
    elif damage == "file gone":
        (folder / "sub" / "a.txt").unlink()
    elif damage == "manifest cut":
        (folder / MANIFEST).write_text('{"files": {')
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("in the way")
    assert not whole(folder)
    entry(tmp_path, "k", _fill)
    assert whole(folder)
    assert (folder / "sub" / "a.txt").read_text() == "abc"


def test_failure_leaves_nothing_and_old_leftovers_are_swept(tmp_path: Path) -> None:
    old, young = tmp_path / ".part-old", tmp_path / ".part-young"
    for leftover in (old, young):
        leftover.mkdir()
        (leftover / "big").write_text("x")
    os.utime(old, (time.time() - 1e6,) * 2)

    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ModelError("no")

    with pytest.raises(ModelError, match=r"^no$"):
        entry(tmp_path, "k", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".part-young"]


def test_of_two_at_once_the_slower_takes_the_other_s(tmp_path: Path) -> None:
    barrier = threading.Barrier(4, timeout=20)
    made: list[Path] = []

    def fill(folder: Path) -> None:
        (folder / "who").write_text(folder.name)
        barrier.wait()

    workers = [threading.Thread(target=lambda: made.append(entry(tmp_path, "k", fill))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert made == [tmp_path / "k"] * 4
    assert whole(tmp_path / "k")
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_names_the_folder(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        Path("/dev/full").write_text("x" * 10)

    with pytest.raises(ModelError, match=f"no space left in the cache folder {tmp_path}.*UNLEARN_CACHE"):
        entry(tmp_path, "k", fill)


def test_too_little_space_says_how_much(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"5,000,000,000,000 MB are needed"):
        require_space(tmp_path, 5 * 10**18)
    require_space(tmp_path, 1)


def test_cache_in_a_place_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written.*UNLEARN_CACHE"):
        entry(tmp_path / "file" / "cache", "k", _fill)


def test_checksums_differ(tmp_path: Path) -> None:
    check_sha256("x", "ab", "ab")
    with pytest.raises(ModelError, match=r"(?s)x is not.*wanted ab.*found  cd"):
        check_sha256("x", "ab", "cd")
