"""The lines of a plan about comparisons and attacks."""

from __future__ import annotations

from collections.abc import Iterator

from unlearn import references
from unlearn.recipe import Recipe
from unlearn.recipe_bench import RobustnessSpec
from unlearn.wording import counted, listing


def evidence_steps(recipe: Recipe) -> Iterator[str]:
    """What stands beside the result, in order of the stages."""
    given = recipe.reference
    models = 2 + references.is_model(recipe)
    if given == "train":
        yield "reference: teach the base model the retain sets alone, in the same way; score it on the same test items"
    elif models == 3:
        yield f"reference: {given}, a model that never saw the forget set, scored on the same test items"
    if recipe.benchmark is not None:
        spec = recipe.benchmark
        some = f"the first {spec.items} items of every set" if spec.items else "all items"
        beside = f", compared with {given}" if given is not None and models == 2 else ""
        yield f"benchmark: {spec.name} {spec.set} on {counted(models, 'model')}, {some}{beside}"
    if recipe.holdout is not None:
        yield f"membership: can the forget set be told from {recipe.holdout.label()}, which no model has seen?"
    if recipe.robustness is not None:
        attacks = listing(_attacks(recipe, recipe.robustness)) or "no attack is switched on"
        yield f"attack {counted(models, 'model')}: {attacks}"


def _attacks(recipe: Recipe, spec: RobustnessSpec) -> Iterator[str]:
    """Those that apply to the recipe's data."""
    questions = recipe.forget is not None and recipe.forget.kind != "text"
    solved = any(data.kind != "text" for data in recipe.retain)
    probes = [p for p in spec.probes if p == "prefix" or (questions and (p != "few_shot" or solved))]
    if spec.quantize:
        yield f"copies in {' and '.join(spec.quantize)}"
    if spec.relearn is not None:
        steps = counted(max(spec.relearn.steps), "step")
        unrelated = " and on unrelated texts" if spec.relearn.unrelated and recipe.utility else ""
        yield f"{steps} of relearning on {counted(spec.relearn.items, 'forget item')}{unrelated}"
    if probes:
        yield f"other prompts ({', '.join(probes).replace('_', '-')})"
    if spec.samples:
        yield f"the best of {counted(spec.samples, 'sample')}"
    if spec.lens:
        yield "the logit lens"
