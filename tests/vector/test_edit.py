"""A vector on a model and off again: against dense weights, against PEFT's own arithmetic, and bit for bit."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from vector_arena import FIVE, Load, edited_logits, edited_weights, exact, logits, model_vector, same, state, trained

from unlearn.errors import VectorError
from unlearn.model.load import Loaded, linear_modules
from unlearn.train.vectors import merge, read_adapter
from unlearn.vector.change import Dense, LowRank
from unlearn.vector.edit import Edit, fit, shape_of, subtracted, weights_of
from unlearn.vector.task_vector import TaskVector


def a_vector(model: nn.Module, scale: float = 0.012, only: str = "", seed: int = 0, dense: bool = False) -> TaskVector:
    return model_vector(model, scale, (3,), only, seed, dense)


# --- against independent computations --------------------------------------------------------------------------------


@FIVE
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("c", [-1.0, -0.3, 2.0])
def test_it_is_the_dense_sum(loaded: Load, folder: Path, c: float, dense: bool) -> None:
    model = loaded(folder).model
    vector = a_vector(model, dense=dense)
    before, wanted, weights = logits(model), edited_logits(model, vector, c), edited_weights(model, vector, c)
    with subtracted(model, vector, -c):
        got = logits(model)
        for name, weight in weights.items():
            torch.testing.assert_close(model.get_parameter(name), weight.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-4)
    assert (got - before).abs().max() > 0.05  # it is a change worth speaking of
    merge(model, c * vector)  # for good it is the same sum
    torch.testing.assert_close(logits(model), wanted, atol=2e-4, rtol=1e-4)


@FIVE
@pytest.mark.parametrize("rslora", [False, True])
def test_negation_is_peft_s_own_at_minus_one(loaded: Load, folder: Path, rslora: bool) -> None:
    peft_model = trained(loaded(folder).model, r=4, lora_alpha=10, use_rslora=rslora)
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
    for one, c, wanted in ((vector, 1.0, tuned), (vector, -1.0, negated), (-vector, 1.0, negated)):
        with subtracted(model, one, -c):
            torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    # the two are far from each other, and theta lies between them: the sign cannot be wrong
    plain = logits(model)
    assert (tuned - negated).abs().max() > 0.1
    for other in (tuned, negated):
        assert (plain - other).norm() < (tuned - negated).norm()
    # and theta + tau as PEFT merges it, minus tau, is theta
    peft_model.set_adapter("default")
    merged = peft_model.merge_and_unload()
    with subtracted(merged, vector, 1.0):
        torch.testing.assert_close(logits(merged), plain, atol=1e-4, rtol=1e-4)


# --- every coefficient from the pristine weights, and back bit for bit -----------------------------------------------


@FIVE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dense", [False, True])
def test_coefficients_do_not_add_up(loaded: Load, folder: Path, dtype: str, dense: bool) -> None:
    model = loaded(folder, dtype).model
    vector = a_vector(model, dense=dense)
    untouched, before = logits(model), state(model)
    alone = {}
    for c in (-1.0, -2.0):
        with subtracted(model, vector, -c):
            alone[c] = logits(model)
        assert same(state(model), before)
    assert not torch.equal(alone[-1.0], alone[-2.0])
    with Edit(model, vector) as edit:
        assert torch.equal(logits(model), untouched)
        for c in (-1.0, -2.0, 0.0, -1.0, 0.0):
            edit.subtract(-c)
            assert torch.equal(logits(model), alone.get(c, untouched)), c
        edit.subtract(2.0)
    assert torch.equal(logits(model), untouched)
    assert same(state(model), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt])
def test_an_exception_inside_restores_too(loaded: Load, pico_phi: Path, dtype: str, error: type[BaseException]) -> None:
    model = loaded(pico_phi, dtype).model
    untouched, before = logits(model), state(model)
    places = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}

    def fail_inside() -> None:
        with subtracted(model, a_vector(model), 1.0):
            assert not torch.equal(logits(model), untouched)
            raise error

    with pytest.raises(error):
        fail_inside()
    assert same(state(model), before)
    assert torch.equal(logits(model), untouched)
    assert not any(m._forward_hooks for m in model.modules())
    # nothing that holds on to a parameter (an optimiser, a tied module) is left with a stale one
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == places


def test_odd_bits_survive(phi: Loaded) -> None:
    """Negative zeros, subnormals and infinities of the weights come back as they were."""
    with torch.no_grad():
        phi.model.get_parameter("model.layers.0.mlp.fc1.weight")[0, :4] = torch.tensor([-0.0, 1e-40, 3e38, -math.inf])
    before = state(phi.model)
    with Edit(phi.model, a_vector(phi.model, only="fc1")) as edit:
        for c in (0.0, -1e30, 0.0):
            edit.subtract(-c)
            assert same(state(phi.model), before) is (c == 0.0)
    assert same(state(phi.model), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_inside_another(loaded: Load, pico_phi: Path, dtype: str) -> None:
    """Two edits at once are the edit by the sum; the inner one gives back what it found."""
    model = loaded(pico_phi, dtype).model
    one, two = a_vector(model, seed=1), a_vector(model, seed=2)
    before = state(model)
    tolerance = 2e-4 if dtype == "float32" else 0.2
    with subtracted(model, one + two, 1.0):
        wanted = logits(model)
    with subtracted(model, one, 1.0):
        outer = logits(model)
        with subtracted(model, two, 1.0):
            torch.testing.assert_close(logits(model).float(), wanted.float(), atol=tolerance, rtol=1e-4)
        assert torch.equal(logits(model), outer)
    assert same(state(model), before)


# --- sixteen and four bits -------------------------------------------------------------------------------------------


@FIVE
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_beside_a_16_bit_weight_only_the_output_is_rounded(loaded: Load, folder: Path, dtype: str) -> None:
    model = loaded(folder, dtype).model
    vector = a_vector(model, scale=0.0025, dense=True)
    for name, m in list(vector.modules.items())[:4]:
        module = model.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        with subtracted(model, TaskVector({name: m}), 0.7):
            handle = module.register_forward_hook(lambda _, args, out, seen=seen: seen.append((args[0], out)))
            logits(model)
            handle.remove()
        ((x, got),) = seen
        plain = module(x)  # the layer's own output, already in 16 bits
        wanted = plain.double() - 0.7 * (exact(m) @ x.double().transpose(-1, -2)).transpose(-1, -2)
        assert got.dtype == plain.dtype == getattr(torch, dtype)
        # rounded once: nowhere further from the exact sum than half a unit in the last place (and float32's own error)
        unit = torch.finfo(got.dtype).eps * torch.exp2(torch.floor(torch.log2(wanted.abs().clamp_min(1e-4))))
        assert ((got.double() - wanted).abs() <= 0.5 * unit + 1e-5).all()


def test_beside_four_bit_weights() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator) * 0.1
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    model = nn.Sequential(layer.to("cpu"))
    assert model[0].weight.shape != weight.shape  # packed: two weights in a byte
    x = torch.randn(5, 128, generator=generator)
    m = LowRank(torch.randn(2, 128, generator=generator) * 0.1, torch.randn(64, 2, generator=generator))
    plain, packed = model(x), model[0].weight.data.clone()
    assert 0 < (plain - x @ weight.T).abs().max() < 1.0
    for change in (m, Dense(m.delta())):
        with subtracted(model, TaskVector({"0": change}), 2.0):
            torch.testing.assert_close(model(x), plain - 2.0 * x @ m.delta().T, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(x), plain)
    assert torch.equal(model[0].weight.data, packed)
    with pytest.raises(VectorError, match=r"changes \(128, 64\), the model has \(64, 128\)"):
        fit(model, TaskVector({"0": ones(128, 64)}))


# --- misfits ---------------------------------------------------------------------------------------------------------


def ones(out: int, fan_in: int) -> LowRank:
    return LowRank(torch.ones(1, fan_in), torch.ones(out, 1))


def test_every_misfit_is_named_at_once(phi: Loaded) -> None:
    good = "model.layers.0.mlp.fc2"
    wrong = {
        "model.layers.7.self_attn.q_proj": (ones(64, 64), "the model has no such module"),
        "model.layers.0.mlp.fc1": (ones(64, 128), "the vector changes (64, 128), the model has (128, 64)"),
        "model.layers.1.input_layernorm": (ones(64, 1), "LayerNorm is not a linear layer"),
        "model.embed_tokens": (ones(64, 64), "Embedding is not a linear layer"),
        "model.layers.1.mlp.fc2": (
            Dense(torch.ones(128, 64)),
            "the vector changes (128, 64), the model has (64, 128)",
        ),
    }
    vector = TaskVector({good: ones(64, 128), **{name: change for name, (change, _) in wrong.items()}})
    before = state(phi.model)
    with pytest.raises(VectorError, match="does not fit this model") as caught, subtracted(phi.model, vector, 1.0):
        pytest.fail("nothing may run on a model that was edited in part")
    assert all(f"{name}: {why}" in str(caught.value) for name, (_, why) in wrong.items())
    assert good not in str(caught.value)
    assert same(state(phi.model), before)
    assert not any(m._forward_hooks for m in phi.model.modules())


def test_gpt2_s_shape_is_given_as_any_other(gpt2: Loaded) -> None:
    name = "transformer.h.0.mlp.c_fc"
    module = gpt2.model.get_submodule(name)
    assert tuple(module.weight.shape) == (64, 128)  # stored as (in, out)
    assert shape_of(module) == (128, 64)
    (weight,) = weights_of(gpt2.model, [name]).values()
    assert torch.equal(weight, module.weight.T)
    with pytest.raises(VectorError, match=r"changes \(64, 128\), the model has \(128, 64\)"):
        fit(gpt2.model, TaskVector({name: ones(64, 128)}))


def test_a_tied_head_would_change_twice(llama: Loaded, phi: Loaded) -> None:
    vector = TaskVector({"lm_head": ones(*shape_of(llama.model.get_output_embeddings()))})
    with pytest.raises(VectorError, match=r"lm_head: its weight is shared by .*model\.embed_tokens"):
        fit(llama.model, vector)
    before = phi.model.get_input_embeddings().weight.clone()
    with subtracted(phi.model, vector, 0.1):
        assert torch.equal(phi.model.get_input_embeddings().weight, before)


def test_contrast_of_two_adapters_is_peft_s_concatenation(loaded: Load, pico_phi: Path) -> None:
    peft_model, retain_model = (trained(loaded(pico_phi).model, seed) for seed in (1, 2))
    forget, retain = (read_adapter(m, {}) for m in (peft_model, retain_model))
    peft_model.add_adapter("retain", peft_model.peft_config["default"])
    for name, layer in retain_model.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            there = peft_model.get_submodule(name)
            there.lora_A["retain"].load_state_dict(layer.lora_A["default"].state_dict())
            there.lora_B["retain"].load_state_dict(layer.lora_B["default"].state_dict())
    peft_model.add_weighted_adapter(["default", "retain"], [-0.7, 0.35], "both", combination_type="cat")
    peft_model.set_adapter("both")
    model = loaded(pico_phi).model
    with subtracted(model, forget - 0.5 * retain, 0.7):
        torch.testing.assert_close(logits(model), logits(peft_model), atol=1e-4, rtol=1e-4)


def test_a_change_too_small_for_16_bits_is_not_lost(loaded: Load, pico_phi: Path) -> None:
    """Merged into bfloat16 weights a small vector mostly vanishes; beside them it keeps its direction and size."""
    model = loaded(pico_phi, "bfloat16").model
    name = "model.layers.1.mlp.fc1"
    vector = a_vector(model, scale=2.5e-5, only=name)
    module, delta = model.get_submodule(name), exact(vector.modules[name])
    stored = copy.deepcopy(module.weight)
    assert isinstance(stored, Tensor)
    assert float(((stored.float() - delta.float()).bfloat16() != stored).float().mean()) < 0.5  # most do not move
    x = torch.randn(64, shape_of(module)[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    with subtracted(model, vector, 1.0):
        (hook,) = module._forward_hooks.values()
        beside = hook(module, (x,), torch.zeros(64, shape_of(module)[0]))  # the second term alone, in float32
    torch.testing.assert_close(beside.double(), -(x.double() @ delta.T), atol=1e-7, rtol=1e-5)
