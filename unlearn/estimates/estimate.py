"""``--estimate``: memory, disk and time of every stage of a recipe, on paper. Nothing is run, fetched or built.

The model is in the modules beside this one: sizes (:mod:`unlearn.estimates.shapes`), tokens
(:mod:`unlearn.estimates.tokens`), bytes (:mod:`unlearn.estimates.memory`), operations and seconds
(:mod:`unlearn.estimates.work`), and the stages (:mod:`unlearn.estimates.stages`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unlearn.estimates.config import Found, find_config
from unlearn.estimates.options import Options
from unlearn.estimates.run import Run, StageEstimate
from unlearn.estimates.shapes import lora_parameters, shape_of
from unlearn.estimates.stages import stages
from unlearn.estimates.tokens import count_sets
from unlearn.recipe_io import LoadedRecipe

SHARE = 0.9  # of a device's memory that may be planned for; the rest goes to what lies between the arrays
_SHARD = 5 * 10**9  # bytes of the largest file of a checkpoint, where nothing else is known
_SPARE = 300 * 10**6  # what editing a checkpoint may hold besides


@dataclass(frozen=True, slots=True)
class Applying:
    """Editing the checkpoint on the disk: bytes read and written, seconds, bytes of memory at most."""

    moved: int
    seconds: float
    held: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """A recipe on paper."""

    loaded: LoadedRecipe
    options: Options
    found: Found
    run: Run
    stages: tuple[StageEstimate, ...]
    applying: Applying

    @property
    def largest(self) -> StageEstimate:
        """The stage that holds most."""
        return max(self.stages, key=lambda one: one.peak)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(one.work.seconds for one in self.stages)

    @property
    def disk(self) -> int:
        """Bytes on the disk at most: all that stays, and the most that passes."""
        return sum(one.kept for one in self.stages) + max(one.passing for one in self.stages)

    def devices(self, held: int) -> int:
        """How many devices hold so many bytes together, each with its own libraries."""
        machine = self.options.machine
        room = SHARE * machine.memory - machine.runtime
        return max(1, math.ceil((held - machine.runtime) / room)) if room > 0 else 0


def estimate(loaded: LoadedRecipe, options: Options) -> Estimate:
    """Estimate every stage of a recipe on a machine.

    Raises:
        ModelError: the model's sizes are out of reach, or of a family that is not known.
        DataError: local data that cannot be used, or a set elsewhere of which nothing is known.
    """
    recipe, base = loaded.recipe, loaded.source.parent
    found = find_config(recipe.model, base, options.config)
    shape = shape_of(found.config, found.where)
    automatic = 2 if options.machine.kind == "gpu" else 4
    size = {"auto": automatic, "float32": 4}.get(recipe.model.dtype, 2)
    sets = count_sets(recipe, base, found.tokenizer, options.rows, shape.window)
    run = Run(recipe, shape, sets, options.machine, size, found.stored, found.own)
    return Estimate(loaded, options, found, run, stages(run), _applying(run))


def _applying(run: Run) -> Applying:
    """``unlearn.apply`` on the model's checkpoint: every byte is read, checked and written once."""
    bytes_ = run.shape.parameters * run.stored
    factors = 4 * lora_parameters(run.adapted, run.rank or run.recipe.vector.lora.rank)
    seconds = max(2 * bytes_ / run.machine.disk, 2 * bytes_ / run.machine.hashed)
    return Applying(2 * bytes_, seconds, min(_SHARD, bytes_) + factors + _SPARE)
