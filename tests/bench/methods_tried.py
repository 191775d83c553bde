"""The methods of the benchmark by name: each takes a cell and gives what is subtracted.

Every method trains on as many tokens of a cell as every other: :meth:`Cell.steps` says how many steps that leaves one
that reads so many batches at each. A retain row beside a forget row counts, copies of either under another multiple of
the adapter and rows that are only read (the teacher's, a shrinking's) do not.

Hyperparameters are the papers' or the recipe's defaults, but for those chosen on capitals, seed 0, which say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unlearn.data.items import REFUSALS
from unlearn.recipe.methods import METHODS as RECIPE
from unlearn.recipe.methods import IgnoranceSpec, RetainKLSpec
from unlearn.train.losses import Against
from unlearn.train.teacher import ignorant, refusing
from unlearn.vector.task_vector import TaskVector

if TYPE_CHECKING:
    from methods_cell import Cell

STEPS = 8  # of learned, whose coefficients are fitted after the vector; each reads two batches


def _plain(cell: Cell) -> TaskVector:
    return cell.fit("forget", cell.sets[:1])


def _half(cell: Cell) -> TaskVector:
    """For methods that fit a retain vector too."""
    return cell.fit("forget_half", cell.sets[:1], share=0.5)


def _learned(cell: Cell, *before: str) -> TaskVector:
    vector = cell.fit("forget_short", cell.sets[:1], share=1 - 2 * STEPS / cell.steps())
    size = cell.recipe.vector.forget.batch_size
    how = {"steps": STEPS, "batch_size": size, "retain_batch_size": size}
    return cell.shaped(vector, method=(*before, "learned"), learned=how)


def _two_sided(cell: Cell) -> TaskVector:
    keep = RetainKLSpec(sides="two", coefficients=(1.0, 4.0), batch_size=cell.beside)  # chosen on capitals
    return cell.fit("two_sided", cell.sets[:1], keep)


def _ignorance(cell: Cell, name: str = "ignorance", **lora: Any) -> TaskVector:
    """Inside the shrinking, the retain penalty on the side deployed; all settings chosen on capitals.

    Where the pair teaches, the teacher is the model before that.
    """
    how = IgnoranceSpec() if cell.clean is None else IgnoranceSpec(teacher="clean")
    clean = cell.clean().model if cell.clean is not None else None
    training = cell.recipe.vector.forget.model_copy(update={"learning_rate": 0.002})
    teacher = ignorant(cell.sets[0], cell.target.tokenizer, training, how, clean)
    keep = RetainKLSpec(sides="one", temperature=4.0, weight=5.0, batch_size=cell.beside)
    against = Against("ignorance", how, teacher=teacher)
    how_wide = cell.recipe.vector.lora.model_copy(update=lora)
    return -cell.fit(name, cell.sets[:1], keep, against, training, 1000.0, lora=how_wide)


def _late(cell: Cell) -> TaskVector:
    """Toward ignorance, in the MLPs of the last third alone."""
    return _ignorance(cell, "late", depth=(0.67, 1.0), targets=("gate_proj", "up_proj", "down_proj"))


def _beside_general(cell: Cell) -> TaskVector:
    with cell.general():
        return 2.0 * cell.shaped(_ignorance(cell, "ignorance_general"), method=("kfac", "rescale"))


def _shaped(source: Callable[[Cell], TaskVector], **how: Any) -> Callable[[Cell], TaskVector]:
    return lambda cell: cell.shaped(source(cell), **how)


def _against(loss: Any, name: str = "", **how: Any) -> Callable[[Cell], TaskVector]:
    """A baseline with the recipe's defaults, but for what is given."""

    def made(cell: Cell) -> TaskVector:
        retain = cell.rows(cell.near) if loss not in ("gradient_ascent", "npo") or "weight" in how else ()
        teacher, training = None, cell.recipe.vector.forget
        if loss == "idk_dpo":
            teacher = refusing(cell.sets[0], cell.target.tokenizer, training, REFUSALS)
        kind = RECIPE[loss].settings
        given = Against(loss, kind(**how) if kind else None, retain, teacher, cell.beside, cell.recipe.seed)
        return -cell.fit(name or loss, cell.sets[:1], against=given)

    return made


METHODS: dict[str, Callable[[Cell], TaskVector]] = {
    "negate": _plain,
    "shrink": _shaped(_plain, method=("shrink", "rescale")),
    "two_sided": _two_sided,
    "two_sided+shrink": _shaped(_two_sided, method=("shrink", "rescale")),
    "ignorance": _ignorance,
    "gradient_difference": _against("gradient_difference"),
    "learned": _learned,
    "ext_sub+project": _shaped(_half, method=("ext_sub", "project", "rescale"), project={"energy": 0.7}),
    "npo": _against("npo"),
    "npo+retain": _against("npo", "npo+retain", weight=1.0),
    "simnpo": _against("simnpo"),
    "simnpo_1": _against("simnpo", "simnpo_1", weight=1.0),
    "idk_dpo": _against("idk_dpo"),
    "rmu": _against("rmu"),
    "rmu_1": _against("rmu", "rmu_1", weight=1.0),
    "rmu_400": _against("rmu", "rmu_400", scale=400.0, weight=10.0),  # its layer's outputs are about 115 long
    "ihl": _against("ihl"),
    "ihl+fila": _against("ihl", "ihl+fila", fila=True, samples=64),
    "shrink_contrast": _shaped(_plain, method=("shrink", "rescale"), shrink={"forget": 10.0}),
    # chosen on capitals; longer, because both sides leave little of it where the grid of coefficients looks
    "kfac": lambda cell: 2.0 * cell.shaped(_plain(cell), method=("kfac", "rescale")),
    "ignorance+kfac": lambda cell: 2.0 * cell.shaped(_ignorance(cell), method=("kfac", "rescale")),
    "ignorance+kfac+general": _beside_general,
    "late+kfac": lambda cell: 2.0 * cell.shaped(_late(cell), method=("kfac", "rescale")),
    "slopes": _shaped(_plain, method=("slopes", "rescale")),
    "slopes+learned": lambda cell: _learned(cell, "slopes", "rescale"),
}
