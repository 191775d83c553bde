"""What a person sees while a run works: one line per event and a bar for anything over two seconds.

Everything goes to stderr, so that stdout stays for results.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_QUIET_SECONDS = 10.0  # between progress lines when stderr is a file (batch jobs)


def is_main_process() -> bool:
    """True on the one process that talks and writes under ``accelerate launch``."""
    return int(os.environ.get("RANK", "0")) == 0


def say(message: str, style: str | None = None) -> None:
    """One line for the user. The text is printed as it is: no markup."""
    if is_main_process():
        _console.print(message, style=style, markup=False)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every ten seconds in a log file.

    Yields:
        ``advance(n)``, to be called as ``n`` more of ``total`` are done.
    """
    if not is_main_process():
        yield lambda n: None
        return
    if _console.is_terminal:
        columns = (
            TextColumn("    {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=_console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda n: bar.advance(task, n)
        return
    done, spoke = 0, time.monotonic()

    def advance(n: int) -> None:
        nonlocal done, spoke
        done += n
        if time.monotonic() - spoke >= _QUIET_SECONDS:
            spoke = time.monotonic()
            say(f"    {label}: {done} of {total}")

    yield advance
