"""Our scoring engine against lm-eval's HF model, in one process, one after the other, on the very same requests.

    python tests/bench/engine.py [MODEL] [--items 64] [--threads N] [--repeats 3] [--row NAME ...] [--json FILE]

MODEL is a folder, or anything a recipe's model.path may be; without it the quickstart's model is fetched or found in
the cache. For each row of the table (``material.ROWS``) lm-eval's model is first tried at every batch size on
some of the requests; the fastest (and the next, if it is within 10 %) is tried on all, and the best of them is the
peer. Then both engines answer all requests ``--repeats`` times in turn, each time made anew, so that nothing
tokenised, cached or computed before is left. Each has its own copy of the model.

Printed: seconds (median, least..most), ratio and goal; the largest difference in log-likelihood, greedy flags that
differ, share of equal texts; how far both are from lm-eval's own code in float64 on the first few requests, since
where they differ one may ask which is right; peak memory beyond the loaded model, measured in a fresh process for
each; tokens that went through the model against tokens asked for; and the useful FLOP rate as a share of what this
machine reaches in matrix products of the model's shapes. ``--profile`` adds torch.profiler's ten most expensive
operations of ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from material import ROWS, Row
from measure import (
    QUICKSTART,
    Seconds,
    command_line,
    console,
    environment,
    find_model,
    load_model,
    peak_memory,
    run_child,
    without_others,
    write_json,
)
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from unlearn.data.sets import load_sets
from unlearn.model.load import linear_modules
from unlearn.recipe.evaluation import EvalSpec
from unlearn.recipe.load import load_recipe
from unlearn.score.evaluate import evaluate
from unlearn.score.packed import PackedLM
from unlearn.score.tasks import build_tasks, quiet_harness

if TYPE_CHECKING:
    from unlearn.model.load import Loaded

SIZES = (1, 4, 8, 16, 32, 64)
CLOSE = 1.1  # a batch size this much slower on some requests may still be the fastest on all
GEMM_ROWS = (512, 1024, 2048)
GEMM_REPEATS = 5
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
Make = Callable[[], HFLM]


def main() -> None:
    """Parse, measure, print."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    where = find_model(options.model)
    rows = [row for row in ROWS if not options.row or row.name in options.row]
    if options.pmi:
        cost_of_pmi(where, options)
        return
    if options.only:
        print(json.dumps(_memory(where, rows[0], options)))
        return
    ours, theirs = (load_model(where, options.dtype, options.device) for _ in range(2))
    model = f"{sum(p.numel() for p in ours.model.parameters()) / 1e6:.1f} M parameters, {ours.dtype}, {ours.device}"
    console.print(f"{model}; {torch.get_num_threads()} threads; {options.items} items")
    gemm = measure_gemm(ours.model, ours.device)
    exact = load_model(where, options.dtype, options.device) if options.float64 else None
    if exact is not None:
        exact.model.double()  # but for what transformers computes in float32 always: norms, rotations
    results = [_measure(row, ours, theirs, exact, options) for row in rows]
    del exact
    gemm = gemm.best(measure_gemm(ours.model, ours.device))  # the machine may have been busier before
    if options.memory:
        for result in results:
            result.memory = {side: _memory_apart(where, result, side, options) for side in ("ours", "hf")}
    show(results, gemm)
    if options.profile:
        for row in rows:
            console.print(f"\n{row.title}: most expensive operations of ours")
            console.print(_profile(row, ours, options), soft_wrap=True)
    facts = {"model": model, "threads": torch.get_num_threads(), "items": options.items, "environment": environment()}
    write_json(options.json, {**facts, "gemm": gemm.to_json(), "rows": [r.to_json(gemm) for r in results]})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder (default: the quickstart's model)")
    parser.add_argument("--items", type=int, default=64, help="questions, passages or prompts per row")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each engine")
    parser.add_argument("--row", action="append", choices=[r.name for r in ROWS], help="only this row; may be repeated")
    parser.add_argument("--batch-sizes", type=_numbers, default=SIZES, metavar="N,N", help="of lm-eval's model")
    parser.add_argument("--search", type=int, default=64, help="requests on which all batch sizes are tried")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up texts")
    parser.add_argument("--float64", type=int, default=8, help="requests per row also answered in float64; 0: none")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory")
    parser.add_argument("--pmi", action="store_true", help="only what pmi and acc_pmi cost on the quickstart's items")
    parser.add_argument("--profile", action="store_true", help="ten most expensive operations of ours")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--only", choices=["ours", "hf"], help="peak memory of one engine on one --row, as JSON")
    parser.add_argument("--batch-size", type=int, default=1, help="of lm-eval's model, with --only hf")
    options = parser.parse_args()
    if options.only and len(options.row or ()) != 1:
        parser.error("--only needs one --row")
    return options


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


# -- one row -----------------------------------------------------------------------------------------------------------


def _measure(row: Row, ours: Loaded, theirs: Loaded, exact: Loaded | None, options: argparse.Namespace) -> Result:
    requests = row.make(options.items, ours.tokenizer, options.seed)
    console.print(f"{row.title}: {len(requests)} requests", style="bold")
    make_ours = _packed(ours)
    with tokens_run(ours.model) as ran:
        answers, _ = _ask(make_ours, row, requests)  # not timed: the first call of a process is slower than others
    tried, batch_size, expected, padded = _best_size(theirs, row, requests, options)
    runs = [
        (_ask(make_ours, row, requests)[1], _ask(_plain(theirs, batch_size), row, requests)[1])
        for _ in range(options.repeats)
    ]
    mine, peers = (Seconds(tuple(side)) for side in zip(*runs, strict=True))
    console.print(f"  ours {mine} s, lm-eval {peers} s at batch size {batch_size}")
    work = None if row.kind == "generate_until" else count_work(*_tokens(ours, row, requests))
    agreement = _agreement(row, answers, expected)
    if exact is not None and work is not None:
        some = requests[: options.float64]
        agreement |= _errors(row, answers, expected, _ask(_plain(exact, 1), row, some)[0])
    tokens = ran.tokens, padded.tokens
    return Result(row, len(requests), batch_size, tried, mine, peers, agreement, tokens, work)


def _packed(loaded: Loaded) -> Make:
    return lambda: PackedLM(loaded.model, loaded.tokenizer, batch_size=EvalSpec().batch_size)  # as a run makes it


def _plain(loaded: Loaded, batch_size: int) -> Make:
    return lambda: HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, softmax_dtype="float32"
    )


def _ask(make: Make, row: Row, requests: Sequence[Instance]) -> tuple[list[Any], float]:
    """Answers of a new engine, and the seconds they took."""
    gc.collect()
    with quiet_harness():
        engine = make()
        started = time.perf_counter()
        answers = getattr(engine, row.kind)(list(requests), disable_tqdm=True)
        return answers, time.perf_counter() - started


def _best_size(
    loaded: Loaded, row: Row, requests: Sequence[Instance], options: argparse.Namespace
) -> tuple[dict[int, float], int, list[Any], Ran]:
    """Seconds by batch size on some requests; the best of the fastest on all, its answers, and the tokens it ran."""
    some = requests[: options.search]
    _ask(_plain(loaded, 1), row, some[:4])
    sizes = [size for size in options.batch_sizes if size <= len(some)] or [min(options.batch_sizes)]
    tried = {size: _ask(_plain(loaded, size), row, some)[1] for size in sizes}
    said = ", ".join(f"{size}: {seconds:.2f}" for size, seconds in tried.items())
    console.print(f"  lm-eval's seconds on {len(some)} requests by batch size: {said}")
    whole = {}
    fastest = sorted(tried, key=lambda s: tried[s])
    for size in [s for s in fastest[:2] if tried[s] <= CLOSE * tried[fastest[0]]]:
        with tokens_run(loaded.model) as ran:
            answers, seconds = _ask(_plain(loaded, size), row, requests)
        whole[size] = seconds, answers, ran
    best = min(whole, key=lambda size: whole[size][0])
    return tried, best, whole[best][1], whole[best][2]


def _tokens(loaded: Loaded, row: Row, requests: Sequence[Instance]) -> tuple[list[tuple[list[int], list[int]]], int]:
    """(context, continuation) tokens as lm-eval makes them, and the model's window."""
    with quiet_harness():
        lm = _plain(loaded, 1)()
        if row.kind == "loglikelihood":
            return [lm._encode_pair(*request.args) for request in requests], lm.max_length
        pairs: list[tuple[list[int], list[int]]] = []
        for request in requests:
            ids = lm.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, lm.prefix_token_id, lm.max_length, context_len=1)
            pairs += [make_disjoint_window(window) for window in windows]
        return pairs, lm.max_length


def _agreement(row: Row, ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, float]:
    if row.kind == "generate_until":
        return {"equal_texts": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)}
    pairs = list(zip(_values(row, ours), _values(row, theirs), strict=True))
    found = {  # a passage's is a sum over hundreds of tokens, hence the share
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "largest_relative_difference": max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs),
    }
    if row.kind == "loglikelihood":
        found["greedy_flags_that_differ"] = sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True))
    return found


def _values(row: Row, answers: Sequence[Any]) -> list[float]:
    return [a[0] if row.kind == "loglikelihood" else a for a in answers]


def _errors(row: Row, ours: Sequence[Any], theirs: Sequence[Any], exact: Sequence[Any]) -> dict[str, float]:
    """How far each is from lm-eval's own code in float64, at most, where that was computed."""

    def furthest(answers: Sequence[Any]) -> float:
        pairs = zip(_values(row, answers), _values(row, exact), strict=False)  # the first requests only
        return max(abs(a - b) for a, b in pairs)

    return {"ours_from_float64": furthest(ours), "lm_eval_from_float64": furthest(theirs)}


# -- memory and profile ------------------------------------------------------------------------------------------------


def _memory(where: str, row: Row, options: argparse.Namespace) -> dict[str, int]:
    """Bytes before and at the peak of answering a row's requests, in this process, which must be fresh."""
    loaded = load_model(where, options.dtype, options.device)
    requests = row.make(options.items, loaded.tokenizer, options.seed)
    make = _packed(loaded) if options.only == "ours" else _plain(loaded, options.batch_size)
    _ask(make, row, requests[:1])  # libraries load and allocate on first use
    with peak_memory(loaded.device) as peak:
        _ask(make, row, requests)
    return {"before": peak.before, "peak": peak.most, "growth": peak.growth}


def _memory_apart(where: str, result: Result, side: str, options: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, where, "--only", side, "--row", result.row.name]
    command += ["--items", str(options.items), "--seed", str(options.seed), "--batch-size", str(result.batch_size)]
    command += ["--dtype", options.dtype, "--device", options.device, "--threads", str(torch.get_num_threads())]
    return run_child(command)


def _profile(row: Row, loaded: Loaded, options: argparse.Namespace) -> str:
    from torch.profiler import ProfilerActivity, profile

    requests = row.make(options.items, loaded.tokenizer, options.seed)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (loaded.device.type == "cuda")
    with profile(activities=activities) as profiler:
        _ask(_packed(loaded), row, requests)
    averages: Any = profiler.key_averages()
    return str(averages.table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=40))


def cost_of_pmi(where: str, options: argparse.Namespace) -> None:
    """Processor seconds of scoring the quickstart's test items with and without the questions about others."""
    recipe, loaded = load_recipe(str(QUICKSTART)).recipe, load_model(where, options.dtype, options.device)
    sets = load_sets(recipe, QUICKSTART.parent, loaded.tokenizer)
    seconds: dict[str, list[float]] = {"acc": [], "acc, pmi, acc_pmi": []}
    with tempfile.TemporaryDirectory() as folder:
        made = [build_tasks(sets, "test", recipe, loaded.tokenizer, Path(folder)) for _ in seconds]
        without_others(made[0])
        for _ in range(options.repeats + 1):
            for spent, tasks in zip(seconds.values(), made, strict=True):
                lm = PackedLM(loaded.model, loaded.tokenizer)
                started = time.process_time()
                evaluate(lm, tasks, model_name="quickstart", bootstrap=0)
                spent.append(time.process_time() - started)
    alone, both = (Seconds(tuple(spent[1:])) for spent in seconds.values())  # the first makes the requests
    items = sum(len(s.test) for s in sets)
    console.print(
        f"{items} items: acc {alone} s, with pmi and acc_pmi {both} s: {both.median / alone.median:.2f} times"
    )


# -- what requests cannot be answered without, what an engine ran, how fast this machine multiplies -------------------


@dataclass(frozen=True, slots=True)
class Work:
    """What a set of requests asks for, in tokens.

    Attributes:
        asked: tokens read by a model that takes every request by itself.
        distinct: tokens of the prefix tree of all requests: fewer cannot be run.
        scored: nodes of that tree at which the LM head is needed.
    """

    asked: int
    distinct: int
    scored: int


def count_work(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], window: int) -> Work:
    """Count (context, continuation) pairs, cut to the model's window from the left as lm-eval cuts them."""
    cut = [(list(c) + list(t))[-(window + 1) :] for c, t in pairs]
    asked = sum(len(tokens) - 1 for tokens in cut)
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node; the root is 0
    scored: set[int] = set()
    for tokens, (_, continuation) in zip(cut, pairs, strict=True):
        node, first = 0, len(tokens) - 1 - len(continuation)
        for place, token in enumerate(tokens[:-1]):
            node = nodes.setdefault((node, token), len(nodes) + 1)
            if place >= first:
                scored.add(node)
    return Work(asked, len(nodes), len(scored))


@dataclass
class Ran:
    """Tokens that went through a model's embedding, padding included; 0 if it was passed by."""

    tokens: int = 0


@contextmanager
def tokens_run(model: nn.Module) -> Iterator[Ran]:
    """Count what an engine really computes, whatever it is."""
    ran = Ran()

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input"]
        ran.tokens += ids.numel()

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield ran
    finally:
        handle.remove()


# -- the machine's limit -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gemm:
    """How fast this machine multiplies at a model's shapes.

    Attributes:
        rates: (in, out) -> floating-point operations per second, the best over row counts.
        counts: (in, out) -> linear layers of that shape in the model's body.
        head: multiply-adds per scored position of the LM head.
    """

    rates: dict[tuple[int, int], float] = field(default_factory=dict)
    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    head: int = 0

    @property
    def body(self) -> int:
        """Multiply-adds per token of the body's linear layers."""
        return sum(i * o * n for (i, o), n in self.counts.items())

    @property
    def peak(self) -> float:
        """FLOP/s of one pass through all linear layers, each at the best rate seen for its shape."""
        seconds = sum(2 * i * o * n / self.rates[i, o] for (i, o), n in self.counts.items())
        return 2 * self.body / seconds

    def useful(self, work: Work) -> float:
        """FLOPs that ``work`` cannot be answered without: body at distinct tokens, head at scored positions."""
        return 2.0 * (self.body * work.distinct + self.head * work.scored)

    def best(self, other: Gemm) -> Gemm:
        """The better of two measurements, shape by shape."""
        return Gemm({s: max(r, other.rates[s]) for s, r in self.rates.items()}, self.counts, self.head)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        shapes = [
            {"in": i, "out": o, "layers": self.counts[i, o], "gflops": rate / 1e9}
            for (i, o), rate in self.rates.items()
        ]
        return {"peak_gflops": self.peak / 1e9, "shapes": shapes}


def measure_gemm(model: Any, device: torch.device) -> Gemm:
    """Time the products of every linear layer's shape in the model's dtype: rows x in by in x out, both layouts."""
    counts: Counter[tuple[int, int]] = Counter()
    for module in linear_modules(model).values():
        weight: Any = module.weight
        first, second = weight.shape
        counts[(first, second) if isinstance(module, Conv1D) else (second, first)] += 1
    rates = {shape: _rate(*shape, model.dtype, device) for shape in counts}
    return Gemm(rates, counts, model.get_output_embeddings().weight.numel())


def _rate(width: int, out: int, dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    for rows in GEMM_ROWS:
        x = torch.randn(rows, width, dtype=dtype, device=device)
        weight = torch.randn(out, width, dtype=dtype, device=device)
        flops = 2.0 * rows * width * out
        for right in (weight.T, weight.T.contiguous()):  # as nn.Linear and as Conv1D keep it
            torch.mm(x, right)
            for _ in range(GEMM_REPEATS):
                _finish(device)
                started = time.perf_counter()
                torch.mm(x, right)
                _finish(device)
                best = max(best, flops / (time.perf_counter() - started))
    return best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- tables and JSON ---------------------------------------------------------------------------------------------------


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

    def to_json(self, gemm: Gemm) -> dict[str, Any]:
        """Plain JSON."""
        share = gemm.useful(self.work) / self.ours.median / gemm.peak if self.work else None
        return {
            "share_of_gemm_peak": share,
            "row": self.row.name,
            "requests": self.requests,
            "ours_s": asdict(self.ours),
            "lm_eval_s": asdict(self.theirs),
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


if __name__ == "__main__":
    command_line(main)
