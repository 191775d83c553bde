"""Which metrics each kind of data has, and which of them the choice of a coefficient rests on. Costs no lm-eval."""

from __future__ import annotations

from unlearn.errors import EvaluationError
from unlearn.recipe.data import Kind
from unlearn.recipe.load import nearest
from unlearn.recipe.schema import Recipe

# Metrics of each kind that need log-likelihoods only; the first is the one the choice of a coefficient rests on.
METRICS: dict[Kind, tuple[str, ...]] = {
    "mcq": ("acc", "acc_norm", "logprob", "prob", "pmi", "acc_pmi"),
    "qa": ("prob", "loss", "exact", "pmi"),
    "text": ("perplexity", "loss", "exact_memorisation", "extraction_strength", "pmi"),
}
RECITED = ("exact_memorisation", "extraction_strength", "pmi")  # need a request for each token
Key = tuple[str, str, str]  # set, name, metric


def default_metric(kind: Kind) -> str:
    """The metric that stands for a set: accuracy (mcq), answer probability (qa), perplexity (text)."""
    return METRICS[kind][0]


KEPT = ("retain", "utility")  # roles whose scores must stay


def goal_metrics(recipe: Recipe) -> tuple[Key, ...]:
    """Keys of the scores the edit is for, in report order: to be driven down (forget) or up (learn).

    ``choose.metric`` names the metric of the sets of the first one's kind; others have the default of their kind.

    Raises:
        EvaluationError: the recipe names one that this kind of data does not have in the search.
    """
    goals = recipe.goals()
    kind = goals[0][1].kind
    metric = recipe.choose.metric or default_metric(kind)
    if metric not in METRICS[kind]:
        guess = nearest(metric, METRICS[kind])
        meant = f"; did you mean '{guess}'?" if guess else ""
        raise EvaluationError(
            f"choose.metric: {kind} data have no {metric!r} in the search{meant} (there are {', '.join(METRICS[kind])})"
        )
    return tuple((role, d.label(), metric if d.kind == kind else default_metric(d.kind)) for role, d in goals)


def kept_metrics(recipe: Recipe) -> tuple[Key, ...]:
    """Keys of the scores that must stay within the bound: one for each retain and utility set, and lm-eval's tasks."""
    own = [(role, data.label(), default_metric(data.kind)) for role, data in recipe.sets() if role in KEPT]
    shipped = [(spec.set, spec.task, spec.metric) for spec in recipe.eval.tasks if spec.set in KEPT and not spec.whole]
    return (*own, *shipped)


def is_perplexity(metric: str) -> bool:
    """Whether a metric is bounded by how much it rises, not by the share it keeps."""
    return metric.endswith("perplexity")
