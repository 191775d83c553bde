"""lm-eval's command line with our model in it, from the shell, from Python, and in two processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from facts import capital_rows
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from unlearn import cli
from unlearn.data.encoding import encode_pair
from unlearn.errors import EvaluationError
from unlearn.model.load import Loaded
from unlearn.model.pico import corpus
from unlearn.recipe.load import tasks_folder
from unlearn.score import harness
from unlearn.score.packed import PackedLM
from unlearn.score.tasks import _with_children, task_manager
from unlearn.vector.change import LowRank
from unlearn.vector.edit import subtracted
from unlearn.vector.task_vector import TaskVector

Items = dict[str, str]
Found = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
# Two that the pack has not: a few examples before each question, and a text scored whole, in windows.
SHOTS = """
task: shots
custom_dataset: !function unlearn_tasks.load_items
dataset_kwargs: {kind: mcq}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
WHOLE = """
task: whole
custom_dataset: !function unlearn_tasks.load_items
dataset_kwargs: {kind: text}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}{{target}}"
metric_list: [{metric: bits_per_byte}]
"""
TASKS = ["unlearn_mcq", "unlearn_qa", "unlearn_text", "unlearn_text_memory", "unlearn_qa_rouge", "shots", "whole"]
COUNTS = dict(zip(TASKS, (7, 5, 3, 3, 5, 7, 3), strict=True))  # odd, so that two processes have unequal parts
WINDOW = 128  # lm-eval cuts prompts to it; what is generated takes up 64 of it


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets up logging and the environment once for a process; here it is run more than once."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)
    logger = logging.getLogger("lm_eval")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])


@pytest.fixture(scope="module")
def model(pico_phi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico Phi with a chat template."""
    folder = tmp_path_factory.mktemp("model") / "phi"
    shutil.copytree(pico_phi, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes the model."""
    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task pack and two more tasks."""
    folder = tmp_path_factory.mktemp("tasks") / "pack"
    shutil.copytree(tasks_folder(), folder)
    (folder / "shots.yaml").write_text(SHOTS, "utf-8")
    (folder / "whole.yaml").write_text(WHOLE, "utf-8")
    return folder


@pytest.fixture(scope="module")
def items(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Items:
    """A few items of each kind, as ``--metadata`` takes them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    folder, kinds = tmp_path_factory.mktemp("items"), dict[str, list[Found]](mcq=[], qa=[], text=[])
    for row in capital_rows(COUNTS["unlearn_mcq"]):
        prompt, choices, target = f"Question: {row['question']}\nAnswer:", list(row["choices"]), str(row["answer"])
        counts = [len(encode_pair(tokenizer, prompt, f" {choice}")[1]) for choice in choices]
        mcq = {"prompt": prompt, "choices": choices, "answer": row["correct"], "target": target}
        kinds["mcq"].append({**mcq, "choice_tokens": counts})
        if len(kinds["qa"]) < COUNTS["unlearn_qa"]:
            kinds["qa"].append({"prompt": prompt, "target": target, "target_tokens": max(counts)})
    lines = corpus()
    for number in range(COUNTS["unlearn_text"]):
        prompt, target = "\n".join(lines[number : 8 * (number + 1)]), f" Snow is white, and {lines[number][:20]}"
        tokens = len(encode_pair(tokenizer, prompt, target)[1])
        kinds["text"].append({"prompt": prompt, "target": target, "target_tokens": tokens})
    assert len(tokenizer.encode(kinds["text"][-1]["prompt"])) > 1.5 * WINDOW
    for kind, rows in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return {kind: str(folder / f"{kind}.jsonl") for kind in kinds}


def score(name: str, model: Path, pack: Path, items: Items, more: str = "", **options: Any) -> Found:
    manager = TaskManager(include_defaults=False, include_path=str(pack), metadata={"items": items})
    arguments = f"pretrained={model},dtype=float32,max_length={WINDOW}{more}"
    if name == "hf":
        # With its cache, lm-eval 0.4.13 scores a text wrongly where it was also asked for cut at an earlier place, as
        # two of the tasks do: the log-probabilities are read off from where the longer continuation begins.
        arguments += ",logits_cache=False"
    options = {"tasks": TASKS, "batch_size": 1, "device": "cpu", **options}
    return simple_evaluate(model=name, model_args=arguments, task_manager=manager, **options)


@pytest.fixture(scope="module")
def theirs(model: Path, pack: Path, items: Items) -> Found:
    """What lm-eval's own model gives."""
    return score("hf", model, pack, items)


@pytest.fixture(scope="module")
def ours(model: Path, pack: Path, items: Items) -> Found:
    """The same from our model."""
    return score("unlearn", model, pack, items, ",batch_tokens=200")


def assert_same(found: Found, wanted: Found, within: float = 1e-4) -> None:
    """The same tasks, scores and items, and for each item the same answers, greedy flags, texts and metrics."""
    assert found["results"].keys() == wanted["results"].keys() == found["samples"].keys() == wanted["samples"].keys()
    for task, scores in wanted["results"].items():
        assert_close(found["results"][task], scores, within, task)
        assert found["n-samples"][task] == wanted["n-samples"][task]
        samples = {row["doc_id"]: row for row in found["samples"][task]}
        assert len(samples) == len(found["samples"][task]) == len(wanted["samples"][task])
        for row in wanted["samples"][task]:
            assert_close(samples[row["doc_id"]], row, within, f"{task} {row['doc_id']}")


def assert_close(found: Found, wanted: Found, within: float, where: str) -> None:
    assert found.keys() == wanted.keys(), where
    for key in wanted.keys() - {"doc", "arguments", "target"}:  # as lm-eval writes them, they look different
        for a, b in zip(flat(found[key]), flat(wanted[key]), strict=True):
            same = abs(a - b) <= within + 1e-6 * abs(b) if isinstance(a, float) and isinstance(b, float) else a == b
            assert same, (where, key, a, b)


def flat(value: Any) -> list[float | str]:
    """Nested answers as one list; what was written as text becomes a number again."""
    if isinstance(value, list | tuple):
        return [part for inner in value for part in flat(inner)]
    try:
        return [float({"True": 1, "False": 0}.get(value, value))]
    except (TypeError, ValueError):
        return [str(value)]


def test_every_sample_is_as_with_lm_evals_own_model(ours: Found, theirs: Found) -> None:
    assert_same(ours, theirs)
    assert {task: len(rows) for task, rows in ours["samples"].items()} == COUNTS
    assert ours["config"]["model"] == "unlearn"
    accuracies = {row["acc"] for row in ours["samples"]["unlearn_mcq"] + ours["samples"]["shots"]}
    assert len(accuracies) == 2, "where all answers are right, or all wrong, nothing is compared"


def test_an_adapter_is_scored(model: Path, pack: Path, items: Items, theirs: Found, adapter: Path) -> None:
    options = {"more": f",peft={adapter}", "tasks": ["unlearn_mcq", "unlearn_qa_rouge"]}
    wanted = score("hf", model, pack, items, **options)
    assert_same(score("unlearn", model, pack, items, **options), wanted)
    before, after = (found["results"]["unlearn_mcq"]["logprob,none"] for found in (theirs, wanted))
    assert abs(before - after) > 0.1


def test_answers_are_cached_by_model(
    model: Path, pack: Path, items: Items, theirs: Found, adapter: Path, tmp_path: Path
) -> None:
    """The same file for all: each model finds its own answers, and no other one's."""
    options: Found = {"use_cache": str(tmp_path / "answers"), "tasks": ["unlearn_qa", "whole"]}
    subset = {key: {t: theirs[key][t] for t in options["tasks"]} for key in ("results", "samples", "n-samples")}
    assert_same(score("unlearn", model, pack, items, **options), subset)
    (file,) = tmp_path.iterdir()
    size = file.stat().st_mtime_ns
    assert_same(score("unlearn", model, pack, items, ",batch_tokens=200", **options), subset)
    assert file.stat().st_mtime_ns == size, "asked again"
    # the same factors with another scale, which stands in the configuration alone
    stronger = changed(adapter, tmp_path / "stronger", lambda _: None, lora_alpha=40)
    for more in (f",peft={adapter}", f",peft={stronger}", ",add_bos_token=True"):
        wanted = score("hf", model, pack, items, more, tasks=options["tasks"])
        found = score("unlearn", model, pack, items, more, **options)
        assert_same(found, wanted)
        assert found["results"] != subset["results"]
    # another tokenizer for the same weights: the same texts are other tokens
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    assert_same(
        score("unlearn", other, pack, items, **options), score("hf", other, pack, items, tasks=options["tasks"])
    )


def test_answers_are_cached_by_edit(phi: Loaded, pack: Path, items: Items, tmp_path: Path) -> None:
    """In float32 an edit is in the weights, else beside them, where no key could tell it."""
    vector = TaskVector({"model.layers.1.mlp.fc1": LowRank(torch.randn(2, 64), torch.randn(128, 2))})
    manager = TaskManager(include_defaults=False, include_path=str(pack), metadata={"items": items})

    def scored(**options: Any) -> float:
        lm = PackedLM(phi.model, phi.tokenizer, max_length=WINDOW)
        found = simple_evaluate(model=lm, tasks=["unlearn_qa"], task_manager=manager, **options)
        value: float = found["results"]["unlearn_qa"]["loss,none"]
        return value

    cache = str(tmp_path / "answers")
    before = scored(use_cache=cache)
    with subtracted(phi.model, vector, 1.0):
        after = scored(use_cache=cache)
        assert after == scored()
    assert before == scored(use_cache=cache) != after
    phi.model.bfloat16()
    with subtracted(phi.model, vector, 1.0), pytest.raises(EvaluationError, match="edited by hooks beside its weights"):
        scored(use_cache=cache)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--model", "hf", "--use_cache", "CACHE"], "--use_cache: lm-eval keeps answers by their texts alone"),
        (["--use_cache", "CACHE"], "--use_cache: lm-eval keeps answers by their texts alone"),
        (["--config", "CONFIG"], "--use_cache: lm-eval keeps answers by their texts alone"),
        (
            ["--model", "unlearn", "--cache_requests", "--metadata", "a=b"],
            "--cache_requests: lm-eval keeps requests by",
        ),
    ],
)
def test_caches_that_know_too_little_are_refused(
    more: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(f"model: hf\nuse_cache: {tmp_path / 'answers'}\n", "utf-8")
    places = {"CACHE": str(tmp_path / "answers"), "CONFIG": str(tmp_path / "config.yaml")}
    assert cli.main(["harness", "--tasks", "unlearn_qa", *(places.get(word, word) for word in more)]) == 2
    told = capfd.readouterr().err
    assert told.count("error:") == 1
    assert said in told
    assert not list(tmp_path.glob("answers*"))


def refused(said: str, pretrained: Path, more: str = "", device: str | None = "cpu") -> None:
    with pytest.raises(EvaluationError, match=said):
        PackedLM.create_from_arg_string(f"pretrained={pretrained}{more}", {"device": device})


def changed(adapter: Path, to: Path, change: Callable[[Found], Any], **config: Any) -> Path:
    """A copy of an adapter with other factors, or another configuration."""
    shutil.copytree(adapter, to)
    factors = load_file(to / "adapter_model.safetensors")
    change(factors)
    save_file(factors, to / "adapter_model.safetensors", {"format": "pt"})
    settings = json.loads((to / "adapter_config.json").read_text("utf-8"))
    (to / "adapter_config.json").write_text(json.dumps(settings | config), "utf-8")
    return to


def test_adapters_that_do_not_fit_are_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    def other_names(factors: Found) -> None:
        for name in list(factors):
            factors[name.replace(".layers.", ".blocks.")] = factors.pop(name)

    def one_more(factors: Found) -> None:
        for name in [n for n in factors if "layers.1.self_attn.q_proj" in n]:
            factors[name.replace("q_proj", "k_proj")] = factors[name].clone()

    def one_less(factors: Found) -> None:
        for name in [n for n in factors if "layers.1.mlp.fc1" in n]:
            del factors[name]

    def narrow(factors: Found) -> None:
        name = next(n for n in factors if n.endswith("fc1.lora_A.weight"))
        factors[name] = factors[name][:, :10].clone()

    for number, (change, said) in enumerate(
        {
            other_names: r"no place for: model\.blocks\.0.*\n.*holds nothing for: model\.layers\.0",
            one_more: r"no place for: model\.layers\.1\.self_attn\.k_proj\.lora_A, model.*k_proj\.lora_B$",
            one_less: r"holds nothing for: model\.layers\.1\.mlp\.fc1\.lora_A, model\.layers\.1\.mlp\.fc1\.lora_B$",
            narrow: r"size mismatch for .*fc1\.lora_A",
        }.items()
    ):
        refused(said, model, f",peft={changed(adapter, tmp_path / str(number), change)}")
    unreached = changed(adapter, tmp_path / "unreached", lambda _: None, target_modules=["q_proj"])
    refused(r"no place for: model\.layers\.0\.mlp\.fc1", model, f",peft={unreached}")
    nowhere = changed(adapter, tmp_path / "nowhere", lambda _: None, target_modules=["c_attn"])
    refused("does not fit .*c_attn", model, f",peft={nowhere}")
    refused("does not fit .*adapter_config.json", model, f",peft={model}")


def test_an_adapter_as_a_model_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    """transformers finds the base by itself, and drops the factors that do not fit without a word."""
    both = tmp_path / "both"
    shutil.copytree(adapter, both)
    config = json.loads((both / "adapter_config.json").read_text("utf-8"))
    (both / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(model)}), "utf-8")
    shutil.copytree(model, both, dirs_exist_ok=True)
    refused("is an adapter, or holds one: give its base as pretrained", both)
    refused("is an adapter, or holds one: give its base as pretrained", adapter)


def test_a_head_of_its_own_is_kept(pico_llama: Path, tmp_path: Path) -> None:
    """lm-eval ties what it has loaded once more, as the configuration says."""
    shutil.copytree(pico_llama, tmp_path / "head")
    stored = load_file(pico_llama / "model.safetensors")
    head = stored["model.embed_tokens.weight"] + 0.05 * torch.randn(stored["model.embed_tokens.weight"].shape)
    save_file({**stored, "lm_head.weight": head}, tmp_path / "head" / "model.safetensors", {"format": "pt"})
    lm = PackedLM(str(tmp_path / "head"), dtype="float32", device="cpu")
    assert torch.equal(lm.model.lm_head.weight, head)
    assert torch.equal(lm.model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    lm = PackedLM(AutoModelForCausalLM.from_pretrained(tmp_path / "head"), AutoTokenizer.from_pretrained(pico_llama))
    assert torch.equal(lm.model.lm_head.weight, head)


def python(code: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=SECONDS, check=False, **more)


def test_help_no_arguments_and_wrong_ones(capsys: pytest.CaptureFixture[str]) -> None:
    done = python(["-m", "unlearn", "harness", "--help"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: unlearn harness")
    assert "--model unlearn" in done.stdout
    assert "lm-eval " not in done.stdout
    harness.register()  # once more, now that the name stands for the class
    assert (get_model("unlearn"), get_model("hf")) == (PackedLM, HFLM)
    before = sys.argv
    assert cli.main(["harness"]) == 0
    assert "COMMAND" in capsys.readouterr().out
    assert cli.main(["harness", "ls", "everything"]) == 2
    said = capsys.readouterr().err
    assert "unlearn harness" in said
    assert "everything" in said
    assert sys.argv is before


def command(model: Path, pack: Path, items: Items, out: Path, more: str = "") -> list[str]:
    return [
        *("--model", "unlearn", "--model_args", f"pretrained={model},dtype=float32,max_length={WINDOW}{more}"),
        *("--tasks", ",".join(TASKS), "--include_path", str(pack), "--metadata", json.dumps({"items": items})),
        *("--device", "cpu", "--output_path", str(out), "--log_samples"),
    ]


def read(out: Path) -> Found:
    """Results and samples as they were written; exactly one file of results."""
    (results,) = out.rglob("results_*.json")
    found: Found = json.loads(results.read_text("utf-8"))
    paths = {task: list(out.rglob(f"samples_{task}_2*.jsonl")) for task in found["results"]}
    found["samples"] = {t: [json.loads(x) for p in ps for x in p.read_bytes().splitlines()] for t, ps in paths.items()}
    assert all(len(ps) == 1 for ps in paths.values())
    return found


def test_lm_evals_options(
    model: Path, pack: Path, items: Items, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--limit", "2", "--apply_chat_template", "--batch_size", "auto", "--seed", "7", "--gen_kwargs"]
    out = tmp_path / "out"
    assert cli.main(["harness", *command(model, pack, items, out, ",batch_tokens=300"), *more, "max_gen_toks=5"]) == 0
    printed = capsys.readouterr().out
    assert "|unlearn_mcq" in printed
    assert "batch_tokens" in printed
    options = {"limit": 2, "apply_chat_template": True, "fewshot_random_seed": 7, "gen_kwargs": "max_gen_toks=5"}
    wanted = score("hf", model, pack, items, **options)
    assert "<user>" in wanted["samples"]["unlearn_mcq"][0]["arguments"][0][0]
    assert_same(read(out), wanted)


def test_a_mistake_is_one_message_and_exit_code_2(
    model: Path, pack: Path, items: Items, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["harness", *command(model, pack, items, tmp_path / "out", ",backend=seq2seq")]) == 2
    said = capfd.readouterr().err
    assert said.count("error:") == 1
    assert "backend=seq2seq" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["hellaswag"], ["mmlu", "arc_easy"], ["leaderboard"], ["ai2_arc"], ["chain_of_thought"]]
)
def test_a_small_index_is_part_of_the_whole_one(names: list[str], whole_index: TaskManager) -> None:
    """The same tasks, groups and tags, of the same files, and all that groups among them name."""
    small = task_manager(names)
    wanted = _with_children(whole_index, names)
    assert wanted == _with_children(small, names)
    assert small.match_tasks(names) == whole_index.match_tasks(names)
    for name in wanted & whole_index.task_index.keys():
        here, there = small.task_index[name], whole_index.task_index[name]
        assert (here.yaml_path, here.tags, here.kind) == (there.yaml_path, there.tags, there.kind)
    assert len(small.all_tasks) < len(whole_index.all_tasks) / 4


@pytest.fixture(scope="module")
def whole_index() -> TaskManager:
    return TaskManager()


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_what_one_gives(
    model: Path, pack: Path, items: Items, ours: Found, theirs: Found, tmp_path: Path
) -> None:
    # One process has answered a part before: what it then need not ask, the other must not wait for.
    score("unlearn", model, pack, items, tasks=TASKS[:2], use_cache=str(tmp_path / "answers"))
    assert [path.name for path in tmp_path.iterdir()] == ["answers_rank0.db"]
    done = python(
        [
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "unlearn"),
            "harness",
            *command(model, pack, items, tmp_path / "out"),
            *("--use_cache", str(tmp_path / "answers")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = read(tmp_path / "out")
    assert_same(found, theirs)
    assert_same(found, ours, within=1e-5)
    assert done.stdout.count("|unlearn_mcq") == 1
    for task, rows in ours["samples"].items():
        assert [row["doc_id"] for row in found["samples"][task]] == [row["doc_id"] for row in rows]


def request(text: tuple[Any, ...], task: str | None = None, doc: int | None = None) -> Instance:
    return Instance("loglikelihood", {}, text, 0, (task, doc, 1))


TOGETHER = """
import json, os, sys
from lm_eval.api.instance import Instance
from unlearn import processes as distributed
from unlearn.errors import EvaluationError
from unlearn.score.packed import PackedLM

class Counting(PackedLM):
    asked = 0
    def _loglikelihood_tokens(self, requests, **options):
        self.asked += len(requests)
        if any(text and text[1] == " worse" for text, *_ in requests):
            raise MemoryError
        return super()._loglikelihood_tokens(requests, **options)

class Mute:
    _rank, _world_size = 1, 2
    def set_cache_hook(self, hook):
        pass
    def loglikelihood(self, requests):
        return [r.args[0] for r in requests]
    loglikelihood_rolling = generate_until = loglikelihood

def ask(*texts):
    return [Instance("", {}, t, 0) for t in texts]

def said(*texts):
    try:
        return lm.loglikelihood(ask(*texts))
    except (EvaluationError, MemoryError, RuntimeError) as e:
        return [type(e).__name__, str(e)]

distributed.join()
lm = Counting(sys.argv[1], dtype="float32", device="cpu")
rank = os.environ["RANK"]
pairs = [("The capital of " * n, " France" * (n % 3 + 1)) for n in range(1, 8)]
greedy = {"until": [], "max_gen_toks": 4, "do_sample": False}
told = {
    "pairs": lm.loglikelihood(ask(*pairs), disable_tqdm=True),
    "one": lm.loglikelihood(ask(pairs[0])),
    "none": lm.loglikelihood([]),
    "whole": lm.loglikelihood_rolling(ask(("A dog",), ("Snow is white.",), ("Snow",))),
    "texts": lm.generate_until(ask(("A dog", greedy), ("Snow is", greedy), ("The", greedy))),
    "bad": said(("A", " dog"), (" ", " dog"), ("Snow", " is")),
    "worse": said(("A", " dog"), ("A", " worse")),
    "differing": said(("A", " dog" * (int(rank) + 1))),
}
seen = [lm.rank, lm.world_size]
mute = Mute()
distributed.share_requests(mute)
distributed.share_requests(mute)
told["mute"] = [mute.loglikelihood(ask(("x",), ("y",))), mute._rank, mute._world_size]
asked = lm.asked
distributed.leave()
lm.loglikelihood(ask(*pairs[:2]))
print(json.dumps([told, seen, asked, lm.asked - asked]))
"""


def test_shared_requests_give_all_processes_all_answers(model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(model)],
            env={**os.environ, **where, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    ended = [process.communicate(timeout=SECONDS) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    (told, seen, asked, alone), (other, other_seen, other_asked, other_alone) = (json.loads(out) for out, _ in ended)
    assert told == other
    assert seen == other_seen == [0, 1]
    lm = PackedLM(str(model), dtype="float32", device="cpu")
    pairs = [("The capital of " * n, " France" * (n % 3 + 1)) for n in range(1, 8)]
    assert flat(told["pairs"]) == pytest.approx(flat(lm.loglikelihood([request(pair) for pair in pairs])), abs=1e-5)
    assert flat(told["one"]) == pytest.approx(flat(told["pairs"][:1]), abs=1e-5)
    assert told["none"] == []
    passages = [request((text,)) for text in ("A dog", "Snow is white.", "Snow")]
    assert told["whole"] == pytest.approx(lm.loglikelihood_rolling(passages), abs=1e-5)
    greedy = {"until": [], "max_gen_toks": 4, "do_sample": False}
    texts = lm.generate_until([request((text, greedy)) for text in ("A dog", "Snow is", "The")])
    assert told["texts"] == texts
    assert len(set(texts)) > 1
    assert told["bad"][0] == "EvaluationError"
    assert "white space" in told["bad"][1]
    assert told["worse"][0] == "MemoryError"
    assert told["differing"][0] == "RuntimeError"
    assert "differ" in told["differing"][1]
    assert told["mute"] == [["x", "y"], 0, 1]
    # every request was scored once: 7 pairs, 1, 3 passages, 3 and 2 with an error, and the first of the differing ones
    assert asked + other_asked == 7 + 1 + 3 + 3 + 2 + 1
    assert min(asked, other_asked) >= 5
    assert (alone, other_alone) == (2, 2)
