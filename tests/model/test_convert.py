"""A GGUF file becomes the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from gguf_pico import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn.errors import ModelError
from unlearn.model import pico
from unlearn.model.gguf import convert
from unlearn.model.locate import locate
from unlearn.recipe.schema import ModelSpec
from unlearn.store.cache import sha256


def test_weights_tokens_and_configuration_come_back(
    pico_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = write_gguf(pico_llama, tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text("not of this model")  # what lies beside the file must not matter
    functions = gguf.GGUFReader, gguf.get_tensor_name_map
    (tmp_path / "out").mkdir()
    capfd.readouterr()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    assert capfd.readouterr().err == ""
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == functions
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
    assert (
        ids.tolist()
        == AutoTokenizer.from_pretrained(pico_llama)(pico.corpus()[0], return_tensors="pt").input_ids.tolist()
    )
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


@pytest.mark.parametrize("damage", ["not gguf", "header cut", "weights cut", "weight missing"])
def test_damaged_file(pico_llama: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(pico_llama, file)
    content = file.read_bytes()
    if damage == "not gguf":
        file.write_bytes(b"hello, this is no model" * 10)
    elif damage == "header cut":
        file.write_bytes(content[:2000])
    elif damage == "weights cut":
        file.write_bytes(content[:-50_000])
    else:
        file.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ab.weight"))
    with pytest.raises(ModelError, match=r"m\.gguf: transformers cannot convert this GGUF file"):
        locate(ModelSpec.model_validate({"path": str(file)}), tmp_path, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]
