"""Models on the hub: is it there, within reach, or already downloaded?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from unlearn.cache import offline
from unlearn.errors import ModelError
from unlearn.quiet import quietly
from unlearn.recipe import ModelSpec

# Whose exceptions mean that the network or the hub failed, where they are not OSErrors already.
NETWORK_LIBRARIES = frozenset({"huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3"})
_INSTEAD = "model.path also takes a local folder with the model in safetensors"
_LONGEST = 300  # characters of another library's message in ours
_TRUST = "UNLEARN_TRUST_REMOTE_CODE"


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


def find_on_hub(spec: ModelSpec) -> str:
    """Make sure that the hub has the model before more is asked of it, and return its id as it is.

    One small file is fetched, so that a hub out of reach is found out once and not once per file, each with its
    own series of retries.

    Raises:
        ModelError: no such model, no access, out of reach, or offline and not downloaded before.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if offline():
        # Its client knows HF_HUB_OFFLINE only, as it was at import; and transformers does not hand
        # local_files_only on to every look-up, so that some would go online, and retry, all the same.
        constants.HF_HUB_OFFLINE = True
        if not isinstance(try_to_load_from_cache(spec.path, "config.json", revision=spec.revision), str):
            raise ModelError(
                f"model.path: there is no folder {spec.path} here, no such model in the hub's local cache, and going "
                f"online is forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE). {_INSTEAD}"
            )
        return spec.path
    try:
        with quietly():
            hf_hub_download(spec.path, "config.json", revision=spec.revision)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES:
            raise ModelError(hub_failure(spec, error)) from error
        raise
    return spec.path
