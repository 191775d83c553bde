"""Model cards: the README.md of an export, with the metadata the model hub reads.

Names, descriptions and paths come from the user: whatever they hold, the header stays valid YAML and the table a table.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from unlearn import console
from unlearn.console import quietly
from unlearn.errors import UnlearnError
from unlearn.recipe.evaluation import PushSpec
from unlearn.recipe.metrics import KEPT
from unlearn.recipe.schema import Recipe
from unlearn.report.figures import rows_of_goals, verdict_of, with_margin
from unlearn.report.words import CAVEAT, chance_of, outcome
from unlearn.results import Chosen, ScoreRow
from unlearn.store.cache import offline
from unlearn.store.files import some
from unlearn.store.hub import NETWORK_LIBRARIES, condensed
from unlearn.store.provenance import tidy
from unlearn.store.stages import STAGE_FILE, damage_of, read_record
from unlearn.text import coefficient, counted, file_size, listing, percent
from unlearn.vector.formula import GREEK, formula, phrases

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


_TASK = "text-generation"
_HUB = "hub:"
_ON_HUB = re.compile(r"(?:[\w-]+/)?[\w.-]+")  # the form the hub's server asks of a data set's type
_METRICS = {
    "acc": "accuracy",
    "rougeL": "rouge",
    "rougeL_f1": "rouge",
}  # ours -> the hub's identifier, where it differs
_LONGEST = 200  # characters of a name


def eval_results(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[EvalResult]:
    """The scores after the edit, one entry a row, in the order of the rows.

    A data set's type is its id on the hub, or for one's own files the name it has in the report. No two data sets
    share type, configuration and split: the hub would show the scores of both under the name of the first.
    Scores that are no finite numbers are left out, since the hub takes none.
    """
    from huggingface_hub import EvalResult

    places = _places(recipe, rows)
    found = []
    for row in rows:
        if not math.isfinite(row.after.value):
            continue
        kind, config = places[row.set, row.name]
        found.append(
            EvalResult(
                task_type=_TASK,
                dataset_type=kind,
                dataset_name=f"{_line(row.name)} ({row.set} set)",
                dataset_config=config,
                dataset_split=_line(row.split),
                metric_type=_METRICS.get(row.metric, _line(row.metric)),
                metric_value=row.after.value,
                metric_name=f"{_line(row.metric)} ({_direction(row)})",
            )
        )
    return found


def model_index(recipe: Recipe, rows: Sequence[ScoreRow]) -> list[dict[str, Any]]:
    """The value of ``model-index`` for a card's header; empty where there are no scores."""
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = eval_results(recipe, rows)
    if not results:
        return []
    index: list[dict[str, Any]] = eval_results_to_model_index(recipe.name, results)
    return index


def _places(recipe: Recipe, rows: Sequence[ScoreRow]) -> dict[tuple[str, str], tuple[str, str | None]]:
    """(set, name) -> (data set's type, its configuration), no two the same."""
    data = {(role, d.label()): d for role, d in recipe.sets()}
    found: dict[tuple[str, str], tuple[str, str | None]] = {}
    taken: set[tuple[str, str | None]] = set()
    for key in dict.fromkeys((row.set, row.name) for row in rows):
        spec = data.get(key)
        hub = spec.path.removeprefix(_HUB) if spec is not None and spec.path.startswith(_HUB) else ""
        kind = hub if _ON_HUB.fullmatch(hub) else _slug(key[1])
        config = spec.config if spec is not None and hub else None
        place, number = (kind, config), 1
        while place in taken:
            more = "" if number == 1 else f"-{number}"
            place, number = (kind, f"{config + '-' if config else ''}{key[0]}-{_slug(key[1])}{more}"), number + 1
        taken.add(place)
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


# -- model cards


Export = Literal["adapter", "merged"]
_TAGS = ["unlearning", "machine-unlearning", "task-arithmetic", "lm-unlearn"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")
_LINE_START = re.compile(r"^([#+>=-]|\d+(?=[.)]))")
_BREAKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says beside what the export itself knows.

    ``license`` is the hub's identifier (``mit``, ``apache-2.0``); None leaves the field to the user.
    """

    recipe: Recipe
    chosen: Chosen
    scores: tuple[ScoreRow, ...]
    license: str | None = None


def card(facts: CardFacts, export: Export, base_name: str, survived: Mapping[str, Any] | None = None) -> str:
    """The README.md of an export.

    Args:
        facts: What was run and what came of it.
        export: A PEFT adapter, or whole weights.
        base_name: What the model was made from: a hub id, or a path.
        survived: For merged weights, what ``export_merged`` says under this name.
    """
    recipe = facts.recipe
    parts = [
        _header(facts, export, base_name),
        f"# {escape(recipe.name)}",
        escape(tidy(recipe.description)),
        _summary(facts, export, base_name),
        "## Scores",
        _table(facts),
        "## How to load it",
        _loading(export, base_name),
        *(["## What the number format kept of the edit", _survived(survived)] if survived else []),
        "## What this does not promise",
        CAVEAT,
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


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
    on_hub = _HUB_ID.fullmatch(base_name) is not None and not Path(base_name).exists()
    index = model_index(facts.recipe, facts.scores)
    fields: dict[str, Any] = {
        **({"base_model": base_name} if on_hub else {}),
        **({"base_model_relation": "adapter" if export == "adapter" else "finetune"} if on_hub else {}),
        "library_name": "peft" if export == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": _TAGS if facts.recipe.forget is not None else _TAGS[2:],
        **({"license": facts.license} if facts.license else {}),
        **({"model-index": index} if index else {}),
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)}---"


def _summary(facts: CardFacts, export: Export, base_name: str) -> str:
    recipe, chosen = facts.recipe, facts.chosen
    kept = [f"{escape(d.label())} ({role})" for role, d in recipe.sets() if role in KEPT]
    kept += [f"{escape(t.task)} ({t.set})" for t in recipe.eval.tasks if t.set in KEPT]
    change = formula(recipe, GREEK).replace("_", chr(92) + "_")
    what = "A LoRA adapter" if export == "adapter" else "Whole weights"
    goals = {
        word: [escape(d.label()) for r, d in recipe.goals() if r == role]
        for word, role in (("Asked to forget", "forget"), ("Asked to learn", "learn"))
    }
    more = phrases(recipe.vector)
    came = outcome(rows_of_goals(chosen, facts.scores))
    met = "met on validation items" if chosen.bound_met else "not met by any λ > 0"
    if chosen.bound_met and (out := [r for r in facts.scores if verdict_of(chosen, chosen.kept, r) is False]):
        met += f"; on test items not by {listing(f'{r.set} {r.name} {r.metric}' for r in out)}"
    if len(recipe.goals()) > 1:
        more = (*more, "the weights w were found together, on validation items")
    return "\n".join(
        [
            f"{what} meant to make {escape(tidy(base_name))} {_how(recipe)}",
            "",
            *(f"- {word}: {', '.join(names)}" for word, names in goals.items() if names),
            *([f"- What came of it, on the items of the table below: {escape(came)}."] if came else []),
            f"- Measured as kept: {', '.join(kept) or 'nothing was measured'}",
            f"- Edit: {change} with λ = {coefficient(chosen.coefficient)}",
            *(f"- How the vector was made: {escape(phrase)}" for phrase in more),
            f"- How λ was chosen: {escape(chosen.rule)} ({escape(met)})",
        ]
    )


def _how(recipe: Recipe) -> str:
    """What the edit does to the model, and by which operation."""
    cited = "by task arithmetic ([Ilharco et al., 2022](https://arxiv.org/abs/2212.04089))"
    if recipe.analogy is not None:
        names = [escape(d.label()) for d in (recipe.analogy.a, recipe.analogy.b, recipe.analogy.c)]
        return (
            f"do what it was not trained to do {cited}: {names[0]} is to {names[1]} as {names[2]} is to "
            f"{escape(recipe.learn[0].label())}, and only the first three were learned."
        )
    many = len(recipe.goals()) > 1
    some = "several sets of data" if many else "a set of data"
    towards = f"a vector towards {'each' if many else 'the data'} is learned"
    if not recipe.learn:
        return f"forget {some} {cited}: {towards}, then subtracted."
    if recipe.forget is None:
        return f"know {some} {cited}: {towards}, then added."
    return f"forget and learn {some} {cited}: {towards}, then subtracted or added."


def _table(facts: CardFacts) -> str:
    if not facts.scores:
        return "No scores were recorded."
    lines = ["| set | data | split | metric | before | after |", "|---|---|---|---|---|---|"]
    for r in facts.scores:
        metric = f"{escape(r.metric)} {'↑' if r.higher_is_better else '↓'}"
        metric += chance_of(r.chance, " ({})")
        cells = (r.set, escape(r.name), escape(r.split), metric, _score(r, "before"), _score(r, "after"))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "± is half a 95 % confidence interval, n the number of items; ↑ higher is better, ↓ lower is better."]
    lines[-1] += " Chance is what guessing scores." if any(r.chance is not None for r in facts.scores) else ""
    return "\n".join(lines)


def _score(row: ScoreRow, when: Literal["before", "after"]) -> str:
    score = row.before if when == "before" else row.after
    return f"{with_margin(score)} (n={score.n})"


def _loading(export: Export, base_name: str) -> str:
    # repr: a name with quotes stays one Python string, and no line of it can close the fence
    if export == "merged":
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")\n'
            'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```'
        )
    base = repr(_BREAKS.sub(" ", tidy(base_name)))
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        'model = PeftModel.from_pretrained(base, "path/of/this/folder")\n'
        f"tokenizer = AutoTokenizer.from_pretrained({base})\n```\n\n"
        "λ and the minus sign are folded into the factors, which are float32. Used beside the weights like this, the "
        "edit is exact; `merge_and_unload()` into 16-bit weights rounds away part of it."
    )


def _survived(survived: Mapping[str, Any]) -> str:
    cosine, ratio = survived.get("cosine"), survived.get("norm_ratio")
    if cosine is None or ratio is None:
        return "The edit is zero."
    return (
        f"Rounding to the stored number format left an edit with cosine {cosine:.4f} to the intended one and "
        f"{ratio:.4f} times its norm; {percent(survived['changed'])} of the elements it touches differ from those of "
        "the unedited model in the same format."
    )


# -- put an export on the model hub


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
