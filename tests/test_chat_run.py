"""A whole run in a chat template: trained, chosen, reported in both wordings, attacked, exported; and found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import chats
import pytest
from compared_arena import read, run, write_data, write_recipe
from transformers import AutoTokenizer

from unlearn.cli import main
from unlearn.recipe.load import load_recipe, resolved_yaml


@pytest.fixture(scope="module")
def finished(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatted")
    chats.build(pico_llama, folder / "model", "llama")
    write_data(folder)
    model = {"path": "model", "device": "cpu", "chat_template": "auto", "system": 'Be "short".'}
    attacks = {"items": 6, "quantize": [], "relearn": None, "probes": ["paraphrase"], "samples": 0, "lens": False}
    recipe = write_recipe(folder, name="chatted", model=model, robustness=attacks, reference=None)
    assert run(recipe, folder / "run") == 0
    return folder


def test_the_report_has_both_wordings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = read(finished / "run")
    names = {row.name for row in report.scores if row.set == "forget"}
    assert names == {"f", "f@plain"}
    assert {row.name for row in report.scores if row.set != "forget"} == {"r", "util"}
    inside, outside = (next(r for r in report.scores if r.key == ("forget", n, "prob")) for n in ("f", "f@plain"))
    assert inside.before.n == outside.before.n
    assert inside.before.value > 2 * outside.before.value, "it was taught in the template"
    assert all(score.name != "f@plain" for point in report.sweep for score in point.scores)
    assert {row.kind for row in report.robustness.scores} >= {"probe", "contrast"} if report.robustness else False
    assert run(finished / "recipe.yaml", finished / "run") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "asked outside its chat template the model" in said
    assert "asked outside its chat template" in (finished / "run" / "report.html").read_text("utf-8")


def test_the_benchmark_is_asked_in_the_template(finished: Path) -> None:
    words = AutoTokenizer.from_pretrained(finished / "model")
    for who in ("target", "edited"):
        asked = {}
        for path in (finished / "run" / "benchmark" / who).rglob("samples_*.jsonl"):
            lines = path.read_text("utf-8").splitlines()
            asked |= {json.loads(line)["arguments"]["gen_args_0"]["arg_0"]: path.name for line in lines}
            messages = [{"role": "system", "content": 'Be "short".'}, {"role": "user", "content": "QUESTION"}]
            before, after = words.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, date_string="26 Jul 2024"
            ).split("QUESTION")
        assert len(asked) == 19
        assert all(prompt.startswith(before) and prompt.endswith(after) for prompt in asked)
        assert not any("Question:" in prompt for prompt in asked)


def test_the_card_says_to_ask_in_the_template(finished: Path) -> None:
    card = (finished / "run" / "export" / "adapter" / "README.md").read_text("utf-8")
    assert "its tokenizer's chat template" in card
    assert """messages = [{"role": "system", "content": 'Be "short".'}, {"role": "user", "content": "..."}]""" in card


@pytest.mark.parametrize("template", ["llama", "chatml"])
def test_a_model_with_another_template_is_told_of(template: str, finished: Path, tmp_path: Path) -> None:
    theirs = shutil.copytree(finished / "run" / "target", tmp_path / "theirs")
    words = AutoTokenizer.from_pretrained(theirs)
    words.chat_template = chats.TEMPLATES[template]
    words.save_pretrained(theirs)
    recipe = json.loads((finished / "recipe.yaml").read_text())
    path = finished / f"eval-{template}.yaml"
    path.write_text(json.dumps({**recipe, "robustness": None, "holdout": None, "benchmark": None, "reuse": ["run"]}))
    assert main(["eval", str(theirs), str(path), "--out", str(tmp_path / "out")]) == 0
    told = any("another chat template" in said for said in read(tmp_path / "out").warnings)
    assert told == (template == "chatml")


def test_a_template_s_file_is_part_of_the_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = finished / "own.jinja"
    own.write_text(chats.LLAMA)
    assert run(finished / "recipe.yaml", finished / "run", "--set", "model.chat_template=own.jinja") == 2
    assert "another recipe" in capsys.readouterr().err
    (finished / "own.jinja").unlink()
    assert main(["plan", str(finished / "recipe.yaml"), "model.chat_template=own.jinja"]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "told"), [("chat_template=none", False), ("system=null", True)])
def test_a_plan_says_what_the_model_has(
    change: str, told: bool, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = json.loads((finished / "recipe.yaml").read_text())
    recipe |= {"model": {"path": str(finished / "model")}, "benchmark": None}
    path = tmp_path / "recipe.yaml"
    for name in "fruh":
        (tmp_path / f"{name}.jsonl").write_bytes((finished / f"{name}.jsonl").read_bytes())
    path.write_text(json.dumps(recipe))
    assert main(["plan", str(path), f"model.{change}"]) == 0
    said = "".join(capsys.readouterr())
    assert ("model.chat_template: auto" in said) == told


def test_recipes_that_say_nothing_of_it_keep_their_names() -> None:
    """What came later is no part of what earlier runs are found by."""
    recipe = load_recipe("pico_smoke.yaml").recipe
    assert not {"chat_template", "system", "date"} & recipe.model_dump(mode="json")["model"].keys()
    assert "chat" not in resolved_yaml(recipe)
    plainly = load_recipe("pico_smoke.yaml", ["model.chat_template=none"]).recipe
    assert plainly.model_dump(mode="json") == recipe.model_dump(mode="json")
