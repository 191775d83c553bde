"""A run's folder from a stranger: no link in it is followed, its checkpoints run nothing, no more is taken over."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import ESCAPES, pickled, snapshot, torch_file
from safetensors.torch import load_file

from unlearn.data.encoding import Encoded
from unlearn.errors import RunFolderError, TrainingError
from unlearn.model.load import Loaded
from unlearn.recipe.methods import TrainSpec
from unlearn.recipe.run_folder import open_run
from unlearn.recipe.schema import Recipe
from unlearn.store.files import write_text_atomic
from unlearn.store.stages import RunFolder, Store, seal
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
    for name in (
        "precious.txt",
        "forget/precious.txt",
        "vectors+forget@0/precious.txt",
        "report.html",
        "1.0/results.json",
    ):
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
    "report.html",
    "report.json",
    "provenance.json",
    "recipe.yaml",
    ".unlearn-tmp",
    ".unlearn-work",
    "vectors",
    "vectors/forget",
    "vectors/forget/vector.safetensors",
    "vectors/forget/stage.json",
    "eval",
    "logs",
]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("target", ["folder", "file", "nothing"])
def test_no_link_in_a_run_folder_is_followed(run: Path, outside: Path, name: str, target: str, fresh: bool) -> None:
    link = run / name
    content = link.read_bytes() if link.is_file() else None
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.symlink_to({"folder": outside, "file": outside / "precious.txt", "nothing": outside / "gone"}[target])
    before = snapshot(outside)
    with pytest.raises(RunFolderError, match="holds links"):
        use(run, fresh)
    assert snapshot(outside) == before
    link.unlink()
    if content is not None:
        link.write_bytes(content)
    use(run, fresh)
    assert snapshot(outside) == before


def test_a_link_in_place_of_the_file_that_makes_it_a_run_folder(run: Path, outside: Path) -> None:
    (run / "resolved.yaml").unlink()
    (run / "resolved.yaml").symlink_to(outside / "precious.txt")
    before = snapshot(outside)
    with pytest.raises(RunFolderError):
        use(run, False)
    assert snapshot(outside) == before


def test_a_lock_that_is_a_link_is_not_written_through(run: Path, outside: Path) -> None:
    for name in (".unlearn-lock",):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / "precious.txt")
    before = snapshot(outside)
    with pytest.raises(RunFolderError):
        use(run, False)
    assert snapshot(outside) == before


def test_files_are_replaced_and_not_written_through(tmp_path: Path, outside: Path) -> None:
    link = tmp_path / "page.html"
    link.symlink_to(outside / "precious.txt")
    write_text_atomic(link, "new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert (outside / "precious.txt").read_text() == "precious"


def test_links_are_named_without_their_escapes(run: Path, outside: Path) -> None:
    (run / f"a{ESCAPES}\nb").symlink_to(outside)
    with pytest.raises(RunFolderError) as caught:
        use(run, False)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a//b", "a\n", ".hidden/x"])
def test_no_stage_has_its_place_elsewhere(run: Path, name: str) -> None:
    with open_run(run, recipe(), "text") as folder, pytest.raises(ValueError):
        folder.path(name)


# --- stages taken over from another run ------------------------------------------------------------------------------


def stranger(tmp_path: Path, key: str) -> Path:
    """A run folder of somebody else with a sealed stage of that key."""
    stage = tmp_path / "theirs" / "export" / "adapter"
    stage.mkdir(parents=True)
    (stage / "adapter_config.json").write_text("{}")
    seal(stage, key, 1.0)
    return stage


def stages(tmp_path: Path, folder: RunFolder) -> Store:
    return Store(folder, base=tmp_path, reuse=["theirs"])


def test_only_what_a_seal_lists_is_taken_over(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private key")
    with open_run(tmp_path / "run", recipe(reuse=["theirs"]), "text") as folder:
        mine = stages(tmp_path, folder)
        theirs = stranger(tmp_path, mine.key("export/adapter", []))
        (theirs / "id_rsa").symlink_to(secret)
        (theirs / "deeper").symlink_to(tmp_path)
        (theirs / "notes.txt").write_text("not of the stage")
        mine.stage("export/adapter", [], lambda tmp: pytest.fail("it was there to be taken"))
        taken = folder.path("export/adapter")
        assert sorted(p.name for p in taken.iterdir()) == ["adapter_config.json", "stage.json"]


@pytest.mark.parametrize("how", ["link", "up", "absolute"])
def test_files_elsewhere_that_a_seal_lists_are_not_taken_over(tmp_path: Path, how: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("private key")
    with open_run(tmp_path / "run", recipe(reuse=["theirs"]), "text") as folder:
        mine = stages(tmp_path, folder)
        key = mine.key("export/adapter", [])
        theirs = stranger(tmp_path, key)
        if how == "link":
            (theirs / "id_rsa").symlink_to(secret)
            (theirs / "stage.json").unlink()
            seal(theirs, key, 1.0)
        else:
            name = "../../../secret" if how == "up" else str(secret)
            record = json.loads((theirs / "stage.json").read_text())
            shutil.copyfile(secret, theirs / "id_rsa")
            seal(theirs, key, 1.0)
            files = json.loads((theirs / "stage.json").read_text())["files"]
            record["files"][name] = files["id_rsa"]
            (theirs / "id_rsa").unlink()
            (theirs / "stage.json").write_text(json.dumps(record))
        # refused, or passed over as no whole stage; what is made then is this run's own
        with contextlib.suppress(RunFolderError):
            mine.stage("export/adapter", [], lambda tmp: (tmp / "mine").write_text("mine"))
        taken = [p for p in folder.root.rglob("*") if p.is_file() and "private key" in p.read_text(errors="replace")]
        assert taken == []
    assert secret.read_text() == "private key"


# --- checkpoints of a training ---------------------------------------------------------------------------------------

SPEC = TrainSpec(steps=4, batch_size=2, save_every=2)
ROWS = [Encoded([1, 2, 3, 4 + n], [-100, -100, 3, 4 + n]) for n in range(4)]


@pytest.fixture
def resumed(phi: Loaded, loaded: Callable[..., Loaded], pico_phi: Path, tmp_path: Path) -> Callable[[str, bytes], str]:
    """Plant a file in a sealed checkpoint of a training, go on from it, and give the message or the empty string."""
    work = tmp_path / "work"
    train(phi.model, phi.tokenizer, ROWS, SPEC, 0, work, "fitting")
    assert checkpoints.last_checkpoint(work) is not None

    def attempt(name: str, content: bytes) -> str:
        place = checkpoints.last_checkpoint(work)
        assert place is not None
        (Path(place) / name).write_bytes(content)
        checkpoints.seal(Path(place), 1)
        fresh = loaded(pico_phi)
        try:
            train(fresh.model, fresh.tokenizer, ROWS, SPEC, 0, work, "fitting")
        except TrainingError as error:
            return str(error)
        return ""

    return attempt


@pytest.mark.parametrize("make", [pickled, torch_file])
@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"]
)
def test_a_checkpoint_that_somebody_planted_runs_nothing(
    resumed: Callable[[str, bytes], str], tmp_path: Path, name: str, make: Callable[[Path], bytes]
) -> None:
    canary = tmp_path / "canary"
    said = resumed(name, make(canary))
    assert not canary.exists()
    read = name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert ("no run wrote it: remove that folder" in said) == read


def test_a_checkpoint_of_another_content_is_not_gone_on_from(phi: Loaded, tmp_path: Path) -> None:
    work = tmp_path / "work"
    train(phi.model, phi.tokenizer, ROWS, SPEC, 0, work, "fitting")
    place = Path(str(checkpoints.last_checkpoint(work)))
    (place / "optimizer.pt").write_bytes(pickled(tmp_path / "canary"))  # without a seal of its own
    assert checkpoints.last_checkpoint(work) != str(place)
    assert not (tmp_path / "canary").exists()
    assert (
        all(torch.isfinite(t).all() for t in load_file(place / "model.safetensors").values())
        if place.exists()
        else True
    )
