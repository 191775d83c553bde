"""Packing into prefix trees against brute force: every path is there, sees its ancestors only, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from numpy.typing import NDArray

from unlearn import tree
from unlearn.models import Loaded
from unlearn.tree import LONGEST_ROW, Row, pack

Pair = tuple[list[int], list[int]]
quick = settings(deadline=None, max_examples=150)

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)  # three tokens: prefixes collide all the time
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12)
GAINS = st.sampled_from([0.0, 0.5, 2.0, 20.0, math.inf])


def model_input(pair: Pair, max_length: int) -> list[int]:
    """What lm-eval feeds the model for a request (lm_eval/models/huggingface.py, ``_loglikelihood_tokens``)."""
    return (pair[0] + pair[1])[-(max_length + 1) :][:-1]


def parents(row: Row) -> list[int]:
    """The parent of every node, from the segments alone."""
    got = [-2] * len(row.tokens)
    for start, end, parent in row.segments:
        got[start] = parent
        for node in range(start + 1, end):
            got[node] = node - 1
    return got


def ancestors(node: int, parent: list[int]) -> list[int]:
    """The path from the root to ``node``, both included."""
    path = []
    while node >= 0:
        path.append(node)
        node = parent[node]
    return path[::-1]


def check(pairs: list[Pair], max_length: int, rows: list[Row]) -> None:
    seen = sorted(index for row in rows for index, _ in row.requests)
    assert seen == list(range(len(pairs)))
    for row in rows:
        parent = parents(row)
        assert -2 not in parent  # every node is in a segment
        assert all(p < node for node, p in enumerate(parent))
        assert len(row.positions) == len(row.tokens)
        assert [len(ancestors(n, parent)) - 1 for n in range(len(row.tokens))] == row.positions
        assert len(row.scored_nodes) == len(row.scored_targets) == sum(count for _, count in row.requests)
        at = 0
        for index, count in row.requests:
            context, continuation = pairs[index]
            fed = model_input(pairs[index], max_length)
            nodes = row.scored_nodes[at : at + count].tolist()
            assert count == min(len(continuation), len(fed))
            assert row.scored_targets[at : at + count].tolist() == (context + continuation)[-count:]
            path = ancestors(nodes[-1], parent)
            assert [row.tokens[n] for n in path] == fed
            assert nodes == path[-count:]  # each scored token is predicted from the node before it
            at += count


@quick
@given(PAIRS, st.integers(8, 20), GAINS)
def test_every_request_is_exactly_one_path(pairs: list[Pair], max_length: int, gain: float) -> None:
    check(pairs, max_length, pack(pairs, max_length, gain))


@quick
@given(PAIRS, GAINS, st.integers(0, 5))
def test_a_node_sees_itself_and_its_ancestors(pairs: list[Pair], gain: float, padding: int) -> None:
    for row in pack(pairs, 16, gain):
        size = len(row.tokens)
        mask: NDArray[np.bool_] = np.zeros((size + padding, size + padding), dtype=bool)
        row.fill_mask(mask)
        wanted = np.eye(size + padding, dtype=bool)
        parent = parents(row)
        for node in range(size):
            wanted[node, ancestors(node, parent)] = True
        np.testing.assert_array_equal(mask, wanted)
        chain = np.array_equal(wanted[:size, :size], np.tri(size, dtype=bool))
        assert row.is_chain == chain


@quick
@given(PAIRS)
def test_merging_all_computes_every_prefix_once(pairs: list[Pair]) -> None:
    rows = pack(pairs, 32, math.inf)
    prefixes = {tuple(fed[: k + 1]) for fed in (model_input(p, 32) for p in pairs) for k in range(len(fed))}
    assert sum(len(row.tokens) for row in rows) == len(prefixes)
    assert len(rows) == len({fed[0] for fed in (model_input(p, 32) for p in pairs)})  # one tree per first token


@quick
@given(PAIRS)
def test_rows_never_cost_more_than_alone_when_tokens_are_free(pairs: list[Pair]) -> None:
    """With ``merge_gain`` 0 only attention counts: merging must not make it larger."""
    rows = pack(pairs, 32, 0.0)
    check(pairs, 32, rows)
    assert sum(len(row.tokens) ** 2 for row in rows) <= sum(len(model_input(p, 32)) ** 2 for p in pairs)


@quick
@given(PAIRS, st.sampled_from([0.5, 2.0, 20.0]))
def test_merging_never_costs_more_than_it_saves(pairs: list[Pair], gain: float) -> None:
    alone = [len(model_input(p, 32)) for p in pairs]
    rows = [len(row.tokens) for row in pack(pairs, 32, gain)]
    assert sum(n * gain + n * n for n in rows) <= sum(n * gain + n * n for n in alone) + 1e-6


def test_four_choices_share_their_question() -> None:
    question = [5, 6, 7, 8]
    pairs = [(question, [1]), (question, [2, 3]), (question, [2, 4, 9]), (question, [1])]
    (row,) = pack(pairs, 64, math.inf)
    assert row.tokens == [5, 6, 7, 8, 2, 4]  # the last token of an answer is never fed
    assert row.positions == [0, 1, 2, 3, 4, 5]
    assert row.is_chain
    check(pairs, 64, [row])
    (row,) = pack([*pairs, (question, [3, 3, 3])], 64, math.inf)
    assert not row.is_chain
    assert row.segments[-1][2] == 3  # hangs on the question's last token


def test_no_requests() -> None:
    assert pack([], 64, math.inf) == []


def test_without_gain_nothing_is_repeated_that_is_free() -> None:
    """Even at gain 0 a request that adds no node joins; one that branches early does not."""
    same = [([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2, 3], [4])]
    assert len(pack(same, 64, 0.0)) == 1
    early = [([1] + [2] * 20, [4]), ([1] + [3] * 20, [4])]
    assert len(pack(early, 64, 0.0)) == 2
    assert len(pack(early, 64, math.inf)) == 1


def test_rows_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LONGEST_ROW >= 1024
    monkeypatch.setattr(tree, "LONGEST_ROW", 32)
    shared = list(range(100, 110))
    pairs: list[Pair] = [(shared, [i, i, i]) for i in range(40)]
    rows = pack(pairs, 64, math.inf)
    check(pairs, 64, rows)
    assert len(rows) > 1
    assert max(len(row.tokens) for row in rows) <= 32
    assert min(len(row.tokens) for row in rows[:-1]) > 32 - 3  # and they are filled
    # one sequence longer than that is a row of its own, its duplicate costs nothing
    long: list[Pair] = [(list(range(60)), [7]), (list(range(60)), [8]), (list(range(5)), [7])]
    rows = pack(long, 64, math.inf)
    check(long, 64, rows)
    assert sorted(len(row.tokens) for row in rows) in ([5, 60], [60])


@quick
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), TOKENS), min_size=1, max_size=12))
def test_rows_stay_short_whatever_comes(pairs: list[Pair]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "LONGEST_ROW", 16)
        rows = pack(pairs, 40, math.inf)
    check(pairs, 40, rows)
    for row in rows:
        longest = max(len(model_input(pairs[index], 40)) for index, _ in row.requests)
        assert len(row.tokens) <= max(16, longest)


@pytest.mark.parametrize("length", [5, 11, 12, 13, 40])
def test_the_window_cuts_where_lm_eval_cuts(
    length: int, loaded: Callable[..., Loaded], pico_phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that lm-eval's own model is really fed, recorded from it."""
    got = loaded(pico_phi)
    lm = HFLM(pretrained=got.model, tokenizer=got.tokenizer, max_length=12, batch_size=1, backend="causal")
    fed = []
    plain = lm._model_call

    def record(inps: object, *args: object, **kwargs: object) -> object:
        fed.append(inps[0].tolist())  # type: ignore[index]
        return plain(inps, *args, **kwargs)

    monkeypatch.setattr(lm, "_model_call", record)
    pair = (list(range(20, 20 + length)), [3, 4, 5])
    lm._loglikelihood_tokens([(("", ""), *pair)], disable_tqdm=True)
    (row,) = pack([pair], 12, math.inf)
    assert [row.tokens] == fed
    assert row.targets == [3, 4, 5]
    assert row.nodes == list(range(len(row.tokens) - 3, len(row.tokens)))
