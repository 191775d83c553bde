"""``unlearn apply``: put a vector on a checkpoint of any size, from disk to disk.

Nothing here imports torch before there is work to do, so that ``--help`` answers at once.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unlearn import console
from unlearn.errors import VectorError
from unlearn.processes import told
from unlearn.store.files import some
from unlearn.text import counted, file_size, number, percent

if TYPE_CHECKING:
    from unlearn.vector.streamed import Applied, Verdict
    from unlearn.vector.task_vector import TaskVector

EXIT_DIFFERS = 1
_LARGEST = 3e38  # within float32
_VECTOR = "vector.safetensors"


def apply(
    vector: str | Path | TaskVector,
    model: str | Path,
    coefficient: float,
    out: str | Path,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
    accept_rounding: bool = False,
) -> Applied:
    """Write ``theta - coefficient * tau`` to a folder, tensor by tensor; an unfinished attempt goes on.

    Args:
        vector: A vector, its file, a folder with ``vector.safetensors``, or the folder of a LoRA adapter of PEFT's.
        model: A folder with safetensors.
        stochastic_rounding: Round edited weights to 16 bits by chance (``seed``) instead of to nearest.
        accept_rounding: Write also what rounding to nearest has made another edit of.

    Raises:
        UnlearnError: a mistake to mend, or something damaged; see :func:`unlearn.vector.streamed.write_edited`.
    """
    from unlearn.vector.streamed import Rounding, write_edited

    whole = _vector(vector)
    _check_adapter(vector, Path(model))
    rounding = Rounding(seed if stochastic_rounding else None)
    return write_edited(whole, Path(model), _finite(coefficient), Path(out), rounding, accept_rounding)


def check(
    vector: str | Path | TaskVector,
    model: str | Path,
    coefficient: float,
    edited: str | Path,
    *,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> Verdict:
    """Say of every tensor of an edited checkpoint whether it is exactly ``theta - coefficient * tau``.

    Raises:
        UnlearnError: a checkpoint is damaged, or the vector does not fit.
    """
    from unlearn.vector.streamed import Rounding, check_edited

    whole = _vector(vector)
    _check_adapter(vector, Path(model))
    rounding = Rounding(seed if stochastic_rounding else None)
    return check_edited(whole, Path(model), _finite(coefficient), Path(edited), rounding)


def _vector(place: str | Path | TaskVector) -> TaskVector:
    """A vector from wherever it is. What is read from an adapter brings transformers, which takes seconds."""
    from unlearn.vector.task_vector import TaskVector

    if isinstance(place, TaskVector):
        return place
    path = Path(place)
    if path.is_dir() and not (path / _VECTOR).is_file():
        from unlearn.vector.interop import from_adapter

        return from_adapter(path)
    if not path.exists():
        raise VectorError(f"{path}: no such file or folder; give a vector's file, its stage, or an adapter's folder")
    return TaskVector.load(path / _VECTOR if path.is_dir() else path)


def _check_adapter(place: str | Path | TaskVector, model: Path) -> None:
    """Refuse an adapter that PEFT would not put on the model in whole; say where it holds weights of another base."""
    if not isinstance(place, str | Path) or Path(place).is_file() or (Path(place) / _VECTOR).is_file():
        return
    from unlearn.model.checkpoint import read_checkpoint
    from unlearn.model.load import model_of
    from unlearn.vector.interop import refuse_misfit, unlike_base

    checkpoint = read_checkpoint(model)
    files = {name: checkpoint.files[stored.file] for name, stored in checkpoint.tensors.items()}
    refuse_misfit(Path(place), model_of(model))
    if others := unlike_base(Path(place), files):
        console.say(
            f"{place} keeps weights of the model it was trained on, and they are not this model's: {some(others)}. "
            "PEFT would put them in place of the model's; here its change goes on the model's own",
            style="yellow",
        )


def _finite(coefficient: float) -> float:
    if not math.isfinite(coefficient) or abs(coefficient) > _LARGEST:
        raise VectorError(f"the coefficient must be a number within float32, not {coefficient}")
    return float(coefficient)


def apply_command(
    vector: Annotated[
        Path,
        typer.Argument(
            metavar="VECTOR",
            help="a vector's file (vector.safetensors), its stage's folder, or the folder of a LoRA adapter of PEFT's",
        ),
    ],
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
    try:
        with told("apply", "stop what else runs there"):
            if check_only:
                _check(
                    out,
                    coefficient,
                    check(vector, model, coefficient, out, stochastic_rounding=stochastic_rounding, seed=seed),
                )
            else:
                _say(
                    out,
                    apply(
                        vector,
                        model,
                        coefficient,
                        out,
                        stochastic_rounding=stochastic_rounding,
                        seed=seed,
                        accept_rounding=accept_rounding,
                    ),
                )
    except BrokenPipeError:
        raise
    except OSError as e:
        raise VectorError(f"{e.filename or model}: {e.strerror or e}") from e


def _say(out: Path, done: Applied) -> None:
    if done.left_out:
        console.say(f"left out: {some(done.left_out)}", style="yellow")
    kept = f", {counted(done.kept, 'file')} of an earlier attempt kept" if done.kept else ""
    tensors = f"{counted(done.edited, 'tensor')} edited, {done.copied} copied as they were"
    console.say(f"{out}: {tensors}, {file_size(done.size)}{kept}")
    s = done.survived
    if s["cosine"] is not None:
        console.say(
            f"of the edit survived rounding: cosine {number(s['cosine'])}, norm ratio {number(s['norm_ratio'])}, "
            f"{percent(s['changed'])} of the elements changed"
        )


def _check(out: Path, coefficient: float, verdict: Verdict) -> None:
    for name, why in verdict.wrong.items():
        sys.stdout.write(f"{''.join(c if c.isprintable() else '?' for c in name)}: {why}\n")
    sys.stdout.flush()
    what = f"the model less {coefficient!r} times the vector"
    if not verdict.wrong:
        console.say(f"{out} is exactly {what}: {verdict.tensors} tensors, {verdict.edited} of them edited")
        return
    differ = f"{counted(len(verdict.wrong), 'difference')} in {verdict.tensors} tensors and config.json"
    console.say(f"{out} is not exactly {what}: {differ}{_recorded(out)}", style="red")
    raise typer.Exit(EXIT_DIFFERS)


def _recorded(out: Path) -> str:
    """What the folder says of itself, if it says so."""
    from unlearn.vector.streamed import RECORD, read_record

    said = read_record(out)
    if "coefficient" not in said:
        return ""
    return (
        f". Its {RECORD} says coefficient {said['coefficient']!r}, vector {said['vector_sha256'][:12]}…, rounded "
        f"{said['rounding']}"
    )
