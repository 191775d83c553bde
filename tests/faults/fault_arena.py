"""What fault tests share: one small run with every stage, its copies, what must hold after a fault, and the record.

A *point* is one fault at one place. After it the run is started again, and only two things are right: the report that
an undisturbed run gives, digit for digit, or one clear message and exit code 2 (130 after a signal).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from compared_arena import write_data, write_recipe
from fault_server import Ended, Job, Server
from inject import Plan

from unlearn.report.page import render_html
from unlearn.results import RunReport
from unlearn.store.cache import MANIFEST

SMALL: dict[str, Any] = {
    "name": "faults",
    "teach": {"steps": 4, "learning_rate": 0.01, "batch_size": 12},
    "vector": {"forget": {"steps": 3, "learning_rate": 0.01, "batch_size": 6}, "lora": {"rank": 4}},
    "sweep": {"coefficients": [0.5]},
    "export": {"adapter": True, "merged": True, "shard_size": "200KB"},
    "robustness": {
        "items": 4,
        "quantize": [],
        "relearn": {"items": 2, "steps": [1], "learning_rate": 0.01, "unrelated": False},
        "probes": ["prefix"],
        "samples": 0,
        "lens": False,
    },
}

_WHO = ("target", "edited", "reference")
# What each stage of this run keeps, below the run's folder; "folder" is what comes before the first stage and at the
# end (the lock, the recipe), "report" what comes after the last.
STAGES: dict[str, tuple[str, ...]] = {
    "folder": (),
    "load": (),
    "data": ("items",),
    "teach": ("target",),
    "finetune": ("vectors/forget", "vectors/edit"),
    "foresee": ("vectors/near-r", "foresight"),
    "sweep": ("eval/0/validation", "eval/0.5/validation"),
    "test": ("eval/0/test", "eval/0.5/test"),
    "reference": ("reference", "eval/reference"),
    "benchmark": tuple(f"benchmark/{who}" for who in _WHO),
    "membership": tuple(f"membership/{who}" for who in _WHO),
    "robustness": tuple(
        f"robustness/{who}/{what}" for who in _WHO for what in ("plain", "prefix", "contrast", "relearn")
    ),
    "export": ("export/adapter", "export/merged"),
    "report": (),
}
REPORT = ("report.json", "report.html", "provenance.json")

SAME, MESSAGE, THEN_SAME, WRONG = "same report", "one message", "one message, then the same report", "WRONG"
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d.-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder for one point: the run in ``run``, the cache in ``cache``, temporary files in ``tmp``."""

    root: Path
    recipe: Path

    @classmethod
    def new(cls, root: Path, recipe: Path) -> Place:
        """An empty one."""
        (root / "tmp").mkdir(parents=True)
        return cls(root, recipe)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.root / "run"

    @property
    def cache(self) -> Path:
        """The cache folder."""
        return self.root / "cache"

    def job(self, *extra: str, out: str = "run", cache: str = "", **more: Any) -> Job:
        """The run, as it is always started: from ``root``, so that no path in its files depends on where that is."""
        argv = ["--recipe", str(self.recipe), "--out", out, *extra]
        env = {"UNLEARN_CACHE": cache or str(self.cache), "TMPDIR": str(self.root / "tmp")}
        return Job(argv, str(self.root), env, **more)

    def plan(self, at: int | None = None, *, cache: str = "", **more: Any) -> Plan:
        """What hits a run here. Every operation goes to ``operations``."""
        roots = (str(self.run), cache or str(self.cache))
        return Plan(roots, str(self.root / "operations"), at, **more)

    def struck(self) -> str:
        """The operation of the last run at which what was planned happened."""
        lines = (self.root / "operations").read_text().splitlines()
        return lines[next(n for n, line in enumerate(lines) if line.startswith("=> ")) - 1]

    def without(self, *stages: str) -> Place:
        """Remove stages (``load``: the cache) and the report, as a kill before them would have left it."""
        for name in REPORT:
            (self.run / name).unlink(missing_ok=True)
        shutil.rmtree(self.run / "figures", ignore_errors=True)
        for folder in (self.run / kept for stage in stages for kept in STAGES[stage]):
            shutil.rmtree(folder)
        if "load" in stages:
            shutil.rmtree(self.cache)
        return self


class Bench:
    """The undisturbed run that all points are compared with, and the process that runs them."""

    def __init__(self, folder: Path, **changed: Any) -> None:
        write_data(folder)
        self.recipe = write_recipe(folder, **{**SMALL, **changed})
        self.whole = Place.new(folder / "whole", self.recipe)
        self.server = Server(Place.new(folder / "warm", self.recipe).job())
        (ended,) = self.server.run(self.whole.job(plan=self.whole.plan()))
        assert ended.code == 0, ended.err
        self.seconds = ended.seconds
        self.operations = (self.whole.root / "operations").read_text().splitlines()  # each as ``kind path``
        self.expected = facts(self.whole.run)
        assert not broken(self.whole)

    def cold(self, root: Path) -> Place:
        """Nothing there yet."""
        return Place.new(root, self.recipe)

    def copy(self, root: Path) -> Place:
        """The finished run and its cache once more."""
        place = Place.new(root, self.recipe)
        self.fill(place)
        return place

    def fill(self, place: Place) -> None:
        """Put the finished run and its cache into a place whose folders may be there already."""
        shutil.copytree(self.whole.run, place.run, dirs_exist_ok=True)
        shutil.copytree(self.whole.cache, place.cache, dirs_exist_ok=True)

    def run(self, place: Place, *extra: str, **more: Any) -> Ended:
        """One run in a place."""
        (ended,) = self.server.run(place.job(*extra, **more))
        return ended

    def verdict(self, place: Place, ended: Ended) -> str:
        """What a run came to; what is wrong is printed."""
        if ended.code != 0:
            wrong = [] if is_one_message(ended) else [f"exit code {ended.code}", ended.err]
        else:
            found = facts(place.run)
            names = sorted(n for n in {*found, *self.expected} if found.get(n) != self.expected.get(n))
            wrong = [*(f"{name} is another" for name in names), *broken(place), *_at_odds(place.run)]
        if wrong:
            print(*wrong, sep="\n")
        return WRONG if wrong else MESSAGE if ended.code else SAME

    def again(self, place: Place, fault: Ended) -> str:
        """The verdict on a fault, and on the run after its cause is gone."""
        if fault.code >= 0 and self.verdict(place, fault) == WRONG:
            return WRONG
        then = self.verdict(place, self.run(place))
        return THEN_SAME if (fault.code, then) == (2, SAME) else then


def is_one_message(ended: Ended) -> bool:
    """Exit code 2 with one error and no traceback, or 130 and none."""
    said = ended.err + ended.out
    if "Traceback" in said or "Exception ignored" in said:
        return False
    return len(re.findall(r"^error: ", ended.err, re.MULTILINE)) == {2: 1, 130: 0}.get(ended.code)


def facts(run: Path) -> Mapping[str, Any]:
    """The report without times and places, and the SHA-256 of every other file, but for what names the time."""
    report: dict[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))
    provenance = report.pop("provenance")
    report.pop("seconds")
    for line in report["training"]:
        line.pop("seconds")
    found = {"report": report, "key": provenance["key"], "target": provenance["target"]}
    for path in _files(run):
        name = _TIME.sub("*", path.relative_to(run).as_posix())
        if path.name in ("training.json", "stage.json"):
            data = json.loads(path.read_text(encoding="utf-8"))
            found[name] = data.get("losses", data.get("key"))
        elif not path.name.startswith("results_") and name not in (*REPORT, "recipe.yaml", "resolved.yaml"):
            found[name] = digest(path)
    return found


def broken(place: Place) -> list[str]:
    """What must hold at any moment, and does not: files of finished stages, of cache entries, and the report's own."""
    return [*_broken_run(place.run), *_broken_cache(place.cache)]


def _broken_run(run: Path) -> Iterator[str]:
    sealed: set[Path] = set()
    for seal in sorted(p for p in _files(run) if p.name == "stage.json"):
        record = json.loads(seal.read_text(encoding="utf-8"))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in record["files"].items()}
        there = [p for p in seal.parent.rglob("*") if p.is_file() and p != seal]
        if wanted != {p.relative_to(seal.parent).as_posix(): (p.stat().st_size, digest(p)) for p in there}:
            yield f"{seal.parent}: its files are not what its seal says"
        sealed |= {seal, *there}
    for path in _files(run):
        if path in sealed:
            continue
        text = path.read_text(encoding="utf-8")
        whole = {"report.html": text.rstrip().endswith("</html>"), "recipe.yaml": text, "resolved.yaml": text}
        if path.name in ("report.json", "provenance.json") and path.parent == run:
            json.loads(text)
        elif not whole.get(path.relative_to(run).as_posix()):
            yield f"{path}: half a file, or one that no stage has sealed"


def _at_odds(run: Path) -> Iterator[str]:
    """Files of a finished run that do not say what its report says."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    if (run / "report.html").read_text(encoding="utf-8") != render_html(RunReport.from_json(report)):
        yield "report.html does not show report.json"
    provenance = json.loads((run / "provenance.json").read_text(encoding="utf-8"))
    if not report["provenance"].items() <= provenance.items():
        yield "provenance.json is not the report's"


def _broken_cache(cache: Path) -> Iterator[str]:
    for entry in sorted(cache.iterdir()) if cache.is_dir() else ():
        if entry.name.startswith("."):
            continue
        for name, file in json.loads((entry / MANIFEST).read_text(encoding="utf-8"))["files"].items():
            path = entry / name
            if not path.is_file() or (path.stat().st_size, digest(path)) != (file["size"], file["sha256"]):
                yield f"{path}: not what {MANIFEST} says"


def _files(run: Path) -> list[Path]:
    """Every file of a run's folder but figures, which show the report once more, and what is still being written."""
    found = (p for p in run.rglob("*") if p.is_file())
    return sorted(p for p in found if not p.relative_to(run).parts[0].startswith((".", "figures")))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def some(*values: Any, slow: Sequence[Any]) -> list[Any]:
    """Parameters of a test, of which CI takes the first and the slow suite all."""
    marked = [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in slow]
    return [*values, *marked]


def of_stage(stage: str) -> str:
    """A regular expression that the operations of one stage have, and no others."""
    if stage == "load":
        return r"[ /]cache(/|$)"
    if stage == "folder":
        return r"[ /]run/\.?(unlearn-lock|resolved|recipe)"
    if stage == "report":
        return r"[ /]run/\.?(report|provenance|figures)"
    flat = "|".join(re.escape(kept.replace("/", "+")) for kept in STAGES[stage])
    kept = "|".join(re.escape(kept) for kept in STAGES[stage])
    return rf"[ /]run/(\.unlearn-(tmp|work)/({flat})[.@]|({kept})(/|$))"
