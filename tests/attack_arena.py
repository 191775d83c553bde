"""What the tests of the attacks share: forget sets of each kind on a pico model, and the judge of their items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compared_arena import write_rows
from facts import capital_rows

from unlearn.data.encoding import Encoded, encode
from unlearn.data.sets import LoadedSet, load_sets
from unlearn.evidence.attacks import Judge, Scene
from unlearn.evidence.attacks_weights import edited_copy, relearn
from unlearn.model.load import Loaded
from unlearn.model.pico import corpus
from unlearn.recipe.evaluation import RelearnSpec
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
        write_rows(folder / "near.jsonl", capital_rows()[:12])
        write_rows(folder / "far.jsonl", capital_rows()[12:])
        lines = corpus()
        write_rows(folder / "passages.jsonl", [{"text": " ".join(lines[i : i + 4])} for i in range(0, 48, 4)])
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

    def scene(self, **spec: Any) -> Scene:
        """The target under an attack with these settings."""
        asked = Recipe.model_validate({**self.recipe.model_dump(), "robustness": spec}, strict=False).robustness
        assert asked is not None
        return Scene("target", self.model, self.judge(), asked, self.sets, (), self.folder)

    def rows(self, items: Any) -> list[Encoded]:
        """Items to train on."""
        return encode(items, self.forget.spec.kind, self.tokenizer, 512)

    def taught(self, items: Any, steps: int = 25) -> Any:
        """A model that knows some items well."""
        spec, model = RelearnSpec(steps=(steps,), learning_rate=1e-2), edited_copy(self.model, None, 0.0)
        relearn(model, self.tokenizer, self.rows(items), spec, 0, self.judge())
        return model
