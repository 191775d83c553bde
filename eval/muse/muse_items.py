"""The items of MUSE (Shi et al., arXiv 2407.06460), News and Books, for lm-eval; this folder works by itself.

    lm_eval --model hf --model_args pretrained=DIR --include_path eval --tasks muse_books \
        --metadata '{"muse": "FOLDER"}'

Metadata, all optional:
    muse: A folder laid out like the authors' data: ``<corpus>/verbmem/forget.json``; ``<corpus>/knowmem/`` with
        ``forget_qa.json``, ``forget_qa_icl.json``, ``retain_qa.json``, ``retain_qa_icl.json``; ``<corpus>/privleak/``
        with ``forget.json``, ``holdout.json``, ``retain.json``. Without it the hub's muse-bench/MUSE-News and -Books.
    items: Only the first so many rows of everything, or an object with a number for each of ``verbmem_forget``,
        ``knowmem_forget``, ``knowmem_retain``, ``privleak_forget``, ``privleak_holdout`` and ``privleak_retain``.
    tokenizer: Folder or name, to cut texts into tokens; without it ``pretrained``, which lm-eval's command line takes
        over from ``--model_args``. Not needed for knowmem.
    max_tokens: Tokens generated at most, and for verbmem compared.
    passage_tokens: Only the first so many tokens of every privleak passage; all of them without it, as in the paper.
"""

from __future__ import annotations

import functools
import itertools
import json
import zlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

HUB = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
_FIELDS = {"verbmem": ("prompt", "gt"), "knowmem": ("question", "answer"), "privleak": ("text",)}
_PARTS = {"verbmem_forget", "knowmem_forget", "knowmem_retain"}
_PARTS |= {"privleak_forget", "privleak_holdout", "privleak_retain"}
_AT_ONCE = 64  # beginnings of a passage that are encoded together

Row = dict[str, Any]


def load_items(
    corpus: str,
    kind: str,
    split: str,
    muse: str | None = None,
    items: int | Mapping[str, int] | None = None,
    **metadata: Any,
) -> dict[str, datasets.Dataset]:
    """Read one part of MUSE; lm-eval calls this with the task's metadata and ``dataset_kwargs``.

    Args:
        corpus: ``news`` or ``books``.
        kind: ``verbmem``, ``knowmem`` or ``privleak``.
        split: ``forget``, ``retain`` or ``holdout``.
        muse, items: metadata, see the top of this file; the other metadata go where they are needed.

    Returns:
        A data set in memory under ``test``: ``id`` (row number from 0), ``prompt`` and ``target``; for ``privleak`` the
        passage is the target, and ``pieces``, ``piece_tokens`` and ``zlib_bytes`` say how it is scored.
    """
    import datasets

    where, rows, examples = read_rows(corpus, kind, split, muse, items)
    if kind == "verbmem":
        found = _recited(rows, load_tokenizer(metadata), _whole(metadata, "max_tokens"))
    elif kind == "knowmem":
        found = _questions(rows, examples)
    else:
        limit = _whole(metadata, "passage_tokens") if metadata.get("passage_tokens") is not None else None
        tokenizer = load_tokenizer(metadata)
        found = [passage(tokenizer, row["text"], f"{where}, row {n}", limit) for n, row in enumerate(rows, 1)]
    return {"test": datasets.Dataset.from_list([{"id": str(n), **row} for n, row in enumerate(found)])}


def read_rows(
    corpus: str, kind: str, split: str, muse: str | None = None, items: int | Mapping[str, int] | None = None
) -> tuple[str, list[Row], list[Row]]:
    """Where one part's rows are from, the rows that are used, and the solved examples of ``knowmem``.

    Nothing is tokenized, and for a local folder nothing but the standard library is needed: a quick check.
    """
    folder = Path(muse).expanduser() if muse else None
    name = f"{split}_qa" if kind == "knowmem" else split
    where, rows = _read(folder, corpus, kind, name)
    if isinstance(items, Mapping):
        if unknown := sorted(set(items) - _PARTS):
            raise ValueError(f"metadata items names {unknown[0]!r}; MUSE's parts are {', '.join(sorted(_PARTS))}")
        items = items.get(f"{kind}_{split}")
    if items is not None and (type(items) is not int or items < 1):
        raise ValueError(f"metadata items is {items!r}; it must be a whole number, 1 or more")
    if items is not None and items > len(rows):
        raise ValueError(f"{where} has {len(rows)} rows, fewer than the {items} of metadata items")
    return where, rows[:items], _read(folder, corpus, kind, f"{name}_icl")[1] if kind == "knowmem" else []


def _read(folder: Path | None, corpus: str, kind: str, name: str) -> tuple[str, list[Row]]:
    """Where the rows are from, and the rows, checked."""
    where, found = _local(folder, corpus, kind, name) if folder else _hub(corpus, kind, name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where} has no rows: there is nothing to score")
    rows: list[Row] = [{"text": row} if kind == "privleak" and isinstance(row, str) else row for row in found]
    for number, row in enumerate(rows, 1):
        for field in _FIELDS[kind]:
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"{where}, row {number}: {field!r} is missing or empty")
    return where, rows


def _local(folder: Path, corpus: str, kind: str, name: str) -> tuple[str, Any]:
    path = folder / corpus / kind / f"{name}.json"
    if not path.is_file():
        names = sorted(one.name for one in path.parent.glob("*.json"))
        meant = f"; did you mean {near[0]}?" if (near := get_close_matches(path.name, names, n=1)) else ""
        raise ValueError(f"{path}: no such file{meant} (metadata muse names a folder laid out like MUSE's own data)")
    try:
        return str(path), json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def _hub(corpus: str, kind: str, name: str) -> tuple[str, Any]:
    import datasets

    where = f"{HUB[corpus]}, {kind}, {name}"
    try:
        return where, list(datasets.load_dataset(HUB[corpus], kind, split=name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{where}, cannot be had from the hub ({type(error).__name__}: {error}); with its files in a folder: "
            f'--metadata \'{{"muse": "FOLDER"}}\''
        ) from error


def _whole(metadata: Mapping[str, Any], name: str) -> int:
    value = metadata[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"metadata {name} is {value!r}; it must be a whole number, 1 or more")
    return value


def _recited(rows: Sequence[Row], tokenizer: Any, tokens: int) -> list[Row]:
    """Beginnings, and as much of what follows as is generated, in tokens as the authors count them."""
    found = []
    for row in rows:
        ids = tokenizer.encode(row["gt"])[:tokens]
        found.append({"prompt": row["prompt"], "target": tokenizer.decode(ids, skip_special_tokens=True)})
    return found


def _questions(rows: Sequence[Row], examples: Sequence[Row]) -> list[Row]:
    solved = "".join(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in examples)
    return [{"prompt": f"{solved}Question: {row['question']}\nAnswer: ", "target": row["answer"]} for row in rows]


# --- tokens ----------------------------------------------------------------------------------------------------------


@functools.cache
def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"metadata tokenizer: {name} has no tokenizer that can be read ({error})") from error


def load_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The scored model's tokenizer: ``tokenizer`` in the metadata, else ``pretrained``."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise ValueError(
            'no tokenizer to cut texts into tokens: give --metadata \'{"tokenizer": "FOLDER or NAME"}\', that of the '
            "scored model (lm-eval's --model_args pretrained=... names it as well)"
        )
    return _tokenizer(name, bool(metadata.get("trust_remote_code", False)))


def passage(tokenizer: Any, text: str, where: str, limit: int | None = None) -> Row:
    """One passage as it is scored: ``prompt`` and all ``pieces`` make the text, and a piece is one token if it can be.

    A cut is made where the text before it encodes to the same tokens as within the whole. Not every end of a token is
    such a place: one character may be several tokens, a beginning may encode otherwise when nothing follows it, and
    lm-eval moves white space before a cut to behind it. ``piece_tokens`` counts each piece's tokens. The first token
    belongs to ``prompt``, and is not scored, unless the tokenizer begins texts with a token of its own.

    Args:
        tokenizer: A fast one, because it must say where in the text its tokens are.
        text: The passage.
        where: For messages.
        limit: Only its first so many tokens, as the whole text encodes.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("privleak needs a fast tokenizer, which says where in a text its tokens are")
    if limit is not None:
        ends = _encoded(tokenizer, text)[1]
        text = text[: ends[limit - 1]] if limit < len(ends) else text
    ids, ends = _encoded(tokenizer, text)
    cuts = [*_cuts(tokenizer, text, ids, ends), (len(text), len(ids))]
    begun = tokenizer.bos_token_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_token_id
    places = [(0, 0), *cuts] if begun else cuts
    if len(places) < 2:
        raise ValueError(f"{where}: this passage has no token to score after its first one")
    pairs = list(itertools.pairwise(places))
    return {
        "prompt": text[: places[0][0]],
        "target": text,
        "pieces": [text[a:b] for (a, _), (b, _) in pairs],
        "piece_tokens": [after - before for (_, before), (_, after) in pairs],
        "zlib_bytes": len(zlib.compress(text.encode("utf-8"))),
    }


def _encoded(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Tokens, and where in the text each of them ends."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]


def _cuts(tokenizer: Any, text: str, ids: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """(characters, tokens) before each clean cut within the text, ascending."""
    places = [k for k, end in enumerate(ends[:-1], 1) if 0 < end < len(text) and not text[end - 1].isspace()]
    cuts: list[tuple[int, int]] = []
    for first in range(0, len(places), _AT_ONCE):
        chunk = places[first : first + _AT_ONCE]
        heads = tokenizer([text[: ends[k - 1]] for k in chunk], add_special_tokens=False)["input_ids"]
        for k, head in zip(chunk, heads, strict=True):
            if list(head) == list(ids[:k]) and (not cuts or ends[k - 1] > cuts[-1][0]):
                cuts.append((ends[k - 1], k))
    return cuts
