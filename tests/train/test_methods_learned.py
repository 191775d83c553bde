"""Importances and learned coefficients on pico models, against passes over plainly edited copies of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from train_arena import divergence, nlls, row, said, tokens
from transformers.pytorch_utils import Conv1D

from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import TrainingError, VectorError
from unlearn.model.load import Loaded
from unlearn.recipe.methods import LearnedSpec, LoraSpec, SlopesSpec, TrainSpec
from unlearn.train.learned import component_slopes, gradients, learn, materials
from unlearn.train.vectors import train_vector
from unlearn.vector.change import Change, Dense, LowRank
from unlearn.vector.edit import shape_of
from unlearn.vector.methods import components, slopes, weigh
from unlearn.vector.task_vector import TaskVector

Load = Callable[..., Loaded]


FORGET = [row(20 + 9 * i, 6 + i % 3, 2 + i % 3) for i in range(6)]
RETAIN = [row(200 + 11 * i, 6 + i % 4, 1 + i % 4) for i in range(6)]
NAMES = {
    "phi": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.fc2"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"],
}


def random_vector(model: nn.Module, names: Sequence[str], kind: str = "factors", size: float = 0.1) -> TaskVector:
    generator = torch.Generator().manual_seed(7)

    def one(name: str) -> Change:
        out, width = shape_of(model.get_submodule(name))
        if kind == "dense":
            return Dense(size * torch.randn(out, width, generator=generator))
        a, b = torch.randn(3, width, generator=generator), torch.randn(out, 3, generator=generator)
        return LowRank(a, size * b)

    return TaskVector({name: one(name) for name in names})


def subtracted(fresh: Callable[[], Any], vector: TaskVector, c: float = 1.0) -> nn.Module:
    """A model of its own whose weights are theta - c * tau, written in."""
    model = fresh()
    with torch.no_grad():
        for name, change in vector.modules.items():
            weight = model.get_submodule(name).get_parameter("weight")
            delta = change.delta()
            weight.sub_(c * (delta.T if isinstance(model.get_submodule(name), Conv1D) else delta))
    return model


def forget_nll(model: nn.Module, rows: list[Encoded]) -> Tensor:
    """Mean NLL per token of every answer, (F,)."""
    return torch.stack([nll / tokens([one]) for nll, one in zip(nlls(model, rows), rows, strict=True)])


def retain_kl(model: nn.Module, edited: nn.Module, rows: list[Encoded]) -> Tensor:
    """Mean over labelled positions of KL(model || edited)."""
    return divergence(*([said(one, row) for row in rows] for one in (model, edited)))


def state(model: nn.Module) -> list[Any]:
    parameters = [(p.requires_grad, p.grad, p.detach().clone()) for p in model.parameters()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return [parameters, hooks, [m.training for m in model.modules()]]


def assert_as_found(model: nn.Module, before: list[Any]) -> None:
    now = state(model)
    assert now[1:] == before[1:]
    for (learns, grad, value), (learned, had, was) in zip(now[0], before[0], strict=True):
        assert learns is learned
        assert grad is had
        assert torch.equal(value, was)


# -- slopes of components ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi", "gpt2"])
@pytest.mark.parametrize("kind", ["factors", "dense"])
def test_slopes_are_those_of_models_edited_a_little(
    loaded: Load, request: pytest.FixtureRequest, family: str, kind: str
) -> None:
    """Each item's loss under theta + w_k tau_k, by central differences; the vector of weights keeps them still."""
    folder: Path = request.getfixturevalue(f"pico_{family}")
    model = loaded(folder).model
    vector = components(random_vector(model, NAMES[family], kind))
    before = state(model)
    got = component_slopes(model, vector, RETAIN, 4, 3)
    assert_as_found(model, before)
    rows = random.Random(3).sample(RETAIN, 4)
    terms = [
        TaskVector({name: LowRank(m.A[k : k + 1], m.B[:, k : k + 1]) if isinstance(m, LowRank) else m})
        for name, m in vector.modules.items()
        for k in range(m.rank if isinstance(m, LowRank) else 1)
    ]
    assert got.shape == (4, len(terms))
    for k, term in enumerate(terms):
        up, down = (forget_nll(subtracted(lambda: loaded(folder).model.double(), term, c), rows) for c in (-1e-3, 1e-3))
        torch.testing.assert_close(got[:, k].double(), (up - down) / 2e-3, rtol=2e-2, atol=2e-5)
    have = materials(model, 0, 3, vector, None, FORGET, RETAIN)
    assert have.slopes is not None
    kept, gone = have.slopes(vector, 4)
    torch.testing.assert_close(gone, component_slopes(model, vector, FORGET, 4, 3).mean(0))

    def moved(w: Tensor) -> Tensor:
        return (kept @ w).abs().max()

    if kind == "factors":
        shaped = slopes(vector, have, SlopesSpec(mu=1e8, forget=1.0, samples=4))
        w = torch.cat(
            [
                (m.B.T @ shaped.modules[n].delta() @ m.A.T).diagonal() / m.B.square().sum(0)
                for n, m in vector.modules.items()
                if isinstance(m, LowRank)
            ]
        )
        goal = 1.0 - gone / gone.square().mean().sqrt()
        # the projection of the goal on the weights that leave every loss still, the least change that does
        wanted = goal.double() - torch.linalg.pinv(kept.double()) @ (kept.double() @ goal.double())
        torch.testing.assert_close(w.double(), wanted, rtol=1e-2, atol=1e-3)
        assert float(moved(w)) < 1e-3 * float(moved(torch.ones_like(w)))
    with pytest.raises(VectorError, match="slopes need at least one sample with a token to learn"):
        component_slopes(model, vector, [], 4, 3)


# -- importance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phi", "gpt2"])
@pytest.mark.parametrize("kind", ["grad", "fisher"])
def test_importance_is_what_backward_gives_sample_by_sample(
    loaded: Load, request: pytest.FixtureRequest, family: str, kind: str
) -> None:
    folder: Path = request.getfixturevalue(f"pico_{family}")
    names = NAMES[family]
    got = gradients(loaded(folder).model, FORGET, names, kind)

    model = loaded(folder).model
    model.requires_grad_(True)
    for name in names:
        total = torch.zeros(shape_of(model.get_submodule(name)))
        for one in FORGET:
            model.zero_grad()
            forget_nll(model, [one]).mean().backward()
            g = model.get_submodule(name).get_parameter("weight").grad
            assert g is not None
            g = g.T if family == "gpt2" else g
            total += g.abs() if kind == "grad" else g**2
        assert float(total.abs().max()) > 0
        scale = float(total.abs().max()) / len(FORGET)
        torch.testing.assert_close(got[name] / scale, total / len(FORGET) / scale, rtol=1e-3, atol=1e-4)
    assert list(got) == names


def test_importance_leaves_the_model_as_found(loaded: Load, pico_phi: Path) -> None:
    model = loaded(pico_phi).model
    model.train()
    model.get_submodule("model.layers.0").eval()
    model.get_submodule("lm_head").requires_grad_(False)
    before = state(model)
    with torch.no_grad():
        gradients(model, FORGET, NAMES["phi"], "fisher")
    assert_as_found(model, before)
    model.eval()
    before = state(model)
    with pytest.raises(IndexError):  # a token outside the vocabulary
        gradients(model, [Encoded((1, 10**6), (IGNORE, 3))], NAMES["phi"])
    assert_as_found(model, before)


def test_importance_of_some_samples(loaded: Load, pico_phi: Path) -> None:
    model = loaded(pico_phi).model
    name = NAMES["phi"][0]
    one = [gradients(model, [sample], [name])[name] for sample in FORGET]
    few = gradients(model, FORGET, [name], samples=2, seed=3)[name]
    pairs = [(i, j) for i in range(6) for j in range(i) if torch.allclose(few, (one[i] + one[j]) / 2, rtol=1e-4)]
    assert len(pairs) == 1
    torch.testing.assert_close(gradients(model, FORGET, [name], samples=2, seed=3)[name], few, rtol=0, atol=0)
    assert any(not torch.equal(gradients(model, FORGET, [name], samples=2, seed=s)[name], few) for s in range(3))


# -- learned coefficients ----------------------------------------------------------------------------------------

ALL = LearnedSpec(steps=1, batch_size=9, retain_batch_size=9)  # every row in the one batch


def changed(settings: dict[str, Any]) -> LearnedSpec:
    return ALL.model_copy(update=settings)


@pytest.mark.parametrize(("family", "kind"), [("phi", "factors"), ("phi", "dense"), ("gpt2", "factors")])
def test_the_objective_is_the_formula_s(loaded: Load, request: pytest.FixtureRequest, family: str, kind: str) -> None:
    folder: Path = request.getfixturevalue(f"pico_{family}")
    model = loaded(folder).model
    vector = random_vector(model, NAMES[family], kind)
    c, spec = 1.5, changed({"beta": 3.0, "scale": 1.5})
    with torch.no_grad():
        edited = subtracted(lambda: loaded(folder).model, vector, c)
        nll, kl = forget_nll(edited, FORGET), float(retain_kl(model, edited, RETAIN))
    ceiling = float(nll.sort().values[2:4].mean())  # some answers above it and some below
    spec = spec.model_copy(update={"ceiling": ceiling})
    _, log = learn(model, vector, FORGET, RETAIN, spec, 0, 0)
    assert log[0][1] == pytest.approx(float(nll.mean()), rel=1e-4)
    assert log[0][2] == pytest.approx(kl, rel=1e-3)
    cut = float(nll.clamp(max=ceiling).mean())
    assert cut < float(nll.mean())
    assert log[0][0] == pytest.approx(-cut + 3.0 * kl, rel=1e-3)
    assert kl > 0.01


@pytest.mark.parametrize("by", ["component", "module"])
def test_coefficients_move_down_the_objective(loaded: Load, pico_phi: Path, by: Any) -> None:
    """Adam's first step has the gradient's sign and the rate's size; the gradient is taken by differences."""
    model = loaded(pico_phi).model
    vector = components(random_vector(model, NAMES["phi"]))
    spec = changed({"learning_rate": 1e-3, "by": by, "beta": 2.0})
    got, _ = learn(model, vector, FORGET, RETAIN, spec, 0, 0)
    counts = {n: change.rank if by == "component" else 1 for n, change in vector.modules.items()}
    assert {name: len(w) for name, w in got.items()} == counts

    def objective(weights: dict[str, Tensor]) -> float:
        with torch.no_grad():
            edited = subtracted(lambda: loaded(pico_phi).model, weigh(vector, weights))
            nll = forget_nll(edited, FORGET).clamp(max=spec.ceiling).mean()
            return float(2.0 * retain_kl(model, edited, RETAIN) - nll)

    for name, count in counts.items():
        for k in range(count):
            ends = []
            for step in (0.05, -0.05):
                weights = {n: torch.ones(c) for n, c in counts.items()}
                weights[name][k] += step
                ends.append(objective(weights))
            assert float(got[name][k]) - 1 == pytest.approx(-math.copysign(1e-3, ends[0] - ends[1]), rel=1e-2)


def test_an_answer_above_the_ceiling_pulls_no_further(loaded: Load, pico_phi: Path) -> None:
    model = loaded(pico_phi).model
    vector = random_vector(model, NAMES["phi"])
    got, _ = learn(model, vector, FORGET, RETAIN, changed({"steps": 2, "beta": 0.0, "ceiling": 1e-3}), 0, 0)
    assert all(torch.equal(w, torch.ones_like(w)) for w in got.values())
    got, _ = learn(model, vector, FORGET, RETAIN, changed({"steps": 2, "beta": 0.0, "ceiling": 1e3}), 0, 0)
    assert not any(torch.equal(w, torch.ones_like(w)) for w in got.values())


def test_the_model_comes_back_and_a_seed_decides(loaded: Load, pico_phi: Path) -> None:
    model = loaded(pico_phi).model
    model.train()
    vector = components(random_vector(model, NAMES["phi"]))
    before = state(model)
    spec = LearnedSpec(steps=3, batch_size=2, retain_batch_size=2)
    with torch.no_grad():
        first, log = learn(model, vector, FORGET, RETAIN, spec, 5, 0)
    assert_as_found(model, before)
    again, _ = learn(model, vector, FORGET, RETAIN, spec, 5, 0)
    other, _ = learn(model, vector, FORGET, RETAIN, spec, 6, 0)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)
    assert len(log) == 3


def test_learned_coefficients_spare_the_retain_set(loaded: Load, pico_phi: Path, tmp_path: Path) -> None:
    """At equal forget NLL, the divergence on retain rows is lower than under the vector as it was fitted."""
    got = loaded(pico_phi)
    spec = TrainSpec(steps=20, batch_size=6, learning_rate=1e-2)
    # the near sets share their prompts' beginning, as neighbours do
    near = [
        Encoded((*f.input_ids[:3], *r.input_ids), (*[IGNORE] * 3, *r.labels))
        for f, r in zip(FORGET, RETAIN, strict=True)
    ]
    vector, _ = train_vector(got.model, got.tokenizer, FORGET, spec, LoraSpec(rank=4), 0, tmp_path, "forget", {})
    vector = components(vector)
    fit = LearnedSpec(steps=40, learning_rate=0.05, beta=1.0, ceiling=9.8)
    weights, log = learn(got.model, vector, FORGET, near, fit, 0, 0)

    def measured(edit: TaskVector, c: float) -> tuple[float, float]:
        with torch.no_grad():
            edited = subtracted(lambda: loaded(pico_phi).model, edit, c)
            return float(forget_nll(edited, FORGET).mean()), float(retain_kl(got.model, edited, near))

    forgotten, spared = measured(weigh(vector, weights), 1.0)
    low, high = 0.0, 0.7  # beyond, a random model's answers become no less likely
    for _ in range(14):  # the coefficient at which the unweighted vector forgets as much
        middle = (low + high) / 2
        low, high = (middle, high) if measured(vector, middle)[0] < forgotten else (low, middle)
    plain, kl = measured(vector, high)
    assert plain == pytest.approx(forgotten, rel=1e-3)
    assert spared < 0.8 * kl
    assert log[-1][0] < log[0][0]


def test_what_cannot_be_learned(loaded: Load, pico_phi: Path) -> None:
    model = loaded(pico_phi).model
    with pytest.raises(VectorError, match="at least one sample"):
        gradients(model, [Encoded((1, 2), (1, IGNORE))], NAMES["phi"])
    vector = random_vector(model, NAMES["phi"])
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"beta": -1.0}, {"ceiling": math.inf}, {"by": "layer"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            LearnedSpec.model_validate(wrong)
    with pytest.raises(VectorError, match="the retain set has no training item"):
        learn(model, vector, FORGET, [], ALL, 0, 0)
    with pytest.raises(VectorError, match="the vector does not fit this model"):
        learn(model, TaskVector({"nowhere": Dense(torch.ones(2, 2))}), FORGET, RETAIN, ALL, 0, 0)
    with pytest.raises(VectorError, match="the vector is zero"):
        learn(model, 0.0 * vector, FORGET, RETAIN, ALL, 0, 0)
    with pytest.raises(TrainingError, match="the objective became nan at step 0"):
        learn(model, 1e30 * vector, FORGET, RETAIN, ALL, 0, 0)
