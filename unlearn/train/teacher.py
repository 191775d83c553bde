"""The ignorant teacher of a fit toward ignorance: what is asked in place of the forget rows, and who.

A model that never knew an answer gives it the probability that it gives it for any other subject.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from unlearn.data.encoding import IGNORE, Encoded, encode
from unlearn.data.items import Item, normalise
from unlearn.data.sets import LoadedSet
from unlearn.errors import DataError, TrainingError
from unlearn.recipe.data import render, template_fields
from unlearn.recipe.methods import IgnoranceSpec, TrainSpec
from unlearn.train.losses import Teacher

SHORT = 8  # tokens that are asked about, after as many; as the eval pack measures a passage's pmi

Asked = Mapping[tuple[int, ...], Sequence[tuple[Encoded, ...]]]


def ignorant(
    one: LoadedSet, tokenizer: Any, training: TrainSpec, how: IgnoranceSpec, clean: nn.Module | None = None
) -> Teacher:
    """The teacher for a set's training rows.

    Raises:
        DataError: the set has no such prompts: too few items, or all with one answer.
    """
    if how.teacher == "clean":
        rows = encode(one.train, one.spec.kind, tokenizer, training.max_length)
        return Teacher({row.input_ids: [(row,)] for row in rows}, model=clean)
    key = f"vector.ignorance.teacher: {how.teacher}"
    if how.teacher == "short":
        return Teacher({row.input_ids: [_short(row, tokenizer)] for row in _rows(one.train, one, tokenizer, training)})
    prompts = _others(one) if how.teacher == "other" else _blank(one)
    if alone := [item for item, found in zip(one.train, prompts, strict=True) if not found]:
        raise DataError(
            f"{key}: {len(alone)} of {len(one.train)} training items of {one.role} set {one.name!r} have no other item "
            f"with another answer in the same wording, such as {alone[0].prompt!r}: add items, or take teacher: blank"
        )
    asked: dict[tuple[int, ...], list[tuple[Encoded, ...]]] = {}
    for item, row, found in zip(one.train, _rows(one.train, one, tokenizer, training), prompts, strict=True):
        several = _rows([replace(item, prompt=prompt) for prompt in found], one, tokenizer, training)
        same = [(other,) for other in several if _labels(other) == _labels(row)]
        if not same:
            raise DataError(
                f"{key}: the answer of {item.prompt!r} becomes other tokens after other prompts; end prompts at a word "
                "boundary"
            )
        asked.setdefault(row.input_ids, []).extend(same)
    return Teacher(asked, how.others if how.teacher == "other" else 1)


def _rows(items: Sequence[Item], one: LoadedSet, tokenizer: Any, training: TrainSpec) -> list[Encoded]:
    try:
        return encode(items, one.spec.kind, tokenizer, training.max_length)
    except TrainingError as error:
        raise TrainingError(f"{one.role} set {one.name!r}: {error}") from error


def _labels(row: Encoded) -> list[int]:
    return [label for label in row.labels[1:] if label != IGNORE]


def _others(one: LoadedSet, most: int = 12) -> list[list[str]]:
    """For every training item prompts of others in its wording, whose answers differ, spread over all of them."""
    templates = len(one.spec.prompts("train"))
    found = []
    for number, item in enumerate(one.train):
        same_wording = one.train[number % templates :: templates]
        at, target = number // templates, normalise(item.target)
        others = [o.prompt for o in (*same_wording[at:], *same_wording[:at]) if normalise(o.target) != target]
        others = [prompt for prompt in dict.fromkeys(others) if prompt != item.prompt]
        step = max(1, len(others) // most)
        found.append(others[::step][:most])
    return found


def _blank(one: LoadedSet) -> list[list[str]]:
    """For every training item its wording with nothing filled in."""
    templates = one.spec.prompts("train")
    empty = [re.sub(" +", " ", render(t, dict.fromkeys(template_fields(t), ""))) for t in templates]
    return [[empty[number % len(templates)]] for number in range(len(one.train))]


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
