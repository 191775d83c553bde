"""Who listens may leave: a pipe's reader that ends, a terminal that is closed. The work goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SPEAKS = """
import sys, time
from pathlib import Path
from unlearn.console import live_line, progress, say
say("first")
input()
say("second")
with progress("work", 3) as advance:
    for _ in range(3):
        advance(1)
        time.sleep(0.2)
with live_line() as show:
    for _ in range(3):
        show("at work")
        time.sleep(0.2)
say("third")
sys.stderr.write("past the console\\n")
Path(sys.argv[1]).write_text("done")
"""


@pytest.mark.parametrize("end", [os.pipe, getattr(os, "openpty", None)])
def test_nobody_listens_any_more(end: Callable[[], tuple[int, int]] | None, tmp_path: Path) -> None:
    if end is None:
        pytest.skip("no terminals here")
    reader, writer = end()
    command = [sys.executable, "-c", SPEAKS, str(tmp_path / "done")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert b"first" in os.read(reader, 100)
    os.close(reader)
    process.communicate("\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").read_text() == "done"


def test_results_too_are_dropped_where_both_go_one_way(tmp_path: Path) -> None:
    """As with ``2>&1 | head -1``: rich ends the process of whom it cannot print a table."""
    code = SPEAKS + "from rich.console import Console; Console().print('a table'); print('and more', flush=True)"
    command = [sys.executable, "-c", code, str(tmp_path / "done")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


def test_what_the_disk_says_is_told() -> None:
    """Only who listens may leave: what cannot be written is an error as ever."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no such device here")
    with full.open("wb") as out:
        code = "from unlearn.console import say; say('x')"
        assert subprocess.run([sys.executable, "-c", code], stderr=out, check=False).returncode == 1
