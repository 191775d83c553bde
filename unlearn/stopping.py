"""A request to stop (SIGTERM, Ctrl-C) that waits until the step at hand is done and kept.

A batch system announces the end of a job with SIGTERM, some seconds or minutes ahead. Work that goes by steps is worth
holding it for so long: see :func:`held`. Elsewhere a signal stops at once, as ever.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 2.0  # seconds: a batch system signals every process, and torchrun passes it on: one request, heard twice


class Requests:
    """A signal handler that counts how often somebody asked to stop, echoes left out."""

    def __init__(self) -> None:
        self.times = 0
        self._since = float("-inf")

    def __call__(self, number: int, frame: Any) -> None:
        """The handler."""
        now = time.monotonic()
        if now - self._since > _ECHO:
            self.times += 1
            self._since = now


class Hold(Requests):
    """Signals that have arrived inside :func:`held`."""

    @property
    def requested(self) -> bool:
        """Whether a signal to stop has arrived."""
        return self.times > 0

    def __call__(self, number: int, frame: Any) -> None:
        """The handler. A second request, not an echo of the first, is not held."""
        super().__call__(number, frame)
        if self.times > 1:
            raise KeyboardInterrupt


@contextmanager
def handled(handler: Callable[[int, Any], None], signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Inside the ``with``, these signals go to a handler.

    Those that are ignored (``nohup``, a shell's background) stay ignored, and outside the main thread, which alone gets
    signals, nothing is handled.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in signals if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former if former is not None else signal.SIG_DFL)


@contextmanager
def held() -> Iterator[Hold]:
    """Inside the ``with``, SIGTERM and SIGINT only set :attr:`Hold.requested`; who works by steps looks after each.

    A second signal, more than two seconds after the first, raises KeyboardInterrupt at once. For those that are not
    held at all, see :func:`handled`.

    Raises:
        KeyboardInterrupt: on leaving, if a signal has arrived.
    """
    hold = Hold()
    with handled(hold):
        yield hold
    if hold.requested:
        raise KeyboardInterrupt
