"""Truncation against the dense SVD, pruning against a dense reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unlearn.errors import VectorError
from unlearn.vector.change import Change, Dense, LowRank, largest_entries, largest_rows, truncated
from unlearn.vector.task_vector import TaskVector

quick = settings(deadline=None, max_examples=60)


def factors(out: int, fan_in: int, rank: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, fan_in, generator=generator), torch.randn(out, rank, generator=generator))


def exact(change: Change) -> Tensor:
    return change.B.double() @ change.A.double() if isinstance(change, LowRank) else change.values.double()


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Factors, also of more terms than the matrix has, or the dense change they make."""
    side = st.integers(1, 12)
    change = factors(draw(side), draw(side), draw(st.integers(1, 15)), draw(st.integers(0, 2**20)))
    return Dense(change.delta()) if draw(st.booleans()) else change


def tails(change: Change) -> np.ndarray[Any, Any]:
    """What each rank leaves over, by numpy's SVD of the dense change: sqrt of the sum of the squares from k on."""
    s = np.linalg.svd(exact(change).numpy(), compute_uv=False)
    return np.sqrt(np.cumsum(s[::-1] ** 2)[::-1])


@quick
@given(changes(), st.integers(1, 15))
def test_the_error_is_the_tail_of_the_singular_values(change: Change, rank: int) -> None:
    short = truncated(change, rank)
    assert short.shape == change.shape
    assert short.rank <= max(rank, 1)
    left = np.append(tails(change), [0.0] * 16)
    error = float((exact(change) - exact(short)).norm())
    assert error == pytest.approx(left[rank], rel=1e-4, abs=1e-5 * left[0])
    if isinstance(change, LowRank) and rank >= change.rank:
        assert short is change
    else:
        eye = torch.eye(short.rank)
        torch.testing.assert_close(short.A @ short.A.T, eye, atol=1e-5, rtol=0)


@quick
@given(changes(), st.floats(0.01, 1.0))
def test_the_energy_kept_is_reached_with_the_fewest_terms(change: Change, energy: float) -> None:
    short = truncated(change, energy=energy)
    left = np.append(tails(change), 0.0)
    wanted = energy * left[0] ** 2
    assert left[0] ** 2 - left[short.rank] ** 2 >= wanted * (1 - 1e-9)
    if short.rank > 1:
        assert left[0] ** 2 - left[short.rank - 1] ** 2 < wanted * (1 + 1e-9)
    error = float((exact(change) - exact(short)).norm())
    assert error <= math.sqrt(1 - energy) * left[0] * (1 + 1e-4) + 1e-5 * left[0]


def test_all_the_energy_is_the_change_itself_at_its_true_rank() -> None:
    change = factors(30, 20, 3, 0)
    doubled = LowRank(torch.cat([change.A, change.A]), torch.cat([change.B, change.B], dim=1))
    for whole in (doubled, Dense(doubled.delta())):
        short = truncated(whole, energy=1.0 if whole is doubled else 1 - 1e-12)
        assert short.rank == 3
        torch.testing.assert_close(short.delta(), 2 * change.delta(), atol=1e-4, rtol=1e-4)


def test_nothing_stays_nothing() -> None:
    for zero in (LowRank(torch.zeros(4, 6), torch.ones(5, 4)), Dense(torch.zeros(5, 6))):
        for short in (truncated(zero, 2), truncated(zero, energy=0.5), largest_rows(zero, 0.5)):
            assert torch.equal(short.delta(), torch.zeros(5, 6))
        assert truncated(zero, energy=1.0).rank == 1


@quick
@given(changes(), st.floats(0.001, 1.0))
def test_the_largest_entries(change: Change, keep: float) -> None:
    """Against a sort of the dense change."""
    delta = change.delta().numpy()
    kept = largest_entries(change, keep)
    assert isinstance(kept, Dense)
    count = max(1, round(keep * delta.size))
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")
    wanted = np.zeros(delta.size, dtype=np.float32)
    wanted[order[:count]] = delta.reshape(-1)[order[:count]]
    got = kept.values.numpy().reshape(-1)
    assert np.array_equal(np.sort(np.abs(got)), np.sort(np.abs(wanted)))  # of equal ones any may stay
    assert np.array_equal(got[got != 0], delta.reshape(-1)[got != 0])


@quick
@given(changes(), st.floats(0.001, 1.0))
def test_the_largest_rows(change: Change, keep: float) -> None:
    """Li et al., Corollary 2, against norms of the dense change's rows."""
    delta = exact(change)
    count = max(1, round(keep * len(delta)))
    where = torch.argsort(delta.norm(dim=1), descending=True)[:count]
    wanted = torch.zeros_like(delta)
    wanted[where] = delta[where]
    kept = largest_rows(change, keep)
    assert type(kept) is type(change)
    assert kept.rank == change.rank
    torch.testing.assert_close(exact(kept), wanted, atol=1e-5, rtol=1e-5)


def test_pruning_a_vector_takes_the_share_of_every_matrix() -> None:
    """A module with small entries keeps as large a share as one with large ones."""
    vector = TaskVector({"large": factors(8, 10, 2, 0).scaled(100.0), "small": Dense(torch.randn(8, 10))}, {"a": "1"})
    entries = vector.prune(0.25)
    rows = vector.prune(0.25, by="rows")
    for name in vector.modules:
        assert int(entries.modules[name].delta().count_nonzero()) == 20
        assert int(rows.modules[name].delta().any(dim=1).sum()) == 2
    assert isinstance(rows.modules["large"], LowRank)
    assert rows.modules["large"].rank == 2
    assert entries.norm() > rows.norm()
    assert dict(entries.meta) == dict(rows.meta) == {"a": "1"}
    assert vector.prune(1.0, by="rows").digest() == vector.digest()
    torch.testing.assert_close(vector.prune(1.0).modules["large"].delta(), vector.modules["large"].delta())


def test_truncating_a_vector() -> None:
    vector = TaskVector({"a": factors(8, 10, 4, 0), "b": Dense(torch.randn(5, 3)), "c": factors(6, 6, 1, 1)})
    short = vector.to_low_rank(rank=2)
    assert {n: m.rank for n, m in short.modules.items()} == {"a": 2, "b": 2, "c": 1}
    assert all(isinstance(m, LowRank) for m in short.modules.values())
    left = sum(tails(vector.modules[n])[2] ** 2 for n in "ab") ** 0.5
    assert (vector - short).norm() == pytest.approx(left, rel=1e-4)
    assert vector.to_low_rank(energy=0.9).norm() ** 2 >= 0.9 * vector.norm() ** 2 * (1 - 1e-6)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, -0.1, 1.0001, math.nan, math.inf])
def test_shares_that_are_none(share: float) -> None:
    vector = TaskVector({"a": factors(8, 10, 4, 0)})
    with pytest.raises(VectorError, match=f"keep must be above 0 and at most 1, not {share}"):
        vector.prune(share)
    with pytest.raises(VectorError, match="keep must be"):
        vector.prune(share, by="rows")
    with pytest.raises(VectorError, match="energy must be above 0 and at most 1"):
        vector.to_low_rank(energy=share)


def test_ranks_that_are_none() -> None:
    vector = TaskVector({"a": factors(8, 10, 4, 0), "b": factors(3, 9, 5, 0), "c": Dense(torch.ones(9, 2))})
    with pytest.raises(VectorError, match="rank must be at least 1, not 0"):
        vector.to_low_rank(rank=0)
    with pytest.raises(VectorError, match=r"rank 4 is above .*: b \(3, 9\), c \(9, 2\)") as caught:
        vector.to_low_rank(rank=4)
    assert "a (" not in str(caught.value)
    for both in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(VectorError, match="either rank or energy"):
            vector.to_low_rank(**both)  # type: ignore[arg-type]
    with pytest.raises(VectorError, match="magnitude or rows, not 'columns'"):
        vector.prune(0.5, by="columns")  # type: ignore[arg-type]
