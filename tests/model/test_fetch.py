"""From ``model.path`` to something transformers opens, and one clear message for each way that fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unlearn.errors import ModelError, UnlearnError
from unlearn.evidence import reference as references
from unlearn.model.load import load
from unlearn.model.locate import locate
from unlearn.recipe.schema import ModelSpec, Recipe
from unlearn.score.packed import PackedLM
from unlearn.store.cache import MANIFEST
from unlearn.vector.change import LowRank
from unlearn.vector.interop import from_checkpoints
from unlearn.vector.streamed import apply
from unlearn.vector.task_vector import TaskVector


def _locate(path: str, base: Path, cache: Path | None = None) -> str:
    return locate(ModelSpec.model_validate({"path": path}), base, cache)


@pytest.fixture
def model(pico_phi: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(pico_phi, tmp_path / "model"))


def test_local_folder_here_then_beside_the_recipe(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _locate(str(model), Path("/nowhere")) == str(model)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert _locate("model", tmp_path) == str(model)
    monkeypatch.chdir(tmp_path)
    assert _locate("model", Path("/nowhere")) == "model"


@pytest.mark.parametrize(
    ("gone", "added", "message"),
    [
        (["config.json"], [], r"has no config\.json; in it: generation_config\.json, model\.safetensors"),
        (["config.json"], ["adapter_config.json"], "is an adapter, not a model"),
        (["tokenizer.json"], [], r"has no tokenizer \(tokenizer\.json\); in it: config\.json"),
        (["model.safetensors"], [], r"has no model\.safetensors; in it: config\.json"),
        (["model.safetensors"], ["pytorch_model.bin"], "as pickles only.*convert them"),
        (["model.safetensors"], ["model.safetensors.index.json"], r"incomplete: b\.safetensors missing"),
    ],
)
def test_incomplete_folder(model: Path, gone: list[str], added: list[str], message: str) -> None:
    for name in gone:
        (model / name).unlink()
    for name in added:
        (model / name).write_text('{"weight_map": {"y": "b.safetensors"}}')
    with pytest.raises(ModelError, match=message):
        _locate(str(model), Path())


@pytest.fixture(scope="module")
def sharded(pico_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in three files, with what a training and other programs leave beside them. Read only."""
    folder = tmp_path_factory.mktemp("sharded") / "good"
    shutil.copytree(pico_phi, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(pico_phi).save_pretrained(folder, max_shard_size="200KB")
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt", "consolidated.safetensors"):
        (folder / name).write_bytes(b"x")
    return folder


def old_single(folder: Path) -> str:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model.safetensors")
    return r"two sets of weights, model\.safetensors and the shards.*remove the old one, either model\.safetensors, or"


def old_shard(folder: Path) -> str:
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00004-of-00004.safetensors")
    return r"beside those that are read \(model\.safetensors\.index\.json\).*move model-00004-of-00004\.safetensors"


def shards_without_index(folder: Path) -> str:
    old_single(folder)
    (folder / "model.safetensors.index.json").unlink()
    return r"beside those that are read \(model\.safetensors\).*move model-00001-of-00003\.safetensors, model-00002-"


def as_reference(folder: Path) -> None:
    plain = {"kind": "qa", "path": "x.jsonl"}
    recipe = Recipe.model_validate(
        {"name": "x", "model": {"path": "pico:phi"}, "forget": plain, "retain": (plain,), "reference": str(folder)}
    )
    references.check(recipe, Path())


def as_finetuned(folder: Path) -> None:
    from_checkpoints(folder.with_name("good"), folder, on_unequal="error")


def to_apply(folder: Path) -> None:
    weight = TaskVector({"model.layers.0.mlp.fc1": LowRank(torch.ones(1, 64), torch.ones(128, 1))})
    apply(weight, folder, 0.1, folder.with_name("edited"))


READERS: dict[str, Callable[[Path], object]] = {
    "located": lambda folder: _locate(str(folder), Path()),
    "loaded": lambda folder: load(ModelSpec.model_validate({"path": str(folder), "device": "cpu"}), str(folder)),
    "reference": as_reference,
    "checkpoints": as_finetuned,
    "applied": to_apply,
    "harness": lambda folder: PackedLM(str(folder), device="cpu", dtype="float32"),
}


@pytest.mark.parametrize(
    ("reader", "damage"),
    [("located", old_shard), ("located", shards_without_index), *((reader, old_single) for reader in READERS)],
)
def test_two_sets_of_weights_are_refused(
    sharded: Path, tmp_path: Path, reader: str, damage: Callable[[Path], str]
) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shutil.copytree(sharded, tmp_path / "good")
    with pytest.raises(UnlearnError, match=damage(folder)) as caught:
        READERS[reader](folder)
    begins = {"located": "model.path", "loaded": "model.path", "reference": "reference", "harness": "pretrained"}
    assert str(caught.value).startswith(f"{begins.get(reader, folder)}")
    assert not (tmp_path / "edited").exists()
    if reader != "checkpoints":  # two that are the same have no difference
        READERS[reader](tmp_path / "good")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./gone", r"there is no folder \./gone here or in"),
        ("a/b/c", "there is no folder a/b/c"),
        ("gone.gguf", r"there is no file gone\.gguf"),
        ("model/config.json", "neither a folder nor a .gguf file"),
        ("model#sha256=12", "64 hexadecimal digits"),
        ("pico:lama", r"no pico:lama; there are phi, llama.*did you mean pico:llama\?"),
        ("owner/no-such-model", "no such model in the hub's local cache.*forbidden.*local folder"),
    ],
)
def test_one_message_per_mistake(path: str, message: str, model: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        _locate(path, model.parent)
    assert "\n" not in str(caught.value)


def test_pico_goes_through_the_cache(tmp_path: Path) -> None:
    where = Path(_locate("pico:llama", tmp_path))
    assert where.parent == Path(os.environ["UNLEARN_CACHE"])
    made = (where / MANIFEST).stat().st_mtime_ns
    assert _locate("pico:llama", tmp_path) == str(where)
    assert (where / MANIFEST).stat().st_mtime_ns == made
