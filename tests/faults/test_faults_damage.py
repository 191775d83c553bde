"""Files that were changed behind the program's back: found by checksum and made again, or one clear message."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_arena import MESSAGE, SAME, THEN_SAME, WRONG, Bench, Place, of_stage, some

from unlearn.store.stages import LOCK


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


DAMAGES: tuple[Callable[[Path], None], ...] = (flipped, halved, emptied, swapped, Path.unlink)

# The files of a finished run and its cache, by what they are. CI damages several kinds at once; the slow suite each.
KINDS = {
    "vectors": ("run/vectors/*/vector.safetensors",),
    "training logs": ("run/**/training.json",),
    "seals": ("run/**/stage.json",),
    "items": ("run/items/*.jsonl", "run/foresight/foresight.json"),
    "target": ("run/target/*.json", "run/target/model.safetensors"),
    "reference": ("run/reference/model.safetensors",),
    "scores": ("run/**/scores.json", "run/**/completions.json"),
    "samples": ("run/**/samples_*.jsonl", "run/**/results_*.json"),
    "adapter": ("run/export/adapter/*",),
    "merged weights": ("run/export/merged/*",),
    "report": ("run/report.json",),
    "page": ("run/report.html",),
    "provenance": ("run/provenance.json",),
    "recipe": ("run/recipe.yaml",),
    "resolved recipe": ("run/resolved.yaml",),
    "cached weights": ("cache/*/model.safetensors",),
    "cached texts": ("cache/*/config.json", "cache/*/tokenizer.json", "cache/*/complete.json"),
}
_BY_HAND = re.compile(r"Move them elsewhere|choose another --out")  # what may be somebody's is not thrown away


def files_of(root: Path, kind: str) -> list[Path]:
    """A kind's files below a place's folder."""
    return sorted({p for pattern in KINDS[kind] for p in root.glob(pattern) if p.is_file()})


def judge(bench: Bench, place: Place) -> None:
    """Run again in a damaged place. After a message, which must name a way out, the way out is taken."""
    ended = bench.run(place)
    outcome = bench.verdict(place, ended)
    if outcome == MESSAGE and not _BY_HAND.search(ended.err):
        assert "--fresh" in ended.err, ended.err
        again = bench.verdict(place, bench.run(place, "--fresh"))
        outcome = THEN_SAME if again == SAME else WRONG
    assert outcome in (SAME, THEN_SAME, MESSAGE), ended.err


def prepared(bench: Bench, root: Path, kind: str) -> Place:
    """The finished run; where the cache is to be damaged, without what would keep the cache from being looked at."""
    place = bench.copy(root)
    return place.without("teach") if kind.startswith("cached") else place


# Of kinds that stand together each file must be found by itself: what is made again from one holds for all.
TOGETHER = (
    ("vectors", "training logs", "items", "scores", "samples"),
    ("target", "reference", "adapter", "merged weights"),
    ("cached weights", "cached texts"),
    *((kind,) for kind in ("seals", "report", "page", "provenance", "recipe", "resolved recipe")),
)


@pytest.mark.parametrize("kinds", TOGETHER, ids=lambda kinds: kinds[0])
def test_a_flipped_bit_is_found(kinds: tuple[str, ...], bench: Bench, tmp_path: Path) -> None:
    place = prepared(bench, tmp_path / "place", kinds[0])
    for kind in kinds:
        files = files_of(place.root, kind)
        assert files, kind
        for path in files:
            flipped(path)
    judge(bench, place)


@pytest.mark.parametrize("damage", DAMAGES[1:], ids=lambda d: d.__name__)
def test_other_damages(damage: Callable[[Path], None], bench: Bench, tmp_path: Path) -> None:
    place = bench.copy(tmp_path / "place")
    for file in ("vectors/forget/vector.safetensors", "eval/0.5/test/scores.json", "export/adapter/README.md"):
        damage(place.run / file)
    judge(bench, place)


def test_two_whole_stages_change_places(bench: Bench, tmp_path: Path) -> None:
    """Each with its own seal, so that no checksum is wrong."""
    place = bench.copy(tmp_path / "place")
    for one, other in (("vectors/forget", "vectors/near-r"), ("eval/0/test", "eval/0.5/test"), ("target", "reference")):
        (place.run / one).rename(place.run / "aside")
        (place.run / other).rename(place.run / one)
        (place.run / "aside").rename(place.run / other)
    judge(bench, place)


_FIRST = ("adapter_model.safetensors", "stage.json")
_OTHERS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin")


@pytest.mark.parametrize("file", some(*_FIRST, slow=_OTHERS))
def test_a_damaged_checkpoint(file: str, bench: Bench, tmp_path: Path) -> None:
    """Training is killed after its second checkpoint, which is damaged: it goes on from the first."""
    place = bench.copy(tmp_path / "place").without("finetune")
    killed = bench.run(place, plan=place.plan(1, match=r"run/\.unlearn-work/vectors\+forget@\*/checkpoint-3"))
    assert killed.code == -9, killed.err
    (path,) = place.run.glob(f".unlearn-work/vectors+forget@*/checkpoint-2/{file}")
    flipped(path)
    ended = bench.run(place)
    assert "checkpoint-2: " in ended.err
    assert bench.verdict(place, ended) == SAME


@pytest.mark.parametrize("content", [None, b"", b'{"pid": 1}', b"\xff" * 64, b"0" * 4096], ids=range(5))
def test_a_damaged_lock(content: bytes | None, bench: Bench, tmp_path: Path) -> None:
    """What a power cut may leave of a lock file stands in nobody's way for long (None: a killed run's, flipped)."""
    place = bench.copy(tmp_path / "place")
    if content is None:
        killed = bench.run(place.without("export"), plan=place.plan(1, match=of_stage("export")))
        assert killed.code == -9, killed.err
        flipped(place.run / LOCK)
    else:
        (place.run / LOCK).write_bytes(content)
    assert bench.verdict(place, bench.run(place)) == SAME


def test_no_file_is_left_out(bench: Bench) -> None:
    assert sorted(kind for kinds in TOGETHER for kind in kinds) == sorted(KINDS)
    known = {file for kind in KINDS for file in files_of(bench.whole.root, kind)}
    kept = [p for p in bench.whole.root.rglob("*") if p.is_file() and p.relative_to(bench.whole.root).parts[0] != "tmp"]
    left = {p.name for p in kept if p not in known and not any(part.startswith((".", "figures")) for part in p.parts)}
    assert left <= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "operations"}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_file(kind: str, damage: Callable[[Path], None], bench: Bench, tmp_path: Path) -> None:
    wrong = []
    for number, file in enumerate(files_of(bench.whole.root, kind)):
        place = prepared(bench, tmp_path / str(number), kind)
        damage(place.root / file.relative_to(bench.whole.root))
        try:
            judge(bench, place)
        except AssertionError as e:
            wrong.append(f"{file}: {e}")
    assert wrong == []
