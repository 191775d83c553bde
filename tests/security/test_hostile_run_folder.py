"""A run's folder from a stranger: no link in it is followed, its checkpoints run nothing, no more is taken over."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import ESCAPES, pickled, snapshot, torch_file

from unlearn.data.encoding import Encoded
from unlearn.errors import RunFolderError, TrainingError
from unlearn.model.load import Loaded
from unlearn.recipe.load import open_run
from unlearn.recipe.methods import TrainSpec
from unlearn.recipe.schema import Recipe
from unlearn.store.files import write_text_atomic
from unlearn.store.stages import Store, seal
from unlearn.train import trainer as checkpoints
from unlearn.train.trainer import train


def recipe(**more: Any) -> Recipe:
    return Recipe.model_validate_json(
        json.dumps({"name": "x", "model": {"path": "pico:phi"}, "forget": {"kind": "qa", "path": "d.jsonl"}} | more)
    )


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Somebody's own folder, beside the run's, with what a run's stages and work folders are called as well."""
    folder = tmp_path / "outside"
    for name in ("precious.txt", "forget/precious.txt", "vectors+forget@0/precious.txt", "report.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was begun, with a finished stage."""
    root = tmp_path / "run"
    with open_run(root, recipe(), "text") as folder, folder.writing("vectors/forget", "key") as place:
        (place / "vector.safetensors").write_bytes(b"v")
    return root


def use(root: Path, fresh: bool) -> None:
    """What a run does with its folder: open it, make a stage, keep work, write its files."""
    with open_run(root, recipe(), "text", fresh) as folder:
        folder.work("vectors/forget", "other")
        with folder.writing("vectors/forget", "other") as place:
            (place / "vector.safetensors").write_bytes(b"w")
        for name in ("report.html", "report.json", "provenance.json"):
            write_text_atomic(folder.path(name), "new")


PLANTED = [
    *("report.html", "provenance.json", "recipe.yaml", "resolved.yaml", ".unlearn-lock", ".unlearn-tmp"),
    *(".unlearn-work", "vectors", "vectors/forget", "vectors/forget/vector.safetensors", "vectors/forget/stage.json"),
    *("eval", f"a{ESCAPES}\nb"),
]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("target", ["", "precious.txt", "gone"], ids=["folder", "file", "nothing"])
def test_no_link_in_a_run_folder_is_followed(run: Path, outside: Path, name: str, target: str, fresh: bool) -> None:
    link = run / name
    content = link.read_bytes() if link.is_file() else None
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to(outside / target)
    before = snapshot(outside)
    with pytest.raises(RunFolderError) as caught:
        use(run, fresh)
    assert "holds links" in str(caught.value)
    assert str(caught.value).isprintable()
    assert snapshot(outside) == before
    link.unlink()
    if content is not None:
        link.write_bytes(content)
    use(run, fresh)
    assert snapshot(outside) == before


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a//b", "a\n", "a b", ".hidden/x"])
def test_no_stage_has_its_place_elsewhere(run: Path, name: str) -> None:
    with open_run(run, recipe(), "text") as folder, pytest.raises(ValueError, match="not a name"):
        folder.path(name)


# --- stages taken over from another run ------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [None, "link", "../../../secret", "{absolute}"])
def test_only_what_a_seal_lists_and_the_stage_holds_is_taken_over(tmp_path: Path, listed: str | None) -> None:
    """``listed``: how the seal lists a file that lies elsewhere; then all of it is refused, or passed over."""
    secret = tmp_path / "secret"
    secret.write_text("private key")
    with open_run(tmp_path / "run", recipe(reuse=["theirs"]), "text") as folder:
        mine = Store(folder, base=tmp_path, reuse=["theirs"])
        key = mine.key("export/adapter", [])
        theirs = tmp_path / "theirs" / "export" / "adapter"
        theirs.mkdir(parents=True)
        (theirs / "adapter_config.json").write_text("{}")
        if listed == "link":
            (theirs / "id_rsa").symlink_to(secret)
        elif listed is not None:
            shutil.copyfile(secret, theirs / "id_rsa")
        seal(theirs, key, 1.0)
        if listed is None:
            (theirs / "id_rsa").symlink_to(secret)
            (theirs / "deeper").symlink_to(tmp_path)
            (theirs / "notes.txt").write_text("not of the stage")
        elif listed != "link":
            record = json.loads((theirs / "stage.json").read_text())
            record["files"][listed.format(absolute=secret)] = record["files"].pop("id_rsa")
            record.pop("seal")
            (theirs / "stage.json").write_text(json.dumps(record))
            (theirs / "id_rsa").unlink()
        with contextlib.suppress(RunFolderError):
            mine.stage("export/adapter", [], lambda tmp: (tmp / "mine").write_text("mine"))
        if listed is None:
            kept = {p.name for p in folder.path("export/adapter").iterdir()}
            assert kept == {"adapter_config.json", "stage.json"}
        taken = [p for p in folder.root.rglob("*") if p.is_file() and "private key" in p.read_text(errors="replace")]
        assert taken == []
    assert secret.read_text() == "private key"


# --- checkpoints of a training ---------------------------------------------------------------------------------------

SPEC = TrainSpec(steps=4, batch_size=2, save_every=2)
ROWS = [Encoded([1, 2, 3, 4 + n], [-100, -100, 3, 4 + n]) for n in range(4)]


@pytest.mark.parametrize("make", [pickled, torch_file])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"]
)
def test_a_checkpoint_that_somebody_planted_runs_nothing(
    phi: Loaded, loaded: Callable[..., Loaded], pico_phi: Path, tmp_path: Path, name: str, make: Callable[[Path], bytes]
) -> None:
    canary, work, said = tmp_path / "canary", tmp_path / "work", ""
    train(phi.model, phi.tokenizer, ROWS, SPEC, 0, work, "fitting")
    place = Path(str(checkpoints.last_checkpoint(work)))
    (place / name).write_bytes(make(canary))
    checkpoints.seal(place, "1", 0.0)
    fresh = loaded(pico_phi)
    try:
        train(fresh.model, fresh.tokenizer, ROWS, SPEC, 0, work, "fitting")
    except TrainingError as error:
        said = str(error)
    assert not canary.exists()
    read = name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert ("no run wrote it: remove that folder" in said) == read


def test_a_checkpoint_of_another_content_is_not_gone_on_from(phi: Loaded, tmp_path: Path) -> None:
    train(phi.model, phi.tokenizer, ROWS, SPEC, 0, tmp_path / "work", "fitting")
    place = Path(str(checkpoints.last_checkpoint(tmp_path / "work")))
    (place / "optimizer.pt").write_bytes(pickled(tmp_path / "canary"))  # without a seal of its own
    assert checkpoints.last_checkpoint(tmp_path / "work") != str(place)
    assert not (tmp_path / "canary").exists()


def test_files_are_replaced_and_not_written_through(tmp_path: Path, outside: Path) -> None:
    link = tmp_path / "page.html"
    link.symlink_to(outside / "precious.txt")
    write_text_atomic(link, "new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert (outside / "precious.txt").read_text() == "precious"
