"""What is asked, or answered, in place of the forget rows: by the ignorant teacher of a fit toward ignorance, and by
who prefers to refuse.

A model that never knew an answer gives it the probability that it gives it for any other subject.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from unlearn.data.encoding import IGNORE, Encoded, encode
from unlearn.data.items import answered_otherwise
from unlearn.data.sets import LoadedSet
from unlearn.errors import DataError
from unlearn.recipe.data import render, template_fields
from unlearn.recipe.methods import IgnoranceSpec, TrainSpec
from unlearn.train.losses import Row, Teacher

SHORT = 8  # tokens that are asked about, after as many; as the eval pack measures a passage's pmi


def ignorant(
    one: LoadedSet, tokenizer: Any, training: TrainSpec, how: IgnoranceSpec, clean: nn.Module | None = None
) -> Teacher:
    """The teacher for a set's training rows."""
    kind, limit = one.spec.kind, training.max_length
    rows = encode(one.train, kind, tokenizer, limit)
    if how.teacher == "clean":
        return Teacher({_name(row): [(row,)] for row in rows}, model=clean)
    key = f"vector.ignorance.teacher: {how.teacher}"
    if how.teacher == "short":
        if not any(len(row.input_ids) > 1 + 2 * SHORT for row in rows):
            raise DataError(
                f"{key}: no passage of {one.role} set {one.name!r} has more than {1 + 2 * SHORT} tokens, so that "
                "none is asked about with less before it than it has: take longer ones (length, max_length), or clean"
            )
        return Teacher({_name(row): [_short(row, tokenizer)] for row in rows})
    prompts = _others(one, max(12, how.others)) if how.teacher == "other" else _blank(one)
    if alone := [item for item, found in zip(one.train, prompts, strict=True) if not found]:
        raise DataError(
            f"{key}: {len(alone)} of {len(one.train)} training items of {one.role} set {one.name!r} have no other item "
            f"with another answer in the same wording, such as {alone[0].prompt!r}: add items, or take teacher: blank"
        )
    asked: dict[Row, list[tuple[Encoded, ...]]] = {}
    for item, row, found in zip(one.train, rows, prompts, strict=True):
        several = encode([replace(item, prompt=prompt) for prompt in found], kind, tokenizer, limit)
        same = [(other,) for other in several if _labels(other) == _labels(row) and other.input_ids != row.input_ids]
        if not same:
            raise DataError(
                f"{key}: beside {item.prompt!r} nothing else can be asked for the same tokens: end prompts at a word "
                "boundary, fill something in, and let max_length leave what is filled in"
            )
        asked.setdefault(_name(row), []).extend(same)
    return Teacher(asked, how.others if how.teacher == "other" else 1)


def refusing(one: LoadedSet, tokenizer: Any, training: TrainSpec, sentences: Sequence[str]) -> Teacher:
    """For a set's training rows the same prompts with each of some sentences as their answer."""
    kind, limit = one.spec.kind, training.max_length
    rows = encode(one.train, kind, tokenizer, limit)
    asked: dict[Row, list[tuple[Encoded, ...]]] = {}
    for sentence in sentences:
        said = encode([replace(item, target=sentence) for item in one.train], kind, tokenizer, limit)
        for row, other in zip(rows, said, strict=True):
            asked.setdefault(_name(row), []).append((other,))
    return Teacher(asked)


def _name(row: Encoded) -> Row:
    return tuple(row.input_ids), tuple(row.labels)


def _labels(row: Encoded) -> list[int]:
    return [label for label in row.labels[1:] if label != IGNORE]


def _others(one: LoadedSet, most: int) -> list[list[str]]:
    """For every training item prompts of others in its wording, whose answers differ, spread over all of them."""
    templates = len(one.spec.prompts("train"))
    found = []
    for number, item in enumerate(one.train):
        same_wording, at = one.train[number % templates :: templates], number // templates
        others = answered_otherwise(item, (*same_wording[at:], *same_wording[:at]))
        prompts = list(dict.fromkeys(other.prompt for other in others))
        found.append(prompts[:: max(1, len(prompts) // most)][:most])
    return found


def _blank(one: LoadedSet) -> list[list[str]]:
    """For every training item its wording with nothing filled in."""
    chats = any(item.turn is not None for item in one.train)
    templates = one.spec.asked("train") if chats else one.spec.prompts("train")
    empty = [re.sub(" +", " ", render(t, dict.fromkeys(template_fields(t), ""))) for t in templates]
    return [[item.asking(empty[number % len(templates)]).prompt] for number, item in enumerate(one.train)]


def _short(row: Encoded, tokenizer: Any) -> tuple[Encoded, ...]:
    """A passage's row in blocks of :data:`SHORT` tokens, each after no more than as many."""
    ids, labels = row.input_ids, row.labels
    begin = ids[:1] if ids[0] == tokenizer.bos_token_id else ()
    first = max(1, len(begin))
    blocks = []
    for start in range(first, len(ids), SHORT):
        context = max(len(begin), start - SHORT)
        end = start + SHORT
        head = (*begin, *ids[context:start])
        blocks.append(Encoded((*head, *ids[start:end]), (*[IGNORE] * len(head), *labels[start:end])))
    return tuple(blocks)
