"""``python -m unlearn.vector.command``: arithmetic on task vectors from the command line.

Nothing here imports torch before a vector is read, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unlearn import console
from unlearn.errors import UnlearnError, VectorError
from unlearn.processes import told
from unlearn.store.files import no_space, sync, unique

if TYPE_CHECKING:
    from unlearn.vector.change import Change
    from unlearn.vector.interop import CheckpointReport
    from unlearn.vector.task_vector import TaskVector


EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
_SHOWN = 10  # modules in a table
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_A_VECTOR = "a vector's file (vector.safetensors), or the folder of a LoRA adapter of PEFT's"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, do it, and turn what went wrong into one message and an exit code."""
    arguments = _parser().parse_args(_with_negatives(sys.argv[1:] if argv is None else argv))
    try:
        with told("vectors", "truncate the vectors first (low-rank --rank)"):
            arguments.do(arguments)
    except UnlearnError as e:
        console.say(f"error: {e}", style="red")
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _info(arguments: argparse.Namespace) -> None:
    pass

    show_info(read_vector(arguments.V), stdout(), None if arguments.all else _SHOWN)


def _cosine(arguments: argparse.Namespace) -> None:
    pass

    one, two = read_vector(arguments.V), read_vector(arguments.W)
    show_cosine(one, two, stdout(), None if arguments.all else _SHOWN)


def _sum(arguments: argparse.Namespace) -> None:
    from unlearn.vector.task_vector import TaskVector

    whole = TaskVector.sum(_of_one_model(arguments.V, arguments.any_base))
    _keep(whole, arguments, f"sum of {', '.join(place.name for place in arguments.V)}")


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


def _scale(arguments: argparse.Namespace) -> None:
    _keep(arguments.C * read_vector(arguments.V), arguments, f"{arguments.C:g} times {arguments.V.name}")


def _analogy(arguments: argparse.Namespace) -> None:
    from unlearn.vector.task_vector import analogy

    a, b, c = _of_one_model((arguments.A, arguments.B, arguments.C), arguments.any_base)
    names = f"{arguments.C.name} + ({arguments.B.name} - {arguments.A.name})"
    _keep(analogy(a, b, c), arguments, names)


def _low_rank(arguments: argparse.Namespace) -> None:
    before = read_vector(arguments.V)
    after = before.to_low_rank(arguments.rank, arguments.energy)
    how = f"rank {arguments.rank}" if arguments.rank is not None else f"energy {arguments.energy:g}"
    _keep(after, arguments, f"{arguments.V.name} truncated to {how}", before)


def _prune(arguments: argparse.Namespace) -> None:
    before = read_vector(arguments.V)
    after = before.prune(arguments.keep, arguments.by)
    _keep(after, arguments, f"{arguments.V.name} pruned to {arguments.keep:g} by {arguments.by}", before)


def _from_adapter(arguments: argparse.Namespace) -> None:
    from unlearn.vector.interop import from_adapter

    _keep(from_adapter(arguments.DIR), arguments, f"adapter {arguments.DIR.resolve().name}")


def _from_checkpoints(arguments: argparse.Namespace) -> None:
    from unlearn.vector.interop import from_checkpoints

    vector, report = from_checkpoints(
        arguments.BASE,
        arguments.FT,
        on_unequal="skip" if arguments.skip_unequal else "error",
        rank=arguments.rank,
        energy=arguments.energy,
    )
    _keep(vector, arguments, f"{vector.meta['finetuned']} - {vector.meta['base']}")
    _tell(report)


def _to_adapter(arguments: argparse.Namespace) -> None:
    from unlearn.vector.interop import require_factors, to_adapter

    vector = read_vector(arguments.V)
    require_factors(vector)
    place: Path = arguments.DIR
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise VectorError(f"{place} exists and is not an empty folder: choose another one")
    with _whole(place) as temporary:
        to_adapter(vector, temporary, arguments.base)
        if place.exists():
            place.rmdir()
    console.say(f"{place}: an adapter of {len(vector.modules)} modules for {arguments.base}")


def read_vector(place: Path) -> TaskVector:
    """A vector from its file, or from an adapter's folder.

    Raises:
        VectorError: it is neither, or damaged.
    """
    from unlearn.vector.interop import from_adapter
    from unlearn.vector.task_vector import TaskVector

    return from_adapter(place) if place.is_dir() else TaskVector.load(place)


def _keep(vector: TaskVector, arguments: argparse.Namespace, made: str, before: TaskVector | None = None) -> None:
    """Write a result with a note of how it was made, and say what it is."""
    from unlearn.vector.task_vector import TaskVector

    out: Path = arguments.out
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


def _with_negatives(argv: Sequence[str]) -> list[str]:
    """``-1e-3`` is a number; argparse takes it for an option, unless a blank stands before it."""

    def number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return text.startswith("-")

    return [f" {argument}" if number(argument) else argument for argument in argv]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unlearn.vector.command",
        description=f"Arithmetic on task vectors. V, W, A, B and C are each {_A_VECTOR}.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, do: Callable[[argparse.Namespace], None], about: str, places: Mapping[str, str], out: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        for place, meaning in places.items():
            sub.add_argument(place, type=Path, help=meaning)
        if out:
            sub.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="the vector to write")
        sub.set_defaults(do=do)
        return sub

    info = command("info", _info, "show what a vector is and where it is largest", {"V": _A_VECTOR}, out=False)
    cosine = command("cosine", _cosine, "compare two vectors", {"V": _A_VECTOR, "W": "another"}, out=False)
    for table in (info, cosine):
        table.add_argument("--all", action="store_true", help=f"all modules, not the {_SHOWN} largest")
    adding = command("sum", _sum, "add vectors", {})
    adding.add_argument("V", type=Path, nargs="+", help=_A_VECTOR)
    scale = command("scale", _scale, "multiply a vector by a number; -1 negates it", {})
    scale.add_argument("C", type=float, help="the number")
    scale.add_argument("V", type=Path, help=_A_VECTOR)
    roles = {"A": "a is to", "B": "b", "C": "as c is to the result"}
    relating = command("analogy", _analogy, "C + (B - A), as Ilharco et al. (2212.04089) have it", roles)
    for table in (adding, relating):
        table.add_argument("--any-base", action="store_true", help="also where the vectors name different models")
    low = command("low-rank", _low_rank, "truncate every module by its singular values", {"V": _A_VECTOR})
    _size(low, required=True)
    prune = command("prune", _prune, "keep the largest part of every matrix, the rest zero", {"V": _A_VECTOR})
    prune.add_argument("--keep", type=float, required=True, metavar="F", help="the share to keep, above 0, at most 1")
    ways = "entries (the result is dense) or rows (factors stay factors); default: %(default)s"
    prune.add_argument("--by", choices=("magnitude", "rows"), default="magnitude", help=ways)
    command("from-adapter", _from_adapter, "read a LoRA adapter of PEFT's", {"DIR": "its folder"})
    folders = {"BASE": "the model's folder before fine-tuning", "FT": "and after it"}
    difference = command("from-checkpoints", _from_checkpoints, "subtract two folders of safetensors", folders)
    skip = "leave out changed tensors that a vector cannot hold (norms, embeddings, ...) and name them; else an error"
    difference.add_argument("--skip-unequal", action="store_true", help=skip)
    _size(difference, required=False)
    to = command("to-adapter", _to_adapter, "write a LoRA adapter for PEFT", {"V": _A_VECTOR, "DIR": "to make"}, False)
    to.add_argument("--base", required=True, metavar="NAME", help="the model it goes on: a hub id or a folder")
    return parser


def _size(parser: argparse.ArgumentParser, *, required: bool) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--rank", type=int, metavar="R", help="how many singular values to keep per module")
    group.add_argument("--energy", type=float, metavar="E", help="or the share of their squares, above 0, at most 1")


if __name__ == "__main__":
    sys.exit(main())


# -- what ``python -m unlearn.vector.command info`` and ``cosine`` print


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
