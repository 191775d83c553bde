"""Which finished jobs of a grid can be set side by side. What cannot be is set aside and said, never averaged.

Two runs are compared only if they were measured alike. What a grid leaves alone must be the same in all its jobs; what
an axis changes may differ along that axis and no other. So every check is: this value may depend on these settings,
and among jobs that agree in them it must be one and the same. Where it is not, the most frequent value stands.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unlearn.cluster.grid import Job
from unlearn.cluster.runs import SEED, Run
from unlearn.recipe.metrics import Key
from unlearn.report.figures import unseeing
from unlearn.score.search import say_key
from unlearn.store.files import some
from unlearn.store.provenance import DISTRIBUTION, LIBRARIES

_DATA = ("forget", "also_forget", "learn", "analogy", "retain", "utility", "holdout")
_MODEL = ("model",)
_SCORED = ("eval.tasks", "choose.metric")
# Axes that make the question another one, so that settings along them are not rivals.
QUESTION = (*_DATA, *_MODEL, *_SCORED, "teach")
_LATER = ("vector", "sweep", "choose", "eval", "reference", "benchmark", "robustness", "export", "reuse", "cluster")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Compared:
    """The runs that count, those set aside with the reason, and what else a reader must know.

    ``mixed`` are names of jobs whose group may hold runs of several programs or libraries; they do count.
    """

    runs: tuple[Run, ...]
    aside: tuple[tuple[Run, str], ...]
    warnings: tuple[str, ...]
    mixed: frozenset[str]


def about(axis: str, parts: Iterable[str]) -> bool:
    """Whether an axis lies in one of these parts of a recipe; ``vector`` as a whole covers ``vector.lora.rank``."""
    return any(axis == part or axis.startswith(f"{part}.") or part.startswith(f"{axis}.") for part in parts)


def settings_of(job: Job, wanted: Callable[[str], bool]) -> tuple[Any, ...]:
    """The recipe and the values of some axes: a key to group by."""
    return (job.recipe, *sorted((k, v) for k, v in job.settings.items() if wanted(k)))


def compare(runs: Sequence[Run]) -> Compared:
    """Check all runs against each other."""
    aside: dict[str, str] = {}
    _copies(runs, aside)
    _odd(runs, aside, _question, lambda r: _yard(r), "its goals, kept metrics or bound are not those of the other jobs")
    _odd(runs, aside, _of_base, _base, "another base model (fingerprint)")
    for name in sorted({name for r in runs for name in r.data}):
        here = [r for r in runs if name in r.data]
        what = f"other data in {name[0]} {name[1]}"
        _odd(here, aside, _data, lambda r, n=name: r.data[n].get("digest"), f"{what} (digest)")  # type: ignore[misc]
        _odd(here, aside, _data_of_any_seed, lambda r, n=name: r.data[n].get("rows"), f"{what} (rows)")  # type: ignore[misc]
    kept = tuple(r for r in runs if r.job.name not in aside)
    warnings = [f"{_jobs(names)} set aside: {why}" for why, names in _by_reason(aside).items()]
    mixed: set[str] = set()
    for what, value in _VERSIONS:
        warnings += _several(kept, what, value, mixed)
    warnings += _unseen(kept) + _targets(kept) + _states(kept)
    left = tuple((r, aside[r.job.name]) for r in runs if r.job.name in aside)
    return Compared(kept, left, tuple(warnings), frozenset(mixed))


def _question(run: Run) -> Hashable:
    return settings_of(run.job, lambda k: about(k, (*QUESTION, "choose")))


def _yard(run: Run) -> Hashable:
    return run.yardstick


def _base(run: Run) -> str | None:
    """Fingerprint of the model before anything was taught; None for taught ones in reports that do not have it."""
    told = run.report.provenance
    return told.get("base") or (None if run.taught else told.get("target"))


def _of_base(run: Run) -> Hashable:
    return (settings_of(run.job, lambda k: about(k, _MODEL)), run.job.name if _base(run) is None else "")


def _data(run: Run) -> Hashable:
    return settings_of(run.job, lambda k: k == SEED or about(k, (*_DATA, *_MODEL)))


def _data_of_any_seed(run: Run) -> Hashable:
    return settings_of(run.job, lambda k: about(k, (*_DATA, *_MODEL)))


def _copies(runs: Sequence[Run], aside: dict[str, str]) -> None:
    """Reports hold dates and times, so two equal ones are one run's, copied: nobody can say whose."""
    names: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        names[run.sha256].append(run.job.name)
    for same in names.values():
        if len(same) > 1:
            aside |= dict.fromkeys(same, f"the same report, byte for byte, in {len(same)} jobs: a copied folder")


def _odd(
    runs: Sequence[Run],
    aside: dict[str, str],
    group: Callable[[Run], Hashable],
    value: Callable[[Run], Hashable],
    why: str,
) -> None:
    """Set the jobs aside whose value is not that of most of their group; on a tie the first job's value stands."""
    found: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if run.job.name not in aside:
            found[group(run)].append(run)
    for members in found.values():
        counts = Counter(value(r) for r in members)
        if len(counts) > 1:
            stands, most = counts.most_common(1)[0]  # of equal counts the first met
            aside |= {r.job.name: f"{why}, unlike {most} others" for r in members if value(r) != stands}


def _by_reason(aside: Mapping[str, str]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, why in aside.items():
        found[why].append(name)
    return found


def _jobs(names: Sequence[str]) -> str:
    return f"{len(names)} job{'s' * (len(names) != 1)} ({some(names, _SHOWN)})"


def _library(name: str) -> Callable[[Run], Any]:
    return lambda run: (run.report.provenance.get("versions") or {}).get(name)


def _commit(run: Run) -> Any:
    code = run.report.provenance.get("code")
    return None if not code else f"{str(code.get('commit'))[:12]}{' with changes' if code.get('dirty') else ''}"


_VERSIONS: tuple[tuple[str, Callable[[Run], Any]], ...] = (
    ("commits of this program", _commit),
    *((f"versions of {name}", _library(name)) for name in (DISTRIBUTION, *LIBRARIES)),
    ("versions of Python", lambda run: run.report.provenance.get("python")),
)


def _several(runs: Sequence[Run], what: str, value: Callable[[Run], Any], mixed: set[str]) -> list[str]:
    """Runs by several versions are averaged, since a grid may take weeks, but that is said and their groups marked."""
    found: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        found[str(value(run))].append(run.job.name)
    if len(found) < 2:
        return []
    order = sorted(found.items(), key=lambda pair: -len(pair[1]))
    mixed |= {name for _, names in order[1:] for name in names}
    parts = [f"{'unknown' if v == 'None' else v}: {_jobs(names)}" for v, names in order]
    return [f"{len(found)} {what}, averaged as if they were one: {'; '.join(parts)}"]


def _unseen(runs: Sequence[Run]) -> list[str]:
    """Kept metrics that could not show harm, since their model scored nothing, or what guessing gives, before."""
    found: dict[Key, list[str]] = defaultdict(list)
    for run in runs:
        for key in sorted(unseeing(run.report)):
            found[key].append(run.job.name)
    return [
        f"{say_key(key)} was 0 or no more than chance before the edit in {_jobs(names)}: it could not show harm there"
        for key, names in found.items()
    ]


def _targets(runs: Sequence[Run]) -> list[str]:
    """Models taught alike that came out differently: settings are then compared on different models."""
    found: dict[Hashable, dict[Any, list[str]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run.taught:
            key = settings_of(run.job, lambda k: not about(k, _LATER))
            found[key][run.report.provenance.get("target")].append(run.job.name)
    split = [targets for targets in found.values() if len(targets) > 1]
    if not split:
        return []
    names = [name for targets in split for jobs in targets.values() for name in jobs]
    most = max(len(targets) for targets in split)
    return [
        f"{_jobs(names)} were taught alike, by the same seed, and yet their models differ (up to {most} of them): "
        "differences between settings contain those between these models"
    ]


def _states(runs: Sequence[Run]) -> list[str]:
    names = [r.job.name for r in runs if r.state is not None and r.state.state == "failed"]
    return [f"{_jobs(names)} failed in a later attempt; the whole report of an earlier one is used"] if names else []
