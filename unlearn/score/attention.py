"""Attention inside a batch of many trees laid end to end, as a function transformers' models can be told to use.

All tokens of a batch stand in one row, (1, N, d), so no linear layer ever sees padding. Only here, where tokens of a
tree look at each other, they are brought into (rows, longest, ...) blocks, and back. Keys and values of a trunk stay
with its layer and are put in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from unlearn.score.tree import Piece

NAME = "unlearn_tree"
TIGHT = 0.8  # rows at least this share of the longest one's length go into one block with it

KeysValues = tuple[Tensor, Tensor]  # (1, key heads, tokens, head size) each


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


@dataclass(eq=False)
class Layout:
    """A batch: pieces on the same trunk, laid end to end.

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

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(N, heads, size) from (1, heads, N, size): every token over its trunk and its ancestors."""
        before = self.trunk.get(layer)
        if self.keep is not None:
            self.keep[layer] = (key, value) if before is None else _joined(before, (key, value))
        parts = []
        for block in self.blocks:
            q, k, v = (_gather(t, block) for t in (query, key, value))
            if before is not None:
                k, v = _joined(
                    (before[0].expand(block.rows, -1, -1, -1), before[1].expand(block.rows, -1, -1, -1)), (k, v)
                )
            out = attend(q, k, v, block.allowed(window), scaling, softcap)  # (B, heads, L, size)
            flat = out.transpose(1, 2).reshape(block.rows * block.longest, out.shape[1], out.shape[3])
            parts.append(flat if block.valid is None else flat[block.valid.to(flat.device)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


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
    lengths = [len(p.tokens) for p in pieces]
    rows, longest, before = len(pieces), max(lengths), pieces[0].before
    even = min(lengths) == longest
    place = np.zeros((rows, longest), dtype=np.int64)
    query = np.zeros((rows, longest), dtype=np.int64)
    for b, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
        place[b] = np.minimum(np.arange(longest), length - 1)
        query[b] = piece.positions()[place[b]]
    at = np.cumsum([0, *lengths[:-1]])
    mask = None
    if before or not all(p.is_chain for p in pieces):
        seen = np.zeros((rows, 1, longest, before + longest), dtype=bool)
        seen[..., :before] = True
        for b, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
            own = seen[b, 0, :, before:]
            piece.fill_mask(own[:length, :length])
            own[length:, length:] = True  # padding looks at padding: a row that sees nothing would be NaN
        mask = torch.from_numpy(seen).to(device)
    key = np.concatenate([np.broadcast_to(np.arange(before), (rows, before)), query], axis=1)
    valid = None
    if not even:
        valid = torch.from_numpy(np.concatenate([b * longest + np.arange(n) for b, n in enumerate(lengths)])).to(device)
    return Block(
        rows,
        start,
        start + sum(lengths),
        longest,
        None if even else torch.from_numpy(start + at[:, None] + place).to(device),
        valid,
        mask,
        torch.from_numpy(query).to(device),
        torch.from_numpy(key).to(device),
    )


class Attending(Protocol):
    """A batch that says how its tokens look at each other."""

    tokens: Tensor
    positions: Tensor

    def attend(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """(N, heads, size) from (1, heads, N, size)."""


_LAYOUT: ContextVar[Attending] = ContextVar("layout")


@contextmanager
def attending(model: nn.Module, layout: Attending) -> Iterator[None]:
    """Inside, the model's attention is that of ``layout``; its own way of attending is put back after."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    token = _LAYOUT.set(layout)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _LAYOUT.reset(token)


def tree_attention(
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
    out = _LAYOUT.get().attend(module, query, key, value, scaling, sliding_window, softcap)
    return out[None], None


def _joined(first: KeysValues, then: KeysValues) -> KeysValues:
    return torch.cat([first[0], then[0]], dim=2), torch.cat([first[1], then[1]], dim=2)


def _gather(states: Tensor, block: Block) -> Tensor:
    """(1, heads, N, size) of the batch to (B, heads, L, size) of a block."""
    heads, size = states.shape[1], states.shape[3]
    if block.index is None:
        own = states[0, :, block.start : block.end]
    else:
        own = states[0].index_select(1, block.index.flatten().to(states.device))
    return own.reshape(heads, block.rows, block.longest, size).transpose(0, 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """softmax(q k / sqrt(size)) v over blocks; causal without a mask. Fewer key heads than query heads are fine."""
    rows, heads, length, size = query.shape
    groups = heads // key.shape[1]
    if mask is not None:
        mask = mask.to(query.device)
    elif softcap is not None:
        mask = torch.ones(1, 1, length, key.shape[2], dtype=torch.bool, device=query.device).tril()
    if groups > 1 and mask is not None and (softcap is not None or query.is_cuda):
        # CUDA's quick kernels take groups or a mask, not both. Heads that share a key head stand as further queries
        # of it: repeating keys and values, which may be those of a long trunk for every row, takes far more memory.
        folded = query.reshape(rows, key.shape[1], groups * length, size)
        return attend(folded, key, value, mask.repeat(1, 1, groups, 1), scaling, softcap).reshape(
            query.shape[:3] + value.shape[3:]
        )
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    assert mask is not None
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


AttentionInterface.register(NAME, tree_attention)
