"""What each job of a grid left behind: the figures that the merged report needs, or why there are none.

A report counts only when ``provenance.json`` beside it names its SHA-256: that file is written last, so a report
without it is of a run that never ended, and one that differs was changed by somebody or by a disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from unlearn.cluster.grid import Grid, Job, job_folder
from unlearn.cluster.job_state import JobState, state_file
from unlearn.recipe.metrics import METRICS, Key, is_perplexity
from unlearn.report.figures import kept_keys, missed, share_kept, total_seconds
from unlearn.results import RunReport, Score
from unlearn.score.search import share_left
from unlearn.store.provenance import tidy
from unlearn.text import listing

SEED = "seed"  # the axis whose values are runs of one and the same setting
Why = Literal["failed", "stopped", "said running", "never began", "unfinished", "damaged"]
_LINE = 300  # characters of an error that are shown
_LARGEST = 256 * 1024**2  # bytes
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError)


@dataclass(frozen=True, slots=True)
class Missing:
    """A job without a report that can be used, and why."""

    job: Job
    why: Why
    detail: str
    state: JobState | None


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What a run's two main numbers are: only runs with the same one can be compared.

    ``goals`` are the metrics to be driven down (sign 1) or up (sign -1); ``kept`` those under the bound. ``scale`` is
    the rule's bound where a kept metric is a perplexity, whose share is reckoned by it. The figure of one goal is its
    score, that of several the mean of what is left of each beside λ = 0, which is how the rule weighs them.
    """

    goals: tuple[tuple[Key, int], ...]
    kept: tuple[Key, ...]
    scale: tuple[float | None, float | None] | None

    @property
    def sign(self) -> int:
        """1 where the goal's figure is to fall, -1 where it is to rise; what is left of several is to fall."""
        return self.goals[0][1] if len(self.goals) == 1 else 1

    @property
    def roles(self) -> str:
        """``forget``, ``learn`` or both."""
        return listing(dict.fromkeys(key[0] for key, _ in self.goals)) if self.goals else "forget"

    @property
    def label(self) -> str:
        """``europe acc``, or which mean it is."""
        names = [f"{name} {metric}" for (_, name, metric), _ in self.goals]
        return names[0] if len(names) == 1 else f"mean share left of {', '.join(names)}"


@dataclass(frozen=True, slots=True)
class At:
    """The two main numbers at one coefficient, on validation items; None where there is none.

    ``left`` is what is still to be forgotten (less is better), ``kept`` the share of the worst kept metric.
    """

    coefficient: float
    left: float | None
    kept: float | None
    within: bool
    collapsed: str


@dataclass(frozen=True)
class Run:
    """A finished job: its report (without examples, training and the rest), and what tells whether it compares."""

    job: Job
    report: RunReport
    sha256: str
    data: Mapping[tuple[str, str], Mapping[str, Any]]
    taught: bool
    where: str
    state: JobState | None

    @property
    def seed(self) -> str:
        """The value of the seed axis, empty without one."""
        return self.job.settings.get(SEED, "")

    @cached_property
    def yardstick(self) -> Yardstick:
        """What this run's numbers are."""
        kept, chosen = kept_keys(self.report), self.report.chosen
        kinds = [(role, name, str(line.get("kind"))) for (role, name), line in self.data.items()]
        kinds = [k for k in kinds if k[0] in ("forget", "learn")]
        goals = []  # as reports without any tell them
        for role, name, kind in kinds:
            first = kind == kinds[0][2] or kind not in METRICS
            goals.append((role, name, chosen.forget_metric if first else METRICS[kind][0]))  # type: ignore[index]
        goals = list(chosen.goals) or goals
        found = [(key, 1 if (key[0] == "forget") == self._higher.get(key, True) else -1) for key in goals]
        scale = (chosen.keep, chosen.perplexity) if any(is_perplexity(k[2]) for k in kept) else None
        return Yardstick(tuple(found), tuple(sorted(kept)), scale)

    @cached_property
    def _higher(self) -> Mapping[Key, bool]:
        """Of each metric, whether more of it is better."""
        found = {s.key: s.higher_is_better for p in self.report.sweep for s in p.scores}
        return found | {(r.set, r.name, r.metric): r.higher_is_better for r in self.report.scores}

    @cached_property
    def sweep(self) -> tuple[At, ...]:
        """Every coefficient tried, in order."""
        points = sorted(self.report.sweep, key=lambda p: p.coefficient)
        base = {s.key: s.score for p in points[:1] if p.coefficient == 0 for s in p.scores}
        found = []
        for point in points:
            here = {s.key: s.score for s in point.scores}
            two = self._left(base, here), self._kept(base, here)
            found.append(At(point.coefficient, *two, point.within_bound, point.collapsed))
        return tuple(found)

    @cached_property
    def chosen_at(self) -> At | None:
        """The chosen coefficient's scores on validation items."""
        near = self.report.chosen.coefficient
        return next((p for p in self.sweep if math.isclose(p.coefficient, near, abs_tol=1e-12)), None)

    @cached_property
    def before(self) -> float | None:
        """What was left before the edit, on test items."""
        return self._left(self._rows("before"), self._rows("before"))

    @cached_property
    def after(self) -> float | None:
        """What is left after it, on test items."""
        return self._left(self._rows("before"), self._rows("after"))

    @cached_property
    def kept(self) -> float | None:
        """The share of the kept metric that suffered most, on test items; None when one of them is no number."""
        return self._kept(self._rows("before"), self._rows("after"))

    @property
    def met_on_test(self) -> bool:
        """Whether the bounds hold on test items too, by the rule's own measure."""
        return self.report.chosen.bound_met and not missed(self.report)

    def _rows(self, side: Literal["before", "after"]) -> Mapping[Key, Score]:
        return {r.key: getattr(r, side) for r in self.report.scores}

    def _kept(self, before: Mapping[Key, Score], after: Mapping[Key, Score]) -> float | None:
        """The smallest share. A share without a meaning (of 0) is left out; a score without a number leaves none."""
        chosen, shares = self.report.chosen, []
        for key in self.yardstick.kept:
            was, now = before.get(key), after.get(key)
            if was is None or now is None or not (math.isfinite(was.value) and math.isfinite(now.value)):
                return None
            higher = self._higher.get(key, True)
            share = share_kept(key[2], higher, was.value, now.value, chosen.keep, chosen.perplexity)
            shares += [] if share is None else [share]
        return number_of(min(shares, default=None))

    def _left(self, before: Mapping[Key, Score], after: Mapping[Key, Score]) -> float | None:
        """What is still to be done; None where a goal has no score, or one of several left nothing to do."""
        goals = self.yardstick.goals
        if any(key not in after for key, _ in goals):
            return None
        if len(goals) == 1:
            key, sign = goals[0]
            return number_of(sign * after[key].value)
        shares = [share_left(key, before[key].value, after[key].value) for key, _ in goals if key in before]
        known = [share for share in shares if share is not None]
        return number_of(math.fsum(known) / len(goals)) if known and len(known) == len(goals) else None

    @property
    def seconds(self) -> float:
        """The run's own time."""
        return total_seconds(self.report)


def number_of(value: float | None) -> float | None:
    """The value, or None for one that is no number."""
    return value if value is not None and math.isfinite(value) else None


def read_runs(root: Path, grid: Grid) -> Iterator[Run | Missing]:
    """Every job in the grid's order, one report in memory at a time."""
    for job in grid.jobs:
        yield _read(root, job)


def _read(root: Path, job: Job) -> Run | Missing:
    state, folder = JobState.load(root, job.name), job_folder(root, job.name)
    try:
        text = _bytes_of(folder / "report.json")
    except FileNotFoundError:
        return _without(root, job, state)
    except OSError as e:
        return Missing(job, "damaged", f"report.json cannot be read: {e.strerror or e}", state)
    sha = hashlib.sha256(text).hexdigest()
    try:
        written = json.loads(_bytes_of(folder / "provenance.json"))["report_sha256"]
    except FileNotFoundError:
        return Missing(job, "unfinished", "report.json is there without the provenance.json that ends a run", state)
    except _BROKEN as e:
        return Missing(job, "damaged", f"provenance.json: {_line(e)}", state)
    if written != sha:
        what = "report.json is not the one that the run wrote: its SHA-256 differs from that in provenance.json"
        return Missing(
            job, "said running" if state is not None and state.state == "running" else "damaged", what, state
        )
    try:
        return _run(job, json.loads(text), sha, state)
    except _BROKEN as e:
        return Missing(job, "damaged", f"report.json: {_line(e)}", state)


def sealed(folder: Path) -> bool:
    """Whether a run's folder has a report, and it is the one that the run wrote last."""
    try:
        sha = hashlib.sha256(_bytes_of(folder / "report.json")).hexdigest()
        return bool(json.loads(_bytes_of(folder / "provenance.json"))["report_sha256"] == sha)
    except _BROKEN:
        return False


def _bytes_of(path: Path) -> bytes:
    """What is in a file. A pipe would never end, and nothing of this size is a report."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
        raise OSError(0, "not an ordinary file, or larger than any report", str(path))
    return path.read_bytes()


def _run(job: Job, data: dict[str, Any], sha: str, state: JobState | None) -> Run:
    lines = {(str(line["set"]), str(line["name"])): dict(line) for line in data["data"]}
    taught = any(line.get("stage") == "teach" for line in data["training"])
    machine = data["provenance"].get("machine") or {}
    gpus = [str(g) for g in machine.get("gpus") or ()]
    where = f"{len(gpus)} x {gpus[0]}" if gpus else f"{machine.get('cores')} cores, {machine.get('cpu')}"
    bare: dict[str, Any] = {"examples": [], "training": [], "exports": {}, "description": ""}
    bare |= dict.fromkeys(("foresight", "benchmark", "robustness"))  # large, and not merged
    for score in _scores_in(data):
        score["value"] = math.nan if score["value"] is None else score["value"]
        if not _is_number(score["value"]) or not (score["stderr"] is None or _is_number(score["stderr"])):
            raise ValueError(f"a score is no number: {score['value']!r} with the standard error {score['stderr']!r}")
    for line in (*data["scores"], *(s for p in data["sweep"] for s in p["scores"])):
        if line.get("chance") is not None and not _is_number(line["chance"]):
            raise ValueError(f"a chance is no number: {line['chance']!r}")
    report = RunReport.from_json({**data, **bare, "membership": [], "data": []})
    for value in (report.chosen.coefficient, *report.seconds.values(), *(p.coefficient for p in report.sweep)):
        if not _is_number(value) or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a number")
    run = Run(job, report, sha, lines, taught, where, state)
    _ = (run.yardstick, run.sweep, run.kept, run.before, run.after)  # whatever is wrong with it is found here
    return run


def _scores_in(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every score of a report, as it is in the file."""
    for row in data["scores"]:
        yield from (row[k] for k in ("before", "after", "reference") if row.get(k) is not None)
    for point in data["sweep"]:
        yield from (s["score"] for s in point["scores"])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _without(root: Path, job: Job, state: JobState | None) -> Missing:
    """Why there is no report at all."""
    if state is None:
        if state_file(root, job.name).exists():
            return Missing(job, "damaged", "its state file is damaged, and there is no report", None)
        return Missing(job, "never began", "", None)
    if state.state == "failed":
        return Missing(job, "failed", last_line(state.error) or f"exit code {state.exit}", state)
    if state.state == "stopped":
        return Missing(job, "stopped", f"told to stop at {state.since}; goes on when it is submitted again", state)
    if state.state == "running":
        return Missing(job, "said running", f"since {state.since}, attempt {state.attempt}", state)
    return Missing(job, "damaged", "says that it is done, but has no report.json", state)


def last_line(error: str | None) -> str:
    """The line of an error that says what it was, without secrets and cut to what fits a table."""
    lines = [line.strip() for line in (error or "").splitlines() if line.strip()]
    text = tidy(lines[-1]) if lines else ""
    return text if len(text) <= _LINE else f"{text[: _LINE - 1]}…"


def _line(error: BaseException) -> str:
    said = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return last_line(said)
