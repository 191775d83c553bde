"""Keep other libraries' chatter off the terminal, where it hides what the user should read."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def _not_about_missing_kernels(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward")


# Said whenever bitsandbytes is imported (peft does so by itself) on a machine without an optional package that
# only makes 4-bit inference on CPUs faster. A filter may be set before the library is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_about_missing_kernels)


@contextmanager
def quietly(*, downloads: bool = False) -> Iterator[None]:
    """Silence progress bars and advice, but not errors, of transformers and the hub's client.

    Args:
        downloads: let the hub's client show its progress bars: it is moving gigabytes.
    """
    from huggingface_hub import utils as hub
    from transformers.utils import logging as chatter

    verbosity, hub_verbosity = chatter.get_verbosity(), hub.logging.get_verbosity()
    bars, hub_bars = chatter.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    chatter.set_verbosity_error()
    hub.logging.set_verbosity_error()
    chatter.disable_progress_bar()  # the hub's as well
    if downloads and hub_bars:
        hub.enable_progress_bars()
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        hub.logging.set_verbosity(hub_verbosity)
        if bars:
            chatter.enable_progress_bar()
        if hub_bars:
            hub.enable_progress_bars()
        else:
            hub.disable_progress_bars()
