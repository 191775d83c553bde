"""Vectors from and to LoRA folders, against PEFT itself: what it saves is read, what is written it loads."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from vector_arena import THREE, Load, logits, model_vector, trained

from unlearn.errors import VectorError
from unlearn.model.load import linear_modules, model_of
from unlearn.train.vectors import read_adapter
from unlearn.vector.change import Dense, LowRank
from unlearn.vector.edit import subtracted
from unlearn.vector.interop import (
    ADAPTER_WEIGHTS,
    from_adapter,
    merged,
    refuse_misfit,
    target_modules,
    to_adapter,
)
from unlearn.vector.streamed import apply, check
from unlearn.vector.task_vector import ADAPTER_CONFIG, TaskVector

PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        # overlapping ones, of which the first counts; sorted, as PEFT saves them, whatever it trained with
        "rank_pattern": {r".*\.0\.mlp\.\w+": 5, r"^\w+\.\w+\.0\..*": 4, "fc1|up_proj|c_fc": 2},
        "alpha_pattern": {".*(fc2|down_proj|c_proj)": 3, r".*1\.\w+\.\w+": 9, r"[01]\.mlp\.(fc1|up_proj|c_fc)": 11},
    },
    "patterns with rslora": {"use_rslora": True, "rank_pattern": {r"1\..*": 4}, "alpha_pattern": {r"0\..*": 9}},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
}


@THREE
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS.keys())
def test_what_peft_saves_is_read_as_peft_means_it(
    loaded: Load, folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    peft_model = trained(loaded(folder).model, **options)
    peft_model.save_pretrained(tmp_path)
    vector = from_adapter(tmp_path)
    assert vector.digest() == read_adapter(peft_model, {}).digest()
    assert vector.meta["base"] == str(folder)
    model = loaded(folder).model
    plain, tuned = logits(model), logits(peft_model)
    with subtracted(model, vector, -1.0):
        torch.testing.assert_close(logits(model), tuned, atol=1e-4, rtol=1e-4)
    assert (plain - tuned).abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["embed_tokens"]], ids=["head", "embeddings"])
def test_an_adapter_on_one_end_of_a_tied_model_is_merged_into_that_end_alone(
    loaded: Load, pico_llama: Path, tmp_path: Path, targets: list[str]
) -> None:
    peft_model = trained(loaded(pico_llama).model, target_modules=targets)
    for name, parameter in peft_model.named_parameters():
        if "lora_embedding_A" in name:  # of embeddings this half begins at zero
            torch.nn.init.normal_(parameter, std=0.05)
    peft_model.save_pretrained(tmp_path)
    model = loaded(pico_llama).model
    assert (logits(model) - logits(peft_model)).abs().max() > 0.05
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(merged(model, tmp_path)), logits(peft_model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_in_other_formats(loaded: Load, pico_phi: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    trained(loaded(pico_phi).model).save_pretrained(tmp_path)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / ADAPTER_WEIGHTS).items()}
    save_file(stored, tmp_path / ADAPTER_WEIGHTS)
    for name, m in from_adapter(tmp_path).modules.items():
        a, b = (stored[f"base_model.model.{name}.lora_{k}.weight"].double() for k in "AB")
        torch.testing.assert_close(m.delta().double(), 7 / 3 * b @ a, atol=1e-6, rtol=1e-5)


@THREE
@pytest.mark.parametrize("only", ["", r"layers\.1\.", r"h\.0\.", "c_proj", "fc1"])
@pytest.mark.parametrize("there", [True, False])
def test_what_is_written_peft_loads_as_the_same_change(
    loaded: Load, folder: Path, tmp_path: Path, only: str, there: bool
) -> None:
    model = loaded(folder).model
    vector = model_vector(model, only=only if any(re.search(only, n) for n in linear_modules(model)) else "")
    conv = any(isinstance(m, Conv1D) for m in linear_modules(model).values())
    with subtracted(model, vector, -1.0):
        wanted = logits(model)
    # of a folder the layout is known; of a hub id the caller has to know it (or PEFT warns, and finds it out)
    to_adapter(vector, tmp_path / "a", str(folder) if there else "owner/name", transposed=None if there else conv)
    assert json.loads((tmp_path / "a" / ADAPTER_CONFIG).read_text())["fan_in_fan_out"] is conv
    peft_model = PeftModel.from_pretrained(loaded(folder).model, tmp_path / "a").eval()
    torch.testing.assert_close(logits(peft_model), wanted, atol=1e-5, rtol=1e-5)
    adapted = {n.removeprefix("base_model.model.") for n, m in peft_model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(vector.modules)
    # the change itself is the same bit for bit, read by peft or by us
    assert read_adapter(peft_model, {}).digest() == vector.digest()
    assert from_adapter(tmp_path / "a").digest() == vector.digest()


def test_a_vector_there_and_back_knows_how_its_base_keeps_weights(
    loaded: Load, pico_gpt2: Path, tmp_path: Path
) -> None:
    trained(loaded(pico_gpt2).model).save_pretrained(tmp_path / "a")
    vector = from_adapter(tmp_path / "a")
    vector.save(tmp_path / "v")
    to_adapter(-2 * TaskVector.load(tmp_path / "v"), tmp_path / "b", "owner/name")
    assert json.loads((tmp_path / "b" / ADAPTER_CONFIG).read_text())["fan_in_fan_out"] is True
    assert from_adapter(tmp_path / "b").digest() == (-2 * vector).digest()


def test_a_module_that_is_not_changed_at_all(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """PEFT knows no rank 0."""
    name = "model.layers.0.mlp.fc1"
    vector = TaskVector({name: LowRank(torch.zeros(0, 64), torch.zeros(128, 0))})
    to_adapter(vector, tmp_path, "base")
    model = loaded(pico_phi).model
    wanted = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(model, tmp_path).eval()), wanted)
    assert from_adapter(tmp_path).norm() == 0.0


def test_dense_changes_are_no_adapter(tmp_path: Path) -> None:
    vector = TaskVector({"m.a": Dense(torch.ones(3, 3)), "m.b": LowRank(torch.ones(1, 3), torch.ones(3, 1))})
    with pytest.raises(VectorError, match=r"dense in 1 modules: m\.a\. Compress it with to_low_rank") as caught:
        to_adapter(vector, tmp_path / "a", "base")
    assert "m.b" not in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_names_of_a_model_that_is_not_known() -> None:
    """Only full paths, or where these may be ends of others one expression."""
    assert target_modules(["m.a", "m.b"], ["m.a", "m.b"], short=False) == ["m.a", "m.b"]
    assert target_modules(["a", "m.b"], ["a", "m.b"], short=False) == r"a|m\.b"
    assert target_modules(["m.a", "x.m.a"], ["m.a", "x.m.a"], short=False) == ["m.a", "x.m.a"]
    assert target_modules(["m.a"], ["m.a", "x.m.a"]) == r"m\.a"
    assert target_modules(["m.a"], ["m.a", "m.b"]) == ["a"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A small valid adapter; tests spoil it."""
    folder = tmp_path / "adapter"
    to_adapter(TaskVector({"m.a": LowRank(torch.ones(2, 3), torch.ones(4, 2))}), folder, "owner/base")
    return folder


def spoil(adapter: Path, **changes: Any) -> None:
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(adapter: Path, said: str) -> None:
    with pytest.raises(VectorError, match=said) as caught:
        from_adapter(adapter)
    assert str(adapter) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "it is IA3; only LORA"),
        ({"peft_type": None}, "it is of no kind"),
        ({"use_dora": True}, "it is a DoRA"),
        ({"bias": "all"}, "trained biases"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, r"whole modules \(modules_to_save: \['lm_head'\]\)"),
        ({"lora_bias": True}, "uses lora_bias, which"),
        ({"trainable_token_indices": [1, 2]}, "uses trainable_token_indices"),
        ({"target_parameters": ["w"], "alora_invocation_tokens": [1]}, "alora_invocation_tokens, target_parameters"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication"),
        ({"something_new": {"x": 1}}, "uses something_new"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"init_lora_weights": "olora"}, "changes the base"),
        ({"init_lora_weights": ["gaussian"]}, "changes the base"),
        ({"r": 3}, r"m\.a: adapter_config.json says rank 3, its factors are \(2, 3\) and \(4, 2\)"),
        ({"rank_pattern": {"a": 8}}, "says rank 8"),
        ({"rank_pattern": {"(": 8}}, "rank_pattern is no mapping of patterns"),
        ({"alpha_pattern": ["a"]}, "alpha_pattern is no mapping of patterns"),
        ({"lora_alpha": None}, "lora_alpha of m.a is 'None', not a number"),
        ({"lora_alpha": "16"}, "lora_alpha of m.a is '16', not a number"),
        ({"lora_alpha": math.nan}, "lora_alpha of m.a is 'nan', not a number"),
        ({"lora_alpha": 10**400}, "lora_alpha of m.a is '1000"),
        ({"r": True}, "r of m.a is 'True', not a number"),
    ],
)
def test_settings_that_are_no_plain_lora(adapter: Path, changes: dict[str, Any], said: str) -> None:
    from_adapter(adapter)
    spoil(adapter, **changes)
    refused(adapter, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ["b"]}, r"do not reach m\.a: PEFT leaves.*\n.*target_modules names b, for which"),
        ({"target_modules": ["m.a", "b"]}, r"means:\n  target_modules names b, for which there are no factors$"),
        ({"target_modules": r"m\.b"}, r"do not reach m\.a: PEFT leaves these factors out$"),
        ({"exclude_modules": ["a"]}, r"do not reach m\.a"),
        ({"exclude_modules": "m.*"}, r"do not reach m\.a"),
        ({"target_modules": ["a"], "layers_to_transform": [0]}, r"do not reach m\.a"),
        ({"target_modules": "("}, "does not tell which modules are meant"),
        ({"target_modules": 3}, "does not tell which modules are meant"),
        ({"target_modules": "(m|m.)*a"}, "may take for ever"),
        ({"exclude_modules": "(x*)*y"}, "may take for ever"),
        ({"layers_to_transform": [0], "layers_pattern": ["(x+)+"]}, "may take for ever"),
    ],
)
def test_factors_that_the_configuration_does_not_mean(adapter: Path, changes: dict[str, Any], said: str) -> None:
    spoil(adapter, **changes)
    refused(adapter, said)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.layers\.\d+\.(?:self_attn\.[qv]_proj|mlp\.(?:fc1|up_proj))"},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["fc1", "dense"], "layers_to_transform": 0, "layers_pattern": "layers"},
    ],
)
def test_whatever_peft_reaches_is_what_the_configuration_means(
    loaded: Load, pico_phi: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    trained(loaded(pico_phi).model, **options).save_pretrained(tmp_path)
    assert 0 < len(from_adapter(tmp_path).modules) < len(linear_modules(loaded(pico_phi).model))
    refuse_misfit(tmp_path, model_of(pico_phi))


def test_an_adapter_that_does_not_fit_its_model(loaded: Load, pico_phi: Path, pico_llama: Path, tmp_path: Path) -> None:
    """PEFT would leave factors out, or modules as they are; a vector of the rest would be another edit."""
    folder = tmp_path / "adapter"
    trained(loaded(pico_phi).model, target_modules=["q_proj", "fc1"]).save_pretrained(folder)
    apply(folder, pico_phi, 1.0, tmp_path / "out")
    stored = load_file(folder / ADAPTER_WEIGHTS)

    def not_put_on(said: str, model: Path = pico_phi) -> None:
        for way in (apply, check):
            with pytest.raises(VectorError, match=said) as caught:
                way(folder, model, 1.0, tmp_path / ("out" if way is check else "none"))
            assert str(folder) in str(caught.value)
        assert not (tmp_path / "none").exists()

    not_put_on("the adapter does not fit the model", pico_llama)
    one = "model.layers.1.mlp.fc1"
    rest = {name: tensor for name, tensor in stored.items() if one not in name}
    save_file(rest, folder / ADAPTER_WEIGHTS)
    not_put_on(rf"reaches what it holds nothing for: {one}\.lora_A, {one}\.lora_B$")
    more = {name.replace("layers.1", "layers.7"): tensor.clone() for name, tensor in stored.items()}
    save_file({**stored, **more}, folder / ADAPTER_WEIGHTS)
    not_put_on(r"holds what the model has no place for: model\.layers\.7\.mlp\.fc1\.lora_A")
    narrow = {n: t[:, :10].clone() if n.endswith(f"{one}.lora_A.weight") else t for n, t in stored.items()}
    save_file(narrow, folder / ADAPTER_WEIGHTS)
    not_put_on("size mismatch for .*layers.1.mlp.fc1.lora_A")


def test_peft_s_own_dora_and_biases(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    for name, options in {
        "DoRA": {"use_dora": True},
        "biases": {"bias": "all"},
        "whole modules": {"modules_to_save": ["lm_head"]},
        "no factor of a linear layer: .*embed": {"target_modules": ["embed_tokens", "fc1"]},
    }.items():
        trained(loaded(pico_phi).model, **options).save_pretrained(tmp_path / name[:4], save_embedding_layers=False)
        refused(tmp_path / name[:4], name)


A, B = "base_model.model.m.a.lora_A.weight", "base_model.model.m.a.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "without a single module"),
        ({A: torch.ones(2, 3)}, "a factor is missing for m.a"),
        ({A: torch.ones(2, 3), B: torch.ones(4, 3)}, "says rank 2"),
        ({A: torch.ones(2, 3, 1, 1), B: torch.ones(4, 2, 1, 1)}, "says rank 2"),
        ({A: torch.ones(2, 3), B: torch.full((4, 2), math.nan)}, "not finite in 1 modules: m.a"),
        ({A: torch.ones(2, 3, dtype=torch.int32), B: torch.ones(4, 2)}, "no factor of a linear layer: .*lora_A"),
        ({A: torch.ones(2, 3), B: torch.ones(4, 2), "m.a.bias": torch.ones(4)}, "no factor .*: m.a.bias"),
        ({A: torch.ones(2, 3), B: torch.ones(4, 2), f"x{B}": torch.ones(4)}, "no factor .*: xbase_model"),
    ],
)
def test_weights_that_are_no_plain_lora(adapter: Path, tensors: dict[str, Tensor], said: str) -> None:
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    refused(adapter, said)


def test_files_that_are_missing_or_damaged(adapter: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no adapter of PEFT's: it has no adapter_config.json")
    weights, config = adapter / ADAPTER_WEIGHTS, adapter / ADAPTER_CONFIG
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    refused(adapter, "damaged")
    weights.unlink()
    refused(adapter, "adapter_model.safetensors is missing")
    torch.save({A: torch.ones(2, 3)}, adapter / "adapter_model.bin")
    refused(adapter, "its weights are pickled .* never opened")
    weights.write_bytes(whole)
    refused(adapter, "two sets of factors, .* remove the old one")
    (adapter / "adapter_model.bin").unlink()
    from_adapter(adapter)
    for text in ("{", "[1, 2]", '"x"', "[" * 100_000, "\ud800"):
        config.write_bytes(text.encode("utf-8", "surrogatepass"))
        refused(adapter, "damaged")
