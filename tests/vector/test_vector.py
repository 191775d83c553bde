"""Task vectors against the dense matrices they stand for."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unlearn.errors import VectorError
from unlearn.vector.change import Change, Dense, LowRank, total
from unlearn.vector.methods import Have, contrast
from unlearn.vector.task_vector import FORMAT, TaskVector, analogy

Shapes = dict[str, tuple[int, int]]
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.fc1", "model.layers.1.mlp.fc2")
# Dyadic scales keep every product of the dense reference in float32 as well.
SCALES = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])


quick = settings(deadline=None, max_examples=50)  # a shared machine has slow moments


def random_vector(shapes: Shapes, ranks: dict[str, int], seed: int, meta: dict[str, str] | None = None) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    return TaskVector(
        {
            name: LowRank(
                torch.randn(ranks[name], shapes[name][1], generator=generator),
                torch.randn(shapes[name][0], ranks[name], generator=generator),
            )
            for name in ranks
        },
        meta or {},
    )


def exact(change: Change) -> Tensor:
    """The change in float64, from what it is stored as."""
    return change.B.double() @ change.A.double() if isinstance(change, LowRank) else change.values.double()


def dense(vector: TaskVector, shapes: Shapes) -> dict[str, Tensor]:
    """Every module's change in float64, zero where the vector has none."""
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return zero | {name: exact(m) for name, m in vector.modules.items()}


def assert_dense(vector: TaskVector, shapes: Shapes, wanted: dict[str, Tensor]) -> None:
    got = dense(vector, shapes)
    for name in shapes:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5)


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Shapes, list[TaskVector]]:
    """One model's shapes and three vectors on it, each of its own ranks and its own modules, some of them dense."""
    side = st.integers(1, 9)
    shapes = {name: (draw(side), draw(side)) for name in NAMES}
    vectors = []
    for _ in range(3):
        chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        ranks = {name: draw(st.integers(1, 5)) for name in chosen}
        vector = random_vector(shapes, ranks, draw(st.integers(0, 2**20)))
        whole = draw(st.sets(st.sampled_from(NAMES)))
        vectors.append(vector.map(lambda name, m, whole=whole: Dense(m.delta()) if name in whole else m))
    return shapes, vectors


@quick
@given(spaces(), SCALES, SCALES)
def test_sums_and_scales_are_those_of_the_dense_changes(
    space: tuple[Shapes, list[TaskVector]], c: float, d: float
) -> None:
    shapes, (a, b, _) = space
    x, y = dense(a, shapes), dense(b, shapes)
    assert_dense(a + b, shapes, {n: x[n] + y[n] for n in shapes})
    assert_dense(a - b, shapes, {n: x[n] - y[n] for n in shapes})
    assert_dense(-a, shapes, {n: -x[n] for n in shapes})
    assert_dense(c * a + d * b, shapes, {n: c * x[n] + d * y[n] for n in shapes})
    assert_dense(c * (a + b), shapes, dense(c * a + c * b, shapes))
    assert_dense((c + d) * a, shapes, dense(c * a + d * a, shapes))
    assert_dense(a * c, shapes, dense(c * a, shapes))
    assert_dense(a / 4, shapes, {n: x[n] / 4 for n in shapes})


@quick
@given(spaces())
def test_a_vector_less_itself_is_zero(space: tuple[Shapes, list[TaskVector]]) -> None:
    shapes, (a, b, c) = space
    assert_dense(a - a, shapes, {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()})
    assert (a - a).norm() <= 1e-6 * max(a.norm(), 1.0)
    # order and brackets do not matter
    assert_dense((a + b) - c, shapes, dense(a + (b - c), shapes))
    assert_dense(a + b, shapes, dense(b + a, shapes))


@quick
@given(spaces())
def test_sums_of_many_and_analogies(space: tuple[Shapes, list[TaskVector]]) -> None:
    shapes, (a, b, c) = space
    x, y, z = (dense(v, shapes) for v in (a, b, c))
    wanted = {n: x[n] + y[n] + z[n] for n in shapes}
    assert_dense(sum([a, b, c]), shapes, wanted)
    assert_dense(TaskVector.sum(v for v in (a, b, c)), shapes, wanted)
    assert_dense(analogy(a, b, c), shapes, {n: z[n] + y[n] - x[n] for n in shapes})
    assert_dense(analogy(a, b, a), shapes, y)
    assert sum([a]).digest() == TaskVector.sum([a]).digest() == a.digest()


@quick
@given(spaces())
def test_the_rank_of_a_sum_is_at_most_the_sum_of_the_ranks(space: tuple[Shapes, list[TaskVector]]) -> None:
    shapes, (a, b, _) = space
    for name, m in (a + b).modules.items():
        parts = [v.modules[name] for v in (a, b) if name in v.modules]
        # factors add along r; one dense summand makes the sum dense, whose bound is the matrix's own
        if all(isinstance(part, LowRank) for part in parts):
            assert isinstance(m, LowRank)
            assert m.rank == sum(part.rank for part in parts)
        else:
            assert isinstance(m, Dense)
            assert m.rank == min(shapes[name])
        assert int(torch.linalg.matrix_rank(exact(m))) <= sum(part.rank for part in parts)


@quick
@given(spaces())
def test_dot_norm_and_cosine_are_those_of_the_dense_changes(space: tuple[Shapes, list[TaskVector]]) -> None:
    shapes, (a, b, _) = space
    x, y = dense(a, shapes), dense(b, shapes)
    for name, m in a.modules.items():
        assert a.norms()[name] == pytest.approx(float(x[name].norm()), rel=1e-7, abs=1e-7)
        if name in b.modules:
            wanted = float((x[name] * y[name]).sum())
            assert m.dot(b.modules[name]) == pytest.approx(wanted, rel=1e-7, abs=1e-7)
            scale = float(x[name].norm() * y[name].norm())
            assert a.cosines(b)[name] == pytest.approx(wanted / scale, abs=1e-7)
    assert set(a.cosines(b)) == set(a.modules) & set(b.modules)
    flat_a = torch.cat([x[n].flatten() for n in shapes])
    flat_b = torch.cat([y[n].flatten() for n in shapes])
    assert a.norm() == pytest.approx(float(flat_a.norm()), rel=1e-7)
    assert a.dot(b) == pytest.approx(float(flat_a @ flat_b), rel=1e-7, abs=1e-7)
    assert b.dot(a) == pytest.approx(a.dot(b), rel=1e-12, abs=1e-12)
    assert a.cosine(b) == pytest.approx(float(flat_a @ flat_b / (flat_a.norm() * flat_b.norm())), abs=1e-7)
    assert a.cosine(3.0 * a) == pytest.approx(1.0)
    assert a.cosine(-a) == pytest.approx(-1.0)


def test_cosine_with_nothing_is_zero() -> None:
    shapes = {NAMES[0]: (4, 3)}
    a = random_vector(shapes, {NAMES[0]: 2}, 0)
    assert a.cosine(0.0 * a) == 0.0
    assert a.cosine(random_vector({NAMES[1]: (4, 3)}, {NAMES[1]: 2}, 1)) == 0.0


@quick
@given(spaces(), st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_methods_shape_the_vector_as_their_formulas_say(space: tuple[Shapes, list[TaskVector]], mu: float) -> None:
    shapes, (forget, retain, _) = space
    x, y = dense(forget, shapes), dense(retain, shapes)
    assert_dense(contrast(forget, Have(forget, retain), mu), shapes, {n: x[n] - mu * y[n] for n in shapes})


def test_a_sum_keeps_its_rank_low() -> None:
    shapes = {NAMES[0]: (64, 48), NAMES[1]: (8, 8)}
    a, b = random_vector(shapes, {NAMES[0]: 3}, 0), random_vector(shapes, {NAMES[0]: 4, NAMES[1]: 2}, 1)
    both = a + b
    assert {n: m.rank for n, m in both.modules.items()} == {NAMES[0]: 7, NAMES[1]: 2}
    assert both.rank() == 7
    assert both.modules[NAMES[0]].shape == (64, 48)
    assert int(torch.linalg.matrix_rank(both.modules[NAMES[0]].delta())) == 7


def test_the_operands_stay_as_they_are() -> None:
    shapes = {NAMES[0]: (5, 4)}
    a, b = (random_vector(shapes, {NAMES[0]: 2}, seed, {"seed": str(seed)}) for seed in (0, 1))
    digests = a.digest(), b.digest()
    _ = a + b, a - b, 2.0 * a, -b
    assert (a.digest(), b.digest()) == digests
    with pytest.raises(TypeError):
        a.modules["new"] = a.modules[NAMES[0]]  # type: ignore[index]
    with pytest.raises(AttributeError):
        a.modules = {}  # type: ignore[misc]


def test_metadata_of_a_sum_is_the_first_ones_where_both_speak() -> None:
    shapes = {NAMES[0]: (5, 4)}
    a = random_vector(shapes, {NAMES[0]: 1}, 0, {"set": "forget", "base": "x"})
    b = random_vector(shapes, {NAMES[0]: 1}, 1, {"set": "retain", "seed": "3"})
    assert dict((a - b).meta) == {"set": "forget", "base": "x", "seed": "3"}
    assert dict((2.0 * a).meta) == {"set": "forget", "base": "x"}


def test_digest_is_of_the_values_alone() -> None:
    shapes = {NAMES[0]: (5, 4), NAMES[1]: (3, 3)}
    ranks = {NAMES[0]: 2, NAMES[1]: 1}
    a = random_vector(shapes, ranks, 0, {"a": "1"})
    assert a.digest() == random_vector(shapes, ranks, 0, {"b": "2"}).digest()
    reordered = TaskVector(dict(reversed(a.modules.items())), a.meta)
    assert list(reordered.modules) == sorted(NAMES[:2])
    assert reordered.digest() == a.digest()
    m = a.modules[NAMES[0]]
    nudged = m.A.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(math.inf))
    others = [
        random_vector(shapes, ranks, 1),
        TaskVector({**a.modules, NAMES[0]: LowRank(nudged, m.B)}),
        TaskVector({NAMES[0]: a.modules[NAMES[0]], NAMES[2]: a.modules[NAMES[1]]}),
        TaskVector({NAMES[0]: a.modules[NAMES[0]]}),
        2.0 * a,
        a.map(lambda _, m: Dense(m.delta())),
        a.map(lambda _, m: Dense(m.delta().reshape(m.shape[::-1]))),
    ]
    assert len({a.digest(), *(v.digest() for v in others)}) == 8


def test_the_digest_of_factors_is_the_one_they_always_had() -> None:
    """Runs of earlier versions are found again by it."""
    vector = TaskVector({"m": LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]]))})
    assert vector.digest() == "6b7614146e3e230e5d8e85d6e84e272b03706fc84da1281c727bb5c882e1e2b0"


def test_matrices_of_many_rows() -> None:
    """They are summed in pieces."""
    generator = torch.Generator().manual_seed(0)
    factors = LowRank(torch.randn(3, 5, generator=generator), torch.randn(2500, 3, generator=generator))
    whole = Dense(torch.randn(2500, 5, generator=generator))
    wanted = float((exact(factors) * exact(whole)).sum())
    assert factors.dot(whole) == pytest.approx(wanted, rel=1e-9)
    assert whole.dot(factors) == pytest.approx(wanted, rel=1e-9)
    assert whole.dot(whole) == pytest.approx(float(exact(whole).square().sum()), rel=1e-12)


class _Counted(torch.Tensor):
    """A tensor that remembers the largest result any operation on it had."""

    largest = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, Tensor):
            cls.largest = max(cls.largest, result.numel())
        return result


def test_factors_are_never_multiplied_out() -> None:
    """1000 x 900 of rank 3: nothing as large as the matrix is made by any operation that has no dense result."""
    _Counted.largest = 0
    generator = torch.Generator().manual_seed(0)

    def factors() -> LowRank:
        a, b = torch.randn(3, 900, generator=generator), torch.randn(1000, 3, generator=generator)
        return LowRank(a.as_subclass(_Counted), b.as_subclass(_Counted))

    one, two = TaskVector({"m": factors()}), TaskVector({"m": factors()})
    both = one - 0.5 * two
    both.norm(), both.cosine(one), both.cosines(two), both.dot(two)
    both.to_low_rank(rank=2), both.to_low_rank(energy=0.5), both.prune(0.5, by="rows")
    assert 0 < _Counted.largest < 1000 * 900 / 100
    both.modules["m"].delta()
    assert _Counted.largest == 1000 * 900


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (torch.ones(2, 3), torch.ones(4, 3), r"do not chain: A \(2, 3\), B \(4, 3\)"),
        (torch.ones(3), torch.ones(4, 3), "do not chain"),
        (torch.ones(2, 3), torch.ones(4, 2, 1), "do not chain"),
        (torch.ones(2, 3, dtype=torch.float64), torch.ones(4, 2), "must be float32, not torch.float64"),
        (torch.ones(2, 3), torch.ones(4, 2, dtype=torch.bfloat16), "and torch.bfloat16"),
    ],
)
def test_factors_that_are_no_change_of_a_weight(a: Tensor, b: Tensor, said: str) -> None:
    with pytest.raises(VectorError, match=said):
        LowRank(a, b)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (torch.ones(3), r"must be a matrix, not \(3,\)"),
        (torch.ones(2, 2, 2), "must be a matrix"),
        (torch.ones(2, 2, dtype=torch.float16), "must be float32, not torch.float16"),
    ],
)
def test_values_that_are_no_dense_change(values: Tensor, said: str) -> None:
    with pytest.raises(VectorError, match=said):
        Dense(values)


def test_changes_of_different_weights() -> None:
    factors, whole = LowRank(torch.ones(1, 3), torch.ones(4, 1)), Dense(torch.ones(3, 4))
    with pytest.raises(VectorError, match=r"\(4, 3\) and \(3, 4\)"):
        factors.dot(whole)
    with pytest.raises(VectorError, match=r"\(3, 4\) and \(4, 3\)"):
        total([whole, factors])
    with pytest.raises(VectorError, match=r"\(3, 4\) and \(1, 1\)"):
        whole.dot(Dense(torch.ones(1, 1)))


def test_a_change_on_its_own() -> None:
    factors, whole = LowRank(torch.ones(1, 3), torch.ones(4, 1)), Dense(torch.full((4, 3), 2.0))
    x = torch.arange(6.0).reshape(2, 3)
    for change in (factors, whole, total([factors, whole]), factors.scaled(-2), whole.scaled(-2)):
        torch.testing.assert_close(change.act(x), x @ change.delta().T)
        assert (change.shape, change.device.type) == ((4, 3), "cpu")
        assert torch.equal(change.to("cpu").delta(), change.delta())
    assert isinstance(total([factors, whole]), Dense)
    assert torch.equal(total([factors, whole]).delta(), torch.full((4, 3), 3.0))
    assert torch.equal(factors.scaled(-2).delta(), torch.full((4, 3), -2.0))


def test_a_vector_of_nothing() -> None:
    with pytest.raises(VectorError, match="without a single module"):
        TaskVector({})
    with pytest.raises(VectorError, match="a sum of no task vectors"):
        TaskVector.sum([])


@pytest.mark.parametrize(
    "mistake",
    [
        lambda v: v * v,
        lambda v: v * "2",
        lambda v: v + 1,
        lambda v: 1 + v,
        lambda v: v - 1,
        lambda v: 1 - v,
        lambda v: v / v,
        lambda v: 1 / v,
        lambda v: v * torch.ones(2),
        lambda v: sum([v], start=1),
    ],
)
def test_what_is_no_arithmetic_of_vectors(mistake: Callable[[TaskVector], object]) -> None:
    with pytest.raises(TypeError):
        mistake(random_vector({NAMES[0]: (4, 3)}, {NAMES[0]: 2}, 0))


def test_division_by_zero() -> None:
    with pytest.raises(VectorError, match="divided by 0"):
        _ = random_vector({NAMES[0]: (4, 3)}, {NAMES[0]: 2}, 0) / 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_values_that_are_not_finite(value: float, factor: str) -> None:
    good = random_vector(dict.fromkeys(NAMES, (4, 3)), dict.fromkeys(NAMES, 2), 0)
    bad = {"A": torch.ones(2, 3), "B": torch.ones(4, 2)}
    bad[factor][0, 1] = value
    with pytest.raises(VectorError, match="not finite in 1 modules") as caught:
        TaskVector({**good.modules, NAMES[1]: LowRank(**bad)})
    assert NAMES[1] in str(caught.value)
    assert NAMES[0] not in str(caught.value)
    with pytest.raises(VectorError, match="not finite in 3 modules"):
        value * good
    dense_bad = torch.ones(4, 3)
    dense_bad[1, 1] = value
    with pytest.raises(VectorError, match=f"not finite in 1 modules: {NAMES[2]}"):
        TaskVector({**good.modules, NAMES[2]: Dense(dense_bad)})


def test_a_product_of_finite_factors_that_is_not() -> None:
    """It shows where it is multiplied out, and not as a wrong number."""
    huge = TaskVector({"m": LowRank(torch.full((1, 2), 1e30), torch.full((2, 1), 1e30))})
    assert huge.norm() == pytest.approx(2e60)
    with pytest.raises(VectorError, match="not finite in 1 modules: m"):
        huge + TaskVector({"m": Dense(torch.ones(2, 2))})


def test_vectors_of_different_models_name_every_clash() -> None:
    ranks = dict.fromkeys(NAMES, 1)
    a = random_vector({NAMES[0]: (4, 3), NAMES[1]: (5, 5), NAMES[2]: (2, 2)}, ranks, 0)
    b = random_vector({NAMES[0]: (3, 4), NAMES[1]: (5, 5), NAMES[2]: (2, 1)}, ranks, 1)
    whole = b.map(lambda _, m: Dense(m.delta()))
    joins = (lambda: a + b, lambda: a - b, lambda: a.dot(b), lambda: a.cosine(whole), lambda: a.cosines(b))
    for join in (*joins, lambda: TaskVector.sum([a, a, whole]), lambda: analogy(a, whole, a)):
        with pytest.raises(VectorError, match="different models") as caught:
            join()
        assert f"{NAMES[0]} (4, 3) and (3, 4)" in str(caught.value)
        assert f"{NAMES[2]} (2, 2) and (2, 1)" in str(caught.value)
        assert NAMES[1] not in str(caught.value)


def test_a_long_list_of_clashes_is_cut() -> None:
    names = [f"m{i:02}" for i in range(11)]
    a = random_vector(dict.fromkeys(names, (2, 2)), dict.fromkeys(names, 1), 0)
    b = random_vector(dict.fromkeys(names, (2, 3)), dict.fromkeys(names, 1), 0)
    with pytest.raises(VectorError, match=r"m07 .* and 3 more") as caught:
        _ = a + b
    assert "m08" not in str(caught.value)


# --- files -----------------------------------------------------------------------------------------------------------


@quick
@given(spaces(), st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=4))
def test_save_and_load_are_the_identity(
    tmp_path_factory: pytest.TempPathFactory, space: tuple[Shapes, list[TaskVector]], meta: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("vector") / "v.safetensors"
    _, (a, b, _) = space
    written = TaskVector((a - 0.3 * b).modules, meta)
    assert {type(m) for m in written.modules.values()} <= {LowRank, Dense}
    written.save(path)
    read = TaskVector.load(path)
    assert dict(read.meta) == meta
    assert list(read.modules) == list(written.modules)
    for name, m in written.modules.items():
        there = read.modules[name].tensors()
        assert there.keys() == m.tensors().keys()
        for letter, one in m.tensors().items():
            other = there[letter]
            assert other.dtype == torch.float32
            assert torch.equal(one.contiguous().view(torch.int32), other.view(torch.int32))  # bits: -0.0 is not 0.0
    assert read.digest() == written.digest()


def test_factors_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    vector = TaskVector({"m": LowRank(base.T[:3], base[:, 5:])})  # neither is contiguous, both share memory
    vector.save(tmp_path / "v.safetensors")
    read = TaskVector.load(tmp_path / "v.safetensors").modules["m"]
    assert isinstance(read, LowRank)
    assert torch.equal(read.A, base.T[:3])
    assert torch.equal(read.B, base[:, 5:])
    parts = {f"m{i}": Dense(base[2 * i : 2 * i + 2]) for i in range(3)}  # contiguous, and of one memory
    TaskVector({**parts, "again": parts["m0"]}).save(tmp_path / "v.safetensors")
    again = TaskVector.load(tmp_path / "v.safetensors")
    assert torch.equal(torch.cat([again.modules[f"m{i}"].delta() for i in range(3)]), base)
    assert torch.equal(again.modules["again"].delta(), base[:2])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "v.safetensors"
    random_vector(dict.fromkeys(NAMES, (4, 3)), dict.fromkeys(NAMES, 2), 0, {"seed": "0"}).save(path)
    return path


def _head(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as f:
        return dict(f.metadata())


def _refused(path: Path, said: str) -> None:
    with pytest.raises(VectorError, match=said) as caught:
        TaskVector.load(path)
    assert str(path) in str(caught.value)  # which file, always


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    _refused(saved, "cannot be read as a task vector")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    _refused(tmp_path / "none.safetensors", "cannot be read as a task vector")
    _refused(tmp_path, "cannot be read as a task vector")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    path = tmp_path / "v.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    _refused(path, "cannot be read as a task vector")
    torch.save({"m.A": torch.ones(2, 2)}, path)
    _refused(path, "cannot be read as a task vector")
    assert not (tmp_path / "exploded").exists()


def test_safetensors_of_someone_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for head in (None, {"format": "pt"}, {"version": "1"}):
        save_file({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2)}, path, head)
        _refused(path, "not a task vector of this program")


def test_a_later_version(saved: Path) -> None:
    tensors = {"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2)}
    save_file(tensors, saved, {"format": FORMAT, "version": "3", "meta": "{}"})
    _refused(saved, "version 3, this program reads up to 2")


def test_an_earlier_version(saved: Path) -> None:
    a, b = torch.rand(2, 3), torch.rand(4, 2)
    save_file({"m.A": a, "m.B": b}, saved, {"format": FORMAT, "version": "1", "meta": '{"set": "forget"}'})
    read = TaskVector.load(saved)
    assert read.digest() == TaskVector({"m": LowRank(a, b)}).digest()
    assert dict(read.meta) == {"set": "forget"}
    save_file({"m.W": b}, saved, {"format": FORMAT, "version": "1", "meta": "{}"})
    _refused(saved, "no part of a vector: m.W")  # a damaged header: version 1 had no such thing


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"m.A": torch.ones(2, 3)}, "a factor is missing for m"),
        ({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2), "n.B": torch.ones(1, 1)}, "a factor is missing for n"),
        ({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 3)}, "do not chain"),
        ({"m.A": torch.ones(2, 3).half(), "m.B": torch.ones(4, 2).half()}, "float32"),
        ({"m.A": torch.full((2, 3), math.nan), "m.B": torch.ones(4, 2)}, "not finite"),
        ({}, "without a single module"),
        ({"m.W": torch.ones(4)}, "must be a matrix"),
        ({"m.W": torch.ones(4, 3).bfloat16()}, "float32"),
        ({"m.W": torch.full((4, 3), math.inf)}, "not finite"),
        ({"m.W": torch.ones(4, 3), "m.A": torch.ones(2, 3)}, "both factors and a dense change are there for m"),
        ({"m.W": torch.ones(4, 3), "m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2)}, "both factors and a dense"),
        ({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2), "m.C": torch.ones(1)}, "no part of a vector: m.C"),
        ({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2), "m.AB": torch.ones(1)}, "no part of a vector: m.AB"),
        ({"A": torch.ones(2, 3), "B": torch.ones(4, 2)}, "no part of a vector: A, B"),
        ({"m.": torch.ones(2, 3)}, "no part of a vector: m."),
    ],
)
def test_contents_that_are_no_vector(saved: Path, tensors: dict[str, Tensor], said: str) -> None:
    head = _head(saved)
    save_file(tensors, saved, head)
    _refused(saved, said)


@pytest.mark.parametrize("meta", ["{", "[1]", '"x"', json.dumps({"a": 1}), "[" * 100_000])
def test_metadata_that_is_none(saved: Path, meta: str) -> None:
    head = _head(saved) | {"meta": meta}
    save_file({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2)}, saved, head)
    _refused(saved, "metadata")
