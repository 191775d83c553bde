"""Membership inference: can one tell, from a model's token probabilities, which texts it was trained on?

Every attack gives a text one number, and higher always means "more likely a member". How well it tells members from
others is the area under the ROC curve: .5 is a coin, 1 tells all of them apart, and below .5 members look *less* known
than others, which gives a forget set away as well.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional

from unlearn.console import is_main_process, progress
from unlearn.data.encoding import IGNORE, Encoded, encode, reach
from unlearn.data.items import Item
from unlearn.data.sets import LoadedSet
from unlearn.errors import BrokenModelError, DataError, EvaluationError, TrainingError
from unlearn.evidence.reference import Subjects
from unlearn.model.load import Loaded
from unlearn.processes import count, together
from unlearn.recipe.data import Kind
from unlearn.results import Membership, Who
from unlearn.score.scorer import Questions
from unlearn.store.files import write_text_atomic
from unlearn.store.stages import Store
from unlearn.text import shorten
from unlearn.train.batches import Pad, grouped
from unlearn.train.losses import answer_logits, frozen

SAMPLES = "samples_membership.jsonl"
MIN_K = 0.4  # share of the tokens, as MUSE has it
_TOKENS = 2048  # of a padded pass
_LOGITS = 100 * 2**20  # of a padded pass at most, and of those ...
_AT_ONCE = 16 * 2**20  # ... so many are turned into probabilities at a time

Floats = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True, eq=False, slots=True)
class TokenScores:
    """What a model says of the answered tokens of one text, each after the true tokens before it; (N,) arrays.

    ``means`` and ``stds`` are the mean and standard deviation of log p over the vocabulary under the model's own
    distribution p at each place; log-probabilities are in nats. ``zlib_bytes`` is the size of the text, compressed.
    """

    logprobs: Floats
    means: Floats
    stds: Floats
    zlib_bytes: int


# -- attacks on one text


def loss_score(tokens: TokenScores) -> float:
    """Mean log-probability of the tokens: the loss attack (Yeom et al. 1709.01604)."""
    return float(tokens.logprobs.mean())


def min_k(tokens: TokenScores, k: float = MIN_K) -> float:
    """Mean of the share ``k`` of lowest log-probabilities (Min-K% Prob, 2310.16789).

    Their number is rounded down, as the authors do, but is at least one.
    """
    return _lowest(tokens.logprobs, k)


def min_k_pp(tokens: TokenScores, k: float = MIN_K) -> float:
    """:func:`min_k` of (log p - mean) / std, how each token stands among all that could be there (2404.02936).

    Where all tokens are equally likely, the deviation is 0 and so is this.
    """
    off = tokens.logprobs - tokens.means
    return _lowest(np.divide(off, tokens.stds, out=np.zeros_like(off), where=tokens.stds > 0), k)


def zlib_score(tokens: TokenScores) -> float:
    """Mean log-probability per byte of the compressed text (Carlini et al. 2012.07805), as in Min-K%'s and MUSE's code.

    Dull texts are likely whether they were trained on or not; they also compress well.
    """
    return loss_score(tokens) / tokens.zlib_bytes


def _lowest(values: Floats, k: float) -> float:
    size = max(int(len(values) * k), 1)
    return float(np.partition(values, size - 1)[:size].mean())


ATTACKS: Mapping[str, Callable[[TokenScores], float]] = {
    "loss": loss_score,
    "min_k": min_k,
    "min_k_pp": min_k_pp,
    "zlib": zlib_score,
}


# -- how well scores tell members from others


def auc(members: ArrayLike, others: ArrayLike) -> float:
    """Probability that one of the (M,) members scores higher than one of the (N,) others, ties counted half."""
    high, low = _scores(members, "members"), np.sort(_scores(others, "others"))
    twice = np.searchsorted(low, high, "left").sum() + np.searchsorted(low, high, "right").sum()
    return float(twice) / (2 * len(high) * len(low))


def auc_interval(members: ArrayLike, others: ArrayLike, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of :func:`auc`: percentiles of a bootstrap that draws members and others apart.

    The draws depend on ``seed`` and the numbers of scores alone, so that attacks on the same texts share them. Where
    the two sides do not overlap, no resample can either, and the interval is that one value: read it with the counts.
    """
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


def _scores(values: ArrayLike, which: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if not found.size:
        raise EvaluationError(f"membership needs scores of both sides, and there are none of {which}")
    if np.isnan(found).any():
        raise EvaluationError(f"{int(np.isnan(found).sum())} of {found.size} scores of {which} are no numbers")
    return found


# -- a line for each item, and areas from these lines alone


def save(path: Path, members: Sequence[Row], others: Sequence[Row]) -> None:
    """One line per item, with ``member`` true or false."""
    rows = [{"member": side, **row} for side, found in ((True, members), (False, others)) for row in found]
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def areas(files: Mapping[Who, Path], resamples: int, seed: int) -> tuple[Membership, ...]:
    """Areas under the ROC curve from the saved lines, by model and attack.

    With a reference among the files there is one attack more: how much likelier an item is than the reference finds it.
    """
    sides = {who: _read(path) for who, path in files.items()}
    found = []
    for who, (members, others) in sides.items():
        scores = {name: tuple([row[name] for row in side.values()] for side in (members, others)) for name in ATTACKS}
        if "reference" in sides and who != "reference":
            pairs = zip((members, others), sides["reference"], strict=True)
            scores["reference"] = tuple(_above(ours, theirs) for ours, theirs in pairs)
        for name, (inside, outside) in scores.items():
            low, high = auc_interval(inside, outside, resamples, seed)
            found.append(Membership(who, name, auc(inside, outside), low, high, len(inside), len(outside)))
    return tuple(found)


def _read(path: Path) -> tuple[dict[str, Row], dict[str, Row]]:
    """Members and others by id."""
    sides: dict[bool, dict[str, Row]] = {True: {}, False: {}}
    where = str(path)
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            where = f"{path}, line {number}"
            if line.strip():
                row = json.loads(line)
                sides[row["member"]][row["id"]] = {name: row[name] + 0.0 for name in ATTACKS}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise DataError(f"{where}: not a line of membership inference ({error!r}); run the recipe again") from error
    return sides[True], sides[False]


def _above(ours: Mapping[str, Row], reference: Mapping[str, Row]) -> list[float]:
    """Mean log-probability (``loss`` holds it; higher is likelier) above the reference's, item by item."""
    if ours.keys() != reference.keys():
        raise EvaluationError(
            "membership: the retain reference was asked for other items: its tokenizer is another one"
        )
    return [row["loss"] - reference[item]["loss"] for item, row in ours.items()]


# -- what a model gives away of items


def infer_membership(subjects: Subjects, questions: Questions, store: Store) -> tuple[Membership, ...]:
    """Whether the forget sets' training items can be told from held-out ones, by model and attack."""
    recipe = questions.recipe
    others = next(s for s in questions.sets if s.role == "holdout")
    forgotten = [s for s in questions.sets if s.role == "forget"]
    members = [(item, s.spec.kind) for s in forgotten for item in members_of(s.train)]
    held = [(item, others.spec.kind) for item in members_of(others.test)]

    def score(loaded: Loaded, who: Who, tmp: Path) -> None:
        rows = [score_items(loaded, items, who) for items in (members, held)]
        if is_main_process():
            save(tmp / SAMPLES, *rows)

    data = [*(s.digest for s in forgotten), others.digest]
    places = subjects.each("membership", [data], store, score)
    return areas({who: place / SAMPLES for who, place in places.items()}, recipe.eval.bootstrap, recipe.seed)


def members_of(items: Sequence[Item]) -> list[Item]:
    """Each content once, in its first wording: several prompts of one row would count as several members."""
    return list({item.id: item for item in reversed(items)}.values())[::-1]


def require_rows(sets: Sequence[LoadedSet], loaded: Loaded) -> None:
    """Refuse forget or hold-out sets with an item that :func:`score_items` cannot score."""
    for s in sets:
        if s.role in ("forget", "holdout"):
            for item in s.train if s.role == "forget" else s.test:
                _row(loaded, item, s.spec.kind)


def score_items(loaded: Loaded, items: Sequence[tuple[Item, Kind]], label: str = "scoring") -> list[Row]:
    """Of each item ``id``, ``tokens`` scored, and a number for every attack: for qa and mcq of the answer's tokens."""
    rows = [_row(loaded, item, kind) for item, kind in items]
    with progress(label, len(rows) // count()) as advance:
        scores = together(rows, partial(token_scores, loaded.model, loaded.tokenizer, advance=advance))
    return [
        {"id": item.id, "tokens": len(one.logprobs), **{name: attack(one) for name, attack in ATTACKS.items()}}
        for (item, _), one in zip(items, scores, strict=True)
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


def token_scores(
    model: nn.Module, tokenizer: Any, rows: Sequence[Encoded], advance: Callable[[int], None] = lambda n: None
) -> tuple[TokenScores, ...]:
    """Log-probability, mean and deviation of log p of every labelled token, per row and in order.

    A row's first token has nothing before it and so no prediction, whatever its label; a row in which nothing is
    predicted gives empty arrays. The model comes back as it was; ``advance`` is told how many more rows are done.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    found: dict[int, TokenScores] = {}
    with frozen(model), torch.no_grad():
        longest_first = sorted(range(len(rows)), key=lambda n: -len(rows[n].input_ids))
        most = min(_TOKENS, _LOGITS // vocabulary)
        for numbers in grouped(longest_first, most, lambda found: len(found) * len(rows[found[0]].input_ids)):
            logits, wanted, place = answer_logits(model, Pad(tokenizer.pad_token_id)([rows[n] for n in numbers]))
            step = max(1, _AT_ONCE // vocabulary)
            parts = zip(torch.split(logits, step), torch.split(wanted, step), strict=True)
            columns = torch.cat([_columns(some, tokens) for some, tokens in parts]).double().cpu()
            if not bool(columns.isfinite().all()):
                raise BrokenModelError("the model's log-probabilities are no finite numbers: it no longer works")
            sizes = place.bincount(minlength=len(numbers)).tolist()
            for n, part in zip(numbers, torch.split(columns, sizes), strict=True):
                logprobs, means, stds = (column.numpy().copy() for column in part.T)
                answer = [label for label in rows[n].labels if label != IGNORE]
                text = tokenizer.decode(answer, skip_special_tokens=True)
                found[n] = TokenScores(logprobs, means, stds, len(zlib.compress(text.encode("utf-8"))))
            advance(len(numbers))
    return tuple(found[n] for n in range(len(rows)))


def _columns(logits: Tensor, wanted: Tensor) -> Tensor:
    """(n, 3) of (n, V) float32 and (n,): log p of the token, mean and deviation of log p.

    The deviation is taken around the mean, not as a difference of two large squares; and a token that cannot be,
    with log p = -inf, adds nothing to either.
    """
    logp = functional.log_softmax(logits, dim=-1)
    p = logp.exp()
    picked = logp.gather(-1, wanted[:, None])[:, 0]
    logp.masked_fill_(p == 0, 0.0)
    mean = (p * logp).sum(-1)
    variance = (p * (logp - mean[:, None]).square_()).sum(-1)
    return torch.stack([picked, mean, variance.sqrt()], dim=-1)
