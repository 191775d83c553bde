"""One pass of a causal transformers model over packed trees, and what its head says at the places that count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from unlearn.processes import is_out_of_memory
from unlearn.score.attention import TIGHT, Attending, KeysValues, Layout, attending, lay_out
from unlearn.score.tree import Costs, Piece, pack

# (request, log-likelihood of a part of its answer, whether that part is greedy, tokens in that part)
Part = tuple[int, float, bool, int]

_HEAD_BYTES = 64 * 2**20  # logits held at a time
_ROOM = 2**30  # bytes of a pass without a GPU
_ATTENTION_SLOWER = 1.5  # an attention multiply-add against one of a linear layer, measured on CPUs


class NotPackableError(Exception):
    """This model's numbers cannot be had from packed rows; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """Bytes that a pass takes beside the model.

    Attributes:
        token: A token in the layer that takes most.
        key: What is before a row, per token of it: a copy of its keys and values in one layer.
        pair: A query that looks at a key.
        kept: A token's keys and values in all layers.
    """

    token: int
    key: int
    pair: int
    kept: int

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

    def hidden(self, layout: Attending) -> Tensor:
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
        kept: dict[nn.Module, KeysValues] = {}
        layout.keep = kept
        return kept, self.score(layout)

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
