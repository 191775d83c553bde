"""The cache never serves half an entry, whatever happened to the process that made it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import start, until

from unlearn.errors import ModelError, UnlearnError
from unlearn.model.load import load
from unlearn.recipe.schema import ModelSpec
from unlearn.store.cache import MANIFEST, cache_folder, check_sha256, condensed, entry, offline, require_space, whole
from unlearn.store.lock import Lock


def _fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_text("abc")


def _places(cache: Path) -> list[str]:
    """What is in a cache, without the folder of its locks; no lock is left in it."""
    assert list((cache / ".locks").iterdir()) == []
    return sorted(path.name for path in cache.iterdir() if path.name != ".locks")


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
    found = (folder / "sub" / "a.txt").stat()
    said = json.loads((folder / MANIFEST).read_text())["files"]
    assert said == {"sub/a.txt": {"size": 3, "times": [found.st_mtime_ns, found.st_ctime_ns], "sha256": abc}}
    assert _places(tmp_path / "new") == ["k"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "manifest cut": lambda folder: (folder / MANIFEST).write_text('{"files": {'),
    "file cut": lambda folder: (folder / "sub" / "a.txt").write_text("ab"),
    "file gone": lambda folder: (folder / "sub" / "a.txt").unlink(),
    "not a folder": lambda folder: (folder.rename(f"{folder}-else"), folder.write_text("in the way")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_made_again(tmp_path: Path, damage: str) -> None:
    folder = entry(tmp_path, "k", _fill)
    DAMAGES[damage](folder)
    assert not whole(folder)
    entry(tmp_path, "k", _fill)
    assert whole(folder)
    assert (folder / "sub" / "a.txt").read_text() == "abc"


def test_failure_leaves_nothing_and_is_not_remembered(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ModelError("no")

    with pytest.raises(ModelError, match=r"^no$"):
        entry(tmp_path, "k", fail)
    assert _places(tmp_path) == []
    entry(tmp_path, "k", _fill)
    assert _places(tmp_path) == ["k"]


def test_half_filled_folders_are_removed_when_their_maker_is_gone_whatever_their_age(tmp_path: Path) -> None:
    """The age of a folder says nothing where clocks jump: its maker's lock says all."""
    entry(tmp_path, "k", _fill)
    old, young, other, foreign = (
        tmp_path / name for name in (".part-used.1-0a1b2c3d", ".part-k2.1-0a1b2c3d", ".part-k3.2-0a1b2c3d", ".part-x")
    )
    for leftover in (old, young, other, foreign):
        leftover.mkdir()
        (leftover / "big").write_text("x")
    os.utime(old, (0, 0))
    with Lock.take(tmp_path / ".locks" / "used"):
        entry(tmp_path, "k2", _fill)
        # k3's maker is dead, as nobody holds its lock; who .part-x belongs to cannot be told
        assert sorted(path.name for path in tmp_path.glob(".part*")) == [old.name, foreign.name]
    entry(tmp_path, "k4", _fill)
    assert [path.name for path in tmp_path.glob(".part*")] == [foreign.name]


PRELUDE = """
from pathlib import Path
cache, marks = Path(sys.argv[1]), Path(sys.argv[2])
from unlearn.store.cache import entry
from unlearn.errors import UnlearnError

def fill(folder):
    (folder / "a.txt").write_text(str(os.getpid()))
    (marks / f"{os.getpid()}").touch()
    wait(folder)

def wait(folder):
    time.sleep(0.1)
"""


def _start(code: str, cache: Path, marks: Path, **environment: str) -> subprocess.Popen[str]:
    marks.mkdir(exist_ok=True)
    return start(PRELUDE + code, cache, marks, **environment)


def test_of_six_processes_one_makes_it_also_after_one_that_was_killed(tmp_path: Path) -> None:
    cache, marks = tmp_path / "cache", tmp_path / "marks"
    first = _start("wait = lambda folder: time.sleep(60)\nentry(cache, 'k', fill)", cache, marks)
    until(lambda: bool(list(marks.iterdir())), 30)
    others = [_start("print((entry(cache, 'k', fill) / 'a.txt').read_text())", cache, marks) for _ in range(5)]
    time.sleep(0.3)
    assert len(list(marks.iterdir())) == 1
    assert [path.name for path in cache.glob(".part-k.*")]
    first.kill()
    first.communicate()
    said = [process.communicate(timeout=60) for process in others]
    maker = (cache / "k" / "a.txt").read_text()
    assert [out for out, _ in said] == [f"{maker}\n"] * 5, said
    assert sorted(path.name for path in marks.iterdir()) == sorted([str(first.pid), maker])
    assert maker in {str(process.pid) for process in others}
    assert _places(cache) == ["k"]


@pytest.mark.parametrize("then", ["pass", pytest.param("(folder / 'b.txt').write_text('x')", marks=pytest.mark.slow)])
def test_a_maker_that_is_stopped_and_wakes_after_another_took_over(tmp_path: Path, then: str) -> None:
    """What it has half made goes; it takes the other's and replaces nothing."""
    cache, marks = tmp_path / "cache", tmp_path / "marks"
    code = f"""
def wait(folder):
    while not (marks / "go").exists():
        time.sleep(0.01)
    {then}
print((entry(cache, "k", fill) / "a.txt").read_text())
"""
    sleeper = _start(code, cache, marks, UNLEARN_LOCK_TIMEOUT="1", FAR="1")
    until(lambda: (marks / str(sleeper.pid)).exists(), 30)
    sleeper.send_signal(signal.SIGSTOP)
    taker = _start("entry(cache, 'k', fill)", cache, marks, UNLEARN_LOCK_TIMEOUT="1")
    _, trouble = taker.communicate(timeout=60)
    assert taker.returncode == 0, trouble
    assert "has given no sign of life" in trouble
    made = (cache / "k").stat().st_ino
    (marks / "go").touch()
    sleeper.send_signal(signal.SIGCONT)
    out, trouble = sleeper.communicate(timeout=60)
    assert out == f"{taker.pid}\n", trouble
    assert "another one makes it by now" in trouble
    assert (cache / "k").stat().st_ino == made
    assert _places(cache) == ["k"]


@pytest.mark.parametrize("hidden", [False, True], ids=["time and size stay", "beneath the file system"])
def test_changed_content_is_found_and_mended_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    """Of a bit that flips beneath the file system nothing tells: only ``UNLEARN_VERIFY=full`` reads every byte."""
    folder = entry(tmp_path, "k", _fill)
    file = folder / "sub" / "a.txt"
    before = file.stat()
    file.write_text("abd")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert whole(folder)  # as far as sizes go
    if hidden:
        said = json.loads((folder / MANIFEST).read_text())
        said["files"]["sub/a.txt"]["times"] = [file.stat().st_mtime_ns, file.stat().st_ctime_ns]
        (folder / MANIFEST).write_text(json.dumps(said))
        entry(tmp_path, "k", _never)
        monkeypatch.setenv("UNLEARN_VERIFY", "full")
    entry(tmp_path, "k", _fill)
    heard = capsys.readouterr().err
    assert heard == f"{folder}: the content of sub/a.txt has changed (SHA-256 differs); it is made again\n"
    assert file.read_text() == "abc"
    monkeypatch.delenv("UNLEARN_VERIFY", raising=False)
    os.utime(file, (0, 0))
    entry(tmp_path, "k", _never)  # only touched, which is noted
    assert json.loads((folder / MANIFEST).read_text())["files"]["sub/a.txt"]["times"][0] == 0
    monkeypatch.setenv("UNLEARN_VERIFY", "ful")
    with pytest.raises(UnlearnError, match=r"UNLEARN_VERIFY is once .* not 'ful'"):
        entry(tmp_path, "k", _fill)


def test_what_is_damaged_stays_for_those_who_use_it(tmp_path: Path, pico_phi: Path) -> None:
    """A file that is mapped into a job's memory is never cut or rewritten: the job would die of it, or go on wrong."""

    def fill(folder: Path) -> None:
        shutil.copy(pico_phi / "model.safetensors", folder / "model.safetensors")

    folder = entry(tmp_path, "k", fill)
    place = folder / "model.safetensors"
    content, inode = place.read_bytes(), place.stat().st_ino
    with place.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        (folder / MANIFEST).write_text("{}")
        entry(tmp_path, "k", fill)
        assert place.stat().st_ino != inode
        assert mapped[:] == content == place.read_bytes()
        aside = list(tmp_path.glob(".damaged-*/k/model.safetensors"))
        assert [path.stat().st_ino for path in aside] == [inode]  # on NFS it would be gone for other hosts otherwise
    entry(tmp_path, "other", _fill)
    assert aside[0].exists()
    os.utime(aside[0].parent.parent, (time.time() - 2 * 86400,) * 2)
    entry(tmp_path, "another", _fill)
    assert not list(tmp_path.glob(".damaged-*"))


def test_a_whole_cache_that_cannot_be_written_serves() -> None:
    """As whoever may not write there: as root nothing is forbidden."""
    code = """
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
print(entry(cache, "k", None))
for key in ("damaged", "new"):
    try:
        entry(cache, key, fill)
    except UnlearnError as e:
        print(e)
"""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own no other user reaches
        Path(folder).chmod(0o755)
        cache, marks = Path(folder) / "cache", Path(folder) / "marks"
        for key in ("k", "damaged"):
            entry(cache, key, _fill)
        (cache / "damaged" / "sub" / "a.txt").write_text("abd")
        for place in (cache, cache / ".locks"):
            place.chmod(0o555)
        out, trouble = _start(code, cache, marks).communicate(timeout=60)
        for place in (cache, cache / ".locks"):
            place.chmod(0o755)
    assert not trouble
    said = out.splitlines()
    assert said[0] == str(cache / "k"), trouble
    why = f"the cache folder {cache} cannot be written (Permission denied), and "
    assert said[1].startswith(f"{why}damaged is damaged: the content of sub/a.txt has changed")
    assert said[2] == f"{why}new is not in it. Set UNLEARN_CACHE to another folder"


@pytest.mark.parametrize(
    "failure", [ModelError("x"), OSError(errno.ESTALE, "Stale"), RuntimeError("No such file or directory (os error 2)")]
)
def test_a_cache_that_goes_while_it_is_filled(tmp_path: Path, failure: Exception) -> None:
    def fill(folder: Path) -> None:
        (tmp_path / "cache").rename(tmp_path / "unmounted")
        raise failure

    with pytest.raises(ModelError) as caught:
        entry(tmp_path / "cache", "k", fill)
    assert f"the cache folder {tmp_path / 'cache'} was removed, or its disk is out of reach" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_messages_about_the_cache_name_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(ModelError, match=f"no space left in the cache folder {tmp_path}.*UNLEARN_CACHE"):
        entry(tmp_path, "k", fill)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot be written.*UNLEARN_CACHE"):
        entry(tmp_path / "file" / "cache", "k", _fill)
    with pytest.raises(ModelError, match=r"5,000,000,000,000 MB are needed"):
        require_space(tmp_path, 5 * 10**18)
    require_space(tmp_path, 1)
    check_sha256("x", "ab", "ab")
    with pytest.raises(ModelError, match=r"(?s)x is not.*wanted ab.*found  cd"):
        check_sha256("x", "ab", "cd")
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"gone while it was in use.*UNLEARN_CACHE"):
        load(ModelSpec(path="pico:phi"), str(tmp_path / "pico-phi"))


def test_long_messages_are_cut() -> None:
    assert condensed(ValueError("a\n  b.")) == "a b"
    assert condensed(ValueError()) == "ValueError"
    assert len(condensed(ValueError("x" * 1000))) == 303
