"""Before the edit: how each kept set's task correlates with the forgotten one, and what the edit will cost at first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from unlearn.console import progress
from unlearn.data.encoding import Encoded, reach, scored_rows
from unlearn.data.sets import LoadedSet
from unlearn.errors import EvaluationError
from unlearn.model.load import Loaded
from unlearn.recipe.data import Kind
from unlearn.recipe.methods import METHODS
from unlearn.recipe.schema import KEPT, Recipe
from unlearn.results import Foresight, Role, SetForesight, read, verdict
from unlearn.score.scorer import digests
from unlearn.store.files import write_json_atomic
from unlearn.store.stages import Store
from unlearn.train.batches import Pad, grouped, labelled
from unlearn.train.learned import weighted
from unlearn.train.losses import answer_logits, frozen, with_answers
from unlearn.train.trainer import range_for_gradients
from unlearn.train.vectors import Vectors, as_trained, fit_vector
from unlearn.vector.edit import subtracted
from unlearn.vector.task_vector import TaskVector

_TOKENS = 1024  # of a padded pass
_TOKENS_BACKWARD = 256  # of one that keeps every layer's activations for the way back
_NUMBERS = 1 << 25  # of one model's outputs that are held at a time: 128 MiB, of which there are three


@dataclass(frozen=True, slots=True)
class Correlation:
    """How alike two fine-tunings act on the same positions; every value in [-1, 1].

    ``outputs`` is the mean cosine of the two fine-tuned models' outputs, as the paper defines it, near 1 for small
    fine-tunings whatever the tasks. ``changes`` is the mean cosine of what each fine-tuning changed in the outputs.
    ``stderr`` is that mean's, with the positions of one item taken as one draw; None where a data set has a single
    item.

    Two things ``stderr`` does not cover. Another fine-tuning on the same data gives another vector: between unrelated
    random vectors on a pico model ``changes`` varied by 1.5 to 2 times as much. And large changes spoil predictions in
    like ways: there the mean over unrelated vectors was .03 while ``outputs`` was near 1, .12 at .7 and .29 at .26. So
    a small positive value beside a low ``outputs`` says little.
    """

    outputs: float
    changes: float
    stderr: float | None


def outputs(model: nn.Module, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """What the model says of every labelled token: (N, V) log-probabilities, float32, on the model's device."""
    found = []
    with frozen(model), torch.no_grad():
        for batch in grouped(rows, _TOKENS, _padded):
            logits, _, _ = answer_logits(model, Pad(pad_id)(batch))
            found.append(functional.log_softmax(logits, dim=-1))
    return torch.cat(found)


def correlate(
    model: nn.Module,
    first: TaskVector,
    second: TaskVector,
    sets: Sequence[Sequence[Encoded]],
    pad_id: int,
    advance: Callable[[int], None] = lambda n: None,
) -> Correlation:
    """The measured correlation of two fine-tunings, theta + first and theta + second; the model comes back as it was.

    ``sets`` are rows of each data set, usually both tasks'. A set counts the same however many rows it has.
    """
    answered = [with_answers(rows) for rows in sets]
    if not answered or not all(answered):
        raise EvaluationError("a correlation needs at least one item with an answer from each data set")
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    means, variances = [], []
    for rows in answered:
        parts = []
        for chunk in grouped(rows, max(1, _NUMBERS // vocabulary), labelled):
            parts.append(_cosines(model, first, second, chunk, pad_id))
            advance(len(chunk))
        cosines = torch.cat(parts)  # (N, 2)
        item = torch.repeat_interleave(torch.tensor([labelled([row]) for row in rows]))
        means.append(cosines.mean(0))
        variances.append(_variance(cosines[:, 1], item))
    both = torch.stack(means).mean(0)
    known = [v for v in variances if v is not None]
    stderr = math.sqrt(sum(known)) / len(known) if len(known) == len(answered) else None
    return Correlation(float(both[0]), float(both[1]), stderr)


def slope(
    model: nn.Module,
    vector: TaskVector,
    rows: Sequence[Encoded],
    kind: Kind,
    pad_id: int,
    advance: Callable[[int], None] = lambda n: None,
) -> float:
    """d/dlambda at 0 of the mean loss under theta - lambda * tau, exactly, in nats per unit of lambda.

    The loss is what the sweep reports: for mcq the negative ``logprob`` (an answer's nats, summed over its tokens), for
    qa and text ``loss`` (its nats per token); every item counts the same. Autograd goes through lambda alone: one
    backward pass, no weight gets a gradient. The model, theta, comes back as it was.
    """
    rows = with_answers(rows)
    if not rows:
        raise EvaluationError("a slope needs at least one item with an answer")
    coefficient = torch.zeros(1, device=next(model.parameters()).device, requires_grad=True)
    total = 0.0
    shared = dict.fromkeys(vector.modules, coefficient)
    with frozen(model), range_for_gradients(model), weighted(model, vector, shared) as scale:
        scale.value = 1.0  # so that the weight that all modules share is lambda itself
        for batch in grouped(rows, _TOKENS_BACKWARD, _padded):
            with torch.enable_grad():
                logits, wanted, row = answer_logits(model, Pad(pad_id)(batch))
                nll = functional.cross_entropy(logits, wanted, reduction="none")  # (N,)
                share = 1.0 if kind == "mcq" else 1.0 / row.bincount(minlength=len(batch))[row]
                (change,) = torch.autograd.grad((nll * share).sum(), coefficient)
            total += float(change)
            advance(len(batch))
    return total / len(rows)


def _cosines(model: nn.Module, first: TaskVector, second: TaskVector, rows: Sequence[Encoded], pad_id: int) -> Tensor:
    """(N, 2) in float64: per position the cosine of the outputs, and that of the changes.

    Each row of V is centred first. Adding a constant to all logits changes no probability, so that direction means
    nothing; in log-probabilities, all of them far below 0, it would make any two outputs look alike.
    """
    base = _centred(outputs(model, rows, pad_id))
    with subtracted(model, first, -1.0):
        one = _centred(outputs(model, rows, pad_id))
    with subtracted(model, second, -1.0):
        two = _centred(outputs(model, rows, pad_id))
    said = _cosine(one, two)
    return torch.stack([said, _cosine(one.sub_(base), two.sub_(base))], dim=-1).double().cpu()


def _centred(values: Tensor) -> Tensor:
    """The same tensor, which may be large, less each row's mean."""
    return values.sub_(values.mean(-1, keepdim=True))


def _cosine(one: Tensor, two: Tensor) -> Tensor:
    """(N,); 0 where one of the two is zero. Unlike torch's own, right for the smallest changes too."""
    scale = one.norm(dim=-1) * two.norm(dim=-1)
    return torch.where(scale > 0, (one * two).sum(-1) / scale, scale).clamp(-1.0, 1.0)


def _variance(values: Tensor, item: Tensor) -> float | None:
    """Of the mean of ``values`` (N,), whose deviations within one item may go together; None of a single item."""
    count = int(item.max()) + 1
    if count < 2:
        return None
    sums = torch.zeros(count, dtype=values.dtype).index_add(0, item, values - values.mean())
    return float(sums.square().sum()) * count / (count - 1) / len(values) ** 2


def _padded(rows: Sequence[Encoded]) -> int:
    """Tokens of a pass, those that fill up short rows among them."""
    return len(rows) * max(len(row.input_ids) for row in rows)


# -- before the edit

# The metric of each kind that is a log-likelihood in nats; perplexity is none.
NATS: Mapping[Kind, str] = {"mcq": "logprob", "qa": "loss", "text": "loss"}


def foresee(
    model: nn.Module,
    edit: TaskVector,
    forget_vector: TaskVector,
    near: Mapping[tuple[Role, str], TaskVector],
    sets: Sequence[LoadedSet],
    tokenizer: Any,
    limit: int,
) -> Foresight:
    """Slopes along the edit for every set, and correlations for those that have a fine-tuning of their own.

    Both are taken on validation items, those that the sweep scores (training items where a set has no others), in
    random order, ``limit`` at most; test items are not looked at. Sets without any such item, and terms of an analogy,
    are left out.

    ``edit`` is what will be subtracted, as shaped; ``forget_vector`` the fine-tuning on the forget set before that, of
    several sets the sum; ``near`` has the fine-tuning on a kept set. One on several sets may stand for each of them.
    """
    longest = reach(model, tokenizer)
    rows: dict[tuple[Role, str], list[Encoded]] = {}
    kinds: dict[tuple[Role, str], Kind] = {}
    for loaded in sets:
        if loaded.role == "term" or loaded.role == "holdout":
            continue
        items = (loaded.validation or loaded.train)[:limit]
        if found := scored_rows(items, loaded.spec.kind, tokenizer, longest):
            rows[loaded.role, loaded.name], kinds[loaded.role, loaded.name] = found, loaded.spec.kind
    goals = [key for key in rows if key[0] not in KEPT]
    forgotten = [row for key in rows if key[0] == "forget" for row in rows[key]]
    if not forgotten:
        raise EvaluationError("nothing can be foreseen without a forget set that has validation or training items")
    pad_id = tokenizer.pad_token_id
    compared = [key for key in rows if key[0] in KEPT and key in near]
    work = sum(map(len, rows.values())) + sum(len(forgotten) + len(rows[key]) for key in compared)
    with progress("foresight", work) as advance:

        def one(key: tuple[Role, str]) -> SetForesight:
            cost = _finite(slope(model, edit, rows[key], kinds[key], pad_id, advance))
            plain = SetForesight(*key, metric=NATS[kinds[key]], slope=cost, items=len(rows[key]))
            if key not in compared:
                return plain
            found = correlate(model, forget_vector, near[key], (forgotten, rows[key]), pad_id, advance)
            modules = forget_vector.cosines(near[key])
            return replace(
                plain,
                alpha_outputs=_finite(found.outputs),
                alpha_changes=_finite(found.changes),
                alpha_stderr=_finite(found.stderr),
                alpha_vectors=_finite(forget_vector.cosine(near[key])),
                modules={name: value for name, value in modules.items() if math.isfinite(value)},
                verdict=verdict(found.changes, found.stderr),
            )

        return Foresight(tuple(map(one, goals)), tuple(one(key) for key in rows if key not in goals))


def _finite(value: float | None) -> float | None:
    """The number, or None: in 16 bits a gradient may overflow where the loss does not, and JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


# -- the step of a run


def foresee_cost(
    target: Loaded, edit: TaskVector, vectors: Vectors, sets: Sequence[LoadedSet], recipe: Recipe, store: Store
) -> Foresight:
    """How the forgotten task correlates with every kept one, and the slope of every set's loss along the edit.

    A retain set that has no vector of its own gets one by a short fine-tuning. Sets that are not trained on, and the
    runs of baselines, which have no vector of the forget set, have slopes only.
    """
    spec = recipe.vector.correlation
    assert spec is not None  # the caller looked
    forgotten = [vectors.fitted[goal] for goal in sorted(vectors.fitted) if goal[0] == "forget"]
    near = {} if METHODS[recipe.vector.source()].role == "baseline" else _near(target, sets, vectors, recipe, store)
    vector = forgotten[0] if len(forgotten) == 1 else TaskVector.sum(forgotten)

    def make(tmp: Path) -> None:
        found = foresee(target.model, edit, vector, near, sets, target.tokenizer, spec.items)
        write_json_atomic(tmp / "foresight.json", asdict(found))

    others = [[*key, one.digest()] for key, one in sorted(near.items())]
    inputs = [target.fingerprint, edit.digest(), vector.digest(), others, digests(sets), spec.items]
    store.stage("foresight", inputs, make)
    return read(Foresight, store.read("foresight", "foresight.json"))


def _near(
    target: Loaded, sets: Sequence[LoadedSet], vectors: Vectors, recipe: Recipe, store: Store
) -> dict[tuple[Role, str], TaskVector]:
    """A vector for every retain set that has items to train on."""
    spec, how = recipe.vector, recipe.vector.retain or recipe.vector.forget
    steps = spec.correlation.steps if spec.correlation else None
    if steps is not None and (how.steps is None or how.steps > steps):
        how = how.model_copy(update={"steps": steps, "epochs": None})
    trained = [s for s in sets if s.role == "retain" and s.train]
    if vectors.retain is not None and len(trained) == 1 and not spec.uses("msa"):
        return {("retain", trained[0].name): vectors.retain}
    trainee = as_trained(target, recipe.model) if trained else target
    return {("retain", s.name): fit_vector(f"near-{s.name}", trainee, [s], how, recipe, store) for s in trained}
