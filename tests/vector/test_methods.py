"""Ways of shaping a vector, each against its formula computed on dense float64 matrices, and against an identity."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from vector_arena import exact, factors

import unlearn
from unlearn.errors import VectorError
from unlearn.model.load import layer_of
from unlearn.recipe.data import Frozen
from unlearn.recipe.methods import (
    METHODS,
    SHAPERS,
    EthosSpec,
    LinesSpec,
    Name,
    PertaSpec,
    ProjectSpec,
    VectorSpec,
    phrases,
)
from unlearn.vector import methods
from unlearn.vector.change import Change, Dense, LowRank
from unlearn.vector.methods import Have, components, consensus, msa, random_like, shape, weigh
from unlearn.vector.task_vector import TaskVector

# one wide, one tall, one square, and one that only the forget vector changes
SHAPES = {
    "model.layers.0.self_attn.q_proj": (6, 9),
    "model.layers.0.mlp.fc1": (10, 5),
    "model.layers.2.mlp.fc2": (7, 7),
    "model.layers.3.mlp.fc2": (7, 4),
}
SHARED = list(SHAPES)[:3]
KINDS = ["factors", "dense"]
SEEDS = st.integers(0, 10_000)

quick = settings(deadline=None, max_examples=20)  # a shared machine has slow moments


def draw(shape: tuple[int, int], kind: str, generator: torch.Generator, rank: int = 3) -> Change:
    return Dense(torch.randn(shape, generator=generator)) if kind == "dense" else factors(*shape, rank, generator)


def random_vector(seed: int, kind: str = "factors", names: list[str] | None = None, rank: int = 3) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    return TaskVector({n: draw(SHAPES[n], kind, generator, rank) for n in names or SHAPES}, {"seed": str(seed)})


def dense(vector: TaskVector) -> dict[str, Tensor]:
    """Every change in float64, from its own tensors."""
    return {name: exact(m) for name, m in vector.modules.items()}


def assert_is(vector: TaskVector, wanted: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    got = dense(vector)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)


def apart(one: TaskVector, two: TaskVector) -> float:
    """Norm of the difference against the norm of the second."""
    a, b = dense(one), dense(two)
    return float(sum((a[n] - b[n]).square().sum() for n in b).sqrt() / sum(v.square().sum() for v in b.values()).sqrt())


def project(forget: TaskVector, retain: TaskVector, energy: float = 0.9) -> TaskVector:
    return methods.project(forget, Have(forget, retain), ProjectSpec(energy=energy))


def ext_sub(forget: TaskVector, retain: TaskVector) -> TaskVector:
    return methods.ext_sub(forget, Have(forget, retain))


def ethos(vector: TaskVector, weights: Mapping[str, Tensor], threshold: float = 0.03) -> TaskVector:
    return methods.ethos(vector, Have(vector, weights=lambda names: weights), EthosSpec(threshold=threshold))


def perta(vector: TaskVector, f: Mapping[str, Tensor], r: Mapping[str, Tensor], alpha: float = 1.0) -> TaskVector:
    return methods.perta(vector, Have(vector, importances=lambda *asked: (f, r)), PertaSpec(alpha=alpha))


def lines(vector: TaskVector, a: float, b: float, layers: int | None = None) -> TaskVector:
    return methods.lines(vector, Have(vector, layers=layers), LinesSpec(a=a, b=b))


def kinds(vector: TaskVector) -> set[type]:
    return {type(m) for m in vector.modules.values()}


# -- msa ---------------------------------------------------------------------------------------------------------


def test_msa_is_a_weighted_difference() -> None:
    forget, retain = random_vector(1), random_vector(2, names=SHARED)
    f, r = dense(forget), dense(retain)
    got = msa(forget, retain, alpha=1.5, beta=0.5)
    assert_is(got, {n: 1.5 * f[n] - 0.5 * r.get(n, torch.zeros_like(f[n])) for n in f})
    assert_is(msa(forget, retain, 1.0, 0.0), f)
    assert kinds(got) == {LowRank}
    with pytest.raises(VectorError, match="msa: nothing is left"):
        msa(forget, forget, 1.0, 1.0)


# -- projection --------------------------------------------------------------------------------------------------


def projected(f: Tensor, r: Tensor, energy: float) -> Tensor:
    """dW_f (I - V V^T) by the dense SVD of dW_r and the identity matrix written out."""
    _, s, vh = torch.linalg.svd(r)
    share = s.square().cumsum(0) / s.square().sum()
    k = next(i + 1 for i, have in enumerate(share.tolist()) if have >= energy - 1e-12)
    v = vh[:k].T
    return f @ (torch.eye(f.shape[1], dtype=f.dtype) - v @ v.T)


@quick
@given(seed=SEEDS, energy=st.sampled_from([0.05, 0.5, 0.9, 0.99]), f=st.sampled_from(KINDS), r=st.sampled_from(KINDS))
def test_projection_takes_the_retain_vector_s_directions_out(seed: int, energy: float, f: str, r: str) -> None:
    forget, retain = random_vector(seed, f), random_vector(seed + 1, r, SHARED, rank=2)
    got = project(forget, retain, energy)
    a, b = dense(forget), dense(retain)
    assert_is(got, {n: projected(a[n], b[n], energy) if n in b else a[n] for n in a})
    assert apart(project(got, retain, energy), got) < 1e-5  # twice is once
    assert got.norm() <= forget.norm() * (1 + 1e-6)
    assert dict(got.meta) == dict(forget.meta)


def test_projection_changes_the_input_side_of_factors_only() -> None:
    forget, retain = random_vector(3), random_vector(4)
    got = project(forget, retain, 1.0)
    for name, m in got.modules.items():
        before = forget.modules[name]
        assert isinstance(m, LowRank)
        assert isinstance(before, LowRank)
        assert m.B is before.B
        product = dense(got)[name] @ dense(retain)[name].T  # all of the retain vector's rows are gone
        torch.testing.assert_close(product, torch.zeros_like(product), atol=1e-4, rtol=0)


def test_projection_off_itself_leaves_nothing_and_off_a_zero_module_everything() -> None:
    forget = random_vector(5)
    with pytest.raises(VectorError, match=r"project: nothing is left of the vector; .*lower energy"):
        project(forget, forget, 1.0)
    first = SHARED[0]
    retain = TaskVector(
        {**random_vector(6).modules, first: LowRank(torch.zeros(2, SHAPES[first][1]), torch.ones(SHAPES[first][0], 2))}
    )
    got = project(forget, retain, 0.5)
    assert got.modules[first] is forget.modules[first]
    assert not torch.allclose(got.modules[SHARED[1]].delta(), forget.modules[SHARED[1]].delta())


# -- ext-sub -----------------------------------------------------------------------------------------------------


def extracted(f: Tensor, r: Tensor) -> Tensor:
    """Row by row with the bisector written out, as in the paper's own code."""
    rows = []
    for one, two in zip(f, r, strict=True):
        common = one / one.norm() + two / two.norm()
        u = common / common.norm()
        rows.append(one - (one @ u) * u)
    return torch.stack(rows)


@quick
@given(seed=SEEDS, f=st.sampled_from(KINDS), r=st.sampled_from(KINDS))
def test_ext_sub_takes_the_common_directions_out(seed: int, f: str, r: str) -> None:
    forget, retain = random_vector(seed, f), random_vector(seed + 1, r, SHARED, rank=2)
    a, b = dense(forget), dense(retain)
    got = ext_sub(forget, retain)
    assert_is(got, {n: extracted(a[n], b[n]) if n in b else a[n] for n in a})
    assert_is(ext_sub(forget, 7.0 * retain), dense(got))  # only directions of the retain vector count
    if f == r == "factors":
        assert kinds(got) == {LowRank}
        assert got.rank() == 5


def test_ext_sub_of_rows_with_nothing_and_with_everything_in_common() -> None:
    name = "layers.0.w"
    f = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    r = torch.tensor([[0.0, 5.0], [-1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    got = ext_sub(TaskVector({name: Dense(f)}), TaskVector({name: Dense(r)})).modules[name].delta()
    # orthogonal: half of each, at the forget row's length; opposite and zero: kept whole; parallel: nothing
    wanted = torch.tensor([[1.5, -1.5], [3.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(got, wanted)
    forget = random_vector(8)
    with pytest.raises(VectorError, match="ext-sub: nothing is left"):
        ext_sub(forget, 2.0 * forget)


# -- ethos -------------------------------------------------------------------------------------------------------


def base_weights(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator) for n, shape in SHAPES.items()}


@quick
@given(seed=SEEDS, threshold=st.sampled_from([0.03, 0.3, 0.7]), kind=st.sampled_from(KINDS))
def test_ethos_keeps_the_large_components(seed: int, threshold: float, kind: str) -> None:
    vector, weights = random_vector(seed, kind), base_weights(seed + 1)
    wanted = {}
    for name, delta in dense(vector).items():
        u, _, vh = torch.linalg.svd(weights[name].double())
        k = min(delta.shape)
        inner = u[:, :k].T @ delta @ vh[:k].T
        share = inner.abs() / inner.abs().max()
        assume(bool(((share - threshold).abs() > 1e-4).all()))  # float32 may see the others on either side
        kept = torch.where(share >= threshold, inner, 0.0)
        # what the weight has no component for: the rows or the columns beyond its rank
        outside = delta - u[:, :k] @ inner @ vh[:k]
        wanted[name] = u[:, :k] @ kept @ vh[:k] + outside
    got = ethos(vector, weights, threshold)
    assert_is(got, wanted, tolerance=1e-3)
    assert kinds(got) == {Dense}


@pytest.mark.parametrize("kind", KINDS)
def test_ethos_at_threshold_0_is_the_vector_and_at_1_one_component(kind: str) -> None:
    vector, weights = random_vector(11, kind), base_weights(12)
    assert apart(ethos(vector, weights, 0.0), vector) < 1e-6
    square = "model.layers.2.mlp.fc2"
    one = ethos(vector, weights, 1.0).modules[square].delta()
    assert torch.linalg.matrix_rank(one, rtol=1e-4) == 1


def test_ethos_needs_every_weight_in_its_shape() -> None:
    vector, weights = random_vector(13), base_weights(14)
    with pytest.raises(VectorError, match=r"ethos: every module needs a weight .*fc1: None"):
        ethos(vector, {n: w for n, w in weights.items() if n != "model.layers.0.mlp.fc1"})
    with pytest.raises(VectorError, match=r"fc1: \(5, 10\) where the vector changes \(10, 5\)"):
        ethos(vector, {**weights, "model.layers.0.mlp.fc1": weights["model.layers.0.mlp.fc1"].T})
    with pytest.raises(VectorError, match="ethos: a weight holds values that are not finite"):
        ethos(vector, {**weights, "model.layers.0.mlp.fc1": torch.full((10, 5), math.nan)})


# -- perta -------------------------------------------------------------------------------------------------------


def importances(seed: int) -> dict[str, Tensor]:
    return {n: 1e-9 * w.square() for n, w in base_weights(seed).items()}


@quick
@given(seed=SEEDS, alpha=st.sampled_from([0.5, 1.0, 10.0]), kind=st.sampled_from(KINDS))
def test_perta_weighs_every_entry(seed: int, alpha: float, kind: str) -> None:
    vector, f, r = random_vector(seed, kind), importances(seed + 1), importances(seed + 2)
    got = perta(vector, f, r, alpha)
    wanted = {
        n: delta * f[n].double() / (f[n].double() + alpha * r[n].double() + 1e-20) for n, delta in dense(vector).items()
    }
    assert_is(got, wanted)
    assert kinds(got) == {Dense}


def test_perta_with_equal_importances_is_half_and_with_none_nothing() -> None:
    vector, f = random_vector(21), importances(22)
    assert apart(perta(vector, f, f), 0.5 * vector) < 1e-5
    first, second = SHARED[:2]
    nowhere = {**f, first: torch.zeros(SHAPES[first])}
    got = perta(vector, nowhere, {**f, first: torch.zeros(SHAPES[first]), second: torch.zeros(SHAPES[second])})
    assert got.modules[first].delta().abs().max() == 0.0  # 0 / (0 + 0 + eps)
    torch.testing.assert_close(got.modules[second].delta(), vector.modules[second].delta())


def test_perta_refuses_what_is_no_importance() -> None:
    vector, f = random_vector(23), importances(24)
    name = SHARED[1]
    with pytest.raises(VectorError, match=r"perta: every module needs a retain importance .*fc1: None"):
        perta(vector, f, {n: v for n, v in f.items() if n != name})
    with pytest.raises(VectorError, match="perta: nothing is left"):
        perta(vector, {n: 1e-30 * v for n, v in f.items()}, f)


# -- consensus ---------------------------------------------------------------------------------------------------


@quick
@given(seed=SEEDS, count=st.integers(1, 4), kind=st.sampled_from(KINDS))
def test_consensus_is_the_mean_where_signs_agree(seed: int, count: int, kind: str) -> None:
    shared = random_vector(seed, kind)  # without a common part three random vectors agree in a quarter of the entries
    vectors = [shared + 0.5 * random_vector(seed + 1 + i, kind) for i in range(count)]
    stacked = {n: torch.stack([v.modules[n].delta().double() for v in vectors]) for n in SHAPES}
    agree = {n: (s > 0).all(0) | (s < 0).all(0) for n, s in stacked.items()}
    got = consensus(vectors)
    assert_is(got, {n: torch.where(agree[n], s.mean(0), 0.0) for n, s in stacked.items()})
    assert kinds(got) == {Dense}
    if count == 1:
        assert apart(got, vectors[0]) < 1e-6
    else:
        assert any(not a.all() for a in agree.values())


def test_consensus_refuses_what_does_not_belong_together() -> None:
    vector = random_vector(31)
    with pytest.raises(VectorError, match=r"vectors 1 and 2 are not of the same modules: model\.layers\.3\.mlp\.fc2"):
        consensus([vector, random_vector(32, names=SHARED)])
    with pytest.raises(VectorError, match="consensus: vector 2 of 2 is zero"):
        consensus([vector, 0.0 * vector])
    with pytest.raises(VectorError, match="the 2 vectors agree in sign nowhere"):
        consensus([vector, -1.0 * vector])


# -- lines -------------------------------------------------------------------------------------------------------


def test_lines_scales_by_depth() -> None:
    vector = random_vector(41)
    deltas = dense(vector)
    got = lines(vector, 0.25, 0.75)
    scales = dict(zip(SHAPES, [0.25, 0.25, 0.25 + 0.75 * 2 / 3, 1.0], strict=True))
    assert_is(got, {n: scales[n] * d for n, d in deltas.items()})
    assert_is(lines(vector, 1.0, 0.0), deltas)
    # a model with more layers than the vector changes
    longer = dict(zip(SHAPES, [0.0, 0.0, 2 / 6, 3 / 6], strict=True))
    assert_is(lines(vector, 0.0, 1.0, layers=7), {n: longer[n] * d for n, d in deltas.items()})
    with pytest.raises(VectorError, match="lines: nothing is left"):
        lines(vector, 0.0, 0.0)


def test_lines_of_one_layer_and_of_modules_outside_the_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    change = draw((4, 4), "factors", generator)
    alone = TaskVector({"transformer.h.0.attn.c_attn": change})
    assert_is(lines(alone, 0.5, 9.0), {"transformer.h.0.attn.c_attn": 0.5 * change.delta().double()})
    headed = TaskVector({"transformer.h.0.attn.c_attn": change, "lm_head": change})
    with pytest.raises(VectorError, match="lines: no layer number in lm_head"):
        lines(headed, 1.0, 0.0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.self_attn.q_proj", 11),
        ("transformer.h.3.mlp.c_fc", 3),
        ("gpt_neox.layers.0.attention.dense", 0),
        ("model.layers.2.experts.5.w1", 2),
        ("layers.4", 4),
        ("lm_head", None),
        ("model.players.3.fc", None),
    ],
)
def test_the_layer_in_a_name(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


# -- random ------------------------------------------------------------------------------------------------------


@quick
@given(seed=SEEDS, kind=st.sampled_from(KINDS))
def test_random_vectors_have_the_same_norms_and_ranks(seed: int, kind: str) -> None:
    vector = random_vector(seed, kind)
    got = random_like(vector, seed)
    for name, norm in vector.norms().items():
        assert float(dense(got)[name].norm()) == pytest.approx(norm, rel=1e-5)
        assert got.modules[name].rank == vector.modules[name].rank
        assert torch.linalg.matrix_rank(dense(got)[name], rtol=1e-5) == vector.modules[name].rank
    assert kinds(got) == kinds(vector)
    assert random_like(vector, seed).digest() == got.digest()
    assert random_like(vector, seed + 1).digest() != got.digest()


def test_random_vectors_have_no_direction_of_the_vector_s() -> None:
    generator = torch.Generator().manual_seed(0)
    vector = TaskVector({"layers.0.w": draw((64, 64), "factors", generator)})
    cosines = [random_like(vector, seed).cosine(vector) for seed in range(20)]
    assert max(map(abs, cosines)) < 0.1
    assert min(cosines) < 0 < max(cosines)


# -- components and weights --------------------------------------------------------------------------------------


@quick
@given(seed=SEEDS, rank=st.integers(1, 12))
def test_components_are_the_singular_terms(seed: int, rank: int) -> None:
    vector = random_vector(seed, rank=rank)
    got = components(vector)
    assert_is(got, dense(vector))
    for name, m in got.modules.items():
        assert isinstance(m, LowRank)
        s = torch.linalg.svdvals(dense(vector)[name])
        assert m.rank == min(rank, *SHAPES[name])
        eye = torch.eye(m.rank)
        torch.testing.assert_close(m.A @ m.A.T, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(m.B.double().T @ m.B.double(), s[: m.rank].square().diag(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_scale_terms(kind: str) -> None:
    vector = components(random_vector(51, kind))
    sizes = {n: m.rank if isinstance(m, LowRank) else 1 for n, m in vector.modules.items()}
    generator = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(size, generator=generator) for n, size in sizes.items()}
    wanted = {}
    for name, delta in dense(vector).items():
        if kind == "dense":
            wanted[name] = delta * weights[name].double()
        else:
            u, s, vh = torch.linalg.svd(delta)
            terms = [float(w) * s[k] * torch.outer(u[:, k], vh[k]) for k, w in enumerate(weights[name])]
            wanted[name] = torch.stack(terms).sum(0)
    assert_is(weigh(vector, weights), wanted)
    assert_is(weigh(vector, {n: torch.ones(size) for n, size in sizes.items()}), dense(vector))
    assert_is(weigh(vector, {n: torch.tensor([3.0]) for n in SHAPES}), {n: 3.0 * d for n, d in dense(vector).items()})
    with pytest.raises(VectorError, match="learned: nothing is left"):
        weigh(vector, {n: torch.zeros(1) for n in SHAPES})


# -- what all of them refuse -------------------------------------------------------------------------------------

PAIRS: dict[str, Callable[[TaskVector, TaskVector], TaskVector]] = {"msa": msa, "project": project, "ext-sub": ext_sub}
SINGLES: dict[str, Callable[[TaskVector], TaskVector]] = {
    "ethos": lambda v: ethos(v, base_weights(0)),
    "perta": lambda v: perta(v, importances(0), importances(1)),
    "consensus": lambda v: consensus([v]),
    "lines": lambda v: lines(v, 1.0, 0.0),
    "random vector": lambda v: random_like(v, 0),
    "learned": components,
}


@pytest.mark.parametrize("method", PAIRS)
def test_pairs_must_belong_together(method: str) -> None:
    shape, forget = PAIRS[method], random_vector(61)
    with pytest.raises(VectorError, match=f"{method}: the forget and the retain vector share no module"):
        shape(random_vector(62, names=SHARED[:1]), random_vector(63, names=SHARED[1:]))
    with pytest.raises(VectorError, match=f"{method}: the retain vector is zero"):
        shape(forget, 0.0 * random_vector(64))
    with pytest.raises(VectorError, match=f"{method}: the forget vector is zero"):
        shape(0.0 * forget, random_vector(64))
    other = TaskVector({SHARED[0]: Dense(torch.ones(3, 3))})
    with pytest.raises(VectorError, match=rf"{method}: .* of different models: .*q_proj \(6, 9\) and \(3, 3\)"):
        shape(forget, other)


@pytest.mark.parametrize("method", SINGLES)
def test_a_zero_vector_has_no_shape(method: str) -> None:
    with pytest.raises(VectorError, match=f"{method}: .*is zero"):
        SINGLES[method](0.0 * random_vector(65))


@pytest.mark.parametrize("method", [*PAIRS, *SINGLES])
@pytest.mark.parametrize("kind", KINDS)
def test_the_vectors_given_are_left_alone(method: str, kind: str) -> None:
    forget, retain = random_vector(66, kind), random_vector(67, kind)
    before = forget.digest(), retain.digest()
    got = PAIRS[method](forget, retain) if method in PAIRS else SINGLES[method](forget)
    assert (forget.digest(), retain.digest()) == before
    assert dict(got.meta) == dict(forget.meta)


# -- the registry, and a recipe's list of methods ------------------------------------------------------------------


def test_every_method_has_its_entry_and_every_shaper_its_function() -> None:
    assert {name for name, method in METHODS.items() if method.role == "shaper"} == SHAPERS.keys()
    named = get_args(get_args(Name)[0])
    assert tuple(METHODS) == named
    for name, method in METHODS.items():
        if method.settings is not None:
            assert VectorSpec.model_fields[name].annotation == method.settings | None
    needy = VectorSpec.model_validate({"method": ("perta", "project")})
    assert needy.needs("rows")
    assert needy.needs("retain_vector")
    assert not VectorSpec.model_validate({"method": "lines"}).needs("rows", "retain", "retain_vector")


FORGET, RETAIN = random_vector(71), random_vector(72)
HAVE = Have(
    FORGET,
    RETAIN,
    9,
    lambda names: base_weights(1),
    lambda names, kind, samples: (importances(samples), importances(len(kind))),
    lambda vector, how: {n: torch.tensor([how.scale]) for n in vector.modules},
    lambda names, of="retain": (((n,), torch.ones(2 * [SHAPES[n][of != "gradients"]])) for n in names),
    lambda vector, samples: (torch.ones(samples, TERMS), torch.ones(TERMS)),
)
TERMS = 3 * len(SHAPES)
ALIKE = 0.5 / (1 + 3.0 * TERMS)  # where all slopes are 1, of S^T S / N one eigenvalue is K and the goal its eigenvector


def off(rows: Tensor, weight: float = 2.0) -> Tensor:
    """Shrunk by second moments that are all 1: their eigenvector is constant, of eigenvalue d, their mean 1."""
    d = rows.shape[1]
    return rows - rows.mean(1, True) * (1 - 1 / (1 + weight * d))


CASES: dict[str, tuple[dict[str, Any], Callable[[], TaskVector]]] = {
    "contrast": ({"mu": 0.5}, lambda: FORGET - 0.5 * RETAIN),
    "ext_sub": ({}, lambda: ext_sub(FORGET, RETAIN)),
    "project": ({"project": {"energy": 0.6}}, lambda: project(FORGET, RETAIN, 0.6)),
    "ethos": ({"ethos": {"threshold": 0.2}}, lambda: ethos(FORGET, base_weights(1), 0.2)),
    "perta": (
        {"perta": {"importance": "fisher", "alpha": 2.0, "samples": 3}},
        lambda: perta(FORGET, importances(3), importances(6), 2.0),
    ),
    "shrink": ({"shrink": {"rank": 1}}, lambda: FORGET.map(lambda n, m: Dense(m.delta() - m.delta().mean(1, True)))),
    "kfac": ({"kfac": {"mu": 4.0}}, lambda: FORGET.map(lambda n, m: Dense(off(off(m.delta()).T).T))),
    "slopes": ({"slopes": {"mu": 3.0, "forget": 0.5, "samples": 2}}, lambda: ALIKE * FORGET),
    "lines": ({"lines": {"a": 0.1, "b": 2.0}}, lambda: lines(FORGET, 0.1, 2.0, 9)),
    "learned": ({"learned": {"scale": 0.5}}, lambda: 0.5 * FORGET),
    "low_rank": ({"low_rank": {"rank": 1}}, lambda: FORGET.to_low_rank(rank=1)),
    "prune": ({"prune": {"keep": 0.5, "by": "magnitude"}}, lambda: FORGET.prune(0.5, "magnitude")),
    "rescale": ({}, lambda: FORGET),
}


def test_every_shaper_has_its_case() -> None:
    assert CASES.keys() == SHAPERS.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_its_method_with_the_recipe_s_settings(name: str) -> None:
    settings, expected = CASES[name]
    got = shape(FORGET, VectorSpec.model_validate({"method": name, **settings}), HAVE)
    assert apart(got, expected()) <= 1e-6
    if name != "rescale":
        assert apart(got, FORGET) > 1e-2


def test_steps_follow_each_other_and_rescale_gives_the_size_back() -> None:
    got = shape(FORGET, VectorSpec.model_validate({"method": ("ext_sub", "project", "rescale")}), HAVE)
    wanted = project(ext_sub(FORGET, RETAIN), RETAIN, 0.9)
    assert got.cosine(wanted) == pytest.approx(1.0, abs=1e-6)
    assert got.norm() == pytest.approx(FORGET.norm(), rel=1e-5)
    assert wanted.norm() < 0.9 * FORGET.norm()


def test_vectors_of_two_models_are_refused() -> None:
    here, elsewhere = TaskVector(FORGET.modules, {"base": "here"}), TaskVector(RETAIN.modules, {"base": "elsewhere"})
    spec = VectorSpec.model_validate({"method": "project"})
    with pytest.raises(VectorError, match="fitted on different models"):
        shape(here, spec, Have(here, elsewhere))
    with pytest.raises(VectorError, match="needs a vector fitted on the retain sets"):
        shape(here, spec, Have(here))


# -- a method from outside the package -----------------------------------------------------------------------------


class DampSpec(Frozen):
    """Settings of a method of somebody's own."""

    share: float = 0.5


@pytest.fixture
def damp() -> Iterator[None]:
    """A method that scales what the vector shares with the retain vector's modules."""

    @unlearn.register_method(
        "damp", words="scale every matrix by {0.share:%}", settings=DampSpec, needs=("retain", "retain_vector")
    )
    def damp(vector: TaskVector, have: Have, how: DampSpec) -> TaskVector:
        assert have.retain_vector.modules.keys() == vector.modules.keys()
        return how.share * vector

    yield
    del METHODS["damp"], SHAPERS["damp"]


@pytest.mark.usefixtures("damp")
def test_a_method_of_one_s_own_stands_in_a_recipe() -> None:
    spec = VectorSpec.model_validate({"method": ("damp", "lines"), "damp": {"share": 0.25}})
    assert spec.needs("retain_vector")
    assert phrases(spec)[0] == "damp: scale every matrix by 25 %"
    assert VectorSpec.model_validate(spec.model_dump()) == spec  # so it is in every stage's key
    assert spec != VectorSpec.model_validate({"method": ("damp", "lines"), "damp": {"share": 0.5}})
    assert spec.model_dump(mode="json")["damp"] == {"share": 0.25}
    assert apart(shape(FORGET, VectorSpec.model_validate({"method": "damp"}), HAVE), 0.5 * FORGET) < 1e-6
    with pytest.raises(ValueError, match=r"damp.share\n.*valid number"):
        VectorSpec.model_validate({"method": "damp", "damp": {"share": "much"}})
    with pytest.raises(ValueError, match=r"vector.damp holds settings of a method that vector.method does not name"):
        VectorSpec.model_validate({"damp": {"share": 0.5}})
    with pytest.raises(ValueError, match="cannot be a method's name"):
        unlearn.register_method("low_rank")
    with pytest.raises(ValueError, match="cannot be a method's name"):
        unlearn.register_method("lora")


@pytest.mark.parametrize(
    ("words", "settings", "told"),
    [
        ("half of {0.nothing}", DampSpec, "{0.nothing} is none of its settings; there are {0.share}"),
        ("half of {share}", DampSpec, "{share} is none of its settings"),
        ("half of {0.share:%}", None, "{0.share} is none of its settings; it has no settings"),
    ],
)
def test_words_that_no_setting_fills_are_told_at_once(words: str, settings: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"words of method 'damp': {told}")):
        unlearn.register_method("damp", words=words, settings=settings)


@pytest.mark.usefixtures("damp")
def test_a_method_that_is_written_anew_is_another_method() -> None:
    spec = VectorSpec.model_validate({"method": ("damp", "lines")})
    (before,) = spec.sources()
    assert "how.share * vector" in before
    unlearn.register_method("damp", needs="retain_vector")(lambda vector, have, how: 3.0 * vector)
    assert spec.sources() != [before], "a finished run must not be found again"
    assert spec.needs("retain_vector")
    assert not spec.needs("retain")
    assert apart(shape(FORGET, VectorSpec.model_validate({"method": "damp"}), HAVE), 3.0 * FORGET) < 1e-6
    unlearn.register_method("damp")(lambda vector, have, how: None)
    with pytest.raises(VectorError, match="damp: its function gave no TaskVector, but NoneType"):
        shape(FORGET, VectorSpec.model_validate({"method": "damp"}), HAVE)
    assert VectorSpec().sources() == []


@pytest.mark.usefixtures("damp")
def test_a_run_uses_a_method_of_one_s_own(smoke: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("vector.method=damp", "vector.damp.share=0.25", "sweep.coefficients=[1]", "export.adapter=false")
    settings += ("vector.forget.steps=2", f"reuse=['{smoke}']")
    assert unlearn.run("pico_smoke.yaml", set=settings, out=out) is not None
    fitted, edit = (TaskVector.load(out / "vectors" / n / "vector.safetensors") for n in ("forget", "edit"))
    assert apart(edit, 0.25 * fitted) < 1e-6
    assert "  damp:\n    share: 0.25\n" in (out / "resolved.yaml").read_text()
    unlearn.register_method("damp", settings=DampSpec)(lambda vector, have, how: 2.0 * vector)
    assert unlearn.run("pico_smoke.yaml", set=settings, out=out) is not None
    assert apart(TaskVector.load(out / "vectors" / "edit" / "vector.safetensors"), 2.0 * fitted) < 1e-6
