"""How a prompt and its answer become tokens: one rule for what is trained on, measured and scored.

The rule is lm-eval's (``TemplateLM._encode_pair`` with ``HFLM.tok_encode``), because lm-eval gives the scores.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.data.items import Item
from unlearn.errors import EvaluationError, TrainingError
from unlearn.recipe.data import Kind
from unlearn.text import shorten

IGNORE = -100  # label of tokens without loss


@dataclass(frozen=True)
class Encoded:
    """One training row: token ids and, per token, the label or :data:`IGNORE`.

    ``cut`` counts the tokens at the beginning of the prompt that there was no room for; ``piece`` is the row's number,
    from 0, among those of a passage that has several.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    cut: int = 0
    piece: int = 0


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens, with those that the tokenizer adds, unless it begins with the beginning token's own text."""
    first = _first(tokenizer)
    begun = first is not None and text.startswith(tokenizer.decode(first))
    ids: list[int] = tokenizer.encode(text, **({"add_special_tokens": False} if begun else {}))
    return ids


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """The tokens of what is read and of what follows it: those of the whole, less as many as the first alone has.

    White space at the context's end counts with the continuation, because that is where its tokens merge. Without a
    context there is the beginning token, or, where the tokenizer has none, the end token.
    """
    if not context:
        ids: list[int] = tokenizer.encode(continuation, add_special_tokens=False)
        first = _first(tokenizer)
        if first is None:
            return [], ids
        return (ids[:1], ids[1:]) if ids[:1] == [first] else ([first], ids)
    before = encode_text(tokenizer, context.rstrip())
    return before, encode_text(tokenizer, context + continuation)[len(before) :]


def encode_item(tokenizer: Any, item: Item, kind: Kind, ending: str = "") -> tuple[list[int], list[int]]:
    """:func:`encode_pair` of an item: an answer follows its prompt after one space, a passage just goes on.

    In a chat template the answer's tokens are those that the prompt alone has not: white space before it, which
    lm-eval's split counts with what follows, stays the template's.
    """
    if item.turn is None:
        return encode_pair(tokenizer, item.prompt, item.target if kind == "text" else f" {item.target}")
    before = encode_text(tokenizer, item.prompt)
    whole = encode_text(tokenizer, item.prompt + item.turn.joint + item.target + ending)
    same = next((n for n, (one, other) in enumerate(zip(before, whole, strict=False)) if one != other), len(before))
    return whole[:same], whole[same:]


def encode(items: Sequence[Item], kind: Kind, tokenizer: Any, max_length: int) -> list[Encoded]:
    """Rows to train on: a text is learned whole; of qa and mcq only the answer carries loss, of qa with its end token,
    in a chat template with what ends the answer there.

    No answer is cut. A prompt that does not fit into ``max_length`` beside its answer loses its beginning, and the row
    says how many tokens of it. A longer passage becomes several rows of like length, each of which begins with the last
    token of the one before, so that every token is learned once. A beginning token stays at every row's beginning.
    """
    rows: list[Encoded] = []
    long: list[tuple[int, Item]] = []
    empty: list[Item] = []
    for item in items:
        ending = item.turn.ending if item.turn is not None else ""
        context, continuation = encode_item(tokenizer, item, kind, ending)
        begin = [i for i in context[:1] if i == tokenizer.bos_token_id]
        if len(context) + len(continuation) < 2 if kind == "text" else not continuation:
            empty.append(item)
            continue
        if kind == "qa" and not ending and continuation[-1] != tokenizer.eos_token_id:
            continuation.append(tokenizer.eos_token_id)
        needed = 2 + len(begin) if kind == "text" else 1 + len(continuation)
        if needed > max_length and len(context) + len(continuation) > max_length:
            long.append((needed, item))
        elif kind == "text":
            rows += _pieces([*context, *continuation], max_length, begin)
        else:
            rows.append(_fitted(context, continuation, max_length, begin))
    if empty:
        raise TrainingError(
            f"{len(empty)} of {len(items)} items have no token to learn, such as {_shown(empty[0])}: take them out, or "
            "end the prompt at a word boundary"
        )
    if long:
        needed, item = max(long, key=lambda pair: pair[0])
        raise TrainingError(
            f"{len(long)} of {len(items)} answers do not fit into max_length ({max_length} tokens), and half an answer "
            f"is not learned: raise max_length to {needed}, or take them out. The longest is of {_shown(item)}"
        )
    return rows


def scored_rows(items: Sequence[Item], kind: Kind, tokenizer: Any, max_length: int) -> list[Encoded]:
    """Tokens with labels exactly where the sweep scores: on the right answer, or on a passage after its beginning.

    Unlike the rows of :func:`encode` these have no end token after an answer, and what does not fit is cut from the
    left, as lm-eval cuts it.

    Args:
        max_length: Tokens that the model can read at a time.
    """
    rows = []
    for item in items:
        context, continuation = encode_item(tokenizer, item, kind)
        if not context or not 0 < len(continuation) < max_length:
            raise EvaluationError(
                f"an answer of {len(continuation)} tokens after a prompt of {len(context)} cannot be scored by a model "
                f"that reads {max_length} at a time: {_shown(item)}"
            )
        labels = (*[IGNORE] * len(context), *continuation)
        rows.append(Encoded((*context, *continuation)[-max_length:], labels[-max_length:]))
    return rows


def spaces_before(items: Sequence[Item], tokenizer: Any) -> list[Encoded]:
    """The white space that a chat template has before each answer, labelled: it is scored, and not trained on."""
    rows = []
    for item in items:
        whole, spaces = encode_pair(tokenizer, item.prompt, "") if item.turn is not None else ([], [])
        if spaces:
            rows.append(Encoded((*whole, *spaces), (*[IGNORE] * len(whole), *spaces)))
    return rows


def cuts(rows: Sequence[Encoded]) -> dict[str, int]:
    """What of rows to train on did not fit: ``prompts_cut``, ``passages_split``; nothing where all of them did."""
    found = {"prompts_cut": sum(row.cut > 0 for row in rows), "passages_split": sum(row.piece == 1 for row in rows)}
    return {name: count for name, count in found.items() if count}


def reach(model: Any, tokenizer: Any) -> int:
    """Tokens that a model reads at a time, as lm-eval has it."""
    from lm_eval.models.utils import resolve_max_length

    return int(resolve_max_length(model.config, tokenizer))


def _first(tokenizer: Any) -> int | None:
    """The token that lm-eval puts before a text that has nothing before it."""
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)


def _fitted(context: list[int], continuation: list[int], max_length: int, begin: list[int]) -> Encoded:
    """A prompt, as much of it as there is room for, and its answer."""
    room = max_length - len(continuation)
    kept = context if len(context) <= room else [*begin, *context[len(context) - room + len(begin) :]]
    labels = (*[IGNORE] * max(1, len(kept)), *continuation[0 if kept else 1 :])
    return Encoded((*kept, *continuation), labels, cut=len(context) - len(kept))


def _pieces(ids: list[int], max_length: int, begin: list[int]) -> list[Encoded]:
    """A passage in as few rows as hold it."""
    learned = len(ids) - 1  # the first token has nothing before it
    count = 1 if len(ids) <= max_length else math.ceil(learned / (max_length - 1 - len(begin)))
    ends = [1 + learned * k // count for k in range(count + 1)]
    rows = []
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        before = ids[:1] if number == 0 else [*begin, ids[start - 1]]
        rows.append(Encoded((*before, *ids[start:end]), (*[IGNORE] * len(before), *ids[start:end]), piece=number))
    return rows


def _shown(item: Item) -> str:
    return repr(shorten(f"{item.prompt} {item.target}", 160))
