"""Execute docs/notebook.ipynb, cell by cell, with the quickstart's model in place of its hub id."""

import json
import os
import tempfile
from pathlib import Path

import matplotlib

from unlearn.model.locate import locate
from unlearn.recipe.load import load_recipe

matplotlib.use("agg")
recipe = load_recipe("quickstart.yaml")
notebook = json.loads(Path("docs/notebook.ipynb").read_text(encoding="utf-8"))
code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
model = locate(recipe.recipe.model, recipe.source.parent)
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, text in enumerate(code):
        exec(compile(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", model), f"cell {number}", "exec"), names)
    before, after = names["before"], names["after"]
    print(names["best"], before, after)
    assert after["forget"] < before["forget"] - 1, "it has not forgotten"
    assert Path("without-europe/adapter_model.safetensors").is_file()
