"""A recipe's items as files for lm-eval, with token counts as lm-eval itself will count them."""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlearn.data import Item, LoadedSet
from unlearn.encoding import count_tokens
from unlearn.errors import EvaluationError, RunFolderError
from unlearn.readers import shorten
from unlearn.recipe import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MEMORY_TOKENS = 32  # pieces per passage; the pack's own default as well
EVALUATED: tuple[Split, ...] = ("validation", "test")


def items_path(folder: Path, loaded: LoadedSet, split: Split) -> Path:
    """``<role>.<name>.<split>.jsonl`` in ``folder``."""
    return folder / f"{loaded.role}.{loaded.name}.{split}.jsonl"


def write_items(
    sets: Sequence[LoadedSet],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    splits: Sequence[Split] = EVALUATED,
    written: Collection[Split] = (),
) -> tuple[Path, ...]:
    """Write one JSON-lines file for each set and split that has items.

    Args:
        sets: The recipe's data.
        tokenizer: The one of the model that will be scored; counts and pieces are in its tokens.
        folder: Where to write; made when missing.
        splits: Which splits.
        written: Those of them for which texts are to be written and compared word by word.

    Returns:
        The files, in order. One that is there already with this content is not touched.

    Raises:
        EvaluationError: an answer has no tokens of its own, or no word that a written text could be compared with.
        RunFolderError: a file cannot be written.
    """
    paths = []
    for loaded in sets:
        for split in splits:
            items = loaded.items(split)
            if not items:
                continue
            path = items_path(folder, loaded, split)
            rows = list(_rows(loaded, items, tokenizer))
            if split in written and loaded.spec.kind != "mcq" and loaded.role != "holdout":
                _check_words(loaded, rows)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            try:
                if not path.is_file() or path.read_text(encoding="utf-8") != text:  # a finished file is left alone
                    folder.mkdir(parents=True, exist_ok=True)
                    path.write_text(text, encoding="utf-8")
            except OSError as error:
                raise RunFolderError(f"cannot write the items {path}: {error}") from error
            paths.append(path)
    return tuple(paths)


def at_prefixes(sets: Sequence[LoadedSet], tokenizer: PreTrainedTokenizerFast) -> tuple[LoadedSet, ...]:
    """The sets, and each set of passages once more for each of its ``prefixes``, as ``name@prefix``, test items only.

    The passages are the same; only the place moves where the given part ends.
    """
    found = list(sets)
    for loaded in sets:
        for prefix in loaded.spec.prefixes:
            items = tuple(_moved(tokenizer, item, prefix) for item in loaded.test)
            name, spec = f"{loaded.name}@{prefix}", loaded.spec.model_copy(update={"prefix": prefix, "prefixes": ()})
            found.append(replace(loaded, name=name, spec=spec, train=(), validation=(), test=items))
    return tuple(found)


def _moved(tokenizer: PreTrainedTokenizerFast, item: Item, prefix: int) -> Item:
    text = item.prompt + item.target
    ends = [end for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    if len(ends) <= prefix:
        raise EvaluationError(f"prefixes: a passage has {len(ends)} tokens, so none is left after {prefix}")
    return replace(item, prompt=text[: ends[prefix - 1]], target=text[ends[prefix - 1] :])


def _rows(loaded: LoadedSet, items: Sequence[Item], tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, Any]]:
    kind = loaded.spec.kind
    for item in items:
        row: dict[str, Any] = {"id": item.id, "prompt": item.prompt, "target": item.target}
        if kind == "mcq":
            counts = [count_tokens(tokenizer, item.prompt, " " + choice) for choice in item.choices]
            row |= {"choices": list(item.choices), "answer": item.answer, "choice_tokens": counts}
        elif kind == "qa":
            counts = [count_tokens(tokenizer, item.prompt, " " + item.target)]
            row |= {"target_tokens": counts[0], **_beginning(tokenizer, item, " ", loaded.spec.continuation)}
        else:
            counts = [count_tokens(tokenizer, item.prompt, item.target)]
            row |= {"target_tokens": counts[0], **_pieces(tokenizer, item)}
            row |= _beginning(tokenizer, item, "", loaded.spec.continuation)
        if min(counts) < 1:
            raise EvaluationError(
                f"{loaded.role} set {loaded.name!r}, item {item.id}: this tokenizer merges the answer into the prompt, "
                f"so that no token is left to score; end the prompt at a word boundary"
            )
        yield row


def _check_words(loaded: LoadedSet, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what no written text could be compared with: its ROUGE would be 0 whatever the model knows."""
    texts = [row["continuation"] for row in rows]
    wordless = [text for text in texts if not any(map(str.isalnum, unicodedata.normalize("NFKC", text)))]
    if wordless:
        raise EvaluationError(
            f"{loaded.role} set {loaded.name!r}: {len(wordless)} of {len(rows)} answers have no letter and no digit, "
            f"such as {shorten(wordless[0])!r}, so that ROUGE has no words to compare: take these rows out, or set "
            "eval.generate to none (and robustness.samples to 0)"
        )


def _tokens(tokenizer: PreTrainedTokenizerFast, text: str, start: int) -> tuple[list[int], list[int], int]:
    """Ids of a text's tokens, where each ends, and which is the first to end behind ``start``."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), ends, next((k for k, end in enumerate(ends) if end > start), len(ends))


def _beginning(tokenizer: PreTrainedTokenizerFast, item: Item, space: str, generated: int) -> dict[str, str]:
    """``continuation``: what ROUGE-L compares with a text of so many tokens, which is no more of the target."""
    text = item.prompt + space + item.target
    _, ends, first = _tokens(tokenizer, text, len(item.prompt))
    last = first + generated - 1
    return {"continuation": text[len(item.prompt) + len(space) : ends[last]] if last < len(ends) else item.target}


def _pieces(tokenizer: PreTrainedTokenizerFast, item: Item) -> dict[str, list[str]]:
    """``pieces``, to be recited one by one: the target cut where a text cut there encodes to the same tokens.

    Only then is one piece one token of the whole. Not every token boundary is such a place: one character may be
    several tokens, a prefix may encode otherwise when nothing follows it, and lm-eval moves white space before a cut to
    behind it.
    """
    text, start = item.prompt + item.target, len(item.prompt)
    ids, ends, first = _tokens(tokenizer, text, start)
    end_of_window = first + 2 * MEMORY_TOKENS
    window = range(first, min(len(ids), end_of_window))
    places = [k for k in window if start < ends[k] < len(text) and not text[ends[k] - 1].isspace()]
    heads = [text[: ends[k]] for k in places]
    encodings = tokenizer(heads, add_special_tokens=False)["input_ids"] if heads else []
    cuts = [start]
    for k, encoding in zip(places, encodings, strict=True):
        if ends[k] > cuts[-1] and list(encoding) == ids[: k + 1]:
            cuts.append(ends[k])
    if end_of_window >= len(ids) or len(cuts) == 1:
        cuts.append(len(text))  # what is left of a short target, or all of one that can be cut nowhere
    return {"pieces": [text[a:b] for a, b in itertools.pairwise(cuts)][:MEMORY_TOKENS]}
