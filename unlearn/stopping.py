"""A request to stop (SIGTERM, Ctrl-C) that waits until the step at hand is done and kept.

A batch system announces the end of a job with SIGTERM, some seconds or minutes ahead. Work that goes by steps is worth
holding it for so long: see :func:`held`. Elsewhere a signal stops at once, as ever.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO = 2.0  # seconds: a batch system signals every process, and the launcher passes it on: one request, heard twice


class Hold:
    """Signals that have arrived inside :func:`held`."""

    def __init__(self) -> None:
        self._since: float | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal to stop has arrived."""
        return self._since is not None

    def __call__(self, number: int, frame: Any) -> None:
        """The handler. A second request, not an echo of the first, is not held."""
        now = time.monotonic()
        if self._since is not None and now - self._since > _ECHO:
            raise KeyboardInterrupt
        if self._since is None:
            self._since = now


@contextmanager
def held() -> Iterator[Hold]:
    """Inside the ``with``, SIGTERM and SIGINT only set :attr:`Hold.requested`; who works by steps looks after each.

    A second signal, more than two seconds after the first, raises KeyboardInterrupt at once. Signals that are ignored
    stay ignored, and outside the main thread, which alone gets signals, nothing is held.

    Raises:
        KeyboardInterrupt: on leaving, if a signal has arrived.
    """
    hold = Hold()
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, hold)
        yield hold
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if hold.requested:
        raise KeyboardInterrupt
