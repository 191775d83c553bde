"""What an estimate's command line says besides the recipe: another config.json, a machine, sizes of data elsewhere."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from unlearn.errors import RecipeError
from unlearn.estimates.machine import MACHINES, Machine

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class Declared:
    """Rows of a data set that is elsewhere, and mean tokens of a row if given."""

    rows: int
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What an estimate is asked for besides its recipe. ``config`` stands for the config.json of the model."""

    machine: Machine
    config: Path | None = None
    rows: Mapping[str, Declared] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of an estimate."""
    group = parser.add_argument_group("estimate")
    group.add_argument(
        "--estimate", action="store_true", help="print memory, disk and time of every stage on paper, run nothing"
    )
    group.add_argument(
        "--machine", choices=sorted(MACHINES), default="cpu2", help="the machine that is estimated for (default: cpu2)"
    )
    group.add_argument("--device-memory", metavar="SIZE", help="its memory, where it has another: 24GB")
    group.add_argument("--config", metavar="FILE", help="a config.json to take the model's sizes from")
    group.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="NAME=ROWS[xTOKENS]",
        help="size of a data set that is not on this machine, and mean tokens of its rows (forget10=400x60)",
    )


def options_of(arguments: argparse.Namespace) -> Options:
    """What the flags say.

    Raises:
        RecipeError: a size that is none.
    """
    machine = MACHINES[arguments.machine]
    if arguments.device_memory is not None:
        machine = replace(machine, memory=_size(arguments.device_memory))
    config = Path(arguments.config).expanduser() if arguments.config is not None else None
    return Options(machine, config, dict(map(_declared, arguments.rows)))


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s?([MGT]B)", text)
    if match is None:
        raise RecipeError(f"--device-memory {text}: write a number and its unit, 24GB or 512MB")
    return int(float(match[1]) * _UNITS[match[2]])


def _declared(text: str) -> tuple[str, Declared]:
    match = re.fullmatch(r"([^=]+)=([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise RecipeError(f"--rows {text}: write the name of a set, its rows and, if known, their tokens: news=900x250")
    return match[1], Declared(int(match[2]), int(match[3]) if match[3] else None)
