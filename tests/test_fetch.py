"""From ``model.path`` to something transformers opens, and one clear message for each way that fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from unlearn.cache import MANIFEST, sha256
from unlearn.errors import ModelError
from unlearn.fetch import locate
from unlearn.recipe import ModelSpec


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
    ],
)
def test_incomplete_folder(model: Path, gone: list[str], added: list[str], message: str) -> None:
    for name in gone:
        (model / name).unlink()
    for name in added:
        (model / name).write_text("{}")
    with pytest.raises(ModelError, match=message):
        _locate(str(model), Path())


def test_shards_that_the_index_names_must_be_there(model: Path) -> None:
    (model / "model.safetensors").rename(model / "a.safetensors")
    index = model / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(ModelError, match=r"incomplete: b\.safetensors missing"):
        _locate(str(model), Path())
    index.write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert _locate(str(model), Path()) == str(model)
    index.write_text("[")
    with pytest.raises(ModelError, match="cannot be read as an index"):
        _locate(str(model), Path())


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
    (where / "model.safetensors").write_bytes(b"cut")
    assert _locate("pico:llama", tmp_path) == str(where)
    assert (where / "model.safetensors").stat().st_size > 100_000


def test_gguf_with_another_checksum(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF, or not")
    wanted = "0" * 64
    with pytest.raises(ModelError, match=f"(?s)m.gguf is not the file.*wanted {wanted}.*found  {sha256(file)}"):
        _locate(f"m.gguf#sha256={wanted}", tmp_path)
