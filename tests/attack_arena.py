"""What the tests of the attacks share: forget sets of each kind on a pico model, and the judge of their items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import capital_rows
from unlearn.data.sets import LoadedSet, load_sets
from unlearn.evidence.judge import Judge
from unlearn.model.load import Loaded
from unlearn.model.pico import corpus
from unlearn.recipe.schema import Recipe

KINDS = ("mcq", "qa", "text")


class Arena:
    """A recipe with its data and a model.

    Args:
        loaded: The model.
        folder: For data and items.
        kind: Of the forget set.
        recipe: More keys of the recipe; those of ``forget`` go into the forget set.
    """

    def __init__(self, loaded: Loaded, folder: Path, kind: str, **recipe: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "near.jsonl").write_text("".join(json.dumps(row) + "\n" for row in capital_rows()[:12]), "utf-8")
        (folder / "far.jsonl").write_text("".join(json.dumps(row) + "\n" for row in capital_rows()[12:]), "utf-8")
        lines = corpus()
        passages = [{"text": " ".join(lines[i : i + 4])} for i in range(0, 48, 4)]
        (folder / "passages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages), "utf-8")
        sources: dict[str, dict[str, Any]] = {
            "mcq": {"path": "near.jsonl", "kind": "mcq", "columns": {"answer": "correct"}},
            "qa": {"path": "near.jsonl", "kind": "qa", "continuation": 6},
            "text": {"path": "passages.jsonl", "kind": "text", "length": 40, "prefix": 8, "continuation": 6},
        }
        forget = sources[kind] | recipe.pop("forget", {})
        retain = {"path": "far.jsonl", "kind": "qa", "name": "far"}
        self.recipe = Recipe.model_validate(
            {"name": "arena", "model": {"path": "pico:phi"}, "forget": forget, "retain": [retain], **recipe},
            strict=False,
        )
        self.loaded = loaded
        self.model: Any = loaded.model
        self.tokenizer: Any = loaded.tokenizer
        self.folder = folder
        self.sets = load_sets(self.recipe, folder, self.tokenizer)
        self.forget: LoadedSet = self.sets[0]

    def judge(self) -> Judge:
        """Of the test items."""
        return Judge(self.forget, self.forget.test, self.tokenizer, self.folder / "items", self.recipe)
