"""The items of TOFU (Maini et al., arXiv 2401.06121) for lm-eval; this folder works by itself.

    lm_eval --model hf --model_args pretrained=DIR --include_path eval --tasks tofu_forget10 \
        --metadata '{"tofu": "FOLDER", "items": 300}'

Metadata, all optional:
    tofu: A folder with TOFU's own files, ``<set>_perturbed.json``; the hub's locuslab/TOFU without it.
    items: Only the first so many rows of every set, or an object with a number for each set. The two sets of real
        facts are short: where they have fewer rows, all of them count, as in the authors' logs of 300 items.
    skip: Rows at the beginning of every set that are left out; a number, or one for each set.
    tag: ``prompt``: "Answer:" ends the prompt. ``scored``: it begins the scored text, as in the authors' logs.
    eos: Whether the answer's end, as a token, is scored and counted too, as TOFU does; true by default.
    tokenizer: Folder or name, for token counts; without it ``pretrained``, which lm-eval's command line takes over from
        ``--model_args``.
    max_tokens: Tokens generated for ROUGE-L at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

HUB = "locuslab/TOFU"
_TAGS = {"prompt": "Question: {}\nAnswer:", "scored": "Question: {}\n"}
_SHORT = ("real_authors", "world_facts")  # real facts: no paraphrases, and fewer rows than the authors' limit of 300
_SETS = {*(f"{part}{share}" for part in ("forget", "holdout") for share in ("01", "05", "10")), "retain", *_SHORT}

Row = dict[str, Any]


def load_items(
    subset: str,
    kind: str,
    tofu: str | None = None,
    items: int | Mapping[str, int] | None = None,
    skip: int | Mapping[str, int] = 0,
    tag: str = "prompt",
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """Read one of TOFU's sets; lm-eval calls this with the task's metadata and ``dataset_kwargs``.

    Args:
        subset: ``forget01``, ``holdout10``, ``retain``, ``real_authors``, ...
        kind: ``prob`` (needs perturbed answers) or ``rouge``.
        tofu, items, skip, tag: metadata, see the top of this file.

    Returns:
        A data set in memory under ``test``: ``id`` (row number from 0), ``prompt``, ``target``, ``question``,
        ``answer``, and for ``prob`` ``perturbed_answer`` and, where the set has one, ``paraphrased_answer``.
    """
    import datasets

    return {"test": datasets.Dataset.from_list(read_rows(subset, kind, tofu, items, skip, tag))}


def read_rows(
    subset: str,
    kind: str,
    tofu: str | None = None,
    items: int | Mapping[str, int] | None = None,
    skip: int | Mapping[str, int] = 0,
    tag: str = "prompt",
) -> list[Row]:
    """The rows that :func:`load_items` makes a data set of; of a local folder with the standard library alone."""
    if tag not in _TAGS:
        raise ValueError(f"metadata tag is {tag!r}; it must be {' or '.join(_TAGS)}")
    where, rows = _local(Path(tofu).expanduser(), subset) if tofu else _hub(subset)
    numbers = _chosen(where, len(rows), _own("items", items, subset), _own("skip", skip, subset) or 0, subset in _SHORT)
    # rows of a holdout set need not have one, but then none has: the ratio of some would be another figure
    paraphrased = subset not in _SHORT and (
        not subset.startswith("holdout") or any("paraphrased_answer" in row for row in rows)
    )
    layout = _TAGS[tag if kind == "prob" else "prompt"]
    found = []
    for number in numbers:
        row = _checked(rows[number], f"{where}, row {number + 1}", kind, paraphrased)
        found.append({"id": str(number), "prompt": layout.format(row["question"]), "target": row["answer"], **row})
    return found


def _local(folder: Path, subset: str) -> tuple[str, list[Row]]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (metadata tofu names one with TOFU's files)")
    names = [f"{subset}_perturbed.json", *([f"{subset}.json"] if subset.startswith("holdout") else [])]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        others = {f"{one}_perturbed.json" for one in _SETS}  # near to every name, and none is meant for another
        there = sorted(one.name for one in folder.glob("*.json*") if one.name not in others)
        near = get_close_matches(names[0], there, n=1, cutoff=0.8)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{folder} has no {' and no '.join(names)}, which the tasks of {subset} need{meant}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a row must be a JSON object")
        rows.append(row)
    return str(path), rows


def _hub(subset: str) -> tuple[str, list[Row]]:
    import datasets

    configs = [f"{subset}_perturbed", *([subset] if subset.startswith("holdout") else [])]
    for config in configs:
        try:
            return f"{HUB}, {config}", list(datasets.load_dataset(HUB, config, split="train"))
        except (OSError, ValueError) as error:
            reason: Exception = error
    raise ValueError(
        f"{HUB}, {' or '.join(configs)}, cannot be had from the hub ({type(reason).__name__}: {reason}); "
        f'with its files in a folder: --metadata \'{{"tofu": "FOLDER"}}\''
    ) from reason


def _own(name: str, value: Any, subset: str) -> Any:
    """What the metadata say for one set."""
    if not isinstance(value, Mapping):
        return value
    if unknown := sorted(set(value) - _SETS):
        raise ValueError(f"metadata {name} names {unknown[0]!r}; TOFU's sets are {', '.join(sorted(_SETS))}")
    return value.get(subset)


def _chosen(where: str, count: int, items: Any, skip: Any, short: bool) -> range:
    """Numbers of the rows that are used."""
    if type(skip) is not int or skip < 0:
        raise ValueError(f"metadata skip is {skip!r}; it must be a whole number, 0 or more")
    if items is not None and (type(items) is not int or items < 1):
        raise ValueError(f"metadata items is {items!r}; it must be a whole number, 1 or more")
    if count == 0:
        raise ValueError(f"{where} has no rows: there is nothing to score")
    if skip >= count:
        raise ValueError(f"{where} has {count} rows, and metadata skip leaves out {skip}: there is nothing to score")
    left = count - skip
    if items is not None and items > left and not short:
        after = f" after the {skip} that are skipped" if skip else ""
        raise ValueError(f"{where} has {left} rows{after}, fewer than the {items} of metadata items")
    return range(skip, skip + min(items or left, left))


def _checked(row: Row, where: str, kind: str, paraphrased: bool) -> Row:
    """The fields that are used, all of them there and none empty."""
    fields = ["question", "answer", *(["paraphrased_answer"] if paraphrased and kind == "prob" else [])]
    for field in fields:
        if not _is_text(row.get(field)):
            raise ValueError(f"{where}: {field!r} is missing or empty")
    kept = {field: row[field] for field in fields}
    if kind == "prob":
        wrong = row.get("perturbed_answer")
        if not isinstance(wrong, list) or not wrong or not all(_is_text(answer) for answer in wrong):
            raise ValueError(
                f"{where}: 'perturbed_answer' must be a list of answers, none of them empty; probabilities of choices "
                f"and truth ratios need it"
            )
        kept["perturbed_answer"] = wrong
    return kept


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
