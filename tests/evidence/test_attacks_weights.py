"""Copies with an edit merged, in fewer bits and trained again: against independent computations and steps by hand."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_arena import KINDS, Arena
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.data.encoding import Encoded
from unlearn.errors import TrainingError, VectorError
from unlearn.evidence.attacks import ATTACKS
from unlearn.evidence.attacks_weights import edited_copy, parted, quantised, relearn, unrelated_rows
from unlearn.model.load import Loaded, fingerprint, linear_modules
from unlearn.recipe.evaluation import RelearnSpec
from unlearn.train.batches import Pad
from unlearn.vector.change import LowRank
from unlearn.vector.edit import shape_of, subtracted
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]
FAMILIES = ["pico_phi", "pico_llama", "pico_gpt2"]


def a_vector(model: nn.Module, size: float = 0.2) -> TaskVector:
    draw = torch.Generator().manual_seed(3)
    modules = {}
    for name, module in linear_modules(model).items():
        out, inner = shape_of(module)
        a, b = torch.randn(2, inner, generator=draw), torch.randn(out, 2, generator=draw)
        modules[name] = LowRank(a * size, b * size)
    return TaskVector(modules)


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(torch.arange(3, 43)[None]).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_the_edited_model(family: str, request: pytest.FixtureRequest, loaded: Load) -> None:
    model = loaded(request.getfixturevalue(family)).model
    before, vector = fingerprint(model), a_vector(model)
    twin = edited_copy(model, vector, 0.5)
    with subtracted(model, vector, 0.5):
        wanted = logits_of(model)
        assert fingerprint(twin) == fingerprint(model)
    torch.testing.assert_close(logits_of(twin), wanted, atol=0, rtol=0)
    assert fingerprint(model) == before != fingerprint(twin)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not twin.training
    assert fingerprint(edited_copy(model, None, 1.0)) == fingerprint(edited_copy(model, vector, 0.0)) == before


def test_sixteen_bits_are_merged_by_one_rounding(loaded: Load, pico_gpt2: Path) -> None:
    model = loaded(pico_gpt2, "bfloat16").model
    vector = a_vector(model, 0.1)
    twin = edited_copy(model, vector, 0.5)
    for name, change in vector.modules.items():
        old, new = model.get_submodule(name), twin.get_submodule(name)
        delta = change.delta().T if isinstance(old, Conv1D) else change.delta()
        assert torch.equal(new.weight, (old.weight.float() - 0.5 * delta).bfloat16())
    assert twin.dtype == torch.bfloat16
    assert not any(m._forward_hooks for m in twin.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_four_bits_are_the_weights_read_back_by_hand(
    family: str, request: pytest.FixtureRequest, loaded: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    arena = Arena(loaded(request.getfixturevalue(family)), tmp_path, "qa")
    model, judge = arena.model, arena.judge()
    before, twin = fingerprint(model), edited_copy(model, a_vector(model, 0.05), 1.0)
    expected = edited_copy(twin, None, 0.0)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    with quantised(twin, "nf4") as small:
        for name in linear_modules(model):
            layer = small.get_submodule(name)
            assert type(layer) is bnb.nn.Linear4bit
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            conv = isinstance(expected.get_submodule(name), Conv1D)
            assert weight.shape == shape_of(expected.get_submodule(name))
            expected.get_submodule(name).weight.data.copy_(weight.T if conv else weight)
        assert not isinstance(small.get_output_embeddings(), bnb.nn.Linear4bit)
        found, wanted, full = judge.score(small), judge.score(expected), judge.score(twin)
        assert found.values == pytest.approx(wanted.values, rel=1e-4)
        assert found.values != pytest.approx(full.values, rel=1e-2)  # rounding to 16 levels does show
        torch.testing.assert_close(logits_of(small), logits_of(expected), atol=1e-4, rtol=1e-4)
        with pytest.raises(VectorError, match="cannot be merged into quantised weights"):
            edited_copy(small, a_vector(model), 1.0)
    assert not list(work.iterdir())
    assert fingerprint(model) == before
    assert not getattr(twin.config, "quantization_config", None)
    with pytest.raises(ZeroDivisionError), quantised(twin, "nf4"):
        len(list(work.iterdir())) / 0
    assert not list(work.iterdir()), "a copy is gone after an error"


def test_eight_bits(phi: Loaded, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    judge = Arena(phi, tmp_path, "mcq").judge()
    with quantised(phi.model, "int8") as small:
        assert all(type(small.get_submodule(n)) is bnb.nn.Linear8bitLt for n in linear_modules(phi.model))
        found = judge.read(judge.lm(small))["logprob"]
    full = judge.read(judge.lm(phi.model))["logprob"]
    assert all(math.isfinite(v) for v in found.values)
    assert found.values != full.values
    assert found.values == pytest.approx(full.values, abs=0.2)


def spec(**values: Any) -> RelearnSpec:
    return RelearnSpec.model_validate({"steps": (2, 4), "learning_rate": 5e-3, "batch_size": 2} | values, strict=False)


# --- which items -----------------------------------------------------------------------------------------------------


def test_items_are_taken_out_of_the_scored_ones(phi: Loaded, tmp_path: Path) -> None:
    forget = Arena(phi, tmp_path, "qa", forget={"shares": {"train": "all", "validation": 0.5, "test": 0.5}}).forget
    assert set(forget.test) < set(forget.train)
    free = len(forget.train) - len(forget.test)
    chosen, scored = parted(forget, forget.test, free, seed=0)
    assert scored == forget.test  # there are others enough
    chosen, scored = parted(forget, forget.test, free + 2, seed=0)
    assert len(chosen) == free + 2
    assert len(scored) == len(forget.test) - 2
    assert not set(chosen) & set(scored)
    assert [i for i in forget.test if i in set(scored)] == list(scored)  # in their order
    whole = replace(forget, train=forget.test)  # nothing else is known
    chosen, scored = parted(whole, forget.test, 99, seed=0)
    assert (len(chosen), len(scored)) == (3, 3)  # half of six
    assert not set(chosen) & set(scored)
    alone = replace(forget, train=forget.test[:1])
    assert parted(alone, forget.test[:1], 8, seed=0) == (forget.test[:1], forget.test[:1])


def test_unrelated_rows_are_those_of_the_utility_sets(phi: Loaded, tmp_path: Path) -> None:
    utility = [
        {"path": "passages.jsonl", "kind": "text", "length": 40, "prefix": 8},
        {"path": "far.jsonl", "kind": "mcq", "name": "choices", "columns": {"answer": "correct"}},
    ]
    arena = Arena(phi, tmp_path, "qa", retain=[], utility=utility)
    every = unrelated_rows(arena.sets, 999, 0, phi.tokenizer, 512)
    assert len(every) == sum(len({*s.train, *s.validation, *s.test}) for s in arena.sets[1:])
    rows = unrelated_rows(arena.sets, 5, 0, phi.tokenizer, 512)
    assert rows == every[:5]
    assert rows != unrelated_rows(arena.sets, 5, 1, phi.tokenizer, 512)
    texts = [phi.tokenizer.decode(row.input_ids) for row in every]
    assert not [t for t in texts if "France" in t and t.startswith("Question")]  # the forget set's
    assert unrelated_rows(arena.sets[:1], 5, 0, phi.tokenizer, 512) == []


# --- the curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_relearning_the_very_items_brings_them_back(kind: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind)
    judge, before = arena.judge(), fingerprint(phi.model)
    plain, twin = judge.score(phi.model), edited_copy(phi.model, None, 0.0)
    how = spec(steps=(1, 12, 4), learning_rate=1e-2)
    curve = relearn(twin, phi.tokenizer, arena.rows(arena.forget.test), how, 0, judge)
    assert [steps for steps, _ in curve] == [1, 4, 12]
    assert curve[-1][1].value > max(plain.value + 0.3, curve[0][1].value)
    assert curve[-1][1] == judge.score(twin)  # the copy is as it was scored last
    assert not twin.training
    assert not any(p.requires_grad or p.grad is not None for p in twin.parameters())
    assert fingerprint(phi.model) == before


def by_hand(model: Any, rows: list[Encoded], steps: int, size: int, rate: float, seed: int) -> None:
    """AdamW, constant rate, gradients cut at norm 1, the mean over a batch's answer tokens."""
    draw, order = random.Random(f"{seed} relearning"), []
    while len(order) < steps * size:
        order += draw.sample(rows, len(rows))
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    model.train()
    model.requires_grad_(True)
    for step in range(steps):
        batch = Pad(0)(order[step * size : (step + 1) * size])
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()


@pytest.mark.parametrize(("count", "size", "batch"), [(3, 2, 2), (1, 8, 1)], ids=["batches", "fewer rows than a batch"])
def test_the_curve_is_that_of_steps_by_hand(
    count: int, size: int, batch: int, phi: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arena = Arena(phi, tmp_path / "arena", "qa")
    judge, rows = arena.judge(), arena.rows(arena.forget.train[:count])
    curve = relearn(edited_copy(arena.model, None, 0.0), arena.tokenizer, rows, spec(batch_size=size), 5, judge)
    for steps, found in curve:
        twin = edited_copy(arena.model, None, 0.0)
        by_hand(twin, rows, steps, batch, 5e-3, 5)
        assert found.values == pytest.approx(judge.score(twin).values, rel=1e-3)
    assert [p.name for p in tmp_path.iterdir()] == ["arena"]  # no checkpoints


def test_the_same_seed_gives_the_same_curve(phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, "qa")
    judge, rows = arena.judge(), arena.rows(arena.forget.train)

    def curve(seed: int, steps: tuple[int, ...] = (2, 4)) -> list[tuple[int, Any]]:
        twin: Any = edited_copy(phi.model, None, 0.0)
        for module in twin.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        found = relearn(twin, phi.tokenizer, rows, spec(steps=steps), seed, judge)
        assert found[-1][1] == judge.score(twin.eval())  # nothing was dropped while it was scored
        return found

    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = curve(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert curve(0) == first
    assert curve(1) != first
    # scoring on the way changes nothing of the training
    assert curve(0, (4,)) == first[1:]


def test_sixteen_bit_models_are_trained_in_full_precision(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    arena = Arena(loaded(pico_phi, "bfloat16"), tmp_path, "qa")
    twin, how = edited_copy(arena.model, None, 0.0), spec(learning_rate=1e-6)
    assert len(relearn(twin, arena.tokenizer, arena.rows(arena.forget.train), how, 0, arena.judge())) == 2
    assert twin.dtype == torch.float32
    # steps that small would all be lost in bfloat16
    assert fingerprint(twin) != fingerprint(edited_copy(arena.model, None, 0.0).float())


def test_what_cannot_be_relearned(phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, "qa")
    assert ATTACKS["relearn"].settings(arena.scene()) is None, "there is nothing to train on"
    broken = edited_copy(phi.model, None, 0.0)
    broken.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"the loss became nan at step 1; lower robustness.relearn.learning_rate"):
        relearn(broken, phi.tokenizer, arena.rows(arena.forget.train), spec(), 0, arena.judge())
    assert not broken.training


def test_a_vector_that_fits_no_module(phi: Loaded) -> None:
    with pytest.raises(VectorError, match="does not fit this model"):
        edited_copy(phi.model, TaskVector({"no.such": LowRank(torch.ones(1, 64), torch.ones(64, 1))}), 1.0)
