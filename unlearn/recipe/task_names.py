"""Names of tasks in lm-eval's files, without importing it: its own index of 14,000 tasks takes ten seconds."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from unlearn.errors import EvaluationError
from unlearn.text import did_you_mean

# A line of lm-eval's YAML that gives a task, group or tag its name, alone or as an item of a list.
_NAMED = re.compile(
    rb"""^[ \t]*(?:-[ \t]*)?["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s#"'\[\]{}|>]+)""", re.MULTILINE
)
_INCLUDED = re.compile(rb"""^include:[ \t]*["']?(\.\.[^\s"'#]+)""", re.MULTILINE)


def shipped_tasks() -> Path:
    """The folder of the tasks that come with lm-eval."""
    found = importlib.util.find_spec("lm_eval")
    return Path((found.submodule_search_locations or [""])[0] if found is not None else "/nowhere") / "tasks"


def task_files(folder: Path) -> list[str]:
    """The YAML files below a folder, and what they include, which has no ending there."""
    walked = ((at, name) for at, _, names in os.walk(folder) for name in names)
    return [f"{at}/{name}" for at, name in walked if name.endswith(".yaml") or "." not in name]


def task_names(files: Iterable[str]) -> Iterator[str]:
    """What the files call their tasks, groups and tags."""
    for path in files:
        yield from (name.decode(errors="replace") for name in _NAMED.findall(Path(path).read_bytes()))


def unheard_of(files: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the names that no file mentions or is called by."""
    missing = {name: _mention([name]) for name in names}
    for path in map(Path, files):
        if not missing:
            break
        content = path.read_bytes()
        missing = {name: word for name, word in missing.items() if name != path.stem and not word.search(content)}
    return list(missing)


def families(folder: Path, names: Iterable[str]) -> set[Path]:
    """The folders right below ``folder`` that mention one of the names, which may have wildcards (``mmlu_*``).

    And those with files that include one of theirs: they may have a tag from there.
    """
    mention = _mention(names)
    found: set[Path] = set()
    including: set[tuple[Path, Path]] = set()
    for path in map(Path, task_files(folder)):
        family, content = folder / path.relative_to(folder).parts[0], path.read_bytes()
        if family not in found and mention.search(content):
            found.add(family)
        for included in _INCLUDED.findall(content):
            parts = Path(os.path.relpath(path.parent / included.decode(errors="replace"), folder)).parts
            including.add((family, folder / parts[0]))
    while more := {family for family, source in including if source in found} - found:
        found |= more
    return found


def _mention(names: Iterable[str]) -> re.Pattern[bytes]:
    words = "|".join(re.escape(name).replace(r"\*", r"[\w.-]*").replace(r"\?", r"[\w.-]") for name in names)
    return re.compile(rf"(?<![\w.-])(?:{words})(?![\w.-])".encode())


def no_such_task(name: str, known: Iterable[str]) -> EvaluationError:
    """The message about a name in ``eval.tasks`` that is none of those known."""
    names = sorted(known)
    guess = did_you_mean(name, names, 3) or f"; there are {', '.join(names[:8])}, ..."
    return EvaluationError(f"eval.tasks: lm-eval has no task {name!r}{guess}")
