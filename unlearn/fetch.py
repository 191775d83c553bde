"""Where a recipe's model is: from ``model.path`` to a folder or hub id that transformers opens.

What has to be downloaded, extracted or converted goes through the cache and is done once.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from unlearn import pico
from unlearn.atomic import some
from unlearn.cache import cache_folder, check_sha256, entry, sha256, whole
from unlearn.console import say
from unlearn.errors import ModelError
from unlearn.hub import find_on_hub
from unlearn.provenance import versions
from unlearn.recipe import ModelSpec
from unlearn.redact import one_line
from unlearn.wheel import WheelFile, find_in_wheel

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
        cache: where downloads and conversions are kept; :func:`unlearn.cache.cache_folder` when not given.

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
        from unlearn.convert import convert

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
