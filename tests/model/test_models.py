"""Loading, fingerprints, and the modules that a vector can go on."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from unlearn.errors import ModelError
from unlearn.model.load import Loaded, fingerprint, linear_modules, load, resolve_targets
from unlearn.recipe.schema import ModelSpec
from unlearn.vector.change import LowRank
from unlearn.vector.task_vector import TaskVector
from unlearn.vector.write import export_merged

SIX = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


def _spec(path: Path | str, **more: Any) -> ModelSpec:
    return ModelSpec.model_validate({"path": str(path), "device": "cpu", **more})


@pytest.fixture
def copy(pico_phi: Path, tmp_path: Path) -> Path:
    """A pico Phi to damage."""
    return Path(shutil.copytree(pico_phi, tmp_path / "model"))


def _edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _edit_json(path: Path, **more: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def test_loads_quietly_in_evaluation_mode(pico_phi: Path, capfd: pytest.CaptureFixture[str]) -> None:
    got = load(_spec(pico_phi), str(pico_phi))
    assert capfd.readouterr() == ("", "")
    assert not got.model.training
    assert (got.dtype, got.device) == (torch.float32, torch.device("cpu"))
    assert {p.dtype for p in got.model.parameters()} == {torch.float32}
    assert got.model.config._attn_implementation == "sdpa"
    stored = load_file(pico_phi / "model.safetensors")
    for name, tensor in got.model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    half = load(_spec(pico_phi, dtype="bfloat16"), str(pico_phi))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}


def test_library_chatter_is_filtered_but_not_its_errors(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as chatter

    from unlearn.console import quietly

    ops = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not ops.filter(ops.makeRecord("", 30, "", 0, "Failed to load CPU gemm_4bit_forward from …", (), None))
    assert ops.filter(ops.makeRecord("", 30, "", 0, "other", (), None))
    chatter.set_verbosity_warning()  # a Trainer of another test may have changed it
    before = chatter.get_verbosity()
    with quietly():
        assert chatter.get_verbosity() == logging.ERROR
    assert chatter.get_verbosity() == before
    with pytest.raises(ZeroDivisionError), quietly():
        raise ZeroDivisionError
    assert chatter.get_verbosity() == before != logging.ERROR


def test_fingerprint_knows_value_name_dtype_and_shape(
    loaded: Callable[..., Loaded], pico_phi: Path, pico_llama: Path, pico_gpt2: Path
) -> None:
    got = loaded(pico_phi)
    assert loaded(pico_phi).fingerprint == got.fingerprint
    models = [loaded(pico_phi, "bfloat16"), *(loaded(folder) for folder in (pico_phi, pico_llama, pico_gpt2))]
    assert len({model.fingerprint for model in models}) == 4
    weight, before = got.model.get_parameter("model.layers.1.mlp.fc1.weight"), fingerprint(got.model)
    old = weight.data[3, 5].clone()
    weight.data[3, 5] = torch.nextafter(old, old + 1)
    assert fingerprint(got.model) != before
    weight.data[3, 5] = old
    assert fingerprint(got.model) == before

    def of(**tensors: torch.Tensor) -> str:
        module = torch.nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return fingerprint(module)

    six = torch.arange(6.0)
    prints = [of(a=six), of(b=six), of(a=six, b=six + 1)]
    prints += [of(a=six.view(2, 3)), of(a=six.view(torch.int32)), of(a=six.view(2, 3).T)]
    assert len(set(prints)) == len(prints)
    assert of(a=six.view(2, 3).T) == of(a=six.view(2, 3).T.contiguous())
    assert of(a=six, b=six + 1) == of(b=six + 1, a=six)
    assert of(a=six, b=six) == of(a=six)  # tied: one tensor


def _edit_tokenizer(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


def _config(name: str, **more: object) -> Callable[[Path], None]:
    return lambda folder: _edit_json(folder / f"{name}.json", **more)


_ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
_END = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
_A, _B = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
_START = {
    "type": "TemplateProcessing",
    **{"single": [_END, _A], "pair": [_A, _B]},
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}
# Everything beside the weights that an answer, a label or a stop depends on, and whether it is the tokenizer's.
OTHERWISE: dict[str, tuple[bool, Callable[[Path], object]]] = {
    "the token that ends a text": (False, _config("generation_config", eos_token_id=[0, 7])),
    "how it writes": (False, _config("generation_config", repetition_penalty=1.3)),
    "positions": (False, _config("config", rope_parameters=_ROPE)),
    "activation": (False, _config("config", hidden_act="relu")),
    "norms": (False, _config("config", layer_norm_eps=1e-3)),
    "how far it reads": (False, _config("config", max_position_embeddings=64)),
    "dropout": (False, _config("config", resid_pdrop=0.5)),
    "the tokenizer's end token": (True, _config("tokenizer_config", eos_token="a")),
    "padding token": (True, _config("tokenizer_config", pad_token="a")),
    "length": (True, _config("tokenizer_config", model_max_length=16)),
    "padding side": (True, _config("tokenizer_config", padding_side="left")),
    "chat template": (True, lambda f: (f / "chat_template.jinja").write_text("{{ messages }}")),
    "normaliser": (True, _config("tokenizer", normalizer={"type": "Lowercase"})),
    "merges": (True, lambda f: _edit_tokenizer(f, lambda t: t["model"]["merges"].pop())),
    "start token": (True, _config("tokenizer", post_processor=_START)),
}


@pytest.fixture(scope="module")
def before(pico_phi: Path) -> Loaded:
    """The model as it is; read only."""
    return load(_spec(pico_phi, dtype="float32"), str(pico_phi))


@pytest.mark.parametrize("what", OTHERWISE)
def test_fingerprint_knows_what_answers_depend_on_beside_the_weights(
    loaded: Callable[..., Loaded], before: Loaded, copy: Path, what: str
) -> None:
    tokenizers, edit = OTHERWISE[what]
    edit(copy)
    after = loaded(copy)
    assert fingerprint(after.model) == fingerprint(before.model)
    assert after.fingerprint != before.fingerprint
    assert (after.words != before.words) == tokenizers


def test_fingerprint_knows_no_place_no_layout_and_no_use(
    loaded: Callable[..., Loaded], before: Loaded, pico_phi: Path, copy: Path
) -> None:
    for path in copy.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    _edit_json(copy / "config.json", transformers_version="4.0.0", _name_or_path="elsewhere")
    after = loaded(copy)
    assert (after.fingerprint, after.words) == (before.fingerprint, before.words)
    before.tokenizer(["a", "longer"], padding=True, truncation=True, max_length=3)  # the library keeps these settings
    assert loaded(pico_phi).words == before.words


@pytest.mark.usefixtures("own_modules")
def test_fingerprint_knows_code_of_the_models_own(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_TRUST_REMOTE_CODE", "1")
    _edit_json(copy / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    (copy / "own.py").write_text(
        "from transformers import PhiForCausalLM\nfrom .scale import SCALE\n\n"
        "class Own(PhiForCausalLM):\n    def forward(self, *args, **kwargs):\n"
        "        out = super().forward(*args, **kwargs)\n        out.logits = out.logits * SCALE\n        return out\n"
    )
    (copy / "custom_generate").mkdir()
    found = []
    for scale, writes in (("2", "[]"), ("3", "[]"), ("2", "None"), ("2", "[]")):
        (copy / "scale.py").write_text(f"SCALE = {scale}\n")
        (copy / "custom_generate" / "generate.py").write_text(f"def generate(model, **more):\n    return {writes}\n")
        importlib.invalidate_caches()  # of two folders made within a tick of the clock it sees the first
        found.append(load(_spec(copy, trust_remote_code=True), str(copy)).fingerprint)
    assert found[0] == found[3]
    assert len(set(found)) == 3


def test_missing_unexpected_and_misshapen_weights_are_all_listed(copy: Path) -> None:
    def edit(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.layers.0.mlp.fc1.weight"]
        weights["model.layers.7.mlp.fc1.weight"] = torch.zeros(2)
        weights["model.layers.1.mlp.fc2.bias"] = torch.zeros(3)

    _edit_weights(copy, edit)
    with pytest.raises(ModelError) as caught:
        load(_spec(copy), str(copy))
    assert str(caught.value).splitlines() == [
        f"model.path: the weights in {copy} do not fit its config.json",
        "  missing: model.layers.0.mlp.fc1.weight",
        "  unexpected: model.layers.7.mlp.fc1.weight",
        "  wrong shape: model.layers.1.mlp.fc2.bias has (3,), not (64,)",
    ]


def test_a_head_of_its_own_is_no_tied_one(pico_llama: Path, tmp_path: Path, loaded: Callable[..., Loaded]) -> None:
    """transformers loads it untied, so that the configuration must not tie it for whoever asks or reads it next."""
    folder, again = tmp_path / "head", tmp_path / "again"
    shutil.copytree(pico_llama, folder)
    _edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 0.1}))
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    made = loaded(folder)
    made.model.tie_weights()
    assert torch.equal(made.model.lm_head.weight, head)
    export_merged(made.model, TaskVector({"model.layers.0.mlp.up_proj": unit(made.model)}), 1.0, made.tokenizer, again)
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(loaded(again).model.lm_head.weight, head)
    # a copy is none, and tied as without it
    _edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    made = loaded(folder)
    assert made.model.config.tie_word_embeddings is True
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight
    assert made.fingerprint == loaded(pico_llama).fingerprint


def unit(model: Any) -> LowRank:
    rows, columns = model.get_parameter("model.layers.0.mlp.up_proj.weight").shape
    return LowRank(torch.ones(1, columns), torch.ones(rows, 1))


def test_padding_token_is_set_in_memory_only(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    before = (copy / "tokenizer_config.json").read_bytes()
    tokenizer = load(_spec(copy), str(copy)).tokenizer
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(copy))
    assert (copy / "tokenizer_config.json").read_bytes() == before
    for name in ("eos_token", "bos_token"):
        del settings[name]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="neither a padding nor an end token"):
        load(_spec(copy), str(copy))


def test_tokenizer_of_another_model(copy: Path) -> None:
    _edit_json(copy / "config.json", vocab_size=500)
    _edit_weights(copy, lambda w: w.update({n: w[n][:500].clone() for n in w if "embed" in n or "lm_head" in n}))
    with pytest.raises(ModelError, match="has 512 tokens, its model only 500"):
        load(_spec(copy), str(copy))


def test_what_cannot_be_opened(copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-1000])
    with pytest.raises(ModelError, match="cannot be opened as a causal language model"):
        load(_spec(copy), str(copy))
    for kind in ("no_such_type", "vit"):
        _edit_json(copy / "config.json", model_type=kind)
        with pytest.raises(ModelError, match="cannot be opened as a causal language model"):
            load(_spec(copy), str(copy))
    with pytest.raises(ModelError, match=r"owner/gone at revision abc is neither a local folder.*as well") as caught:
        load(_spec("owner/gone", revision="abc"), "owner/gone")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"no cuda:99 here \(CUDA devices: \d\)"):
        load(_spec(copy, device="cuda:99"), str(copy))


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """``gpus(count, major)``: torch believes in so many GPUs of one compute capability; models stay where they are."""

    def pretend(count: int, major: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)  # as T4 and V100 have it
        monkeypatch.setattr(PreTrainedModel, "to", lambda self, device: self)

    return pretend


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_auto_is_no_format_that_is_only_emulated(
    major: int, dtype: torch.dtype, pico_phi: Path, gpus: Callable[[int, int], None]
) -> None:
    gpus(1, major)
    found = load(_spec(pico_phi, device="auto"), str(pico_phi))
    assert (found.dtype, found.device.type) == (dtype, "cuda")
    assert load(_spec(pico_phi, device="cuda", dtype="bfloat16"), str(pico_phi)).dtype == torch.bfloat16  # if asked for


def test_one_gpu_for_several_processes(
    pico_phi: Path, gpus: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2, 8)
    assert load(_spec(pico_phi, device="cuda:1"), str(pico_phi)).device == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert load(_spec(pico_phi, device="auto"), str(pico_phi)).device == torch.device("cuda:1")
    with pytest.raises(ModelError, match="cuda:0 is one GPU, and 2 processes were started on this machine"):
        load(_spec(pico_phi, device="cuda:0"), str(pico_phi))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # several machines with a process each
    assert load(_spec(pico_phi, device="cuda:0"), str(pico_phi)).device == torch.device("cuda:0")


@pytest.mark.parametrize(("quantize", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantised_only_for_training(pico_phi: Path, quantize: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    spec = _spec(pico_phi, quantize=quantize)
    full, packed = load(spec, str(pico_phi)), load(spec, str(pico_phi), for_training=True)
    path = "model.layers.0.mlp.fc1"
    assert type(full.model.get_submodule(path)) is torch.nn.Linear
    assert type(packed.model.get_submodule(path)).__name__ == kind
    assert type(packed.model.get_output_embeddings()) is torch.nn.Linear
    assert list(linear_modules(packed.model)) == list(linear_modules(full.model))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        exact, near = full.model(ids).logits, packed.model(ids).logits
    assert 0 < (exact - near).norm() / exact.norm() < 0.3


def test_linear_modules_leave_out_the_head(phi: Loaded, llama: Loaded, gpt2: Loaded) -> None:
    assert list(linear_modules(phi.model)) == [
        f"model.layers.{n}.{name}"
        for n in range(2)
        for name in (*(f"self_attn.{p}" for p in SIX[:4]), "mlp.fc1", "mlp.fc2")
    ]
    assert len(linear_modules(llama.model)) == 14
    found = {name.split(".", 3)[3] for name in linear_modules(gpt2.model)}
    assert found == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_targets_by_name_end_and_path(phi: Loaded, gpt2: Loaded) -> None:
    model = phi.model
    assert resolve_targets(model, "all-linear") == tuple(linear_modules(model))
    assert resolve_targets(model, SIX) == tuple(linear_modules(model))
    assert resolve_targets(model, ("fc1", "model.layers.0.self_attn.dense", "mlp.fc1")) == (
        "model.layers.0.self_attn.dense",
        "model.layers.0.mlp.fc1",
        "model.layers.1.mlp.fc1",
    )
    assert len(resolve_targets(gpt2.model, ("c_proj",))) == 4
    assert len(resolve_targets(gpt2.model, ("attn.c_proj",))) == 2


def test_targets_within_a_stretch_of_the_depth(phi: Loaded) -> None:
    layers = phi.model.config.num_hidden_layers
    everything = resolve_targets(phi.model, "all-linear")
    last = resolve_targets(phi.model, "all-linear", (1 - 1 / layers, 1.0))
    assert last == tuple(n for n in everything if f".{layers - 1}." in n)
    assert 0 < len(last) < len(everything)
    with pytest.raises(ModelError, match=f"none of the {layers} layers lies between"):
        resolve_targets(phi.model, "all-linear", (0.0, 0.01))


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("q_prj", "fc1"), r"q_prj \(did you mean q_proj\?\)"),
        (("lm_head", "embed_tokens"), "lm_head, embed_tokens"),
        (("proj",), r"proj \(did you mean ._proj\?\)"),
        ((), r"\(no name given\)"),
    ],
)
def test_targets_that_match_nothing(phi: Loaded, targets: tuple[str, ...], named: str) -> None:
    message = rf"PhiForCausalLM is called {named}\. It has q_proj, k_proj, v_proj, dense, fc1, fc2$"
    with pytest.raises(ModelError, match=message):
        resolve_targets(phi.model, targets)
