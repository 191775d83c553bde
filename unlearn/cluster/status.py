"""``--status``: how the jobs of a grid stand, as a table for people or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn.cluster.runs import last_line
from unlearn.cluster.states import STANDINGS, Overview, Row
from unlearn.text import coefficient, duration, one_line, shown

_COLOURS = {
    **{"done": "green", "running": "cyan", "queued": "blue", "requeued": "blue", "stopped": "yellow"},
    **{"failed": "red", "lost": "red", "blocked": "red", "waiting": "dim"},
}
_WIDE = 130  # columns from which the settings have one of their own; else they are read from the names
_FILE_WIDTH = 220  # columns where the output is no terminal
_ASCII = str.maketrans({"λ": "lambda", "…": "..."})


def render(overview: Overview, console: Console | None = None) -> None:
    """Print the table, preparations first, and what can be done about what is not done."""
    out = console or Console(width=None if sys.stdout.isatty() else _FILE_WIDTH, highlight=False)
    ascii_only = (out.encoding or "").lower().replace("-", "") not in ("utf8", "utf16", "utf32")

    def text(words: str, style: str = "") -> Text:
        return Text(words.translate(_ASCII) if ascii_only else words, style=style)

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    wide = out.width >= _WIDE
    for name in ("job", *(("settings",) if wide else ()), "state", "try", "time", "λ"):
        table.add_column(text(name), no_wrap=name != "settings", overflow="ellipsis" if name == "job" else "fold")
    table.add_column("")
    now = datetime.now(UTC)
    for row in (*overview.preparations, *overview.jobs):
        cells = [text(row.name), *([text(_settings(row))] if wide else [])]
        cells += [text(row.state, _COLOURS[row.state]), text(str(row.attempt or "")), text(_time(row, now))]
        table.add_row(*cells, text(_chosen(row)), text(_remark(row)))
    out.print(table)
    out.print()
    out.print(text(totals(overview), "bold"), soft_wrap=True)
    for line in (*(f"! {remark}" for remark in overview.remarks), *_next_steps(overview)):
        out.print(text(shown(line), "yellow" if line.startswith("!") else "dim"), soft_wrap=True)


def totals(overview: Overview) -> str:
    """``3 done, 1 failed, of 4 jobs``."""
    counts = [(overview.count(state), state) for state in STANDINGS]
    return f"{', '.join(f'{n} {state}' for n, state in counts if n)}, of {len(overview.jobs)} jobs"


def to_json(overview: Overview) -> dict[str, Any]:
    """The same for programs: ``jobs`` and ``preparations`` as rows, ``totals`` by state."""
    return {
        "schema": 1,
        "grid": overview.grid.name,
        "folder": str(overview.root),
        "totals": {state: overview.count(state) for state in STANDINGS},
        "jobs": [asdict(row) for row in overview.jobs],
        "preparations": [asdict(row) for row in overview.preparations],
        "remarks": list(overview.remarks),
    }


def print_json(overview: Overview) -> None:
    """Print :func:`to_json`."""
    sys.stdout.write(json.dumps(to_json(overview), indent=2, ensure_ascii=True) + "\n")


def _settings(row: Row) -> str:
    return one_line(", ".join(f"{key}={value}" for key, value in row.settings.items()))


def _time(row: Row, now: datetime) -> str:
    """What the last attempt took; of one that runs, for how long it has."""
    if row.state in ("running", "lost") and row.since is not None and row.seconds is None:
        try:
            since = (now - datetime.fromisoformat(row.since)).total_seconds()
        except (ValueError, TypeError):
            return ""
        return duration(max(0.0, since)) if row.state == "running" else f"since {row.since}"
    return duration(row.seconds) if row.seconds is not None else ""


def _chosen(row: Row) -> str:
    """The chosen λ, and ``none`` where no coefficient passed the rule."""
    if row.coefficient is None:
        return ""
    return coefficient(row.coefficient) if row.coefficient else "none"


def _remark(row: Row) -> str:
    return one_line(last_line(row.error)) if row.error else (row.where or "")


def _next_steps(overview: Overview) -> Iterator[str]:
    submit, root = "python -m unlearn.cluster.command", overview.root
    wrong: Sequence[Row] = [r for r in overview.jobs if r.state in ("failed", "lost", "blocked")]
    if wrong:
        yield f"logs: {root / 'logs'}; again: {submit} --resubmit failed {root}"
    if overview.count("stopped", "waiting"):
        yield f"{'all of them' if wrong else 'the rest'}: {submit} --resubmit all-missing {root}"
    if overview.count("done"):
        yield f"the report over all that are done: {submit} --merge {root}"
