"""Merge token sequences into rows of prefix trees. Plain integers and numpy; no model, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

LONGEST_ROW = 2048  # a dense mask costs row x row; past this even shared prefixes are cheaper to repeat


@dataclass
class Row:
    """One row of a batch: a forest written as its nodes in depth-first order.

    Attributes:
        tokens: (T,) token ids.
        positions: (T,) depth of each node, which is its position in every sequence through it.
        segments: ``(start, end, parent)``: nodes start..end-1 form a chain that hangs on node ``parent`` (-1: a root).
        requests: ``(request index, scored tokens)`` in the order of ``nodes``/``targets``.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    requests: list[tuple[int, int]] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    @property
    def is_chain(self) -> bool:
        """True if the row is one plain sequence."""
        return all(parent == start - 1 for start, _, parent in self.segments)

    @property
    def scored_nodes(self) -> NDArray[np.int64]:
        """Node whose logits predict each scored token."""
        return np.asarray(self.nodes, dtype=np.int64)

    @property
    def scored_targets(self) -> NDArray[np.int64]:
        """The scored tokens."""
        return np.asarray(self.targets, dtype=np.int64)

    def fill_mask(self, mask: NDArray[np.bool_]) -> None:
        """Set ``mask[i, j]`` where node i may see node j: itself and its ancestors. Padding sees itself.

        Args:
            mask: (W, W) of False with W >= T; filled in place.
        """
        np.fill_diagonal(mask, True)
        for start, end, parent in self.segments:
            if parent >= 0:
                mask[start:end, :start] = mask[parent, :start]
            mask[start:end, start:end] = np.tri(end - start, dtype=bool)


def pack(pairs: Sequence[tuple[list[int], list[int]]], max_length: int, merge_gain: float) -> list[Row]:
    """Rows in which every (context, continuation) is a path.

    Requests are sorted by their tokens, so those with a common prefix are neighbours; each then adds only what the
    path before it does not have. A request joins the row when that saves more than it costs: the shared tokens
    against the larger dense attention of a longer row.

    Args:
        pairs: Context and continuation tokens; contexts and continuations are not empty.
        max_length: The model's window; longer sequences lose tokens on the left, as in lm-eval.
        merge_gain: Cost of one token relative to one attended pair (infinity: always merge what shares a prefix).

    Returns:
        Rows covering every pair exactly once.
    """
    cut = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda i: cut[i][:-1])
    rows: list[Row] = []
    row = Row()
    path: list[int] = []  # path[k]: node at depth k of the sequence before
    before: list[int] = []
    for i in order:
        sequence = cut[i][:-1]
        shared = _common(before, sequence)
        fresh = len(sequence) - shared
        size = len(row.tokens)
        more_pairs = (size + fresh) ** 2 - size**2 - len(sequence) ** 2  # attended, against a row of its own
        affordable = size + fresh <= LONGEST_ROW and shared * merge_gain >= more_pairs
        joins = shared > 0 and (fresh == 0 or affordable)
        if not joins:
            row, path, shared = Row(), [], 0
            rows.append(row)
        _add(row, path, sequence, shared)
        scored = min(len(pairs[i][1]), len(sequence))
        row.requests.append((i, scored))
        row.nodes.extend(path[len(sequence) - scored :])
        row.targets.extend(cut[i][-scored:])
        before = sequence
    return rows


def _add(row: Row, path: list[int], sequence: list[int], shared: int) -> None:
    """Hang the tokens after ``shared`` on the path, and make ``path`` the nodes of this sequence."""
    del path[shared:]
    if shared == len(sequence):
        return
    start = len(row.tokens)
    row.segments.append((start, start + len(sequence) - shared, path[-1] if path else -1))
    row.tokens.extend(sequence[shared:])
    row.positions.extend(range(shared, len(sequence)))
    path.extend(range(start, len(row.tokens)))


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
