"""Put an export on the model hub: what would go, what must not go, and the upload itself.

The token comes from the environment (``HF_TOKEN`` or ``HUGGING_FACE_HUB_TOKEN``) and from nowhere else. It is handed
to the hub's client, and neither printed nor written anywhere.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unlearn import console
from unlearn.atomic import some
from unlearn.cache import offline
from unlearn.errors import UnlearnError
from unlearn.hub import NETWORK_LIBRARIES, condensed
from unlearn.provenance import tidy
from unlearn.quiet import quietly
from unlearn.recipe_bench import PushSpec
from unlearn.stage import STAGE_FILE, damage_of, read_record
from unlearn.wording import counted, file_size

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # in the order in which the hub's client asks for them
_OURS = frozenset({STAGE_FILE, "export.json"})  # the run's own bookkeeping beside an export
_NEEDED = {"adapter": ("adapter_config.json", "adapter_model.safetensors"), "merged": ("config.json",)}
_SECRET = re.compile(r"(?i)(^|/)(\.|token$|credentials)|\.(pem|key)$")
_PICKLED = frozenset({".pkl", ".pickle", ".bin", ".pt", ".pth", ".ckpt", ".joblib", ".npy", ".npz"})
_TRAINING = re.compile(
    r"(^|/)(checkpoint-\d+/|optimizer|scheduler|scaler|rng_state|trainer_state|training_args|global_step)"
)
_PICKLE_PROTOCOL = b"\x80"  # how a pickle of protocol 2 and later begins
_ZIP = b"PK\x03\x04"  # how torch.save's files begin


class PushError(UnlearnError):
    """An export that cannot, or must not, be put on the hub."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What went to the hub, or would go.

    ``files``: (name in the repository, bytes), in order. ``url``: of the commit; None after a dry run.
    """

    repo: str
    private: bool
    files: tuple[tuple[str, int], ...]
    url: str | None

    def lines(self) -> list[str]:
        """For a person: the repository, then a line for every file with its size."""
        kind = "private" if self.private else "public"
        whole = f"{counted(len(self.files), 'file')}, {file_size(sum(count for _, count in self.files))}"
        head = f"{self.repo} (a {kind} model repository, made if there is none): {whole}"
        width = max(len(name) for name, _ in self.files)
        return [head, *(f"  {name:<{width}}  {file_size(count)}" for name, count in self.files)]


def push(folder: Path, spec: PushSpec, *, dry_run: bool = False, endpoint: str | None = None) -> Pushed:
    """Upload an export of a finished run, in a repository that is made if there is none.

    Args:
        folder: ``<run>/export/adapter`` or ``<run>/export/merged``, as ``spec.what`` says; not changed.
        dry_run: As ``spec.dry_run``: say what would go, and do not touch the network or ask for the token.
        endpoint: Another hub than the client's own (``HF_ENDPOINT``).

    Raises:
        PushError: no finished export, files among it that must not go, no token, offline, or the hub refused.
    """
    found = Pushed(spec.repo, spec.private, _files(folder, spec.what), None)
    if dry_run or spec.dry_run:
        first, *rest = found.lines()
        for line in (f"would push to {first}", *rest):
            console.say(line)
        return found
    token = able(spec)
    url = _upload(folder, spec, [name for name, _ in found.files], token, endpoint)
    console.say(f"pushed {counted(len(found.files), 'file')} to {spec.repo}: {url}")
    return Pushed(found.repo, found.private, found.files, url)


def able(spec: PushSpec) -> str:
    """The token in the environment; empty where nothing is to be pushed.

    Raises:
        PushError: there is none, or going online is forbidden.
    """
    if spec.dry_run:
        return ""
    token = next((found for name in TOKENS if (found := os.environ.get(name, "").strip())), "")
    if not token:
        raise PushError(
            "export.push_to_hub: no token: set HF_TOKEN to one that may write (it is taken from the environment only), "
            "or set dry_run: true to see what would go"
        )
    if offline():
        raise PushError(
            f"export.push_to_hub: going online is forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE), so {spec.repo} cannot "
            "be reached; unset it, or set dry_run: true to see what would go"
        )
    return token


def _files(folder: Path, what: Literal["adapter", "merged"]) -> tuple[tuple[str, int], ...]:
    """What of a sealed export goes to the hub, with sizes in bytes.

    Raises:
        PushError: it is no finished export, is damaged, or holds something that must not go.
    """
    record = read_record(folder) if folder.is_dir() else None
    if record is None:
        raise PushError(
            f"{folder} is not a finished export (it has no {STAGE_FILE}): run the recipe to its end, with "
            f"export.{what}: true; where no coefficient passed the rule, nothing is exported"
        )
    present = sorted(p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    links = [p.relative_to(folder).as_posix() for p in present if p.is_symlink()]
    if links:
        raise PushError(f"{folder}: links are not pushed, since what they point to is not the export: {some(links)}")
    names = [p.relative_to(folder).as_posix() for p in present if p.name not in _OURS]
    if problem := damage_of(folder, record, "sha256"):
        raise PushError(f"{folder}: {problem}, so it is not what the run made; run the recipe again")
    for kind, bad in (("pickles, which run code when they are read", _pickles(folder, names)),
                      ("the state of a training", [n for n in names if _TRAINING.search(n)]),
                      ("hidden files or secrets", [n for n in names if _SECRET.search(n)]),
                      ("files that the run did not write", [n for n in names if n not in record.files])):  # fmt: skip
        if bad:
            raise PushError(f"{folder} holds {kind}: {some(bad)}. They are not pushed: move them elsewhere")
    missing = [name for name in _NEEDED[what] if name not in names]
    if what == "merged" and not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    if missing:
        raise PushError(f"{folder} is no {what} export: {', '.join(missing)} is not there")
    return tuple((name, (folder / name).stat().st_size) for name in names)


def _pickles(folder: Path, names: list[str]) -> list[str]:
    """Files that are pickles by their name or by how they begin."""
    found = []
    for name in names:
        with (folder / name).open("rb") as file:
            start = file.read(4)
        pickled = start[:1] == _PICKLE_PROTOCOL and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
        # safetensors begin with the length of their header, which may be these bytes by chance
        if Path(name).suffix.lower() in _PICKLED or (
            (pickled or start == _ZIP) and not name.endswith((".safetensors", ".json"))
        ):
            found.append(name)
    return found


def _upload(folder: Path, spec: PushSpec, names: list[str], token: str, endpoint: str | None) -> str:
    """Make the repository and commit the files; returns the commit's address.

    Raises:
        PushError: the hub is out of reach, or refused.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    try:
        with quietly(downloads=True):
            api.create_repo(spec.repo, private=spec.private, repo_type="model", exist_ok=True)
            commit = api.upload_folder(
                repo_id=spec.repo,
                folder_path=folder,
                repo_type="model",
                allow_patterns=[glob.escape(name) for name in names],
                commit_message=f"Upload the {spec.what} export of an lm-unlearn run",
            )
    except Exception as error:
        # RuntimeError: all that the client's own uploader (hf_xet) says
        library = type(error).__module__.split(".")[0]
        if not isinstance(error, OSError | RuntimeError) and library not in NETWORK_LIBRARIES:
            raise
        raise PushError(_failure(spec, error, token)) from error
    return str(commit.commit_url)


def _failure(spec: PushSpec, error: Exception, token: str) -> str:
    """What to tell the user when the hub did not take it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = tidy(condensed(error).replace(token, "***"))
    if status == 401:
        return f"export.push_to_hub: the hub does not accept the token for {spec.repo} (401): {said}. Renew HF_TOKEN"
    if status in (403, 404):
        return (
            f"export.push_to_hub: the token may not write to {spec.repo} ({status}): {said}. It needs the right to "
            "write there; check the owner's name as well"
        )
    if status is not None:
        return f"export.push_to_hub: the hub refused {spec.repo} ({status}): {said}"
    return (
        f"export.push_to_hub: the hub cannot be reached for {spec.repo}: {said}. The export stays where it is; the "
        "same command pushes it later"
    )
