"""From flags to jobs: splitting, multiplying, naming, checking beforehand, and what shares a preparation."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn.cluster.axes import file_name, read_axes, short_keys, split_values
from unlearn.cluster.grid import Grid
from unlearn.cluster.plan import cluster_of, identity, plan_grid, recluster
from unlearn.cluster.slurm_options import require_trust
from unlearn.errors import GridError, RecipeError
from unlearn.recipe.evaluation import ClusterSpec
from unlearn.recipe.load import load_recipe
from unlearn.recipe.yaml import parse_value

PICO = str(Path(__file__).resolve().parents[2] / "recipes" / "pico_smoke.yaml")
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.,=+_-]*")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0,1,2", ("0", "1", "2")),
        (" 0 , 1 ", ("0", "1")),
        ("[1,2],[3,4]", ("[1,2]", "[3,4]")),
        ("{a: 1, b: [2,3]},{}", ("{a: 1, b: [2,3]}", "{}")),
        ("'a,b',c", ("'a,b'", "c")),
        ('"a,\\"b",c', ('"a,\\"b"', "c")),
        ("['a]',b],c", ("['a]',b]", "c")),
        ("don't,won't", ("don't", "won't")),
        ("a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("''", ("''",)),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text: str, values: tuple[str, ...]) -> None:
    assert split_values(text) == values


KEYS = st.text(max_size=60).filter(lambda key: key != "<<")  # YAML has no keys beyond 1024 characters, escapes counted


@settings(deadline=None)
@given(st.lists(st.recursive(st.integers() | st.text(), lambda v: st.lists(v) | st.dictionaries(KEYS, v))))
def test_what_json_joins_is_split_again(values: list[object]) -> None:
    texts = [json.dumps(value) for value in values]
    if texts:
        assert [parse_value(v) for v in split_values(",".join(texts))] == values


@pytest.mark.parametrize("text", ["", "1,,2", "1,", "[1,2", "1]", "'a", '"a\\"'])
def test_values_that_are_not_whole_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"empty|closed|opened"):
        split_values(text)


@pytest.mark.parametrize(
    ("flags", "sets", "said"),
    [
        (["seed"], [], "not an axis"),
        (["=1"], [], "not an axis"),
        (["a..b=1"], [], "not an axis"),
        (["seed=1,2,1"], [], "1 is given twice"),
        (["seed=1,0x1"], [], "1 is given twice"),
        (["seed=1", "seed=2"], [], "seed is given twice"),
        (["seed=1"], ["seed=2"], "seed is given twice"),
        (["vector={rank: 2}", "vector.lora.rank=1"], [], "set the same thing"),
        (["vector.lora.rank=1"], ["vector.lora={rank: 1}"], "set the same thing"),
        (["seed=!!python/name:os.system"], [], "tag"),
        (["cluster.time=1:00:00,2:00:00"], [], "--set cluster.time=VALUE"),
    ],
)
def test_axes_that_make_no_grid_are_refused(flags: list[str], sets: list[str], said: str) -> None:
    with pytest.raises(GridError, match=re.escape(said)):
        read_axes(flags, sets)


def test_neighbouring_keys_are_two_axes() -> None:
    assert [a.key for a in read_axes(["vector.lora.rank=1", "vector.lora.rank_pattern=2"])] == [
        "vector.lora.rank",
        "vector.lora.rank_pattern",
    ]


def test_every_combination_is_a_job_once() -> None:
    grid = plan_grid([PICO], ["seed=0,1,2", "vector.lora.rank=2,4", "sweep.coefficients=[1,2],[3,4]"])
    expected = list(itertools.product(("0", "1", "2"), ("2", "4"), ("[1,2]", "[3,4]")))
    assert [tuple(job.settings.values()) for job in grid.jobs] == expected
    assert [job.index for job in grid.jobs] == list(range(12))
    assert len({job.name for job in grid.jobs}) == 12
    assert grid.jobs[0].name == "0000-seed=0_rank=2_coefficients=1,2"
    for job in grid.jobs:
        recipe = load_recipe(grid.recipes[0].source, job.overrides, text=grid.recipes[0].text).recipe
        values = [recipe.seed, recipe.vector.lora.rank, list(recipe.sweep.grid()[1:])]
        assert values == [parse_value(v) for v in job.settings.values()]


def test_recipes_are_multiplied_too(tmp_path: Path) -> None:
    text = Path(PICO).read_text().replace("path: data/", f"path: {Path(PICO).parent}/data/")
    (tmp_path / "other.yaml").write_text(text.replace("name: pico_smoke", "name: other"))
    grid = plan_grid([PICO, str(tmp_path / "other.yaml")], ["seed=0,1"])
    assert [job.name for job in grid.jobs] == [
        *("0000-pico_smoke_seed=0", "0001-pico_smoke_seed=1"),
        *("0002-other_seed=0", "0003-other_seed=1"),
    ]
    with pytest.raises(GridError, match="given twice"):
        plan_grid([PICO, PICO], [])
    (tmp_path / "same.yaml").write_text(text)
    with pytest.raises(GridError, match="both called pico_smoke"):
        plan_grid([PICO, str(tmp_path / "same.yaml")], [])


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_value_gives_a_name_that_every_file_system_takes(value: str) -> None:
    name = f"0000-{file_name(value)}".rstrip("-")
    assert SAFE.fullmatch(name)
    assert len(name) < 100
    assert not name.endswith((".", " "))


def test_keys_are_as_short_as_they_can_be() -> None:
    keys = ["seed", "vector.lora.rank", "teach.lora.rank", "teach.steps"]
    assert list(short_keys(keys).values()) == ["seed", "vector.lora.rank", "teach.lora.rank", "steps"]
    assert short_keys(["forget.path", "retain.0.path"])["forget.path"] == "forget.path"
    assert short_keys(["path", "forget.path"]) == {"path": "path", "forget.path": "forget.path"}


def test_all_mistakes_are_told_before_anything_is_submitted(tmp_path: Path) -> None:
    with pytest.raises(GridError) as told:
        plan_grid([PICO], ["seed=0,-1", "vector.lora.rank=2,none", f"forget.path=data/capitals.jsonl,{tmp_path}/no"])
    text = str(told.value)
    assert text.startswith("nothing was submitted: 7 of 8 jobs cannot be run")
    assert "--grid seed: expected a whole number" in text
    assert "--grid vector.lora.rank: expected a whole number" in text
    assert f"{tmp_path}/no" in text
    assert "seed=0, vector.lora.rank=2, forget.path=" in text  # the job by its settings


def test_data_that_cannot_be_used_is_told_beforehand(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"something": "else"}\n')
    with pytest.raises(GridError, match=r"1 of 2 jobs.*\n.*bad\.jsonl"):
        plan_grid([PICO], [f"forget.path=data/capitals.jsonl,{bad}"])


def test_a_mistake_that_all_have_is_told_once() -> None:
    with pytest.raises(GridError) as told:
        plan_grid([PICO], ["seed=0,1,2"], ["vector.lora.rank=0"])
    assert str(told.value).count("vector.lora.rank") == 1
    assert "all jobs:" in str(told.value)


def test_a_recipe_that_is_not_there_is_told() -> None:
    with pytest.raises(GridError, match=r"there is no recipe 'pico_smke'.*did you mean 'pico_smoke\.yaml'"):
        plan_grid(["pico_smke"], ["seed=0"])


def test_two_jobs_that_are_the_same_run_are_refused() -> None:
    with pytest.raises(GridError, match="same run, 0000-coefficients=1,2 and 0001"):
        plan_grid([PICO], ["sweep.coefficients=[1,2],[1.0,2.0]"])


def test_jobs_share_a_preparation_if_all_before_the_vector_agrees() -> None:
    grid = plan_grid([PICO], ["seed=0,1", "vector.lora.rank=2,4", "sweep.coefficients=[1],[2]"])
    assert [p.name for p in grid.preparations] == ["p000-seed=0", "p001-seed=1"]
    assert [job.preparation for job in grid.jobs] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert grid.preparations[0].what == ("model", "target")
    assert "seed=1" in grid.preparations[1].overrides

    trained = plan_grid([PICO], ["vector.lora.rank=2,4"], ["reference=train"])
    assert trained.preparations[0].what == ("model", "target", "reference")


def test_what_the_teaching_depends_on_parts_the_jobs() -> None:
    for flag in ("teach.steps=5,6", "retain.0.limit=8,12", "model.dtype=float32,bfloat16", "forget.limit=8,12"):
        grid = plan_grid([PICO], [flag, "vector.lora.rank=2,4"])
        assert [job.preparation for job in grid.jobs] == [0, 0, 1, 1], flag


def test_a_preparation_for_one_job_alone_is_none() -> None:
    assert [job.preparation for job in plan_grid([PICO], ["seed=0,1"]).jobs] == [None, None]


def test_without_teaching_there_is_one_preparation_per_model(pico_phi: Path) -> None:
    sets = ["teach=null"]
    grid = plan_grid([PICO], ["seed=0,1", "model.path=pico:phi,pico:llama"], sets)
    assert [p.what for p in grid.preparations] == [("model",), ("model",)]
    assert [job.preparation for job in grid.jobs] == [0, 1, 0, 1]
    local = plan_grid([PICO], ["seed=0,1"], [*sets, f"model.path={pico_phi}"])
    assert local.preparations == ()


def test_a_grid_is_the_same_after_it_was_written(tmp_path: Path) -> None:
    grid = plan_grid([PICO], ["seed=0,1", "vector.lora.rank=2,4"])
    grid.save(tmp_path)
    assert Grid.load(tmp_path) == grid
    assert identity(Grid.load(tmp_path)) == identity(grid)


def test_the_identity_is_of_all_but_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = identity(plan_grid([PICO], ["seed=0,1"]))
    assert identity(plan_grid([PICO], ["seed=0,1"], ["cluster.time=1:00:00"])) == base
    assert identity(plan_grid([PICO], ["seed=0,2"])) != base
    assert identity(plan_grid([PICO], ["seed=0,1"], ["vector.lora.rank=2"])) != base
    monkeypatch.chdir(tmp_path)
    assert identity(plan_grid([PICO], ["seed=0,1"])) != base


def test_the_cluster_block_is_kept_apart_from_the_jobs_and_may_change() -> None:
    grid = plan_grid([PICO], ["seed=0,1"], ["cluster.gpus=2", "cluster.setup=[module load x]"])
    assert cluster_of(grid).gpus == 2
    assert cluster_of(grid).setup == ("module load x",)
    assert not [o for job in grid.jobs for o in job.overrides if "cluster" in o]
    more = recluster(grid, ["cluster.memory=64GB"])
    assert (cluster_of(more).gpus, cluster_of(more).memory) == (2, "64GB")
    with pytest.raises(GridError, match=r"only cluster\.KEY"):
        recluster(grid, ["seed=1"])
    with pytest.raises(GridError, match="memory"):
        recluster(grid, ["cluster.memory=much"])


def test_recipes_that_ask_the_cluster_for_different_things_are_refused(tmp_path: Path) -> None:
    text = Path(PICO).read_text().replace("path: data/", f"path: {Path(PICO).parent}/data/")
    for name, gpus in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.yaml").write_text(
            text.replace("name: pico_smoke", f"name: {name}") + f"cluster: {{gpus: {gpus}}}\n"
        )
    paths = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    with pytest.raises(GridError, match="ask the cluster for different things"):
        plan_grid(paths, [])
    assert cluster_of(plan_grid(paths, [], ["cluster.gpus=4"])).gpus == 4


def test_a_thousand_jobs_are_planned_from_one_reading(tmp_path: Path) -> None:
    grid = plan_grid([PICO], [f"seed={','.join(map(str, range(100)))}", "vector.lora.rank=1,2,3,4,5,6,7,8,9,10"])
    assert len({job.name for job in grid.jobs}) == 1000
    assert len(grid.preparations) == 100


def test_one_reading_of_a_file_is_not_changed_by_overrides() -> None:
    first = load_recipe(PICO, ["vector.lora.rank=7", "forget.where={continent: Asia}"]).recipe
    second = load_recipe(PICO).recipe
    assert first.vector.lora.rank == 7
    assert second.vector.lora.rank == 4
    assert second.forget is not None
    assert second.forget.where == {"continent": "Europe"}
    with pytest.raises(RecipeError):
        load_recipe(PICO, ["vector.lora.rank=0"])


def test_shell_lines_of_a_recipe_are_run_only_when_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNLEARN_TRUST_SETUP", raising=False)
    lines = ClusterSpec(setup=("rm -rf ~",))
    with pytest.raises(GridError, match=r"rm -rf ~\n.*UNLEARN_TRUST_SETUP=1"):
        require_trust(lines, ("cluster.memory=2GB",))
    require_trust(ClusterSpec(), ())
    require_trust(lines, ("cluster.setup=[rm -rf ~]",))  # the user's own words
    monkeypatch.setenv("UNLEARN_TRUST_SETUP", "1")
    require_trust(lines, ())


def test_settings_that_name_what_is_not_there(tmp_path: Path) -> None:
    """Folders, checkpoints and tasks are looked up for each job, not for the first one alone."""
    there = tmp_path / "earlier"
    there.mkdir()
    with pytest.raises(GridError, match=r"1 of 2 jobs(.|\n)*reuse: there is no run folder .*earlierr"):
        plan_grid([PICO], [f"reuse=[{there}],[{there}r]"])
    with pytest.raises(GridError, match=r"1 of 2 jobs(.|\n)*vector.msa.clean: there is no folder \./none"):
        plan_grid([PICO], ["vector={},{method: msa, msa: {clean: ./none}}"], ["teach=null"])
    tasks = "eval.tasks=[],[{task: wmdp_bioo}]"
    with pytest.raises(GridError, match=r"1 of 2 jobs(.|\n)*no task 'wmdp_bioo'; did you mean wmdp_bio"):
        plan_grid([PICO], [tasks])
