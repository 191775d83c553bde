"""Task vectors against the dense matrices they stand for."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unlearn.errors import VectorError
from unlearn.methods.contrast import contrast
from unlearn.methods.negate import negate
from unlearn.vector import FORMAT, LowRank, TaskVector

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


def dense(vector: TaskVector, shapes: Shapes) -> dict[str, Tensor]:
    """Every module's change in float64, zero where the vector has none."""
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return zero | {name: m.B.double() @ m.A.double() for name, m in vector.modules.items()}


def assert_dense(vector: TaskVector, shapes: Shapes, wanted: dict[str, Tensor]) -> None:
    got = dense(vector, shapes)
    for name in shapes:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-5)


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Shapes, list[TaskVector]]:
    """One model's shapes and three vectors on it, each of its own ranks and its own modules."""
    side = st.integers(1, 9)
    shapes = {name: (draw(side), draw(side)) for name in NAMES}
    vectors = []
    for _ in range(3):
        chosen = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
        ranks = {name: draw(st.integers(1, 5)) for name in chosen}
        vectors.append(random_vector(shapes, ranks, draw(st.integers(0, 2**20))))
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
def test_dot_norm_and_cosine_are_those_of_the_dense_changes(space: tuple[Shapes, list[TaskVector]]) -> None:
    shapes, (a, b, _) = space
    x, y = dense(a, shapes), dense(b, shapes)
    for name, m in a.modules.items():
        assert a.norms()[name] == pytest.approx(float(x[name].norm()), rel=1e-7, abs=1e-7)
        if name in b.modules:
            wanted = float((x[name] * y[name]).sum())
            assert m.dot(b.modules[name]) == pytest.approx(wanted, rel=1e-7, abs=1e-7)
    flat_a = torch.cat([x[n].flatten() for n in shapes])
    flat_b = torch.cat([y[n].flatten() for n in shapes])
    assert a.norm() == pytest.approx(float(flat_a.norm()), rel=1e-7)
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
    assert negate(forget) is forget
    assert_dense(contrast(forget, retain, mu), shapes, {n: x[n] - mu * y[n] for n in shapes})


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
    ]
    assert len({a.digest(), *(v.digest() for v in others)}) == 6


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


def test_a_vector_of_nothing() -> None:
    with pytest.raises(VectorError, match="without a single module"):
        TaskVector({})


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


def test_vectors_of_different_models_name_every_clash() -> None:
    ranks = dict.fromkeys(NAMES, 1)
    a = random_vector({NAMES[0]: (4, 3), NAMES[1]: (5, 5), NAMES[2]: (2, 2)}, ranks, 0)
    b = random_vector({NAMES[0]: (3, 4), NAMES[1]: (5, 5), NAMES[2]: (2, 1)}, ranks, 1)
    for join in (lambda: a + b, lambda: a - b):
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
    written.save(path)
    read = TaskVector.load(path)
    assert dict(read.meta) == meta
    assert list(read.modules) == list(written.modules)
    for name, m in written.modules.items():
        for factor in "AB":
            one, other = getattr(m, factor), getattr(read.modules[name], factor)
            assert other.dtype == torch.float32
            assert torch.equal(one.contiguous().view(torch.int32), other.view(torch.int32))  # bits: -0.0 is not 0.0
    assert read.digest() == written.digest()


def test_factors_that_are_views_are_saved_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(48, dtype=torch.float32).reshape(6, 8)
    vector = TaskVector({"m": LowRank(base.T[:3], base[:, 5:])})  # neither is contiguous, both share memory
    vector.save(tmp_path / "v.safetensors")
    read = TaskVector.load(tmp_path / "v.safetensors").modules["m"]
    assert torch.equal(read.A, base.T[:3])
    assert torch.equal(read.B, base[:, 5:])


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


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"m.A": torch.ones(2, 3)}, "a factor is missing for m"),
        ({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2), "n.B": torch.ones(1, 1)}, "a factor is missing for n"),
        ({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 3)}, "do not chain"),
        ({"m.A": torch.ones(2, 3).half(), "m.B": torch.ones(4, 2).half()}, "float32"),
        ({"m.A": torch.full((2, 3), math.nan), "m.B": torch.ones(4, 2)}, "not finite"),
        ({}, "without a single module"),
    ],
)
def test_contents_that_are_no_vector(saved: Path, tensors: dict[str, Tensor], said: str) -> None:
    head = _head(saved)
    save_file(tensors, saved, head)
    _refused(saved, said)


@pytest.mark.parametrize("meta", ["{", "[1]", '"x"', json.dumps({"a": 1})])
def test_metadata_that_is_none(saved: Path, meta: str) -> None:
    head = _head(saved) | {"meta": meta}
    save_file({"m.A": torch.ones(2, 3), "m.B": torch.ones(4, 2)}, saved, head)
    _refused(saved, "metadata")
