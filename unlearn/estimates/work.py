"""Operations and seconds: what a model computes for a token, and how long a machine takes over it.

A forward pass costs two operations (a multiplication and an addition) for each element of the layers' matrices and
each token, 2 P (Kaplan et al. 2001.08361, section 2.1); attention adds 4 x width x tokens it looks at, per layer, and
the head 2 x hidden x vocabulary where it runs. On the way back the gradient of the activations costs as much again, and
that of the weights as much once more: 6 P in all where every weight is trained, 4 P where they are frozen under a LoRA,
whose own matrices cost 6 per element. Gradient checkpointing runs every layer forward a second time: 2 P more.

A machine reaches a share of its peak. A pass takes no less than reading the weights once and a fixed time per layer; to
the steps that write texts, of one token per text, both are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unlearn.estimates.machine import Machine
from unlearn.estimates.memory import per_layer
from unlearn.estimates.passes import Training
from unlearn.estimates.shapes import Linear, Shape, lora_parameters
from unlearn.estimates.tokens import ScoredItem

_GPU_PASS, _CPU_PASS = 16384, 1024  # tokens of a scoring pass where there are so many
_SIDE = 8  # bytes moved per number that acts beside a 16-bit weight: read and written in float32


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, and the seconds they take."""

    operations: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.seconds + other.seconds)


def total(parts: Iterable[Work]) -> Work:
    """The sum."""
    return sum(parts, Work())


@dataclass(frozen=True, slots=True)
class Bench:
    """A model in numbers of ``size`` bytes on a machine."""

    shape: Shape
    machine: Machine
    size: int

    def body(self, tokens: float, seen: float) -> float:
        """Operations of the layers in a forward pass, each token looking at ``seen`` others."""
        shape = self.shape
        return tokens * (2 * shape.matrices + 4 * shape.layers * shape.attended * seen)

    def head(self, places: float) -> float:
        """Operations of the head at some places."""
        return 2.0 * places * self.shape.hidden * self.shape.vocabulary

    def train(
        self, found: Training, adapted: Sequence[Linear] | None, rank: int, checkpointing: bool, forward_only: float = 0
    ) -> Work:
        """A fine-tuning.

        Args:
            adapted: Matrices with an adapter; None: all weights are trained.
            forward_only: Share of the tokens whose rows need no way back.
        """
        seen = sum(p.width * p.tokens for p in found.passes) / sum(p.tokens for p in found.passes)
        forward = self.body(found.tokens, seen)
        _, layers = per_layer(self.shape, adapted)
        back = layers / self.shape.layers
        times = 1 + (2 if adapted is None else 1) * back + checkpointing
        head = self.head(found.heads) * (3 if adapted is None else 2)
        lora = 0.0 if adapted is None else (6 + 2 * checkpointing) * lora_parameters(adapted, rank) * found.tokens
        operations = forward * times + head + lora
        parameters = self.shape.parameters if adapted is None else lora_parameters(adapted, rank)
        # the optimiser reads and writes weight, gradient and two moments
        stepping = found.steps * parameters * 4 * (self.size if adapted is None else 4) * 2 / self._memory()
        return Work(operations, self._seconds(operations, found.batches * times, "train") + stepping)

    def forward(self, tokens: float, heads: float, seen: float, edited: int = 0) -> Work:
        """Scoring.

        Args:
            edited: Numbers that act beside the weights for each token; 0 where the edit is in them, or none is.
        """
        operations = self.body(tokens, seen) + self.head(heads)
        each = _CPU_PASS if self.machine.kind == "cpu" else _GPU_PASS
        passes = max(1.0, tokens / each)
        beside = tokens * edited * _SIDE / self._memory()
        return Work(operations, self._seconds(operations, passes, "score") + beside)

    def score(self, items: Sequence[ScoredItem], packed: bool, edited: int = 0) -> Work:
        """All items once: a tree per item, or with lm-eval's own model a row per answer and logits everywhere."""
        if not items:
            return Work()
        tokens = sum(i.tokens if packed else i.rows for i in items)
        heads = sum(i.heads for i in items) if packed else tokens
        seen = sum(i.tokens**2 for i in items) / sum(i.tokens for i in items)
        return self.forward(tokens, heads, seen, edited)

    def write(self, prompts: Sequence[int], new: int, edited: int = 0) -> Work:
        """Texts of ``new`` tokens after prompts, as many at a time as there are slots."""
        if not prompts:
            return Work()
        read = self.forward(sum(prompts), len(prompts), sum(prompts) / len(prompts), edited)
        slots = min(len(prompts), 256 if self.machine.kind == "gpu" else 64)
        rounds = -(-len(prompts) // slots) * new
        tokens = len(prompts) * new
        operations = self.body(tokens, max(prompts) + new / 2) + self.head(tokens)
        beside = tokens * edited * _SIDE / self._memory()
        # so few rows that reading the weights and computing with them do not hide each other: measured
        seconds = operations / self.machine.rate(self.size, "score") + self._least(rounds)
        return read + Work(operations, seconds + beside)

    def _seconds(self, operations: float, passes: float, what: str) -> float:
        rate = self.machine.rate(self.size, "train" if what == "train" else "score")
        return max(operations / rate, self._least(passes))

    def _least(self, passes: float) -> float:
        """Seconds of passes with next to no tokens."""
        reading = self.shape.parameters * self.size / self.machine.bandwidth
        return passes * (reading + self.shape.layers * self.machine.pass_layer)

    def _memory(self) -> float:
        return self.machine.bandwidth
