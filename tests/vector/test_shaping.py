"""A recipe's list of methods does what the methods' own functions do, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from unlearn.data.encoding import IGNORE, Encoded
from unlearn.errors import VectorError
from unlearn.model.load import Loaded, resolve_targets
from unlearn.recipe.methods import VectorSpec
from unlearn.train.learned import LearnSpec, components, gradients, learn, weigh
from unlearn.vector.change import LowRank
from unlearn.vector.methods import ethos, ext_sub, lines, perta, project
from unlearn.vector.shaping import SHAPERS, Materials, shape, weights_of
from unlearn.vector.task_vector import TaskVector


def row(start: int) -> Encoded:
    ids = tuple(range(start, start + 6))
    return Encoded(ids, (IGNORE, IGNORE, IGNORE, *ids[3:]))


FORGET, RETAIN = [row(s) for s in (20, 40, 60)], [row(s) for s in (90, 110)]


def drawn(loaded: Loaded, seed: int, base: str = "here") -> TaskVector:
    generator = torch.Generator().manual_seed(seed)

    def factors(name: str) -> LowRank:
        out, width = weights_of(loaded.model, [name])[name].shape
        a, b = (torch.randn(s, generator=generator) for s in ((3, width), (out, 3)))
        return LowRank(a, 0.01 * b)

    return TaskVector({n: factors(n) for n in resolve_targets(loaded.model, "all-linear")}, {"base": base})


@pytest.fixture
def have(phi: Loaded) -> Materials:
    fitted = drawn(phi, 1)
    return Materials(phi.model, 0, 0, fitted, drawn(phi, 2), FORGET, RETAIN)


def importances(have: Materials) -> list[dict[str, torch.Tensor]]:
    return [gradients(have.model, rows, tuple(have.fitted.modules), "fisher", 64, 0) for rows in (FORGET, RETAIN)]


def fitted_weights(have: Materials) -> TaskVector:
    parts = components(have.fitted)
    how = LearnSpec(steps=3, rate=0.05, beta=2.0, coefficients=(0.5, 0.5))
    return weigh(parts, learn(have.model, parts, FORGET, RETAIN, how, 0, 0)[0])


Expected = Callable[[Materials], TaskVector]
CASES: dict[str, tuple[dict[str, Any], Expected]] = {
    "contrast": ({"mu": 0.5}, lambda h: h.fitted - 0.5 * h.near()),
    "ext_sub": ({}, lambda h: ext_sub(h.fitted, h.near())),
    "project": ({"project": {"energy": 0.6}}, lambda h: project(h.fitted, h.near(), 0.6)),
    "ethos": (
        {"ethos": {"threshold": 0.2}},
        lambda h: ethos(h.fitted, {n: h.model.get_parameter(f"{n}.weight") for n in h.fitted.modules}, 0.2),
    ),
    "perta": (
        {"perta": {"importance": "fisher", "alpha": 2.0}},
        lambda h: perta(h.fitted, *importances(h), 2.0),
    ),
    "lines": ({"lines": {"a": 0.1, "b": 2.0}}, lambda h: lines(h.fitted, 0.1, 2.0)),
    "learned": ({"learned": {"steps": 3, "learning_rate": 0.05, "beta": 2.0, "scale": 0.5}}, fitted_weights),
    "low_rank": ({"low_rank": {"rank": 1}}, lambda h: h.fitted.to_low_rank(rank=1)),
    "prune": ({"prune": {"keep": 0.5, "by": "magnitude"}}, lambda h: h.fitted.prune(0.5, "magnitude")),
    "rescale": ({}, lambda h: h.fitted),
}


def test_every_shaper_has_its_case() -> None:
    assert set(CASES) == set(SHAPERS)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_its_method(have: Materials, name: str) -> None:
    settings, expected = CASES[name]
    spec = VectorSpec.model_validate({"method": name, **settings})
    got, wanted = shape(have.fitted, spec.steps(), spec, have), expected(have)
    assert (got - wanted).norm() <= 1e-6 * wanted.norm()
    if name != "rescale":
        assert (got - have.fitted).norm() > 1e-2 * have.fitted.norm()


def test_steps_follow_each_other_and_rescale_gives_the_size_back(have: Materials) -> None:
    spec = VectorSpec.model_validate({"method": ("ext_sub", "project", "rescale")})
    got = shape(have.fitted, spec.steps(), spec, have)
    wanted = project(ext_sub(have.fitted, have.near()), have.near(), 0.9)
    assert got.cosine(wanted) == pytest.approx(1.0, abs=1e-6)
    assert got.norm() == pytest.approx(have.fitted.norm(), rel=1e-5)
    assert wanted.norm() < 0.9 * have.fitted.norm()


def test_vectors_of_two_models_are_refused(phi: Loaded, have: Materials) -> None:
    spec = VectorSpec.model_validate({"method": "project"})
    other = replace(have, retain_vector=drawn(phi, 2, base="elsewhere"))
    with pytest.raises(VectorError, match="fitted on different models"):
        shape(have.fitted, spec.steps(), spec, other)
    with pytest.raises(VectorError, match="needs a vector fitted on the retain sets"):
        shape(have.fitted, spec.steps(), spec, replace(have, retain_vector=None))


def test_weights_are_out_by_in_also_of_conv1d(gpt2: Loaded, phi: Loaded) -> None:
    name = resolve_targets(gpt2.model, "all-linear")[0]
    weight = gpt2.model.get_parameter(f"{name}.weight")
    assert torch.equal(weights_of(gpt2.model, [name])[name], weight.T)
    name = resolve_targets(phi.model, "all-linear")[0]
    assert torch.equal(weights_of(phi.model, [name])[name], phi.model.get_parameter(f"{name}.weight"))


def test_an_adapter_can_be_kept_to_a_stretch_of_the_depth(phi: Loaded) -> None:
    layers = phi.model.config.num_hidden_layers
    everything = resolve_targets(phi.model, "all-linear")
    last = resolve_targets(phi.model, "all-linear", (1 - 1 / layers, 1.0))
    assert last == tuple(n for n in everything if f".{layers - 1}." in n)
    assert 0 < len(last) < len(everything)
    with pytest.raises(Exception, match=f"none of the {layers} layers lies between"):
        resolve_targets(phi.model, "all-linear", (0.0, 0.01))
