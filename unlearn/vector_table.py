"""What ``python -m unlearn.vectors info`` and ``cosine`` print: readable in a terminal, plain when piped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn.changes import Change, Dense
from unlearn.vector import TaskVector

_WIDE = 1000  # columns of a pipe: every row stays one line, so that other programs can read it


def stdout() -> Console:
    """Standard output."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDE)


def show_info(vector: TaskVector, console: Console, most: int | None) -> None:
    """Print what a vector is, and its ``most`` modules of the largest norm (None for all)."""
    norms = vector.norms()
    whole = vector.norm()
    stored = sum(t.numel() for m in vector.modules.values() for t in m.tensors().values())
    dense = sum(isinstance(m, Dense) for m in vector.modules.values())
    kinds = [f"{n} {kind}" for n, kind in ((len(norms) - dense, "low-rank"), (dense, "dense")) if n]
    facts = [
        ("modules", f"{len(norms)} ({', '.join(kinds)})"),
        ("largest rank", str(vector.rank())),
        ("norm", _number(whole)),
        ("numbers stored", f"{stored:,}"),
        ("SHA-256", vector.digest()),
        *((f"meta {key}", value) for key, value in sorted(vector.meta.items()) if value),
    ]
    _facts(facts, console)
    largest = sorted(norms, key=lambda n: (-norms[n], n))[:most]
    rows = [_info_row(name, vector.modules[name], norms[name], whole) for name in largest]
    _table(("module", "out x in", "rank", "norm", "share"), rows, console)
    _rest(len(norms) - len(rows), "modules of smaller norm", console)


def show_cosine(one: TaskVector, two: TaskVector, console: Console, most: int | None) -> None:
    """Print how alike two vectors are, and the ``most`` modules in which both are largest (None for all)."""
    cosines, norms = one.cosines(two), (one.norms(), two.norms())
    alone = len(one.modules) - len(cosines), len(two.modules) - len(cosines)
    facts = [
        ("cosine", _signed(one.cosine(two))),
        ("norms", f"{_number(one.norm())} and {_number(two.norm())}"),
        ("modules", f"{len(cosines)} in both, {alone[0]} in the first only, {alone[1]} in the second only"),
    ]
    _facts(facts, console)
    largest = sorted(cosines, key=lambda n: (-norms[0][n] * norms[1][n], n))[:most]
    rows = [(n, _signed(cosines[n]), _number(norms[0][n]), _number(norms[1][n])) for n in largest]
    _table(("module", "cosine", "norm", "norm of the second"), rows, console)
    _rest(len(cosines) - len(rows), "modules of smaller norms", console)


def _info_row(name: str, change: Change, norm: float, whole: float) -> Sequence[str]:
    rank = "dense" if isinstance(change, Dense) else str(change.rank)
    share = f"{norm * norm / (whole * whole):.1%}" if whole else "0.0%"
    return name, f"{change.shape[0]} x {change.shape[1]}", rank, _number(norm), share


def _facts(facts: Iterable[tuple[str, str]], console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(_safe(name, console), _safe(value, console))
    console.print(grid)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], console: Console) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim", pad_edge=False)
    for position, head in enumerate(heads):
        table.add_column(head, overflow="fold", justify="right" if position else "left")
    for row in rows:
        table.add_row(*(_safe(cell, console) for cell in row))
    console.print()
    console.print(table)


def _rest(count: int, what: str, console: Console) -> None:
    if count > 0:
        console.print(Text(f"and {count} {what} (--all shows them)", style="dim"))


def _safe(value: str, console: Console) -> Text:
    """Text of a file is no markup, moves no cursor, and must fit the terminal's encoding."""
    known = value.encode(console.encoding, "replace").decode(console.encoding)
    return Text("".join(c if c.isprintable() else "?" for c in known))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"
