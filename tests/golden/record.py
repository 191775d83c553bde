"""What whole runs found when the golden files were made: ``python tests/golden/record.py`` writes them anew.

Every case is one run of the command line. Kept are the report without times, places and machine, the names of the
stages and the page's headings: nothing that depends on how the code is laid out.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from unlearn import cli

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

PICO = "model.path=pico:phi"
CASES: dict[str, tuple[str, ...]] = {
    "smoke": ("pico_smoke.yaml",),
    "bisect": ("pico_smoke.yaml", "sweep.search=bisect", "sweep.coefficients=[0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4]"),
    "requests": ("requests.yaml", PICO, "choose.keep=0", "choose.collapse=50"),
    "addition": ("addition.yaml", PICO, "choose.keep=0", "choose.collapse=50"),
    "analogy": ("analogy.yaml", PICO, "choose.keep=0", "choose.collapse=50"),
    "everything": ("recipe.yaml",),
}
REAL = {"quickstart-0": ("quickstart.yaml",)}


def found(name: str, folder: Path) -> dict[str, Any]:
    """Run a case in a folder and return what is kept of it."""
    recipe, *changes = {**CASES, **REAL}[name]
    if name == "everything":
        from compared_arena import write_data, write_recipe

        write_data(folder)
        recipe = str(write_recipe(folder))
    changed = [part for change in changes for part in ("--set", change)]
    if code := cli.main(["--recipe", recipe, "--out", str(folder / "run"), *changed]):
        raise RuntimeError(f"{name}: exit code {code}")
    return kept(folder / "run")


def kept(run: Path) -> dict[str, Any]:
    """What of a run folder must stay the same."""
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for key in ("provenance", "seconds", "warnings", "examples"):
        report.pop(key)
    for line in report["training"]:
        line.pop("seconds")
    report["exports"] = sorted(report["exports"])
    report["data"] = [{k: v for k, v in entry.items() if k != "path"} for entry in report["data"]]
    stages = json.loads((run / "provenance.json").read_text(encoding="utf-8"))["stages"]
    page = (run / "report.html").read_text(encoding="utf-8")
    headings = [re.sub(r"<[^>]+>", "", text) for text in re.findall(r"<h[1-3][^>]*>(.*?)</h[1-3]>", page, re.DOTALL)]
    # named by a vector's digest, which is of the processor's bits
    stages = sorted(re.sub(r"^joint/[0-9a-f]{16}/", "joint/VECTOR/", name) for name in stages)
    return {"report": report, "stages": stages, "headings": headings}


def main(names: list[str]) -> None:
    for name in names or [*CASES, *REAL]:
        with tempfile.TemporaryDirectory() as folder:
            text = json.dumps(found(name, Path(folder)), indent=0, sort_keys=True)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
