"""One pass of a causal transformers model over packed trees, and what its head says at the places that count.

All tokens of a batch stand in one row, (1, N, d), so no linear layer ever sees padding. Only in attention, where tokens
of a tree look at each other, they are brought into (rows, longest, ...) blocks, and back. Keys and values of a trunk
stay with its layer and are put in front.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from unlearn.processes import is_out_of_memory
from unlearn.score.tree import Costs, Piece, pack

NAME = "unlearn_tree"
TIGHT = 0.8  # rows at least this share of the longest one's length go into one block with it
_HEAD_BYTES = 64 * 2**20  # logits held at a time
_ROOM = 2**30  # bytes of a pass without a GPU
_ATTENTION_SLOWER = 1.5  # an attention multiply-add against one of a linear layer, measured on CPUs

KeysValues = tuple[Tensor, Tensor]  # (1, key heads, tokens, head size) each
States = tuple[Tensor, Tensor, Tensor]  # queries, keys and values
# (request, log-likelihood of a part of its answer, whether that part is greedy, tokens in that part)
Part = tuple[int, float, bool, int]


class Attention(NamedTuple):
    """How a layer attends: what scores are multiplied by, the sliding window, the cap of scores; None: the usual."""

    scaling: float | None
    window: int | None
    softcap: float | None


# -- a batch of trees laid end to end, and attention within them


@dataclass(eq=False)
class Block:
    """Rows of like length, one attention call.

    Attributes:
        start, end: Their tokens in the flat batch.
        longest: L.
        index: (B, L) token of the flat batch; padding repeats a row's last token. None if all rows have length L.
        valid: (tokens,) place of each flat token in the (B * L) grid; None if there is no padding.
        mask: (B, 1, L, P + L), true where a query may look; None: every row is a plain sequence with nothing before.
        query, key: (B, L) and (B, P + L) positions, for sliding windows.
    """

    rows: int
    start: int
    end: int
    longest: int
    index: Tensor | None
    valid: Tensor | None
    mask: Tensor | None
    query: Tensor
    key: Tensor
    windows: dict[int, Tensor] = field(default_factory=dict)

    def allowed(self, window: int | None) -> Tensor | None:
        """The mask, narrowed to a sliding window where that is shorter than the rows."""
        if window is None or window >= self.key.shape[1]:
            return self.mask
        if window not in self.windows:
            near = (self.query[:, None, :, None] - self.key[:, None, None, :]) < window
            mask = self.mask
            if mask is None:
                mask = torch.ones(self.longest, self.longest, dtype=torch.bool, device=near.device).tril()
            self.windows[window] = near & mask
        return self.windows[window]

    def gather(self, states: Tensor) -> Tensor:
        """(1, heads, N, size) of the batch to (B, heads, L, size) of the block."""
        heads, size = states.shape[1], states.shape[3]
        if self.index is None:
            own = states[0, :, self.start : self.end]
        else:
            own = states[0].index_select(1, self.index.flatten().to(states.device))
        return own.reshape(heads, self.rows, self.longest, size).transpose(0, 1)


class Batch(Protocol):
    """A batch that says how its tokens look at each other: ``tokens`` and ``positions`` are (1, N)."""

    tokens: Tensor
    positions: Tensor

    def attend(self, layer: nn.Module, states: States, how: Attention) -> Tensor:
        """(N, heads, size) from queries, keys and values (1, heads, N, size)."""


@dataclass(eq=False)
class Layout:
    """A batch of pieces on the same trunk, laid end to end.

    Attributes:
        pieces: In the order of the flat batch, longest first.
        tokens, positions: (1, N) each.
        blocks: How attention cuts them up.
        starts: First flat token of each piece.
        trunk: Keys and values before every row, by layer.
        keep: Where this batch, a single trunk, leaves its own keys and values; None: they are not kept.
    """

    pieces: Sequence[Piece]
    tokens: Tensor
    positions: Tensor
    blocks: tuple[Block, ...]
    starts: NDArray[np.int64]
    trunk: dict[nn.Module, KeysValues]
    keep: dict[nn.Module, KeysValues] | None = None

    def attend(self, layer: nn.Module, states: States, how: Attention) -> Tensor:
        """Every token over its trunk and its ancestors."""
        query, key, value = states
        before = self.trunk.get(layer)
        if self.keep is not None:
            self.keep[layer] = (key, value) if before is None else _joined(before, (key, value))
        parts = []
        for block in self.blocks:
            q, k, v = (block.gather(t) for t in (query, key, value))
            if before is not None:
                first, then = (t.expand(block.rows, -1, -1, -1) for t in before)
                k, v = _joined((first, then), (k, v))
            out = attend(q, k, v, block.allowed(how.window), how)  # (B, heads, L, size)
            flat = out.transpose(1, 2).reshape(block.rows * block.longest, out.shape[1], out.shape[3])
            parts.append(flat if block.valid is None else flat[block.valid.to(flat.device)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined(first: KeysValues, then: KeysValues) -> KeysValues:
    return torch.cat([first[0], then[0]], dim=2), torch.cat([first[1], then[1]], dim=2)


def lay_out(pieces: Sequence[Piece], device: torch.device, trunk: dict[nn.Module, KeysValues] | None = None) -> Layout:
    """Bring pieces that hang on one trunk (or on none) into one batch."""
    pieces = sorted(pieces, key=lambda p: len(p.tokens), reverse=True)
    lengths = np.asarray([len(p.tokens) for p in pieces])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    blocks, first = [], 0
    for i in range(1, len(pieces) + 1):
        if i == len(pieces) or lengths[i] < TIGHT * lengths[first]:
            blocks.append(_block(pieces[first:i], int(starts[first]), device))
            first = i
    tokens = torch.from_numpy(np.concatenate([p.tokens for p in pieces])).to(device)
    positions = torch.from_numpy(np.concatenate([p.positions() for p in pieces])).to(device)
    return Layout(pieces, tokens[None], positions[None], tuple(blocks), starts, trunk or {})


def _block(pieces: Sequence[Piece], start: int, device: torch.device) -> Block:
    def there(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(device)

    lengths = [len(p.tokens) for p in pieces]
    rows, longest, before = len(pieces), max(lengths), pieces[0].before
    even = min(lengths) == longest
    place = np.minimum(np.arange(longest), np.asarray(lengths)[:, None] - 1)  # (rows, L)
    query = np.stack([piece.positions()[places] for piece, places in zip(pieces, place, strict=True)])
    mask = None
    if before or not all(p.is_chain for p in pieces):
        seen = np.zeros((rows, 1, longest, before + longest), dtype=bool)
        seen[..., :before] = True
        for b, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
            own = seen[b, 0, :, before:]
            piece.fill_mask(own[:length, :length])
            own[length:, length:] = True  # padding looks at padding: a row that sees nothing would be NaN
        mask = there(seen)
    key = np.concatenate([np.broadcast_to(np.arange(before), (rows, before)), query], axis=1)
    index = valid = None
    if not even:
        index = there(start + np.cumsum([0, *lengths[:-1]])[:, None] + place)
        valid = there(np.concatenate([b * longest + np.arange(n) for b, n in enumerate(lengths)]))
    return Block(rows, start, start + sum(lengths), longest, index, valid, mask, there(query), there(key))


_BATCH: ContextVar[Batch] = ContextVar("batch")


@contextmanager
def attending(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside, the model's attention is that of ``batch``; its own way of attending is put back after."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    token = _BATCH.set(batch)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _BATCH.reset(token)


def _tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: (1, N, heads, size), and no weights, from (1, heads, N, size) each."""
    for name in ("position_bias", "s_aux", "head_mask"):
        if unknown.get(name) is not None:
            raise ValueError(f"its attention takes {name}")
    return _BATCH.get().attend(module, (query, key, value), Attention(scaling, sliding_window, softcap))[None], None


AttentionInterface.register(NAME, _tree_attention)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, how: Attention) -> Tensor:
    """softmax(q k / sqrt(size)) v over blocks; causal without a mask. Fewer key heads than query heads are fine."""
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    if mask is not None:
        mask = mask.to(query.device)
    elif how.softcap is not None:
        mask = torch.ones(1, 1, length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if groups > 1 and mask is not None and (how.softcap is not None or query.is_cuda):
        # CUDA's quick kernels take groups or a mask, not both. Heads that share a key head stand as further queries
        # of it: repeating keys and values, which may be those of a long trunk for every row, takes far more memory.
        folded = query.reshape(rows, key.shape[1], groups * length, size)
        out = attend(folded, key, value, mask.repeat(1, 1, groups, 1), how)
        return out.reshape(query.shape[:3] + value.shape[3:])
    if how.softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=how.scaling, enable_gqa=groups > 1
        )
    assert mask is not None
    scores = query @ key.transpose(2, 3) * (how.scaling if how.scaling is not None else size**-0.5)
    scores = torch.tanh(scores / how.softcap) * how.softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


# -- a pass


class NotPackableError(Exception):
    """This model's numbers cannot be had from packed rows; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """Bytes that a pass takes beside the model."""

    token: int  # a token in the layer that takes most
    key: int  # what is before a row, per token of it: a copy of its keys and values in one layer
    pair: int  # a query that looks at a key
    kept: int  # a token's keys and values in all layers

    def of(self, tokens: int, before: int) -> float:
        """Of a row: each has a copy of the keys and values before it, and is filled up to its block's longest."""
        longest = tokens / TIGHT
        seen = longest + before
        return tokens * self.token + longest * seen * self.pair + (seen * self.key if before else 0)


def free(device: torch.device) -> int:
    """Bytes of a GPU that tensors can have: what torch holds in reserve is free as well."""
    spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + spare


class Forward:
    """A transformers causal LM (or a PEFT model around one), called by layouts instead of padded batches."""

    def __init__(self, model: Any) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.config = self.model.config.get_text_config()
        kinds = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise NotPackableError(f"it has layers of {', '.join(sorted(kinds))}")
        self.body: nn.Module = getattr(self.model, self.model.base_model_prefix, self.model)
        self.head = self.model.get_output_embeddings()
        if self.body is self.model or self.head is None:
            raise NotPackableError("its body and its head are not apart")
        self.dtype: torch.dtype = self.model.dtype
        self.device: torch.device = self.model.get_input_embeddings().weight.device
        # logits are scaled (Cohere, Granite) or capped (Gemma 2) after the head
        self.scale = float(getattr(self.config, "logit_scale", 1.0) or 1.0)
        self.scale /= float(getattr(self.config, "logits_scaling", 1.0) or 1.0)
        self.cap = getattr(self.config, "final_logit_softcapping", None)
        self.sizes = self._sizes()

    def costs(self) -> Costs:
        """What trees are cut by: multiply-adds of the body, and what another pass costs on this kind of device."""
        embedding = self.model.get_input_embeddings().weight.numel()
        linear = max(sum(p.numel() for p in self.body.parameters()) - embedding, 1)
        layers = getattr(self.config, "num_hidden_layers", 1)
        pair = 2 * self.config.hidden_size * layers
        # a pass is bound by reading the weights until it has about this many tokens
        return Costs(pair * _ATTENTION_SLOWER / linear, 512.0 if self.device.type == "cuda" else 24.0)

    def _sizes(self) -> Sizes:
        config, item = self.config, self.dtype.itemsize
        count = config.num_attention_heads
        groups = count // (getattr(config, "num_key_value_heads", None) or count)
        heads = count * (getattr(config, "head_dim", None) or config.hidden_size // count)
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        # what is alive at once in a layer: the stream and its norm, queries, keys and values twice, the inner states
        token = (4 * config.hidden_size + 8 * heads + 4 * inner) * item
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        # the mask, narrowed to a window, and twice as numbers to be added: for each head that shares keys, if repeated
        pair = (2 + 2 * item) * (groups if capped or self.device.type == "cuda" else 1)
        pair += count * (2 * item + 4) if capped else 0  # scores, capped, and their softmax in float32
        key = 2 * heads // groups * item
        return Sizes(token, key, pair, getattr(config, "num_hidden_layers", 1) * key)

    def room(self) -> int:
        """Bytes that a pass may take: a quarter of a GPU's free memory."""
        return free(self.device) // 4 if self.device.type == "cuda" else _ROOM

    def tokens(self) -> int:
        """Tokens for one pass: on a GPU those that there is room for, else what caches hold well."""
        if self.device.type != "cuda":
            return 1024
        return min(max(self.room() // self.sizes.token, 1024), 65536)

    def budget(self, tokens: int | None = None) -> Budget:
        """For passes of so many tokens, or as many as is good, as far as there is room."""
        return Budget(self.costs(), tokens or self.tokens(), self.sizes, self.room())

    def hidden(self, layout: Batch) -> Tensor:
        """Last hidden states (N, d) of a batch."""
        with attending(self.model, layout):
            out = self.body(input_ids=layout.tokens, position_ids=layout.positions, use_cache=False)
        states: Tensor = out.last_hidden_state
        return states[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, V) float32 of (n, d), scaled and capped as the model does it."""
        logits: Tensor = self.head(hidden).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def score(self, layout: Layout) -> list[Part]:
        """One pass; what every request that asks for something here gets."""
        hidden = self.hidden(layout)
        nodes = np.concatenate([p.nodes + start for p, start in zip(layout.pieces, layout.starts, strict=True)])
        if not len(nodes):
            return []
        targets = np.concatenate([p.targets for p in layout.pieces])
        requests = np.concatenate([p.requests for p in layout.pieces])
        values, greedy = self._at(hidden, nodes, targets)
        ids, place, counts = np.unique(requests, return_inverse=True, return_counts=True)
        totals = np.bincount(place, weights=values)
        misses = np.bincount(place, weights=~greedy) > 0
        return list(zip(ids.tolist(), totals.tolist(), (~misses).tolist(), counts.tolist(), strict=True))

    def _at(
        self, hidden: Tensor, nodes: NDArray[np.int64], targets: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of each of (M,) targets at its node in (N, d), and whether it is the argmax there."""
        chunk = max(1, _HEAD_BYTES // (4 * self.head.weight.shape[0]))
        order = np.argsort(nodes, kind="stable")
        wanted, inverse = np.unique(nodes[order], return_inverse=True)
        picked_ids = torch.from_numpy(targets[order]).to(hidden.device)
        values = torch.empty(len(nodes), dtype=torch.float64, device=hidden.device)
        greedy = torch.empty(len(nodes), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(wanted), chunk):
            low, high = np.searchsorted(inverse, (start, start + chunk))
            logits = self.logits(hidden[torch.from_numpy(wanted[start : start + chunk]).to(hidden.device)])  # (n, V)
            rows = torch.from_numpy(inverse[low:high] - start).to(logits.device)
            ids = picked_ids[low:high].to(logits.device)
            values[low:high] = (logits[rows, ids] - torch.logsumexp(logits, dim=-1)[rows]).double().to(hidden.device)
            greedy[low:high] = (logits.argmax(dim=-1)[rows] == ids).to(hidden.device)
        back = np.argsort(order, kind="stable")
        return values.cpu().numpy()[back], greedy.cpu().numpy()[back]

    def trunk(self, layout: Layout) -> tuple[dict[nn.Module, KeysValues], list[Part]]:
        """Run a trunk: its keys and values with those before it, by layer, and its own scores."""
        layout.keep = {}
        return layout.keep, self.score(layout)

    def probe(self, max_length: int) -> float:
        """Largest difference in log-likelihood between packed trees and a plain forward, on made-up tokens.

        The trees branch, hang on a trunk and share a batch, so that whatever mixes tokens out of order shows.
        """
        draw = np.random.default_rng(0).integers(0, self.head.weight.shape[0], size=45).tolist()
        start, more = draw[:12], draw[:15]
        pairs = [(more, draw[20:24]), (more, draw[24:30]), (start, draw[30:36]), (start + draw[36:40], draw[40:45])]
        costs = Costs(0.01, 2.0)  # by these: a trunk, one tree with two branches on it, and two plain rows
        found = [0.0] * len(pairs)
        with torch.inference_mode():
            plain = self._plain(pairs)
            for parts in run(self, pack(pairs, max_length, costs), Budget(costs, 1 << 20)):
                for index, value, *_ in parts:
                    found[index] += value
        off = [abs(x - y) for x, y in zip(plain, found, strict=True)]
        return max(d if math.isfinite(d) else math.inf for d in off)  # max() would drop a NaN

    def _plain(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Log-likelihood of continuations, the model's own way: one padded batch, in which nobody looks ahead."""
        longest = max(len(context) + len(continuation) for context, continuation in pairs)
        rows = [(context + continuation + [0] * longest)[:longest] for context, continuation in pairs]
        logits = self.model(input_ids=torch.tensor(rows, device=self.device), use_cache=False).logits.float()
        found = []
        for row, (context, continuation) in zip(functional.log_softmax(logits, -1), pairs, strict=True):
            places = range(len(context) - 1, len(context) + len(continuation) - 1)
            found.append(float(row[places, continuation].sum()))
        return found


@dataclass
class Budget:
    """Tokens (or what costs as much) per pass, and bytes; halved when memory runs out, and not raised again."""

    costs: Costs
    tokens: int
    sizes: Sizes = Sizes(0, 0, 0, 0)
    room: float = math.inf

    def cost(self, piece: Piece, held: int = 0) -> float:
        """Of a piece, in tokens; ``held`` bytes of the room are taken."""
        n = len(piece.tokens)
        return max(n * (1 + self.costs.pair * (n + piece.before)), self.share(self.sizes.of(n, piece.before), held))

    def share(self, size: float, held: int = 0) -> float:
        """The tokens that would be as large a share of all tokens as ``size`` bytes are of the room."""
        return size * self.tokens / max(self.room - held, 1.0)

    def halve(self, tokens: int, size: float) -> None:
        """So many tokens of that many bytes were too many: half of them must do."""
        self.tokens = max(1, min(self.tokens, tokens) // 2)
        self.room = min(self.room, size) / 2

    def batches(self, rows: Sequence[Piece], held: int = 0) -> Iterator[list[Piece]]:
        """Batches of like cost within the budget, which may shrink on the way; the longest rows first."""
        left = sorted(rows, key=lambda p: len(p.tokens), reverse=True)
        while left:
            upto = np.cumsum([self.cost(p, held) for p in left])
            share = upto[-1] / math.ceil(upto[-1] / self.tokens)
            n = max(1, int(np.searchsorted(upto, share * (1 + 1e-9), side="right")))
            yield left[:n]
            left = left[n:]


def run(forward: Forward, pieces: Sequence[Piece], budget: Budget) -> Iterator[list[Part]]:
    """Run all pieces, each trunk just before what hangs on it; yields the scores of each pass."""
    below: dict[int | None, list[int]] = {}
    for i, piece in enumerate(pieces):
        below.setdefault(piece.trunk, []).append(i)

    def under(trunk: int | None, states: dict[nn.Module, KeysValues], held: int) -> Iterator[list[Part]]:
        here = below.get(trunk, [])
        for batch in budget.batches([pieces[i] for i in here if not pieces[i].kept], held):
            yield from _within_memory(forward, batch, states, budget)
        for i in here:
            if pieces[i].kept:
                kept, parts = forward.trunk(lay_out([pieces[i]], forward.device, states))
                yield parts
                # with its own keys and values go copies of those before it
                yield from under(i, kept, held + budget.sizes.kept * (len(pieces[i].tokens) + pieces[i].before))

    yield from under(None, {}, 0)


def _within_memory(
    forward: Forward, batch: list[Piece], states: dict[nn.Module, KeysValues], budget: Budget
) -> Iterator[list[Part]]:
    todo = [batch]
    while todo:
        part = todo.pop()
        try:
            scores = forward.score(lay_out(part, forward.device, states))
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or len(part) == 1:
                raise
        else:
            yield scores
            continue
        # outside the handler: the exception holds on to the tensors of the failed pass
        torch.cuda.empty_cache()  # cuBLAS allocates past torch, which would keep what it was given
        tokens = [(len(p.tokens), p.before) for p in part]
        budget.halve(sum(n for n, _ in tokens), sum(budget.sizes.of(*t) for t in tokens))
        half = len(part) // 2
        todo += [part[half:], part[:half]]
