"""``unlearn compare RUN…``: finished runs side by side: settings over their seeds, the Pareto set, a table, one page.

A setting is all that differs between the runs but the seed. Settings are rivals within a family: runs that were
measured alike (the same base model, data, teaching, metrics and bound). Nothing is averaged that was not.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from unlearn.cluster.plan import GRID_FILE, Grid, labels
from unlearn.errors import GridError
from unlearn.recipe.yaml import parse_value
from unlearn.report.figures import (
    FrontierPoint,
    frontier,
    goal_rows,
    kept_keys,
    mean_left,
    memory,
    missed,
    share_kept,
    unseeing,
)
from unlearn.results import Chosen, RunReport, ScoreRow
from unlearn.store.files import explained, some, write_json_atomic, write_text_atomic
from unlearn.text import MISSING, coefficient, number, one_line, percent, visible

# Keys that make the question another one, so that runs which differ in them are no rivals.
_QUESTION = re.compile(
    r"(model|forget|also_forget|learn|analogy|retain|utility|holdout|teach|choose|eval\.tasks)(\.|$)"
)
_NO_SETTING = re.compile(r"(name|description|seed|cluster|export|reuse)(\.|$)")  # they change no compared figure
_LARGEST = 256 * 1024**2  # bytes; nothing of this size is a report


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean over n runs and half of its 95 % interval: Student's t with n - 1 degrees of freedom; None of one run.

    There is no mean where a run lacks the number: one of the rest would leave the broken runs out.
    """

    mean: float | None
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        given = list(values)
        known = [v for v in given if v is not None and math.isfinite(v)]
        n = len(known)
        if not n or n < len(given):
            return cls(None, None, n)
        mean = math.fsum(known) / n
        if n == 1:
            return cls(mean, None, 1)
        from statistics import stdev

        from scipy.stats import t  # type: ignore[import-untyped]

        return cls(mean, float(t.ppf(0.975, n - 1)) * stdev(known) / math.sqrt(n), n)

    def words(self, show: Callable[[float | None], str] = number) -> str:
        """``0.412 ± 0.031``; without the second part of one run."""
        return show(self.mean) if self.half is None else f"{show(self.mean)} ± {show(self.half)}"


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: its recipe as dotted keys with JSON values, and its figures."""

    name: str
    recipe: Mapping[str, str]
    seed: str
    chosen: Chosen
    goal: str
    sign: int  # 1 where the goal's score is to fall, else -1
    before: float | None  # on test items; of several goals the mean share that is left of each
    after: float | None
    kept: float | None  # the share of the kept metric that suffered most on test items
    met_on_test: bool
    frontier: Mapping[float, FrontierPoint]  # every coefficient tried, on validation items
    measured: Mapping[str, Any]  # the same in runs that are averaged
    splits: Mapping[str, str]  # digests of the data, which depend on the seed
    versions: Mapping[str, str | None]
    unseeing: tuple[str, ...]  # the kept metrics that could have shown no harm
    memory: tuple[str, ...]  # what became of each set to forget, where its pointwise information was scored
    kept_scores: Mapping[str, float]  # of every kept metric on test items, before and after

    @classmethod
    def of(cls, name: str, report: RunReport, recipe: Mapping[str, Any]) -> Run:
        rows, kept, chosen = goal_rows(report), sorted(kept_keys(report)), report.chosen
        goals = [f"{row.name} {row.metric}" for row in rows]
        one = rows[0] if len(rows) == 1 else None
        source, taught = report.provenance, any(line.get("stage") == "teach" for line in report.training)
        keys = dict(_flat(recipe))
        return cls(
            name,
            keys,
            keys["seed"],
            chosen,
            goals[0] if one else f"mean share left of {', '.join(goals)}",
            -1 if one and (one.set == "forget") != one.higher_is_better else 1,
            one.before.value if one else 1.0,
            one.after.value if one else mean_left(report),
            _least_kept([row for row in report.scores if row.key in kept], chosen),
            chosen.bound_met and not missed(report),
            {round(point.coefficient, 9): point for point in frontier(report)},
            {
                "base model": source.get("base") or (None if taught else source.get("target")),
                "data": sorted([d["set"], d["name"], d.get("kind"), d.get("rows")] for d in report.data),
                "metrics": [sorted(row.key for row in rows), kept],
                "bound": [chosen.keep, chosen.perplexity],
            },
            {f"{d['set']} {d['name']}": str(d.get("digest")) for d in report.data},
            {**(source.get("versions") or {}), "commit": str((source.get("code") or {}).get("commit"))[:12]},
            tuple(sorted(" ".join(key) for key in unseeing(report))),
            tuple(found.became for row in rows if row.set == "forget" and (found := memory(report, row)) is not None),
            {
                f"{' '.join(row.key)} {when}": score.value
                for row in report.scores
                if row.key in kept
                for when, score in (("before", row.before), ("after", row.after))
            },
        )


def _least_kept(rows: Sequence[ScoreRow], chosen: Chosen) -> float | None:
    """The smallest share of a kept score; None where one of them is no number, or none has a share."""
    if not all(math.isfinite(value) for row in rows for value in (row.before.value, row.after.value)):
        return None
    shares = [
        share_kept(
            *(row.metric, row.higher_is_better, row.before.value, row.after.value), *(chosen.keep, chosen.perplexity)
        )
        for row in rows
    ]
    return min((share for share in shares if share is not None), default=None)


@dataclass(frozen=True, slots=True)
class Setting:
    """Runs that differ in their seed alone, and their figures over the seeds that are compared."""

    label: str
    settings: Mapping[str, str]
    runs: tuple[Run, ...]
    compared: bool  # whether it has all of these seeds; else the figures are over those that it has
    lambdas: tuple[float, ...]
    before: Spread
    after: Spread
    kept: Spread
    validation: Spread
    met: int
    met_on_test: int
    memory: Mapping[str, int]  # sets to forget, over the runs, by what became of them
    frontier: tuple[tuple[float, Spread, Spread], ...]  # score and share kept, where all its runs were scored

    @classmethod
    def of(cls, settings: Mapping[str, str], members: Sequence[Run], seeds: Sequence[str]) -> Setting:
        compared = {run.seed for run in members} >= set(seeds)
        runs = [run for run in members if run.seed in seeds or not compared]
        frontiers = [run.frontier for run in runs]
        steps = []
        for c in sorted(set.intersection(*map(set, frontiers))):
            here = [points[c] for points in frontiers]
            score = Spread.of(point.forget.value if point.forget else None for point in here)
            steps.append((c, score, Spread.of(point.worst for point in here)))
        chosen = [run.frontier.get(round(run.chosen.coefficient, 9)) for run in runs]
        told = {k: v for k, v in settings.items() if v != "null" or not k.startswith("edited.")}  # a run's own has none
        text = " · ".join(labels(told)) or members[0].recipe["name"].strip('"')
        return cls(
            label=text if len(text) <= 90 else f"{text[:89]}…",
            settings=settings,
            runs=tuple(members),
            compared=compared,
            lambdas=tuple(run.chosen.coefficient for run in runs),
            before=Spread.of(run.before for run in runs),
            after=Spread.of(run.after for run in runs),
            kept=Spread.of(run.kept for run in runs),
            validation=Spread.of(p.forget.value if p is not None and p.forget else None for p in chosen),
            met=sum(run.chosen.bound_met for run in runs),
            met_on_test=sum(run.met_on_test for run in runs),
            memory=dict(Counter(word for run in runs for word in run.memory)),
            frontier=tuple(steps),
        )

    def cells(self) -> list[str]:
        """Its line of the table: runs, λ, before, after, memory, kept, bound met."""
        elsewhere = self.runs[0].chosen.search == "given"
        lambdas = MISSING if elsewhere else " ".join(coefficient(c) if c else "none" for c in sorted(set(self.lambdas)))
        became = ", ".join(f"{word} {count}" for word, count in self.memory.items()) or MISSING
        became = next(iter(self.memory)) if len(self.memory) == 1 else became
        figures = self.before.words(), self.after.words(), became, self.kept.words(percent)
        return [str(len(self.lambdas)), lambdas, *figures, f"{self.met} of {len(self.lambdas)}"]


@dataclass(frozen=True, slots=True)
class Family:
    """Settings that are rivals, compared on the seeds that most of them have.

    The Pareto set (indices) is of means on test items and describes what came out; the choice (an index) is made on
    validation means, among the settings whose every run met its bound.
    """

    question: str
    goal: str
    sign: int
    seeds: tuple[str, ...]
    settings: tuple[Setting, ...]
    pareto: tuple[int, ...]
    choice: int | None
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, question: Mapping[str, str], groups: Sequence[tuple[Mapping[str, str], Sequence[Run]]]) -> Family:
        counts = Counter(tuple(sorted((run.seed for run in runs), key=lambda s: (len(s), s))) for _, runs in groups)
        seeds = max(counts, key=lambda these: (counts[these], len(these)))
        settings = tuple(Setting.of(mine, runs, seeds) for mine, runs in groups)
        sign, remarks = groups[0][1][0].sign, []
        points = [(s.after.mean, s.kept.mean) if s.compared else (None, None) for s in settings]
        best = pareto([(sign * a, b) if a is not None and b is not None else None for a, b in points])
        able = [
            (sign * s.validation.mean, n)
            for n, s in enumerate(settings)
            if s.compared and s.met == len(seeds) and s.validation.mean is not None
        ]
        choice = min(able)[1] if able else None
        if len(seeds) == 1:
            remarks.append("One run per setting, so no intervals: what differs may be the seed's doing.")
        if len(counts) > 1:
            out = [s.label for s in settings if not s.compared]
            text = f"Compared on the seeds that most settings have: {', '.join(seeds)}"
            remarks.append(f"{text}; not compared, for want of one of these: {some(out)}." if out else f"{text}.")
        runs = [run for _, members in groups for run in members]
        versions = {name: sorted({run.versions.get(name) or "none" for run in runs}) for name in runs[0].versions}
        several = [f"{name} {', '.join(found)}" for name, found in versions.items() if len(found) > 1]
        remarks += [f"Averaged as if they were one: {'; '.join(several)}."] if several else []
        for metric in sorted({metric for run in runs for metric in run.unseeing}):
            where = some([run.name for run in runs if metric in run.unseeing], 3)
            remarks.append(f"{metric} could show no harm: 0, or no more than chance, before the edit ({where}).")
        if len(settings) > 1 and choice is None:
            remarks.append("No setting met its bound in every run, so none is chosen.")
        elif len(settings) > 1 and choice is not None:
            asked = {key[0] for key in runs[0].measured["metrics"][0]}
            verb = "forgets" if asked == {"forget"} else "learns" if asked == {"learn"} else "does"
            outside = "" if choice in best else "; it is not in the Pareto set of test means"
            remarks.append(f"On validation means {settings[choice].label} {verb} most within the bound{outside}.")
        goal = groups[0][1][0].goal
        return cls(", ".join(labels(question)), goal, sign, seeds, settings, best, choice, tuple(remarks))

    def marks(self, n: int) -> str:
        """What stands out about the n-th setting."""
        marks = {"Pareto": n in self.pareto, "chosen": n == self.choice, "other seeds": not self.settings[n].compared}
        return ", ".join(mark for mark, holds in marks.items() if holds)


def pareto(points: Sequence[tuple[float, float] | None]) -> tuple[int, ...]:
    """Indices of the points (score: less is better; share kept: more is better) that no other one beats.

    A point is beaten by one at least as good in both and better in one: equal points stand or fall together.
    """
    known = {n: p for n, p in enumerate(points) if p is not None and all(map(math.isfinite, p))}
    beaten = {
        n
        for n, (score, kept) in known.items()
        if any(a <= score and b >= kept and (a, b) != (score, kept) for a, b in known.values())
    }
    return tuple(n for n in known if n not in beaten)


def families(runs: Sequence[Run]) -> tuple[Family, ...]:
    """Runs as settings, and settings as families, in the order in which they were given."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe if not _NO_SETTING.match(key))
    varied = [key for key in keys if len({run.recipe.get(key) for run in runs}) > 1]
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(run.recipe.get(key, "null") for key in varied)].append(run)
    found: dict[str, tuple[dict[str, str], list[tuple[dict[str, str], list[Run]]]]] = {}
    for values, members in groups.items():
        for a, b in combinations(members, 2):
            if a.seed == b.seed:
                raise GridError(f"{a.name} and {b.name} are the same run, the seed included: leave one of them out")
            for what, value in a.measured.items():
                _refuse_other(what, a, b, value, b.measured[what])
        settings = dict(zip(varied, values, strict=True))
        question = {key: value for key, value in settings.items() if _QUESTION.match(key)}
        mine = {key: value for key, value in settings.items() if key not in question}
        family = json.dumps([question, members[0].measured])
        found.setdefault(family, (question, []))[1].append((mine, members))
    for _, rivals in found.values():
        first: dict[tuple[str, str], Run] = {}
        for run in (run for _, members in rivals for run in members):
            for name, digest in run.splits.items():  # one seed splits the same data in one way
                other = first.setdefault((run.seed, name), run)
                _refuse_other("data", other, run, other.splits[name], digest)
    return tuple(Family.of(question, rivals) for question, rivals in found.values())


def _refuse_other(what: str, a: Run, b: Run, one: Any, other: Any) -> None:
    if one != other:
        raise GridError(
            f"{a.name} and {b.name} cannot be compared: their recipes say the same about it, and yet they have not the "
            f"same {what}. Something they read has changed between them"
        )


# -- from folders, and to files


def sealed(folder: Path) -> bool:
    """Whether a run's folder has a report, and it is the one that the run wrote last."""
    try:
        return bool(_report(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _report(folder: Path) -> bytes:
    """The report, when ``provenance.json``, which is written last, names its SHA-256."""
    path, seal = folder / "report.json", folder / "provenance.json"
    if not path.is_file() or not seal.is_file() or path.stat().st_size > _LARGEST:
        raise ValueError("there is no report.json of a run that has ended")
    text = path.read_bytes()
    if json.loads(seal.read_bytes())["report_sha256"] != hashlib.sha256(text).hexdigest():
        raise ValueError("its report.json is not the one that the run wrote")
    return text


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs of run folders, all of which must be whole, and of grid folders; of these also what is missing."""
    runs: list[Run] = []
    missing: list[str] = []
    for folder in folders:
        grid = Grid.load(folder) if (folder / GRID_FILE).is_file() else None
        for one in [folder] if grid is None else [job.folder(folder) for job in grid.jobs]:
            name = one.name if grid is None or len(folders) == 1 else f"{folder.name}/{one.name}"
            try:
                with explained(one):
                    report = json.loads(_report(one))
                    recipe = parse_value((one / "resolved.yaml").read_text(encoding="utf-8"))
                for score in _scores(report):
                    score["value"] = math.nan if score["value"] is None else float(score["value"])
                runs.append(Run.of(name, RunReport.from_json(report), recipe))
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
                said = f"{one if grid is None else name}: {one_line(str(e))[:300]}"
                if grid is None:
                    raise GridError(said) from e
                missing.append(said)
    return runs, missing


def _scores(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every score of a report, as it is in the file."""
    for row in report["scores"]:
        yield from (row[side] for side in ("before", "after", "reference") if row.get(side) is not None)
    for point in report["sweep"]:
        yield from (line["score"] for line in point["scores"])


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """``vector.lora.rank`` and its value as JSON; a list of mappings by its numbers, any other list whole."""
    if isinstance(value, list) and value and all(isinstance(child, Mapping) for child in value):
        value = {str(n): child for n, child in enumerate(value)}
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from _flat(child, f"{path}.{key}" if path else key)
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def compare(folders: Sequence[Path], out: Path) -> tuple[tuple[Family, ...], list[str]]:
    """Write ``compare.csv``, ``report.json`` and ``report.html`` over these runs into ``out``."""
    runs, missing = read_runs(folders)
    found = families(runs) if runs else ()
    plain = [asdict(family) for family in found]
    for setting in (setting for family in plain for setting in family["settings"]):
        setting["runs"] = [run["name"] for run in setting["runs"]]
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text_atomic(out / "compare.csv", _table(found))
    write_json_atomic(out / "report.json", {"schema": 2, "families": plain, "missing": missing})
    write_text_atomic(out / "report.html", _page(found, missing))
    return found, missing


def _table(found: Sequence[Family]) -> str:
    """A row per run as CSV. What is missing is an empty cell; text that a spreadsheet would run gets an apostrophe."""
    rows: list[dict[str, Any]] = []
    for n, family in enumerate(found):
        for settings, run in ((setting.settings, run) for setting in family.settings for run in setting.runs):
            row = {"run": run.name, "family": n, **settings, "seed": run.seed}
            row["lambda"] = run.chosen.coefficient or None  # 0: none was chosen
            row |= {"bound_met": run.chosen.bound_met, "met_on_test": run.met_on_test}
            row |= {"forget_before": run.before, "forget_after": run.after, "kept": run.kept}
            row |= run.kept_scores
            rows.append({_cell(key): _cell(value) for key, value in row.items()})
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return "" if isinstance(value, float) and not math.isfinite(value) else value
    text = visible(value.strip('"'))
    is_number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)
    return f"'{text}" if not is_number and text.lstrip().startswith(("=", "+", "-", "@", "|", "%")) else text


def _page(found: Sequence[Family], missing: Sequence[str]) -> str:
    from unlearn.report.charts import Key, Point, Series, axis_of, chart, style
    from unlearn.report.page import render

    parts = []
    for n, family in enumerate(found):
        spots, lines, legend = [], [], []
        for i, setting in enumerate(family.settings):
            look = style(i)
            legend.append(Key(setting.label, **look))
            named: dict[str, Any] = {"colour": look["colour"], "marker": look["marker"], "name": setting.label}
            tip = f"{setting.label}: {setting.after.words()}, {setting.kept.words(percent)} kept"
            if setting.after.mean is not None and setting.kept.mean is not None:
                spot = Point(
                    *(setting.after.mean, setting.kept.mean, setting.kept.half, setting.after.half),
                    tip=tip,
                    mark="full" if i in family.pareto else "hollow",
                    ring=i == family.choice,
                )
                spots.append(Series([spot], dash=None, **named))
            steps = [
                Point(score.mean, kept.mean, tip=f"{setting.label}, λ {coefficient(c)}")
                for c, score, kept in setting.frontier
                if score.mean is not None and kept.mean is not None
            ]
            lines.append(Series(steps, dash=look["dash"], **named))
        drawings = []
        keep = family.settings[0].runs[0].chosen.keep
        for series, items in ((spots, "test"), (lines, "validation")):
            points = [point for one in series for point in one.points]
            x = axis_of([point.x for point in points], f"score of what was asked: {family.goal}")
            y = replace(axis_of([point.y for point in points], "kept at worst"), percent=True, kind="linear")
            drawing = chart(series, x, y, size=(460, 300), bound=keep, bound_label="bound", shaded=True)
            tips = "; ".join(point.tip for point in points[:20])
            drawings.append((items, drawing.svg(f"{family.goal} against what is kept", tips, f"f{n}-{items}")))
        rows = [[s.label, *s.cells(), family.marks(i)] for i, s in enumerate(family.settings)]
        parts.append({"family": family, "rows": rows, "drawings": drawings, "legend": legend})
    return render("compare.html.j2", parts=parts, missing_runs=missing)
