"""Exports against dense references: plain PEFT and plain transformers must load the edited model from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from vector_arena import LAMBDA, THREE, Load, edited_logits, edited_weights, exact, logits, model_vector, same, state

from unlearn.data.encoding import scored_rows
from unlearn.data.items import Item
from unlearn.errors import VectorError
from unlearn.evidence.membership import token_scores
from unlearn.vector.change import Change, Dense, LowRank, generator_for, round_stochastically
from unlearn.vector.edit import subtracted
from unlearn.vector.task_vector import TaskVector
from unlearn.vector.write import export_adapter, export_merged, require_finite, rescored

# PEFT asks transformers under a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def a_vector(model: nn.Module, scale: float = 0.05, grid: float | None = None, only: str = "") -> TaskVector:
    """Random factors of ranks 1 to 4 in every linear module but the head; with ``grid`` small multiples of a power of
    two, so that every way of summing is exact."""
    vector = model_vector(model, 1.0 if grid else scale, only=rf"^(?!lm_head).*(?:{only})")

    def on_grid(_: str, m: Change) -> Change:
        a, b = (t.clamp(-2, 2).mul(4).round() for t in m.tensors().values())
        return LowRank(a / 4, b * grid)

    return vector.map(on_grid) if grid else vector


def nearest(model: nn.Module, vector: TaskVector, c: float) -> dict[str, Tensor]:
    """theta - c * (B @ A), computed in float64 and rounded to float32."""
    return {name: weight.float() for name, weight in edited_weights(model, vector, -c).items()}


# adapters


@THREE
def test_plain_peft_gives_the_edited_models_logits(loaded: Load, folder: Path, tmp_path: Path) -> None:
    model = loaded(folder).model
    vector = a_vector(model)
    before = state(model)
    wanted = edited_logits(model, vector, -LAMBDA)
    said = export_adapter(vector, LAMBDA, str(folder), model, tmp_path / "adapter")
    assert same(before, state(model))
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


@THREE
def test_merged_float32_is_the_dense_edit_bit_for_bit(loaded: Load, folder: Path, tmp_path: Path) -> None:
    made = loaded(folder)
    model = made.model
    with torch.no_grad():
        for name in a_vector(model).modules:  # on a grid where every order of summing is exact
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_((weight * 1024).round() / 1024)
    vector = a_vector(model, grid=2**-10)
    before, config = state(model), model.config.to_dict()
    wanted = {**before, **nearest(model, vector, LAMBDA)}
    said = export_merged(model, vector, LAMBDA, made.tokenizer, tmp_path)
    assert same(before, state(model))
    assert model.config.to_dict() == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert said["survived"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert said["survived"]["norm_ratio"] == pytest.approx(1, abs=1e-12)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("The capital of Peru").input_ids == made.tokenizer("The capital of Peru").input_ids


@THREE
@pytest.mark.parametrize("dense", [False, True])
def test_merged_is_what_was_scored(loaded: Load, folder: Path, tmp_path: Path, dense: bool) -> None:
    made = loaded(folder)
    vector = a_vector(made.model)
    if dense:
        vector = vector.map(lambda _, m: Dense(m.delta()))
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path)
    with subtracted(made.model, vector, LAMBDA):
        scored, weights = logits(made.model), state(made.model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert same(state(again), weights)
    assert torch.equal(logits(again), scored)


@THREE
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_merged_bf16_is_rounded_to_nearest_even_once(loaded: Load, folder: Path, tmp_path: Path, held: str) -> None:
    made = loaded(folder, held)
    vector = a_vector(made.model, grid=2**-12)
    wanted = {n: t.to(torch.bfloat16) for n, t in {**state(made.model), **nearest(made.model, vector, LAMBDA)}.items()}
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path, dtype=torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    stored = again.state_dict()
    off = {n for n in wanted if not torch.equal(stored[n], wanted[n])}
    if held == "bfloat16":
        assert not off
    # where the float32 sum itself is not exact, one bit of it may decide a tie; nowhere more than that
    assert all((stored[n] != wanted[n]).float().mean() < 1e-3 for n in off)


def direct(model: nn.Module, vector: TaskVector, after: Mapping[str, Tensor]) -> list[tuple[float, float, float]]:
    """Cosine, norm ratio and share of changed elements of each module, and at last of all together."""
    before = model.state_dict()
    pairs = []
    for name, m in vector.modules.items():
        realised = (after[f"{name}.weight"].double() - before[f"{name}.weight"].double()).flatten()
        pairs.append((realised, -LAMBDA * exact(m).flatten()))
    pairs.append((torch.cat([r for r, _ in pairs]), torch.cat([i for _, i in pairs])))
    return [
        (float(r @ i / (r.norm() * i.norm())), float(r.norm() / i.norm()), float((r != 0).double().mean()))
        for r, i in pairs
    ]


def test_survival_against_a_direct_computation(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi, "bfloat16")
    vector = a_vector(made.model, scale=3e-4)
    said = export_merged(made.model, vector, LAMBDA, None, tmp_path)["survived"]
    wanted = direct(made.model, vector, AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    assert list(said["modules"]) == list(vector.modules)
    for mine, three in zip([*said["modules"].values(), said], wanted, strict=True):
        assert (mine["cosine"], mine["norm_ratio"], mine["changed"]) == pytest.approx(three, rel=1e-5)
    assert 0.2 < said["cosine"] < 0.98
    assert 0.05 < said["changed"] < 0.9


def test_stochastic_rounding_repeats_with_its_seed(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    made = loaded(pico_phi)
    vector = a_vector(made.model)
    weights = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        export_merged(made.model, vector, 1.0, None, tmp_path / run, torch.float16, stochastic_rounding=True, seed=seed)
        weights[run] = (tmp_path / run / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]
    draws = {torch.rand(1, generator=generator_for(s, n)).item() for s, n in ((0, "a"), (0, "b"), (1, "a"))}
    assert len(draws) == 3
    nothing = TaskVector({"model.layers.0.mlp.fc1": LowRank(torch.zeros(1, 64), torch.zeros(128, 1))})
    said = export_merged(made.model, nothing, 1.0, None, tmp_path / "a")["survived"]
    assert (said["cosine"], said["norm_ratio"], said["changed"]) == (None, None, 0.0)  # it has no direction


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
    before, config = state(made.model), made.model.config.to_dict()
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path, dtype=torch.bfloat16)
    with safe_open(tmp_path / "model.safetensors", "pt") as f:
        assert "embed_out.weight" in f.keys()  # noqa: SIM118
    assert same(before, made.model.state_dict())
    assert made.model.config.to_dict() == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    for name, weight in nearest(made.model, vector, LAMBDA).items():
        torch.testing.assert_close(again.get_parameter(name).float(), weight, atol=1e-4, rtol=2**-8)


def test_a_merge_that_is_another_edit_is_refused(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """Its cosine computed apart; and every way out that the message names is one."""
    made = loaded(pico_phi, "bfloat16")
    vector = a_vector(made.model, scale=1e-5)
    rounded = {n: w.bfloat16() for n, w in edited_weights(made.model, vector, -LAMBDA).items()}
    cosine = direct(made.model, vector, rounded)[-1][0]
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
    before = state(made.model)
    export_merged(made.model, vector, LAMBDA, made.tokenizer, tmp_path, dtype=dtype)

    def log_probs(model: Any) -> list[Any]:
        return [score.logprobs for score in token_scores(model, made.tokenizer, rows)]

    arguments = (tmp_path, made.model, vector, LAMBDA, log_probs)
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
    with subtracted(made.model, vector, LAMBDA):
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


def test_adapter_on_bf16_is_what_was_scored(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """Both act beside the weights in float32; only the roundings of activations differ."""
    model = loaded(pico_phi, "bfloat16").model
    vector = a_vector(model, scale=0.01)
    plain = logits(model)
    with subtracted(model, vector, LAMBDA):
        scored = logits(model)
    export_adapter(vector, LAMBDA, "base", model, tmp_path)
    reloaded = logits(PeftModel.from_pretrained(model, tmp_path))
    assert (reloaded - scored).norm() < 0.2 * (scored - plain).norm()


@THREE
@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_a_dense_vector_merges_as_its_factors_do(loaded: Load, folder: Path, tmp_path: Path, held: str) -> None:
    made = loaded(folder, held)
    factors = a_vector(made.model, grid=2**-12)
    vector = factors.map(lambda name, m: m if name.endswith(("dense", "c_attn", "o_proj")) else Dense(m.delta()))
    assert {type(m) for m in vector.modules.values()} == {LowRank, Dense}
    said = export_merged(made.model, vector, LAMBDA, None, tmp_path / "dense", dtype=torch.float32)
    export_merged(made.model, factors, LAMBDA, None, tmp_path / "factors", dtype=torch.float32)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("dense", "factors"))
    for name, weight in nearest(made.model, vector, LAMBDA).items():
        torch.testing.assert_close(one[name], weight, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=1e-6)
    assert said["survived"]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert said["survived"]["norm_ratio"] == pytest.approx(1.0, abs=1e-6)


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


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_written_that_is_no_number(dtype: torch.dtype, bad: float) -> None:
    with pytest.raises(VectorError, match=r"^b: as .* no finite numbers"):
        require_finite("b", torch.tensor([[0, 1], [bad, 2]], dtype=dtype))
