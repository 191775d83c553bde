"""What every stage's estimate is made from: a recipe's model, data and machine, and the stage's result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from unlearn.estimates import memory
from unlearn.estimates.machine import Machine
from unlearn.estimates.passes import Beside, Training, training
from unlearn.estimates.shapes import Linear, Shape, lora_parameters
from unlearn.estimates.tokens import ScoredItem, SetTokens, TrainRow
from unlearn.estimates.work import Bench, Work
from unlearn.recipe import LoraSpec, Recipe, SetRole, Split, TrainSpec

# Bytes that a scored item takes in lm-eval's sample files and ours, per coefficient
ITEM_BYTES = 6000
AGAIN = "read again"  # a model that was made by a stage and then loaded as the next ones will use it
DENSE = ("consensus", "ethos", "ext_sub", "perta")  # methods whose vectors are no product of thin factors
TWO = ("contrast", "msa")  # methods that put two vectors' factors together


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage.

    ``held`` is what lies on the device at the peak, in bytes by name; ``kept`` bytes that stay on the disk, ``passing``
    those that are there only while it runs; ``unknown`` names what is not counted.
    """

    name: str
    what: str
    held: Mapping[str, int]
    work: Work
    kept: int = 0
    passing: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return sum(self.held.values())


@dataclass(frozen=True)
class Run:
    """A recipe's run on paper.

    Attributes:
        size: Bytes of a number of the model in memory.
        stored: The same on disk.
        own: The model is a folder of the user's: a run adds nothing to the disk by loading it.
    """

    recipe: Recipe
    shape: Shape
    sets: tuple[SetTokens, ...]
    machine: Machine
    size: int
    stored: int
    own: bool = False
    bench: Bench = field(init=False)

    def __post_init__(self) -> None:
        """Put model and machine together."""
        object.__setattr__(self, "bench", Bench(self.shape, self.machine, self.size))

    @cached_property
    def weights(self) -> int:
        """Bytes of one copy of the model."""
        return memory.weights(self.shape, self.size)

    @cached_property
    def adapted(self) -> tuple[Linear, ...]:
        """Matrices that the vector is fitted on."""
        lora = self.recipe.vector.lora
        return self.shape.adapted(lora.targets, lora.depth)

    @property
    def cast(self) -> int:
        """Bytes of the numbers that an adapter keeps: under autocast, on a GPU, those of the model's format."""
        return self.size if self.machine.kind == "gpu" else 4

    @cached_property
    def rank(self) -> int | None:
        """Of what is subtracted; None: it is dense."""
        vector = self.recipe.vector
        steps = vector.steps()
        low = vector.low_rank.rank if vector.low_rank is not None else None
        if vector.prune is not None and vector.prune.by == "magnitude":
            return None
        if any(m in DENSE for m in steps):
            return low
        rank = vector.lora.rank * (2 if any(m in TWO for m in steps) else 1)
        return (low or rank) * max(len(self.recipe.goals()), 3 if self.recipe.analogy is not None else 1)

    @property
    def edited(self) -> int:
        """Numbers that act beside the weights for each token; none where the edit goes into float32 weights."""
        return sum(one.inputs + 3 * one.out for one in self.adapted) if self.size < 4 else 0

    def resident(self, stage: str) -> dict[str, int]:
        """What is there whatever the stage computes: libraries, and models that are kept."""
        found = {"libraries" if self.machine.kind == "cpu" else "device's own": self.machine.runtime}
        found["weights"] = self.weights
        late = ("reference", "benchmark", "membership", "robustness", "export")
        if stage in late and self.has_reference:
            found["the reference"] = self.weights
        return found

    @property
    def has_reference(self) -> bool:
        """Whether the reference is a model."""
        given = self.recipe.reference
        return given is not None and given != "published" and not given.endswith(".json")

    @property
    def subjects(self) -> int:
        """Models that are compared."""
        return 2 + self.has_reference

    def rows(self, *roles: SetRole) -> tuple[TrainRow, ...]:
        """Training rows of all sets of these roles."""
        return tuple(row for one in self.sets if one.role in roles for row in one.train)

    def items(self, split: Split) -> tuple[ScoredItem, ...]:
        """What is scored of a split."""
        roles = ("term", "holdout")
        return tuple(item for one in self.sets if one.role not in roles for item in one.scored[split])

    def score(self, split: Split, edited: bool) -> Work:
        """All items of a split, once."""
        return self.bench.score(self.items(split), self.recipe.eval.engine == "packed", self.edited * edited)

    def write(self, split: Split, edited: bool) -> Work:
        """The texts of a split's items that ROUGE-L is taken of, as long as they may get."""
        found = Work()
        for length, prompts in self._written(split).items():
            found += self.bench.write(prompts, length, self.edited * edited)
        return found

    def scoring(self, items: Sequence[ScoredItem], size: int | None = None) -> Mapping[str, int]:
        """What a scoring pass holds, by name, with the recipe's engine.

        Args:
            size: Bytes of a number of the model in memory, where it is not the edited one but a copy.
        """
        spec, edited, size = self.recipe.eval, size is None, size or self.size
        longest = max((item.longest for item in items), default=1)
        if spec.engine == "packed":
            tokens = min(spec.batch_tokens or memory.SCORED_AT_LEAST, sum(item.tokens for item in items))
            return {"a pass": memory.scoring(self.shape, size, edited, max(tokens, longest))}
        count = sum(item.answers for item in items)
        tokens = min(spec.batch_size, count) * longest
        return memory.scoring_rows(self.shape, size, edited, tokens, count > spec.batch_size)

    def writing(self, split: Split) -> int:
        """Bytes of keys and values while texts are written."""
        gpu = self.machine.kind == "gpu"
        held = [
            memory.writing(self.shape, self.size, len(prompts), max(prompts) + length, gpu)
            for length, prompts in self._written(split).items()
        ]
        most = max(held, default=0)
        room = self.machine.memory - sum(self.resident("test").values())
        return min(most, max(room // 2, 0)) if gpu else most  # as many texts at a time as fit into half of what is free

    def _written(self, split: Split) -> dict[int, list[int]]:
        """Prompts by the length of what is written after them."""
        found: dict[int, list[int]] = {}
        for one in self.sets:
            if one.kind != "mcq" and one.role not in ("term", "holdout") and one.scored[split]:
                found.setdefault(one.continuation, []).extend(item.prompt for item in one.scored[split])
        return found

    def fit(self, rows: Sequence[TrainRow], spec: TrainSpec, source: str = "") -> Training:
        """One fine-tuning of an adapter for the vector.

        Args:
            source: A baseline whose loss is minimised; ``penalised``: with the retain penalty.
        """
        near = self.rows("retain")
        penalty = self.recipe.penalty()
        if source == "penalised" and penalty is not None and near:
            copies = 3 if penalty.sides == "two" else 2
            return training(rows, spec, Beside(near, penalty.batch_size, copies), everywhere=False)
        if source == "gradient_difference":
            return training(rows, spec, Beside(near, spec.batch_size, 1), everywhere=False)
        if source == "npo":
            return training(rows, spec, everywhere=False, copies=2)  # under the adapter and without it
        return training(rows, spec, everywhere=source != "gradient_ascent")

    def trained(
        self, found: Training, spec: TrainSpec, lora: LoraSpec | None, kept: bool = True
    ) -> tuple[Work, dict[str, int], int]:
        """Work, memory beside the weights, and bytes of checkpoints of a fine-tuning.

        Two checkpoints are kept and a third is written before the oldest goes; each has the parameters and two moments,
        and is sealed by SHA-256.

        Args:
            kept: It has checkpoints.
        """
        adapted = None if lora is None else self.shape.adapted(lora.targets, lora.depth)
        rank = lora.rank if lora is not None else 0
        plain = all(p.heads == p.tokens for p in found.passes)
        work = self.bench.train(found, adapted, rank, spec.gradient_checkpointing)
        held = memory.training(
            *(self.shape, adapted, rank, self.size, found.largest),
            checkpointing=spec.gradient_checkpointing,
            plain=plain,
            cast=self.cast,
            heap=self.machine.kind == "cpu",
        )
        one = 3 * (self.weights if adapted is None else 4 * lora_parameters(adapted, rank))
        count = _checkpoints(found.steps, spec, adapted is not None) if kept else 0
        saving = Work(0.0, count * one * (1 / self.machine.disk + 1 / self.machine.hashed))
        return work + saving, dict(held), min(count, 3) * one

    def vector_bytes(self, rank: int | None) -> int:
        """A vector's file, float32."""
        sizes = sum(one.weight for one in self.adapted)
        return 4 * (sizes if rank is None else lora_parameters(self.adapted, rank))

    def reading(self, copies: int = 1) -> Work:
        """Read the weights from disk and take their fingerprint."""
        on_disk = self.shape.parameters * self.stored
        return Work(0.0, copies * (on_disk / self.machine.disk + self.weights / self.machine.hashed))

    def saving(self, size: int) -> Work:
        """Write a file."""
        return Work(0.0, size / self.machine.disk)


def _checkpoints(steps: int, spec: TrainSpec, small: bool) -> int:
    """How many are written, as :mod:`unlearn.trainer` does it: after the last step only those of an adapter."""
    every = spec.save_every or max(1, math.ceil(steps / 4))
    return math.ceil(steps / every) if small else (steps - 1) // every
