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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from engine_table import Result, show, with_share
from limits import Ran, count_work, measure_gemm, tokens_run
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from material import ROWS, Row
from measure import (
    Seconds,
    command_line,
    console,
    environment,
    find_model,
    load_model,
    peak_memory,
    run_child,
    write_json,
)

from unlearn.recipe.evaluation import EvalSpec
from unlearn.score.packed import PackedLM
from unlearn.score.tasks import quiet_harness

if TYPE_CHECKING:
    from unlearn.model.load import Loaded

SIZES = (1, 4, 8, 16, 32, 64)
CLOSE = 1.1  # a batch size this much slower on some requests may still be the fastest on all

Make = Callable[[], HFLM]


def main() -> None:
    """Parse, measure, print."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    where = find_model(options.model)
    rows = [row for row in ROWS if not options.row or row.name in options.row]
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
    write_json(options.json, {**facts, "gemm": gemm.to_json(), "rows": [with_share(r, gemm) for r in results]})


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
    if row.kind == "loglikelihood":
        pairs = list(zip(ours, theirs, strict=True))
        return {
            **_differences([(a[0], b[0]) for a, b in pairs]),
            "greedy_flags_that_differ": sum(a[1] != b[1] for a, b in pairs),
        }
    if row.kind == "loglikelihood_rolling":
        return _differences(list(zip(ours, theirs, strict=True)))
    return {"equal_texts": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)}


def _errors(row: Row, ours: Sequence[Any], theirs: Sequence[Any], exact: Sequence[Any]) -> dict[str, float]:
    """How far each is from lm-eval's own code in float64, at most, where that was computed."""

    def furthest(answers: Sequence[Any]) -> float:
        pairs = zip(answers, exact, strict=False)  # the first requests only
        if row.kind == "loglikelihood":
            return max(abs(a[0] - b[0]) for a, b in pairs)
        return max(abs(a - b) for a, b in pairs)

    return {"ours_from_float64": furthest(ours), "lm_eval_from_float64": furthest(theirs)}


def _differences(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Largest, absolute and as a share of the number. A passage's is a sum over hundreds of tokens."""
    return {
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "largest_relative_difference": max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs),
    }


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


if __name__ == "__main__":
    command_line(main)
