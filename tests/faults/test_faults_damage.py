"""Files that were changed behind the program's back: found by checksum and made again, or one clear message."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_arena import MESSAGE, SAME, STAGES, THEN_SAME, Bench, Ledger, Place, of_stage


def flipped(path: Path) -> None:
    """One bit in the middle; size and time of the file stay."""
    raw, times = bytearray(path.read_bytes()), path.stat()
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def halved(path: Path) -> None:
    """Cut to half."""
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    """Zero bytes."""
    os.truncate(path, 0)


def swapped(path: Path) -> None:
    """Another file of the same kind in its place; of another kind where there is only one."""
    root = next(p for p in path.parents if p.name in ("run", "cache"))
    others = sorted((p for p in root.rglob("*") if p.is_file() and p != path), key=lambda p: (p.name != path.name, p))
    content = path.read_bytes()
    path.write_bytes(next(raw for p in others if (raw := p.read_bytes()) != content))


def removed(path: Path) -> None:
    """Not there any more."""
    path.unlink()


DAMAGES: tuple[Callable[[Path], None], ...] = (flipped, halved, emptied, swapped, removed)

# Every file of a finished run, and of its cache, by what it is. One of each is enough for CI; the slow suite has all.
KINDS = {
    "vector": "run/vectors/*/vector.safetensors",
    "edit": "run/vectors/edit/vector.safetensors",
    "training log": "run/**/training.json",
    "seal": "run/**/stage.json",
    "items": "run/items/*.jsonl",
    "shard of the target": "run/target/model.safetensors",
    "configuration of the target": "run/target/config.json",
    "tokenizer of the target": "run/target/tokenizer.json",
    "shard of the reference": "run/reference/model.safetensors",
    "foresight": "run/foresight/foresight.json",
    "scores": "run/**/scores.json",
    "values": "run/**/values.json",
    "completions": "run/**/completions.json",
    "samples": "run/**/samples_*.jsonl",
    "results of lm-eval": "run/**/results_*.json",
    "adapter": "run/export/adapter/adapter_model.safetensors",
    "facts of an export": "run/export/*/export.json",
    "card": "run/export/*/README.md",
    "merged shard": "run/export/merged/model-*.safetensors",
    "report": "run/report.json",
    "page": "run/report.html",
    "provenance": "run/provenance.json",
    "recipe": "run/recipe.yaml",
    "resolved recipe": "run/resolved.yaml",
    "cached weights": "cache/*/model.safetensors",
    "cached configuration": "cache/*/config.json",
    "cached tokenizer": "cache/*/tokenizer.json",
    "manifest of the cache": "cache/*/complete.json",
}


def judge(bench: Bench, ledger: Ledger, place: Place, kind: str, point: str) -> None:
    """Run again in a damaged place. After a message, which must name a way out, the way out is taken."""
    ended = bench.run(place)
    outcome = bench.verdict(place, ended)
    if outcome == MESSAGE:
        assert "--fresh" in ended.err, ended.err
        outcome = THEN_SAME if bench.verdict(place, bench.run(place, "--fresh")) == SAME else MESSAGE
    assert ledger.note(kind, point, outcome) in (SAME, THEN_SAME), (point, ended.err)


def prepared(bench: Bench, root: Path, file: str) -> Place:
    """The finished run; where the cache is to be damaged, without what would keep the cache from being looked at."""
    place = bench.copy(root)
    return place.without("teach") if file.startswith("cache/") else place


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_found(kind: str, bench: Bench, ledger: Ledger, tmp_path: Path) -> None:
    place = prepared(bench, tmp_path / "place", KINDS[kind])
    for path in place.root.glob(KINDS[kind]):
        flipped(path)
    judge(bench, ledger, place, "a flipped bit", kind)


def test_every_file_is_of_a_kind(bench: Bench) -> None:
    known = {p for pattern in KINDS.values() for p in bench.whole.root.glob(pattern)}
    folders = (bench.whole.run, bench.whole.cache)
    there = {p for f in folders for p in f.rglob("*") if p.is_file() and not hidden(p, f)}
    left = {p.name for p in there - known}
    assert left <= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} | {
        *("adapter_config.json", "model.safetensors.index.json")
    }


def hidden(path: Path, root: Path) -> bool:
    return path.relative_to(root).parts[0].startswith(".")


@pytest.mark.parametrize("damage", DAMAGES[1:], ids=lambda d: d.__name__)
@pytest.mark.parametrize("file", ["run/vectors/forget/vector.safetensors", "run/eval/0.5/test/scores.json"])
def test_other_damages(file: str, damage: Callable[[Path], None], bench: Bench, ledger: Ledger, tmp_path: Path) -> None:
    place = prepared(bench, tmp_path / "place", file)
    damage(place.root / file)
    judge(bench, ledger, place, f"a file {damage.__name__}", file)


def test_two_whole_stages_change_places(bench: Bench, ledger: Ledger, tmp_path: Path) -> None:
    """Each with its own seal, so that no checksum is wrong."""
    place = bench.copy(tmp_path / "place")
    for one, other in (("vectors/forget", "vectors/near-r"), ("eval/0/test", "eval/0.5/test"), ("target", "reference")):
        (place.run / one).rename(place.run / "aside")
        (place.run / other).rename(place.run / one)
        (place.run / "aside").rename(place.run / other)
    judge(bench, ledger, place, "a file swapped", "whole stages")


CHECKPOINT = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", *CHECKPOINT, "unlearn_checkpoint_is_whole"])
def test_a_damaged_checkpoint(file: str, bench: Bench, ledger: Ledger, tmp_path: Path) -> None:
    """Training is killed after its second checkpoint, which is damaged: it goes on from the first."""
    place = bench.copy(tmp_path / "place").without("finetune")
    killed = bench.run(place, plan=place.plan(1, match=r"run/\.unlearn-work/vectors\+forget@\*/checkpoint-3"))
    assert killed.code == -9, killed.err
    (path,) = place.run.glob(f".unlearn-work/vectors+forget@*/checkpoint-2/{file}")
    flipped(path)
    outcome = ledger.note("a flipped bit", f"checkpoint's {file}", bench.verdict(place, bench.run(place)))
    assert outcome == SAME


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": 1}', b"\xff" * 64, b"0" * 4096])
def test_a_damaged_lock(content: bytes, bench: Bench, ledger: Ledger, tmp_path: Path) -> None:
    """What a power cut may leave of a lock file stands in nobody's way."""
    place = bench.copy(tmp_path / "place").without("export")
    killed = bench.run(place, plan=place.plan(1, match=of_stage("export")))
    assert killed.code == -9, killed.err
    lock = place.run / ".unlearn-lock"
    assert lock.exists()
    lock.write_bytes(content)
    outcome = ledger.note("a damaged lock", repr(content[:12]), bench.verdict(place, bench.run(place)))
    assert outcome == SAME


# --- the slow suite ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("stage", list(STAGES))
def test_every_file(stage: str, damage: Callable[[Path], None], bench: Bench, ledger: Ledger, tmp_path: Path) -> None:
    roots = {"load": ["cache"], "report": ["run"]}.get(stage, [f"run/{kept}" for kept in STAGES[stage]])
    whole = bench.whole.root
    files = [
        p.relative_to(whole).as_posix()
        for root in roots
        for p in (whole / root).glob("*" if stage == "report" else "**/*")
        if p.is_file() and not p.name.startswith(".")
    ]
    assert files
    for number, file in enumerate(sorted(files)):
        place = prepared(bench, tmp_path / str(number), file)
        damage(place.root / file)
        judge(bench, ledger, place, f"a file {damage.__name__}", file)
        shutil.rmtree(place.root)
