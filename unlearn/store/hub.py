"""The model hub: whether it can be asked now, what of it is on this machine, and what to say where it is neither."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

from unlearn.errors import DataError
from unlearn.store.cache import offline

# Whose exceptions mean that the network or the hub failed, where they are not OSErrors already.
NETWORK_LIBRARIES = frozenset({"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"})
_LONGEST = 300  # characters of another library's message in ours
_PATIENCE = 2.0  # seconds until the hub must have given a sign of life


def condensed(error: Exception) -> str:
    """Another library's message on one line, cut where it gets long."""
    whole = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}..."


def hub_away() -> str:
    """Why nothing can be had from the hub now, in words; empty where it can.

    Then the libraries that ask it are told so. They would try for half a minute, and say so at each time; and
    transformers does not hand ``local_files_only`` on to every look-up.
    """
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if offline():
        why = "going online is forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE)"
    elif silence := _silence(endpoint):
        why = f"the hub ({endpoint}) cannot be reached: {silence}"
    else:
        return ""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # it reads the environment at import only, and so does datasets
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return why


@functools.cache
def _silence(endpoint: str) -> str:
    """Why nobody answers there; empty where anybody does. Asked once, as the hub's client asks: by its proxies."""
    from huggingface_hub import get_session

    said = [f"no answer within {_PATIENCE:g} s"]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_PATIENCE)
            said[0] = ""
        except Exception as e:  # of whatever library the client stands on: all mean that it cannot ask
            said[0] = condensed(e)

    # apart, since looking up a name knows no time limit
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return said[0]


def hub_cache() -> Path:
    """The folder of the hub client's own cache, by its documented rule; importing it takes longer than the look-up."""
    return Path(os.environ.get("HF_HUB_CACHE") or _home() / "hub").expanduser()


def _home() -> Path:
    return Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()


def model_in_cache(name: str) -> bool:
    """Whether a model, adapter or tokenizer of the hub, in whatever revision, was downloaded before."""
    return any((hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*config.json"))


def check_data(names: Iterable[str]) -> None:
    """Raise a DataError for data sets that only the hub has, where it cannot be reached for certain."""
    read = Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()
    for name in names:
        owner = name.partition("/")[0]
        there = [*hub_cache().glob(f"datasets--{owner}*"), *read.glob(f"{owner}*")]
        if not there and (away := hub_away()):
            raise DataError(no_data(f"hub:{name}", away))


def no_data(source: str, away: str) -> str:
    """The message for a data set that is neither on this machine nor to be had."""
    return (
        f"{source}: it is not on this machine, and {away}. Download the file elsewhere and give it in this set's "
        "`path` (.json, .jsonl, .csv or .parquet; remove config, split and revision)"
    )
