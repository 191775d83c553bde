"""Files are read once per host and boot, and again after whatever was done to them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from unlearn.errors import UnlearnError
from unlearn.store import cache as seen
from unlearn.store.stages import damage_of, read_record, seal

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # sha256sum of hello
FILES = {"a": (5, HELLO), "b/c": (5, HELLO)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "f" / "b").mkdir(parents=True)
    for name in FILES:
        (tmp_path / "f" / name).write_text("hello")
    return tmp_path / "f"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read to their end."""
    found: list[str] = []
    real = seen.sha256_of

    def noting(path: Path) -> str:
        found.append(path.name)
        return real(path)

    monkeypatch.setattr(seen, "sha256_of", noting)
    return found


def look(folder: Path) -> str | None:
    return seen.damage(folder, FILES, folder.parent / "notes", "k")


def rewrite(path: Path) -> None:
    path.write_text("hellp")


def rewrite_and_hide_it(path: Path) -> None:
    before = path.stat()
    path.write_text("hellp")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    before = path.stat()
    path.with_name("new").write_text("hellp")
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new").rename(path)


def test_once_and_then_no_more(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(folder) is None
    assert reads == ["a", "c"]
    assert look(folder) is None
    assert reads == ["a", "c"]
    (folder / "a").touch()
    assert look(folder) is None
    assert reads == ["a", "c", "a"]
    monkeypatch.setenv("UNLEARN_VERIFY", "full")
    assert look(folder) is None
    assert reads == ["a", "c", "a", "a", "c"]


def test_another_boot_or_host_reads_for_itself(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    look(folder)
    monkeypatch.setattr("unlearn.store.cache.this_boot", lambda: "another")
    look(folder)
    assert reads == ["a", "c"] * 2
    monkeypatch.setattr("unlearn.store.cache._HOSTS", 3)
    for boot in range(6):
        monkeypatch.setattr("unlearn.store.cache.this_boot", lambda boot=boot: f"boot {boot}")
        look(folder)
    look(folder)
    assert reads == ["a", "c"] * 8
    assert len(list((folder.parent / "notes").iterdir())) == 3


@pytest.mark.parametrize("harm", [rewrite, rewrite_and_hide_it, replace])
def test_every_way_of_changing_a_file_is_seen(folder: Path, harm: Callable[[Path], None]) -> None:
    assert look(folder) is None
    harm(folder / "b" / "c")
    assert look(folder) == "the content of b/c has changed (SHA-256 differs)"
    assert look(folder) == "the content of b/c has changed (SHA-256 differs)"  # what is wrong is not noted as right


def test_other_damage(folder: Path) -> None:
    look(folder)
    (folder / "a").write_text("hello!")
    assert look(folder) == "a has 6 bytes instead of 5"
    (folder / "a").unlink()
    assert look(folder) == "a is missing"
    (folder / "a").mkdir()
    assert "bytes instead of 5" in str(look(folder))


def test_only_full_finds_what_changed_beneath_the_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that flips on the disk: the content is another, and nothing in the inode tells."""
    look(folder)
    note = next((folder.parent / "notes").iterdir())
    rewrite(folder / "a")
    found = (folder / "a").stat()
    data = json.loads(note.read_text())
    data["files"]["a"][1:] = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    note.write_text(json.dumps(data))
    assert look(folder) is None
    monkeypatch.setenv("UNLEARN_VERIFY", "full")
    assert look(folder) == "the content of a has changed (SHA-256 differs)"


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files": {"a": null}}'])
def test_a_note_that_cannot_be_read_is_no_note(folder: Path, reads: list[str], text: str) -> None:
    look(folder)
    next((folder.parent / "notes").iterdir()).write_text(text)
    assert look(folder) is None
    assert reads == ["a", "c"] * 2


def test_where_nothing_can_be_noted_all_is_read(folder: Path, reads: list[str]) -> None:
    (folder.parent / "notes").write_text("in the way")
    assert look(folder) is None
    assert look(folder) is None
    assert reads == ["a", "c"] * 2


def test_what_was_just_written_counts_as_read(folder: Path, reads: list[str]) -> None:
    (folder.parent / "notes").mkdir()
    seen.remember(folder, FILES, folder.parent / "notes", "k")
    assert look(folder) is None
    assert reads == []


def test_a_word_that_means_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_VERIFY", "ful")
    with pytest.raises(UnlearnError, match=r"UNLEARN_VERIFY is once .* not 'ful'"):
        look(folder)


def test_stages_may_be_looked_at_the_same_way(folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seal(folder, "k" * 64, 1.0)
    record = read_record(folder)
    assert record is not None
    notes = folder.parent / "notes"
    for _ in range(2):
        assert damage_of(folder, record, "once", notes) is None
    assert reads == ["a", "c"]
    assert damage_of(folder, record, "once") is None  # nowhere to note it
    assert damage_of(folder, record, "sha256", notes) is None
    assert reads == ["a", "c"] * 3
    monkeypatch.setattr("unlearn.store.stages._SMALL", 1)
    assert damage_of(folder, record, "size") is None
    assert reads == ["a", "c"] * 3
    rewrite(folder / "a")
    assert damage_of(folder, record, "size") is None
    assert damage_of(folder, record, "once", notes) == "the content of a has changed (SHA-256 differs)"
    monkeypatch.setenv("UNLEARN_VERIFY", "full")
    assert damage_of(folder, record, "size") == "the content of a has changed (SHA-256 differs)"
