"""The run folder under kills, damage, rivals and strangers: with real processes and real files."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import running, start

from unlearn.errors import RunFolderError
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.load import open_run, resolved_yaml
from unlearn.recipe.schema import Recipe
from unlearn.store.files import fingerprint, unique, write_json_atomic, write_text_atomic
from unlearn.store.stages import LOCK, TEMPORARY, WORK, RunFolder, StageRecord, read_record

TEXT = "name: demo  # as written\n"
PRELUDE = """
from pathlib import Path
from unlearn.recipe.schema import Recipe
from unlearn.recipe.load import open_run

recipe = Recipe.model_validate({"name": "demo", "model": {"path": "m"}, "forget": {"path": "f.txt", "kind": "text"}})
root = Path(sys.argv[1])
"""
HOLD = f"""{PRELUDE}
with open_run(root, recipe, "text") as folder:
    print("ready", flush=True)
    time.sleep(60)
"""


def recipe(**more: object) -> Recipe:
    return Recipe.model_validate(
        {"name": "demo", "model": {"path": "m"}, "forget": {"path": "f.txt", "kind": "text"}, **more}
    )


def make(folder: RunFolder, name: str = "vectors/forget", key: str = "k", content: str = "data") -> Path:
    with folder.writing(name, key) as tmp:
        (tmp / "sub").mkdir()
        (tmp / "a.bin").write_text(content)
        (tmp / "sub" / "b.bin").write_text("more")
    place = folder.finished(name, key)
    assert place is not None
    return place


def files_under(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if not p.is_dir()}


# opening


def test_default_place_and_what_is_written(tmp_path: Path) -> None:
    r = recipe()
    with (
        open_run(None, r, TEXT, base=tmp_path / "runs") as folder,
        open_run(None, recipe(seed=1), TEXT, base=tmp_path / "runs") as other,
    ):
        what = r.model_dump(mode="json", exclude={"cluster"})
        assert folder.root == tmp_path / "runs" / f"demo-{fingerprint(what)[:8]}" != other.root
        assert (folder.root / "recipe.yaml").read_text() == TEXT
        assert (folder.root / "resolved.yaml").read_text() == resolved_yaml(r)
        assert (folder.root / LOCK).exists()
        place = make(folder)
    assert files_under(folder.root) >= {"recipe.yaml", "resolved.yaml"}
    (folder.root / f"{LOCK}").write_text("")  # what a kill may leave
    (folder.root / ".resolved.yaml.123-0a1b2c3d.tmp").write_text("half")
    half = folder.root / "figures" / f".frontier.png.{unique()}.tmp"
    half.parent.mkdir()
    half.write_text("half")
    with open_run(folder.root, r, "name: demo # same recipe, other comment\n") as folder:
        assert folder.finished("vectors/forget", "k") == place
        assert "other comment" in (folder.root / "recipe.yaml").read_text()
    assert not half.exists()
    half.write_text("half")
    open_run(folder.root, r, TEXT, fresh=True).close()
    assert not half.exists(), "no stranger's"
    assert {name for name in files_under(folder.root) if "/" not in name} == {"recipe.yaml", "resolved.yaml"}


def test_a_folder_in_which_nothing_was_made_is_anybody_s(tmp_path: Path) -> None:
    """A mistake ended the run: the recipe is mended, and the command given again."""
    open_run(tmp_path, recipe(), TEXT).close()
    (tmp_path / "resolved.yaml").write_text("[]\n")
    with open_run(tmp_path, recipe(seed=1), TEXT) as folder:
        assert (tmp_path / "resolved.yaml").read_text() == resolved_yaml(recipe(seed=1))
        (folder.work("target", "k") / "checkpoint-1").mkdir()  # half a training is something
    with pytest.raises(RunFolderError, match="another recipe"):
        open_run(tmp_path, recipe(), TEXT)


def test_another_recipes_folder_is_refused_and_named(tmp_path: Path) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        make(folder)
    retain = {"path": "r.txt", "kind": "text"}
    other = recipe(seed=7, sweep={"coefficients": (0.5,)}, eval={"examples": 2}, description="x", retain=(retain,))
    with pytest.raises(RunFolderError) as caught:
        open_run(tmp_path, other, TEXT)
    message = str(caught.value)
    for part in ("seed: 0 there, 7 here", "retain.0.path: not set there, 'r.txt' here", " more\n", "--out", "--fresh"):
        assert part in message
    assert message.count(" there, ") == 5
    assert not (tmp_path / LOCK).exists()  # refused, so nobody's
    assert (tmp_path / "resolved.yaml").read_text() == resolved_yaml(recipe())
    with pytest.raises(RunFolderError) as caught:
        open_run(tmp_path, recipe(sweep={"coefficients": (0.5,)}), TEXT)
    assert "\n  sweep.coefficients: [0.25, 0.5, 0.75, 1.0] there, [0.5] here\nUse another" in str(caught.value)


Data = dict[str, Any]
MINE: Data = {"retain": ({"path": "r.txt", "kind": "text"},), "eval": {"examples": 2}}
# what an older or newer version's file says otherwise, with which recipe the folder is opened, and what is said of it
OTHER_FILES: dict[str, tuple[Callable[[Data], object] | str, Data, str]] = {
    "a block that came later counts as its default": (lambda d: d.pop("holdout"), MINE, ""),
    "a block with keys of its own": (lambda d: d.pop("export"), MINE, ""),
    "a key in a block": (lambda d: d["eval"].pop("batch_size"), MINE, ""),
    "a key in a list": (lambda d: d["retain"][0].pop("name"), MINE, ""),
    "all of them": (lambda d: (d.pop("holdout"), d["eval"].pop("batch_size"), d["retain"][0].pop("name")), MINE, ""),
    "where it runs never matters": (lambda d: d.update(cluster={"gpus": 8, "unheard": "of"}), MINE, ""),
    "nor here": (lambda d: None, MINE | {"cluster": {"gpus": 1, "setup": ("module load x",)}}, ""),
    "a key that came later and is no default here": (
        lambda d: (d.pop("holdout"), d.pop("seed")),
        MINE | {"seed": 3},
        r"\n  seed: 0 there, 3 here\nUse another",
    ),
    "no default": (lambda d: d["model"].pop("path"), MINE, r"model\.path: not set there, 'm' here"),
    "a newer key": (lambda d: d.update(quantum=True), MINE, r"\n  quantum: True there, not set here\nUse"),
    "a newer one in a block": (
        lambda d: d["model"].update(quantum=None),
        MINE,
        r"\n  model\.quantum: None there, not set here\nUse",
    ),
    **{f"no recipe: {text!r}": (text, MINE, "another recipe|cannot be read") for text in ("", "[]\n", "a: [1\n")},
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_the_recipe_of_a_folder_is_compared(tmp_path: Path, what: str) -> None:
    change, wanted, said = OTHER_FILES[what]
    with open_run(tmp_path, recipe(**MINE), TEXT) as folder:
        make(folder)
    place = tmp_path / "resolved.yaml"
    if callable(change):
        data = yaml_core.parse(place.read_text()).data
        change(data)
        change = yaml_core.dump(data)
    place.write_text(change)
    if said:
        with pytest.raises(RunFolderError, match=said):
            open_run(tmp_path, recipe(**wanted), TEXT)
    else:
        open_run(tmp_path, recipe(**wanted), TEXT).close()
        assert place.read_text() == resolved_yaml(recipe(**wanted))


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RunFolderError, match=r"not the folder of a run \(it holds thesis.tex\)"):
            open_run(tmp_path, recipe(), TEXT, fresh=fresh)
    assert files_under(tmp_path) == {"thesis.tex"}


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="is not a folder"):
        open_run(tmp_path / "file", recipe(), TEXT)
    with pytest.raises(RunFolderError, match=r"Not a directory.*--out"):
        open_run(tmp_path / "file" / "below", recipe(), TEXT)


# fresh


def test_fresh_removes_another_run_whole_also_with_a_damaged_seal(tmp_path: Path) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        make(folder)
        (make(folder, "target") / "stage.json").write_text("{")
        (folder.work("target", "k") / "checkpoint").write_text("x")
        write_json_atomic(folder.path("report.json"), {})
    with open_run(tmp_path, recipe(seed=1), TEXT, fresh=True) as folder:
        assert folder.finished("vectors/forget", "k") is None
        assert files_under(tmp_path) == {"recipe.yaml", "resolved.yaml", LOCK}
        assert not (tmp_path / WORK).exists()


@pytest.mark.parametrize("where", ["notes.txt", "vectors/notes.txt", "vectors/forget/sub/n.txt", "figures/notes.txt"])
def test_fresh_never_removes_a_foreign_file(tmp_path: Path, where: str) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        make(folder)
    (tmp_path / "figures").mkdir()
    for name in (where, "figures/frontier.pdf"):
        (tmp_path / name).write_text("mine")
    before = files_under(tmp_path)
    with pytest.raises(RunFolderError, match=where):
        open_run(tmp_path, recipe(), TEXT, fresh=True)
    assert files_under(tmp_path) == before


# stages


def test_a_stage_is_found_under_its_key_only_and_replaced_whole(tmp_path: Path) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        assert folder.finished("eval/0.5", "k") is None
        place = make(folder, "eval/0.5", "k")
        assert place == tmp_path / "eval" / "0.5"
        assert folder.finished("eval/0.5", "other") is None
        record = read_record(place)
        assert record is not None
        assert (record.key, set(record.files)) == ("k", {"a.bin", "sub/b.bin"})
        assert record.seconds >= 0
        with folder.writing("eval/0.5", "new") as tmp:
            (tmp / "c.bin").write_text("new")
            assert folder.finished("eval/0.5", "k") is not None  # until the very end
        assert folder.finished("eval/0.5", "k") is None
        assert files_under(place) == {"c.bin", "stage.json"}
        assert list((tmp_path / TEMPORARY).iterdir()) == []


def test_an_exception_leaves_the_older_stage_and_nothing_else(tmp_path: Path) -> None:
    def interrupted(place: Path) -> None:
        (place / "half").write_text("x")
        raise KeyboardInterrupt

    with open_run(tmp_path, recipe(), TEXT) as folder:
        make(folder, key="old")
        with pytest.raises(KeyboardInterrupt), folder.writing("vectors/forget", "new") as tmp:
            interrupted(tmp)
        assert folder.finished("vectors/forget", "old") is not None
        assert list((tmp_path / TEMPORARY).iterdir()) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda p: flip(p / "sub" / "b.bin"), "the content of sub/b.bin has changed"),
        (lambda p: (p / "a.bin").write_text("longer than it was"), "a.bin has 18 bytes instead of 4"),
        (lambda p: (p / "a.bin").unlink(), "a.bin is missing"),
        (lambda p: (p / "stage.json").unlink(), "stage.json is missing or unreadable"),
        (lambda p: (p / "stage.json").write_text('{"schema": 1, "key": "k"}'), "stage.json is missing or unreadable"),
    ],
)
def test_damage_is_found_said_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: object, said: str
) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        harm(make(folder))  # type: ignore[operator]
        assert folder.finished("vectors/forget", "k") is None
        assert said in capsys.readouterr().err
        make(folder)


def test_size_only_still_reads_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        flip(make(folder) / "a.bin")
        assert folder.finished("vectors/forget", "k", verify="size") is None
        monkeypatch.setattr("unlearn.store.stages._SMALL", 1)
        assert folder.finished("vectors/forget", "k", verify="size") is not None
        assert folder.finished("vectors/forget", "k") is None


def test_a_users_file_in_a_stage_is_not_thrown_away(tmp_path: Path) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        place = make(folder, key="old")
        (place / "notes.txt").write_text("mine")
        assert folder.finished("vectors/forget", "old") == place
        with pytest.raises(RunFolderError, match=r"notes\.txt"), folder.writing("vectors/forget", "new"):
            pass
        assert (place / "notes.txt").read_text() == "mine"


def test_work_survives_and_goes_with_the_stage(tmp_path: Path) -> None:
    with open_run(tmp_path, recipe(), TEXT) as folder:
        (folder.work("target", "k") / "checkpoint").write_text("x")
        (folder.work("vectors/forget", "k") / "checkpoint").write_text("x")
    with open_run(tmp_path, recipe(), TEXT) as folder:
        assert (folder.work("target", "k") / "checkpoint").read_text() == "x"
        assert list(folder.work("target", "other").iterdir()) == []
        assert list(folder.work("target", "k").iterdir()) == []  # cleared when the key was another
        make(folder, "vectors/forget")
        assert [p.name.partition("@")[0] for p in (tmp_path / WORK).iterdir()] == ["target"]


def test_no_space_left_is_explained_and_other_errors_stay(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    rust = RuntimeError("I/O error: No space left on device (os error 28)")  # as libraries with own writers put it
    with open_run(tmp_path, recipe(), TEXT) as folder:
        for error in (full, rust):
            with (
                pytest.raises(RunFolderError, match=r"no space left .*vectors/forget"),
                folder.writing("vectors/forget", "k"),
            ):
                raise error
        with pytest.raises(PermissionError), folder.writing("vectors/forget", "k"):
            raise PermissionError(errno.EACCES, "no")
        assert not (tmp_path / "vectors").exists()


def test_other_processes_of_a_launch_publish_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run(tmp_path, recipe(), TEXT) as main:
        monkeypatch.setenv("RANK", "1")
        with open_run(tmp_path, recipe(), TEXT) as second, second.writing("target", "k") as tmp:
            (tmp / "x").write_text("from rank 1")
        monkeypatch.setenv("RANK", "0")
        assert main.finished("target", "k") is None
        assert (tmp_path / LOCK).exists()


# kills


def test_kill_while_writing_leaves_no_finished_stage(tmp_path: Path) -> None:
    writing = f"""{PRELUDE}
with open_run(root, recipe, "text") as folder:
    with folder.writing("vectors/forget", "k") as tmp:
        (tmp / "a.bin").write_text("half")
        (folder.work("vectors/forget", "k") / "checkpoint").write_text("step 10")
        print("ready", flush=True)
        time.sleep(60)
"""
    with running(writing, tmp_path) as process:
        process.kill()
        process.wait()
    assert (tmp_path / LOCK).exists()
    assert len(list((tmp_path / TEMPORARY).iterdir())) == 1
    with open_run(tmp_path, recipe(), TEXT) as folder:
        assert folder.finished("vectors/forget", "k") is None
        assert not (tmp_path / TEMPORARY).exists()
        assert (folder.work("vectors/forget", "k") / "checkpoint").read_text() == "step 10"
        make(folder)


def test_fresh_over_a_killed_process_takes_nothing_of_its_lock_for_a_stranger(tmp_path: Path) -> None:
    with running(HOLD, tmp_path) as process:
        process.kill()
        process.wait()
    broken = f"{LOCK}.break.1.{'a' * 32}"  # of one who was killed while it took over
    (tmp_path / broken).write_text("")
    with open_run(tmp_path, recipe(seed=1), TEXT, fresh=True) as folder:
        make(folder)
        assert (tmp_path / LOCK).exists()
    found = {name.partition("/")[0] for name in files_under(tmp_path)}
    assert found <= {"recipe.yaml", "resolved.yaml", "vectors", broken}


# the lock


def test_a_living_rival_is_named(tmp_path: Path) -> None:
    with running(HOLD, tmp_path) as process:
        for fresh in (False, True):
            with pytest.raises(RunFolderError, match=rf"in use by process {process.pid} since 20.*--out"):
                open_run(tmp_path, recipe(), TEXT, fresh=fresh)
        assert (tmp_path / LOCK).exists()
        # killed, and (as in many containers) reaped by nobody yet
        process.send_signal(signal.SIGKILL)
        time.sleep(0.3)
        open_run(tmp_path, recipe(), TEXT).close()


@pytest.mark.parametrize("moment", ["before it seals", "in the middle of writing", "between two stages", "in its work"])
def test_a_process_that_wakes_after_its_folder_was_taken_over_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setenv("UNLEARN_LOCK_TIMEOUT", "1")
    code = f"""{PRELUDE}
from unlearn.errors import UnlearnError

def nap(*moments):
    if os.environ["MOMENT"] in moments:
        print("ready", flush=True)
        while not folder._lock.lost():
            time.sleep(0.01)

with open_run(root, recipe, "the sleeper's") as folder:
    try:
        with folder.writing("s", "k") as tmp:
            nap("in the middle of writing")
            (tmp / "a.bin").write_text("the sleeper's")
            nap("before it seals")
        nap("between two stages", "in its work")
        if os.environ["MOMENT"] == "in its work":
            folder.work("t", "k")
        with folder.writing("t", "k") as tmp:
            pass
        print("published")
    except UnlearnError as e:
        print(type(e).__name__, e)
"""

    def found() -> dict[str, tuple[int, int]]:
        stats = {name: (tmp_path / name).stat() for name in files_under(tmp_path) if not name.startswith(LOCK)}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    with running(code, tmp_path, MOMENT=moment, FAR="1") as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        with open_run(tmp_path, recipe(), TEXT) as folder:
            for name in ("s", "t"):
                make(folder, name, content="the taker's")
            folder.work("u", "k")
            before = found()
            sleeper.send_signal(signal.SIGCONT)
            said, trouble = sleeper.communicate(timeout=60)
            assert said.startswith(f"RunFolderError {tmp_path} is not this process's any more"), (said, trouble)
            assert re.search(rf"process {os.getpid()} on host .* has taken over", said)
            assert not trouble
            assert found() == before
            make(folder, "s", key="new")  # still the taker's
    assert not list(tmp_path.glob(f"{LOCK}*"))


# files


def test_fingerprint_is_canonical_also_over_processes(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [1.5, None]}) == fingerprint({"b": (1.5, None), "a": 1})
    assert len({fingerprint(recipe()), fingerprint(recipe(seed=1)), fingerprint("a", "b"), fingerprint("ab")}) == 4
    assert fingerprint(StageRecord("k", 1.0, {})) == fingerprint({"key": "k", "seconds": 1.0, "files": {}})
    assert fingerprint(Path("a")) == fingerprint("a")
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint(float("nan"))
    with pytest.raises(TypeError, match="object has no JSON form"):
        fingerprint(object())
    code = f"{PRELUDE}\nfrom unlearn.store.files import fingerprint; print(fingerprint(recipe))"
    assert start(code, tmp_path, PYTHONHASHSEED="7").communicate()[0].strip() == fingerprint(recipe())


def test_atomic_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"λ": 0.5, "path": Path("p")})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(path, float("inf"))
    write_json_atomic(tmp_path / "lone.json", "\ud800")
    assert json.loads((tmp_path / "lone.json").read_text("utf-8")) == "\ud800"
    with pytest.raises(RunFolderError, match="No such file"):
        write_text_atomic(tmp_path / "no" / "x", "x")
    assert {p.name for p in tmp_path.iterdir()} == {"x.json", "lone.json"}
    assert json.loads(path.read_text("utf-8")) == {"λ": 0.5, "path": "p"}
