"""The edit in words: its formula, and what each method of the recipe does, for the plan and the model card.

A method that is more than a sum is written as a function of what it shapes, innermost first: theta - c * lines(tau_f)
is the forget vector, scaled layer by layer, subtracted. Costs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from unlearn.recipe.data import DataSet
from unlearn.recipe.methods import (
    BASELINES,
    ConsensusSpec,
    EthosSpec,
    GradientDifferenceSpec,
    LearnedSpec,
    LinesSpec,
    Method,
    MsaSpec,
    NpoSpec,
    PertaSpec,
    ProjectSpec,
    PruneSpec,
    RetainKLSpec,
    VectorSpec,
)
from unlearn.recipe.schema import Recipe
from unlearn.text import coefficient as number
from unlearn.text import counted, percent


class Style(NamedTuple):
    """How a formula is written."""

    theta: str
    c: str
    tau: str
    minus: str
    times: str


ASCII = Style("theta", "c * ", "tau", "-", " * ")
GREEK = Style("θ", "λ", "τ", "−", " ")


def formula(recipe: Recipe, style: Style = ASCII) -> str:
    """The edited model, ``theta - c * (tau_f - 1 * tau_r)`` for instance."""
    v, s = recipe.vector, style
    if recipe.analogy is not None:
        a, b, c = (_shaped(v, s, _tau(s, d)) for d in (recipe.analogy.a, recipe.analogy.b, recipe.analogy.c))
        return f"{s.theta} + {s.c}({c} + {b} {s.minus} {a})"
    (first, data), *others = recipe.goals()
    sign = s.minus if first == "forget" else "+"
    if others:
        terms = [f"w_{d.label()}{s.times}{_shaped(v, s, _tau(s, d))}" for _, d in recipe.goals()]
        signs = ["+" if role == first else s.minus for role, _ in others]
        return (
            f"{s.theta} {sign} {s.c}({terms[0]}{''.join(f' {a} {b}' for a, b in zip(signs, terms[1:], strict=True))})"
        )
    bare = s is GREEK and v.steps() == ("negate",)
    part = _shaped(v, s, s.tau if bare else f"{s.tau}_f" if first == "forget" else _tau(s, data))
    space = " " if s is GREEK and part[0].isascii() and part[0].isalpha() else ""
    return f"{s.theta} {sign} {s.c}{space}{part}"


def phrases(vector: VectorSpec) -> tuple[str, ...]:
    """What every method does, in order; nothing of plain negation, whose formula says it all."""
    return tuple(f"{step}: {_WORDS[step](vector)}" for step in vector.steps() if step in _WORDS)


def penalty(spec: RetainKLSpec) -> str:
    """The retain penalty of the fitting in a clause. ``spec`` is :meth:`unlearn.recipe.schema.Recipe.penalty`'s."""
    weight = "" if spec.weight == 1 else f", weight {number(spec.weight)}"
    if spec.sides == "one" or spec.coefficients is None:
        return f"KL(theta || theta + tau) on retain items held down{weight}"
    low, high = (number(c) for c in spec.coefficients)
    c = f"c = {low}" if low == high else f"c drawn from {low} to {high}"
    return f"KL(theta || theta + tau) and KL(theta || theta - c * tau) on retain items held down, {c}{weight}"


def _tau(s: Style, data: DataSet) -> str:
    return f"{s.tau}_{data.label()}"


def _shaped(v: VectorSpec, s: Style, tau: str) -> str:
    """One vector as the methods leave it, a sum in parentheses."""
    steps = v.steps()
    text, is_sum = _source(v, s, tau), steps[0] == "msa"
    for step in steps[1:]:
        if step == "contrast":
            text, is_sum = f"{text} {s.minus} {number(1.0 if v.mu is None else v.mu)}{s.times}{s.tau}_r", True
        else:
            text, is_sum = f"{step}({text})", False
    return f"({text})" if is_sum else text


def _source(v: VectorSpec, s: Style, tau: str) -> str:
    source = v.steps()[0]
    if source == "msa":
        how = v.msa or MsaSpec()
        return f"{number(how.alpha)}{s.times}{tau} {s.minus} {number(how.beta)}{s.times}{s.tau}_r"
    if source == "random":
        return f"random({tau})"
    if source in BASELINES:
        return f"({s.theta} {s.minus} {s.theta}_{source})"
    return f"consensus({tau})" if source == "consensus" else tau


def _perta(v: VectorSpec) -> str:
    how = v.perta or PertaSpec()
    kind = "mean |gradient|" if how.importance == "grad" else "mean squared gradient"
    return (
        f"scale every entry by its importance for forgetting against that for retaining ({kind} of "
        f"{counted(how.samples, 'item')} of either side)"
    )


def _lines(v: VectorSpec) -> str:
    how = v.lines or LinesSpec()
    return f"scale layer l of L by {number(how.a)} + {number(how.b)} * l / (L - 1)"


def _learned(v: VectorSpec) -> str:
    how = v.learned or LearnedSpec()
    return (
        f"fit one coefficient per {how.by} by gradient on train items, vector and model frozen: "
        f"{counted(how.steps, 'step')} of {how.batch_size} forget and {how.retain_batch_size} retain examples"
    )


def _low_rank(v: VectorSpec) -> str:
    how = v.low_rank
    if how is None or how.rank is not None:
        return f"keep the {counted(how.rank if how and how.rank else 1, 'leading singular component')} of every module"
    return f"keep as many singular components as carry {percent(how.energy)} of a module's squared norm"


def _prune(v: VectorSpec) -> str:
    how = v.prune or PruneSpec()
    what = "rows" if how.by == "rows" else "entries"
    return f"keep the largest {percent(how.keep)} of every module's {what}"


_WORDS: Mapping[Method, Callable[[VectorSpec], str]] = {
    "msa": lambda v: "both vectors are fitted on a checkpoint that never saw the forget set",
    "consensus": lambda v: (
        f"the mean of {counted((v.consensus or ConsensusSpec()).runs, 'fine-tuning')} of different seeds where the "
        "signs of all agree"
    ),
    "random": lambda v: "a random vector with tau_f's norm in every module, a control",
    "gradient_ascent": lambda v: "a baseline: train to make the forget set less likely, and go as far as c says",
    "gradient_difference": lambda v: (
        "a baseline: gradient ascent on the forget set, descent on the retain sets with weight "
        f"{number((v.gradient_difference or GradientDifferenceSpec()).weight)}"
    ),
    "npo": lambda v: f"a baseline: negative preference optimisation, beta {number((v.npo or NpoSpec()).beta)}",
    "retain_only": lambda v: "a baseline: fine-tuning on the retain sets only",
    "contrast": lambda v: "take off what forget and retain vectors have in common",
    "ext_sub": lambda v: "take off, row by row, what lies along the common direction of forget and retain vector",
    "project": lambda v: (
        "take off what lies in the retain vector's row space "
        f"({percent((v.project or ProjectSpec()).energy)} of its squared norm)"
    ),
    "ethos": lambda v: (
        "in the singular basis of the weights drop components below "
        f"{percent((v.ethos or EthosSpec()).threshold)} of the largest"
    ),
    "perta": _perta,
    "lines": _lines,
    "learned": _learned,
    "low_rank": _low_rank,
    "prune": _prune,
    "rescale": lambda v: "make it as long again as it was when it was fitted",
}
