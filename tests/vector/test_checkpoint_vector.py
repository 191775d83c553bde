"""The difference of two checkpoints, against the models themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from vector_arena import FIVE, Load, logits

from unlearn.errors import UnlearnError, VectorError
from unlearn.model.checkpoint import INDEX, SINGLE
from unlearn.model.load import architecture_of, linear_modules
from unlearn.vector.change import Dense, LowRank
from unlearn.vector.edit import subtracted
from unlearn.vector.interop import from_checkpoints


@torch.no_grad()
def tuned(model: Any, linear_only: bool = True, std: float = 0.02, rank: int = 0) -> Any:
    """The model with noise on its linear layers (of a low rank if wanted), or on all it has."""
    generator = torch.Generator().manual_seed(0)
    linear = {f"{name}.weight" for name in linear_modules(model)}
    for name, parameter in model.named_parameters():
        if name in linear or not linear_only:
            rows = parameter.shape[0]
            noise = torch.randn(parameter.shape, generator=generator)
            if rank and parameter.ndim == 2:
                noise = torch.randn(rows, rank, generator=generator) @ torch.randn(
                    rank, parameter.shape[1], generator=generator
                )
            parameter.add_((std * noise).to(parameter.dtype))
    return model


@FIVE
@pytest.mark.parametrize("shards", [(False, False), (True, False), (True, True)])
def test_the_base_plus_the_vector_is_the_fine_tuned_model(
    loaded: Load, folder: Path, tmp_path: Path, shards: tuple[bool, bool]
) -> None:
    base, after = loaded(folder).model, tuned(loaded(folder).model)
    for name, model, many in (("a", base, shards[0]), ("b", after, shards[1])):
        model.save_pretrained(tmp_path / name, max_shard_size="100KB" if many else "5GB")
        assert (tmp_path / name / INDEX).exists() is many
    vector, report = from_checkpoints(tmp_path / "a", tmp_path / "b", on_unequal="error")
    assert set(vector.modules) == set(linear_modules(base))
    for name, m in vector.modules.items():
        one, two = (model.get_submodule(name).weight for model in (base, after))
        wanted = (two - one).detach()
        wanted = wanted.T if isinstance(base.get_submodule(name), Conv1D) else wanted
        assert isinstance(m, Dense)
        assert torch.equal(m.values, wanted)
    wanted = logits(after)
    with subtracted(base, vector, -1.0):
        torch.testing.assert_close(logits(base), wanted, atol=1e-4, rtol=1e-4)
    assert (wanted - logits(base)).abs().max() > 0.05
    assert report.unequal == {}
    assert report.warnings == ()
    assert report.left_out == 0.0
    # every tensor of the file is either in the vector or the same
    stored = {key for path in (tmp_path / "a").glob("*.safetensors") for key in load_file(path)}
    assert len(report.unchanged) + len(vector.modules) == len(stored)
    assert dict(vector.meta) == {
        "source": "checkpoints",
        "base": "a",
        "finetuned": "b",
        "fan_in_fan_out": "true" if "gpt2" in folder.name else "false",
    }


def test_only_what_differs_is_in_it_and_a_head_that_stands_alone_may(
    loaded: Load, pico_phi: Path, tmp_path: Path
) -> None:
    for name in ("model.layers.1.mlp.fc2", "lm_head"):
        model = loaded(pico_phi).model
        with torch.no_grad():
            model.get_parameter(f"{name}.weight")[3, 4] += 0.5
        model.save_pretrained(tmp_path / name)
        vector, report = from_checkpoints(pico_phi, tmp_path / name, on_unequal="error")
        assert list(vector.modules) == [name]
        assert vector.norm() == pytest.approx(0.5, rel=1e-6)
        assert f"{name}.weight" not in report.unchanged
        assert len(report.unchanged) == len(model.state_dict()) - 1


def test_a_tied_head_may_be_stored_or_not(loaded: Load, pico_llama: Path, tmp_path: Path) -> None:
    """As transformers reads it: a copy of the embeddings is no weight of its own, one with other values is."""
    base, after = tmp_path / "base", tmp_path / "after"
    shutil.copytree(pico_llama, base)
    tuned(loaded(pico_llama).model).save_pretrained(after)
    wanted, _ = from_checkpoints(base, after, on_unequal="error")
    embeddings = load_file(base / SINGLE)["model.embed_tokens.weight"]
    rewrite(after, {"lm_head.weight": embeddings.clone()})
    assert from_checkpoints(base, after, on_unequal="error")[0].digest() == wanted.digest()
    rewrite(base, {"lm_head.weight": embeddings.clone()})
    assert from_checkpoints(base, after, on_unequal="error")[0].digest() == wanted.digest()
    # under the second name alone
    rewrite(after, {"model.embed_tokens.weight": None})
    assert from_checkpoints(base, after, on_unequal="error")[0].digest() == wanted.digest()
    # embeddings that differ are told once, not once more as a head
    rewrite(after, {"lm_head.weight": embeddings + 0.1, "model.embed_tokens.weight": embeddings + 0.1})
    with pytest.raises(VectorError, match="in 1 tensors") as caught:
        from_checkpoints(base, after, on_unequal="error")
    assert "Embedding's weight, not a linear layer's weight (1): model.embed_tokens.weight" in str(caught.value)
    # and a head that is none of both is said to be one
    rewrite(after, {"lm_head.weight": embeddings + 0.1, "model.embed_tokens.weight": embeddings})
    said = r"in the fine-tuned checkpoint with other values than model\.embed_tokens\.weight, to which config\.json"
    with pytest.raises(VectorError, match=said):
        from_checkpoints(base, after, on_unequal="error")
    with pytest.raises(VectorError, match=said.replace("fine-tuned checkpoint", "base")):
        from_checkpoints(after, base, on_unequal="error")


@FIVE
@pytest.mark.parametrize("size", [{"rank": 3}, {"energy": 0.999}])
def test_truncated_as_it_is_read(loaded: Load, folder: Path, tmp_path: Path, size: dict[str, Any]) -> None:
    tuned(loaded(folder).model, rank=3).save_pretrained(tmp_path)
    whole, _ = from_checkpoints(folder, tmp_path, on_unequal="error")
    short, _ = from_checkpoints(folder, tmp_path, on_unequal="error", **size)
    assert all(isinstance(m, LowRank) and m.rank <= 3 for m in short.modules.values())
    assert short.digest() == whole.to_low_rank(**size).digest()
    assert (whole - short).norm() <= (1e-3 if "rank" in size else 0.04) * whole.norm()


# --- what a vector cannot hold ---------------------------------------------------------------------------------------


@FIVE
def test_changes_that_no_vector_holds_are_named(loaded: Load, folder: Path, tmp_path: Path) -> None:
    before, after = loaded(folder).model, tuned(loaded(folder).model, linear_only=False)
    after.save_pretrained(tmp_path)
    with pytest.raises(VectorError, match=r'cannot hold; skip them \(on_unequal="skip"; --skip-unequal') as caught:
        from_checkpoints(folder, tmp_path, on_unequal="error")
    vector, report = from_checkpoints(folder, tmp_path, on_unequal="skip")
    model = dict(before.named_parameters())
    linear = {f"{name}.weight" for name in vector.modules} | {"lm_head.weight"}
    stored = {k if k in model else "lm_head.weight" for k in load_file(tmp_path / SINGLE)}
    assert set(report.unequal) - {"embed_out.weight"} == stored - linear
    assert f"in {len(report.unequal)} tensors" in str(caught.value)
    for why in report.unequal.values():
        assert why in str(caught.value)
    kinds = "|".join(report.unequal.values())
    assert "Norm" in kinds
    assert "embed" in "|".join(report.unequal) or "wte" in "|".join(report.unequal)
    # and how much was left out
    changes = [(after.get_parameter(n) - p).detach().norm() for n, p in model.items() if n in report.unequal]
    if "embed_out.weight" not in report.unequal:
        assert report.left_out == pytest.approx(float(torch.stack(changes).norm()), rel=1e-5)


@pytest.fixture
def pair(loaded: Load, pico_phi: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of a pico Phi that tests spoil, the second one fine-tuned."""
    base, after = tmp_path / "base", tmp_path / "tuned"
    shutil.copytree(pico_phi, base)
    tuned(loaded(pico_phi).model).save_pretrained(after)
    return base, after


def rewrite(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Put tensors into a checkpoint, or take them out."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / SINGLE), **changes}
    save_file({name: t.clone() for name, t in tensors.items() if t is not None}, folder / SINGLE)


FC1 = "model.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ({}, {f"{FC1}.weight": torch.ones(3, 64)}, {f"{FC1}.weight": "shapes (128, 64) and (3, 64)"}),
        ({}, {f"{FC1}.bias": torch.ones(5)}, {f"{FC1}.bias": "shapes (128,) and (5,)"}),
        ({}, {f"{FC1}.weight": None}, {f"{FC1}.weight": "in the base only"}),
        ({f"{FC1}.weight": None}, {}, {f"{FC1}.weight": "in the fine-tuned checkpoint only"}),
        ({}, {"extra.weight": torch.ones(3, 3)}, {"extra.weight": "in the fine-tuned checkpoint only"}),
        (
            {"extra.weight": torch.zeros(3, 3)},
            {"extra.weight": torch.ones(3, 3)},
            {"extra.weight": "a PhiForCausalLM has no such weight"},
        ),
        ({"mask": torch.zeros(3).bool()}, {"mask": torch.ones(3).bool()}, {"mask": "stored as BOOL"}),
        ({"ids": torch.zeros(3).long()}, {"ids": torch.zeros(3)}, {"ids": "stored as I64/F32"}),
        (
            {},
            {f"{FC1}.weight": torch.zeros(128, 64).to(torch.float8_e4m3fn)},
            {f"{FC1}.weight": "stored as F32/F8_E4M3"},
        ),
        ({}, {f"{FC1}.bias": torch.ones(128)}, {f"{FC1}.bias": "Linear's bias, not a linear layer's weight"}),
        # the same in both is no difference, whatever it is
        ({"ids": torch.arange(3)}, {"ids": torch.arange(3)}, {}),
        ({"mask": torch.tensor([-torch.inf, torch.nan])}, {"mask": torch.tensor([-torch.inf, torch.nan])}, {}),
        ({f"{FC1}.bias": torch.zeros(128)}, {f"{FC1}.bias": torch.zeros(128).half()}, {}),
    ],
)
def test_tensors_that_do_not_match(
    pair: tuple[Path, Path],
    old: dict[str, Tensor | None],
    new: dict[str, Tensor | None],
    named: dict[str, str],
) -> None:
    for folder, changes in zip(pair, (old, new), strict=True):
        rewrite(folder, changes)
    vector, report = from_checkpoints(*pair, on_unequal="skip")
    assert report.unequal == named
    assert (FC1 in vector.modules) is (f"{FC1}.weight" not in named)
    if named:
        with pytest.raises(VectorError) as caught:
            from_checkpoints(*pair, on_unequal="error")
        assert all(name in str(caught.value) and why in str(caught.value) for name, why in named.items())
    else:
        from_checkpoints(*pair, on_unequal="error")


def test_a_checkpoint_of_the_body_alone(loaded: Load, pico_gpt2: Path, tmp_path: Path) -> None:
    """GPT-2 as its authors published it has no ``transformer.`` before its names."""
    base, after = tmp_path / "base", tmp_path / "tuned"
    shutil.copytree(pico_gpt2, base)
    tuned(loaded(pico_gpt2).model).save_pretrained(after)
    wanted, _ = from_checkpoints(base, after, on_unequal="error")
    body = {name.removeprefix("transformer."): t for name, t in load_file(base / SINGLE).items()}
    assert "h.0.mlp.c_fc.weight" in body
    save_file(body, base / SINGLE, {"format": "pt"})
    vector, _ = from_checkpoints(base, after, on_unequal="error")
    assert vector.digest() == wanted.digest()
    assert "transformer.h.0.mlp.c_fc" in vector.modules


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_checkpoints_are_subtracted_exactly_and_warned_of(
    loaded: Load, pico_phi: Path, tmp_path: Path, dtype: str
) -> None:
    base, after = loaded(pico_phi, dtype).model, tuned(loaded(pico_phi, dtype).model, std=3e-4)
    base.save_pretrained(tmp_path / "a")
    after.save_pretrained(tmp_path / "b")
    vector, report = from_checkpoints(tmp_path / "a", tmp_path / "b", on_unequal="error")
    same = elements = 0
    for name, m in vector.modules.items():
        one, two = (model.get_parameter(f"{name}.weight").detach() for model in (base, after))
        assert torch.equal(m.delta(), two.float() - one.float())
        same, elements = same + int((one == two).sum()), elements + one.numel()
    (warning,) = report.warnings
    assert f"{len(vector.modules)} of the changed matrices are stored in 16 bits" in warning
    assert f"{same / elements:.0%} of their elements do not differ" in warning
    assert 0.02 < same / elements < 0.98


def test_double_precision_is_subtracted_as_such(pair: tuple[Path, Path]) -> None:
    one = torch.full((128, 64), 1.0, dtype=torch.float64)
    rewrite(pair[0], {f"{FC1}.weight": one})
    rewrite(pair[1], {f"{FC1}.weight": one + 1e-9})  # less than float32 can hold beside 1
    vector, _ = from_checkpoints(*pair, on_unequal="error")
    torch.testing.assert_close(vector.modules[FC1].delta(), torch.full((128, 64), 1e-9), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rank", [None, 2])
def test_differences_that_are_not_finite(pair: tuple[Path, Path], value: float, rank: int | None) -> None:
    weight = torch.zeros(128, 64)
    weight[0, 0] = value
    rewrite(pair[1], {f"{FC1}.weight": weight})
    with pytest.raises(VectorError, match=f"is not finite in {FC1}$"):
        from_checkpoints(*pair, on_unequal="error", rank=rank)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_two_that_are_the_same(pico_phi: Path) -> None:
    with pytest.raises(VectorError, match="do not differ in any linear layer"):
        from_checkpoints(pico_phi, pico_phi, on_unequal="skip")


def refused(pair: tuple[Path, Path], said: str) -> None:
    with pytest.raises(UnlearnError, match=said):
        from_checkpoints(*pair, on_unequal="skip")


def test_folders_that_are_no_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, after = pair
    refused((tmp_path / "none", after), "none: no folder of a model: it has no config.json")
    refused((base, tmp_path / "none"), "none: no such folder")
    (after / SINGLE).write_bytes((after / SINGLE).read_bytes()[:-7])
    refused(pair, "its weights are damaged or do not belong together")
    (after / SINGLE).unlink()
    torch.save({f"{FC1}.weight": torch.ones(128, 64)}, after / "pytorch_model.bin")
    refused(pair, "pickled as .bin .* never opened")


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "no such"}', '{"model_type": "vit"}'])
def test_configurations_of_no_language_model(pair: tuple[Path, Path], config: str) -> None:
    (pair[0] / "config.json").write_text(config)
    refused(pair, "transformers cannot tell from its config.json what the weights are")


# --- the architecture ------------------------------------------------------------------------------------------------


@FIVE
def test_the_architecture_is_the_model_s(loaded: Load, folder: Path) -> None:
    """Against the model itself, and no memory is taken for it."""
    model = loaded(folder).model
    there = architecture_of(folder)
    assert there.kind == type(model).__name__
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    wanted = {f"{n}.weight": isinstance(m, Conv1D) for n, m in linear_modules(model).items()}
    assert there.linear == (wanted if tied else wanted | {"lm_head.weight": False})
    assert set(there.linear) | set(there.others) >= set(model.state_dict())
    assert not set(there.linear) & set(there.others)
    assert there.why_not("x") == f"a {there.kind} has no such weight"


def test_a_configuration_s_code_is_not_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[0] / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (pair[0] / "config.json").write_text(json.dumps(config))
    refused(pair, "transformers cannot tell")
    assert not (tmp_path / "ran").exists()
