"""What a person sees while a run works: one line per event and a bar for anything over two seconds.

Everything goes to stderr, so that stdout stays for results. Work does not end because nobody listens any more.
"""

from __future__ import annotations

import errno
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from unlearn.text import shown


class _Console(Console):
    """Once its pipe's reader has ended, or its terminal was closed, what is printed is dropped."""

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as e:
            if e.errno != errno.EIO:  # what a terminal says that is gone
                raise
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Have all that goes there, also past this console and with ``2>&1``, go nowhere."""
        self.quiet = True
        with suppress(OSError, ValueError):  # no file, but something else that stands for stderr
            gone = os.fstat(self.file.fileno())
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for end in (self.file.fileno(), 1):
                if os.path.samestat(os.fstat(end), gone):
                    os.dup2(nowhere, end)
            os.close(nowhere)


_console = _Console(stderr=True, highlight=False, soft_wrap=True)
_LEVELS = {"red": logging.ERROR, "yellow": logging.WARNING}
_QUIET_SECONDS = 10.0  # between progress lines when stderr is a file (batch jobs)


def is_main_process() -> bool:
    """True on the one of several processes that talks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


class _ToConsole(logging.Handler):
    """Prints records as they are: no markup. Secrets and control characters in them are shown as such."""

    def emit(self, record: logging.LogRecord) -> None:
        _console.print(shown(record.getMessage()), style=getattr(record, "style", None), markup=False, emoji=False)


log = logging.getLogger("unlearn")
log.propagate = False  # what lm-eval sets up for the root would print everything twice
log.addHandler(_ToConsole())
if log.level == logging.NOTSET:
    log.setLevel(logging.INFO)


def say(message: str, style: str | None = None) -> None:
    """One line for the user, by the logger ``unlearn``: an error in red, a warning in yellow, else information."""
    if is_main_process():
        log.log(_LEVELS.get(style or "", logging.INFO), "%s", message, extra={"style": style})


def results() -> Console:
    """The console for results on stdout: in a pipe so wide that every row stays one line, for other programs."""
    screen = Console(highlight=False, markup=False)
    return screen if screen.is_terminal else Console(highlight=False, markup=False, width=1000)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every ten seconds in a log file: ``advance(n)`` says that ``n`` more are done."""
    if not is_main_process() or not log.isEnabledFor(logging.INFO):
        yield lambda n: None
        return
    label = shown(label)
    if _console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        described = TextColumn("    {task.description}", markup=False)
        with Progress(described, *columns, console=_console, transient=True) as bar:
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


@contextmanager
def live_line() -> Iterator[Callable[[str], None]]:
    """A line at the foot of a terminal, below what is said meanwhile, kept up to date by ``show(text)``."""
    if not is_main_process() or not _console.is_terminal or not log.isEnabledFor(logging.INFO):
        yield lambda text: None
        return
    with _console.status("") as status:
        yield lambda text: status.update(escape(shown(text)))


# -- keep other libraries' chatter off the terminal, where it hides what the user should read


# Said whenever bitsandbytes is imported (peft does so by itself) on a machine without an optional package that
# only makes 4-bit inference on CPUs faster. A filter may be set before the library is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")
)


@contextmanager
def quietly(*, downloads: bool = False) -> Iterator[None]:
    """Silence progress bars and advice, but not errors, of transformers and the hub's client.

    Args:
        downloads: let the hub's client show its progress bars: it is moving gigabytes.
    """
    from huggingface_hub.utils import logging as hub_chatter
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as chatter

    def show_bars(transformers: bool, hub: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where HF_HUB_DISABLE_PROGRESS_BARS decides, the hub's client says so
            (chatter.enable_progress_bar if transformers else chatter.disable_progress_bar)()  # the hub's as well
            (enable_progress_bars if hub else disable_progress_bars)()

    verbosity, hub_verbosity = chatter.get_verbosity(), hub_chatter.get_verbosity()
    bars, hub_bars = chatter.is_progress_bar_enabled(), not are_progress_bars_disabled()
    chatter.set_verbosity_error()
    hub_chatter.set_verbosity(logging.ERROR)
    show_bars(False, downloads and hub_bars)
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        hub_chatter.set_verbosity(hub_verbosity)
        show_bars(bars, hub_bars)


def quiet_libraries() -> None:
    """Called once, before the libraries are used: no bars beside ours, no advice the user cannot follow."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # transformers warns about arguments that transformers and peft pass to each other
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    if log.isEnabledFor(logging.DEBUG):
        return
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
