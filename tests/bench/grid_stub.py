"""Finished jobs of a grid made from one real run's report: the same files, the numbers varied by the seeded job."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearn.cluster.grid import Grid, Job, job_folder
from unlearn.cluster.job_state import JobState

WHEN = "2026-01-01T00:00:00+00:00"


def stub(root: Path, grid: Grid, report: Mapping[str, Any], lambdas: Sequence[float], lost: Sequence[int] = ()) -> None:
    """Write ``grid.json``, and what every job would have left but those of ``lost``, which failed."""
    grid.save(root)
    for preparation in grid.preparations:
        JobState("done", 1, 1, "node", WHEN, WHEN, exit=0, seconds=3.0).save(root, preparation.name)
    for job in grid.jobs:
        if job.index in lost:
            error = "Traceback (most recent call last):\nRuntimeError: CUDA out of memory"
            JobState("failed", 1, 1, "node", WHEN, WHEN, exit=1, error=error).save(root, job.name)
            continue
        finish(root, job, vary(report, job, lambdas))


def finish(root: Path, job: Job, report: Mapping[str, Any]) -> None:
    """Write a job's report with its seal and its state."""
    folder = job_folder(root, job.name)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text, encoding="utf-8")
    sealed = {**report["provenance"], "report_sha256": hashlib.sha256(text.encode()).hexdigest(), "stages": {}}
    (folder / "provenance.json").write_text(json.dumps(sealed), encoding="utf-8")
    JobState("done", 1, 1, "node", WHEN, WHEN, exit=0, seconds=9.0).save(root, job.name)


def vary(report: Mapping[str, Any], job: Job, lambdas: Sequence[float]) -> dict[str, Any]:
    """The report of one job: scores that fall with λ as its rank and its seed have it. Digests stay per seed."""
    found = copy.deepcopy(dict(report))
    draw = random.Random(job.name)
    rank, seed = float(job.settings.get("vector.lora.rank", 8)), job.settings.get("seed", "0")
    rate = float(job.settings.get("vector.forget.learning_rate", 0.005))
    strength = 0.25 + 0.5 * math.log2(1 + rank) / (3 + math.log2(1 + rank)) + draw.gauss(0, 0.03)
    harm = 0.012 * (0.5 + 60 * rate) * (1 + 0.08 * rank) + abs(draw.gauss(0, 0.002))
    first = found["sweep"][0]["scores"]
    kept = found["chosen"]["kept"][0]
    found["sweep"] = [_point(first, c, strength, harm, draw, kept) for c in (0.0, *lambdas)]
    passing = [p for p in found["sweep"] if p["within_bound"] and p["coefficient"] > 0]
    best = max((p["coefficient"] for p in passing), default=0.0)
    found["chosen"] |= {"coefficient": best, "bound_met": best > 0, "grid": list(lambdas)}
    for row in found["scores"]:
        for side, c in (("before", 0.0), ("after", best)):
            row[side] = _score(row, row[side], c, strength, harm, draw)
    for line in found["data"]:
        line["digest"] = hashlib.sha256(f"{line['set']} {line['name']} {seed}".encode()).hexdigest()
    found["vector"]["digest"] = hashlib.sha256(job.name.encode()).hexdigest()
    found["provenance"]["target"] = hashlib.sha256(f"target {seed}".encode()).hexdigest()
    found["seconds"] = {k: v * draw.uniform(0.8, 1.2) for k, v in found["seconds"].items()}
    return found


def _point(
    first: Sequence[Mapping[str, Any]], c: float, strength: float, harm: float, draw: random.Random, kept: Sequence[str]
) -> dict[str, Any]:
    scores = [{**s, "score": _score(s, s["score"], c, strength, harm, draw)} for s in first]
    worst = next(s["score"]["value"] for s in scores if [s["set"], s["name"], s["metric"]] == list(kept))
    broken = [] if worst >= 0.95 * 0.97 else [f"{kept[0]} {kept[1]} {kept[2]} fell"]
    return {
        "coefficient": c,
        "scores": scores,
        "within_bound": not broken,
        "broken": broken,
        "share": 1.0,
        "collapsed": "",
    }


def _score(
    about: Mapping[str, Any], score: Mapping[str, Any], c: float, strength: float, harm: float, draw: random.Random
) -> dict[str, Any]:
    """A made-up score: accuracies and probabilities fall as exp(-c * strength), log-probabilities as a line."""
    rate = strength if about["set"] == "forget" else harm
    noise = draw.gauss(0, 0.006)
    if about["metric"] == "logprob":
        return {**score, "value": -0.2 - 3 * rate * c + noise, "stderr": 0.05}
    return {**score, "value": min(max(0.97 * math.exp(-c * rate) + noise, 0.0), 1.0), "stderr": 0.05}
