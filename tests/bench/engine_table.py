"""What ``engine.py`` found, as tables for people and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from limits import Gemm, Work
from material import Row
from measure import Seconds, console
from rich.table import Table

SHARE_GOAL = 0.8
SHARE_ROWS = ("zero-shot", "perplexity")  # prefill of text that hardly repeats itself
_AGREEMENT = {
    "largest_difference": ("max |Δ|", ".1e"),
    "largest_relative_difference": ("relative", ".1e"),
    "greedy_flags_that_differ": ("greedy ≠", ".0f"),
    "equal_texts": ("equal texts", ".1%"),
    "ours_from_float64": ("ours to float64", ".1e"),
    "lm_eval_from_float64": ("lm-eval to float64", ".1e"),
}


@dataclass
class Result:
    """One row, measured."""

    row: Row
    requests: int
    batch_size: int
    tried: dict[int, float]
    ours: Seconds
    theirs: Seconds
    agreement: dict[str, float]
    ran: tuple[int, int]
    work: Work | None
    memory: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times as long lm-eval's model takes."""
        return self.theirs.median / self.ours.median

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "row": self.row.name,
            "requests": self.requests,
            "ours_s": self.ours.to_json(),
            "lm_eval_s": self.theirs.to_json(),
            "ratio": self.ratio,
            "goal": self.row.goal,
            "batch_size": self.batch_size,
            "batch_sizes_tried_s": self.tried,
            "agreement": self.agreement,
            "tokens_run": {"ours": self.ran[0], "lm_eval": self.ran[1]},
            "work": asdict(self.work) if self.work else None,
            "memory": self.memory,
        }


def show(results: Sequence[Result], gemm: Gemm) -> None:
    """Print everything."""
    speed = Table("row", "ours s", "lm-eval s", "batch", "ratio", "goal", title="Speed")
    agreed = _table("Agreement", [title for title, _ in _AGREEMENT.values()])
    cost = _table(
        "Memory beyond the model, and tokens",
        ["ours MB", "lm-eval MB", "ours ran", "lm-eval ran", "requests have", "distinct"],
    )
    for r in results:
        goal = "-" if r.row.goal is None else f"≥ {r.row.goal:g}"
        speed.add_row(r.row.title, str(r.ours), str(r.theirs), str(r.batch_size), f"{r.ratio:.2f}", goal)
        found = r.agreement
        cells = [format(found[name], form) if name in found else "-" for name, (_, form) in _AGREEMENT.items()]
        agreed.add_row(r.row.title, *cells)
        megabytes = [f"{r.memory[side]['growth'] / 1e6:,.0f}" if r.memory else "-" for side in ("ours", "hf")]
        tokens = [f"{n:,}" if n else "-" for n in r.ran]
        tokens += [f"{r.work.asked:,}", f"{r.work.distinct:,}"] if r.work else ["-", "-"]
        cost.add_row(r.row.title, *megabytes, *tokens)
    console.print(speed, agreed, cost)
    console.print(f"matrix products of the model's shapes: {gemm.peak / 1e9:,.1f} GFLOP/s on this machine")
    for r in results:
        if r.work and r.row.name in SHARE_ROWS:
            rate = gemm.useful(r.work) / r.ours.median
            share = f"{rate / gemm.peak:.1%} of that (goal: ≥ {SHARE_GOAL:.0%})"
            console.print(f"  {r.row.title}: {rate / 1e9:,.1f} useful GFLOP/s, {share}")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table("row", title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def with_share(result: Result, gemm: Gemm) -> dict[str, Any]:
    share = gemm.useful(result.work) / result.ours.median / gemm.peak if result.work else None
    return {**result.to_json(), "share_of_gemm_peak": share}
