"""What requests cannot be answered without, what an engine really ran, and how fast this machine multiplies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unlearn.model.load import linear_modules

GEMM_ROWS = (512, 1024, 2048)
GEMM_REPEATS = 5


@dataclass(frozen=True, slots=True)
class Work:
    """What a set of requests asks for, in tokens.

    Attributes:
        asked: tokens read by a model that takes every request by itself.
        distinct: tokens of the prefix tree of all requests: fewer cannot be run.
        scored: nodes of that tree at which the LM head is needed.
    """

    asked: int
    distinct: int
    scored: int


def count_work(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], window: int) -> Work:
    """Count (context, continuation) pairs, cut to the model's window from the left as lm-eval cuts them."""
    cut = [(list(c) + list(t))[-(window + 1) :] for c, t in pairs]
    asked = sum(len(tokens) - 1 for tokens in cut)
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node; the root is 0
    scored: set[int] = set()
    for tokens, (_, continuation) in zip(cut, pairs, strict=True):
        node, first = 0, len(tokens) - 1 - len(continuation)
        for place, token in enumerate(tokens[:-1]):
            node = nodes.setdefault((node, token), len(nodes) + 1)
            if place >= first:
                scored.add(node)
    return Work(asked, len(nodes), len(scored))


@dataclass
class Ran:
    """Tokens that went through a model's embedding, padding included; 0 if it was passed by."""

    tokens: int = 0
    calls: int = 0


@contextmanager
def tokens_run(model: nn.Module) -> Iterator[Ran]:
    """Count what an engine really computes, whatever it is."""
    ran = Ran()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input"]
        ran.tokens += ids.numel()
        ran.calls += 1

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield ran
    finally:
        handle.remove()


# -- the machine's limit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gemm:
    """How fast this machine multiplies at a model's shapes.

    Attributes:
        rates: (in, out) -> floating-point operations per second, the best over row counts.
        counts: (in, out) -> linear layers of that shape in the model's body.
        head: multiply-adds per scored position of the LM head.
    """

    rates: dict[tuple[int, int], float] = field(default_factory=dict)
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    head: int = 0

    @property
    def body(self) -> int:
        """Multiply-adds per token of the body's linear layers."""
        return sum(i * o * n for (i, o), n in self.counts.items())

    @property
    def peak(self) -> float:
        """FLOP/s of one pass through all linear layers, each at the best rate seen for its shape."""
        seconds = sum(2 * i * o * n / self.rates[i, o] for (i, o), n in self.counts.items())
        return 2 * self.body / seconds

    def useful(self, work: Work) -> float:
        """FLOPs that ``work`` cannot be answered without: body at distinct tokens, head at scored positions."""
        return 2.0 * (self.body * work.distinct + self.head * work.scored)

    def best(self, other: Gemm) -> Gemm:
        """The better of two measurements, shape by shape."""
        return Gemm({s: max(r, other.rates[s]) for s, r in self.rates.items()}, self.counts, self.head)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        shapes = [
            {"in": i, "out": o, "layers": self.counts[i, o], "gflops": rate / 1e9}
            for (i, o), rate in self.rates.items()
        ]
        return {"peak_gflops": self.peak / 1e9, "shapes": shapes}


def measure_gemm(model: Any, device: torch.device) -> Gemm:
    """Time the products of every linear layer's shape in the model's dtype: rows x in by in x out, both layouts."""
    counts: Counter[tuple[int, int]] = Counter()
    for module in linear_modules(model).values():
        weight: Any = module.weight
        first, second = weight.shape
        counts[(first, second) if isinstance(module, Conv1D) else (second, first)] += 1
    rates = {shape: _rate(*shape, model.dtype, device) for shape in counts}
    return Gemm(rates, counts, model.get_output_embeddings().weight.numel())


def _rate(width: int, out: int, dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    for rows in GEMM_ROWS:
        x = torch.randn(rows, width, dtype=dtype, device=device)
        weight = torch.randn(out, width, dtype=dtype, device=device)
        flops = 2.0 * rows * width * out
        for right in (weight.T, weight.T.contiguous()):  # as nn.Linear and as Conv1D keep it
            torch.mm(x, right)
            for _ in range(GEMM_REPEATS):
                _finish(device)
                started = time.perf_counter()
                torch.mm(x, right)
                _finish(device)
                best = max(best, flops / (time.perf_counter() - started))
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
