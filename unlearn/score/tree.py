"""Merge token sequences into a prefix tree and cut it into pieces. Plain integers and numpy; no model, no torch.

What many sequences begin with is computed once. A *trunk* is such a beginning on its own: its keys and values are kept
while everything that hangs on it runs. A *row* is a small tree, a question with its answers, that runs in one go under
a mask. What is short and shared by few is repeated. Which of the three costs least is decided node by node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

LONGEST_ROW = 2048  # a branching row needs a mask of row x row; beyond this it is cut, whatever the costs say

Scored = tuple[int, int, int]  # (first depth, one past the last, request)


@dataclass(frozen=True)
class Costs:
    """What the tree is cut by, in units of one token through the linear layers."""

    pair: float  # one query attending to one key, in all layers
    launch: float  # one more pass through the model, however few tokens it has: its weights must be read


@dataclass(frozen=True)
class Piece:
    """A part of the tree that runs through the model in one go, its nodes in depth-first order.

    Attributes:
        tokens: (T,) token ids.
        segments: ``(start, end, parent)``: nodes start..end-1 form a chain that hangs on node ``parent`` (-1: the end
            of the trunk, or nothing).
        trunk: Index of the piece before it, whose keys and values it needs.
        before: Tokens it sees in front of it: the trunk, and that one's own trunks. The first token's position.
        kept: It is a trunk itself.
        nodes, requests, targets: (S,) each: at this node, this request wants the log-probability of this token.
    """

    tokens: NDArray[np.int64]
    segments: tuple[tuple[int, int, int], ...]
    trunk: int | None
    before: int
    kept: bool
    nodes: NDArray[np.int64]
    requests: NDArray[np.int64]
    targets: NDArray[np.int64]

    @property
    def is_chain(self) -> bool:
        """True if it is one plain sequence."""
        return all(parent == start - 1 for start, _, parent in self.segments)

    def positions(self) -> NDArray[np.int64]:
        """(T,) place of each node in every sequence through it."""
        found = np.empty(len(self.tokens), dtype=np.int64)
        for start, end, parent in self.segments:
            first = self.before if parent < 0 else found[parent] + 1
            found[start:end] = np.arange(first, first + end - start)
        return found

    def fill_mask(self, mask: NDArray[np.bool_]) -> None:
        """Set ``mask[i, j]``, (T, T) of False, where node i may see node j: itself and its ancestors in the piece."""
        for start, end, parent in self.segments:
            if parent >= 0:
                mask[start:end, :start] = mask[parent, :start]
            mask[start:end, start:end] = np.tri(end - start, dtype=bool)


@dataclass(eq=False)
class _Node:
    """A chain of tokens from depth ``start`` on; ``way``, ``cost`` and ``heads`` are found by :func:`_weigh`."""

    tokens: list[int]
    start: int
    children: list[_Node] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    size: int = 0  # tokens of the whole subtree
    way: str = "row"
    cost: float = 0.0
    heads: int = 1  # how many pieces would have to repeat what stands before this node

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def pack(
    pairs: Sequence[tuple[list[int], list[int]]], max_length: int, costs: Costs, longest: int = LONGEST_ROW
) -> list[Piece]:
    """Pieces in which every (context, continuation) is a path, a trunk always before what hangs on it.

    Together they ask for every continuation token of every pair exactly once.

    Args:
        pairs: Context and continuation tokens, neither of them empty.
        max_length: The model's window; longer sequences lose tokens on the left, as in lm-eval.
        longest: Branching pieces have at most this many tokens, and never more than ``LONGEST_ROW``.
    """
    if not pairs:
        return []
    cut = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    root = _grow(cut, [min(len(c), len(whole) - 1) for (_, c), whole in zip(pairs, cut, strict=True)])
    _weigh(root, costs, min(longest, LONGEST_ROW))
    return _cut(root, cut)


def _grow(cut: Sequence[list[int]], scored: Sequence[int]) -> _Node:
    """The prefix tree of all sequences but their last tokens, which nothing comes after."""
    root = _Node([], 0)
    path = [root]
    before: list[int] = []
    for request in sorted(range(len(cut)), key=lambda i: cut[i][:-1]):
        sequence = cut[request][:-1]
        shared = _common(before, sequence)
        while path[-1] is not root and path[-1].start >= shared:
            path.pop()
        if path[-1].end > shared:
            _split(path[-1], shared)
        if len(sequence) > shared:
            child = _Node(sequence[shared:], shared)
            path[-1].children.append(child)
            path.append(child)
        first = len(sequence) - scored[request]
        for node in path:
            low, high = max(first, node.start), min(len(sequence), node.end)
            if low < high:
                node.scored.append((low, high, request))
        before = sequence
    return root


def _split(node: _Node, depth: int) -> None:
    """Cut a chain in two; what hung on it hangs on the lower part."""
    keep = depth - node.start
    above = [(low, min(high, depth), r) for low, high, r in node.scored if low < depth]
    below = [(max(low, depth), high, r) for low, high, r in node.scored if high > depth]
    lower = _Node(node.tokens[keep:], depth, node.children, below)
    node.tokens, node.children, node.scored = node.tokens[:keep], [lower], above


def _preorder(root: _Node) -> list[_Node]:
    found, todo = [], [root]
    while todo:
        node = todo.pop()
        found.append(node)
        todo.extend(reversed(node.children))
    return found


def _weigh(root: _Node, costs: Costs, longest: int) -> None:
    """Choose the cheapest way for every subtree, from the leaves up."""
    for node in reversed(_preorder(root)):
        own, depth = len(node.tokens), node.start
        node.size = own + sum(c.size for c in node.children)
        row = node.size * (1 + costs.pair * (node.size + depth))
        if not node.children:
            node.cost = row
            continue
        below, heads = sum(c.cost for c in node.children), sum(c.heads for c in node.children)
        once = own * (1 + costs.pair * (own + depth))
        ways = {"repeat": (below + heads * once, heads)}
        if own:
            ways["trunk"] = (once + costs.launch + below, 1)
        if own and node.size <= longest:
            ways["row"] = (row, 1)
        node.way = min(ways, key=lambda way: ways[way])
        node.cost, node.heads = ways[node.way]


def _cut(root: _Node, cut: Sequence[list[int]]) -> list[Piece]:
    """Pieces in the order of the tree."""
    pieces: list[Piece] = []
    # node, the chain that is repeated in front of it (without a place for scores: those are asked for once)
    todo: list[tuple[_Node, _Node, int | None]] = [(root, _Node([], 0), None)]
    while todo:
        node, repeated, trunk = todo.pop()
        head = _Node(repeated.tokens + node.tokens, repeated.start, node.children, repeated.scored + node.scored)
        if node.way == "repeat":
            bare = _Node(head.tokens, head.start)  # the first child asks for the scores, the others must not
            first = _Node(head.tokens, head.start, [], head.scored)
            below = [(c, first if i == 0 else bare, trunk) for i, c in enumerate(node.children)]
        else:
            whole = node.way == "row"
            pieces.append(_piece(_preorder(head) if whole else [head], head, trunk, cut, kept=not whole))
            below = [] if whole else [(c, _Node([], head.end), len(pieces) - 1) for c in node.children]
        todo.extend(reversed(below))
    return pieces


def _piece(nodes: Sequence[_Node], head: _Node, trunk: int | None, cut: Sequence[list[int]], kept: bool) -> Piece:
    """Lay nodes, in depth-first order, into one piece."""
    tokens: list[int] = []
    segments, asked = [], []
    last: dict[int, int] = {}  # id of a node: where its children hang
    parent = {id(child): id(node) for node in nodes for child in node.children}
    for node in nodes:
        start = len(tokens)
        tokens += node.tokens
        segments.append((start, len(tokens), -1 if node is head else last[parent[id(node)]]))
        last[id(node)] = len(tokens) - 1
        for low, high, request in node.scored:
            begin = start + low - node.start
            asked += [(begin + k, request, cut[request][low + k + 1]) for k in range(high - low)]
    sites, requests, targets = np.asarray(asked, dtype=np.int64).reshape(-1, 3).T
    ids = np.asarray(tokens, dtype=np.int64)
    return Piece(ids, tuple(segments), trunk, head.start, kept, sites, requests, targets)


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix, by halving: comparing slices is much faster than comparing tokens one by one."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
