"""What was run, by which code, on which kind of machine: for a report that may be shared.

So no host name, no user name, no secret from the command line, and paths under the home folder begin with ``~``.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from unlearn.text import HIDDEN, hide

psutil: Any = import_module("psutil")  # comes with accelerate, without types
DISTRIBUTION = "lm-unlearn"
# Part of every key: goes up when our own code gives other results for the same recipe and files, as in how texts become
# tokens and what is compared of a written answer.
RULES = 2
LIBRARIES = (
    *("torch", "transformers", "peft", "datasets", "lm_eval", "accelerate", "bitsandbytes", "safetensors"),
    *("tokenizers", "numpy", "scipy", "scikit-learn", "rouge_score", "nltk", "sacrebleu", "evaluate", "detoxify"),
)
# Variables by which libraries compute otherwise, whatever a program asks for.
_VARIABLES = (
    *("NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("PYTORCH_MPS_FAST_MATH", "TRANSFORMERS_SDPA_FORCE_GQA"),
)
_NAMES = r"(?:token|secret|pass(?:word|wd|phrase)|(?:api|access|private)[_-]?key|auth|authorization|credentials?)"
_VALUE_OF = re.compile(rf"(?i)({_NAMES}[\"']?\s*[=:]\s*).+", re.DOTALL)
_FLAG = re.compile(rf"(?i)--?[\w.-]*?{_NAMES}")
_GIT_SECONDS = 10
_PACKAGE = Path(__file__).resolve().parents[1]


def collect(recipe_source: Path | str, argv: Sequence[str], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What made a result, and ``extra`` (:func:`scrub`), in plain JSON types. GPUs only if torch is loaded already."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": tidy(str(recipe_source)),
        "command": command(argv),
        "package": {"name": DISTRIBUTION, "version": _version(DISTRIBUTION)},
        "code": checkout(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "machine": {"cpu": _cpu(), "cores": cores(), "memory_gb": _memory_gb(), "gpus": _gpus()},
        "versions": versions(LIBRARIES),
        **scrub(dict(extra or {})),
    }


def command(argv: Sequence[str]) -> list[str]:
    """A command line without secrets: ``token=...``, ``--token ...``, keys known by their form, logins in URLs."""
    return [
        HIDDEN if _FLAG.fullmatch(flag) and not argument.startswith("-") else tidy(argument)
        for flag, argument in pairwise(("", *argv))
    ]


def tidy(text: str) -> str:
    """Text fit to be shared: secrets hidden, the home folder as ``~``."""
    text = _VALUE_OF.sub(rf"\1{HIDDEN}", hide(text))
    for home in _homes():
        # whole path components only: the home of ann is not the beginning of anna's, nor the end of a longer path
        text = re.sub(rf"(?<![\w.~-]){re.escape(home)}(?![\w-]|\.\w)", "~", text)
    return text


def scrub(value: Any) -> Any:
    """:func:`tidy` on every string inside JSON-like values; tuples become lists, paths strings."""
    if isinstance(value, str | Path):
        return tidy(str(value))
    if isinstance(value, Mapping):
        return {str(k): scrub(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(v) for v in value]
    return value


def checkout(package: Path = _PACKAGE) -> dict[str, Any] | None:
    """Commit of the code itself and whether it was changed since; None when it is not run from its own checkout.

    An installed copy inside somebody's repository (a virtual environment, a vendored folder) is not one.
    """
    top, commit = _git(package, "rev-parse", "--show-toplevel"), _git(package, "rev-parse", "HEAD")
    ours = top is not None and Path(top).resolve() == package.parent
    if not ours or commit is None or _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    changes = _git(package.parent, "status", "--porcelain", "--", package.name, "eval")
    return {"commit": commit, "dirty": changes is None or bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers, stripped; None when it fails or there is no git."""
    # GIT_DIR and friends, as set inside hooks, would point to another repository
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {"GIT_OPTIONAL_LOCKS": "0"}
    line = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(
            line, check=False, capture_output=True, text=True, timeout=_GIT_SECONDS, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def surroundings() -> dict[str, Any]:
    """What a result depends on that is in no recipe and no file of it, as far as can be told without torch."""
    return {
        "rules": RULES,
        "versions": versions(LIBRARIES),
        "python": list(sys.version_info[:2]),  # it brings Unicode's tables, by which texts are compared
        "variables": {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)},
    }


def versions(distributions: Sequence[str]) -> dict[str, str | None]:
    """Installed versions, this package's first; None where there is none."""
    return {name: _version(name) for name in (DISTRIBUTION, *distributions)}


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _homes() -> list[str]:
    """The home folder's names, the longest first: one may contain the other."""
    try:
        home = Path.home()
    except RuntimeError:  # no home folder at all
        return []
    return [n for n in sorted({str(home), str(home.resolve())}, key=len, reverse=True) if n.strip("/\\")]


def _cpu() -> str:
    found = re.search(r"^model name\s*: *(.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> int:
    """Cores this process may use: a container or a batch job often has fewer than the machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if limit := re.fullmatch(r"(\d+) (\d+)", _text("/sys/fs/cgroup/cpu.max")):
        allowed = min(allowed, max(1, int(limit[1]) // int(limit[2])))
    return allowed


def _memory_gb() -> float:
    """Memory this process may use, in GB (1e9 bytes)."""
    size, limit = psutil.virtual_memory().total, _text("/sys/fs/cgroup/memory.max")
    return round(min(size, int(limit) if limit.isdigit() else size) / 1e9, 1)


def _text(path: str) -> str:
    """What a file of the system says; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["Apple GPU (mps)"] if torch.backends.mps.is_available() else []
