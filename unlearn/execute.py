"""One run as a user starts it: its folder, the shortcut when nothing changed, the processes that share it."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from unlearn import processes
from unlearn.console import is_main_process, quiet_libraries, say
from unlearn.data.chat import template_path
from unlearn.data.files import source_path
from unlearn.data.items import refusals
from unlearn.evidence import reference as references
from unlearn.model import locate
from unlearn.plan import checks
from unlearn.recipe.load import LoadedRecipe, open_run
from unlearn.recipe.schema import Recipe
from unlearn.report.terminal import render_table
from unlearn.results import RunReport
from unlearn.store import provenance
from unlearn.store.cache import sha256
from unlearn.store.files import fingerprint
from unlearn.store.stages import Pool, RunFolder


def execute(
    loaded: LoadedRecipe, out: Path | None, fresh: bool = False, *, pool: Path | None = None, prepare: bool = False
) -> RunReport | None:
    """Run what is left to run of a recipe, print the result and return it (see :func:`unlearn.run`)."""
    # what a batch system gives a run is no part of what is run
    recipe, base = loaded.recipe.model_copy(update={"cluster": None}), loaded.source.parent
    shared = Pool(pool.absolute()) if pool is not None else None
    with (
        loaded.telling_where(),
        processes.told(recipe.name, "stop what else runs there"),
        open_run(out, recipe, loaded.text, fresh) as folder,
    ):
        say(f"{recipe.name}: {folder.root}")
        asked = recipe.model_dump(mode="json", exclude={"cluster"})
        key = fingerprint(asked, _inputs(recipe, base), provenance.surroundings())
        if processes.several():
            _fetch(recipe, base)  # before they join: whoever waits for a download there is taken for lost
        processes.join()
        if processes.count() > 1:
            say(f"{processes.count()} processes share training and scoring")
        try:
            report = None if prepare else _unchanged(folder, key)
            if report is not None:
                say("nothing has changed since this run was finished; --fresh runs it again")
            else:
                report = _run(recipe, loaded.source, folder, shared, key, prepare)
        finally:
            processes.leave()
        if report is not None and is_main_process():
            render_table(report, Console())
            say(f"report: {folder.root / 'report.html'}")
    return report


def _run(
    recipe: Recipe, source: Path, folder: RunFolder, pool: Pool | None, key: str, prepare: bool
) -> RunReport | None:
    base, began = source.parent, time.monotonic()
    checks.read_local(recipe.sets(), base)
    checks.check_reach(recipe, base)
    quiet_libraries()  # before they are imported
    from unlearn import pipeline

    checks.check(recipe, base, hub=not prepare)
    store = pipeline.open_store(recipe, base, folder, pool)
    if prepare:
        pipeline.prepare(recipe, store)
        return None
    report = pipeline.run(recipe, store)
    if report is not None:
        report = pipeline.finish(report, recipe, key, source, folder, store)
        say(f"finished in {time.monotonic() - began:.0f} s", style="bold")
    return report


def _fetch(recipe: Recipe, base: Path) -> None:
    """Have every model that the run reads on this machine, converted."""
    checks.check_reach(recipe, base)
    quiet_libraries()  # before they are imported
    from unlearn.train.vectors import clean_checkpoint, given_places

    locate.locate(recipe.model, base)
    references.fetch(recipe, base)
    references.adapter_place(recipe, base)
    clean_checkpoint(recipe, base)
    given_places(recipe, base)


def _unchanged(folder: RunFolder, key: str) -> RunReport | None:
    """The report of a run that was finished under ``key`` and whose every file is still whole, else None."""
    try:
        sealed = json.loads(folder.path("provenance.json").read_text(encoding="utf-8"))
        text, page = (folder.path(name).read_bytes() for name in ("report.json", "report.html"))
        found = [key, *(hashlib.sha256(file).hexdigest() for file in (text, page))]
        if found != [sealed["key"], sealed["report_sha256"], sealed["page_sha256"]]:
            return None
        report = RunReport.from_json(json.loads(text))
        if not report.provenance.items() <= sealed.items():
            return None
        stages = dict(sealed["stages"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    whole = all(folder.finished(name, stage_key, verify="size") for name, stage_key in stages.items())
    return report if whole else None


def _inputs(recipe: Recipe, base: Path) -> list[Any]:
    """What the recipe's files are now: SHA-256 of data files, size and time of model files. The hub counts by revision,
    and the device not at all: a finished report can be read on a machine without a GPU.
    """
    found: list[Any] = []
    for _, data in recipe.sets():
        for source in (data, data.validation, data.test):
            if source is None or source.path.startswith("hub:"):
                continue
            if (path := source_path(source, base)).is_file():
                found.append([source.path, sha256(path)])
    if recipe.vector.uses("idk_dpo"):
        found.append(refusals(recipe.vector.settings("idk_dpo").refusals, base))
    found += recipe.vector.sources()
    if (template := template_path(recipe.model, base)) is not None:
        found.append(sha256(template))
    clean, given = recipe.vector.clean(), recipe.vector.given()
    named = [recipe.model.path, clean[1] if clean else None]
    named += [given.path, given.base, given.finetuned] if given else []
    for model in named:
        place = locate.find(model.partition("#")[0], base) if model else None
        found.append([] if place is None else references.files_of(place))
    return [*found, *references.state(recipe, base)]
