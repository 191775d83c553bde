"""``unlearn vector``: arithmetic on task vectors from the command line.

Nothing here imports torch before a vector is read, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from unlearn import console
from unlearn.errors import UnlearnError, VectorError
from unlearn.processes import told
from unlearn.store.files import no_space, sync, unique

if TYPE_CHECKING:
    from unlearn.vector.change import Change
    from unlearn.vector.interop import CheckpointReport
    from unlearn.vector.task_vector import TaskVector


_SHOWN = 10  # modules in a table
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_A_VECTOR = "a vector's file (vector.safetensors), or the folder of a LoRA adapter of PEFT's"


class _Commands(TyperGroup):
    """The commands on vectors, which may need more memory than there is."""

    def invoke(self, ctx: Any) -> Any:
        with told("vectors", "truncate the vectors first (low-rank --rank)"):
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    help=f"Arithmetic on task vectors. V, W, A, B and C are each {_A_VECTOR}.",
)
V = Annotated[Path, typer.Argument(metavar="V", help=_A_VECTOR, show_default=False)]
Vectors = Annotated[list[Path], typer.Argument(metavar="V...", help=_A_VECTOR, show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="the vector to write", show_default=False)]
All = Annotated[bool, typer.Option("--all", help=f"all modules, not the {_SHOWN} largest")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="also where the vectors name different models")]
Rank = Annotated[int | None, typer.Option(metavar="R", help="how many singular values to keep per module")]
Energy = Annotated[float | None, typer.Option(metavar="E", help="or the share of their squares, above 0, at most 1")]


class By(StrEnum):
    """What is pruned by its size."""

    magnitude = "magnitude"
    rows = "rows"


@app.command()
def info(vector: V, all_: All = False) -> None:
    """Show what a vector is and where it is largest."""
    show_info(read_vector(vector), stdout(), None if all_ else _SHOWN)


@app.command()
def cosine(vector: V, other: Annotated[Path, typer.Argument(metavar="W", help="another")], all_: All = False) -> None:
    """Compare two vectors."""
    show_cosine(read_vector(vector), read_vector(other), stdout(), None if all_ else _SHOWN)


@app.command("sum")
def add(vectors: Vectors, out: Out, any_base: AnyBase = False) -> None:
    """Add vectors."""
    from unlearn.vector.task_vector import TaskVector

    whole = TaskVector.sum(_of_one_model(vectors, any_base))
    _keep(whole, out, f"sum of {', '.join(place.name for place in vectors)}")


@app.command(context_settings={"ignore_unknown_options": True})  # -1 is a number
def scale(
    factor: Annotated[float, typer.Argument(metavar="C", help="the number", show_default=False)], vector: V, out: Out
) -> None:
    """Multiply a vector by a number; -1 negates it."""
    _keep(factor * read_vector(vector), out, f"{factor:g} times {vector.name}")


@app.command()
def analogy(
    a: Annotated[Path, typer.Argument(metavar="A", help="a is to")],
    b: Annotated[Path, typer.Argument(metavar="B", help="b")],
    c: Annotated[Path, typer.Argument(metavar="C", help="as c is to the result")],
    out: Out,
    any_base: AnyBase = False,
) -> None:
    """C + (B - A), as Ilharco et al. (2212.04089) have it."""
    from unlearn.vector.task_vector import analogy as related

    _keep(related(*_of_one_model((a, b, c), any_base)), out, f"{c.name} + ({b.name} - {a.name})")


@app.command()
def low_rank(vector: V, out: Out, rank: Rank = None, energy: Energy = None) -> None:
    """Truncate every module by its singular values."""
    _check_size(rank, energy, required=True)
    before = read_vector(vector)
    how = f"rank {rank}" if rank is not None else f"energy {energy:g}"
    _keep(before.to_low_rank(rank, energy), out, f"{vector.name} truncated to {how}", before)


@app.command()
def prune(
    vector: V,
    out: Out,
    keep: Annotated[float, typer.Option(metavar="F", help="the share to keep, above 0, at most 1", show_default=False)],
    by: Annotated[By, typer.Option(help="entries (the result is dense) or rows (factors stay factors)")] = By.magnitude,
) -> None:
    """Keep the largest part of every matrix, the rest zero."""
    before = read_vector(vector)
    _keep(before.prune(keep, by.value), out, f"{vector.name} pruned to {keep:g} by {by.value}", before)


@app.command()
def from_adapter(folder: Annotated[Path, typer.Argument(metavar="DIR", help="its folder")], out: Out) -> None:
    """Read a LoRA adapter of PEFT's."""
    from unlearn.vector.interop import from_adapter as read

    _keep(read(folder), out, f"adapter {folder.resolve().name}")


@app.command()
def from_checkpoints(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="the model's folder before fine-tuning")],
    finetuned: Annotated[Path, typer.Argument(metavar="FT", help="and after it")],
    out: Out,
    skip_unequal: Annotated[
        bool,
        typer.Option(
            "--skip-unequal",
            help="leave out changed tensors that a vector cannot hold (norms, embeddings, ...) and name them; else an "
            "error",
        ),
    ] = False,
    rank: Rank = None,
    energy: Energy = None,
) -> None:
    """Subtract two folders of safetensors."""
    from unlearn.vector.interop import from_checkpoints as subtract

    _check_size(rank, energy, required=False)
    vector, report = subtract(base, finetuned, on_unequal="skip" if skip_unequal else "error", rank=rank, energy=energy)
    _keep(vector, out, f"{vector.meta['finetuned']} - {vector.meta['base']}")
    _tell(report)


@app.command()
def to_adapter(
    vector: V,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="to make")],
    base: Annotated[
        str, typer.Option(metavar="NAME", help="the model it goes on: a hub id or a folder", show_default=False)
    ],
) -> None:
    """Write a LoRA adapter for PEFT."""
    from unlearn.vector.interop import require_factors
    from unlearn.vector.interop import to_adapter as write

    found = read_vector(vector)
    require_factors(found)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise VectorError(f"{folder} exists and is not an empty folder: choose another one")
    with _whole(folder) as temporary:
        write(found, temporary, base)
        if folder.exists():
            folder.rmdir()
    console.say(f"{folder}: an adapter of {len(found.modules)} modules for {base}")


def _check_size(rank: int | None, energy: float | None, *, required: bool) -> None:
    if rank is not None and energy is not None:
        raise VectorError("--rank and --energy are two ways to say one thing: give one of them")
    if required and rank is None and energy is None:
        raise VectorError("give --rank R or --energy E")


def _of_one_model(places: Sequence[Path], any_base: bool) -> list[TaskVector]:
    """Vectors that can be added: of one model, as far as they say which.

    Raises:
        VectorError: two of them name different models.
    """
    vectors = [read_vector(place) for place in places]
    named = [(place, v.meta["base"]) for place, v in zip(places, vectors, strict=True) if v.meta.get("base")]
    for place, base in named[1:]:
        if base != named[0][1] and not any_base:
            raise VectorError(
                f"{named[0][0]} was made from {_short(named[0][1])} and {place} from {_short(base)}: a sum of vectors "
                "of different models is a vector of neither. --any-base adds them all the same"
            )
    return vectors


def _short(base: str) -> str:
    """A model's name, or the beginning of its fingerprint."""
    return f"the model with fingerprint {base[:12]}" if _FINGERPRINT.fullmatch(base) else repr(base)


def read_vector(place: Path) -> TaskVector:
    """A vector from its file, or from an adapter's folder.

    Raises:
        VectorError: it is neither, or damaged.
    """
    from unlearn.vector.interop import from_adapter
    from unlearn.vector.task_vector import TaskVector

    return from_adapter(place) if place.is_dir() else TaskVector.load(place)


def _keep(vector: TaskVector, out: Path, made: str, before: TaskVector | None = None) -> None:
    """Write a result with a note of how it was made, and say what it is."""
    from unlearn.vector.task_vector import TaskVector

    if out.is_dir():
        raise VectorError(f"{out} is a folder: give -o the name of a file")
    with _whole(out) as temporary:
        TaskVector(vector.modules, {**vector.meta, "made": made}).save(temporary)
    said = f"{out}: {len(vector.modules)} modules, largest rank {vector.rank()}, norm {vector.norm():.4g}"
    whole = before.norm() if before is not None else 0.0
    console.say(said + (f", {vector.norm() / whole:.1%} of what it was" if whole else ""))


@contextmanager
def _whole(place: Path) -> Iterator[Path]:
    """A name beside ``place`` for a file or folder that takes its place when it is whole, or is removed."""
    if not place.parent.is_dir():
        raise VectorError(f"{place}: cannot be written: there is no folder {place.parent}")
    temporary = place.with_name(f".{place.name}.{unique()}.tmp")
    try:
        try:
            yield temporary
            for path in (temporary, *temporary.rglob("*")):
                _to_disk(path)
            temporary.replace(place)
            sync(place.parent)
        finally:
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    except UnlearnError:
        raise
    except Exception as e:
        # a library that writes files has errors of its own for what the file system says
        if not isinstance(e, OSError) and type(e).__name__ != "SafetensorError":
            raise
        why = "no space left on the disk" if no_space(e) else getattr(e, "strerror", None) or e
        raise VectorError(f"{place}: cannot be written: {why}") from e


def _to_disk(path: Path) -> None:
    if path.is_dir():
        sync(path)
        return
    with path.open("rb") as f:
        os.fsync(f.fileno())


def _tell(report: CheckpointReport) -> None:
    if report.unchanged:
        console.say(f"left out as unchanged: {len(report.unchanged)} tensors")
    reasons: dict[str, list[str]] = {}
    for name, why in report.unequal.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        console.say(f"skipped ({why}): {', '.join(names)}", style="yellow")
    if report.left_out:
        console.say(f"norm of the skipped changes: {report.left_out:.4g}", style="yellow")
    for warning in report.warnings:
        console.say(f"! {warning}", style="yellow")


# -- what ``unlearn vector info`` and ``cosine`` print


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
    from unlearn.vector.change import Dense

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
    from unlearn.vector.change import Dense

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
