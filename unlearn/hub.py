"""Models and data on the hub: are they there, within reach, or already downloaded?"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from unlearn.cache import offline
from unlearn.errors import DataError, ModelError
from unlearn.quiet import quietly
from unlearn.recipe import ModelSpec

# Whose exceptions mean that the network or the hub failed, where they are not OSErrors already.
NETWORK_LIBRARIES = frozenset({"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"})
_INSTEAD = "model.path also takes a local folder with the model in safetensors"
_LONGEST = 300  # characters of another library's message in ours
_TRUST = "UNLEARN_TRUST_REMOTE_CODE"
_PATIENCE = 2.0  # seconds until the hub must have given a sign of life


def code_trusted() -> bool:
    """True when the environment lets models run Python code of their own (``UNLEARN_TRUST_REMOTE_CODE``)."""
    return os.environ.get(_TRUST, "").upper() in {"1", "TRUE", "YES", "ON"}


def check_trust(spec: ModelSpec) -> None:
    """A recipe may come from anybody, so that it alone cannot have the code of a model run.

    Raises:
        ModelError: the recipe trusts the model's code and the environment does not.
    """
    if spec.trust_remote_code and not code_trusted():
        raise ModelError(
            f"model.trust_remote_code: a recipe alone cannot have the Python code of a model run: if you trust the "
            f"authors of {spec.path}, set {_TRUST}=1 in the environment too"
        )


@contextmanager
def no_foreign_code(what: str) -> Iterator[None]:
    """Whatever is asked of transformers meanwhile, code that comes with a model or tokenizer is refused, not run.

    For what other libraries load by names that a recipe gives them: some of them trust every tokenizer.

    Raises:
        ModelError: such code was to be run; ``what`` says whose, as in ``eval.tasks: niah_single_1``.
    """
    from transformers import dynamic_module_utils as dynamic

    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError(
            f"{what} names a model or tokenizer that comes with Python code of its own, which is not run: name another "
            f"one, or set {_TRUST}=1 in the environment if you trust its authors"
        )

    if code_trusted():
        yield
        return
    # every way to such code ends in this function
    original = dynamic.get_class_in_module
    dynamic.get_class_in_module = refuse
    try:
        yield
    finally:
        dynamic.get_class_in_module = original


def condensed(error: Exception) -> str:
    """Another library's message on one line, cut where it gets long."""
    whole = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return whole if len(whole) <= _LONGEST else f"{whole[:_LONGEST]}..."


def hub_failure(spec: ModelSpec, error: Exception) -> str:
    """The message for a model that the hub does not give."""
    revision = f" at revision {spec.revision}" if spec.revision else ""
    return (
        f"model.path: {spec.path}{revision} is neither a local folder nor to be had from the model hub: "
        f"{condensed(error)}. {_INSTEAD}"
    )


def not_here(path: str, away: str) -> str:
    """The message for a model that is neither on this machine nor, :func:`hub_away` says why, to be had."""
    return f"model.path: there is no folder {path} here, no such model in the hub's local cache, and {away}. {_INSTEAD}"


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


def hub_cache() -> Path:
    """The folder of the hub client's own cache, by its documented rule; importing it takes longer than the look-up."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def model_in_cache(name: str) -> bool:
    """Whether a model, adapter or tokenizer of the hub, in whatever revision, was downloaded before."""
    return any((hub_cache() / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/*config.json"))


def check_data(names: Iterable[str]) -> None:
    """Raise for data sets that only the hub has, where it cannot be reached; looks before anything is computed.

    Raises:
        DataError: that is so for certain: no data set of such an owner was ever read here.
    """
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    read = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
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


def find_on_hub(spec: ModelSpec) -> str:
    """Make sure that the hub has the model before more is asked of it, and return its id as it is.

    One small file is fetched, so that a hub out of reach is found out once and not once per file, each with its
    own series of retries.

    Raises:
        ModelError: no such model, no access, out of reach, or offline and not downloaded before.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if away := hub_away():
        if not isinstance(try_to_load_from_cache(spec.path, "config.json", revision=spec.revision), str):
            raise ModelError(not_here(spec.path, away))
        return spec.path
    try:
        with quietly():
            hf_hub_download(spec.path, "config.json", revision=spec.revision)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES:
            raise ModelError(hub_failure(spec, error)) from error
        raise
    return spec.path
