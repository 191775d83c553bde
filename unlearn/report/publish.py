"""Model cards: the README.md of an export with the metadata the model hub reads; and the way of an export to the hub.

Names, descriptions and paths come from the user: whatever they hold, the header stays valid YAML and the table a table.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unlearn import console
from unlearn.console import quietly
from unlearn.errors import UnlearnError
from unlearn.recipe.evaluation import PushSpec
from unlearn.recipe.methods import GREEK, formula, phrases
from unlearn.recipe.schema import KEPT, Recipe
from unlearn.report.figures import goal_rows, missed
from unlearn.report.page import templates
from unlearn.report.words import memory_line, outcome, wording_line
from unlearn.results import Chosen, ScoreRow, SweepPoint
from unlearn.store.cache import NETWORK_LIBRARIES, condensed, offline
from unlearn.store.files import some
from unlearn.store.provenance import tidy
from unlearn.store.stages import STAGE_FILE, damage_of, read_record
from unlearn.text import counted, file_size, listing

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

Export = Literal["adapter", "merged"]
_HUB = "hub:"
_ON_HUB = re.compile(r"(?:[\w-]+/)?[\w.-]+")  # the form the hub's server asks of a data set's type
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_METRICS = {"acc": "accuracy", "rougeL": "rouge", "rougeL_f1": "rouge"}  # the hub's identifiers, where they differ
_TAGS = ["unlearning", "machine-unlearning", "task-arithmetic", "lm-unlearn"]
_LONGEST = 200  # characters of a name
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_LINE_START = re.compile(r"^([#+>=-]|\d+(?=[.)]))")
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says beside what the export itself knows."""

    recipe: Recipe
    chosen: Chosen
    scores: tuple[ScoreRow, ...]
    sweep: tuple[SweepPoint, ...] = ()  # a card rests on the choice and the scores alone


def card(facts: CardFacts, export: Export, base_name: str, survived: Mapping[str, Any] | None = None) -> str:
    """The README.md of an export made from the model ``base_name``, a hub id or a path.

    ``survived`` is what ``export_merged`` says under this name.
    """
    recipe, chosen = facts.recipe, facts.chosen
    met = "met on validation items" if chosen.bound_met else "not met by any λ > 0"
    if chosen.bound_met and (out := missed(facts)):
        met += f"; on test items not by {listing(' '.join(row.key) for row in out)}"
    labels = {role: [d.label() for r, d in recipe.goals() if r == role] for role in ("forget", "learn")}
    kept = [f"{d.label()} ({role}{_by(facts, role, d.label())})" for role, d in recipe.sets() if role in KEPT]
    together = ["the weights w were found together, on validation items"] if len(recipe.goals()) > 1 else []
    brought = recipe.vector.given()
    given = [] if brought is None else [f"nothing was trained for it, it is that of {tidy(brought.words())}"]
    place = templates(autoescape=False)
    # literal is repr: a name with quotes stays one Python string, and no line of it can close the fence
    place.filters.update(md=escape, tidy=tidy, literal=lambda name: repr(_BREAKS.sub(" ", tidy(name))))
    return place.get_template("card.md.j2").render(
        header=_header(facts, export, base_name),
        recipe=recipe,
        chosen=chosen,
        scores=facts.scores,
        adapter=export == "adapter",
        base=base_name,
        goals=[("Asked to forget", labels["forget"]), ("Asked to learn", labels["learn"])],
        came=outcome(goal_rows(facts)),
        memory=memory_line(facts),
        wording=wording_line(facts),
        kept=[*kept, *(f"{t.task} ({t.set})" for t in recipe.eval.tasks if t.set in KEPT)],
        formula=formula(recipe, GREEK),
        how=[*given, *phrases(recipe.vector), *together],
        met=met,
        survived=survived,
    )


def _by(facts: CardFacts, role: str, name: str) -> str:
    """The metrics that a kept set is bound by, where the recipe names some."""
    metrics = [key[2] for key in facts.chosen.kept if key[:2] == (role, name)]
    return f" by {listing(metrics)}" if facts.recipe.choose.kept and metrics else ""


def escape(text: str) -> str:
    """Any text as one line of Markdown that shows just that text, in a table cell too."""
    line = _BREAKS.sub(" ", text.encode("utf-8", "replace").decode("utf-8")).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;")
    line = _MARKDOWN.sub(r"\\\1", line)
    # addresses become links without any markup, and some characters count at the start of a line only
    line = re.sub(r"(?i)\b(https?|ftp|www)(:|\.)", r"\1&#8203;\2", line)
    return _LINE_START.sub(lambda m: f"&#8203;{m[1]}", line)


def _header(facts: CardFacts, export: Export, base_name: str) -> str:
    """The YAML the hub reads. A base that is no hub id is left out: the hub refuses a card with a wrong one."""
    from huggingface_hub import ModelCardData

    on_hub = _HUB_ID.fullmatch(base_name) is not None and not Path(base_name).exists()
    data = ModelCardData(
        base_model=base_name if on_hub else None,
        library_name="peft" if export == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=_TAGS if facts.recipe.forget is not None else _TAGS[2:],
        model_name=facts.recipe.name,
        eval_results=eval_results(facts.recipe, facts.scores),
    )
    if on_hub:
        data["base_model_relation"] = "adapter" if export == "adapter" else "finetune"
    if not data.eval_results:
        data.eval_results = data.model_name = None
    return data.to_yaml()


def eval_results(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[EvalResult]:
    """The scores after the edit, one entry a row; what is no finite number is left out, since the hub takes none.

    A data set's type is its id on the hub, or for one's own files the name it has in the report. No two data sets
    share type, configuration and split: the hub would show the scores of both under the name of the first.
    """
    from huggingface_hub import EvalResult

    places = _places(recipe, rows)
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=places[row.set, row.name][0],
            dataset_name=f"{_line(row.name)} ({row.set} set)",
            dataset_config=places[row.set, row.name][1],
            dataset_split=_line(row.split),
            metric_type=_METRICS.get(row.metric, _line(row.metric)),
            metric_value=row.after.value,
            metric_name=f"{_line(row.metric)} ({_direction(row)})",
        )
        for row in rows
        if math.isfinite(row.after.value)
    ]


def _places(recipe: Recipe, rows: Sequence[ScoreRow]) -> dict[tuple[str, str], tuple[str, str | None]]:
    """(set, name) -> (data set's type, its configuration), no two the same."""
    data = {(role, d.label()): d for role, d in recipe.sets()}
    found: dict[tuple[str, str], tuple[str, str | None]] = {}
    for key in dict.fromkeys((row.set, row.name) for row in rows):
        spec = data.get(key)
        hub = spec.path.removeprefix(_HUB) if spec is not None and spec.path.startswith(_HUB) else ""
        kind = hub if _ON_HUB.fullmatch(hub) else _slug(key[1])
        config = spec.config if spec is not None and hub else None
        place, number = (kind, config), 1
        while place in found.values():
            more = "" if number == 1 else f"-{number}"
            place, number = (kind, f"{config + '-' if config else ''}{key[0]}-{_slug(key[1])}{more}"), number + 1
        found[key] = place
    return found


def _direction(row: ScoreRow) -> str:
    """Which way the score should have gone: what must be forgotten is the one that should get worse."""
    if row.set == "forget":
        return f"{'lower' if row.higher_is_better else 'higher'} is more forgotten"
    return f"{'higher' if row.higher_is_better else 'lower'} is better"


def _slug(name: str) -> str:
    """A name in the characters that the hub takes in a data set's type."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", tidy(name))[:_LONGEST].strip("-.") or "set"


def _line(text: str) -> str:
    """Text on one line, without control characters, not endless."""
    return "".join(c for c in " ".join(tidy(text).split()) if c.isprintable())[:_LONGEST] or "-"


# -- to the hub

_OURS = (STAGE_FILE, "export.json")  # the run's own bookkeeping beside an export
_NEEDED = {"adapter": ("adapter_config.json", "adapter_model.safetensors"), "merged": ("config.json",)}
_FORBIDDEN = {
    "pickles, which run code when they are read": re.compile(r"(?i)\.(pkl|pickle|bin|ptc?|pth|ckpt|joblib|np[yz])$"),
    "the state of a training": re.compile(
        r"(^|/)(checkpoint-\d+/|optimizer|scheduler|scaler|rng_state|trainer_state|training_args|global_step)"
    ),
    "hidden files or secrets": re.compile(r"(?i)(^|/)(\.|token$|credentials)|\.(pem|key)$"),
}


class PushError(UnlearnError):
    """An export that cannot, or must not, be put on the hub."""


def push(folder: Path, spec: PushSpec) -> str | None:
    """Upload an export of a finished run, in a repository that is made if there is none; returns the commit's address.

    With ``spec.dry_run`` there is nothing but a list of what would go: no network, no token, no address.
    """
    files = _files(folder, spec.what)
    whole = counted(len(files), "file")
    if spec.dry_run:
        kind = "private" if spec.private else "public"
        console.say(f"would push to {spec.repo} (a {kind} model repository, made if there is none): "
                    f"{whole}, {file_size(sum(files.values()))}")  # fmt: skip
        width = max(map(len, files))
        for name, count in files.items():
            console.say(f"  {name:<{width}}  {file_size(count)}")
        return None
    url = _upload(folder, spec, list(files), able(spec))
    console.say(f"pushed {whole} to {spec.repo}: {url}")
    return url


def able(spec: PushSpec) -> str:
    """The token to push with, empty where nothing is to be pushed; PushError without one, or where it is forbidden."""
    from huggingface_hub import get_token

    if spec.dry_run:
        return ""
    why, token = "", get_token() or ""
    if not token:
        why = "no token: set HF_TOKEN to one that may write, log in with hf auth login"
    elif offline():
        why = (
            f"going online is forbidden (HF_HUB_OFFLINE or UNLEARN_OFFLINE), so {spec.repo} cannot be reached; unset it"
        )
    if why:
        raise PushError(f"export.push_to_hub: {why}, or set dry_run: true to see what would go")
    return token


def _files(folder: Path, what: Export) -> dict[str, int]:
    """What of a sealed export goes to the hub, with sizes in bytes; PushError if it is none, damaged, or holds more."""
    record = read_record(folder) if folder.is_dir() else None
    if record is None:
        raise PushError(
            f"{folder} is not a finished export (it has no {STAGE_FILE}): run the recipe to its end, with "
            f"export.{what}: true; where no coefficient passed the rule, nothing is exported"
        )
    present = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file()}
    names = [name for name in present if name not in _OURS]
    if links := [name for name in names if present[name].is_symlink()]:
        raise PushError(f"{folder}: links are not pushed, since what they point to is not the export: {some(links)}")
    if problem := damage_of(folder, record, "sha256"):
        raise PushError(f"{folder}: {problem}, so it is not what the run made; run the recipe again")
    bad = {kind: [n for n in names if form.search(n)] for kind, form in _FORBIDDEN.items()}
    bad["files that the run did not write"] = [n for n in names if n not in record.files]
    for kind, found in bad.items():
        if found:
            raise PushError(f"{folder} holds {kind}: {some(found)}. They are not pushed: move them elsewhere")
    missing = [name for name in _NEEDED[what] if name not in names]
    if what == "merged" and not any(name.endswith(".safetensors") for name in names):
        missing.append("*.safetensors")
    if missing:
        raise PushError(f"{folder} is no {what} export: {', '.join(missing)} is not there")
    return {name: present[name].stat().st_size for name in names}


def _upload(folder: Path, spec: PushSpec, names: list[str], token: str) -> str:
    """Make the repository and commit the files; returns the commit's address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
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
        raise PushError(f"export.push_to_hub: {_failure(spec.repo, error, token)}") from error
    return str(commit.commit_url)


def _failure(repo: str, error: Exception, token: str) -> str:
    """What to tell the user when the hub did not take it."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    why = tidy(condensed(error).replace(token, "***"))
    if status == 401:
        return f"the hub does not accept the token for {repo} (401): {why}. Renew HF_TOKEN"
    if status in (403, 404):
        return f"the token may not write to {repo} ({status}): {why}. Check its rights and the owner's name"
    if status is not None:
        return f"the hub refused {repo} ({status}): {why}"
    return (
        f"the hub cannot be reached for {repo}: {why}. The export stays where it is; the same command pushes it later"
    )
