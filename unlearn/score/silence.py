"""Keep lm-eval from talking over us and from touching anyone's random numbers."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """lm-eval without its logs, progress bars and prints, in one process, the global random state left as it was."""
    # its bootstrap forks a pool; after torch has started threads, or CUDA, a forked child may hang
    pools = environment("DISABLE_MULTIPROC", "1")
    with pools, _no_bars(), random_state_kept(), errors_only("lm_eval"), contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Some loggers pass on errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore Python's, numpy's and torch's (CPU and GPU) global generators at the end."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    # lm-eval makes bars that cannot be turned off by argument or environment once tqdm is imported.
    original = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """An environment variable for the time being."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
