"""What the key of every stage holds: which change of an input makes which stages anew, and which changes make none."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compared_arena import RECIPE, read, run, write_data, write_recipe, write_rows

from unlearn import pipeline
from unlearn.data.sets import load_sets
from unlearn.evidence import reference as references
from unlearn.model.load import Loaded, numbers
from unlearn.recipe.load import load_recipe, resolved_yaml, tasks_folder
from unlearn.recipe.methods import LoraSpec
from unlearn.recipe.schema import Recipe
from unlearn.score.tasks import build_tasks
from unlearn.store import provenance
from unlearn.store.stages import Store
from unlearn.train.vectors import masks
from unlearn.vector.task_vector import TaskVector

VECTORS = ("vectors/forget", "vectors/near-r")
SCORED = ("eval/*", "benchmark/*", "robustness/*")
TARGET = (*VECTORS, "foresight", "eval/0*", "eval/1*", "export/adapter", "benchmark/target", "benchmark/edited")
TARGET += ("membership/target", "membership/edited", "robustness/target/*", "robustness/edited/*")
REFERENCE = ("eval/reference", "benchmark/reference", "membership/reference", "robustness/reference/*")


class Bench:
    """A finished run with its data and its model, all of which may be changed."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.out = "run"

    def keys(self, *changed: str) -> dict[str, str]:
        """What a run would now look for, by stage. It makes none: a stage is given what the finished run left it."""

        def note(store: Store, name: str, inputs: Sequence[Any], make: object, *, kind: str = "", **_: object) -> Path:
            store.keys[name] = store.key(kind or name, inputs)
            assert store.path(name).is_dir(), f"the finished run has no {name}"
            return store.path(name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "stage", note)
            patch.setattr(pipeline, "render_html", lambda report: "")  # most of the time that is left
            patch.chdir(self.place)
            folder = Path(self.out)
            wanted = resolved_yaml(load_recipe("recipe.yaml", list(changed)).recipe)
            (folder / "resolved.yaml").write_text(wanted, "utf-8")
            (folder / "provenance.json").unlink()
            assert run(Path("recipe.yaml"), folder, *(word for one in changed for word in ("--set", one))) == 0
            found: dict[str, str] = json.loads((folder / "provenance.json").read_text("utf-8"))["stages"]
        return found

    def edit(self, name: str, **more: Any) -> None:
        """Change a JSON file in place."""
        path = self.place / name
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | more), "utf-8")

    def rewrite(self, name: str, old: str, new: str) -> None:
        """Change a text in place."""
        path = self.place / name
        text = path.read_text("utf-8")
        assert old in text
        path.write_text(text.replace(old, new), "utf-8")

    def pack(self, patch: pytest.MonkeyPatch) -> None:
        """A task pack in which a function was changed."""
        shutil.copytree(tasks_folder(), self.place / "eval")
        self.rewrite("eval/unlearn_tasks.py", "MEMORY_TOKENS = 32", "MEMORY_TOKENS = 31")
        patch.setattr(references, "tasks_folder", lambda: self.place / "eval")

    def move(self) -> None:
        """The run's folder gets another name."""
        self.out = "elsewhere"
        (self.place / "run").rename(self.place / self.out)


@pytest.fixture(scope="module")
def whole(compared: Path, pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = Path(shutil.copytree(compared, tmp_path_factory.mktemp("keys") / "bench"))
    shutil.copytree(pico_llama, place / "model")
    write_recipe(place, model={"path": "model"})
    return place


@pytest.fixture
def bench(whole: Path, tmp_path: Path) -> Bench:
    return Bench(Path(shutil.copytree(whole, tmp_path / "bench")))


@pytest.fixture(scope="module")
def before(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The keys when nothing is changed."""
    return Bench(Path(shutil.copytree(whole, tmp_path_factory.mktemp("unchanged") / "bench"))).keys()


Change = Callable[[Bench, pytest.MonkeyPatch], object]


def setting(*changed: str) -> tuple[Change | None, tuple[str, ...]]:
    """A change by the recipe's keys."""
    return None, changed


def done(change: Change, *changed: str) -> tuple[Change | None, tuple[str, ...]]:
    """A change of the surroundings, and of the recipe's keys."""
    return change, changed


def edited(name: str, **more: Any) -> tuple[Change | None, tuple[str, ...]]:
    """A change of a JSON file."""
    return done(lambda bench, _: bench.edit(name, **more))


def answers(name: str) -> tuple[Change | None, tuple[str, ...]]:
    """Other answers in a data file."""
    return done(lambda bench, _: bench.rewrite(name, "In ", "At "))


def reversed_rows(bench: Bench, _: object) -> None:
    path = bench.place / "f.jsonl"
    path.write_text("".join(sorted(path.read_text().splitlines(keepends=True), reverse=True)))


# input -> (how it is changed, by what settings), and the stages that depend on it
UTILITY = ("items", "foresight", "eval/*", "robustness/*/relearn-unrelated")
INPUTS: dict[str, tuple[tuple[Change | None, tuple[str, ...]], tuple[str, ...]]] = {
    # the model, and what is made of it; answers are counted in tokens, the reference's in the target's
    "base: tokenizer": (
        edited("model/tokenizer_config.json", eos_token="a"),
        ("items", "target", "reference", "eval/*"),
    ),
    "base: configuration": (edited("model/config.json", rms_norm_eps=1e-3), ("target", "reference")),
    "base: number format": (setting("model.dtype=bfloat16"), ("target", "reference", *TARGET, *REFERENCE)),
    "target: where texts end": (edited("run/target/generation_config.json", eos_token_id=7), TARGET),
    "target: tokenizer": (
        edited("run/target/tokenizer_config.json", eos_token="a"),
        (*TARGET, "benchmark/reference"),
    ),
    "reference: activation": (edited("run/reference/config.json", hidden_act="gelu"), REFERENCE),
    # data
    "forget set: answers": (
        answers("f.jsonl"),
        ("items", "target", "vectors/forget", "foresight", "eval/*", "membership/*", "robustness/*"),
    ),
    "retain set: answers": (
        answers("r.jsonl"),
        ("items", "target", "reference", "vectors/near-r", "foresight", "eval/*", "robustness/*/few_shot"),
    ),
    "utility set: answers": (answers("u.jsonl"), UTILITY),
    "held-out set: answers": (answers("h.jsonl"), ("items", "membership/*")),
    "benchmark's files: answers": (answers("tofu/world_facts_perturbed.json"), ("benchmark/*",)),
    "utility set: prompt": (setting("utility.0.prompt='Q: {question} A:'"), UTILITY),
    # an item says what a text of that length is compared with
    "forget set: tokens written": (setting("forget.continuation=5"), ("items", "eval/*", "robustness/*/samples")),
    # how it is trained, scored and handed back; a card is in the adapter, and names the taught model by its place
    "training": (setting("vector.forget.learning_rate=0.004"), VECTORS),
    "adapter": (setting("vector.lora.alpha=16"), VECTORS),
    "teaching": (setting("teach.steps=19"), ("target", "reference")),
    "penalty's range": (setting("vector.retain_kl=two_sided"), ("vectors/forget",)),
    "engine": (setting("eval.batch_tokens=300"), SCORED),
    "resamples": (setting("eval.bootstrap=101"), ("eval/*", "benchmark/*")),
    "tokens of the benchmark's answers": (setting("benchmark.max_tokens=5"), ("benchmark/*",)),
    "relearning": (setting("robustness.relearn.learning_rate=0.02"), ("robustness/*/relearn*",)),
    "description": (setting("description=Once more"), ("export/adapter",)),
    "folder": (done(lambda bench, _: bench.move()), ("export/adapter",)),
    # what is around it
    "task pack": (done(lambda bench, patch: bench.pack(patch)), SCORED),
    "a library": (
        done(lambda _, patch: patch.setattr(provenance, "_version", lambda name: "9" * (name == "rouge_score"))),
        ("*",),
    ),
    "a variable": (done(lambda _, patch: patch.setenv("NVIDIA_TF32_OVERRIDE", "1")), ("*",)),
    "default number format": (done(lambda *_: torch.set_default_dtype(torch.float64)), ("*",)),
}


@pytest.fixture
def as_told() -> Any:
    """Torch told what it was told before."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("changed", INPUTS)
@pytest.mark.usefixtures("as_told")
def test_a_stage_s_key_changes_with_its_inputs_and_with_nothing_else(
    changed: str, bench: Bench, before: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (change, settings), patterns = INPUTS[changed]
    if change is not None:
        change(bench, monkeypatch)
    after = bench.keys(*settings)
    assert after.keys() == before.keys()
    expected = {name for name in before if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    assert {name for name in before if after[name] != before[name]} == expected
    assert all(any(fnmatch.fnmatch(name, pattern) for name in before) for pattern in patterns)


@pytest.mark.usefixtures("as_told")
def test_what_is_no_input_changes_no_key(bench: Bench, before: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout and place of files, order of rows, where and beside what it runs, how else it is exported."""
    bench.edit("model/config.json", transformers_version="4.0", _name_or_path="x")
    reversed_rows(bench, None)
    for old, new in (("tofu", "other"), ("model", "moved")):
        (bench.place / old).rename(bench.place / new)
    torch.set_float32_matmul_precision("high")  # which no run uses
    torch.set_num_threads(2)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    exports = "export.dtype=float16", "export.shard_size=1MB"
    places = "benchmark.path=other", "model.path=moved", "reuse=[run]"
    assert bench.keys("cluster={gpus: 2, time: '1:00:00'}", *exports, *places) == before


def test_examples_depend_on_how_much_is_written_of_them(bench: Bench) -> None:
    """Also where nothing is compared by its words, and the answers are shorter than that."""
    one, two = (bench.keys("eval.generate=none", f"utility.0.continuation={tokens}") for tokens in (60, 64))
    assert {name for name in one if one[name] != two[name]} == {"items", "eval/0/test", "eval/1/test"}


MERGED = {
    "number format": "export.dtype=float16",
    "shards": "export.shard_size=1MB",
    "rounding": "export.stochastic_rounding=true",
    "rounding that is accepted": "export.accept_rounding=true",
    "items on which it is read again": "utility.0.prompt='Q: {question} A:'",
    "description": "description=Once more",
}


def test_whole_weights_depend_on_how_they_are_written(bench: Bench) -> None:
    place = bench.place / "run" / "export" / "merged"
    place.mkdir()
    (place / "export.json").write_text('{"coefficient": 1.0}')
    keys = [
        bench.keys("export.merged=true", *more)["export/merged"] for more in ((), *((one,) for one in MERGED.values()))
    ]
    assert len(set(keys)) == len(keys), dict(zip(("nothing", *MERGED), keys, strict=True))


def test_the_finished_run_had_these_keys(whole: Path, before: dict[str, str]) -> None:
    """Another process of another model folder: ``pico:llama`` in the cache."""
    made = json.loads((whole / "run" / "provenance.json").read_text("utf-8"))["stages"]
    assert {name for name in made if made[name] != before[name]} == {"export/adapter"}  # it was given a full path


def test_the_kind_of_device_is_in_every_key() -> None:
    """A GPU begins an adapter with random numbers of its own, and ``dtype: auto`` is another one there."""
    cpu, gpu = (numbers(torch.device(kind)) for kind in ("cpu", "cuda"))
    assert {name for name in cpu if cpu[name] != gpu[name]} == {"device"}
    assert numbers(torch.device("cuda:1")) == gpu


@pytest.mark.parametrize(("dropout", "states", "several"), [(0.0, 0.0, []), (0.1, 0.0, [3]), (0.0, 0.1, [3])])
def test_processes_are_an_input_where_each_draws_masks_of_its_own(
    dropout: float, states: float, several: list[int], phi: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    phi.model.config.resid_pdrop = states
    lora = LoraSpec(dropout=dropout)
    assert masks(phi.model, lora) == []
    monkeypatch.setattr("unlearn.train.vectors.count", lambda: 3)
    assert masks(phi.model, lora) == several


SMALL: dict[str, Any] = {
    key: value for key, value in RECIPE.items() if key in ("forget", "retain", "choose", "eval", "vector")
}
SMALL |= {"name": "small", "model": {"path": "model"}, "sweep": {"coefficients": [1.0]}}


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_a_task_s_digest_is_of_its_items_and_settings_and_not_of_their_place(tmp_path: Path, phi: Loaded) -> None:
    write_data(tmp_path)

    def digest(file: str, folder: str = "items", **settings: Any) -> str:
        task = {"task": "unlearn_qa", "metric": "prob", "whole": True, "metadata": {"items": str(tmp_path / file)}}
        spec = SMALL | {"eval": {"tasks": [task | settings]}}
        recipe = Recipe.model_validate_json(json.dumps(spec))
        sets = load_sets(recipe, tmp_path, phi.tokenizer)
        return build_tasks(sets, "test", recipe, phi.tokenizer, tmp_path / folder).digest()

    rows = [{"prompt": "A?", "target": "b", "target_tokens": 1}, {"prompt": "C?", "target": "d", "target_tokens": 1}]
    write_rows(tmp_path / "one.jsonl", rows)
    write_rows(tmp_path / "two.jsonl", rows)
    first = digest("one.jsonl")
    assert digest("two.jsonl", "elsewhere") == first
    assert digest("one.jsonl", set="forget") != first
    assert digest("one.jsonl", limit=1) != first
    write_rows(tmp_path / "one.jsonl", [rows[0], rows[1] | {"target": "e"}])
    assert digest("one.jsonl") != first


def test_a_finished_run_sees_other_files_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are no data of the recipe: the classifier of texts and items of a task, and the pack itself."""
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    told = {"task": "unlearn_toxicity", "metric": "toxic", "whole": True, "metadata": {"classifier": "judge"}}
    asked = {"task": "unlearn_qa", "metric": "prob", "whole": True, "metadata": {"items": {"qa": "f.jsonl"}}}
    recipe = Recipe.model_validate_json(json.dumps(SMALL | {"eval": {"tasks": [told, asked]}}))
    found = [references.state(recipe, tmp_path)]
    for name in ("judge/config.json", "f.jsonl"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        found.append(references.state(recipe, tmp_path))
    write_data(tmp_path / "env")
    monkeypatch.setenv("UNLEARN_ITEMS", str(tmp_path / "env" / "f.jsonl"))
    found.append(references.state(recipe, tmp_path))
    shutil.copytree(tasks_folder(), tmp_path / "eval")
    monkeypatch.setattr(references, "tasks_folder", lambda: tmp_path / "eval")
    assert references.state(recipe, tmp_path) == found[-1]
    (tmp_path / "eval" / "unlearn_qa.yaml").write_text("")
    found.append(references.state(recipe, tmp_path))
    assert len({json.dumps(one) for one in found}) == len(found)


# --- a model whose texts end otherwise -------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    key: value for key, value in RECIPE.items() if key in ("forget", "retain", "choose", "eval", "vector")
}
SMALL |= {"name": "small", "model": {"path": "model"}, "sweep": {"coefficients": [1.0]}}


@pytest.mark.slow  # that the keys change is shown above
def test_nothing_is_taken_over_from_a_model_with_another_end_token(
    tmp_path: Path, pico_llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither in place nor by ``reuse``: the vector and the scores are those of a run that knows no other."""
    write_data(tmp_path)
    shutil.copytree(pico_llama, tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(SMALL), "utf-8")
    assert run(recipe, tmp_path / "run") == 0
    shutil.copytree(tmp_path / "run", tmp_path / "earlier")
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text("utf-8")) | {"eos_token": "a"}), "utf-8")
    capfd.readouterr()
    assert run(recipe, tmp_path / "run") == 0
    assert "nothing has changed" not in (said := capfd.readouterr().err)
    assert "as before" not in said
    assert run(recipe, tmp_path / "other", "--set", f"reuse=[{tmp_path / 'earlier'}]") == 0
    assert "taken from" not in capfd.readouterr().err
    assert run(recipe, tmp_path / "alone") == 0
    vectors = {
        name: TaskVector.load(tmp_path / name / "vectors" / "forget" / "vector.safetensors")
        for name in ("earlier", "run", "other", "alone")
    }
    assert vectors["run"].digest() == vectors["other"].digest() == vectors["alone"].digest()
    assert vectors["alone"].cosine(vectors["earlier"]) < 0.99
    assert read(tmp_path / "run").scores == read(tmp_path / "other").scores == read(tmp_path / "alone").scores
    assert read(tmp_path / "alone").scores != read(tmp_path / "earlier").scores
