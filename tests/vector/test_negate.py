"""A vector on a model and off again: against dense weights, against PEFT's own arithmetic, and bit for bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.errors import VectorError
from unlearn.model.load import Loaded, linear_modules
from unlearn.train.vectors import merge, read_adapter
from unlearn.vector.change import Dense, LowRank
from unlearn.vector.edit import Edit, applied, fit, shape_of, weights_of
from unlearn.vector.task_vector import TaskVector

FAMILIES = ["phi", "llama", "gpt2", "qwen2", "gpt_neox"]
Load = Callable[..., Loaded]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(f"pico_{request.param}")
    assert isinstance(path, Path)
    return path


def a_vector(model: nn.Module, scale: float = 0.1, rank: int = 3, seed: int = 0, only: str = "") -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in linear_modules(model).items():
        if only in name:
            out, fan_in = shape_of(module)
            a = torch.randn(rank, fan_in, generator=generator) / fan_in**0.5
            modules[name] = LowRank(a, torch.randn(out, rank, generator=generator) * scale)
    return TaskVector(modules)


def whole(vector: TaskVector) -> TaskVector:
    """The same vector with every second module dense."""
    dense = set(list(vector.modules)[::2])
    return vector.map(lambda name, m: Dense(m.delta()) if name in dense else m)


def tokens() -> Tensor:
    return torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(tokens()).logits.clone()  # type: ignore[no-any-return]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype, name
        whole = tensor.contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8)
        assert torch.equal(*whole), name


def dense_logits(model: nn.Module, vector: TaskVector, c: float) -> Tensor:
    """Logits of a copy whose weights are W + c * B A, the product and sum taken in float64."""
    twin = copy.deepcopy(model).float()
    for name, m in vector.modules.items():
        module = twin.get_submodule(name)
        delta = c * (m.B.double() @ m.A.double() if isinstance(m, LowRank) else m.values.double())
        weight = module.weight
        assert isinstance(weight, Tensor)
        weight.data = (weight.double() + (delta.T if isinstance(module, Conv1D) else delta)).float()
    return logits(twin)


# --- against independent computations --------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [-1.0, -0.3, 2.0])
@pytest.mark.parametrize("dense", [False, True])
def test_it_is_the_dense_sum(loaded: Load, folder: Path, c: float, dense: bool) -> None:
    model = loaded(folder).model
    vector = whole(a_vector(model)) if dense else a_vector(model)
    before = logits(model)
    wanted = dense_logits(model, vector, c)
    with applied(model, vector, c):
        got = logits(model)
        for name, m in vector.modules.items():
            module = model.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            pristine = dict(loaded(folder).model.named_parameters())[f"{name}.weight"]
            change = module.weight - pristine
            change = change.T if isinstance(module, Conv1D) else change
            torch.testing.assert_close(change, c * m.delta(), atol=1e-6, rtol=0)
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
    assert (got - before).abs().max() > 0.05  # it is a change worth speaking of


def random_adapter(model: Any, seed: int = 0, **options: Any) -> PeftModel:
    """PEFT's own LoRA on every linear layer, its B filled so that it does something."""
    linear = linear_modules(model)
    conv = any(isinstance(m, Conv1D) for m in linear.values())
    config = LoraConfig(r=4, lora_alpha=10, target_modules=list(linear), fan_in_fan_out=conv, **options)
    torch.manual_seed(seed)
    peft_model = get_peft_model(model, config)
    assert isinstance(peft_model, PeftModel)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return peft_model.eval()


@pytest.mark.parametrize("rslora", [False, True])
def test_negation_is_peft_s_own_at_minus_one(loaded: Load, folder: Path, rslora: bool) -> None:
    peft_model = random_adapter(loaded(folder).model, use_rslora=rslora)
    vector = read_adapter(peft_model, {"set": "forget"})
    tuned = logits(peft_model)
    # peft gives the new adapter alpha = r and folds the old scale in, but under rsLoRA alpha/sqrt(r) is then sqrt(r)
    weight = -1.0 / math.sqrt(4) if rslora else -1.0
    peft_model.add_weighted_adapter(["default"], [weight], "minus", combination_type="linear")
    peft_model.set_adapter("minus")
    negated = logits(peft_model)

    model = loaded(folder).model
    assert set(vector.modules) == set(linear_modules(model))
    assert dict(vector.meta) == {"set": "forget"}
    with applied(model, vector, 1.0):
        torch.testing.assert_close(logits(model), tuned, atol=1e-4, rtol=1e-4)
    with applied(model, vector, -1.0):
        torch.testing.assert_close(logits(model), negated, atol=1e-4, rtol=1e-4)
    with applied(model, -vector, 1.0):
        torch.testing.assert_close(logits(model), negated, atol=1e-4, rtol=1e-4)
    # the two are far from each other, and theta lies between them: the sign cannot be wrong
    plain = logits(model)
    assert (tuned - negated).abs().max() > 0.1
    for other in (tuned, negated):
        assert (plain - other).norm() < (tuned - negated).norm()


def test_negation_undoes_peft_s_merge(loaded: Load, folder: Path) -> None:
    """theta + tau as PEFT merges it, minus tau, is theta."""
    original = loaded(folder).model
    peft_model = random_adapter(loaded(folder).model)
    vector = read_adapter(peft_model, {})
    merged = peft_model.merge_and_unload()
    assert (logits(merged) - logits(original)).abs().max() > 0.05
    with applied(merged, vector, -1.0):
        torch.testing.assert_close(logits(merged), logits(original), atol=1e-4, rtol=1e-4)


def test_contrast_of_two_adapters_is_peft_s_concatenation(loaded: Load, pico_phi: Path) -> None:
    peft_model = random_adapter(loaded(pico_phi).model, seed=1)
    forget = read_adapter(peft_model, {})
    retain_model = random_adapter(loaded(pico_phi).model, seed=2)
    retain = read_adapter(retain_model, {})
    peft_model.add_adapter("retain", peft_model.peft_config["default"])
    for name, layer in retain_model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            there = peft_model.get_submodule(name)
            there.lora_A["retain"].load_state_dict(layer.lora_A["default"].state_dict())
            there.lora_B["retain"].load_state_dict(layer.lora_B["default"].state_dict())
    peft_model.add_weighted_adapter(["default", "retain"], [-0.7, 0.35], "both", combination_type="cat")
    peft_model.set_adapter("both")
    model = loaded(pico_phi).model
    with applied(model, forget - 0.5 * retain, -0.7):
        torch.testing.assert_close(logits(model), logits(peft_model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dense", [False, True])
def test_merging_for_good_is_the_same_sum(loaded: Load, folder: Path, dense: bool) -> None:
    model = loaded(folder).model
    vector = whole(a_vector(model)) if dense else a_vector(model)
    wanted = dense_logits(model, vector, -0.5)
    merge(model, -0.5 * vector)
    torch.testing.assert_close(logits(model), wanted, atol=2e-4, rtol=1e-4)


# --- every coefficient from the pristine weights, and back bit for bit -----------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dense", [False, True])
def test_coefficients_do_not_add_up(loaded: Load, folder: Path, dtype: str, dense: bool) -> None:
    model = loaded(folder, dtype).model
    vector = whole(a_vector(model)) if dense else a_vector(model)
    untouched, before = logits(model), state(model)
    alone = {}
    for c in (-1.0, -2.0):
        with applied(model, vector, c):
            alone[c] = logits(model)
        assert_same_bits(model, before)
    assert not torch.equal(alone[-1.0], alone[-2.0])
    with Edit(model, vector) as edit:
        assert torch.equal(logits(model), untouched)
        for c in (-1.0, -2.0, 0.0, -1.0, 0.0):
            edit.set(c)
            assert torch.equal(logits(model), alone.get(c, untouched)), c
        edit.set(-2.0)
    assert torch.equal(logits(model), untouched)
    assert_same_bits(model, before)


class SomeError(Exception):
    pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exception_inside_restores_too(loaded: Load, folder: Path, dtype: str) -> None:
    model = loaded(folder, dtype).model
    untouched, before = logits(model), state(model)

    def fail_inside(error: type[BaseException]) -> None:
        with applied(model, a_vector(model), -1.0):
            assert not torch.equal(logits(model), untouched)
            raise error

    with pytest.raises(SomeError):
        fail_inside(SomeError)
    assert_same_bits(model, before)
    assert torch.equal(logits(model), untouched)
    with pytest.raises(KeyboardInterrupt):
        fail_inside(KeyboardInterrupt)
    assert_same_bits(model, before)
    assert torch.equal(logits(model), untouched)
    assert not any(m._forward_hooks for m in model.modules())


def test_odd_bits_survive(phi: Loaded) -> None:
    """Negative zeros, subnormals and infinities of the weights come back as they were."""
    model = phi.model
    weight = model.get_submodule("model.layers.0.mlp.fc1").weight
    assert isinstance(weight, Tensor)
    weight.data[0, :4] = torch.tensor([-0.0, 1e-40, 3e38, -math.inf])
    before = state(model)
    vector = a_vector(model, only="fc1")
    with Edit(model, vector) as edit:
        for c in (0.0, -1e30, 0.0):
            edit.set(c)
            if c == 0.0:
                assert_same_bits(model, before)
    assert_same_bits(model, before)


def test_weights_keep_their_place_in_memory(phi: Loaded) -> None:
    """Nothing that holds on to a parameter (an optimiser, a tied module) is left with a stale one."""
    before = {name: (id(p), p.data_ptr()) for name, p in phi.model.named_parameters()}
    with applied(phi.model, a_vector(phi.model), -1.0):
        pass
    assert {name: (id(p), p.data_ptr()) for name, p in phi.model.named_parameters()} == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_inside_another(loaded: Load, pico_phi: Path, dtype: str) -> None:
    """Two edits at once are the edit by the sum; the inner one gives back what it found."""
    model = loaded(pico_phi, dtype).model
    one, two = a_vector(model, seed=1), a_vector(model, seed=2)
    before = state(model)
    tolerance = 2e-4 if dtype == "float32" else 0.2
    with applied(model, one + two, -1.0):
        wanted = logits(model)
    with applied(model, one, -1.0):
        outer = logits(model)
        with applied(model, two, -1.0):
            torch.testing.assert_close(logits(model).float(), wanted.float(), atol=tolerance, rtol=1e-4)
        assert torch.equal(logits(model), outer)
    assert_same_bits(model, before)


# --- sixteen and four bits -------------------------------------------------------------------------------------------


@contextmanager
def watch(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of a module, as every hook before has left them."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_beside_a_16_bit_weight_only_the_output_is_rounded(loaded: Load, folder: Path, dtype: str) -> None:
    model = loaded(folder, dtype).model
    vector = whole(a_vector(model, scale=0.02))
    for name, m in list(vector.modules.items())[:4]:
        module = model.get_submodule(name)
        with applied(model, TaskVector({name: m}), -0.7), watch(module) as seen:
            logits(model)
        ((x, got),) = seen
        plain = module(x)  # the layer's own output, already in 16 bits
        exact = m.B.double() @ m.A.double() if isinstance(m, LowRank) else m.values.double()
        change = -0.7 * (exact @ x.double().transpose(-1, -2)).transpose(-1, -2)
        wanted = plain.double() + change
        assert got.dtype == plain.dtype == getattr(torch, dtype)
        # rounded once: nowhere further from the exact sum than half a unit in the last place (and float32's own error)
        unit = torch.finfo(got.dtype).eps * torch.exp2(torch.floor(torch.log2(wanted.abs().clamp_min(1e-4))))
        assert ((got.double() - wanted).abs() <= 0.5 * unit + 1e-5).all()


def test_a_change_too_small_for_16_bits_is_not_lost(loaded: Load, pico_phi: Path) -> None:
    """Merged into bfloat16 weights a small vector mostly vanishes; beside them it keeps its direction and size."""
    exact = loaded(pico_phi).model
    half = loaded(pico_phi, "bfloat16").model
    exact.load_state_dict(half.float().state_dict())  # same values in both
    half = loaded(pico_phi, "bfloat16").model
    name = "model.layers.1.mlp.fc1"
    m = a_vector(exact, scale=2e-4, only=name)
    module, twin = half.get_submodule(name), exact.get_submodule(name)
    x = torch.randn(64, shape_of(module)[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    with applied(exact, m, -1.0):
        wanted = twin(x.float())
    wanted = wanted - twin(x.float())

    stored = copy.deepcopy(module)
    with torch.no_grad():
        stored.weight.copy_((stored.weight.float() - m.modules[name].delta()).bfloat16())  # type: ignore[operator]
        share = float((stored.weight != module.weight).float().mean())
    assert share < 0.5  # what DESIGN's Numerics warns of: most elements do not move at all

    part = m.modules[name]
    assert isinstance(part, LowRank)
    with applied(half, m, -1.0):
        hooks = list(module._forward_hooks.values())
        assert len(hooks) == 1
        assert isinstance(module.weight, Tensor)
        beside = hooks[0](module, (x,), torch.zeros(64, shape_of(module)[0]))  # the second term alone, in float32
    torch.testing.assert_close(beside, wanted, atol=1e-5, rtol=1e-3)  # a difference of large numbers
    torch.testing.assert_close(beside, -(x.float() @ part.A.T @ part.B.T), atol=1e-7, rtol=1e-5)


def nf4_layer(weight: Tensor) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer: nn.Module = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compute_dtype=torch.float32
    )
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


def test_beside_four_bit_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator) * 0.1
    model = nn.Sequential(nf4_layer(weight))
    assert model[0].weight.shape != weight.shape  # packed: two weights in a byte
    x = torch.randn(5, 128, generator=generator)
    m = LowRank(torch.randn(2, 128, generator=generator) * 0.1, torch.randn(64, 2, generator=generator))
    plain, packed = model(x), model[0].weight.data.clone()
    assert 0 < (plain - x @ weight.T).abs().max() < 1.0
    with applied(model, TaskVector({"0": m}), -2.0):
        torch.testing.assert_close(model(x), plain - 2.0 * x @ m.delta().T, atol=1e-5, rtol=1e-5)
    with applied(model, TaskVector({"0": Dense(m.delta())}), -2.0):
        torch.testing.assert_close(model(x), plain - 2.0 * x @ m.delta().T, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), plain)
    assert torch.equal(model[0].weight.data, packed)
    wrong = LowRank(torch.zeros(1, 64), torch.zeros(128, 1))
    with pytest.raises(VectorError, match=r"changes \(128, 64\), the model has \(64, 128\)"):
        fit(model, TaskVector({"0": wrong}))


# --- misfits ---------------------------------------------------------------------------------------------------------


def factors(out: int, fan_in: int) -> LowRank:
    return LowRank(torch.ones(1, fan_in), torch.ones(out, 1))


def test_every_misfit_is_named_at_once(phi: Loaded) -> None:
    good = "model.layers.0.mlp.fc2"
    vector = TaskVector(
        {
            "model.layers.7.self_attn.q_proj": factors(64, 64),
            "model.layers.0.mlp.fc1": factors(64, 128),
            "model.layers.1.input_layernorm": factors(64, 1),
            "model.embed_tokens": factors(64, 64),
            good: factors(64, 128),
            "model.layers.1.mlp.fc2": Dense(torch.ones(128, 64)),
        }
    )
    before = state(phi.model)
    with pytest.raises(VectorError, match="does not fit this model") as caught, applied(phi.model, vector, -1.0):
        pytest.fail("nothing may run on a model that was edited in part")
    said = str(caught.value)
    assert "model.layers.7.self_attn.q_proj: the model has no such module" in said
    assert "model.layers.0.mlp.fc1: the vector changes (64, 128), the model has (128, 64)" in said
    assert "model.layers.1.input_layernorm: LayerNorm is not a linear layer" in said
    assert "model.embed_tokens: Embedding is not a linear layer" in said
    assert "model.layers.1.mlp.fc2: the vector changes (128, 64), the model has (64, 128)" in said
    assert good not in said
    assert_same_bits(phi.model, before)
    assert not any(m._forward_hooks for m in phi.model.modules())


def test_a_vector_of_another_family(loaded: Load, pico_phi: Path, pico_gpt2: Path) -> None:
    phi, gpt2 = loaded(pico_phi).model, loaded(pico_gpt2).model
    vector = a_vector(gpt2)
    with pytest.raises(VectorError) as caught:
        fit(phi, vector)
    assert all(name in str(caught.value) for name in vector.modules)


def test_gpt2_s_shape_is_given_as_any_other(gpt2: Loaded) -> None:
    module = gpt2.model.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(module, Conv1D)
    assert tuple(module.weight.shape) == (64, 128)  # stored as (in, out)
    assert shape_of(module) == (128, 64)
    (weight,) = weights_of(gpt2.model, ["transformer.h.0.mlp.c_fc"]).values()
    assert torch.equal(weight, module.weight.T)
    with pytest.raises(VectorError, match=r"changes \(64, 128\), the model has \(128, 64\)"):
        fit(gpt2.model, TaskVector({"transformer.h.0.mlp.c_fc": factors(64, 128)}))


def test_a_tied_head_would_change_twice(loaded: Load, pico_llama: Path, pico_phi: Path) -> None:
    tied = loaded(pico_llama).model
    out, fan_in = shape_of(tied.get_output_embeddings())
    with pytest.raises(VectorError, match="lm_head: its weight is shared by") as caught:
        fit(tied, TaskVector({"lm_head": factors(out, fan_in)}))
    assert "model.embed_tokens" in str(caught.value)
    untied = loaded(pico_phi).model
    vector = TaskVector({"lm_head": factors(out, fan_in)})
    with applied(untied, vector, -0.1):
        assert torch.equal(untied.get_input_embeddings().weight, loaded(pico_phi).model.get_input_embeddings().weight)
