"""Settings of a grid over their seeds, and which of the settings stand out. No I/O.

A group is a recipe with the values of every axis but the seed. A family is groups that ask the same question (the same
recipe, model, data and metric), so that only they are rivals.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from unlearn.cluster.compare import QUESTION, Compared, about, settings_of
from unlearn.cluster.grid import Grid, Job
from unlearn.cluster.numbers import Spread, common_seeds, pareto
from unlearn.cluster.runs import SEED, Missing, Run, Yardstick
from unlearn.recipe.metrics import Key
from unlearn.results import Score

Split = Literal["test", "validation"]


@dataclass(frozen=True, slots=True)
class Pair:
    """The two main numbers over runs: ``goal`` as it is reported (not turned round), and the worst kept share."""

    goal: Spread
    kept: Spread


@dataclass(frozen=True, slots=True)
class Step:
    """One coefficient that every run of a group was scored at in full, on validation items."""

    coefficient: float
    two: Pair
    within: int
    collapsed: int


@dataclass(frozen=True, slots=True)
class ScoreLine:
    """One metric before and after, on test items.

    The spreads are over runs; ``stderr_before`` and ``stderr_after`` are the runs' own standard errors over items,
    averaged. ``n`` is the number of items in a run, None where runs differ. ``chance`` is what guessing scores, on
    average over the runs; None where the metric is not the accuracy of a choice.
    """

    key: Key
    split: str
    higher_is_better: bool
    before: Spread
    after: Spread
    stderr_before: float | None
    stderr_after: float | None
    n: int | None
    chance: float | None


@dataclass(frozen=True)
class Group:
    """One setting. ``settings`` is without the seed; ``planned`` are its jobs, ``runs`` those that count."""

    index: int
    recipe: int
    name: str
    settings: Mapping[str, str]
    planned: tuple[Job, ...]
    runs: tuple[Run, ...]
    aside: tuple[tuple[Run, str], ...]
    missing: tuple[Missing, ...]
    notes: tuple[str, ...]

    @property
    def seeds(self) -> tuple[str, ...]:
        """Of the runs that count."""
        return tuple(r.seed for r in self.runs)

    @property
    def whole(self) -> bool:
        """Whether every planned run is there and counts."""
        return len(self.runs) == len(self.planned)

    @property
    def sign(self) -> int:
        """See :attr:`Yardstick.sign`; all runs of a group have one yardstick."""
        return self.runs[0].yardstick.sign if self.runs else 1

    def of(self, seeds: Sequence[str] | None) -> tuple[Run, ...]:
        """The runs that count; of some seeds only when given."""
        return tuple(r for r in self.runs if seeds is None or r.seed in seeds)

    def before(self, seeds: Sequence[str] | None = None) -> Spread:
        """The goal's figure before the edit, on test items; of some seeds only when given."""
        return Spread.of([_times(self.sign, r.before) for r in self.of(seeds)])

    def pair(self, split: Split, seeds: Sequence[str] | None = None) -> Pair:
        """The main numbers at each run's own chosen coefficient; of some seeds only when given."""
        runs = self.of(seeds)
        if split == "test":
            return Pair(Spread.of([_times(self.sign, r.after) for r in runs]), Spread.of([r.kept for r in runs]))
        here = [r.chosen_at for r in runs]
        left = [_times(self.sign, p.left) if p else None for p in here]
        return Pair(Spread.of(left), Spread.of([p.kept if p else None for p in here]))

    @cached_property
    def frontier(self) -> tuple[Step, ...]:
        """Means at each coefficient that all runs were scored at on all validation items."""
        if not self.runs:
            return ()
        tables = [{round(p.coefficient, 9): p for p in run.sweep} for run in self.runs]
        steps = []
        for c in sorted(set.intersection(*(set(t) for t in tables))):
            here = [t[c] for t in tables]
            two = Pair(Spread.of([_times(self.sign, p.left) for p in here]), Spread.of([p.kept for p in here]))
            steps.append(Step(c, two, sum(p.within for p in here), sum(bool(p.collapsed) for p in here)))
        return tuple(steps)

    def scores(self) -> tuple[ScoreLine, ...]:
        """Every metric before and after, over the runs."""
        rows = [{r.key: r for r in run.report.scores} for run in self.runs]
        lines = []
        for key in dict.fromkeys(k for table in rows for k in table):
            here = [table.get(key) for table in rows]
            one = next(r for r in here if r)
            before, after = ([getattr(r, side) if r else None for r in here] for side in ("before", "after"))
            items = {r.after.n for r in here if r}
            lines.append(
                ScoreLine(
                    *(key, one.split, one.higher_is_better, _spread(before), _spread(after)),
                    *(_stderr(before), _stderr(after), items.pop() if len(items) == 1 else None),
                    Spread.of([r.chance if r else None for r in here]).mean,
                )
            )
        return tuple(lines)


@dataclass(frozen=True, slots=True)
class Family:
    """Rival settings, compared on ``seeds``, which the groups of ``compared`` have all finished (indices of groups).

    ``best_test`` and ``best_validation`` are Pareto sets of means. ``ranked`` is the recipes' own rule applied to
    settings: those whose every compared run met the bound, the one that forgets most on validation items first (of
    equals the one that keeps more, then the first of the grid).
    """

    name: str
    question: Mapping[str, str]
    groups: tuple[Group, ...]
    yardstick: Yardstick | None
    seeds: tuple[str, ...]
    compared: frozenset[int]
    best_test: frozenset[int]
    best_validation: frozenset[int]
    ranked: tuple[int, ...]

    @property
    def choice(self) -> int | None:
        """The first of ``ranked``, if there is any."""
        return self.ranked[0] if self.ranked else None

    def of(self, index: int) -> Group:
        """The group of an index."""
        return next(g for g in self.groups if g.index == index)

    def lead(self) -> Spread | None:
        """By how much the choice is ahead of the second of ``ranked`` on validation items, seed by seed."""
        if len(self.ranked) < 2:
            return None
        first, second = ({r.seed: r.chosen_at for r in self.of(i).runs} for i in self.ranked[:2])
        pairs = [(first[seed], second[seed]) for seed in self.seeds]
        return Spread.of(
            [b.left - a.left if a and b and a.left is not None and b.left is not None else None for a, b in pairs]
        )

    def seeds_of(self, group: Group) -> tuple[str, ...]:
        """Those that a group's numbers are over: the compared ones; all its own where it lacks some of them."""
        return self.seeds if group.index in self.compared else group.seeds

    def pair(self, group: Group, split: Split) -> Pair:
        """A group's numbers, over :meth:`seeds_of`."""
        return group.pair(split, self.seeds_of(group))

    def before(self, group: Group) -> Spread:
        """What the goal was before, over :meth:`seeds_of`."""
        return group.before(self.seeds_of(group))


def groups_of(grid: Grid, compared: Compared, missing: Sequence[Missing]) -> tuple[Group, ...]:
    """Every setting of the grid, in its order, also those without a run."""
    planned: dict[tuple[object, ...], list[Job]] = defaultdict(list)
    for job in grid.jobs:
        planned[_key(job)].append(job)
    runs, aside, gone = defaultdict(list), defaultdict(list), defaultdict(list)
    for run in compared.runs:
        runs[_key(run.job)].append(run)
    for run, why in compared.aside:
        aside[_key(run.job)].append((run, why))
    for job_without in missing:
        gone[_key(job_without.job)].append(job_without)
    return tuple(
        Group(
            index,
            jobs[0].recipe,
            grid.recipes[jobs[0].recipe].name,
            {k: v for k, v in jobs[0].settings.items() if k != SEED},
            tuple(jobs),
            tuple(runs[key]),
            tuple(aside[key]),
            tuple(gone[key]),
            _notes(runs[key], compared.mixed),
        )
        for index, (key, jobs) in enumerate(planned.items())
    )


def families_of(groups: Sequence[Group]) -> tuple[Family, ...]:
    """Groups by the question they ask, in the grid's order."""
    scaled = any(r.yardstick.scale for g in groups for r in g.runs)
    parts = (*QUESTION, "choose") if scaled else QUESTION
    found: dict[tuple[object, ...], list[Group]] = defaultdict(list)
    for group in groups:
        found[settings_of(group.planned[0], lambda k: about(k, parts))].append(group)
    return tuple(_family(members, lambda k: about(k, parts)) for members in found.values())


def _family(groups: Sequence[Group], asks: Callable[[str], bool]) -> Family:
    first = groups[0]
    question = {k: v for k, v in first.settings.items() if asks(k)}
    yard = next((r.yardstick for g in groups for r in g.runs), None)
    seeds = common_seeds([g.seeds for g in groups])
    rivals = [g for g in groups if seeds and set(seeds) <= set(g.seeds)]
    best = {}
    for split in ("test", "validation"):
        points = [_point(g, g.pair(split, seeds)) for g in rivals]
        best[split] = frozenset(rivals[i].index for i in pareto(points))
    passed = [g for g in rivals if all(r.report.chosen.bound_met for r in g.runs if r.seed in seeds)]
    ranked = []
    for g in passed:
        left, kept = _point(g, g.pair("validation", seeds))
        if left is not None:
            ranked.append((left, -kept if kept is not None else math.inf, g.index))
    return Family(
        *(first.name, question, tuple(groups), yard, seeds, frozenset(g.index for g in rivals)),
        *(best["test"], best["validation"], tuple(index for _, _, index in sorted(ranked))),
    )


def _point(group: Group, pair: Pair) -> tuple[float | None, float | None]:
    """What is left (less is better) and what is kept (more is better)."""
    return _times(group.sign, pair.goal.mean), pair.kept.mean


def _key(job: Job) -> tuple[object, ...]:
    return settings_of(job, lambda k: k != SEED)


def _times(sign: int, value: float | None) -> float | None:
    return None if value is None else sign * value


def _spread(scores: Sequence[Score | None]) -> Spread:
    return Spread.of([s.value if s else None for s in scores])


def _stderr(scores: Sequence[Score | None]) -> float | None:
    known = [s.stderr for s in scores if s and s.stderr is not None and math.isfinite(s.stderr)]
    return math.fsum(known) / len(known) if known and len(known) == len(scores) else None


def _notes(runs: Sequence[Run], mixed: frozenset[str]) -> tuple[str, ...]:
    """What makes a group's mean less than it seems."""
    notes = []
    if any(r.job.name in mixed for r in runs):
        notes.append("by other versions than most jobs")
    vectors = [r.report.vector.get("digest") for r in runs]
    if len(vectors) > 1 and len(set(vectors)) < len(vectors) and None not in vectors:
        notes.append("seeds with the very same vector: their spread says too little")
    return tuple(notes)
