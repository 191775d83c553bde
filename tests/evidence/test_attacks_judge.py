"""The forget score of a model in memory, and quantised and edited copies of it, against independent computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_arena import KINDS, Arena
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlearn.errors import EvaluationError, VectorError
from unlearn.evidence.attacks import Judge, Judged
from unlearn.evidence.attacks_weights import edited_copy, quantised
from unlearn.model.load import Loaded, fingerprint, linear_modules
from unlearn.score.evaluate import evaluate
from unlearn.score.tasks import build_tasks
from unlearn.vector.change import LowRank
from unlearn.vector.edit import applied, shape_of
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]


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


# --- the judge -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["packed", "hf"])
@pytest.mark.parametrize(("kind", "metric"), [("mcq", "acc"), ("qa", "prob"), ("text", "exact_memorisation")])
def test_it_is_the_score_of_the_report(kind: str, metric: str, engine: str, phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, kind, eval={"engine": engine})
    judge = arena.judge()
    found = judge.scores(phi.model)
    built = build_tasks(arena.sets[:1], "test", arena.recipe, phi.tokenizer, tmp_path / "others", generate=True)
    whole = evaluate(judge.lm(phi.model), built, model_name="m", bootstrap=0)
    there = {s.metric: s for s in whole.scores}
    assert judge.metric == metric
    assert judge.chance == there[metric].chance
    assert (judge.chance is None) is (kind != "mcq")
    assert metric in found
    assert ("logprob" in found) is (kind == "mcq")
    for name, score in found.items():
        assert score.value == pytest.approx(there[name].score.value, abs=1e-9)
        assert score.stderr == pytest.approx(there[name].score.stderr, abs=1e-9)
        assert score.higher_is_better is there[name].higher_is_better
        assert len(score.values) == there[name].score.n == len(arena.forget.test)
    assert judge.score(phi.model) == found[metric]


def test_prompts_of_its_own(phi: Loaded, tmp_path: Path) -> None:
    """Probability of an answer after another prompt, by the model itself."""
    judge = Arena(phi, tmp_path, "qa").judge()
    items = [i.__class__(i.id, f"I ask: {i.prompt}", i.target) for i in judge.items]
    found = judge.asking(items).score(phi.model)
    assert judge.asking(items) is judge.asking(list(items))
    for item, value in zip(items, found.values, strict=True):
        ids = phi.tokenizer(f"{item.prompt} {item.target}", return_tensors="pt")["input_ids"]
        skip = len(phi.tokenizer(item.prompt)["input_ids"])
        with torch.inference_mode():
            said = phi.model(ids).logits[0].log_softmax(-1)
        each = [float(said[k - 1, ids[0, k]]) for k in range(skip, ids.shape[1])]
        assert value == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-4)
    assert found.values != judge.score(phi.model).values


def test_one_item_and_none(phi: Loaded, tmp_path: Path) -> None:
    arena = Arena(phi, tmp_path, "qa")
    one = Judge(arena.forget, arena.forget.test[:1], phi.tokenizer, tmp_path / "items", arena.recipe).score(phi.model)
    assert one.stderr is None
    assert one.value == one.values[0]
    assert one.value == pytest.approx(arena.judge().score(phi.model).values[0], rel=1e-5)
    with pytest.raises(EvaluationError, match="no items of forget set 'near' to attack"):
        Judge(arena.forget, (), phi.tokenizer, tmp_path / "items", arena.recipe)


def test_means() -> None:
    found = Judged.mean("acc", True, [1.0, 0.0, 1.0, 1.0])
    assert (found.value, found.stderr) == (0.75, 0.25)  # s = .5, of four
    assert Judged.mean("acc", True, [1.0, 1.0]).stderr == 0.0
    line = found.entry("edited", "x", "relearn", steps=5)
    assert (line.value, line.stderr, line.n, line.steps, line.layer, line.metric) == (0.75, 0.25, 4, 5, None, "acc")
    with pytest.raises(EvaluationError, match="no items"):
        Judged.mean("acc", True, [])


# --- copies with the edit in them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pico_phi", "pico_llama", "pico_gpt2"])
def test_the_copy_is_the_edited_model(family: str, request: pytest.FixtureRequest, loaded: Load) -> None:
    model = loaded(request.getfixturevalue(family)).model
    before, vector = fingerprint(model), a_vector(model)
    twin = edited_copy(model, vector, 0.5)
    with applied(model, vector, -0.5):
        wanted = logits_of(model)
        assert fingerprint(twin) == fingerprint(model)
    torch.testing.assert_close(logits_of(twin), wanted, atol=0, rtol=0)
    assert fingerprint(model) == before != fingerprint(twin)
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in twin.parameters()}
    assert not twin.training


def test_sixteen_bits_are_merged_by_one_rounding(loaded: Load, pico_gpt2: Path) -> None:
    model = loaded(pico_gpt2, "bfloat16").model
    vector = a_vector(model, 0.1)
    twin = edited_copy(model, vector, 0.5)
    for name, change in vector.modules.items():
        old, new = model.get_submodule(name), twin.get_submodule(name)
        delta = change.delta().T if isinstance(old, Conv1D) else change.delta()
        assert isinstance(old.weight, Tensor)
        assert torch.equal(new.weight, (old.weight.float() - 0.5 * delta).bfloat16())
    assert twin.dtype == torch.bfloat16
    assert not any(m._forward_hooks for m in twin.modules())


def test_nothing_to_merge(phi: Loaded) -> None:
    before = fingerprint(phi.model)
    assert fingerprint(edited_copy(phi.model, None, 1.0)) == before
    assert fingerprint(edited_copy(phi.model, a_vector(phi.model), 0.0)) == before
    with pytest.raises(VectorError, match="does not fit this model"):
        edited_copy(phi.model, TaskVector({"no.such": LowRank(torch.ones(1, 64), torch.ones(64, 1))}), 1.0)


# --- quantised copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pico_phi", "pico_llama", "pico_gpt2"])
def test_four_bits_are_the_weights_read_back_by_hand(
    family: str, request: pytest.FixtureRequest, loaded: Load, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    arena = Arena(loaded(request.getfixturevalue(family)), tmp_path, "qa")
    model, judge = arena.model, arena.judge()
    before, twin = fingerprint(model), edited_copy(model, a_vector(model, 0.05), 1.0)
    expected = edited_copy(twin, None, 0.0)
    work = tmp_path / "work"
    work.mkdir()
    with quantised(twin, "nf4", work) as small:
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
    assert not list(work.iterdir())
    assert fingerprint(model) == before
    assert not getattr(twin.config, "quantization_config", None)


def test_eight_bits(phi: Loaded, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    judge = Arena(phi, tmp_path, "mcq").judge()
    with quantised(phi.model, "int8") as small:
        assert all(type(small.get_submodule(n)) is bnb.nn.Linear8bitLt for n in linear_modules(phi.model))
        found = judge.scores(small)["logprob"]
    full = judge.scores(phi.model)["logprob"]
    assert all(math.isfinite(v) for v in found.values)
    assert found.values != full.values
    assert found.values == pytest.approx(full.values, abs=0.2)


def test_a_copy_is_gone_after_an_error(phi: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ZeroDivisionError), quantised(phi.model, "nf4", tmp_path):
        len(list(tmp_path.iterdir())) / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_cannot_be_merged_into_four_bits(kind: str, phi: Loaded, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    judge = Arena(phi, tmp_path, kind).judge()
    with quantised(phi.model, "nf4") as small:
        assert math.isfinite(judge.score(small).value)
        with pytest.raises(VectorError, match="cannot be merged into quantised weights"):
            edited_copy(small, a_vector(phi.model), 1.0)
