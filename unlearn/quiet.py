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
    from huggingface_hub.utils import logging as hub_chatter
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging as chatter

    verbosity, hub_verbosity = chatter.get_verbosity(), hub_chatter.get_verbosity()
    bars, hub_bars = chatter.is_progress_bar_enabled(), not are_progress_bars_disabled()
    chatter.set_verbosity_error()
    hub_chatter.set_verbosity(logging.ERROR)
    _show_bars(False, downloads and hub_bars)
    try:
        yield
    finally:
        chatter.set_verbosity(verbosity)
        hub_chatter.set_verbosity(hub_verbosity)
        _show_bars(bars, hub_bars)


def _show_bars(transformers: bool, hub: bool) -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as chatter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where HF_HUB_DISABLE_PROGRESS_BARS decides, the hub's client says so
        (chatter.enable_progress_bar if transformers else chatter.disable_progress_bar)()  # the hub's as well
        (enable_progress_bars if hub else disable_progress_bars)()


def quiet_libraries() -> None:
    """Called once, before the libraries are used: no bars beside ours, no advice the user cannot follow."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # transformers warns about arguments that transformers and peft pass to each other
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    for name in ("lm_eval", "lm-eval", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
