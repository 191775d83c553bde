"""What membership inference keeps, a line per item, and the areas under the ROC curve from these lines alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.atomic import write_text_atomic
from unlearn.benchmarks import membership
from unlearn.errors import DataError, EvaluationError
from unlearn.report import Membership, Who

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
            one = membership.compare(attack, inside, outside, resamples, seed)
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
