"""Every way of making and shaping a vector, beside baselines, on the same model, items, budget and rule.

    python tests/bench/methods.py [--pairs capitals,...] [--seeds 0,1,2] [--methods a,b] [--jobs 2]
                                  [--work DIR] [--json tests/bench/results/methods.json]

For each pair (tests/bench/methods_pairs.py) and seed every method trains on as many tokens as every other
(methods_tried.py). A seed decides splits, initialisation and the order of training. Each method is scored along
a grid of coefficients on validation items; the product's own rule picks one with kept scores bound to 95 %, and test
items say what that was worth. Hyperparameters were chosen on capitals, seed 0, and not touched for the others.

Columns: what of the forget set is still known (accuracy of four choices; for passages, share of tokens recited);
``acc_pmi``, the same of choices once the question about others is subtracted; the share that is left of pointwise
information (pmi), and of the neighbours' accuracy and pmi, on items no vector was fitted on; the nats general
statements lost; the nats of pmi that the forget set lost for each that the neighbours lost (a loss below .05 counts as
.05, because less is not resolved); the area under the frontier (mean share of the forget score that goes while kept
scores stay above 80 ... 100 %, validation items; and by how much it is larger than plain negation's in the same cells);
in how many cells no coefficient held the bound; and processor seconds of fitting and shaping. ± is half of a 95 %
interval over pairs and seeds.

``--work`` keeps vectors and scores: run again, what is there is not made again; ``--collect`` takes what is there. A
cell of nine methods takes about ten minutes of one quiet core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from measure import REPOSITORY, command_line, console, environment, write_json
from methods_pairs import PAIRS

RESULTS = REPOSITORY / "tests" / "bench" / "results" / "methods.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="", help="only these")
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, each on its share of the cores")
    parser.add_argument("--threads", type=int, default=1, help="of each job")
    parser.add_argument("--work", type=Path, default=None, help="where vectors and scores are kept")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="only print the table of --json")
    parser.add_argument(
        "--collect", action="store_true", help="only put what --work has into --json, beside what is there"
    )
    parser.add_argument("--markdown", action="store_true", help="only print the page's table of --json")
    options = parser.parse_args()
    if options.collect:
        _collect(options)
    elif not (options.show or options.markdown):
        _run(options)
    from methods_table import markdown, show

    rows = json.loads(options.json.read_text(encoding="utf-8"))
    if options.markdown:
        print(markdown(rows))
    else:
        show(rows)


def _collect(options: argparse.Namespace) -> None:
    """Rows of every method that was run, in however many goes."""
    files = sorted(options.work.glob("*/*/method-*.json"))
    _keep(options.json, [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))])


def _keep(place: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows beside those of other cells and methods, without the validation scores' paths, which stay in --work."""

    def short(value: Any) -> Any:
        return round(value, 6) if isinstance(value, float) else value

    there = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else []
    kept = [{k: short(v) for k, v in row.items() if k != "validation"} for row in rows]
    found = {_order(row): row for row in [*there, *kept]}
    write_json(place, [found[key] for key in sorted(found)])


def _order(row: dict[str, Any]) -> tuple[int, int, str]:
    return PAIRS.index(row["pair"]), row["seed"], row["method"]


def _run(options: argparse.Namespace) -> None:
    from methods_cell import run_cell, teach

    work = options.work or Path(tempfile.mkdtemp(prefix="methods-"))
    pairs, seeds = options.pairs.split(","), [int(s) for s in options.seeds.split(",")]
    only = tuple(options.methods.split(",")) if options.methods else ()
    for pair in pairs:
        teach(pair, work)  # once, before the cells that share it
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        waiting = {
            pool.submit(run_cell, pair, seed, work, only, options.threads): (pair, seed)
            for seed in seeds
            for pair in pairs
        }
        for done in as_completed(waiting):
            rows += done.result()
            _keep(options.json, rows)
            console.print("{} seed {}: done".format(*waiting[done]))
    console.print(environment())


if __name__ == "__main__":
    command_line(main)
