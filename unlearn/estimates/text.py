"""An estimate as text: a table of stages, whether it fits, and what was taken for granted."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from unlearn.estimates import memory
from unlearn.estimates.estimate import SHARE, Estimate
from unlearn.estimates.run import StageEstimate
from unlearn.redact import shown

_MARGIN, _WIDTH = 13, 110
_FORMATS = {4: "float32", 2: "16 bits"}


def render(found: Estimate) -> str:
    """The whole estimate."""
    machine, run = found.options.machine, found.run
    shape = run.shape
    head = f"{shape.layers} layers, {shape.parameters / 1e6:,.1f} M parameters, {_FORMATS[run.size]}, "
    blocks = [
        ("recipe", [f"{run.recipe.name}  ({found.loaded.source})"]),
        ("model", [head + f"{size(run.weights)} a copy ({found.found.where})"]),
        ("machine", [f"{machine.name}: {machine.words}; {size(machine.memory)}"]),
        ("data", list(_data(found))),
        ("stages", list(_table(found))),
        ("at the peak", [_parts(found.largest)]),
        ("fits", list(_verdict(found))),
        ("whole weights", [_applying(found)]),
        ("taken for granted", list(_assumptions(found))),
        ("not counted", [", ".join(_unknown(found))]),
    ]
    return shown("\n".join(_block(title, lines) for title, lines in blocks))


def size(count: float) -> str:
    """Bytes in words, decimal units."""
    for unit, each in (("TB", 1e12), ("GB", 1e9)):
        if count >= each:
            return f"{count / each:,.1f} {unit}" if count < 100 * each else f"{count / each:,.0f} {unit}"
    return f"{count / 1e6:,.0f} MB"


def span(seconds: float) -> str:
    """A time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _operations(count: float) -> str:
    for unit, each in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if count >= each:
            return f"{count / each:,.1f} {unit}"
    return f"{count / 1e9:,.1f} GFLOP"


def _data(found: Estimate) -> Iterator[str]:
    how = "the model's own tokenizer" if found.found.tokenizer is not None else "four characters taken for a token"
    counted = [s for s in found.run.sets if not s.told]
    if counted:
        rows = sum(len(s.train) for s in counted)
        items = sum(len(part) for s in counted for part in s.scored.values())
        yield f"{rows:,} training rows and {items:,} scored items counted ({how})"
    yield from (f"{s.role} {s.name}: {s.told}" for s in found.run.sets if s.told)


def _table(found: Estimate) -> Iterator[str]:
    several = found.options.machine.kind == "gpu"
    head = f"{'':11}{'memory':>9}{'disk':>9}{'passing':>9}{'operations':>13}{'time':>9}"
    yield head + (f"{'devices':>9}" if several else "")
    for one in found.stages:
        row = f"{one.name:11}{size(one.peak):>9}{_or_none(one.kept):>9}{_or_none(one.passing):>9}"
        row += f"{_operations(one.work.operations) if one.work.operations else '':>13}{span(one.work.seconds):>9}"
        yield row + (f"{found.devices(one.peak):>9}" if several else "") + f"  {one.what}"
    row = f"{'in all':11}{size(found.largest.peak):>9}{size(found.disk):>9}{'':9}"
    row += f"{_operations(sum(s.work.operations for s in found.stages)):>13}{span(found.seconds):>9}"
    yield row + (f"{found.devices(found.largest.peak):>9}" if several else "")


def _or_none(count: int) -> str:
    return size(count) if count else ""


def _parts(stage: StageEstimate) -> str:
    return f"{stage.name}: " + ", ".join(f"{name} {size(count)}" for name, count in stage.held.items())


def _verdict(found: Estimate) -> Iterator[str]:
    machine, peak = found.options.machine, found.largest.peak
    device = "one GPU" if machine.kind == "gpu" else "this machine"
    count = found.devices(peak)
    if count == 1:
        yield f"yes: {size(peak)} of the {size(machine.memory)} of {device} ({found.largest.name})"
        return
    over = [s.name for s in found.stages if found.devices(s.peak) != 1]
    room = f"the {size(SHARE * machine.memory)} that may be planned for of {size(machine.memory)}"
    yield f"no: {size(peak)} do not fit {room} ({', '.join(over)})"
    if machine.kind == "gpu" and count:
        yield (
            f"needs {count} GPUs of {size(machine.memory)} that share the weights (FSDP, or layers dealt out by a "
            "device_map). In this program every process holds a whole copy"
        )
    yield from _remedies(found)


def _remedies(found: Estimate) -> Iterator[str]:
    run = found.run
    held = {stage.name: stage for stage in found.stages}
    trained = held["finetune"]
    if not run.recipe.vector.forget.gradient_checkpointing and trained.held.get("activations", 0) > 0.1 * trained.peak:
        yield "vector.forget.gradient_checkpointing: true shrinks the activations, for a third more time"
    if run.size == 4:
        yield "model.dtype: bfloat16 halves the weights"
    elif run.recipe.model.quantize == "none":
        small = memory.quantised(run.shape, "nf4", run.size)
        yield (
            f"in NF4 the weights are {size(small)}; model.quantize trains on such a copy, but keeps the weights in "
            "full beside it for the edit, so that it needs more and not less"
        )


def _applying(found: Estimate) -> str:
    one = found.applying
    return (
        f"unlearn.apply reads and writes {size(one.moved)} in {span(one.seconds)} at "
        f"{size(found.options.machine.disk)}/s and holds at most {size(one.held)} (shards of 5 GB), without a GPU"
    )


def _assumptions(found: Estimate) -> Iterator[str]:
    machine, run = found.options.machine, found.run
    train, score = machine.rate(run.size, "train"), machine.rate(run.size, "score")
    yield (
        f"rates reached: {train / 1e12:,.3g} TFLOP/s in training ({machine.train[run.size]:.0%} of "
        f"{machine.peak[run.size] / 1e12:,.3g}), {score / 1e12:,.3g} in scoring, {machine.bandwidth / 1e9:,.4g} GB/s "
        f"of memory in writing texts, {machine.disk / 1e9:g} GB/s of disk"
    )
    yield "operations: 2 P a token forward; 4 P in all under a LoRA, 6 P with all weights, 2 P more with checkpointing"
    yield "texts are written to their full length; without --fresh, what is finished is not made again"
    if machine.kind == "gpu":
        yield (
            f"scoring takes {memory.SCORED_AT_LEAST} tokens a pass at least and fills a quarter of what is free; "
            f"{1 - SHARE:.0%} of the memory stay unused; of several GPUs one works at a time"
        )
    else:
        yield "a process keeps the memory that an earlier stage took"


def _unknown(found: Estimate) -> Iterator[str]:
    yield "waiting for other jobs"
    for one in found.stages:
        yield from (f"{words} ({one.name})" for words in one.unknown)


def _block(title: str, lines: Sequence[str]) -> str:
    """A title in the margin and wrapped lines beside it; tables are left as they are."""
    wrapped: list[str] = []
    for line in lines:
        table = line.startswith(" ") or "  " in line
        wrapped += [line] if table else textwrap.wrap(line, _WIDTH - _MARGIN, subsequent_indent="  ") or [""]
    margin = " " * _MARGIN
    first = [f"{title:{_MARGIN}}{wrapped[0]}"] if len(title) < _MARGIN else [title, margin + wrapped[0]]
    return "\n".join([*first, *(margin + line for line in wrapped[1:])])
