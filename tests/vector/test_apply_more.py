"""Edits from disk to disk: interruptions, bases that look alike, and what they cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from unlearn import cli
from unlearn.errors import ModelError, VectorError
from unlearn.model import pico
from unlearn.model.checkpoint import read_checkpoint
from unlearn.model.locate import SINGLE
from unlearn.vector.apply import apply, check
from unlearn.vector.change import Change, LowRank
from unlearn.vector.stored_names import asked, plain, targets_of
from unlearn.vector.task_vector import TaskVector

LAMBDA = 0.75


def a_vector(folder: Path, end: str = "self_attn.q_proj") -> TaskVector:
    """A change of the linear layers that are named so."""
    g = torch.Generator().manual_seed(3)
    modules: dict[str, Change] = {}
    for name, weight in load_file(folder / SINGLE).items():
        if name.endswith(f"{end}.weight"):
            rows, columns = weight.shape
            modules[name.removesuffix(".weight")] = LowRank(
                torch.randn(3, columns, generator=g), torch.randn(rows, 3, generator=g) * 0.02
            )
    return TaskVector(modules)


def dated(folder: Path) -> Path:
    """Give all files one date, as images of containers and reproducible archives do."""
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))
    return folder


# adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_the_head_keeps_a_weight_beside_its_factors(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapter = pico.build("phi", tmp_path / "base", 0), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    tuned.save_pretrained(adapter, save_embedding_layers=True)
    assert any(".base_layer." in name for name in load_file(adapter / "adapter_model.safetensors"))
    done = apply(adapter, folder, -1.0, tmp_path / "out")
    assert done.edited == 3
    assert "they are not this model's" not in capsys.readouterr().err
    if dtype == "float32":
        merged, made = tuned.merge_and_unload().state_dict(), load_file(tmp_path / "out" / SINGLE)
        assert all(torch.allclose(made[name], tensor, atol=1e-6) for name, tensor in merged.items())
    # on another model that is said
    apply(adapter, pico.build("phi", tmp_path / "other", 1), -1.0, tmp_path / "out2")
    assert "they are not this model's: lm_head.weight" in " ".join(capsys.readouterr().err.split())
    # and it belongs to factors
    made = load_file(adapter / "adapter_model.safetensors")
    made["base_model.model.model.norm.base_layer.weight"] = torch.zeros(64)
    save_file(made, adapter / "adapter_model.safetensors")
    with pytest.raises(VectorError, match="no factor of a linear layer"):
        apply(adapter, folder, -1.0, tmp_path / "out3")


# bases that look alike


def test_another_base_of_the_same_size_and_date_is_not_taken_for_the_first(tmp_path: Path) -> None:
    one, two = (dated(pico.build("llama", tmp_path / f"base{seed}", seed)) for seed in (0, 1))
    vector, out = a_vector(one), tmp_path / "out"
    apply(vector, one, LAMBDA, out)
    assert apply(vector, two, LAMBDA, out).kept == 0
    assert not check(vector, two, LAMBDA, out).wrong


# what it cannot do


def test_weights_in_float64_are_refused(tmp_path: Path) -> None:
    """Edits are computed in float32: 29 bits of them would be lost."""
    folder = pico.build("llama", tmp_path / "base", 0)
    vector = a_vector(folder)
    save_file({n: t.double() for n, t in load_file(folder / SINGLE).items()}, folder / SINGLE, {"format": "pt"})
    with pytest.raises(VectorError, match=r"stored as F64, .* convert the model to float32") as caught:
        apply(vector, folder, LAMBDA, tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 + len(vector.modules)
    assert not (tmp_path / "out").exists()


# names that are known without asking the model's class

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"tie_word_embeddings": True},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"attention_bias": True, "tie_word_embeddings": True},
    "phi": {"qk_layernorm": True, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("more", [False, True], ids=["usual", "more"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_known_of_a_family_is_what_its_class_says(family: str, more: bool, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(family, **shape, **(FAMILIES[family] if more else {"tie_word_embeddings": False}))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    checkpoint, stored = read_checkpoint(tmp_path), load_file(tmp_path / SINGLE)
    settings = json.loads((tmp_path / "config.json").read_text())
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    shapes = {name: tuple(stored[f"{name}.weight"].shape) for name in modules if name != "lm_head"}
    assert len(shapes) == 12 * (6 if family == "phi" else 7)
    assert plain(settings, stored, shapes)
    assert targets_of(checkpoint, shapes) == asked(checkpoint, shapes)
    # all that is not so plain is left to the class
    every = [name for name, _ in model.named_modules() if name not in shapes]
    assert not any(plain(settings, stored, [name]) for name in every)
    assert not plain({**settings, "num_hidden_layers": 11}, stored, shapes)
    assert not plain({**settings, "quantization_config": {"quant_method": "fp8"}}, stored, shapes)
    assert not plain({**settings, "model_type": "gpt2"}, stored, shapes)
    assert not plain(settings, [*stored, "layers.0.self_attn.q_proj.weight"], shapes)
    assert not plain(settings, [n for n in stored if "layers.3." not in n], shapes)


def test_a_plain_checkpoint_is_edited_without_transformers(tmp_path: Path) -> None:
    folder = pico.build("llama", tmp_path / "base", 0)
    a_vector(folder).save(tmp_path / "v.safetensors")
    names = [str(tmp_path / "v.safetensors"), "--model", str(folder), "--out", str(tmp_path / "out")]
    code = f"""
import sys
from unlearn.cli import main
for more in ([], ["--check"]):
    assert main(["apply", *{names!r}, "--coefficient", "1", *more]) == 0
print(sorted({{"transformers", "peft", "scipy"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --check: what it says is so of every element

WIDE = "model.layers.0.mlp.up_proj"
ROWS, HALF = 2048, 1100  # of WIDE, which takes several blocks


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model in which one weight takes several blocks."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": ROWS, "num_hidden_layers": 1, "num_attention_heads": 4}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape, vocab_size=64)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def vector_of_rows(first: int) -> TaskVector:
    """A change of the wide weight from one row on."""
    g = torch.Generator().manual_seed(1)
    b = torch.randn(ROWS, 2, generator=g) * 0.01
    b[:first] = 0
    return TaskVector({WIDE: LowRank(torch.randn(2, 512, generator=g), b)})


def alter(folder: Path, change: Callable[[Tensor], None]) -> None:
    """Change the wide weight of a checkpoint."""
    made = load_file(folder / SINGLE)
    change(made[f"{WIDE}.weight"])
    save_file(made, folder / SINGLE, {"format": "pt"})


def test_one_wrong_element_is_damage_wherever_the_vector_begins(wide: Path, tmp_path: Path) -> None:
    vector, out = vector_of_rows(HALF), tmp_path / "out"
    apply(vector, wide, 1.0, out)
    alter(out, lambda weight: weight[ROWS - 1, 0].add_(1.0))
    found = check(vector, wide, 1.0, out)
    assert found.wrong == {f"{WIDE}.weight": f"1 of {ROWS * 512} elements differ"}


# --check: what the weights are loaded as


def test_an_adapter_beside_edited_weights_is_an_error(tmp_path: Path) -> None:
    folder, out = pico.build("llama", tmp_path / "base", 0), tmp_path / "out"
    vector = a_vector(folder)
    apply(vector, folder, LAMBDA, out)
    (out / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"out: it holds an adapter"):
        check(vector, folder, LAMBDA, out)


def test_another_configuration_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = pico.build("llama", tmp_path / "base", 0), tmp_path / "out"
    a_vector(folder).save(tmp_path / "v.safetensors")
    command = [str(tmp_path / "v.safetensors"), "--model", str(folder), "--out", str(out), "--coefficient", "1"]
    assert cli.main(["apply", *command]) == 0
    config = json.loads((out / "config.json").read_text())
    for change, code, said in (
        ({"num_attention_heads": 2, "rms_norm_eps": 5.0}, 1, "the base's in num_attention_heads, rms_norm_eps"),
        ({"transformers_version": "0.1", "_name_or_path": "elsewhere"}, 0, ""),
        ({"attention_dropout": 0.0}, 0, ""),  # as it is without being said
        ({"dtype": "float16"}, 1, "dtype"),
        ({"model_type": "no such"}, 1, "not the base's"),
    ):
        (out / "config.json").write_text(json.dumps({**config, **change}))
        assert cli.main(["apply", *command, "--check"]) == code, change
        output = capsys.readouterr()
        assert said in output.out, change
        assert ("is not exactly" in output.err) == bool(code), change
    (out / "config.json").unlink()
    assert cli.main(["apply", *command, "--check"]) == 1
    assert "config.json: missing" in capsys.readouterr().out


def test_a_known_family_ties_nothing_unless_it_is_told_to_and_needs_no_transformers(tmp_path: Path) -> None:
    """What is decided without the model's class, whose import takes longer than a small edit."""
    for family in ("llama", "mistral", "qwen2", "qwen3", "phi"):
        assert AutoConfig.for_model(family).tie_word_embeddings is False
    name = "model.layers.0.mlp.fc1"
    weights = {f"{name}.weight": torch.ones(8, 4), "lm_head.weight": torch.ones(6, 4)}
    save_file({**weights, "model.embed_tokens.weight": torch.zeros(6, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "phi", "num_hidden_layers": 1}')
    TaskVector({name: LowRank(torch.ones(1, 4), torch.ones(8, 1))}).save(tmp_path.with_name("v.safetensors"))
    vector, out = (str(tmp_path.with_name(name)) for name in ("v.safetensors", "out"))
    code = (
        "import sys; from unlearn.vector.apply import apply\n"
        f"apply({vector!r}, {str(tmp_path)!r}, 0.5, {out!r})\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    edited = load_file(tmp_path.with_name("out") / "model.safetensors")
    assert torch.equal(edited[f"{name}.weight"], torch.full((8, 4), 0.5))
