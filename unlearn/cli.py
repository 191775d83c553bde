"""The command ``unlearn``: its subcommands, and the one place where what went wrong becomes a message and an exit code.

Nothing here imports torch before there is work to do, so that ``--help``, ``plan`` and ``schema`` answer at once.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import unlearn
from unlearn import console
from unlearn.errors import UnlearnError
from unlearn.store.files import unwritable
from unlearn.text import duration, one_line, shown
from unlearn.vector.command import app as vector_app
from unlearn.vector.command import apply_command

if TYPE_CHECKING:
    from unlearn.cluster.plan import Grid

EXIT_MISTAKE = 2
EXIT_INTERRUPTED = 130
_ROOT_FLAGS = {"--help", "--version", "--install-completion", "--show-completion"}
_PASSED_ON = {"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []}
_COLOURS = {"done": "green", "running": "cyan", "queued": "blue", "stopped": "yellow", "waiting": "dim"}


class _Commands(TyperGroup):
    """All commands; what they raise and the user can mend is one message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UnlearnError as e:
            console.say(f"error: {e}", style="red")
        except KeyboardInterrupt:
            console.say("\nstopped; what is finished is kept, and the same command goes on from there", style="yellow")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            raise typer.Exit(0) from None
        except Exception as e:
            found = unwritable(e)
            if found is None:
                raise
            console.say(f"error: {found.strerror} ({e}): make room, or choose a disk that can be written", style="red")
        raise typer.Exit(EXIT_MISTAKE)


app = typer.Typer(
    name="unlearn",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make a language model forget: LoRA on a forget set, task vector, theta - coefficient * vector, scored "
    "through lm-eval.",
    epilog="Exit codes: 0 done, 1 the answer is no (run --strict: nothing passed the rule; apply --check: "
    "differences), 2 a mistake to mend, 130 interrupted.",
)

_WORDS = "a recipe, or the name of one that comes with the program; then keys to change (seed=1)"
Words = Annotated[list[str] | None, typer.Argument(metavar="RECIPE [KEY=VALUE]...", help=_WORDS, show_default=False)]
RecipeOption = Annotated[str | None, typer.Option("--recipe", metavar="FILE", help="the recipe, by a flag")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change one key (sweep.coefficients=[1,2])")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; without a subcommand, flags are those of ``run``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = next((word for word in arguments if word not in ("-v", "-q", "--verbose", "--quiet")), "")
    if first.startswith("--") and first.split("=")[0] not in _ROOT_FLAGS:
        arguments.insert(arguments.index(first), "run")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return app(arguments, prog_name="unlearn", standalone_mode=True) or 0
    except SystemExit as e:
        if isinstance(e.__context__, BrokenPipeError):  # whoever read the output has read enough
            return 0
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: Any) -> None:
    """SIGTERM is taken like Ctrl-C, once: locks and temporary folders are cleaned up.

    A batch system sends it to every process, and torchrun to all as soon as the first of them has ended.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"unlearn {unlearn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="also what the libraries say (before the command's name)")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="warnings and errors only")] = False,
) -> None:
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("unlearn").setLevel(level)


@app.command()
def run(
    words: Words = None,
    recipe: RecipeOption = None,
    changes: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="the run's folder (default: runs/<name>-<fingerprint>)")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on")] = False,
    pool: Annotated[
        Path | None,
        typer.Option("--pool", metavar="DIR", help="share taught models and fitted vectors with the runs that name it"),
    ] = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="make only what other runs can share from --pool")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 when no coefficient passes the rule")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="the same as unlearn plan")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="with --dry-run: bytes of every stage")] = False,
    schema: Annotated[bool, typer.Option("--schema", hidden=True)] = False,
    list_: Annotated[bool, typer.Option("--list", hidden=True)] = False,
) -> None:
    """Run a recipe, or go on where an earlier run of it was cut off: unlearn run quickstart seed=1"""
    if schema:
        return print_schema()
    if list_:
        return recipes()
    if memory and not dry_run:
        raise UnlearnError("--memory is a part of the plan: give --dry-run as well")
    if dry_run:
        return plan(words, recipe, changes, memory)
    name, settings = _recipe(words, recipe, changes)
    report = unlearn.run(name, set=settings, out=out, fresh=fresh, pool=pool, prepare=prepare)
    if strict and report is not None and not report.chosen.bound_met:
        raise typer.Exit(1)
    return None


@app.command()
def plan(
    words: Words = None,
    recipe: RecipeOption = None,
    changes: SetOption = None,
    memory: Annotated[bool, typer.Option("--memory", help="also the bytes that every stage holds, at most")] = False,
) -> None:
    """Check everything about a recipe, print what a run would do, and run nothing."""
    from unlearn.data.chat import unused_template
    from unlearn.model.locate import has_chat_template
    from unlearn.plan.words import plan as text_of
    from unlearn.recipe.load import load_recipe

    loaded = load_recipe(*_recipe(words, recipe, changes))
    typer.echo(text_of(loaded))
    if (note := unused_template(loaded.recipe)) and has_chat_template(loaded.recipe.model, loaded.source.parent):
        console.say(note, style="yellow")
    if memory:
        console.quiet_libraries()  # before they are imported
        from unlearn.plan.memory import memory as bytes_of

        typer.echo(bytes_of(loaded))


def _recipe(words: list[str] | None, recipe: str | None, changes: list[str] | None) -> tuple[str, list[str]]:
    """The recipe and its changed keys, from the words and the flags of a command line."""
    given = list(words or ())
    name = recipe if recipe is not None else given.pop(0) if given else None
    if not name:
        raise UnlearnError("which recipe? Give a FILE, or see unlearn recipes for those that come with the program")
    for word in given:
        if "=" not in word:
            raise UnlearnError(f"{word!r} is no KEY=VALUE: a run has one recipe, here {name}, and changes of its keys")
    return name, [*(changes or ()), *given]


_SCORED = "a folder, hub id or .gguf file; or the folder of an adapter on the recipe's model"


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=_SCORED, show_default=False)],
    words: Words = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="DIR", help="an adapter of PEFT's to merge into it: a folder or hub id")
    ] = None,
    recipe: RecipeOption = None,
    changes: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="the report's folder (default: as of a run)")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 when a kept score is out of its bound")] = False,
) -> None:
    """Score any model, edited by anyone, by a recipe's sets, benchmark and attacks: unlearn eval MODEL mine.yaml

    The recipe's own model (taught, if the recipe teaches it) is scored beside it, as the one before.
    """
    name, settings = _recipe(words, recipe, changes)
    alone = adapter is None and (Path(model) / "adapter_config.json").is_file()
    given = {"edited.model": None if alone else model, "edited.adapter": model if alone else adapter}
    settings += [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    try:
        if not any(word.startswith("name=") for word in settings):
            from unlearn.recipe.load import load_recipe

            told_by = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(adapter or model).name)
            settings.append(f"name={load_recipe(name, settings).recipe.name}-{told_by}")
        report = unlearn.run(name, set=settings, out=out, fresh=fresh)
    except UnlearnError as error:  # in the words of this command
        said = re.sub(r"(--set |(?<![\w/.-]))edited\.model\b", "MODEL", str(error))
        ours = "MODEL" if alone else "--adapter"
        raise type(error)(re.sub(r"(--set |(?<![\w/.-]))edited\.adapter\b", ours, said)) from error
    if strict and report is not None and not report.chosen.bound_met:
        raise typer.Exit(1)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from unlearn.recipe.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def recipes() -> None:
    """List the recipes that come with the program."""
    from unlearn.recipe.load import list_recipes

    for name, description in list_recipes():
        typer.echo(f"{name:24}{description}")


@app.command()
def tasks(
    word: Annotated[str, typer.Argument(help="only names that hold this word", show_default=False)] = "",
    path: Annotated[bool, typer.Option("--path", help="print the pack's folder, for lm_eval --include_path")] = False,
) -> None:
    """List tasks for eval.tasks: those of the pack, and of lm-eval's own those that hold a word."""
    from unlearn.recipe.evaluation import shipped_tasks, task_files, task_names
    from unlearn.recipe.load import tasks_folder

    if path:
        return typer.echo(tasks_folder())
    pack = set(task_names(task_files(tasks_folder())))
    others = set(task_names(task_files(shipped_tasks()))) if word else set()
    for name in sorted(name for name in pack | others if word in name):
        typer.echo(f"{name:48}{'pack' if name in pack else 'lm-eval'}")
    if not word:
        console.say("lm-eval's own tasks are listed with a word that their names hold: unlearn tasks mmlu", style="dim")
    return None


@app.command(context_settings=_PASSED_ON, add_help_option=False)
def harness(words: Annotated[list[str] | None, typer.Argument(hidden=True)] = None) -> None:
    """Run lm-eval's own command line with the fast engine in it: unlearn harness --model unlearn --tasks ..."""
    from unlearn.score.harness import main as lm_eval

    lm_eval(words or [])


@app.command()
def push(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="the folder of a finished run")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="the repository, made if there is none")],
    merged: Annotated[bool, typer.Option("--merged", help="the merged weights instead of the adapter")] = False,
    public: Annotated[bool, typer.Option("--public", help="a new repository is public")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and push nothing")] = False,
) -> None:
    """Upload what a run exported to the model hub, with the token in HF_TOKEN."""
    from pydantic import ValidationError

    from unlearn.recipe.evaluation import PushSpec
    from unlearn.report.publish import push as upload

    what: Literal["adapter", "merged"] = "merged" if merged else "adapter"
    try:
        spec = PushSpec(repo=repo, what=what, private=not public, dry_run=dry_run)
    except ValidationError as e:
        raise UnlearnError(f"{repo!r} is no OWNER/NAME on the hub: {e.errors()[0]['msg']}") from e
    upload(run_folder / "export" / what, spec)


_REFERENCE = (
    "the retain reference: a run that has one, a log of TOFU, open-unlearning's TOFU_EVAL.json or MUSE_EVAL.json, or "
    "published (MUSE's authors' value); the run's own when not given"
)


@app.command()
def leaderboard(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]... [FILE.json]...",
            help="the folder of a run whose recipe has a benchmark; and files whose figures stand beside: "
            "open-unlearning's TOFU_EVAL.json, TOFU_SUMMARY.json, MUSE_..., a log of TOFU's authors",
        ),
    ] = None,
    tofu_log: Annotated[
        Path | None, typer.Option(metavar="LOG.json", help="a log of TOFU, or TOFU_EVAL.json: prints its row as JSON")
    ] = None,
    reference: Annotated[str | None, typer.Option(metavar="RUN|LOG.json", help=_REFERENCE)] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write the files of leaderboards there")] = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help="the method's name in them (default: the run's name)")
    ] = None,
    submitted_by: Annotated[str, typer.Option(metavar="NAME", help="who submits (TOFU's column)")] = "",
) -> None:
    """Print rows of TOFU and MUSE, from the per-item files of runs and from what others' evaluations wrote."""
    from unlearn.evidence.boards import print_rows

    print_rows(runs or [], tofu_log, reference, out, method, submitted_by)


# -- many runs, on a Slurm cluster or on this machine


@app.command()
def submit(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE", help="recipes, and keys to change (seed=1); or a grid's folder")
    ],
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V", help="one axis (seed=0,1,2); several are multiplied")
    ] = None,
    changes: SetOption = None,
    out: Annotated[Path | None, typer.Option(help="the grid's folder (default: grids/<name>-<fingerprint>)")] = None,
    local: Annotated[bool, typer.Option("--local", help="run on this machine, a GPU for each job if any")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="with --local: so many jobs at a time")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check and list every job; write nothing")] = False,
    again: Annotated[
        str | None, typer.Option("--resubmit", metavar="WHAT", help="of a grid: failed (or lost), lost, or all-missing")
    ] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="of a grid's folder: take it out of the queue")] = False,
) -> None:
    """Run every recipe with every setting, as jobs of a Slurm cluster or here; the same again submits what is missing.

    unlearn submit quickstart --grid seed=0,1,2 --grid vector.lora.rank=8,16 --set cluster.time=4:00:00

    Exit codes: 0 submitted, or done (--local); 1 a job did not end well (--local), or something cannot be stopped from
    here (--cancel); 2 a mistake; 130 stopped.
    """
    from unlearn.cluster import job as jobs_of
    from unlearn.cluster.plan import Grid, plan_grid, recluster

    sets, axes = list(changes or ()), list(grid or ())
    if again is not None or cancel:
        if len(recipes) != 1 or axes or out or dry_run or (cancel and (again or sets)):
            raise UnlearnError("--resubmit WHAT and --cancel each take the grid's folder, and nothing else")
        root = Path(recipes[0]).absolute()
        planned = Grid.load(root)
        if cancel:
            raise typer.Exit(1 if jobs_of.cancel(root) else 0)
        if again not in jobs_of.AGAIN:
            raise UnlearnError(f"--resubmit {again}: write one of {', '.join(jobs_of.AGAIN)}, then the grid's folder")
        planned = recluster(planned, sets)
        local = local or jobs_of.was_local(root)
    else:
        sets += [word for word in recipes if "=" in word]
        planned = plan_grid([word for word in recipes if "=" not in word], axes, sets)
        root = (out or Path("grids") / f"{planned.name}-{planned.identity()[:8]}").absolute()
    if dry_run:
        _print_plan(planned, root, local, jobs)
        return
    if not local:
        jobs_of.check_slurm(planned.cluster, sets)
    code = jobs_of.submit(root, planned, "all-missing" if again is None else again, local, jobs)
    if local:
        console.say(f"{root}: {jobs_of.overview(root).totals()}; unlearn compare {root}", style="bold")
    raise typer.Exit(code)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="the grid's folder")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """How the jobs of a grid stand: done, running, queued, failed (with the last line), lost."""
    from unlearn.cluster import job as jobs_of

    found = jobs_of.overview(folder.absolute())
    if as_json:
        plain = {"schema": 2, "grid": found.grid.name, "folder": str(found.root), "unasked": found.unasked}
        plain |= {what: [asdict(row) for row in getattr(found, what)] for what in ("jobs", "preparations")}
        typer.echo(json.dumps(plain, indent=2))
        return
    table = _table("job", "state", "try", "time", "")
    for row in (*found.preparations, *found.jobs):
        since = row.seconds
        if row.state == "running" and row.since is not None:
            since = max(0.0, (datetime.now(UTC) - datetime.fromisoformat(row.since)).total_seconds())
        error = (row.error or "").strip().splitlines()
        table.add_row(
            *(row.name, Text(row.state, _COLOURS.get(row.state, "red")), str(row.attempt or "")),
            *("" if since is None else duration(since), Text(one_line(shown(error[-1] if error else row.where or "")))),
        )
    out = console.results()
    out.print(table, "", Text(found.totals(), "bold"), sep="\n")
    if found.unasked is not None:
        out.print(Text(shown(f"! Slurm cannot be asked ({found.unasked}): this is the last that was heard"), "yellow"))
    for states, what in (({"failed", "lost", "blocked"}, "failed"), ({"stopped", "waiting"}, "all-missing")):
        if any(row.state in states for row in found.jobs):
            out.print(Text(f"again: unlearn submit --resubmit {what} {found.root}", "dim"), soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="folders of runs, or of grids")],
    out: Annotated[
        Path | None, typer.Option(help="where the files go (default: the grid's folder if it is one, else compare)")
    ] = None,
) -> None:
    """Finished runs side by side: settings averaged over seeds, the Pareto set, compare.csv, report.json, report.html.

    Exit codes: 0 done, 1 no run has finished yet, 2 a mistake.
    """
    from unlearn.cluster.compare import compare as write
    from unlearn.cluster.plan import GRID_FILE

    alone = len(runs) == 1 and (runs[0] / GRID_FILE).is_file()
    place = (out or (runs[0] if alone else Path("compare"))).absolute()
    found, missing = write([run.absolute() for run in runs], place)
    terminal = console.results()
    for family in found:
        table = _table("setting", "runs", "λ", f"{family.goal} before", "after", "memory", "kept", "bound met", "")
        for n, setting in enumerate(family.settings):
            table.add_row(*map(one_line, (setting.label, *setting.cells(), family.marks(n))))
        terminal.print(*([f"\n{one_line(family.question)}"] if family.question else []), table, sep="\n")
        for remark in family.remarks:
            console.say(one_line(remark))
    for line in missing:
        console.say(f"! {line}", style="yellow")
    console.say(f"report: {place / 'report.html'}" if found else "no run has finished: there is nothing to compare")
    raise typer.Exit(0 if found else 1)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _print_plan(grid: Grid, root: Path, local: bool, at_once: int | None) -> None:
    from unlearn.cluster import job as jobs_of

    lines = [f"grid      {grid.name}, in {root}", *(f"recipe    {recipe.source}" for recipe in grid.recipes)]
    if local:
        lines.append(f"here      {len(jobs_of.slots(grid.cluster, at_once))} at a time, without Slurm")
    else:
        asked = jobs_of.slurm_parameters(grid.cluster, "", grid.cwd, len(grid.jobs))
        lines += [f"Slurm     {k.removeprefix('slurm_')}: {v}" for k, v in asked.items() if v not in (None, "")]
    for job in grid.preparations:
        lines.append(f"first     {job.name}, for {sum(one.after == job.name for one in grid.jobs)} jobs")
    for job in grid.jobs:
        settings = ", ".join(f"{key}={value}" for key, value in job.settings.items())
        lines.append(f"job       {job.name}  {settings}{f'  after {job.after}' if job.after else ''}")
    lines.append(f"{len(grid.jobs)} jobs, {len(grid.preparations)} preparations; nothing was written")
    typer.echo("\n".join(map(one_line, lines)))


app.add_typer(vector_app, name="vector")
app.command("apply")(apply_command)

if __name__ == "__main__":
    sys.exit(main())
