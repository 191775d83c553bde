"""The merged report in words: what settings are called, what the numbers mean, what happened. For page and terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from unlearn.cluster.compare import Compared
from unlearn.cluster.grid import Grid
from unlearn.cluster.groups import Family, Group
from unlearn.cluster.numbers import Spread
from unlearn.cluster.runs import SEED, Missing
from unlearn.store.files import some
from unlearn.text import MISSING, counted, listing, number, percent

_LABEL = 90  # characters of a setting's name
OVER_RUNS = (
    "± in this report is half of the 95 % interval of a mean over runs that differ in their seed (Student's t with "
    "n − 1 degrees of freedom, n runs): how far chance in splitting, initialisation and data order moves the mean. "
    "One run has no interval. It is not the ± of a single run's page, which is over items: a run's own standard error "
    "says how far its score would move with other items of the same kind, and is given beside as “items, s.e.”."
)
PARETO_RULE = (
    "Pareto set: the settings that no other one beats. One beats another when its mean is at least as good both in "
    "forgetting and in what is kept at worst, and better in one of them; equal settings stand or fall together."
)
DESCRIPTION = (
    "The Pareto set of test means describes what came out; choosing from it would be choosing on test items, and the "
    "best of many settings looks better on them than it is. The choice is made on validation means: of the settings "
    "whose every compared run met its bound, the one that forgets most there."
)
MEAN_OF_ALL = (
    "A mean is shown only when every run of it has the number: a mean of the rest would leave the broken runs out."
)
NO_RUN = "No job of this grid has a report that can be used, so there is nothing to compare."


@dataclass(frozen=True, slots=True)
class Merged:
    """All that the merged report shows."""

    grid: Grid
    compared: Compared
    missing: tuple[Missing, ...]
    groups: tuple[Group, ...]
    families: tuple[Family, ...]
    written: str

    @property
    def finished(self) -> int:
        """Jobs with a whole report, also those set aside."""
        return len(self.compared.runs) + len(self.compared.aside)


def label(settings: Mapping[str, str], name: str, without: Iterable[str] = (), most: int = _LABEL) -> str:
    """``rank=8 · method=negate``; the recipe's name where no axis is left."""
    left = {k: str(v) for k, v in settings.items() if k not in set(without)}
    short = short_names(list(settings))
    text = " · ".join(f"{short[k]}={v}" for k, v in left.items()) or name
    return text if len(text) <= most else f"{text[: most - 1]}…"


def short_names(keys: Sequence[str]) -> Mapping[str, str]:
    """The last parts of dotted keys, as few as tell them apart."""
    found = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            tail = parts[-count:]
            if sum(other.split(".")[-count:] == tail for other in keys) == 1:
                break
        found[key] = ".".join(tail)
    return found


def group_label(family: Family, group: Group) -> str:
    """A setting among its rivals."""
    return label(group.settings, group.name, family.question)


def family_label(family: Family) -> str:
    """The question that rivals share: the recipe and what is asked of it."""
    return f"{family.name}: {label(family.question, '')}" if family.question else family.name


def headline(merged: Merged) -> str:
    """What came of the grid, in one sentence."""
    planned = len(merged.grid.jobs)
    done = f"{merged.finished} of {counted(planned, 'job')} finished"
    if not merged.compared.runs:
        return f"{done}: nothing to compare yet"
    if len(merged.families) > 1:
        return f"{done}: {counted(len(merged.groups), 'setting')} in {len(merged.families)} separate comparisons"
    family = merged.families[0]
    if len(merged.groups) == 1:
        return f"{done}, of one setting"
    if family.choice is None:
        return f"{done}; no setting met its bound in every run"
    return f"{done}; on validation items {group_label(family, family.of(family.choice))} forgets most within the bound"


def choice_lines(family: Family) -> tuple[str, ...]:
    """The choice, how sure it is, and where test means would have it otherwise."""
    if not family.compared:
        return ()
    lines = []
    if family.choice is None:
        lines.append("No setting met its bound in every run, so none is chosen.")
    elif len(family.groups) > 1:
        name = group_label(family, family.of(family.choice))
        lines.append(f"Choice on validation means: {name}.{_lead(family)}")
    both = family.best_test & family.best_validation
    if len(family.groups) > 1 and family.best_test and family.best_test != family.best_validation:
        names = {i: group_label(family, family.of(i)) for i in family.best_test | family.best_validation}
        parts = []
        if only := sorted(family.best_test - both):
            parts.append(f"on test means only: {some([names[i] for i in only])}")
        if only := sorted(family.best_validation - both):
            parts.append(f"on validation means only: {some([names[i] for i in only])}")
        lines.append(f"The two Pareto sets differ. In the set {'; '.join(parts)}.")
    if family.choice is not None and len(family.groups) > 1 and family.choice not in family.best_test:
        lines.append("The choice is not in the Pareto set of test means.")
    return tuple(lines)


def _lead(family: Family) -> str:
    lead = family.lead()
    if lead is None or lead.mean is None:
        return ""
    second = group_label(family, family.of(family.ranked[1]))
    text = f" It is ahead of the second, {second}, by {with_half(lead)} on the same seeds"
    if lead.half is None:
        return f"{text}; one seed says nothing about chance."
    return f"{text}{': no more than chance may explain' if lead.mean <= lead.half else ''}."


def missing_lines(merged: Merged) -> tuple[str, ...]:
    """What missing and unequal runs do to the comparison."""
    lines = []
    planned = len(merged.grid.jobs)
    if merged.missing:
        kinds = Counter(m.why for m in merged.missing)
        what = listing(f"{n} {'damaged or not as written' if why == 'damaged' else why}" for why, n in kinds.items())
        lines.append(f"No usable report of {len(merged.missing)} of {counted(planned, 'job')}: {what}.")
    if merged.compared.runs and max(len(g.runs) for g in merged.groups) == 1:
        lines.append("One run per setting, so no intervals: a difference between settings may be the seed's doing.")
    short = [g for g in merged.groups if g.runs and not g.whole]
    if short:
        have = f"{counted(len(short), 'setting')} {'has' if len(short) == 1 else 'have'}"
        lines.append(f"{have} fewer runs than planned (marked ▲): each mean is over the runs there are.")
    if empty := [g for g in merged.groups if not g.runs]:
        lines.append(f"{counted(len(empty), 'setting')} without any run that counts.")
    for family in merged.families:
        out = [g for g in family.groups if g.runs and g.index not in family.compared]
        unequal = any(set(g.seeds) != set(family.seeds) for g in family.groups if g.runs)
        if family.compared and unequal and len(family.groups) > 1:
            where = f"Of {family_label(family)}, settings" if len(merged.families) > 1 else "Settings"
            text = f"{where} are compared on the {_seeds(family.seeds)}, which most of them have finished"
            if out:
                text += f"; not compared, for want of one of these: {some([group_label(family, g) for g in out])}"
            lines.append(f"{text}.")
    return tuple(lines)


def _seeds(seeds: Sequence[str]) -> str:
    named = [s for s in seeds if s]
    return f"seed{'s' * (len(named) != 1)} {listing(named)}" if named else "one run each"


def with_half(spread: Spread) -> str:
    """``0.412 ± 0.031``; without the second part of one run; – where a run lacks the number."""
    if spread.mean is None:
        return MISSING
    return number(spread.mean) if spread.half is None else f"{number(spread.mean)} ± {number(spread.half)}"


def share_with_half(spread: Spread) -> str:
    """``97.5 ± 1.2 %``."""
    if spread.mean is None or spread.half is None:
        return percent(spread.mean)
    return f"{percent(spread.mean).removesuffix(' %')} ± {percent(spread.half)}"


def absent(spread: Spread) -> str:
    """Says how many runs lack the number; empty when none does."""
    return f"{spread.absent} of {counted(spread.n + spread.absent, 'run')} without a number" if spread.absent else ""


def seeds_of(merged: Merged) -> str:
    """The seed axis as it was asked for."""
    axis = next((a for a in merged.grid.axes if a.key == SEED), None)
    return ", ".join(axis.values) if axis else "not an axis: one run per setting"
