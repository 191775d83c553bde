"""The methods of the benchmark by name: each takes a cell and gives what is subtracted.

Hyperparameters are the papers' or the recipe's defaults, but for those chosen on capitals, seed 0, which say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from unlearn.data.items import REFUSALS
from unlearn.recipe.methods import METHODS as RECIPE
from unlearn.recipe.methods import RetainKLSpec
from unlearn.train.losses import Against
from unlearn.train.teacher import refusing
from unlearn.vector.methods import consensus, msa, random_like
from unlearn.vector.task_vector import TaskVector

if TYPE_CHECKING:
    from methods_cell import Cell

DEEP = (0.73, 1.0)  # chosen on capitals: the last 8 of 30 layers
TAUGHT_ONLY = ("msa",)


def _one_sided(cell: Cell) -> TaskVector:
    return cell.fit("one_sided", cell.sets[:1], RetainKLSpec(sides="one", batch_size=cell.beside))


def _two_sided(cell: Cell) -> TaskVector:
    return cell.fit(
        "two_sided", cell.sets[:1], RetainKLSpec(sides="two", coefficients=(1.0, 4.0), batch_size=cell.beside)
    )


def _fixed(cell: Cell) -> TaskVector:
    return cell.fit(
        "two_sided_fixed", cell.sets[:1], RetainKLSpec(sides="two", coefficients=(2.0, 2.0), batch_size=cell.beside)
    )


def _deep(cell: Cell) -> TaskVector:
    penalty = RetainKLSpec(sides="two", coefficients=(1.0, 4.0), batch_size=cell.beside)
    return cell.fit("two_sided_deep", cell.sets[:1], penalty, depth=DEEP)


def _shaped(source: Callable[[Cell], TaskVector], **how: Any) -> Callable[[Cell], TaskVector]:
    return lambda cell: cell.shaped(source(cell), **how)


def _plain(cell: Cell) -> TaskVector:
    return cell.forget()


def _msa(cell: Cell) -> TaskVector:
    assert cell.clean is not None
    clean = cell.clean()
    return msa(cell.fit("clean_forget", cell.sets[:1], model=clean), cell.fit("clean_retain", cell.near, model=clean))


def _against(loss: Any, name: str = "", **how: Any) -> Callable[[Cell], TaskVector]:
    """A baseline with the recipe's defaults, but for what is given."""

    def made(cell: Cell) -> TaskVector:
        retain = cell.rows(cell.near) if loss not in ("gradient_ascent", "npo") or "weight" in how else ()
        teacher, training = None, cell.recipe.vector.forget
        if loss == "idk_dpo":
            teacher = refusing(cell.sets[0], cell.target.tokenizer, training, REFUSALS)
        kind = RECIPE[loss].settings
        plain = kind().model_dump(exclude={"refusals", "fila", "samples"}) if kind is not None else {}
        given = {**plain, "seed": cell.recipe.seed, "teacher": teacher, "batch_size": cell.beside, **how}
        return -cell.fit(name or loss, cell.sets[:1], against=Against(loss, retain, **given))

    return made


METHODS: dict[str, Callable[[Cell], TaskVector]] = {
    # baselines
    "random": lambda cell: random_like(cell.forget(), cell.recipe.seed),
    "gradient_ascent": _against("gradient_ascent"),
    "gradient_difference": _against("gradient_difference"),
    "npo": _against("npo"),
    "npo+retain": _against("npo", "npo+retain", weight=1.0),
    "simnpo": _against("simnpo"),
    "simnpo_1": _against("simnpo", "simnpo_1", weight=1.0),
    "idk_dpo": _against("idk_dpo"),
    "rmu": _against("rmu"),
    "rmu_1": _against("rmu", "rmu_1", weight=1.0),
    "rmu_400": _against("rmu", "rmu_400", scale=400.0, weight=10.0),  # its layer's outputs are about 115 long
    "ihl": _against("ihl"),
    "ihl+fila": _against("ihl", "ihl+fila", samples=64),
    "retain_only": lambda cell: -cell.retain(),
    # vectors, plain and shaped
    "negate": _plain,
    "contrast": _shaped(_plain, method="contrast"),
    "msa": _msa,
    "project": _shaped(_plain, method=("project", "rescale")),
    "ext_sub": _shaped(_plain, method=("ext_sub", "rescale")),
    "ext_sub+project": _shaped(_plain, method=("ext_sub", "project", "rescale"), project={"energy": 0.7}),
    "ethos": _shaped(_plain, method="ethos"),
    "perta_grad": _shaped(_plain, method=("perta", "rescale"), perta={"samples": 16}),
    "perta_fisher": _shaped(_plain, method=("perta", "rescale"), perta={"importance": "fisher", "samples": 16}),
    "consensus": lambda cell: consensus([cell.forget(run) for run in range(2)]),
    "lines": _shaped(_plain, method="lines", lines={"a": 0.2, "b": 0.8}),
    "rank_1": _shaped(_plain, method="low_rank", low_rank={"rank": 1}),
    "prune_rows": _shaped(_plain, method=("prune", "rescale"), prune={"keep": 0.2, "by": "rows"}),
    "shrink_contrast": _shaped(_plain, method=("shrink", "rescale"), shrink={"forget": 10.0}),
    # chosen on capitals; longer, because both sides leave little of it where the grid of coefficients looks
    "kfac": lambda cell: 2.0 * cell.shaped(_plain(cell), method=("kfac", "rescale")),
    "slopes": _shaped(_plain, method=("slopes", "rescale")),
    "slopes+learned": _shaped(_plain, method=("slopes", "rescale", "learned"), learned={"steps": 15, "scale": 1.0}),
    "learned": _shaped(_plain, method="learned", learned={"steps": 15, "scale": 1.0}),
    # vectors fitted so that they spare
    "one_sided": _one_sided,
    "two_sided_fixed": _fixed,
    "two_sided": _two_sided,
    "two_sided+project": _shaped(_two_sided, method=("project", "rescale")),
    "two_sided_deep": _deep,
    "two_sided_deep+learned": _shaped(_deep, method="learned", learned={"steps": 15, "scale": 3.0}),
}
