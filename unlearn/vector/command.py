"""``unlearn vector``: arithmetic on task vectors from the command line; ``unlearn apply``: a vector on a checkpoint.

Nothing here imports torch before there is work to do, so that ``--help`` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from unlearn import console
from unlearn.errors import VectorError
from unlearn.processes import told
from unlearn.store.files import explained, some, sync, written_whole
from unlearn.text import counted, file_size, fitted, number, percent

if TYPE_CHECKING:
    from unlearn.vector.interop import CheckpointReport
    from unlearn.vector.streamed import Verdict
    from unlearn.vector.task_vector import TaskVector


EXIT_DIFFERS = 1
_SHOWN = 10  # modules in a table
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_A_VECTOR = "a vector's file (vector.safetensors), its stage's folder, or the folder of a LoRA adapter of PEFT's"


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


def _read(place: Path) -> TaskVector:
    from unlearn.vector.task_vector import read_vector

    return read_vector(place)


@app.command()
def info(vector: V, all_: All = False) -> None:
    """Show what a vector is and where it is largest."""
    show_info(_read(vector), console.results(), None if all_ else _SHOWN)


@app.command()
def cosine(vector: V, other: Annotated[Path, typer.Argument(metavar="W", help="another")], all_: All = False) -> None:
    """Compare two vectors."""
    one, two = _read(vector), _read(other)
    cosines, norms = one.cosines(two), (one.norms(), two.norms())
    alone = len(one.modules) - len(cosines), len(two.modules) - len(cosines)
    facts = {
        "cosine": f"{one.cosine(two):+.4f}",
        "norms": f"{one.norm():.4g} and {two.norm():.4g}",
        "modules": f"{len(cosines)} in both, {alone[0]} in the first only, {alone[1]} in the second only",
    }
    largest = sorted(cosines, key=lambda n: (-norms[0][n] * norms[1][n], n))
    heads = ("module", "cosine", "norm", "norm of the second")

    def row(name: str) -> Sequence[str]:
        return name, f"{cosines[name]:+.4f}", f"{norms[0][name]:.4g}", f"{norms[1][name]:.4g}"

    _print(facts, heads, largest, row, None if all_ else _SHOWN, console.results())


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
    _keep(factor * _read(vector), out, f"{factor:g} times {vector.name}")


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
    before = _read(vector)
    how = f"rank {rank}" if rank is not None else f"energy {energy}"
    _keep(before.to_low_rank(rank, energy), out, f"{vector.name} truncated to {how}", before)


@app.command()
def prune(
    vector: V,
    out: Out,
    keep: Annotated[float, typer.Option(metavar="F", help="the share to keep, above 0, at most 1", show_default=False)],
    by: Annotated[By, typer.Option(help="entries (the result is dense) or rows (factors stay factors)")] = By.magnitude,
) -> None:
    """Keep the largest part of every matrix, the rest zero."""
    before = _read(vector)
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

    vector, report = subtract(base, finetuned, on_unequal="skip" if skip_unequal else "error", rank=rank, energy=energy)
    _keep(vector, out, f"{vector.meta['finetuned']} - {vector.meta['base']}")
    _say_skipped(report)


@app.command()
def to_adapter(
    vector: V,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="to make")],
    base: Annotated[
        str, typer.Option(metavar="NAME", help="the model it goes on: a hub id or a folder", show_default=False)
    ],
) -> None:
    """Write a LoRA adapter for PEFT."""
    from unlearn.vector.interop import to_adapter as write

    found = _read(vector)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise VectorError(f"{folder} exists and is not an empty folder: choose another one")
    _check_parent(folder)
    with explained(folder), TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        write(found, made := Path(temporary) / folder.name, base)
        for path in (*made.iterdir(), made):
            sync(path)
        made.replace(folder)
        sync(folder.parent)
    console.say(f"{folder}: an adapter of {len(found.modules)} modules for {base}")


def _of_one_model(places: Sequence[Path], any_base: bool) -> list[TaskVector]:
    """Vectors that can be added: of one model, as far as they say which."""
    vectors = [_read(place) for place in places]
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


def _keep(vector: TaskVector, out: Path, made: str, before: TaskVector | None = None) -> None:
    """Write a result with a note of how it was made, and say what it is."""
    from unlearn.vector.task_vector import TaskVector

    if out.is_dir():
        raise VectorError(f"{out} is a folder: give -o the name of a file")
    _check_parent(out)
    with written_whole(out) as temporary:
        TaskVector(vector.modules, {**vector.meta, "made": made}).save(temporary)
    said = f"{out}: {len(vector.modules)} modules, largest rank {vector.rank()}, norm {vector.norm():.4g}"
    whole = before.norm() if before is not None else 0.0
    console.say(said + (f", {vector.norm() / whole:.1%} of what it was" if whole else ""))


def _check_parent(place: Path) -> None:
    if not place.parent.is_dir():
        raise VectorError(f"{place}: cannot be written: there is no folder {place.parent}")


def _say_skipped(report: CheckpointReport) -> None:
    if report.unchanged:
        console.say(f"left out as unchanged: {len(report.unchanged)} tensors")
    for why in dict.fromkeys(report.unequal.values()):
        names = (name for name, reason in report.unequal.items() if reason == why)
        console.say(f"skipped ({why}): {', '.join(names)}", style="yellow")
    if report.left_out:
        console.say(f"norm of the skipped changes: {report.left_out:.4g}", style="yellow")
    for warning in report.warnings:
        console.say(f"! {warning}", style="yellow")


# -- tables


def show_info(vector: TaskVector, screen: Console, most: int | None) -> None:
    """Print what a vector is, and its ``most`` modules of the largest norm (None for all)."""
    from unlearn.vector.change import Dense

    norms, whole = vector.norms(), vector.norm()
    dense = sum(isinstance(m, Dense) for m in vector.modules.values())
    kinds = [f"{n} {kind}" for n, kind in ((len(norms) - dense, "low-rank"), (dense, "dense")) if n]
    facts = {
        "modules": f"{len(norms)} ({', '.join(kinds)})",
        "largest rank": str(vector.rank()),
        "norm": f"{whole:.4g}",
        "numbers stored": f"{sum(t.numel() for m in vector.modules.values() for t in m.tensors().values()):,}",
        "SHA-256": vector.digest(),
        **{f"meta {key}": value for key, value in sorted(vector.meta.items()) if value},
    }

    def row(name: str) -> Sequence[str]:
        change, norm = vector.modules[name], norms[name]
        rank = "dense" if isinstance(change, Dense) else str(change.rank)
        share = f"{norm * norm / (whole * whole):.1%}" if whole else "0.0%"
        return name, f"{change.shape[0]} x {change.shape[1]}", rank, f"{norm:.4g}", share

    largest = sorted(norms, key=lambda n: (-norms[n], n))
    _print(facts, ("module", "out x in", "rank", "norm", "share"), largest, row, most, screen)


def _print(
    facts: Mapping[str, str],
    heads: Sequence[str],
    names: Sequence[str],
    row: Callable[[str], Iterable[str]],
    most: int | None,
    screen: Console,
) -> None:
    """Facts, and a table with the first ``most`` of some modules."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        grid.add_row(Text(fitted(name, screen.encoding)), Text(fitted(value, screen.encoding)))
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim", pad_edge=False)
    for position, head in enumerate(heads):
        table.add_column(head, overflow="fold", justify="right" if position else "left")
    for name in names[:most]:
        table.add_row(*(Text(fitted(value, screen.encoding)) for value in row(name)))
    screen.print(grid, "", table, sep="\n")
    if most is not None and len(names) > most:
        screen.print(f"and {len(names) - most} modules of smaller norm (--all shows them)", style="dim")


# -- unlearn apply


def apply_command(
    vector: Annotated[Path, typer.Argument(metavar="VECTOR", help=_A_VECTOR)],
    model: Annotated[Path, typer.Option(metavar="M", help="a folder with a model in safetensors", show_default=False)],
    coefficient: Annotated[float, typer.Option(metavar="λ", help="how much is subtracted", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the edited model's folder", show_default=False)],
    check_only: Annotated[
        bool, typer.Option("--check", help="write nothing: is DIR exactly this edit, bit by bit?")
    ] = False,
    stochastic_rounding: Annotated[
        bool, typer.Option("--stochastic-rounding", help="round edited 16-bit weights by chance, not to nearest")
    ] = False,
    accept_rounding: Annotated[
        bool, typer.Option("--accept-rounding", help="write also what rounding has made another edit of")
    ] = False,
    seed: Annotated[int, typer.Option(help="of that chance")] = 0,
) -> None:
    """Write a model less a coefficient times a task vector, from disk to disk.

    A model of any size in the memory of one tensor, with the bits of the same edit in memory. Run again, it goes on.
    """
    from unlearn.vector.streamed import apply, check

    edit = (vector, model, coefficient, out)
    try:
        with told("apply", "stop what else runs there"):
            if check_only:
                verdict = check(*edit, stochastic_rounding=stochastic_rounding, seed=seed)
                _say_verdict(out, coefficient, verdict)
                return
            done = apply(*edit, stochastic_rounding=stochastic_rounding, seed=seed, accept_rounding=accept_rounding)
    except BrokenPipeError:
        raise
    except OSError as e:
        raise VectorError(f"{e.filename or model}: {e.strerror or e}") from e
    if done.left_out:
        console.say(f"left out: {some(done.left_out)}", style="yellow")
    kept = f", {counted(done.kept, 'file')} of an earlier attempt kept" if done.kept else ""
    tensors = f"{counted(done.edited, 'tensor')} edited, {done.copied} copied as they were"
    console.say(f"{out}: {tensors}, {file_size(done.size)}{kept}")
    survived = done.survived
    if survived["cosine"] is not None:
        console.say(
            f"of the edit survived rounding: cosine {number(survived['cosine'])}, norm ratio "
            f"{number(survived['norm_ratio'])}, {percent(survived['changed'])} of the elements changed"
        )


def _say_verdict(out: Path, coefficient: float, verdict: Verdict) -> None:
    screen = console.results()
    for name, why in verdict.wrong.items():
        screen.print(Text(fitted(name, screen.encoding)), why, sep=": ", soft_wrap=True)
    what = f"exactly the model less {coefficient!r} times the vector"
    if verdict.wrong:
        differ = f"{counted(len(verdict.wrong), 'difference')} in {verdict.tensors} tensors and config.json"
        console.say(f"{out} is not {what}: {differ}", style="red")
        raise typer.Exit(EXIT_DIFFERS)
    console.say(f"{out} is {what}: {verdict.tensors} tensors, {verdict.edited} of them edited")
