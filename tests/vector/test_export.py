"""Exports against dense references: plain PEFT and plain transformers must load the edited model from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from unlearn.data.encoding import scored_rows
from unlearn.data.items import Item
from unlearn.errors import VectorError
from unlearn.model.load import Loaded
from unlearn.recipe.schema import Recipe
from unlearn.report.publish import CardFacts, card, escape, eval_results, model_index
from unlearn.results import Chosen, Score, ScoreRow
from unlearn.vector.change import Dense, LowRank
from unlearn.vector.edit import applied, shape_of
from unlearn.vector.shards import Slot, parse_size, write_shards
from unlearn.vector.task_vector import TaskVector
from unlearn.vector.write import export_adapter, export_merged, generator_for, rescored, round_stochastically

# PEFT asks transformers under a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
FAMILIES = ["phi", "llama", "gpt2"]
LAMBDA = 0.75
Load = Callable[..., Loaded]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(f"pico_{request.param}")
    assert isinstance(path, Path)
    return path


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n != "lm_head"}


def a_vector(model: nn.Module, scale: float = 0.05, grid: float | None = None, only: str = "") -> TaskVector:
    """Random factors of ranks 1 to 4, in every linear module whose name matches ``only``.

    With ``grid`` all values are small multiples of a power of two, so that every way of summing is exact.
    """
    g = torch.Generator().manual_seed(1)
    modules = {}
    for i, (name, module) in enumerate(linears(model).items()):
        if not re.search(only, name):
            continue
        rank = 1 + i % 4
        rows, columns = shape_of(module)
        a, b = torch.randn(rank, columns, generator=g), torch.randn(rows, rank, generator=g)
        if grid is not None:
            a, b = a.clamp(-2, 2).mul(4).round() / 4, b.clamp(-2, 2).mul(4).round() * grid
        modules[name] = LowRank(a, b if grid is not None else b * scale)
    return TaskVector(modules)


def dense(model: nn.Module, vector: TaskVector, c: float) -> dict[str, Tensor]:
    """theta - c * (B @ A) in float32, written out."""
    weights = {}
    for name, m in vector.modules.items():
        weight = model.get_parameter(f"{name}.weight").detach().float()
        delta = m.delta()
        weights[f"{name}.weight"] = weight - c * (delta.T if isinstance(model.get_submodule(name), Conv1D) else delta)
    return weights


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(2))
    out = model(input_ids=ids).logits
    assert isinstance(out, Tensor)
    return out.float()


@torch.no_grad()
def dense_logits(model: nn.Module, vector: TaskVector, c: float) -> Tensor:
    before = snapshot(model)
    for name, weight in dense(model, vector, c).items():
        model.get_parameter(name).copy_(weight)
    out = logits(model)
    model.load_state_dict(before)
    return out


# adapters


def test_plain_peft_gives_the_edited_models_logits(loaded: Load, folder: Path, tmp_path: Path) -> None:
    model = loaded(folder).model
    vector = a_vector(model)
    before = snapshot(model)
    wanted = dense_logits(model, vector, LAMBDA)
    said = export_adapter(vector, LAMBDA, str(folder), model, tmp_path / "adapter")
    assert same(before, model.state_dict())
    base = AutoModelForCausalLM.from_pretrained(folder)
    plain = logits(base)
    peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(peft), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - plain).abs().max() > 0.1  # there was something to see
    assert said["modules"] == len(vector.modules)
    assert said["rank"] == 4
    assert said["files"] == ["adapter_config.json", "adapter_model.safetensors"]
    # merging by PEFT is the same edit
    torch.testing.assert_close(logits(peft.merge_and_unload()), wanted, atol=1e-5, rtol=1e-5)


def test_the_sign_agrees_with_pefts_own_negation(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """A LoRA as PEFT trains it, negated by PEFT's add_weighted_adapter, against our export of its vector."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    trained = get_peft_model(loaded(pico_phi).model, config)
    modules = {
        n.removeprefix("base_model.model."): LowRank(m.lora_A.default.weight.data, 2 * m.lora_B.default.weight.data)
        for n, m in trained.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }
    trained.add_weighted_adapter(["default"], [-LAMBDA], "forgotten", combination_type="linear")
    trained.set_adapter("forgotten")
    wanted = logits(trained.eval())
    model = loaded(pico_phi).model
    export_adapter(TaskVector(modules), LAMBDA, str(pico_phi), model, tmp_path)
    assert len(modules) == 4
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, tmp_path)), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("only", [r"layers\.1\.mlp\.fc1$", r"layers\.0\.self_attn", r"(q_proj|fc2)$"])
def test_exactly_the_vectors_modules_are_adapted(loaded: Load, pico_phi: Path, tmp_path: Path, only: str) -> None:
    model = loaded(pico_phi).model
    vector = a_vector(model, only=only)
    wanted = dense_logits(model, vector, LAMBDA)
    export_adapter(vector, LAMBDA, "base", model, tmp_path)
    peft = PeftModel.from_pretrained(model, tmp_path)
    adapted = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(vector.modules)
    torch.testing.assert_close(logits(peft), wanted, atol=1e-5, rtol=1e-5)


class Nested(nn.Module):
    """Paths of which one is the end of another, and layers 1 and 11, which a careless match confuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        self.outer = nn.Module()
        self.outer.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, *self.outer.layers):  # type: ignore[misc]
            x = torch.tanh(layer(x))
        return x


def test_paths_that_are_the_end_of_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested()
    m = LowRank(torch.randn(2, 4), torch.randn(4, 2))
    vector = TaskVector({"layers.1": m, "layers.3": LowRank(torch.randn(1, 4), torch.randn(4, 1))})
    x = torch.randn(3, 4)
    export_adapter(vector, 1.0, "base", model, tmp_path)
    with applied(model, vector, -1.0):
        wanted = model(x)
    config = LoraConfig.from_pretrained(tmp_path)
    config.task_type = None  # a bare module is no language model
    config.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(model, tmp_path)
    adapted = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"layers.1", "layers.3"}
    torch.testing.assert_close(peft(x), wanted)


def test_the_short_form_is_used_where_it_means_the_same(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    model = loaded(pico_phi).model
    export_adapter(a_vector(model), LAMBDA, "owner/base", model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["dense", "fc1", "fc2", "k_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["inference_mode"] is True
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert {f.get_slice(k).get_dtype() for k in f.keys()} == {"F32"}  # noqa: SIM118


def test_adapter_on_bf16_is_what_was_scored(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """Both act beside the weights in float32; only the roundings of activations differ."""
    model = loaded(pico_phi, "bfloat16").model
    vector = a_vector(model, scale=0.01)
    plain = logits(model)
    with applied(model, vector, -LAMBDA):
        scored = logits(model)
    export_adapter(vector, LAMBDA, "base", model, tmp_path)
    reloaded = logits(PeftModel.from_pretrained(model, tmp_path))
    assert (reloaded - scored).norm() < 0.2 * (scored - plain).norm()


def test_a_vector_of_another_model_is_refused(loaded: Load, pico_phi: Path, pico_llama: Path, tmp_path: Path) -> None:
    vector = a_vector(loaded(pico_llama).model)
    phi = loaded(pico_phi).model
    with pytest.raises(VectorError, match=r"model\.layers\.1\.mlp\.up_proj"):
        export_adapter(vector, 1.0, "base", phi, tmp_path / "a")
    with pytest.raises(VectorError, match=r"model\.layers\.1\.mlp\.up_proj"):
        export_merged(phi, vector, 1.0, None, tmp_path / "m")
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "m").exists()


# whole weights


def test_merged_float32_is_the_dense_edit_bit_for_bit(loaded: Load, folder: Path, tmp_path: Path) -> None:
    made = loaded(folder)
    model = made.model
    with torch.no_grad():
        for name in linears(model):  # on a grid where every order of summing is exact
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_((weight * 1024).round() / 1024)
    vector = a_vector(model, grid=2**-10)
    before, config = snapshot(model), model.config.to_dict()
    wanted = {**before, **dense(model, vector, LAMBDA)}
    said = export_merged(model, vector, LAMBDA, made.tokenizer, tmp_path)
    assert same(before, model.state_dict())
    assert model.config.to_dict() == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    assert same(again.state_dict(), wanted)
    assert said["survived"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert said["survived"]["norm_ratio"] == pytest.approx(1, abs=1e-12)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("The capital of Peru").input_ids == made.tokenizer("The capital of Peru").input_ids


def test_merged_is_what_was_scored(loaded: Load, folder: Path, tmp_path: Path) -> None:
    made = loaded(folder)
    vector = a_vector(made.model)
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path)
    with applied(made.model, vector, -LAMBDA):
        scored, weights = logits(made.model), snapshot(made.model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same(again.state_dict(), weights)
    assert torch.equal(logits(again), scored)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_merged_bf16_is_rounded_to_nearest_even_once(loaded: Load, folder: Path, tmp_path: Path, held: str) -> None:
    made = loaded(folder, held)
    vector = a_vector(made.model, grid=2**-12)
    wanted = {n: t.to(torch.bfloat16) for n, t in {**snapshot(made.model), **dense(made.model, vector, LAMBDA)}.items()}
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path, dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    state = again.state_dict()
    off = {n for n in wanted if not torch.equal(state[n], wanted[n])}
    if held == "bfloat16":
        assert not off
    # where the float32 sum itself is not exact, one bit of it may decide a tie; nowhere more than that
    assert all((state[n] != wanted[n]).float().mean() < 1e-3 for n in off)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_a_dense_vector_merges_as_its_factors_do(loaded: Load, folder: Path, tmp_path: Path, held: str) -> None:
    made = loaded(folder, held)
    factors = a_vector(made.model, grid=2**-12)
    vector = factors.map(lambda name, m: m if name.endswith(("dense", "c_attn", "o_proj")) else Dense(m.delta()))
    assert {type(m) for m in vector.modules.values()} == {LowRank, Dense}
    said = export_merged(made.model, vector, LAMBDA, None, tmp_path / "dense", dtype=torch.float32)
    export_merged(made.model, factors, LAMBDA, None, tmp_path / "factors", dtype=torch.float32)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("dense", "factors"))
    for name, weight in dense(made.model, vector, LAMBDA).items():
        torch.testing.assert_close(one[name], weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-6)
    assert said["survived"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert said["survived"]["norm_ratio"] == pytest.approx(1.0, abs=1e-6)


def test_what_a_dense_vector_was_scored_with_is_what_is_written(loaded: Load, folder: Path, tmp_path: Path) -> None:
    made = loaded(folder)
    vector = a_vector(made.model).map(lambda _, m: Dense(m.delta()))
    with applied(made.model, vector, -LAMBDA):
        scored = snapshot(made.model)
    export_merged(made.model, vector, LAMBDA, None, tmp_path)
    written = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(written[name], scored[name]) for name in written)


def test_a_dense_vector_is_no_adapter(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    model = loaded(pico_phi).model
    factors = a_vector(model)
    vector = factors.map(lambda name, m: Dense(m.delta()) if name.endswith("fc1") else m)
    with pytest.raises(VectorError, match=r"dense in 2 modules: model\.layers\.0\.mlp\.fc1, model") as caught:
        export_adapter(vector, LAMBDA, "base", model, tmp_path / "a")
    assert "to_low_rank(rank)" in str(caught.value)
    assert "export merged" in str(caught.value)
    assert not (tmp_path / "a").exists()
    # and the advice helps
    export_adapter(vector.to_low_rank(rank=4), LAMBDA, "base", model, tmp_path / "a")
    wanted = dense_logits(model, factors, LAMBDA)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, tmp_path / "a")), wanted, atol=1e-4, rtol=1e-4)


def test_survival_against_a_direct_computation(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi, "bfloat16")
    vector = a_vector(made.model, scale=3e-4)
    said = export_merged(made.model, vector, LAMBDA, None, tmp_path)["survived"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    before = made.model.state_dict()
    realised, intended = {}, {}
    for name, m in vector.modules.items():
        realised[name] = (again[f"{name}.weight"].double() - before[f"{name}.weight"].double()).flatten()
        intended[name] = (-LAMBDA * (m.B.double() @ m.A.double())).flatten()
    for name in vector.modules:
        mine = said["modules"][name]
        assert mine["cosine"] == pytest.approx(
            float(torch.nn.functional.cosine_similarity(realised[name], intended[name], dim=0)), rel=1e-5
        )
        assert mine["norm_ratio"] == pytest.approx(float(realised[name].norm() / intended[name].norm()), rel=1e-5)
        assert mine["changed"] == pytest.approx(float((realised[name] != 0).double().mean()), abs=1e-12)
    r, i = torch.cat(list(realised.values())), torch.cat([intended[n] for n in realised])
    assert said["cosine"] == pytest.approx(float(r @ i / (r.norm() * i.norm())), rel=1e-5)
    assert said["norm_ratio"] == pytest.approx(float(r.norm() / i.norm()), rel=1e-5)
    assert said["changed"] == pytest.approx(float((r != 0).double().mean()), abs=1e-12)
    assert 0.2 < said["cosine"] < 0.98
    assert 0.05 < said["changed"] < 0.9


def test_stochastic_rounding_keeps_the_edit_on_average(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi, "bfloat16")
    name = "model.layers.0.mlp.fc1"
    m = LowRank(torch.ones(1, 64), torch.full((128, 1), 2e-5))
    vector = TaskVector({name: m})
    nearest = export_merged(made.model, vector, 1.0, None, tmp_path / "nearest", accept_rounding=True)["survived"]
    pristine = made.model.state_dict()[f"{name}.weight"].double()
    means = []
    for seed in range(20):
        out = tmp_path / str(seed)
        export_merged(made.model, vector, 1.0, None, out, stochastic_rounding=True, seed=seed)
        with safe_open(out / "model.safetensors", "pt") as f:
            weight, other = f.get_tensor(f"{name}.weight"), f.get_tensor("model.layers.1.mlp.fc1.weight")
        means.append(float((weight.double() - pristine).mean()))
        assert torch.equal(other, made.model.state_dict()["model.layers.1.mlp.fc1.weight"])  # not edited, not touched
    spread = torch.tensor(means).std() / 20**0.5
    assert nearest["norm_ratio"] < 0.5
    assert abs(sum(means) / 20 + 2e-5) < 4 * float(spread)
    assert float(spread) < 2e-6  # sharp enough to tell 2e-5 from 0


def test_stochastic_rounding_repeats_with_its_seed(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi)
    vector = a_vector(made.model)
    weights = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        export_merged(made.model, vector, 1.0, None, tmp_path / run, torch.float16, stochastic_rounding=True, seed=seed)
        weights[run] = (tmp_path / run / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def test_tied_embeddings_are_written_once(loaded: Load, pico_llama: Path, tmp_path: Path) -> None:
    made = loaded(pico_llama)
    export_merged(made.model, a_vector(made.model), 1.0, made.tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        names = set(f.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_shards(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi)
    vector = a_vector(made.model)
    said = export_merged(made.model, vector, LAMBDA, None, tmp_path / "many", shard_size="100KB")
    export_merged(made.model, vector, LAMBDA, None, tmp_path / "one")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert "model.safetensors.index.json" in said["files"]
    assert said["bytes"] == sum(p.stat().st_size for p in (tmp_path / "many").iterdir())
    many = AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert same(many.state_dict(), one.state_dict())


def test_weights_whose_files_are_named_otherwise(loaded: Load, pico_gpt_neox: Path, tmp_path: Path) -> None:
    """GPT-NeoX calls its head embed_out in files: the export must speak the files' language."""
    made = loaded(pico_gpt_neox)
    vector = a_vector(made.model, grid=2**-12)
    before, config = snapshot(made.model), made.model.config.to_dict()
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert "embed_out.weight" in f.keys()  # noqa: SIM118
    assert same(before, made.model.state_dict())
    assert made.model.config.to_dict() == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    for name, weight in dense(made.model, vector, LAMBDA).items():
        torch.testing.assert_close(again.get_parameter(name).float(), weight, atol=1e-4, rtol=2**-8)


def test_zero_edit_has_no_direction(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    model = loaded(pico_phi).model
    vector = TaskVector({"model.layers.0.mlp.fc1": LowRank(torch.zeros(1, 64), torch.zeros(128, 1))})
    said = export_merged(model, vector, 1.0, None, tmp_path)["survived"]
    assert (said["cosine"], said["norm_ratio"], said["changed"]) == (None, None, 0.0)


def test_a_merge_that_is_another_edit_is_refused(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """Its cosine computed apart; and every way out that the message names is one."""
    made = loaded(pico_phi, "bfloat16")
    vector = a_vector(made.model, scale=1e-5)
    before = made.model.state_dict()
    realised, intended = [], []
    for name, m in vector.modules.items():
        weight = before[f"{name}.weight"].double()
        delta = -LAMBDA * (m.B.double() @ m.A.double())
        realised.append(((weight + delta).bfloat16().double() - weight).flatten())
        intended.append(delta.flatten())
    r, i = torch.cat(realised), torch.cat(intended)
    cosine = float(r @ i / (r.norm() * i.norm()))
    assert cosine < 0.3
    with pytest.raises(
        VectorError, match=rf"^export\.merged: rounded .* cosine {cosine:.3f} to the intended"
    ) as caught:
        export_merged(made.model, vector, LAMBDA, None, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    for way in ("export.dtype to float32", "export.stochastic_rounding", "adapter", "export.accept_rounding"):
        assert way in str(caught.value)
    said = export_merged(made.model, vector, LAMBDA, None, tmp_path / "wide", dtype=torch.float32)["survived"]
    assert said["cosine"] > 0.999
    export_merged(made.model, vector, LAMBDA, None, tmp_path / "chance", stochastic_rounding=True)
    export_adapter(vector, LAMBDA, "base", made.model, tmp_path / "adapter")
    said = export_merged(made.model, vector, LAMBDA, None, tmp_path / "insists", accept_rounding=True)["survived"]
    assert said["cosine"] == pytest.approx(cosine, rel=1e-4)


@pytest.mark.parametrize("family", ["phi", "gpt_neox"], ids=["ours", "transformers'"])
@pytest.mark.parametrize("edited_one", [True, False])
def test_weights_that_a_number_format_cannot_hold(
    loaded: Load, request: pytest.FixtureRequest, tmp_path: Path, family: str, edited_one: bool
) -> None:
    """Whoever writes the files: ours, tensor by tensor, or transformers where it names weights otherwise."""
    made = loaded(request.getfixturevalue(f"pico_{family}"))
    vector = a_vector(made.model)
    if edited_one:
        name = next(iter(vector.modules))
        m = vector.modules[name]
        assert isinstance(m, LowRank)
        vector = TaskVector({**vector.modules, name: LowRank(m.A, m.B + 1e5)})
    else:
        name = next(n for n, module in made.model.named_modules() if isinstance(module, nn.Embedding))
        with torch.no_grad():
            made.model.get_input_embeddings().weight[3, 4] = 7e4
    with pytest.raises(VectorError, match=rf"^{name}\.weight: as float16 it has values that are no finite numbers"):
        export_merged(made.model, vector, LAMBDA, None, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out" / "config.json").exists()
    export_merged(made.model, vector, LAMBDA, None, tmp_path / "wide", dtype=torch.bfloat16)


def test_older_weights_in_the_same_folder_are_not_left_beside(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi)
    vector = a_vector(made.model)
    export_merged(made.model, vector, LAMBDA, None, tmp_path)
    export_merged(made.model, vector, LAMBDA, None, tmp_path)  # written over, there is one again
    with pytest.raises(VectorError, match="holds two sets of weights"):
        export_merged(made.model, vector, LAMBDA, None, tmp_path, shard_size="100KB")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_read_again_and_compared(
    loaded: Load, pico_phi: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    made = loaded(pico_phi)
    vector = a_vector(made.model, scale=0.05)
    items = [Item(str(n), f"The capital of {n} is", place) for n, place in enumerate(("Paris", "Rome", "Bern"))]
    rows = scored_rows(items, "qa", made.tokenizer, 64)
    before = snapshot(made.model)
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path, dtype=dtype)
    arguments = (tmp_path, made.model, vector, LAMBDA, made.tokenizer, rows)
    said = rescored(*arguments)
    assert same(before, made.model.state_dict())

    # the same figures the plain way: one text at a time, from whole logits
    def spoken(model: Any) -> Tensor:
        found = []
        for item in items:
            prompt, whole = (made.tokenizer(t)["input_ids"] for t in (item.prompt, f"{item.prompt} {item.target}"))
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
            found += [logp[at - 1, whole[at]] for at in range(len(prompt), len(whole))]
        return torch.stack(found)

    plain = spoken(made.model)
    with applied(made.model, vector, -LAMBDA):
        wanted = spoken(made.model)
    again = spoken(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert said["items"] == 3
    # in bfloat16 the same numbers in batches of another shape are others
    within = 1e-5 if dtype == torch.float32 else 1e-3
    assert said["difference"] == pytest.approx(float((again - wanted).abs().mean()), abs=within)
    assert said["edit"] == pytest.approx(float((wanted - plain).abs().mean()), abs=1e-5)
    assert said["difference"] < (1e-4 if dtype == torch.float32 else 0.05)
    assert said["difference"] < said["allowed"] < 0.5 * said["edit"]
    # a device that has no room for a second model
    to, full = type(made.model).to, iter([torch.OutOfMemoryError("CUDA out of memory")])
    with pytest.MonkeyPatch.context() as patch:

        def moved(model: Any, device: Any) -> Any:
            for error in full:
                raise error
            return to(model, device)

        patch.setattr(type(made.model), "to", moved)
        assert rescored(*arguments) == said
    # what is handed over must be that model: not the unedited one, and not one that no longer works
    stored = load_file(tmp_path / "model.safetensors")
    save_file({n: before[n].to(dtype) for n in stored}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VectorError, match="is not the one that was scored: on 3 items"):
        rescored(*arguments)
    assert rescored(*arguments, accept_rounding=True)["difference"] == pytest.approx(said["edit"], abs=0.05)
    name = "model.layers.0.mlp.fc1.weight"
    save_file({**stored, name: torch.full_like(stored[name], torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(VectorError, match=r"read again .* does not work"):
        rescored(*arguments)


# rounding and files


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_shard_holds_what_is_no_number(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    values = {"a": torch.zeros(3, dtype=dtype), "b": torch.tensor([[0, 1], [bad, 2]], dtype=dtype)}
    slots = [Slot(name, tuple(t.shape), t.dtype) for name, t in values.items()]
    with pytest.raises(VectorError, match=r"^b: as .* no finite numbers"):
        write_shards(slots, values.__getitem__, tmp_path, 10**9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_unbiased_and_stays_between_neighbours(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(400, generator=g) * torch.logspace(-9, 3, 400)
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-30, 1e-8, -3e-8])])  # float16's subnormals and below among them
    n = 4000
    draws = torch.stack([round_stochastically(x, dtype, g).float() for _ in range(n)]).double()
    gap = draws.max(0).values - draws.min(0).values
    nearest = x.to(dtype).double()
    assert ((draws - x.double()).abs().max(0).values <= gap + (gap == 0) * (nearest - x.double()).abs()).all()
    error = (draws.mean(0) - x.double()).abs()
    # standard error of a mean of n two-valued draws is at most gap / (2 sqrt(n)); rare events escape the sample
    allowed = 5 * gap / (2 * n**0.5) + torch.where(gap == 0, (nearest - x.double()).abs(), 0.0)
    assert (error <= allowed).all()
    assert (gap > 0).double().mean() > 0.7


def test_rounding_leaves_exact_values_and_overflow_alone() -> None:
    g = generator_for(0, "w")
    exact = torch.randn(1000, generator=g).to(torch.float16)
    assert torch.equal(round_stochastically(exact.float(), torch.float16, g), exact)
    edge = torch.tensor([65504.0, 65510.0, -65510.0, 1e6, float("inf"), float("-inf")])
    out = round_stochastically(edge, torch.float16, g)
    assert torch.equal(out, edge.to(torch.float16))
    assert torch.isnan(round_stochastically(torch.tensor([float("nan")]), torch.float16, g)).all()
    with pytest.raises(ValueError, match="float64"):
        round_stochastically(exact.double(), torch.float16, g)


def test_generators_differ_by_seed_and_name() -> None:
    draws = {torch.rand(1, generator=generator_for(s, n)).item() for s, n in ((0, "a"), (0, "b"), (1, "a"))}
    assert len(draws) == 3


def test_shard_files_hold_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        "a": torch.tensor(3, dtype=torch.int64),
        "b": torch.randn(3, 5).T,  # not contiguous
        "c": torch.tensor([True, False, True]),
        "d": torch.randn(7).to(torch.bfloat16),
        "e": torch.empty(0, 4),
        'ü"/\\': torch.arange(5, dtype=torch.uint8),
    }
    slots = [Slot(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
    assert write_shards(slots, tensors.__getitem__, tmp_path, 1000) == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(tensors)
        assert f.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            back = f.get_tensor(name)
            assert torch.equal(back, tensor)
            assert back.dtype == tensor.dtype
            assert back.shape == tensor.shape
    with pytest.raises(ValueError, match="came instead"):
        write_shards(slots[:1], lambda _: torch.zeros(2), tmp_path, 1000)


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    slots = [Slot(f"t{i}", (size,), torch.float32) for i, size in enumerate((10, 10, 30, 5, 5))]
    names = write_shards(slots, lambda n: torch.zeros(slots[int(n[1:])].shape), tmp_path, 80)
    index = json.loads((tmp_path / names[-1]).read_text())
    grouped: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        grouped.setdefault(file, []).append(name)
    assert list(grouped.values()) == [["t0", "t1"], ["t2"], ["t3", "t4"]]  # t2 alone is too large
    assert index["metadata"]["total_size"] == 240


def test_sizes() -> None:
    assert (parse_size("5GB"), parse_size("1.5MB"), parse_size("100KB")) == (5 * 10**9, 1_500_000, 100_000)
    with pytest.raises(ValueError, match="500MB"):
        parse_size("5 gigs")


# cards


def facts(**more: Any) -> CardFacts:
    retain = {"path": "r.jsonl", "kind": "mcq", "name": "asia"}
    recipe = Recipe.model_validate(
        {
            "name": "capitals",
            "model": {"path": "m"},
            "forget": {"path": "f.jsonl", "kind": "mcq", "name": "europe"},
            "retain": (retain,),
            **more,
        }
    )
    rows = (
        ScoreRow("forget", "europe", "test", "acc", True, Score(0.9, 0.05, 40), Score(0.5, 0.08, 40)),
        ScoreRow("retain", "asia", "test", "perplexity", False, Score(8.0, None, 12), Score(8.2, None, 12)),
    )
    return CardFacts(recipe, Chosen(0.75, True, "acc of europe as low as possible, kept >= 95 %", "acc"), rows)


def split(text: str) -> tuple[dict[str, Any], str]:
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_cards_are_written_with_both_exports(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi, "bfloat16")
    vector = a_vector(made.model)
    about = replace(facts(), license="mit")
    said = export_adapter(vector, 0.75, "owner/base", made.model, tmp_path / "a", about)
    assert "README.md" in said["files"]
    header, body = split((tmp_path / "a" / "README.md").read_text("utf-8"))
    assert header["base_model"] == "owner/base"
    assert header["library_name"] == "peft"
    assert header["license"] == "mit"
    assert {"unlearning", "task-arithmetic"} <= set(header["tags"])
    assert "λ = 0.75" in body
    assert "PeftModel.from_pretrained(base" in body
    assert "europe" in body
    assert "asia" in body
    export_merged(made.model, vector, 0.75, made.tokenizer, tmp_path / "m", base_name=str(pico_phi), about=about)
    header, body = split((tmp_path / "m" / "README.md").read_text("utf-8"))
    assert "base_model" not in header
    assert header["library_name"] == "transformers"
    assert re.search(r"cosine [01]\.\d{4} ", body)
    assert "AutoModelForCausalLM" in body
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m") is not None


def test_card_says_the_scores() -> None:
    header, body = split(card(facts(), "adapter", "owner/base"))
    assert "license" not in header
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert rows[2].startswith("| forget | europe | test | acc ↑ | 0.900 ± 0.098 (n=40) | 0.500 ± 0.157 (n=40) |")
    assert "perplexity ↓ | 8.000 (n=12)" in rows[3]
    assert "Unlearning is not deletion" in body


def test_card_says_what_is_left_and_whether_the_bounds_hold_on_test_items() -> None:
    about = facts()
    kept = (("retain", "asia", "perplexity"),)
    chosen = replace(about.chosen, keep=0.95, perplexity=0.1, kept=kept, goals=(("forget", "europe", "acc"),))
    rows = (replace(about.scores[0], chance=0.25), about.scores[1])
    body = split(card(replace(about, chosen=chosen, scores=rows), "adapter", "owner/base"))[1]
    assert (
        "- What came of it, on the items of the table below: The model still answers 50 % of what it was asked to "
        "forget, where guessing would give 25 %: europe accuracy fell from 0.90 to 0.50." in body
    )
    assert "(met on validation items; on test items not by retain asia perplexity)" in body
    assert "| acc ↑ (chance 0.25) |" in body
    assert "Chance is what guessing scores." in body
    roomy = replace(chosen, perplexity=0.5)
    assert "(met on validation items)" in card(replace(about, chosen=roomy, scores=rows), "adapter", "owner/base")


def test_card_gives_the_scores_to_the_hub(tmp_path: Path) -> None:
    """Read back by the hub's own library, as the hub does when a card is pushed."""
    from huggingface_hub import ModelCard, ModelCardData

    about = facts()
    path = tmp_path / "README.md"
    path.write_text(card(about, "adapter", "owner/base"), encoding="utf-8")
    data = ModelCard.load(path).data
    assert isinstance(data, ModelCardData)
    assert (data.model_name, data.base_model, data.library_name) == ("capitals", "owner/base", "peft")
    assert data.eval_results == eval_results(about.recipe, about.scores)
    forget, retain = data.eval_results
    assert (forget.task_type, forget.dataset_type, forget.dataset_split) == ("text-generation", "europe", "test")
    assert (forget.dataset_name, forget.metric_type, forget.metric_value) == ("europe (forget set)", "accuracy", 0.5)
    assert forget.metric_name == "acc (lower is more forgotten)"
    assert (retain.metric_type, retain.metric_value) == ("perplexity", 8.2)
    assert retain.metric_name == "perplexity (lower is better)"
    # and what the library writes from it is the header again
    header, _ = split(path.read_text("utf-8"))
    assert data.to_dict()["model-index"] == header["model-index"]
    assert "model-index" not in split(card(replace(about, scores=()), "adapter", "owner/base"))[0]


def test_no_two_sets_are_one_to_the_hub() -> None:
    """The library puts scores of equal type, configuration and split under one name."""
    from huggingface_hub.repocard_data import model_index_to_eval_results

    half = {"path": "hub:owner/data", "config": "x", "kind": "mcq"}
    about = facts(
        forget={**half, "name": "one"},
        retain=({**half, "name": "two"}, {**half, "name": "one"}, {"path": "a.jsonl", "kind": "mcq", "name": "a_b"}),
        eval={"tasks": ({"task": "a b", "set": "utility"}, {"task": "a?b", "set": "utility"})},
    )
    keys = [("forget", "one"), ("retain", "two"), ("retain", "one"), ("retain", "a_b"), ("utility", "a b")]
    keys += [("utility", "a?b"), ("forget", "one")]
    rows = [
        ScoreRow(role, name, "test", f"m{i}", True, Score(0, None, 1), Score(i / 8, None, 1))  # type: ignore[arg-type]
        for i, (role, name) in enumerate(keys)
    ]
    results = eval_results(about.recipe, rows)
    assert [r.metric_value for r in results] == [i / 8 for i in range(7)]
    assert [(r.dataset_type, r.dataset_config) for r in results] == [
        ("owner/data", "x"),
        ("owner/data", "x-retain-two"),
        ("owner/data", "x-retain-one"),
        ("a_b", None),
        ("a-b", None),
        ("a-b", "utility-a-b"),
        ("owner/data", "x"),
    ]
    name, again = model_index_to_eval_results(model_index(about.recipe, rows))
    assert name == "capitals"
    assert sorted(again, key=lambda r: r.metric_value) == results


def test_what_the_hub_would_refuse_is_not_in_the_card() -> None:
    """Its server asks more than its client: data sets' types of certain characters, numbers that are finite."""
    about = facts()
    one = Score(0.5, None, 1)
    rows = [
        ScoreRow("utility", name, "test", "acc", True, one, one) for name in (NASTY, "", "ünï/côde/x", "a/b", "...")
    ]
    results = eval_results(about.recipe, [*rows, *(replace(rows[0], after=Score(v, None, 1)) for v in (NAN, -INF))])
    assert len(results) == len(rows)
    for r in results:
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", r.dataset_type, re.ASCII)
        assert r.dataset_name.isprintable()
        assert r.dataset_name.strip()


def said_of(**more: Any) -> list[str]:
    """The facts of a card, without the mark-up of underscores."""
    body = split(card(facts(**more), "adapter", "owner/base"))[1]
    return [line.removeprefix("- ").replace("\\_", "_") for line in body.splitlines() if line.startswith("- ")]


@pytest.mark.parametrize(
    ("vector", "edit", "words"),
    [
        ({}, "θ − λτ", []),
        ({"method": "contrast", "mu": 0.5}, "θ − λ(τ_f − 0.5 τ_r)", ["contrast: "]),
        ({"method": ("project", "rescale")}, "θ − λ rescale(project(τ_f))", ["project: ", "rescale: "]),
        ({"method": "npo"}, "θ − λ(θ − θ_npo)", ["npo: a baseline"]),
    ],
)
def test_card_says_how_the_vector_was_made(vector: dict[str, Any], edit: str, words: list[str]) -> None:
    told = said_of(vector=vector)
    assert f"Edit: {edit} with λ = 0.75" in told
    made = [line for line in told if line.startswith("How the vector was made: ")]
    assert len(made) == len(words)
    assert all(word in line for word, line in zip(words, made, strict=True))


def one(name: str) -> dict[str, Any]:
    return {"path": f"{name}.jsonl", "kind": "mcq", "name": name}


def test_card_of_several_requests() -> None:
    told = said_of(also_forget=(one("americas"),))
    assert "Asked to forget: europe, americas" in told
    assert "Edit: θ − λ(w_europe τ_europe + w_americas τ_americas) with λ = 0.75" in told
    assert any("found together" in line for line in told)
    assert "several sets of data" in card(facts(also_forget=(one("americas"),)), "adapter", "b")


def test_card_of_addition_and_analogy() -> None:
    about = facts(forget=None, learn=(one("africa"), one("asia-2")))
    header, body = split(card(about, "adapter", "owner/base"))
    assert "unlearning" not in header["tags"]
    assert "task-arithmetic" in header["tags"]
    assert "- Asked to learn: africa, asia-2" in body
    assert "Asked to forget" not in body
    assert "then added" in body
    assert "θ + λ(w\\_africa τ\\_africa + w\\_asia-2 τ\\_asia-2)" in body
    both = said_of(learn=(one("africa"),))
    assert "Edit: θ − λ(w_europe τ_europe − w_africa τ_africa) with λ = 0.75" in both
    terms = {name: one(f"t{name}") for name in "abc"}
    body = card(facts(forget=None, learn=(one("d"),), analogy=terms), "adapter", "owner/base").replace("\\_", "_")
    assert "θ + λ(τ_tc + τ_tb − τ_ta)" in body
    assert "ta is to tb as tc is to d, and only the first three were learned" in body
    assert "(term)" not in body


NAN, INF = float("nan"), float("inf")
NASTY = "x | y\n---\n# <script>alert(1)</script> `code` [a](http://e.vil) *b* \\ \x07 $x$ \u2028 ```\nlicense: mit"


def test_nothing_the_user_writes_breaks_the_card() -> None:
    about = facts(description=NASTY, eval={"tasks": ({"task": NASTY, "set": "retain"},)})
    row = ScoreRow("utility", NASTY, "test", NASTY, True, Score(0.5, None, 1), Score(0.5, None, 1))
    about = replace(about, chosen=replace(about.chosen, rule=NASTY), scores=(*about.scores, row))
    for base in (NASTY, "a: b\n---\n", "'''\"\"\"", "owner/base\nlicense: mit"):
        text = card(about, "adapter", base)
        header, body = split(text)
        assert set(header) == {"library_name", "pipeline_tag", "tags", "model-index"}
        table = [line for line in body.splitlines() if line.startswith("|")]
        assert len(table) == 5
        assert all(len(re.findall(r"(?<!\\)\|", line)) == 7 for line in table)
        prose = re.sub(r"```python\n.*?\n```", "", body, flags=re.DOTALL)  # inside a fence nothing is markup
        assert "<script" not in prose
        assert "http://e" not in prose
        assert [line for line in body.splitlines() if line.startswith("#")].count("# capitals") == 1
        assert body.count("\n```") == 2
        assert compile(body.split("```python\n")[1].split("\n```")[0], "card", "exec")
        assert not re.search(r"^license: mit|^---$", body, re.MULTILINE)


@pytest.mark.parametrize("line", ["# a", "- a", "+ a", "> a", "1. a", "2) a", "=== a", "| a"])
def test_line_starts_are_plain_text(line: str) -> None:
    assert not re.match(r"\s*([#+>=|-]|\d+[.)])", escape(line))
    assert escape("phi-1.5 by a/b: 95 %") == "phi-1.5 by a/b: 95 %"
