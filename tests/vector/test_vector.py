"""Task vectors against the dense matrices they stand for; truncation and pruning against references of their own."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from vector_arena import exact, factors

from unlearn.errors import VectorError
from unlearn.vector.change import Change, Dense, LowRank, largest_entries, largest_rows, total, truncated
from unlearn.vector.methods import Have, contrast
from unlearn.vector.task_vector import FORMAT, TaskVector, analogy

Shapes = dict[str, tuple[int, int]]
Space = tuple[Shapes, list[TaskVector]]
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.fc1", "model.layers.1.mlp.fc2")
# Dyadic scales keep every product of the dense reference in float32 as well.
SCALES = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 1.0, 3.0])
A, B = torch.ones(2, 3), torch.ones(4, 2)

quick = settings(deadline=None, max_examples=50)  # a shared machine has slow moments


def random_vector(shapes: Shapes, ranks: dict[str, int], seed: int, meta: dict[str, str] | None = None) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    return TaskVector({n: factors(*shapes[n], rank, generator) for n, rank in ranks.items()}, meta or {})


def small(names: tuple[str, ...] = NAMES, shape: tuple[int, int] = (4, 3), seed: int = 0) -> TaskVector:
    return random_vector(dict.fromkeys(names, shape), dict.fromkeys(names, 2), seed, {"seed": "0"})


def dense(vector: TaskVector, shapes: Shapes) -> dict[str, Tensor]:
    """Every module's change in float64, zero where the vector has none."""
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return zero | {name: exact(m) for name, m in vector.modules.items()}


def assert_dense(vector: TaskVector, shapes: Shapes, wanted: dict[str, Tensor]) -> None:
    got = dense(vector, shapes)
    for name in shapes:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5)


@st.composite
def spaces(draw: st.DrawFn) -> Space:
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
@given(spaces(), SCALES, SCALES, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_arithmetic_is_that_of_the_dense_changes(space: Space, c: float, d: float, mu: float) -> None:
    shapes, (a, b, e) = space
    x, y, z = (dense(v, shapes) for v in (a, b, e))
    assert_dense(a + b, shapes, {n: x[n] + y[n] for n in shapes})
    assert_dense(a - b, shapes, {n: x[n] - y[n] for n in shapes})
    assert_dense(-a, shapes, {n: -x[n] for n in shapes})
    assert_dense(c * a + b * d, shapes, {n: c * x[n] + d * y[n] for n in shapes})
    assert_dense(a / 4, shapes, {n: x[n] / 4 for n in shapes})
    assert (a - a).norm() <= 1e-6 * max(a.norm(), 1.0)
    wanted = {n: x[n] + y[n] + z[n] for n in shapes}
    assert_dense(sum([a, b, e]), shapes, wanted)
    assert_dense(TaskVector.sum(v for v in (a, b, e)), shapes, wanted)
    assert_dense(analogy(a, b, e), shapes, {n: z[n] + y[n] - x[n] for n in shapes})
    assert sum([a]).digest() == TaskVector.sum([a]).digest() == a.digest()
    assert_dense(contrast(a, Have(a, b), mu), shapes, {n: x[n] - mu * y[n] for n in shapes})
    # factors add along r; one dense summand makes the sum dense, whose bound is the matrix's own
    for name, m in (a + b).modules.items():
        parts = [v.modules[name] for v in (a, b) if name in v.modules]
        low = all(isinstance(part, LowRank) for part in parts)
        assert isinstance(m, LowRank if low else Dense)
        assert m.rank == (sum(part.rank for part in parts) if low else min(shapes[name]))
        assert int(torch.linalg.matrix_rank(exact(m))) <= sum(part.rank for part in parts)


@quick
@given(spaces())
def test_dot_norm_and_cosine_are_those_of_the_dense_changes(space: Space) -> None:
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
    one, two = (torch.cat([v[n].flatten() for n in shapes]) for v in (x, y))
    assert a.norm() == pytest.approx(float(one.norm()), rel=1e-7)
    assert a.dot(b) == pytest.approx(float(one @ two), rel=1e-7, abs=1e-7)
    assert a.cosine(b) == pytest.approx(float(one @ two / (one.norm() * two.norm())), abs=1e-7)
    assert a.cosine(3.0 * a) == pytest.approx(1.0)
    assert a.cosine(-a) == pytest.approx(-1.0)
    assert a.cosine(0.0 * a) == 0.0


def test_metadata_of_a_sum_are_the_first_one_s() -> None:
    one, two = (TaskVector(small().modules, meta) for meta in ({"a": "1"}, {"a": "2", "b": "3"}))
    assert dict((one + two).meta) == {"a": "1", "b": "3"}
    assert dict((-two).meta) == dict(two.meta)


def test_the_digest_tells_values_names_and_shapes_apart() -> None:
    a = small(NAMES[:2])
    assert TaskVector(dict(reversed(a.modules.items())), {"other": "meta"}).digest() == a.digest()
    m = a.modules[NAMES[0]]
    nudged = m.A.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(math.inf))
    others = [
        small(NAMES[:2], seed=1),
        TaskVector({**a.modules, NAMES[0]: LowRank(nudged, m.B)}),
        TaskVector({NAMES[0]: m, NAMES[2]: a.modules[NAMES[1]]}),
        TaskVector({NAMES[0]: m}),
        2.0 * a,
        a.map(lambda _, m: Dense(m.delta())),
        a.map(lambda _, m: Dense(m.delta().reshape(m.shape[::-1]))),
    ]
    assert len({a.digest(), *(v.digest() for v in others)}) == 8
    # runs of earlier versions are found again by it
    vector = TaskVector({"m": LowRank(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0], [5.0]]))})
    assert vector.digest() == "6b7614146e3e230e5d8e85d6e84e272b03706fc84da1281c727bb5c882e1e2b0"


def test_matrices_of_many_rows() -> None:
    """They are summed in pieces."""
    generator = torch.Generator().manual_seed(0)
    low, whole = factors(2500, 5, 3, generator), Dense(torch.randn(2500, 5, generator=generator))
    wanted = float((exact(low) * exact(whole)).sum())
    assert low.dot(whole) == whole.dot(low) == pytest.approx(wanted, rel=1e-9)
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
    made = [factors(1000, 900, 3, torch.Generator().manual_seed(0)) for _ in range(2)]
    one, two = (TaskVector({"m": LowRank(m.A.as_subclass(_Counted), m.B.as_subclass(_Counted))}) for m in made)
    both = one - 0.5 * two
    both.norm(), both.cosine(one), both.cosines(two), both.dot(two)
    both.to_low_rank(rank=2), both.to_low_rank(energy=0.5), both.prune(0.5, by="rows")
    assert 0 < _Counted.largest < 1000 * 900 / 100
    both.modules["m"].delta()
    assert _Counted.largest == 1000 * 900


# --- truncated and pruned --------------------------------------------------------------------------------------------


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Factors, also of more terms than the matrix has, or the dense change they make."""
    side = st.integers(1, 12)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    change = factors(draw(side), draw(side), draw(st.integers(1, 15)), generator)
    return Dense(change.delta()) if draw(st.booleans()) else change


def tails(change: Change) -> np.ndarray[Any, Any]:
    """What each rank leaves over, by numpy's SVD of the dense change: sqrt of the sum of the squares from k on."""
    s = np.linalg.svd(exact(change).numpy(), compute_uv=False)
    return np.append(np.sqrt(np.cumsum(s[::-1] ** 2)[::-1]), [0.0] * 16)


@quick
@given(changes(), st.integers(1, 15))
def test_the_error_is_the_tail_of_the_singular_values(change: Change, rank: int) -> None:
    short = truncated(change, rank)
    assert short.shape == change.shape
    assert short.rank <= max(rank, 1)
    left = tails(change)
    error = float((exact(change) - exact(short)).norm())
    assert error == pytest.approx(left[rank], rel=1e-4, abs=1e-5 * left[0])
    if isinstance(change, LowRank) and rank >= change.rank:
        assert short is change
    else:
        torch.testing.assert_close(short.A @ short.A.T, torch.eye(short.rank), atol=1e-5, rtol=0)


@quick
@given(changes(), st.floats(0.01, 1.0))
def test_the_energy_kept_is_reached_with_the_fewest_terms(change: Change, energy: float) -> None:
    short = truncated(change, energy=energy)
    left = tails(change)
    wanted = energy * left[0] ** 2
    assert left[0] ** 2 - left[short.rank] ** 2 >= wanted * (1 - 1e-9)
    if short.rank > 1:
        assert left[0] ** 2 - left[short.rank - 1] ** 2 < wanted * (1 + 1e-9)
    error = float((exact(change) - exact(short)).norm())
    assert error <= math.sqrt(1 - energy) * left[0] * (1 + 1e-4) + 1e-5 * left[0]


def test_all_the_energy_is_the_change_itself_at_its_true_rank_and_nothing_stays_nothing() -> None:
    change = factors(30, 20, 3, torch.Generator().manual_seed(0))
    doubled = LowRank(torch.cat([change.A, change.A]), torch.cat([change.B, change.B], dim=1))
    for whole in (doubled, Dense(doubled.delta())):
        short = truncated(whole, energy=1.0 if whole is doubled else 1 - 1e-12)
        assert short.rank == 3
        torch.testing.assert_close(short.delta(), 2 * change.delta(), atol=1e-4, rtol=1e-4)
    for zero in (LowRank(torch.zeros(4, 6), torch.ones(5, 4)), Dense(torch.zeros(5, 6))):
        for made in (truncated(zero, 2), truncated(zero, energy=0.5), largest_rows(zero, 0.5)):
            assert torch.equal(made.delta(), torch.zeros(5, 6))
        assert truncated(zero, energy=1.0).rank == 1


@quick
@given(changes(), st.floats(0.001, 1.0))
def test_the_largest_entries_and_rows(change: Change, keep: float) -> None:
    """Entries against a sort of the dense change; rows (Li et al., Corollary 2) against norms of its rows."""
    delta = change.delta().numpy()
    kept = largest_entries(change, keep)
    assert isinstance(kept, Dense)
    count = max(1, round(keep * delta.size))
    wanted = np.zeros(delta.size, dtype=np.float32)
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")[:count]
    wanted[order] = delta.reshape(-1)[order]
    got = kept.values.numpy().reshape(-1)
    assert np.array_equal(np.sort(np.abs(got)), np.sort(np.abs(wanted)))  # of equal ones any may stay
    assert np.array_equal(got[got != 0], delta.reshape(-1)[got != 0])
    whole = exact(change)
    where = torch.argsort(whole.norm(dim=1), descending=True)[: max(1, round(keep * len(whole)))]
    rows = largest_rows(change, keep)
    assert (type(rows), rows.rank) == (type(change), change.rank)
    mask = torch.zeros(len(whole), 1, dtype=torch.float64).index_fill_(0, where, 1.0)
    torch.testing.assert_close(exact(rows), mask * whole, atol=1e-5, rtol=1e-5)


def test_shares_and_ranks_are_those_of_every_matrix() -> None:
    """A module with small entries keeps as large a share as one with large ones."""
    generator = torch.Generator().manual_seed(0)
    parts = {"large": factors(8, 10, 2, generator, 100.0), "small": Dense(torch.randn(8, 10))}
    vector = TaskVector({**parts, "one": factors(6, 6, 1, generator)}, {"a": "1"})
    entries, rows = vector.prune(0.25), vector.prune(0.25, by="rows")
    for name in parts:
        assert int(entries.modules[name].delta().count_nonzero()) == 20
        assert int(rows.modules[name].delta().any(dim=1).sum()) == 2
    assert rows.modules["large"].rank == 2
    assert dict(entries.meta) == dict(rows.meta) == {"a": "1"}
    assert vector.prune(1.0, by="rows").digest() == vector.digest()
    torch.testing.assert_close(vector.prune(1.0).modules["large"].delta(), vector.modules["large"].delta())
    short = vector.to_low_rank(rank=2)
    assert [m.rank for m in short.modules.values()] == [2, 1, 2]
    assert all(isinstance(m, LowRank) for m in short.modules.values())
    assert (vector - short).norm() == pytest.approx(tails(vector.modules["small"])[2], rel=1e-3)
    assert vector.to_low_rank(energy=0.9).norm() ** 2 >= 0.9 * vector.norm() ** 2 * (1 - 1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_shares_that_are_none(share: float) -> None:
    for by in ("magnitude", "rows"):
        with pytest.raises(VectorError, match=f"keep must be above 0 and at most 1, not {share}"):
            small().prune(share, by=by)  # type: ignore[arg-type]
    with pytest.raises(VectorError, match="energy must be above 0 and at most 1"):
        small().to_low_rank(energy=share)


def test_ranks_that_are_none() -> None:
    g = torch.Generator()
    vector = TaskVector({"a": factors(8, 10, 4, g), "b": factors(3, 9, 5, g), "c": Dense(torch.ones(9, 2))})
    for size, said in (
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"rank": 4}, r"rank 4 is above what these matrices can have: b \(3, 9\), c \(9, 2\)$"),
        ({}, "either rank or energy"),
        ({"rank": 1, "energy": 0.5}, "either rank or energy"),
    ):
        with pytest.raises(VectorError, match=said):
            vector.to_low_rank(**size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LowRank(A, torch.ones(4, 3)), r"do not chain: A \(2, 3\), B \(4, 3\)"),
        (lambda: LowRank(torch.ones(3), B), "do not chain"),
        (lambda: LowRank(A, torch.ones(4, 2, 1)), "do not chain"),
        (lambda: LowRank(A.double(), B), "must be float32, not torch.float64"),
        (lambda: LowRank(A, B.bfloat16()), "and torch.bfloat16"),
        (lambda: Dense(torch.ones(3)), r"must be a matrix, not \(3,\)"),
        (lambda: Dense(torch.ones(2, 2, 2)), "must be a matrix"),
        (lambda: Dense(A.half()), "must be float32, not torch.float16"),
        (lambda: LowRank(A, B).dot(Dense(A)), r"\(4, 3\) and \(2, 3\)"),
        (lambda: total([Dense(A), LowRank(A, B)]), r"\(2, 3\) and \(4, 3\)"),
        (lambda: Dense(A).dot(Dense(B)), r"\(2, 3\) and \(4, 2\)"),
        (lambda: TaskVector({}), "without a single module"),
        (lambda: TaskVector.sum([]), "without a single module"),
        (lambda: small() / 0.0, "divided by 0"),
    ],
)
def test_what_is_no_change_or_no_vector(make: Callable[[], object], said: str) -> None:
    with pytest.raises(VectorError, match=said):
        make()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda v: v * v,
        lambda v: v * "2",
        lambda v: v + 1,
        lambda v: 1 - v,
        lambda v: 1 / v,
        lambda v: v * torch.ones(2),
    ],
)
def test_what_is_no_arithmetic_of_vectors(mistake: Callable[[TaskVector], object]) -> None:
    with pytest.raises(TypeError):
        mistake(small())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite(value: float) -> None:
    good = small()
    for make in (lambda t: LowRank(t, torch.ones(4, 4)), lambda t: LowRank(torch.ones(3, 3), t), Dense):
        bad = torch.ones(4, 3)
        bad[0, 1] = value
        with pytest.raises(VectorError, match=f"not finite in 1 modules: {NAMES[1]}$"):
            TaskVector({**good.modules, NAMES[1]: make(bad)})
    with pytest.raises(VectorError, match="not finite in 3 modules"):
        value * good


def test_a_product_of_finite_factors_that_is_not() -> None:
    """It shows where it is multiplied out, and not as a wrong number."""
    huge = TaskVector({"m": LowRank(torch.full((1, 2), 1e30), torch.full((2, 1), 1e30))})
    assert huge.norm() == pytest.approx(2e60)
    with pytest.raises(VectorError, match="not finite in 1 modules: m"):
        huge + TaskVector({"m": Dense(torch.ones(2, 2))})


def test_vectors_of_different_models_name_the_clashes_up_to_a_few() -> None:
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
    names = tuple(f"m{i:02}" for i in range(11))
    with pytest.raises(VectorError, match=r"m04 \S* \S* and \S* \S* and 6 more$"):
        _ = small(names) + small(names, (2, 2))


# --- files -----------------------------------------------------------------------------------------------------------


@quick
@given(spaces(), st.dictionaries(st.text(max_size=12), st.text(max_size=12), max_size=4))
def test_save_and_load_are_the_identity(
    tmp_path_factory: pytest.TempPathFactory, space: Space, meta: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("vector") / "v.safetensors"
    _, (a, b, _) = space
    written = TaskVector((a - 0.3 * b).modules, meta)
    written.save(path)
    read = TaskVector.load(path)
    assert dict(read.meta) == meta
    assert list(read.modules) == list(written.modules)
    assert [type(m) for m in read.modules.values()] == [type(m) for m in written.modules.values()]
    assert read.digest() == written.digest()  # of all bits: -0.0 is not 0.0


def test_factors_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    parts = {f"m{i}": Dense(base[2 * i : 2 * i + 2]) for i in range(3)}  # contiguous, and of one memory
    # neither of these factors is contiguous, both share memory
    vector = TaskVector({**parts, "again": parts["m0"], "m": LowRank(base.T[:3], base[:, 5:8][:, :6])})
    vector.save(tmp_path / "v.safetensors")
    assert TaskVector.load(tmp_path / "v.safetensors").digest() == vector.digest()


def refused(path: Path, said: str) -> None:
    with pytest.raises(VectorError, match=said) as caught:
        TaskVector.load(path)
    assert str(path) in str(caught.value)  # which file, always


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small().save(tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def test_files_of_somebody_else_and_of_other_versions(saved: Path) -> None:
    for head, said in (
        (None, "not a task vector of this program"),
        ({"format": "pt"}, "not a task vector of this program"),
        ({"version": "1"}, "not a task vector of this program"),
        ({"format": FORMAT, "version": "3", "meta": "{}"}, "version 3, this program reads up to 2"),
    ):
        save_file({"m.A": A, "m.B": B}, saved, head)
        refused(saved, said)
    first = {"format": FORMAT, "version": "1", "meta": '{"set": "forget"}'}
    save_file({"m.A": A, "m.B": B}, saved, first)
    assert TaskVector.load(saved).digest() == TaskVector({"m": LowRank(A, B)}).digest()
    assert dict(TaskVector.load(saved).meta) == {"set": "forget"}
    save_file({"m.W": B}, saved, first)
    refused(saved, r"must hold A and B, and nothing else; .* m\.W$")  # a damaged header: version 1 had no such thing


OTHERWISE = r"must hold A and B, or W, and nothing else; it is otherwise for "


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"m.A": A}, f"{OTHERWISE}m.A"),
        ({"m.A": A, "m.B": B, "n.B": torch.ones(1, 1)}, f"{OTHERWISE}n.B"),
        ({"m.A": A, "m.B": torch.ones(4, 3)}, "do not chain"),
        ({"m.A": A.half(), "m.B": B.half()}, "float32"),
        ({"m.A": A * math.nan, "m.B": B}, "not finite"),
        ({}, "without a single module"),
        ({"m.W": torch.ones(4)}, "must be a matrix"),
        ({"m.W": B.bfloat16()}, "float32"),
        ({"m.W": B * math.inf}, "not finite"),
        ({"m.W": B, "m.A": A}, f"{OTHERWISE}m.A, m.W"),
        ({"m.W": B, "m.A": A.clone(), "m.B": B.clone()}, f"{OTHERWISE}m.A, m.B, m.W"),
        ({"m.A": A, "m.B": B, "m.C": torch.ones(1)}, f"{OTHERWISE}m.A, m.B, m.C"),
        ({"m.A": A, "m.B": B, "m.AB": torch.ones(1)}, f"{OTHERWISE}m.A, m.AB, m.B"),
        ({"A": A, "B": B}, f"{OTHERWISE}A, B"),
        ({"m.": A}, f"{OTHERWISE}m."),
    ],
)
def test_contents_that_are_no_vector(saved: Path, tensors: dict[str, Tensor], said: str) -> None:
    with safe_open(saved, framework="pt") as f:
        head = f.metadata()
    save_file(tensors, saved, head)
    refused(saved, said)
    for meta in ("{", "[1]", '"x"', '{"a": 1}', "[" * 100_000):
        save_file({"m.A": A, "m.B": B}, saved, {**head, "meta": meta})
        refused(saved, "metadata")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return (Path.touch, (tmp_path / "exploded",))

    path = tmp_path / "v.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    refused(path, "cannot be read as a task vector")
    torch.save({"m.A": A}, path)
    refused(path, "cannot be read as a task vector")
    assert not (tmp_path / "exploded").exists()
