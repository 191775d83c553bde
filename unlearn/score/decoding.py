"""Greedy text from many prompts at once, laid end to end as in scoring, with a slot of keys and values for each.

What all prompts begin with is computed once. A text that is finished gives its slot to the next prompt, so a batch is
not kept waiting by its longest text, and no step computes padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from unlearn.processes import is_out_of_memory
from unlearn.score.forward import Attention, Budget, Forward, KeysValues, States, attend, free, lay_out
from unlearn.score.tree import Piece

_STORE_BYTES = 2 * 2**30  # keys and values of all slots, without a GPU
_SHARED = 16  # a common beginning shorter than this is not worth a pass of its own


class Slots:
    """One step of many texts: each reads its own keys and values and adds those of its newest token.

    ``tokens`` and ``positions`` are (1, n); ``store`` has by layer (slots, key heads, longest, size) of each.
    """

    def __init__(self, count: int, longest: int, device: torch.device) -> None:
        self.count, self.longest = count, longest
        self.lengths = torch.zeros(count, dtype=torch.int64, device=device)
        self.store: dict[nn.Module, KeysValues] = {}
        self.tokens = torch.zeros(1, count, dtype=torch.int64, device=device)
        self.positions = self.tokens.clone()

    def fill(self, slot: int, layer: nn.Module, states: KeysValues) -> None:
        """Put a prompt's keys and values, (1, key heads, T, size) each, into a slot."""
        if layer not in self.store:
            keys, values = (s.new_zeros(self.count, s.shape[1], self.longest, s.shape[3]) for s in states)
            self.store[layer] = (keys, values)
        for kept, new in zip(self.store[layer], states, strict=True):
            kept[slot, :, : new.shape[2]] = new[0]

    def shrink(self, keep: Tensor) -> None:
        """Let go of all slots but these."""
        self.count = len(keep)
        for layer, (keys, values) in self.store.items():  # one after the other, so that there is no second store
            self.store[layer] = (keys[keep.to(keys.device)], values[keep.to(values.device)])
        self.lengths = self.lengths[keep]

    def step(self, tokens: Sequence[int]) -> None:
        """Make ready for one more token in every slot."""
        self.tokens = torch.tensor([tokens], device=self.lengths.device)
        self.positions = self.lengths[None].clone()
        self.width = int(self.lengths.max()) + 1
        place = torch.arange(self.width, device=self.lengths.device)
        self.age = self.lengths[:, None] - place[None]  # (slots, width): how far back each key is
        self.lengths = self.lengths + 1

    def attend(self, layer: nn.Module, states: States, how: Attention) -> Tensor:
        """Each text's newest token over all its own: (n, heads, size) from (1, heads, n, size) each."""
        query, key, value = states
        keys, values = self.store[layer]
        rows = torch.arange(self.count, device=keys.device)
        at = self.positions[0].to(keys.device)
        keys[rows, :, at] = key[0].transpose(0, 1)
        values[rows, :, at] = value[0].transpose(0, 1)
        seen = self.age >= 0 if how.window is None else (self.age >= 0) & (self.age < how.window)
        groups = query.shape[1] // key.shape[1]
        # heads that share a key head stand where queries do: (n, key heads, groups, size)
        q = query[0].transpose(0, 1).reshape(self.count, key.shape[1], groups, -1)
        out = attend(q, keys[:, :, : self.width], values[:, :, : self.width], seen[:, None, None], how)
        return out.flatten(1, 2)


def greedy(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    limit: int,
    done: Callable[[Sequence[int]], bool],
    slots: int,
    budget: Budget,
) -> Iterator[tuple[int, list[int]]]:
    """The most likely continuation of every prompt, one token at a time.

    Yields (index of the prompt, continuation) as they are finished.

    Args:
        prompts: Token ids, at least one each.
        limit: Most tokens of a continuation.
        done: Whether a continuation so far is the whole of it; asked after each token.
        slots: Most texts at a time; fewer where memory does not allow it.
        budget: Tokens of a prompt pass.
    """
    queue = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    while queue:
        finished: set[int] = set()
        try:
            for index, text in _decode(forward, prompts, queue, limit, done, slots, budget):
                finished.add(index)
                yield index, text
            return
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e) or slots == 1:
                raise
        torch.cuda.empty_cache()
        slots = max(1, slots // 2)
        queue = [i for i in queue if i not in finished]


def _decode(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    order: Sequence[int],
    limit: int,
    done: Callable[[Sequence[int]], bool],
    slots: int,
    budget: Budget,
) -> Iterator[tuple[int, list[int]]]:
    queue = list(order)
    trunk, states = _common_start(forward, [prompts[i] for i in queue])
    longest = len(prompts[queue[0]]) + limit
    batch = Slots(min(_affordable(forward, longest, slots), len(queue)), longest, forward.device)
    texts: list[tuple[int, list[int]] | None] = [None] * batch.count  # (prompt, continuation) in each slot
    while queue or any(texts):
        while queue and texts.count(None) >= max(1, batch.count // 8):
            free = [s for s, text in enumerate(texts) if text is None]
            part = [queue.pop(0)]
            size = _cost(budget, len(prompts[part[0]]) - trunk, trunk)
            while queue and len(part) < len(free):
                size += _cost(budget, len(prompts[queue[0]]) - trunk, trunk)
                if size > budget.tokens:
                    break
                part.append(queue.pop(0))
            firsts = _prefill(forward, [prompts[i] for i in part], trunk, states, batch, free)
            for index, slot, first in zip(part, free, firsts, strict=False):
                if limit <= 1 or done([first]):
                    yield index, [first]
                else:
                    texts[slot] = (index, [first])
        used = [s for s, text in enumerate(texts) if text is not None]
        if not used:
            continue
        if not queue and 2 * len(used) <= batch.count:
            batch.shrink(torch.tensor(used, device=forward.device))
            texts = [texts[s] for s in used]
        batch.step([text[1][-1] if text is not None else 0 for text in texts])
        best = forward.logits(forward.hidden(batch)).argmax(dim=-1).tolist()
        for slot, text in enumerate(texts):
            if text is not None:
                text[1].append(best[slot])
                if len(text[1]) < limit and not done(text[1]):
                    continue
                yield text
                texts[slot] = None
            batch.lengths[slot] = 0


def _common_start(forward: Forward, prompts: Sequence[Sequence[int]]) -> tuple[int, dict[nn.Module, KeysValues]]:
    """How many tokens all prompts begin with, and the keys and values of those."""
    low, high = min(prompts, key=list), max(prompts, key=list)
    shared = next((k for k, (x, y) in enumerate(zip(low, high, strict=False)) if x != y), min(len(low), len(high)))
    shared = min(shared, min(map(len, prompts)) - 1)
    if shared < _SHARED or len(prompts) == 1:
        return 0, {}
    layout = lay_out([_chain(low[:shared], 0)], forward.device)
    layout.keep = {}
    forward.hidden(layout)
    return shared, layout.keep


def _prefill(
    forward: Forward,
    prompts: Sequence[Sequence[int]],
    trunk: int,
    states: dict[nn.Module, KeysValues],
    batch: Slots,
    slots: Sequence[int],
) -> list[int]:
    """Read prompts into slots; the first token after each."""
    pieces = [_chain(p[trunk:], trunk) for p in prompts]
    layout = lay_out(pieces, forward.device, states)
    layout.keep = {}
    hidden = forward.hidden(layout)
    where = {id(piece): int(start) for piece, start in zip(layout.pieces, layout.starts, strict=True)}
    for slot, piece in zip(slots, pieces, strict=False):
        start, length = trunk + where[id(piece)], len(piece.tokens)
        for layer, (keys, values) in layout.keep.items():
            own = [torch.cat([t[:, :, :trunk], t[:, :, start : start + length]], dim=2) for t in (keys, values)]
            batch.fill(slot, layer, (own[0], own[1]))
        batch.lengths[slot] = trunk + length
    last = torch.tensor([where[id(piece)] + len(piece.tokens) - 1 for piece in pieces], device=hidden.device)
    found: list[int] = forward.logits(hidden[last]).argmax(dim=-1).tolist()
    return found


def _chain(tokens: Sequence[int], before: int) -> Piece:
    none = np.empty(0, dtype=np.int64)
    ids = np.asarray(tokens, dtype=np.int64)
    return Piece(ids, ((0, len(ids), -1),), None, before, False, none, none, none)


def _cost(budget: Budget, tokens: int, trunk: int) -> float:
    """Of a prompt behind a trunk, in tokens; its keys and values in all layers wait for their slot together.

    Two copies of the trunk's take some of the room: its own, and one in front of those of all prompts.
    """
    size = budget.sizes.of(tokens, trunk) + budget.sizes.kept * tokens
    return max(tokens, budget.share(size, 2 * budget.sizes.kept * trunk))


def _affordable(forward: Forward, longest: int, slots: int) -> int:
    """How many texts' keys and values there is room for."""
    room = free(forward.device) // 2 if forward.device.type == "cuda" else _STORE_BYTES
    return max(1, min(slots, room // (forward.sizes.kept * longest)))
