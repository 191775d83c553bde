"""Names of tasks in lm-eval's files, without importing it: its own index of 14,000 tasks takes ten seconds."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from unlearn.errors import EvaluationError

# A line of lm-eval's YAML that gives a task, group or tag its name, alone or as an item of a list.
_NAMED = re.compile(
    rb"""^[ \t]*(?:-[ \t]*)?["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s#"'\[\]{}|>]+)""", re.MULTILINE
)
_LISTED = re.compile(rb"""(?:^[ \t]*-[ \t]*|[\[,][ \t]*)["']?([^\s#"'\[\]{},:]+)["']?[ \t]*(?:#.*)?(?=$|[\],])""", re.M)

_INCLUDED = re.compile(rb"""^include:[ \t]*["']?(\.\.[^\s"'#]+)""", re.MULTILINE)


def shipped_tasks() -> Path | None:
    """The folder of the tasks that come with lm-eval."""
    found = importlib.util.find_spec("lm_eval")
    return Path((found.submodule_search_locations or [""])[0]) / "tasks" if found is not None else None


def task_files(folder: Path | None) -> list[str]:
    """The YAML files below a folder, and what they include, which has no ending there."""
    walked = ((at, name) for at, _, names in os.walk(folder or "/nowhere") for name in names)
    return [f"{at}/{name}" for at, name in walked if name.endswith(".yaml") or "." not in name]


def task_names(files: Iterable[str]) -> Iterator[str]:
    """What the files call their tasks, groups and tags."""
    for path in files:
        yield from (name.decode(errors="replace") for name in _NAMED.findall(Path(path).read_bytes()))


def has_task(files: Sequence[str], name: str) -> bool:
    """Whether one of the files is called so or names such a task; those of its family are looked at first."""
    if any(path.endswith(f"/{name}.yaml") for path in files):
        return True
    family, wanted = name.partition("_")[0], name.encode()
    for path in sorted(files, key=lambda path: (family not in path, len(path))):
        content = Path(path).read_bytes()
        if wanted in content and any(wanted in pattern.findall(content) for pattern in (_NAMED, _LISTED)):
            return True
    return False


def families(folder: Path, names: Iterable[str]) -> set[Path]:
    """The folders right below ``folder`` that mention one of the names, which may have wildcards (``mmlu_*``).

    And those with files that include one of theirs: they may have a tag from there.
    """
    words = "|".join(re.escape(name).replace(r"\*", r"[\w.-]*").replace(r"\?", r"[\w.-]") for name in names)
    mention = re.compile(rf"(?<![\w.-])(?:{words})(?![\w.-])".encode())
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


def no_such_task(name: str, known: Iterable[str]) -> EvaluationError:
    """The message about a name in ``eval.tasks`` that is none of those known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names[:8])}, ..."
    return EvaluationError(f"eval.tasks: lm-eval has no task {name!r}; {hint}")
