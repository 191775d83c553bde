"""Packing into prefix trees against brute force: every path is there, sees its ancestors only, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from unlearn.model.load import Loaded
from unlearn.score import tree
from unlearn.score.tree import LONGEST_ROW, Costs, Piece, pack

Pair = tuple[list[int], list[int]]
quick = settings(deadline=None, max_examples=40)

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)  # three tokens: prefixes collide all the time
PAIRS = st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=12)
COSTS = st.builds(Costs, st.sampled_from([0.0, 0.05, 1.0]), st.sampled_from([0.0, 0.5, 3.0, math.inf]))
TREE = Costs(0.0, math.inf)  # attention is free, another pass is not: one tree


def model_input(pair: Pair, max_length: int) -> list[int]:
    """What lm-eval feeds the model for a request (lm_eval/models/huggingface.py, ``_loglikelihood_tokens``)."""
    return (pair[0] + pair[1])[-(max_length + 1) :][:-1]


def parents(piece: Piece) -> list[int]:
    """The parent of every node, from the segments alone."""
    got = [-2] * len(piece.tokens)
    for start, end, parent in piece.segments:
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


def front(pieces: list[Piece], piece: Piece) -> list[int]:
    """The tokens of all trunks before a piece."""
    found: list[int] = []
    while piece.trunk is not None:
        piece = pieces[piece.trunk]
        found = piece.tokens.tolist() + found
    return found


def seen_by(pieces: list[Piece], piece: Piece, node: int) -> list[int]:
    """All tokens that a node of a piece can see, itself the last."""
    return front(pieces, piece) + [int(piece.tokens[n]) for n in ancestors(node, parents(piece))]


def check(pairs: list[Pair], max_length: int, pieces: list[Piece]) -> None:
    asked: dict[tuple[int, int], int] = {}
    for place, piece in enumerate(pieces):
        parent = parents(piece)
        assert -2 not in parent  # every node is in a segment
        assert all(p < node for node, p in enumerate(parent))
        assert piece.trunk is None or (piece.trunk < place and pieces[piece.trunk].kept)
        assert piece.before == len(front(pieces, piece))
        assert piece.positions().tolist() == [piece.before + len(ancestors(n, parent)) - 1 for n in range(len(parent))]
        assert len(piece.nodes) == len(piece.requests) == len(piece.targets)
        assert not piece.kept or piece.is_chain
        for node, request, target in zip(piece.nodes, piece.requests, piece.targets, strict=True):
            fed = model_input(pairs[request], max_length)
            sees = seen_by(pieces, piece, int(node))
            assert sees == fed[: len(sees)]  # each scored token is predicted from the node before it
            assert (int(request), len(sees)) not in asked
            asked[int(request), len(sees)] = int(target)
    for i, pair in enumerate(pairs):
        fed = model_input(pair, max_length)
        count = min(len(pair[1]), len(fed))
        wanted = {(i, len(fed) - count + 1 + k): pair[1][-count:][k] for k in range(count)}
        assert {key: target for key, target in asked.items() if key[0] == i} == wanted


@quick
@given(PAIRS, st.integers(8, 20), COSTS)
def test_every_request_is_asked_for_exactly_once(pairs: list[Pair], max_length: int, costs: Costs) -> None:
    check(pairs, max_length, pack(pairs, max_length, costs))


@quick
@given(PAIRS, st.sampled_from([0.02, 0.3, 2.0]), st.sampled_from([0.0, 1.0, 10.0]))
def test_packing_never_costs_more_than_a_row_for_each(pairs: list[Pair], pair: float, launch: float) -> None:
    pieces = pack(pairs, 32, Costs(pair, launch))
    lengths = {tuple(model_input(p, 32)) for p in pairs}
    alone = sum(len(fed) * (1 + pair * len(fed)) for fed in lengths)
    spent = sum(len(p.tokens) * (1 + pair * (len(p.tokens) + p.before)) + launch * p.kept for p in pieces)
    assert spent <= alone + 1e-6


def test_examples_in_front_of_many_questions_become_a_trunk() -> None:
    """Costs like those of a real model: the beginning is computed once, each question stays a row of its own."""
    examples = list(range(1000, 1300))
    pairs = [(examples + [2000 + 50 * q + k for k in range(40)], [a, a]) for q in range(20) for a in range(4)]
    pieces = pack(pairs, 2048, Costs(5e-4, 24.0))
    check(pairs, 2048, pieces)
    trunk, *rows = pieces
    assert trunk.kept
    assert trunk.tokens.tolist() == examples
    assert len(rows) == 20
    assert {(row.trunk, row.before) for row in rows} == {(0, 300)}
    # a beginning of two tokens that two short questions share is not worth a pass of its own
    few = [([1, 2, 10 + q], [a, a]) for q in range(2) for a in range(4)]
    assert not any(piece.kept for piece in pack(few, 2048, Costs(5e-4, 24.0)))


def test_rows_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert LONGEST_ROW >= 1024
    monkeypatch.setattr(tree, "LONGEST_ROW", 32)
    shared = list(range(100, 110))
    pairs: list[Pair] = [(shared, [i, i, i]) for i in range(40)]
    pieces = pack(pairs, 64, TREE)
    check(pairs, 64, pieces)
    assert len(pieces) > 1
    assert max(len(p.tokens) for p in pieces) <= 32
    # one sequence longer than that is a row of its own, its duplicate costs nothing
    long: list[Pair] = [(list(range(60)), [7]), (list(range(60)), [8])]
    assert [len(p.tokens) for p in pack(long, 64, TREE)] == [60]


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
    (piece,) = pack([pair], 12, TREE)
    assert [piece.tokens.tolist()] == fed
    assert piece.targets.tolist() == [3, 4, 5]
    assert piece.nodes.tolist() == list(range(len(piece.tokens) - 3, len(piece.tokens)))
