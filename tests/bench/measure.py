"""What the benchmarks share: where the model is, seconds, memory, counted work, and the machine's own limit."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from unlearn.errors import UnlearnError

if TYPE_CHECKING:
    import torch

    from unlearn.model.load import Loaded
    from unlearn.score.tasks import TaskSet

REPOSITORY = Path(__file__).resolve().parents[2]
QUICKSTART = REPOSITORY / "recipes" / "quickstart.yaml"

console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def command_line(main: Callable[[], None]) -> None:
    """Run a benchmark; a mistake of the user is one message and exit code 2."""
    try:
        main()
    except UnlearnError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def find_model(path: str | None, recipe: str = str(QUICKSTART)) -> str:
    """The folder of the model: ``path`` is whatever a recipe's model.path may be; None means that of ``recipe``."""
    from unlearn.model.locate import locate
    from unlearn.recipe.load import load_recipe
    from unlearn.recipe.schema import ModelSpec

    if path is not None:
        return locate(ModelSpec(path=path), Path.cwd())
    found = load_recipe(recipe)
    return locate(found.recipe.model, found.source.parent)


def load_model(where: str, dtype: str = "auto", device: str = "auto") -> Loaded:
    """A copy of the model of its own, every page of its weights in memory."""
    from unlearn.console import quiet_libraries
    from unlearn.model.load import load
    from unlearn.recipe.schema import ModelSpec

    quiet_libraries()
    spec = ModelSpec.model_validate({"path": where, "dtype": dtype, "device": device})
    return load(spec, where)  # computes a fingerprint, which reads every weight


@dataclass(frozen=True, slots=True)
class Seconds:
    """Repeated timings of one thing."""

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.runs)

    def __str__(self) -> str:
        low, high = min(self.runs), max(self.runs)
        spread = f" ({low:.2f}..{high:.2f})" if len(self.runs) > 1 else ""
        return f"{self.median:.2f}{spread}"


def without_others(tasks: TaskSet) -> TaskSet:
    """The tasks, which no longer ask the same about other items: without pmi and acc_pmi."""
    for task in tasks.tasks.values():
        if "others" in task.dataset["test"].column_names:
            task.dataset["test"] = task.dataset["test"].remove_columns("others")
    return tasks


def environment() -> dict[str, Any]:
    """What was run, by which code, on which machine."""
    from unlearn.store.provenance import collect

    found = collect("", sys.argv)
    found.pop("recipe")
    return found


def write_json(path: Path | None, result: Any) -> None:
    """Keep a result in a file, if one is wanted."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run_child(command: Sequence[str]) -> dict[str, Any]:
    """What a process of its own prints as its last line, in JSON; what it says to stderr is shown."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UnlearnError(f"{' '.join(command[1:])} ended with code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass
class Peak:
    """Most memory of this process inside :func:`peak_memory`, and what it had before; bytes."""

    before: int = 0
    most: int = 0

    @property
    def growth(self) -> int:
        """Bytes more than before."""
        return max(0, self.most - self.before)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak of the GPU's allocator on CUDA, else of the resident set, as Linux keeps it and sets it back."""
    import gc

    gc.collect()
    peak = Peak()
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        peak.before = torch.cuda.memory_allocated(device)
        yield peak
        peak.most = torch.cuda.max_memory_allocated(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise UnlearnError(f"peak memory cannot be measured here ({error}); use --no-memory") from error
    peak.before = resident("VmRSS")
    yield peak
    peak.most = resident("VmHWM")


def resident(entry: str = "VmRSS") -> int:
    """Bytes of this process in memory, now (``VmRSS``) or at most since the mark was set back (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))
