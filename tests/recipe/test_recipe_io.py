"""Reading recipes: each kind of mistake, at its line, in words; and nothing but RecipeError whatever the input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unlearn.errors import RecipeError
from unlearn.recipe import load as assets
from unlearn.recipe import yaml as yaml_core
from unlearn.recipe.data import ALSO, Frozen, Source, render, stops, template_fields
from unlearn.recipe.load import json_schema, list_recipes, load_recipe, resolved_yaml
from unlearn.recipe.methods import METHODS, LowRankSpec, Method, TrainSpec, trainer_settings
from unlearn.recipe.schema import Recipe
from unlearn.store.files import fingerprint

GOOD = """\
name: tiny
description: |
  First line.
  Second line.
model: {path: pico:phi}
forget:
  path: forget.jsonl
  kind: qa
  prompt: "Q: {question}\\nA:"
retain:
  - path: near.jsonl
    kind: mcq
  - path: far.jsonl
    kind: text
vector:
  forget:
    learning_rate: 1e-4
    steps: 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and an installation with one packaged recipe."""
    package = tmp_path / "site" / "unlearn"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "quickstart.yaml").write_text(GOOD)
    monkeypatch.setattr(assets, "_PACKAGE", package)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(folder: Path, text: str, name: str = "r.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return name


def fails(name: str, *overrides: str) -> list[str]:
    """The messages of a refused recipe, one per mistake."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    lines = str(caught.value).split("\n  ")
    if len(lines) > 1:
        assert lines[0] == f"{len(lines) - 1} mistakes in the recipe:"
        lines = lines[1:]
    return lines


def with_line(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


def test_a_good_recipe(here: Path) -> None:
    loaded = load_recipe(write(here, GOOD))
    assert loaded.recipe.vector.forget.learning_rate == 1e-4
    assert [d.path for d in loaded.recipe.retain] == ["near.jsonl", "far.jsonl"]
    assert (loaded.source, loaded.text) == (here / "r.yaml", GOOD)
    (here / "windows.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe("windows.yaml").recipe == loaded.recipe


def test_paths_on_the_command_line_count_from_where_one_stands(here: Path) -> None:
    """Every key that names a file or a folder; what is not there is left as it stands, for the recipe's folder."""
    (here / "elsewhere").mkdir()
    recipe = write(here / "elsewhere", GOOD)
    for name in ("mine.jsonl", "template.jinja", "never.txt", "auto"):
        (here / name).write_text("")
    (here / "old").mkdir()
    given = {
        "forget.path": "mine.jsonl",
        "model.chat_template": "template.jinja",
        "vector.method": "idk_dpo",
        "vector.idk_dpo.refusals": "never.txt",
        "reuse": "[old, gone]",
    }
    loaded = load_recipe(f"elsewhere/{recipe}", [f"{key}={value}" for key, value in given.items()]).recipe
    assert loaded.forget is not None
    assert loaded.forget.path == str(here / "mine.jsonl")
    assert loaded.model.chat_template == str(here / "template.jinja")
    assert loaded.vector.settings("idk_dpo").refusals == str(here / "never.txt")
    assert loaded.reuse == (str(here / "old"), "gone")
    assert load_recipe(f"elsewhere/{recipe}", ["retain.0.path=mine.jsonl"]).recipe.retain[0].path == str(
        here / "mine.jsonl"
    )


STEPS, TEXT, VECTOR = "steps: 3", "    kind: text", "vector:"  # lines after which a table's row adds one
TRAINER, LORA = STEPS + "\n    trainer: ", "vector:\n  lora: "
MISTAKES: list[tuple[str, str, int, str]] = [  # what to replace in GOOD, by what, and line and words of the message
    ("    learning_rate:", "    learning_rte:", 17, "forget.learning_rte: unknown key; did you mean 'learning_rate'"),
    ("name: tiny", "name: tiny\nlearning_rate: 1", 2, "it belongs at teach.learning_rate or vector."),
    ("name: tiny", "name: tiny\nzzz: 1", 2, "zzz: unknown key (allowed here: name, description"),
    ("name: tiny", "name: tiny\nseed: 1.0", 2, "seed: must be a whole number, got 1.0"),
    ("name: tiny", "name: tiny\nseed: -1", 2, "seed: must be greater than or equal to 0, got -1"),
    ("name: tiny", "name: 2024", 1, "name: must be text, got 2024"),
    ("name: tiny", "name: a b", 1, "got the text 'a b' (The run folder's: letters, digits, ., _ and -.)"),
    ("1e-4", '"1e-4"', 17, "learning_rate: must be a number, got the text '1e-4'"),
    ("1e-4", ".nan", 17, "learning_rate: must be a finite number, got NaN"),
    ("1e-4", "1e999", 17, "got Infinity"),
    (STEPS, "gradient_checkpointing: on", 18, "must be true or false, got the text 'on'"),
    (STEPS, "report_to: wandb", 18, "report_to: must be a list, got the text 'wandb'"),
    (STEPS, "schedule: cosin", 18, "be 'linear', 'cosine' or 'constant_with_warmup', got the text 'cosin'; did"),
    (STEPS, "steps: 3\n    epochs: 2", 19, "vector.forget: give epochs or steps, not both"),
    ("path: pico:phi", "path: pico:phi, device: gpu", 5, "got the text 'gpu' (auto, cpu, cuda, cuda:1 or mps."),
    ("path: pico:phi", "path: ", 5, "model.path: must be text, got nothing (the key has no value)"),
    ("{path: pico:phi}", "pico:phi", 5, "model: must be a mapping, got the text 'pico:phi'"),
    ("kind: mcq", "kind: mqc", 12, "must be 'text', 'qa' or 'mcq', got the text 'mqc'; did you mean 'mcq'?"),
    (TEXT, TEXT + "\n    shares: {train: 1.5}", 15, "must be less than or equal to 1 or be 'all', got 1.5"),
    (TEXT, TEXT + "\n    shares: {train: 0.9}", 15, "shares add up to 1.4; they must not"),
    (TEXT, TEXT + "\n    prefix: 300", 15, "prefix (300) must be shorter than length (256)"),
    (TEXT, TEXT + "\n    where: {c: [1, {a: 2}]}", 15, "where.c.1: must be true or false or be a whole number or be a"),
    (TEXT, TEXT + "\n    where: {c: {a: 2}}", 15, "where.c.a: unknown key here; it belongs at"),
    (TEXT, TEXT + "\n    prompt: 3", 15, "prompt: must be text or be a list or be a mapping, got 3"),
    (TEXT, TEXT + "\n    prompt: [a, 3]", 15, "retain.1.prompt.1: must be text, got 3"),
    (TEXT, TEXT + "\n    prompt: []", 15, "prompt: the list is empty"),
    (TEXT, TEXT + "\n    prompt: {train: a, validation: b}", 15, "prompt.test: this key is required: Template of"),
    (VECTOR, "sweep: {coefficients: []}\nvector:", 15, "have at least 1 item after validation, not 0, got"),
    (VECTOR, "sweep: {coefficients: [1, 1]}\nvector:", 15, "sweep.coefficients: a coefficient is given twice"),
    (VECTOR, "export: {shard_size: 5}\nvector:", 15, "shard_size: must be text, got 5"),
    ("near.jsonl", "far.jsonl", 10, "two retain sets are called 'far': give them names"),
    ("name: tiny\n", "", 1, "name: this key is required: The run folder's"),
    ("    kind: mcq\n", "", 11, "retain.0.kind: this key is required"),
    ("name: tiny", "nam: tiny", 1, "nam: unknown key; did you mean 'name'?"),
    ("name: tiny", "name: tiny\nname: other", 2, "name: given twice: on line 1 and again here"),
    ("kind: qa", 'kind: qa\n  "path": x', 9, "forget.path: given twice: on line 7 and again here"),
    ("kind: qa", "kind: qa\n  <<: {limit: 3}", 9, "merge keys (<<) are not part of YAML 1.2"),
    ("kind: qa", "kind: qa\n  ? [a]\n  : 3", 9, "a key must be plain text"),
    ("tiny", "!!int x", 1, "name: 'x' is no int"),
    # what is passed on, and familiar names
    (STEPS, TRAINER + "{optimm: sgd}", 19, "optimm: transformers' TrainingArguments have no such setting; did"),
    (STEPS, TRAINER + "\n      optim: sgd\n      seed: 1", 21, "seed: not for a recipe to set: seed at the top"),
    (STEPS, TRAINER + "{save_steps: 1}", 19, "trainer.save_steps: this is the key save_every beside trainer"),
    (STEPS, TRAINER + "{learning_rate: 1}", 19, "this is the key learning_rate beside trainer"),
    (STEPS, TRAINER + "{output_dir: x}", 19, "save_every says how often one is written"),
    (STEPS, TRAINER + "{report_to: none}", 19, "report_to at the top of the recipe says where"),
    (STEPS, TRAINER + "{hub_token: x}", 19, "export.push_to_hub decides"),
    (STEPS, TRAINER + "{label_smoothing_factor: 0.1}", 19, "another loss than the one that vector.method"),
    (STEPS, STEPS + "\n    max_grad_norm: 1", 19, "it belongs at vector.forget.trainer.max_grad_norm"),
    (STEPS, STEPS + "\n    report_to: [wandb]", 19, "report_to serves all trainings: give it at the top of the recipe"),
    (STEPS, STEPS + "\n    max_steps: 3", 19, "forget.max_steps: the same as steps, which is given too: keep one"),
    (STEPS, "max_steps: 0", 18, "vector.forget.max_steps: must be greater than or equal to 1, got 0"),
    (STEPS, "max_step: 3", 18, "unknown key; did you mean 'max_steps'"),
    (VECTOR, LORA + "{r: 8, rank: 8}", 16, "vector.lora.r: the same as rank, which is given too"),
    (VECTOR, LORA + "{r: 8, use_dora: true}", 16, "use_dora: not for a recipe to set: a task vector is the low-rank"),
    (VECTOR, LORA + "{modules_to_save: [lm_head]}", 16, "modules_to_save: not for a recipe to set: a task vector is"),
    (VECTOR, LORA + "{init_lora_weights: pissa}", 16, "must be True, 'gaussian' or 'orthogonal', got the text 'pissa'"),
    ("path: pico:phi", "path: m, token: secret", 5, "no secret stands in a recipe: hf auth login"),
    ("path: pico:phi", "path: m, pretrained: n", 5, "model.pretrained: the same as path, which is given too: keep one"),
    ("path: pico:phi", "path: m, load_in_4bit: true, quantize: int8", 5, "load_in_4bit and quantize say the same"),
    ("path: pico:phi", "path: m, load_in_8bit: 1", 5, "load_in_8bit must be true or false"),
    ("path: pico:phi", "path: m, device_map: all", 5, "must be 'auto', 'balanced', 'balanced_low_0' or 'sequential'"),
    ("path: pico:phi", "path: m, device_map: auto, device: cpu", 5, "device is one device and device_map several"),
    ("path: pico:phi", "path: m, max_memory: {0: 1GB}", 5, "max_memory goes with device_map"),
    ("name: tiny", "name: tiny\nreport_to: [tensorbord]", 2, "got the text 'tensorbord'; did you mean 'tensorboard'?"),
    # no recipe at all
    (GOOD, "- a\n- b\n", 1, "at the top; found a list"),
    (GOOD, "just words\n", 1, "found the text 'just words'"),
    (GOOD, "a: 1\nb: [1,\nc: 3\n", 4, "not valid YAML"),
    (GOOD, "a: 1\n\tb: 2\n", 2, "indent with spaces, not tabs"),
    (GOOD, "a: 1\nb: c: d\n", 2, "needs quotes around it"),
    (GOOD, "a: 1\nb: 'x\n", 3, "unexpected end of stream"),
    (GOOD, "a: 1\nb: @x\n", 2, "found character '@' that cannot start any token"),
    (GOOD, "a: 1\n---\nb: 2\n", 2, "found another document"),
    (GOOD, "a: 1\nb: *x\n", 2, "undefined alias 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "part"), MISTAKES)
def test_one_mistake_one_message_with_its_line(here: Path, old: str, new: str, line: int, part: str) -> None:
    (message,) = fails(write(here, with_line(old, new)))
    assert message.startswith(f"r.yaml:{line}: ")
    assert part in message


FAMILIAR = [  # one and the same, as we and as other libraries call it
    ("model", {"path": "m", "dtype": "bfloat16", "quantize": "nf4"},
     {"model_name_or_path": "m", "torch_dtype": "bfloat16", "load_in_4bit": True, "load_in_8bit": False}),
    ("model", {"path": "m"}, {"pretrained_model_name_or_path": "m"}),
    ("model", {"path": "m", "quantize": "int8"}, {"pretrained": "m", "load_in_8bit": True}),
    ("vector.lora", {"rank": 8, "alpha": 4, "dropout": 0.1, "targets": ["fc1"], "rslora": True},
     {"r": 8, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["fc1"], "use_rslora": True}),
    ("vector.forget",
     {"epochs": 2, "batch_size": 4, "accumulation": 2, "warmup": 0.2, "schedule": "cosine", "max_length": 64,
      "gradient_checkpointing": True, "save_every": 5},
     {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_ratio": 0.2,
      "lr_scheduler_type": "cosine", "max_seq_length": 64, "activation_checkpointing": True, "save_steps": 5}),
    ("teach", {"steps": 3, "lora": {"rank": 4}}, {"max_steps": 3, "lora": {"r": 4}}),
]  # fmt: skip


@pytest.mark.parametrize(("section", "ours", "theirs"), FAMILIAR)
def test_a_recipe_with_familiar_names_is_the_canonical_one(
    here: Path, section: str, ours: dict[str, object], theirs: dict[str, object]
) -> None:
    """In a file and as overrides of it: the same recipe, and so the same keys and the same run."""
    bare = write(here, "name: n\nmodel: {path: m}\nforget: {path: f.jsonl, kind: qa}\n")
    one, other = (load_recipe(bare, [f"{section}={json.dumps(given)}"]).recipe for given in (ours, theirs))
    singly = [f"{section}.{key}={json.dumps(value)}" for key, value in theirs.items()]
    mixed = load_recipe(bare, [f"{section}={json.dumps(ours)}", *singly]).recipe if section != "model" else one
    assert one == other == mixed
    assert resolved_yaml(other) == resolved_yaml(one)
    assert not [name for name in ALSO if f" {name}:" in resolved_yaml(other)]


def test_an_override_by_another_name_takes_the_place_of_the_file_s(here: Path) -> None:
    found = load_recipe(write(here, GOOD), ["vector.forget.max_steps=7", "forget.where={r: 1, rank: 2}"]).recipe
    assert found.vector.forget.steps == 7
    assert load_recipe("r.yaml", ["forget.where={rank: 2}", "forget.where.r=1"]).recipe.forget.where == {
        "r": 1,
        "rank": 2,
    }  # columns of data, which are called what they are called


def test_an_override_of_the_method_leaves_the_settings_of_the_others_behind(here: Path) -> None:
    """A recipe of any method is one flag from plain negation; what a flag says of another method stays a mistake."""
    settings = (
        "  mu: 2\n  method: [ignorance, contrast, low_rank]\n  ignorance: {teacher: blank}\n  low_rank: {rank: 2}\n"
    )
    write(here, GOOD + settings)
    plain = load_recipe("r.yaml", ["vector.method=negate"]).recipe.vector
    assert plain == load_recipe(write(here, GOOD, "plain.yaml")).recipe.vector
    kept = load_recipe("r.yaml", ["vector.method=[negate, low_rank]"]).recipe.vector
    assert (kept.low_rank, kept.ignorance, kept.mu) == (LowRankSpec(rank=2), None, None)
    for flags in (["vector.ignorance.teacher=short", "vector.method=negate"], ["vector.method=negate", "vector.mu=3"]):
        for order in (flags, flags[::-1]):
            assert "method" in fails("r.yaml", *order)[0]
    assert "method" in fails("r.yaml", "vector={method: npo, npo: {}}", "vector.method=negate")[0]
    assert "vector.method is an empty list" in fails("r.yaml", "vector.method=[]")[0]


def test_what_is_passed_on_is_looked_up_in_the_installed_library() -> None:
    from transformers import TrainingArguments

    assert trainer_settings() == set(TrainingArguments.__dataclass_fields__) - {"distributed_state"}


# what identifies runs that were finished before chat templates, trackers and everything else that came later
SAME = {
    "3abd7dc713fd6c084f1919fe256678ff7661d75c9cf0f58065760083b4a7280e": {"method": ["npo"], "npo": {}},
    "50396dadd7199467d947f3daaa914f86ba32d1cfb413f71577f4f99f0e2ef9e5": {
        **{"method": ["contrast", "shrink"], "shrink": {}, "retain_kl": "two_sided"}
    },
    "77a312ddb68683300149309276c949ec4b6d1026b68be1c957f297b13ba67a4f": {
        **{"method": "gradient_difference", "gradient_difference": {}}
    },
}


@pytest.mark.parametrize("digest", SAME)
def test_keys_that_came_later_leave_the_hash_of_a_recipe_as_it_was(digest: str) -> None:
    """A new key that changes one of these orphans every finished run: make it with ``later``."""
    data = {
        **{"name": "n", "model": {"path": "m"}, "forget": {"path": "f", "kind": "qa"}, "teach": {"lora": {}}},
        **{"retain": [{"path": "r", "kind": "text"}], "utility": [{"path": "u", "kind": "mcq"}], "robustness": {}},
        **{"holdout": {"path": "h", "kind": "qa"}, "benchmark": {"name": "tofu", "set": "forget10"}},
        "vector": SAME[digest],
    }
    recipe = Recipe.model_validate_json(json.dumps(data))
    assert fingerprint(recipe.model_dump(mode="json", exclude={"cluster", "report_to"})) == digest


TOFU = "benchmark: {name: tofu, set: forget10}\n"
MUSE = "benchmark: {name: muse, set: news}\n"
HOLDOUT = "holdout: {path: h.jsonl, kind: qa}\n"
COMPARED = [
    ("reference: train\n", "reference: train teaches a model the retain sets alone, and there is no teach"),
    (TOFU + "reference: published\n", "reference: published means MUSE's published figures"),
    ("reference: log.json\n", "reference: a log only serves a benchmark's forget quality or PrivLeak"),
    ("holdout: {path: h.jsonl, kind: text}\n", "holdout is of kind text, forget of kind qa: they cannot be compared"),
    ("benchmark: {name: tofu, set: news}\n", "tofu has no set 'news'; it has forget01, forget05, forget10"),
    ("robustness: {quantize: [int4]}\n", "robustness.quantize.0: must be 'nf4' or 'int8'"),
    ("robustness: {probes: [prefixes]}\n", "did you mean 'prefix'?"),
    ("export: {push_to_hub: {repo: me}}\n", "got the text 'me' (OWNER/NAME on the hub.)"),
    ("export: {push_to_hub: {repo: me/it, what: merged}}\n", "push_to_hub wants the merged export: set merged to true"),
]
ADDS = GOOD.replace("forget:\n  path", "learn:\n - path").replace("  kind: qa\n  prompt", "   kind: qa\n   prompt", 1)
FORGETTING = {"reference": "reference: o/m\n", "benchmark": TOFU, "robustness": "robustness: {}\n", "holdout": HOLDOUT}


@pytest.mark.parametrize(
    ("text", "said"),
    [(GOOD + more, said) for more, said in COMPARED]
    + [(ADDS + more, f"{key} is about forgetting, and there is no forget set") for key, more in FORGETTING.items()],
    ids=range(len(COMPARED) + len(FORGETTING)),
)
def test_comparisons_that_cannot_be_made(here: Path, text: str, said: str) -> None:
    (message,) = fails(write(here, text))
    assert said in message


def test_comparisons_that_can_be_made(here: Path) -> None:
    assert load_recipe(write(here, ADDS)).recipe.forget is None
    teach = "teach: {steps: 3}\nreference: train\n"
    recipe = load_recipe(write(here, GOOD + TOFU + teach + HOLDOUT + "robustness: {}\n")).recipe
    assert recipe.robustness is not None
    assert recipe.robustness.relearn is not None  # {}: all attacks
    assert (recipe.robustness.quantize, recipe.robustness.samples) == (("nf4", "int8"), 8)
    assert [role for role, _ in recipe.sets()] == ["forget", "retain", "retain", "holdout"]
    assert load_recipe(write(here, resolved_yaml(recipe), "again.yaml")).recipe == recipe
    for more in (MUSE + "reference: published\n", TOFU + "reference: log.json\n", "reference: org/model\n"):
        assert load_recipe(write(here, GOOD + more)).recipe.reference == more.split()[-1]


@pytest.mark.parametrize("template", ["{question", "question}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{ a }"])
def test_templates(here: Path, template: str) -> None:
    quoted = json.dumps(template)
    (message,) = fails(write(here, with_line('"Q: {question}\\nA:"', quoted)))
    lone = template in ("{question", "question}")
    assert message.startswith(f"r.yaml:9: forget.prompt: {'there is a single' if lone else 'the field'} '")
    split = f"{{train: [ok, {quoted}], validation: v, test: t}}"
    (message,) = fails(write(here, with_line("kind: mcq", f"kind: mcq\n    prompt: {split}")))
    assert message.startswith("r.yaml:13: retain.0.prompt.train.1: ")


def test_template_rendering() -> None:
    assert template_fields("{{x}} {a} {b c} {a}}}") == ("a", "b c")
    assert render("{{x}} {a} {b c} {a}}}", {"a": 1, "b c": "{a}"}) == "{x} 1 {a} 1}"
    with pytest.raises(ValueError, match=r"uses \{q\}, but there is no column 'q'"):
        render("{q}", {"a": 1, "b": 2})
    with pytest.raises(ValueError, match="column 'q' is empty"):
        render("{q}", {"q": None})


@given(st.text())
def test_escaped_text_renders_to_itself(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert render(escaped, {}) == text


def test_mistakes_in_the_settings_of_a_method_from_outside(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DampSpec(Frozen):
        share: float = 0.5

    damp = "vector.method=damp"
    (told,) = fails(write(here, GOOD), "vector.damp.share=1")
    assert "--set vector.damp.share: vector.damp: unknown key (allowed here: method" in told
    monkeypatch.setitem(METHODS, "damp", Method("shaper", words="less of it", settings=DampSpec))
    assert load_recipe("r.yaml", [damp, "vector.damp.share=0.25"]).recipe.vector.method == "damp"
    assert fails("r.yaml", damp, "vector.damp.shar=1")[0] == (
        "--set vector.damp.shar: unknown key; did you mean 'share'? (allowed here: share)"
    )
    (told,) = fails("r.yaml", damp, "vector.damp.share=x")
    assert told == "--set vector.damp.share: must be a number, got the text 'x'"


def test_all_mistakes_at_once_in_order(here: Path) -> None:
    text = "nam: x\nmodel: {path: m, dtype: f32}\nforget:\n  path: f\n  kind: qa\n  prompt: '{'\n"
    messages = fails(write(here, text + "retain: {path: r}\nseed: '1'\n"), "vector.lora.rnk=3", "oops")
    places = [message.split(": ")[0] for message in messages]
    assert places == [*(f"r.yaml:{line}" for line in (1, 2, 6, 7, 8)), "--set oops", "--set vector.lora.rnk"]
    assert messages[3] == "r.yaml:7: retain: must be a list, got a mapping"


def test_a_dash_of_yaml_1_1_is_gone(here: Path) -> None:
    where = "{a: yes, b: 010, c: 2001-01-01, d: 0o10, e: true, f: ~x, g: 1e3, h: 12:30:00, 1: .5, j: 0x1F}"
    loaded = load_recipe(write(here, with_line("kind: mcq", f"kind: mcq\n    where: {where}")))
    values = ["yes", 10, "2001-01-01", 8, True, "~x", 1000.0, "12:30:00", 0.5, 31]
    assert loaded.recipe.retain[0].where == dict(zip("abcdefgh1j", values, strict=True))


def test_json_is_yaml(here: Path) -> None:
    forget = {"path": "f", "kind": "qa", "where": {"\U0001f600": "\U0001f600/"}}
    write(here, json.dumps({"name": "n", "model": {"path": "m"}, "forget": forget}))
    recipe = load_recipe("r.yaml", ["description=" + json.dumps("e \U0001f600")]).recipe
    assert recipe.forget is not None
    assert recipe.forget.where == forget["where"]
    assert recipe.description == "e \U0001f600"
    assert "an escape in this text is half a character" in fails(write(here, GOOD + '"\\ud83d": 1\n'))[0]


def test_plain_anchors_work(here: Path) -> None:
    text = with_line("    steps: 3\n", "    steps: &n 3\n    save_every: *n\n")
    assert load_recipe(write(here, text)).recipe.vector.forget.save_every == 3


def test_files_that_cannot_be_read(here: Path) -> None:
    (here / "latin.yaml").write_bytes(b"name: x\ndescription: caf\xe9\n")
    assert fails("latin.yaml") == ["latin.yaml:2: this is not UTF-8 text; save the file as UTF-8"]
    (here / "big.yaml").write_bytes(b"#" * 1_000_001)
    assert "too large for a recipe" in fails("big.yaml")[0]
    (here / "folder").mkdir()
    assert fails("folder") == ["folder is a folder; --recipe takes one YAML file"]
    assert "did you mean 'quickstart.yaml'? (packaged recipes: quickstart.yaml)" in fails("quikstart")[0]
    for name in ("", "no/such.yaml", "a" * 5000, "a\0b"):
        assert f"there is no recipe {name!r}" in fails(name)[0]


def test_bare_names(here: Path, tmp_path: Path) -> None:
    packaged = tmp_path / "site" / "unlearn" / "recipes" / "quickstart.yaml"
    assert load_recipe("quickstart").source == load_recipe("quickstart.yaml").source == packaged
    write(here, GOOD.replace("tiny", "mine"), "quickstart.yaml")
    assert load_recipe("quickstart").recipe.name == load_recipe("./quickstart.yaml").recipe.name == "mine"
    (here / "other").mkdir()
    (packaged.parent / "other.yaml").write_text(GOOD)
    assert load_recipe("other").recipe.name == "tiny"  # the folder of that name is not in the way
    assert list_recipes() == (("other.yaml", "First line."), ("quickstart.yaml", "First line."))
    assert assets.tasks_folder() == tmp_path / "site" / "eval"  # as in a checkout: one folder up


def test_overrides(here: Path) -> None:
    for name in ("mine.jsonl", "near.jsonl", "weights"):
        (here / name).write_text("{}")
    assert load_recipe(write(here, GOOD), ["seed=1"]).recipe.retain[0].path == "near.jsonl"  # as the file has it
    changes: dict[str, tuple[str, object]] = {  # what is given, and what it then is
        "seed": ("7", 7),
        "retain.0.path": ("mine.jsonl", str(here / "mine.jsonl")),
        "retain.1.path": ("absent.txt", "absent.txt"),
        "retain.1.test": ("{path: mine.jsonl}", Source(path=str(here / "mine.jsonl")).model_dump()),
        "forget.path": ("hub:a/b", "hub:a/b"),
        "forget.config": ("null", None),
        "teach.lora.rank": ("4", 4),
        "vector.forget": ("{epochs: 2, learning_rate: 1e-3}", TrainSpec(epochs=2, learning_rate=1e-3).model_dump()),
        "vector.lora.rslora": ("true", True),
        "sweep.coefficients": ("[0.5, 1]", (0.25, 1.0)),
        "sweep.coefficients.0": ("0.25", 0.25),
        "model.path": ("weights", str(here / "weights")),
        "description": ("a = b", "a = b"),
    }
    found: Any = load_recipe("r.yaml", [f"{key}={given}" for key, (given, _) in changes.items()]).recipe.model_dump()
    for key, (_, wanted) in changes.items():
        value = found
        for step in key.split("."):
            value = value[int(step) if step.isdigit() else step]
        assert value == wanted, key


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "--set foo: not an override; write --set key.path=value"),
        ("=3", "--set : not an override; write --set key.path=value"),
        ("a..b=3", "--set a..b: not an override"),
        ("seed=x", "--set seed: must be a whole number, got the text 'x'"),
        ("seed=010x: [", "--set seed: not valid YAML"),
        ("name=!!python/x 3", "--set name: the tag !!python/x is refused"),
        ("vector.lora.rnk=3", "--set vector.lora.rnk: unknown key; did you mean 'rank'?"),
        ("modle.dtype=auto", "--set modle.dtype: modle: unknown key; did you mean 'model'?"),
        ("model.path.x=3", "--set model.path.x: model.path is a single value, not a mapping, so it has no 'x'"),
        ("retain.2.path=x", "--set retain.2.path: retain is a list of 2, counted from 0, so it has no '2'"),
        ("retain.x=x", "--set retain.x: retain is a list of 2, counted from 0, so it has no 'x'"),
        ("utility.0.path=x", "--set utility.0.path: utility: must be a list, got a mapping"),
        ("model=null", "--set model: must be a mapping"),
        ("forget.prompt={a", "not valid YAML"),
        ("forget.prompt='{a'", "--set forget.prompt: there is a single '{' without its partner"),
        ("forget.where.c={x: 1}", "--set forget.where.c: forget.where.c.x: unknown key"),
    ],
)
def test_bad_overrides_point_at_the_flag(here: Path, override: str, message: str) -> None:
    (found,) = fails(write(here, GOOD), override)
    assert found.startswith("--set ")
    assert message in found


def test_an_override_that_clashes_with_the_file(here: Path) -> None:
    message = fails(write(here, GOOD), "vector.forget.epochs=2")[0]
    assert message.startswith("r.yaml:18: vector.forget: give epochs or steps, not both")
    assert message.endswith("(with --set vector.forget.epochs)")


def test_resolved_yaml_reads_back(here: Path) -> None:
    prompt = "forget.prompt={train: [a, b], validation: c, test: '{d}'}"
    first = load_recipe(write(here, GOOD), [prompt, "forget.where={a: '1e-4', b: 1.0, c: [1, 'on', true]}"]).recipe
    text = resolved_yaml(first)
    assert "weight_decay: 0.0" in text  # defaults are written out
    assert load_recipe(write(here, text, "resolved.yaml")).recipe == first


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
TRAPS = ["1e-4", "on", "0x1", "010", "null", "~", "2001-01-01", "<<", "=", ".inf", "true", "", " "]
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@example("", {"<<": False})
@given(TEXTS, st.dictionaries(TEXTS, st.booleans() | NUMBERS | st.sampled_from(TRAPS) | TEXTS))
def test_any_value_survives_writing_and_reading(description: str, where: dict[str, object]) -> None:
    data = {"name": "n", "model": {"path": "m"}, "forget": {"path": "f", "kind": "qa", "where": where}}
    recipe = Recipe.model_validate_json(json.dumps({**data, "description": description}))
    document = yaml_core.parse(resolved_yaml(recipe))
    assert Recipe.model_validate_json(json.dumps(document.data)) == recipe


def test_json_schema() -> None:
    schema = json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"]
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    described = [p for d in schema["$defs"].values() for p in d["properties"].values()]
    assert all(p.get("description") for p in described)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("Question: {question}\nAnswer:", ["\n", "\nQuestion:"]),
        ("{question}", ["\n"]),
        ("  \n{question}", ["\n"]),
        ("Answer in full.\n\n  Q {{1}}: {question}\nA:", ["\n", "\nQ {1}:"]),
        ("<|user|>\n{question}<|end|>\n<|assistant|>\n", ["\n", "\n<|user|>"]),
        ("The capital of {country} is", ["\n", "\nThe capital of"]),
    ],
)
def test_where_an_answer_ends(template: str, found: list[str]) -> None:
    assert stops(template) == found
