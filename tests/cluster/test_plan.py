"""From flags to jobs: splitting, multiplying, naming, checking beforehand, and what shares a preparation."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.cluster.plan import Grid, file_name, plan_grid, read_axes, recluster, short_keys
from unlearn.errors import GridError, RecipeError
from unlearn.recipe.load import load_recipe

PICO = str(Path(__file__).resolve().parents[2] / "recipes" / "pico_smoke.yaml")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,2", ["0", "1", "2"]),
        (" 0 , 1 ", ["0", "1"]),
        ("[1,2],[3,4]", ["[1, 2]", "[3, 4]"]),
        ("{a: 1, b: [2,3]},{}", ['{"a": 1, "b": [2, 3]}', "{}"]),
        ("'a,b',c", ['"a,b"', '"c"']),
        ("don't,won't", ['"don\'t"', '"won\'t"']),
        ("a.jsonl,b.jsonl", ['"a.jsonl"', '"b.jsonl"']),
        ("1e-4,null,''", ["0.0001", "null", '""']),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, values: list[str]) -> None:
    assert list(read_axes([f"k={text}"])["k"]) == values


TEXT = st.text(max_size=12)
VALUES = st.recursive(
    st.integers() | TEXT,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT.filter(lambda key: key != "<<"), v, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=40)
@given(st.lists(VALUES, min_size=1, max_size=4, unique_by=lambda v: json.dumps(v, sort_keys=True)))
def test_what_json_joins_is_split_again(values: list[object]) -> None:
    found = read_axes([f"k={','.join(json.dumps(value) for value in values)}"])["k"]
    assert [json.loads(value) for value in found] == values


@pytest.mark.parametrize(
    ("flags", "sets", "said"),
    [
        (["seed"], [], "write --grid key.path=value,value"),
        (["=1"], [], "write --grid key.path=value,value"),
        (["a..b=1"], [], "write --grid key.path=value,value"),
        (["seed=1,2,1"], [], "1 is given twice"),
        (["seed=1,0x1"], [], "1 is given twice"),
        (["seed=1", "seed=2"], [], "seed and seed set the same thing"),
        (["seed=1"], ["seed=2"], "seed and seed set the same thing"),
        (["vector={rank: 2}", "vector.lora.rank=1"], [], "set the same thing"),
        (["vector.lora.rank=1"], ["vector.lora={rank: 1}"], "set the same thing"),
        (["seed=!!python/name:os.system"], [], "not values between commas"),
        (["cluster.time=1:00:00,2:00:00"], [], "--set cluster.time=VALUE"),
        *(([f"seed={text}"], [], "value") for text in ("", "1,,2", "1,", "[1,2", "1]", "'a", ".nan")),
    ],
)
def test_axes_that_make_no_grid_are_refused(flags: list[str], sets: list[str], said: str) -> None:
    with pytest.raises(GridError, match=re.escape(said)):
        read_axes(flags, sets)


def test_every_combination_is_a_job_once() -> None:
    assert list(read_axes(["a.rank=1", "a.rank_pattern=2"])) == ["a.rank", "a.rank_pattern"]
    grid = plan_grid([PICO], ["seed=0,1,2", "vector.lora.rank=2,4", "sweep.coefficients=[1,2],[3,4]"])
    expected = list(itertools.product(("0", "1", "2"), ("2", "4"), ("[1, 2]", "[3, 4]")))
    assert [tuple(job.settings.values()) for job in grid.jobs] == expected
    assert len({job.name for job in grid.jobs}) == 12
    assert grid.jobs[0].name == "0000-seed=0_rank=2_coefficients=1,2"
    for job in grid.jobs:
        recipe = load_recipe(grid.recipes[0].source, job.overrides, text=grid.recipes[0].text).recipe
        values = [recipe.seed, recipe.vector.lora.rank, list(recipe.sweep.grid()[1:])]
        assert values == [json.loads(v) for v in job.settings.values()]


def test_recipes_are_multiplied_too(tmp_path: Path) -> None:
    text = Path(PICO).read_text().replace("path: data/", f"path: {Path(PICO).parent}/data/")
    for name, more in (("other", "cluster: {gpus: 1}\n"), ("third", "cluster: {gpus: 2}\n")):
        (tmp_path / f"{name}.yaml").write_text(text.replace("name: pico_smoke", f"name: {name}") + more)
    other, third = str(tmp_path / "other.yaml"), str(tmp_path / "third.yaml")
    assert [job.name for job in plan_grid([PICO, other], ["seed=0,1"]).jobs] == [
        *("0000-pico_smoke_seed=0", "0001-pico_smoke_seed=1"),
        *("0002-other_seed=0", "0003-other_seed=1"),
    ]
    with pytest.raises(GridError, match="both called pico_smoke"):
        plan_grid([PICO, PICO], [])
    with pytest.raises(GridError, match="ask the cluster for different things"):
        plan_grid([other, third], [])
    assert plan_grid([other, third], [], ["cluster.gpus=4"]).cluster.gpus == 4


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=300))
def test_any_value_gives_a_name_that_every_file_system_takes(value: str) -> None:
    name = f"0000-{file_name(value)}".rstrip("-")
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.,=+_-]*", name)
    assert len(name) < 100
    assert not name.endswith((".", " "))


def test_keys_are_as_short_as_they_can_be() -> None:
    keys = ["seed", "vector.lora.rank", "teach.lora.rank", "teach.steps"]
    assert list(short_keys(keys).values()) == ["seed", "vector.lora.rank", "teach.lora.rank", "steps"]
    assert short_keys(["path", "forget.path"]) == {"path": "path", "forget.path": "forget.path"}


def test_all_mistakes_are_told_before_anything_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(GridError) as told:
        plan_grid([PICO], ["seed=0,-1", "vector.lora.rank=2,none", f"forget.path=data/capitals.jsonl,{tmp_path}/no"])
    text = str(told.value)
    assert text.startswith("nothing was submitted: 7 of 8 jobs cannot be run")
    assert "--grid seed: must be greater than or equal to 0" in text
    assert "--grid vector.lora.rank: must be a whole number" in text
    assert f"{tmp_path}/no" in text
    assert "seed=0, vector.lora.rank=2, forget.path=" in text  # the job by its settings
    with pytest.raises(GridError) as told:
        plan_grid([PICO], ["seed=0,1,2"], ["vector.lora.rank=0"])
    assert str(told.value).count("vector.lora.rank") == 1
    assert "all jobs:" in str(told.value)
    with pytest.raises(GridError, match=r"there is no recipe 'pico_smke'.*did you mean 'pico_smoke\.yaml'"):
        plan_grid(["pico_smke"], ["seed=0"])
    with pytest.raises(GridError, match="same run, 0000-coefficients=1,2 and 0001"):
        plan_grid([PICO], ["sweep.coefficients=[1,2],[1.0,2.0]"])


def test_settings_that_name_what_is_not_there(tmp_path: Path) -> None:
    """Data, folders, checkpoints and tasks are looked up for each job, not for the first one alone."""
    bad, earlier = tmp_path / "bad.jsonl", tmp_path / "earlier"
    bad.write_text('{"something": "else"}\n')
    earlier.mkdir()
    for flag, sets, said in (
        (f"forget.path=data/capitals.jsonl,{bad}", [], r"bad\.jsonl"),
        (f"reuse=[{earlier}],[{earlier}r]", [], "reuse: there is no run folder .*earlierr"),
        ("vector={},{method: msa, msa: {clean: ./none}}", ["teach=null"], "there is no folder ./none"),
        ("eval.tasks=[],[{task: wmdp_bioo}]", [], "no task 'wmdp_bioo'; did you mean 'wmdp_bio"),
    ):
        with pytest.raises(GridError, match=rf"1 of 2 jobs(.|\n)*{said}"):
            plan_grid([PICO], [flag], sets)


def test_jobs_share_a_preparation_if_all_before_the_vector_agrees(pico_phi: Path) -> None:
    grid = plan_grid([PICO], ["seed=0,1", "vector.lora.rank=2,4", "sweep.coefficients=[1],[2]"])
    assert [p.name for p in grid.preparations] == ["p000-seed=0", "p001-seed=1"]
    assert [job.after for job in grid.jobs] == ["p000-seed=0"] * 4 + ["p001-seed=1"] * 4
    assert "seed=1" in grid.preparations[1].overrides
    for flag in ("teach.steps=5,6", "retain.0.limit=8,12", "model.dtype=float32,bfloat16", "forget.limit=8,12"):
        grid = plan_grid([PICO], [flag, "vector.lora.rank=2,4"])
        assert [job.after[:4] if job.after else "" for job in grid.jobs] == ["p000", "p000", "p001", "p001"], flag
    # what only one job would use it makes itself
    assert [job.after for job in plan_grid([PICO], ["seed=0,1"]).jobs] == [None, None]
    # without teaching: one per model that has to be fetched
    grid = plan_grid([PICO], ["seed=0,1", "model.path=pico:phi,pico:llama"], ["teach=null"])
    assert [job.after[:4] if job.after else "" for job in grid.jobs] == ["p000", "p001", "p000", "p001"]
    assert plan_grid([PICO], ["seed=0,1"], ["teach=null", f"model.path={pico_phi}"]).preparations == ()


def test_a_grid_is_the_same_after_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = plan_grid([PICO], ["seed=0,1", "vector.lora.rank=2,4"], ["cluster.gpus=2", "cluster.setup=[module load x]"])
    grid.save(tmp_path)
    assert Grid.load(tmp_path) == grid
    assert (grid.cluster.gpus, grid.cluster.setup) == (2, ("module load x",))
    assert not [o for job in grid.jobs for o in job.overrides if "cluster" in o]
    more = recluster(grid, ["cluster.memory=64GB"])
    assert (more.cluster.gpus, more.cluster.memory) == (2, "64GB")
    for wrong, said in (("seed=1", r"only cluster\.KEY"), ("cluster.memory=much", "memory"), ("cluster.x=1", "x")):
        with pytest.raises(GridError, match=said):
            recluster(grid, [wrong])
    # the identity is of all but the cluster
    base = plan_grid([PICO], ["seed=0,1"]).identity()
    assert plan_grid([PICO], ["seed=0,1"], ["cluster.time=1:00:00"]).identity() == base
    assert plan_grid([PICO], ["seed=0,2"]).identity() != base
    assert plan_grid([PICO], ["seed=0,1"], ["vector.lora.rank=2"]).identity() != base
    monkeypatch.chdir(tmp_path)
    assert plan_grid([PICO], ["seed=0,1"]).identity() != base
    for text in ("{", "[]", "{}", (tmp_path / "grid.json").read_text().replace('"schema": 2', '"schema": 3')):
        (tmp_path / "grid.json").write_text(text)
        with pytest.raises(GridError, match=r"grid\.json: "):
            Grid.load(tmp_path)


def test_many_jobs_are_planned_from_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr("unlearn.cluster.plan.plan", looked_at.append)
    grid = plan_grid([PICO], [f"seed={','.join(map(str, range(30)))}", "vector.lora.rank=1,2,3,4,5,6,7,8,9,10"])
    assert len({job.name for job in grid.jobs}) == 300
    assert len(grid.preparations) == 30
    assert len(looked_at) == 1


def test_one_reading_of_a_file_is_not_changed_by_what_is_set() -> None:
    first = load_recipe(PICO, ["vector.lora.rank=7", "forget.where={continent: Asia}"]).recipe
    with pytest.raises(RecipeError):
        load_recipe(PICO, ["vector.lora.rank=0"])
    second = load_recipe(PICO).recipe
    assert (first.vector.lora.rank, second.vector.lora.rank) == (7, 4)
    assert second.forget is not None
    assert second.forget.where == {"continent": "Europe"}
