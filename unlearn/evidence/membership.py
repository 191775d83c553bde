"""Membership inference: can one tell, from a model's token probabilities, which texts it was trained on?

Every attack gives a text one number, and higher always means "more likely a member". How well it tells members from
others is the area under the ROC curve: .5 is a coin, 1 tells all of them apart, and below .5 members look *less* known
than others, which gives a forget set away as well.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from unlearn.console import progress
from unlearn.data.encoding import IGNORE, Encoded, encode, reach
from unlearn.data.files import shorten
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet
from unlearn.errors import BrokenModelError, DataError, EvaluationError, TrainingError
from unlearn.model.load import Loaded
from unlearn.processes import count, together
from unlearn.recipe.data import Kind
from unlearn.results import Membership, Who
from unlearn.store.files import write_text_atomic
from unlearn.train.batches import Pad, answers
from unlearn.train.losses import answer_logits, frozen, only_at

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, slots=True)
class TokenScores:
    """What a model says of the answered tokens of one text, each after the true tokens before it; (N,) arrays.

    ``means`` and ``stds`` are the mean and standard deviation of log p over the vocabulary under the model's own
    distribution p at each place, ``greedy`` whether the token is the argmax; log-probabilities are in nats.
    ``zlib_bytes`` is the size of the text, compressed.
    """

    logprobs: Floats
    means: Floats
    stds: Floats
    greedy: NDArray[np.bool_]
    zlib_bytes: int


@dataclass(frozen=True, slots=True)
class Interval:
    """One attack's area under the ROC curve, members against others, with a 95 % bootstrap interval."""

    attack: str
    auc: float
    low: float
    high: float
    n_members: int
    n_others: int


def loss_score(tokens: TokenScores) -> float:
    """Mean log-probability of the tokens: the loss attack (Yeom et al. 1709.01604)."""
    return float(_tokens(tokens).logprobs.mean())


def min_k(tokens: TokenScores, k: float) -> float:
    """Mean of the share ``k`` of lowest log-probabilities (Min-K% Prob, 2310.16789).

    Their number is rounded down, as the authors do, but is at least one.
    """
    return _lowest(_tokens(tokens).logprobs, k)


def min_k_pp(tokens: TokenScores, k: float) -> float:
    """:func:`min_k` of (log p - mean) / std, how each token stands among all that could be there (2404.02936).

    Where all tokens are equally likely, the deviation is 0 and so is this.
    """
    off = _tokens(tokens).logprobs - tokens.means
    return _lowest(np.divide(off, tokens.stds, out=np.zeros_like(off), where=tokens.stds > 0), k)


def zlib_score(tokens: TokenScores) -> float:
    """Mean log-probability per byte of the compressed text (Carlini et al. 2012.07805), as in Min-K%'s and MUSE's code.

    Dull texts are likely whether they were trained on or not; they also compress well.
    """
    if tokens.zlib_bytes < 1:
        raise EvaluationError("the zlib attack needs the compressed size of every text")
    return loss_score(tokens) / tokens.zlib_bytes


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Probability that a member scores higher than an other, ties counted half (Mann-Whitney U), in O(n log n).

    Args:
        members: (M,) scores.
        others: (N,) scores.

    Raises:
        EvaluationError: nothing on one side, or scores that are no numbers.
    """
    high, low = _scores(members, "members"), np.sort(_scores(others, "others"))
    twice = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(twice) / (2 * len(high) * len(low))


def auc_interval(members: ArrayLike, others: ArrayLike, resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of :func:`auc`: percentiles of a bootstrap that draws members and others apart.

    The draws depend on ``seed`` and the numbers of scores alone, so that attacks on the same texts share them. Where
    the two sides do not overlap, no resample can either, and the interval is that one value: read it with the counts.

    Raises:
        EvaluationError: as :func:`auc`, or less than one resample.
    """
    if resamples < 1:
        raise EvaluationError(f"a bootstrap of {resamples} resamples has no interval; use some hundreds")
    high, low = _scores(members, "members"), _scores(others, "others")
    _, code = np.unique(np.concatenate([high, low]), return_inverse=True)  # only the order counts
    ours, theirs, size = code[: len(high)], code[len(high) :], int(code.max()) + 1
    draw, found = np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):
        m = np.bincount(ours[draw.integers(0, len(ours), len(ours))], minlength=size)
        n = np.bincount(theirs[draw.integers(0, len(theirs), len(theirs))], minlength=size)
        found[i] = (m * (2 * np.cumsum(n) - n)).sum() / (2 * len(ours) * len(theirs))
    lower, upper = np.percentile(found, (2.5, 97.5))
    return float(lower), float(upper)


def compare(attack: str, members: ArrayLike, others: ArrayLike, resamples: int = 1000, seed: int = 0) -> Interval:
    """:func:`auc` and :func:`auc_interval` of one attack's scores.

    Raises:
        EvaluationError: as :func:`auc_interval`.
    """
    low, high = auc_interval(members, others, resamples, seed)
    return Interval(attack, auc(members, others), low, high, np.size(members), np.size(others))


def _lowest(values: Floats, k: float) -> float:
    if not 0 < k <= 1:
        raise EvaluationError(f"the share of tokens for Min-k is {k}; it must be above 0 and at most 1")
    count = max(int(len(values) * k), 1)
    return float(np.partition(values, count - 1)[:count].mean())


def _tokens(tokens: TokenScores) -> TokenScores:
    if not len(tokens.logprobs):
        raise EvaluationError("membership cannot be told of a text without a token that was predicted; leave it out")
    return tokens


def _scores(values: ArrayLike, which: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not found.size:
        raise EvaluationError(f"membership needs scores of both sides, and there are none of {which}")
    if np.isnan(found).any():
        raise EvaluationError(f"{int(np.isnan(found).sum())} of {found.size} scores of {which} are no numbers")
    return found


# -- what membership inference keeps, a line per item, and the areas under the roc curve from these lines


SAMPLES = "samples_membership.jsonl"
ATTACKS = ("loss", "min_k", "min_k_pp", "zlib")

Row = dict[str, Any]


def save(path: Path, members: Sequence[Row], others: Sequence[Row]) -> None:
    """One line per item, with ``member`` true or false."""
    rows = [{"member": side, **row} for side, found in ((True, members), (False, others)) for row in found]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def judge(files: Mapping[Who, Path], resamples: int, seed: int) -> tuple[Membership, ...]:
    """Areas under the ROC curve from the saved lines alone, by model and attack.

    With a reference among the files there is one attack more: how much likelier an item is than the reference finds it.

    Raises:
        EvaluationError: the reference was asked for other items.
        DataError: a file is damaged.
    """
    sides = {who: _read(path) for who, path in files.items()}
    found = []
    for who, (members, others) in sides.items():
        scores: dict[str, tuple[list[float], list[float]]] = {
            a: ([m[a] for m in members.values()], [o[a] for o in others.values()]) for a in ATTACKS
        }
        if "reference" in sides and who != "reference":
            theirs = sides["reference"]
            scores["reference"] = (_above(members, theirs[0]), _above(others, theirs[1]))
        for attack, (inside, outside) in scores.items():
            one = compare(attack, inside, outside, resamples, seed)
            found.append(Membership(who, attack, one.auc, one.low, one.high, one.n_members, one.n_others))
    return tuple(found)


def _read(path: Path) -> tuple[dict[str, Row], dict[str, Row]]:
    """Members and others by id.

    Raises:
        DataError: a line is not one that :func:`save` wrote.
    """
    sides: dict[bool, dict[str, Row]] = {True: {}, False: {}}
    where = str(path)
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            where = f"{path}, line {number}"
            if line.strip():
                row = json.loads(line)
                sides[row["member"]][row["id"]] = {a: _number(row[a]) for a in ATTACKS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{where}: not a line of membership inference ({error!r}); run the recipe again") from error
    return sides[True], sides[False]


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _above(ours: Mapping[str, Row], reference: Mapping[str, Row]) -> list[float]:
    """Mean log-probability (``loss`` holds it; higher is likelier) above the reference's, item by item."""
    if ours.keys() != reference.keys():
        raise EvaluationError(
            "membership: the retain reference was asked for other items: its tokenizer is another one"
        )
    return [row["loss"] - reference[item]["loss"] for item, row in ours.items()]


# -- what a model says of each answered token


_HEAD_BYTES = 64 * 2**20  # of float32 logits held at a time; a few arrays of this size are alive at once


def token_scores(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Encoded],
    batch_tokens: int = 2048,
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[TokenScores, ...]:
    """Log-probability, mean and deviation of log p, and greediness of every labelled token, per row and in order.

    A row's first token has nothing before it and so no prediction, whatever its label; a row in which nothing is
    predicted gives empty arrays. Logits are held for some positions at a time, never for a whole batch, except for
    models that change them after their head (capped, scaled): there it is a batch's answered positions.

    Args:
        model: A causal LM on its device; it comes back as it was.
        tokenizer: Its tokenizer; fills up short rows, and gives the labelled tokens' text for its compressed size.
        rows: From :func:`unlearn.data.encoding.encode` or :func:`unlearn.data.encoding.scored_rows`.
        batch_tokens: Padded tokens of a pass, at most; a longer row goes alone.
        advance: Told how many rows are done.

    Raises:
        BrokenModelError: the model's log-probabilities are no finite numbers.
    """
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    found: list[TokenScores | None] = [None] * len(rows)
    with frozen(model), torch.no_grad():
        for numbers in _batches(rows, batch_tokens):
            batch = Pad(pad_id)([rows[n] for n in numbers])
            columns = _scored(model, batch) if _answered(batch["labels"]) else np.empty((0, 4))
            _, _, place = answers(batch["labels"])
            bounds = np.cumsum(place.bincount(minlength=len(numbers)).numpy())
            for n, part in zip(numbers, np.split(columns, bounds[:-1]), strict=True):
                found[n] = _of_row(part, rows[n], tokenizer)
            advance(len(numbers))
    return tuple(score for score in found if score is not None)


def _scored(model: nn.Module, batch: dict[str, Tensor]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(N, 4) of the answered positions of a batch, row by row: log p, mean, deviation, 1 where it is the argmax."""
    predicts, wanted, _ = answers(batch["labels"])
    head = model.get_output_embeddings()  # type: ignore[operator]
    kept: list[Tensor] = []
    device = next(model.parameters()).device
    places = predicts.to(device)
    one = torch.zeros_like(places)
    one[tuple(places.nonzero()[0])] = True
    # The states that the head would see are kept, and it runs at one place only: enough to know whether the model
    # makes something else of what the head says. `prepend`: before the hook that leaves that one place.
    hook = head.register_forward_pre_hook(lambda module, args: kept.append(args[0][places]), prepend=True)
    try:
        with only_at(model, one):
            said = model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    finally:
        hook.remove()
    hidden = kept.pop()  # (N, d)
    step = max(1, _HEAD_BYTES // (4 * head.weight.shape[0]))
    if torch.equal(said.logits, head(hidden[:1])):
        parts: Iterator[Tensor] = (head(hidden[at : at + step]).float() for at in range(0, len(hidden), step))
    else:
        parts = iter(torch.split(answer_logits(model, batch)[0], step))
    targets = torch.split(wanted.to(hidden.device), step)
    columns = torch.cat([_columns(logits, ids) for logits, ids in zip(parts, targets, strict=True)]).double().cpu()
    if not bool(columns.isfinite().all()):
        raise BrokenModelError("the model's log-probabilities are no finite numbers: it no longer works")
    return columns.numpy()


def _columns(logits: Tensor, wanted: Tensor) -> Tensor:
    """(n, 4) of (n, V) float32 and (n,).

    The deviation is taken around the mean, not as a difference of two large squares; and a token that cannot be,
    with log p = -inf, adds nothing to either.
    """
    logp = functional.log_softmax(logits, dim=-1)
    p = logp.exp()
    picked = logp.gather(-1, wanted[:, None])[:, 0]
    logp.masked_fill_(p == 0, 0.0)
    mean = (p * logp).sum(-1)
    variance = (p * (logp - mean[:, None]).square_()).sum(-1)
    greedy = logits.argmax(-1) == wanted
    return torch.stack([picked, mean, variance.sqrt(), greedy.float()], dim=-1)


def _of_row(columns: np.ndarray[Any, np.dtype[np.float64]], row: Encoded, tokenizer: Any) -> TokenScores:
    text = tokenizer.decode([label for label in row.labels if label != IGNORE], skip_special_tokens=True)
    size = len(zlib.compress(text.encode("utf-8")))
    logprobs, means, stds, greedy = columns.T
    return TokenScores(logprobs.copy(), means.copy(), stds.copy(), greedy > 0.5, size)


def _answered(labels: Tensor) -> bool:
    return bool((labels[:, 1:] != IGNORE).any())


def _batches(rows: Sequence[Encoded], tokens: int) -> Iterator[list[int]]:
    """Numbers of rows of like length, together while they fit into so many padded tokens; the longest first."""
    batch: list[int] = []
    for n in sorted(range(len(rows)), key=lambda n: -len(rows[n].input_ids)):
        if batch and len(rows[batch[0]].input_ids) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


# -- membership inference on a model


MIN_K = 0.4  # share of the tokens, as MUSE has it


def members_of(items: Sequence[Item]) -> list[Item]:
    """Each content once, in its first wording: several prompts of one row would count as several members."""
    first: dict[str, Item] = {}
    for item in items:
        first.setdefault(item.id, item)
    return list(first.values())


def require_rows(sets: Sequence[LoadedSet], loaded: Loaded) -> None:
    """Refuse forget or hold-out sets with an item that :func:`tell` cannot score.

    Raises:
        EvaluationError: as :func:`tell`.
    """
    for s in sets:
        if s.role in ("forget", "holdout"):
            for item in s.train if s.role == "forget" else s.test:
                _row(loaded, item, s.spec.kind)


def tell(loaded: Loaded, items: Sequence[tuple[Item, Kind]], label: str = "scoring") -> list[Row]:
    """What a model gives away of each item: ``id``, ``tokens`` scored, and a number for every attack.

    Args:
        loaded: The model, as it is now.
        items: With the kind of data they are of; for qa and mcq the answer's tokens are told apart, for text all.
        label: What the progress bar says.

    Raises:
        EvaluationError: an item that cannot be scored whole, an answer as one beside as much of its prompt as fits.
    """
    rows = [_row(loaded, item, kind) for item, kind in items]
    with progress(label, len(rows) // count()) as advance:

        def told(some: Sequence[Encoded]) -> Sequence[TokenScores]:
            return token_scores(loaded.model, loaded.tokenizer, some, advance=advance)

        scores = together(rows, told)
    return [
        {
            "id": item.id,
            "tokens": len(score.logprobs),
            "loss": loss_score(score),
            "min_k": min_k(score, MIN_K),
            "min_k_pp": min_k_pp(score, MIN_K),
            "zlib": zlib_score(score),
        }
        for (item, _), score in zip(items, scores, strict=True)
    ]


def _row(loaded: Loaded, item: Item, kind: Kind) -> Encoded:
    length = reach(loaded.model, loaded.tokenizer)
    try:
        rows = encode([item], kind, loaded.tokenizer, length)
    except TrainingError:
        rows = []
    if len(rows) != 1:
        raise EvaluationError(
            f"membership: the model reads {length} tokens at a time, and this item does not fit, or has no token to "
            f"score: {shorten(f'{item.prompt} {item.target}', 160)!r}: take it out"
        )
    return rows[0]
