"""The same targets under atheris, which keeps the inputs that reach new code and goes on from them. Slow."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from targets import TARGETS

HERE = Path(__file__).resolve().parent
RUNS, LARGEST, LONGEST = 3000, 20_000, 60  # inputs, bytes of one, seconds for one
SECONDS = 120  # for a target; what is left then was not tried

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed (extra fuzz)"),
]


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_reach_new_code(name: str, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    options = [f"-runs={RUNS}", f"-max_len={LARGEST}", f"-timeout={LONGEST}", f"-max_total_time={SECONDS}", "-seed=1"]
    done = subprocess.run(
        [sys.executable, str(HERE / "atheris_run.py"), name, str(corpus), *options, "-rss_limit_mb=4096"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=2 * SECONDS,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
    )
    found = sorted(p.name for p in tmp_path.glob("*-*") if p.name.startswith(("crash", "timeout", "oom", "leak")))
    shown = [f"{n}: {(tmp_path / n).read_bytes()[:500]!r}" for n in found]
    assert done.returncode == 0, "\n".join([*shown, done.stdout[-2000:], done.stderr[-4000:]])
    assert "Done " in done.stderr  # and not stopped before it began
