"""A GGUF file becomes the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf_pico import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.errors import ModelError
from unlearn.model import pico
from unlearn.model.locate import convert, locate
from unlearn.recipe.schema import ModelSpec
from unlearn.store.cache import sha256


def test_weights_tokens_and_configuration_come_back(
    pico_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = write_gguf(pico_llama, tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text("not of this model")  # what lies beside the file must not matter
    (tmp_path / "out").mkdir()
    capfd.readouterr()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert capfd.readouterr().err == ""
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weights = model.state_dict()
    assert set(weights) == {*expected, "lm_head.weight"}
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    original = AutoModelForCausalLM.from_pretrained(pico_llama)
    original.load_state_dict(expected, strict=False)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = words(pico.corpus()[0], return_tensors="pt").input_ids
    assert ids[0].tolist() == AutoTokenizer.from_pretrained(pico_llama)(pico.corpus()[0]).input_ids
    torch.testing.assert_close(model(ids).logits, original(ids).logits)


def test_located_once_then_from_the_cache(pico_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(pico_llama, file)
    spec = ModelSpec.model_validate({"path": f"m.gguf#sha256={sha256(file)}"})
    capfd.readouterr()
    where = locate(spec, tmp_path, tmp_path / "cache")
    assert "converting m.gguf" in capfd.readouterr().err
    assert (Path(where) / "tokenizer.json").is_file()
    assert locate(spec, tmp_path, tmp_path / "cache") == where
    assert capfd.readouterr().err == ""
    wanted = "0" * 64
    with pytest.raises(ModelError, match=f"(?s)m.gguf is not the file.*wanted {wanted}.*found  {sha256(file)}"):
        locate(spec.model_copy(update={"path": f"m.gguf#sha256={wanted}"}), tmp_path)


@pytest.mark.parametrize("damage", ["not gguf", "header cut", "weights cut", "weight missing"])
def test_damaged_file(pico_llama: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(pico_llama, file)
    content = file.read_bytes()
    damaged = {
        "not gguf": b"hello, this is no model" * 10,
        "header cut": content[:2000],
        "weights cut": content[:-50_000],
        "weight missing": content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ab.weight"),
    }
    file.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match=r"m\.gguf: transformers cannot convert this GGUF file"):
        locate(ModelSpec.model_validate({"path": str(file)}), tmp_path, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]


def test_a_library_that_is_missing_is_not_a_damaged_file(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(pico_llama, file)

    def convert(*_: object) -> None:
        raise ImportError("sentencepiece is not installed")

    monkeypatch.setattr("unlearn.model.locate._convert", convert)
    with pytest.raises(ModelError, match="needs a package that is not installed: sentencepiece is not") as caught:
        locate(ModelSpec.model_validate({"path": str(file)}), tmp_path, tmp_path / "cache")
    assert "whole" not in str(caught.value)
