"""The plan of a dry run: right numbers, the model looked up without fetching it, and no heavy library."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn.errors import DataError, ModelError
from unlearn.model import locate as fetch
from unlearn.plan.words import plan
from unlearn.recipe.load import load_recipe
from unlearn.recipe.schema import METRICS, goal_metrics, kept_metrics
from unlearn.store import cache

RECIPE = """\
name: capitals
description: |
  Forget some capitals.
  And more text.
model: {path: pico:phi}
forget:
  path: europe.jsonl
  kind: qa
  prompt:
    train: ["Q: {question}", "Tell me: {question}", "So, {question}"]
    validation: "V {question}"
    test: "T {question}"
  shares: {train: 0.5, validation: 0.25, test: 0.25}
retain:
  - path: asia.jsonl
    kind: qa
utility:
  - path: passages.txt
    kind: text
    length: 16
    prefix: 4
vector:
  forget: {epochs: 3, batch_size: 4, accumulation: 2, learning_rate: 1e-3}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a recipe and its data, and empty caches."""
    for name, count in (("europe", 20), ("asia", 10)):
        rows = [{"question": f"{name} question {i}", "answer": f"{name} answer {i}"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = " ".join(f"word{i}" for i in range(400))
    (tmp_path / "passages.txt").write_text(words)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "held.jsonl").write_text('{"question": "Who?", "answer": "Nobody."}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNLEARN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "UNLEARN_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def flat(*overrides: str) -> str:
    """The plan on one line, so that wrapping does not matter."""
    return " ".join(plan(load_recipe("r.yaml", overrides)).split())


def test_the_whole_plan(here: Path) -> None:
    text = plan(load_recipe("r.yaml"))
    assert all(len(line) <= 110 for line in text.splitlines() if "  of " not in line)
    said = " ".join(text.split())
    assert f"recipe capitals ({here / 'r.yaml'}) Forget some capitals. model" in said
    assert "pico:phi a tiny random model built on the spot; nothing is downloaded" in said
    assert "forget europe qa 30 5 5 of 20 rows in europe.jsonl (each trained on in 3 phrasings)" in said
    assert "retain asia qa 5 2 3 of 10 rows in asia.jsonl" in said
    assert "passages of text are estimated" in said
    # 30 examples in batches of 4 are 8; two to a step are 4; three times over are 12
    assert (
        "LoRA of rank 16 (alpha 32) on every linear layer but the head; 30 examples, 3 epochs = 12 steps of 4 x 2"
        in said
    )
    assert "learning rate 0.001" in said
    assert "negate: theta - c * tau_f, scored on validation items at c = 0, 0.25, 0.5, 0.75, 1" in said
    assert "most forgetting of europe (prob)" in said
    assert "at least 95 % of the target model's score or at most +0.5 perplexity" in said
    assert "with ROUGE-L of written answers" in said
    assert said.partition(" absent ")[0].endswith("7. export: the edit as a PEFT adapter")


ALSO = "also_forget=[{path: asia.jsonl, kind: qa, name: more}]"
PASSAGES = "forget={path: passages.txt, kind: text, length: 16, prefix: 4, shares: {train: all}}"
FEW_ATTACKS = "robustness={quantize: [], contrast: false, lens: false, "
PLANS: dict[str, tuple[list[str], list[str], list[str]]] = {  # changes, what the plan then says, and what it does not
    "all stages": (
        [
            *("vector.method=contrast", "vector.mu=0.5", "vector.retain.steps=7", "teach={epochs: 1, batch_size: 5}"),
            *("vector.lora={rank: 4, alpha: 8, rslora: true, targets: [fc1, fc2]}", "teach.lora.rank=2"),
            "export={adapter: false, merged: true, dtype: bfloat16, stochastic_rounding: true}",
            *("eval={generate: none, tasks: [{task: hellaswag}]}", "model.quantize=nf4", "model.device=cpu"),
        ],
        [
            *("1. load", "2. teach", "3. fine", "4. fine", "5. make", "6. foresee", "7. negate", "8. choose"),
            "teach the model forget and retain sets first: LoRA of rank 2",
            "35 examples, 1 epoch = 7 steps of 5",
            "fine-tune on the retain sets, the same LoRA; 5 examples, 7 steps of 8",
            "rank-stabilised LoRA of rank 4 (alpha 8) on fc1, fc2",
            "theta - c * (tau_f - 0.5 * tau_r)",
            "and lm-eval's hellaswag",
            "export: merged weights in bfloat16, rounded stochastically",
            "else float32, on cpu; the LoRA is trained on a copy quantised to nf4",
        ],
        ["ROUGE-L", "benchmark:", "attack "],
    ),
    "methods in order": (
        [
            *("vector.method=[consensus, project, lines, learned, prune]", "vector.consensus.runs=4"),
            *("vector.project.energy=0.8", "vector.lines={a: 0.1, b: 0.9}", "vector.learned={by: module, steps: 12}"),
            *("vector.prune={keep: 0.25, by: magnitude}", "vector.retain_kl=two_sided", "vector.correlation=null"),
        ],
        [
            "negate: theta - c * prune(learned(lines(project(consensus(tau_f))))), scored on",
            "30 examples, 3 epochs = 12 steps of 4 x 2, learning rate 0.001; 4 times, with different seeds",
            "KL(theta || theta - c * tau) on retain items held down, c drawn from 0.25 to 1, 8 retain examples",
            "3. fine-tune on the retain sets, the same LoRA; 5 examples, 3 epochs",
            "consensus: the mean of 4 fine-tunings of different seeds where the signs of all agree",
            "project: take off what lies in the retain vector's row space (80 % of its squared norm)",
            "lines: scale layer l of L by 0.1 + 0.9 * l / (L - 1)",
            "learned: fit one coefficient per module by gradient on train items",
            "12 steps of 8 forget and 8 retain examples",
            "prune: keep the largest 25 % of every module's entries",
        ],
        ["foresee"],
    ),
    "a clean checkpoint": (
        ["vector.method=msa", "vector.msa={clean: some/where, alpha: 1.5}"],
        ["fine-tune on the forget set, from the clean checkpoint some/where:", "theta - c * (1.5 * tau_f - 1 * tau_r)"],
        [],
    ),
    "toward ignorance": (
        [
            *("vector.method=[ignorance, shrink]", "vector.ignorance={teacher: clean, clean: a/b}", "vector.inside=50"),
            "vector.retain_kl={sides: one, temperature: 4}",
        ],
        [
            "train by the divergence from ignorance on the forget set, toward the clean checkpoint a/b:",
            "with KL(theta || theta - tau) on retain items held down, temperature 4, 8 retain examples in every step; "
            "inside the shrinking by what layers read on retain items (50)",
            "ignorance: fit toward what a model says that never knew (teacher clean)",
            "shrink: shrink it along what it reads on retain items, mu 1000",
            "theta - c * shrink(tau_f)",
        ],
        [],
    ),
    "curvature": (
        [
            *("vector.method=[shrink, kfac, slopes]", "vector.shrink={mu: 10, forget: 2}", "vector.kfac.mu=1e4"),
            *("vector.slopes={samples: 5}", "vector.retain_kl={estimate: kfac, weight: 3, coefficients: [1, 2]}"),
        ],
        [
            "KL(theta || theta + tau) and KL(theta || theta - c * tau) on retain items held down, c from 1 to 2, "
            "weight 3, by its second order (K-FAC)",
            "shrink: shrink it along what it reads on retain items, mu 10, and not along what it reads on forget "
            "items, weight 2; kfac: shrink it along what retain items bring to either side of a module, mu 10000; "
            "slopes: one coefficient per component, so that the losses of 5 retain items do not move at first, mu 100;",
            "theta - c * slopes(kfac(shrink(tau_f)))",
        ],
        ["in every step"],
    ),
    "foresight": (
        ["vector.correlation={steps: 7, items: 33}"],
        ["3. foresee, on at most 33 items of each set, what the edit will cost; for that 7 steps of"],
        [],
    ),
    "foresight of equal length": (["vector.correlation.steps=null"], ["as many steps as for the forget set"], []),
    "nothing to keep": (["retain=[]"], [], ["fine-tuning on each retain set"]),
    "several requests": (
        [ALSO, "retain=[]", "vector.method=lines", "vector.correlation=null"],
        [
            "2. fine-tune on the forget set europe: LoRA of rank 16",
            "3. fine-tune on the forget set more, the same LoRA; 5 examples",
            "4. make of each vector what is subtracted. lines:",
            "5. balance: relative weights w of the 2 vectors",
            "6. negate: theta - c * (w_europe * lines(tau_europe) + w_more * lines(tau_more))",
            "most forgetting of europe (prob) and more (prob) on validation items, on average",
        ],
        [],
    ),
    "only trained on": (
        ["retain.0.shares={train: 1.0, validation: 0, test: 0}", "utility=[]", "eval.generate=sweep"],
        ["nothing was asked to be kept", "scored on validation items (and ROUGE-L of written answers) at c"],
        [],
    ),
    "passages": (
        [PASSAGES, "utility=[]"],
        ["epochs = about", "scored on what is trained on", "most forgetting of passages (perplexity)"],
        [],
    ),
    "a utility set with training items that nothing reads": (
        ["utility.0.shares={train: 0.4, validation: 0.3, test: 0.3}"], ["training items are read by nothing"], []
    ),
    "a utility set with training items": (
        ["utility.0.shares={train: 0.4, validation: 0.3, test: 0.3}", "vector.retain_kl=one_sided"],
        ["training items stand beside those of the retain sets"],
        [],
    ),
    "a retain set on the hub": (
        ["retain.0.path=hub:owner/set"], ["retain set qa not checked: on the hub (hub:owner/set)"], []
    ),
    "a test file on the hub": (
        ["retain.0.test={path: hub:owner/test}"], ["retain asia qa not checked: on the hub (hub:owner/test)"], []
    ),
    "a forget set on the hub": (
        ["forget.path=hub:owner/set", "vector.method=contrast"],
        [
            *("forget set qa not checked: on the hub", "retain asia qa 5 2 3"),
            "examples not counted (on the hub), 3 epochs in steps of 4 x 2",
        ],
        [],
    ),
    "comparisons": (
        [
            *("teach={steps: 1}", "reference=train", "benchmark={name: tofu, set: forget05, items: 30}"),
            *("holdout={path: held.jsonl, kind: qa}", "robustness={}"),
        ],
        [
            "reference: teach the base model the retain sets alone, in the same way; score it on the same test items",
            "benchmark: tofu forget05 on 3 models, the first 30 items of every set",
            "membership: can the forget set be told from held, which no model has seen?",
            "attack 3 models: copies in nf4 and int8, 20 steps of relearning on 8 forget items and on unrelated texts, "
            "other prompts (paraphrase, prefix, few-shot, template), a choice beside other prompts, the best of 8 "
            "samples and the logit lens",
        ],
        [],
    ),
    "a model as reference": (
        ["reference=pico:llama", "benchmark={name: tofu, set: forget05}"],
        [
            "reference: pico:llama, a model that never saw the forget set, scored on the same test items",
            "benchmark: tofu forget05 on 3 models, all items",
        ],
        ["compared with"],
    ),
    "published figures": (
        ["reference=published", "benchmark={name: muse, set: news}"],
        ["benchmark: muse news on 2 models, all items, compared with published"],
        ["reference:"],
    ),
    "some attacks": (
        [FEW_ATTACKS + "samples: 1, probes: [few_shot], relearn: {items: 1, steps: [1], unrelated: false}}"],
        ["attack 2 models: 1 step of relearning on 1 forget item, other prompts (few-shot) and the best of 1 sample"],
        [],
    ),
    "no attack": (
        [FEW_ATTACKS + "samples: 0, probes: [], relearn: null}"], ["attack 2 models: no attack is switched on"], []
    ),
    # passages have no question to reword; solved examples need a retain set of questions
    "attacks on passages": (
        [PASSAGES, "utility=[]", "robustness={quantize: [], samples: 0, relearn: null}"],
        ["attack 2 models: other prompts (prefix) and the logit lens"],
        [],
    ),
    "no solved examples": (
        [
            "retain=[{path: passages.txt, kind: text, length: 16, prefix: 4}]",
            *("utility=[]", FEW_ATTACKS + "samples: 0, probes: [prefix, few_shot], relearn: null}"),
        ],
        ["attack 2 models: other prompts (prefix)"],
        ["few-shot"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_what_a_plan_says(here: Path, name: str) -> None:
    changes, expected, absent = PLANS[name]
    said = flat(*changes)
    assert [part for part in expected if part not in said] == []
    assert [part for part in absent if part in said.partition(" absent ")[0]] == []


@pytest.mark.parametrize(
    ("method", "edit", "fits"),
    [
        ("msa", "theta - c * (1 * tau_f - 1 * tau_r)", ["the forget set, from the", "the retain sets, from"]),
        ("contrast", "theta - c * (tau_f - 1 * tau_r)", ["fine-tune on the forget set:", "on the retain sets"]),
        ("random", "theta - c * random(tau_f)", ["fine-tune on the forget set:"]),
        ("npo", "theta - c * (theta - theta_npo)", ["train by NPO on the forget set:"]),
        ("DPO", "theta - c * (theta - theta_idk_dpo)", ["train by DPO toward refusals on the forget set:"]),
        ("rmu", "theta - c * (theta - theta_rmu)", ["train by RMU on the forget set:"]),
        ("ihl", "theta - c * (theta - theta_ihl)", ["train by the inverted hinge loss on the forget set:"]),
        ("gradient_ascent", "theta - c * (theta - theta_gradient_ascent)", ["train by gradient ascent on"]),
        ("retain_only", "theta - c * (theta - theta_retain_only)", ["fine-tune on the retain sets:"]),
    ],
)
def test_sources_and_what_they_train(here: Path, method: str, edit: str, fits: list[str]) -> None:
    said = flat(f"vector.method={method}", "teach.epochs=1")
    assert f"negate: {edit}, scored on" in said
    assert all(fit in said for fit in fits)
    assert said.count("fine-tune on") + said.count("train by") == len(fits)


def test_addition_and_analogy(here: Path) -> None:
    base = (here / "r.yaml").read_text().replace("forget:\n  path", "FORGET:\n  path")
    head, rest = base.split("FORGET:")
    _, rest = rest.split("retain:")
    learn = "learn:\n  - {path: europe.jsonl, kind: qa, name: new, shares: {train: 0, validation: 0.5, test: 0.5}}\n"
    pair = "learn: [{path: europe.jsonl, kind: qa}, {path: asia.jsonl, kind: qa}]\n"
    no_retain = "utility:" + rest.split("utility:")[1]
    (here / "r.yaml").write_text(head + pair + no_retain)
    said = flat()
    assert "learn europe qa 10 4 6" in said
    assert "add: theta + c * (w_europe * tau_europe + w_asia * tau_asia), scored on" in said
    assert "most learning of europe (prob) and asia (prob)" in said
    assert "foresee" not in said
    rows = {n: [{"question": f"{n} {i}?", "answer": f"{n} {i}"} for i in range(6)] for n in "abc"}
    for name, lines in rows.items():
        (here / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    analogy = "analogy: {a: {path: a.jsonl, kind: qa}, b: {path: b.jsonl, kind: qa}, c: {path: c.jsonl, kind: qa}}\n"
    (here / "r.yaml").write_text(head + learn + analogy + no_retain)
    said = flat()
    assert "add by analogy: theta + c * (tau_c + tau_b - tau_a), scored on" in said
    assert [said.count(f"fine-tune on the term set {name}") for name in "abc"] == [1, 1, 1]
    assert "fine-tune on the learn set" not in said
    assert "term a qa 3 0 0 of 6 rows" in said


MISTAKES: list[tuple[str, type[Exception], str]] = [
    ("forget.path=absent.jsonl", DataError, r"forget set 'absent': .*absent\.jsonl: no such file"),
    ("retain.0.path=europe.jsonl", DataError, "to be forgotten and kept"),
    ("model.path=./absent", ModelError, r"there is no folder \./absent .*; set model\.path to a folder"),
    ("model.path=empty", ModelError, r"empty has no config\.json"),
    ("model.path=absent.gguf", ModelError, r"there is no file absent\.gguf .*set model\.path to a folder"),
    ("model.path=pico:ph", ModelError, r"there is no pico:ph; there are phi, llama, .*; did you mean '?pico:phi'?\?"),
    ("model.path=wheel:no-such==1.0/m.gguf", ModelError, "needs its file's checksum at the end"),
    (f"model.path=wheel:no-such/m.gguf#sha256={'ab' * 32}", ModelError, "does not read as wheel:NAME==VERSION"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISTAKES)
def test_mistakes_in_data_and_model(here: Path, change: str, error: type[Exception], message: str) -> None:
    (here / "empty").mkdir()
    with pytest.raises(error, match=message):
        flat(change)


def test_metrics_of_a_recipe(here: Path) -> None:
    tasks = "eval.tasks=[{task: hellaswag, metric: acc_norm}, {task: wmdp_bio, set: forget}]"
    recipe = load_recipe("r.yaml", [tasks]).recipe
    assert goal_metrics(recipe) == (("forget", "europe", METRICS["qa"][0]),)
    assert METRICS["qa"][0] == "prob"
    assert kept_metrics(recipe) == (
        ("retain", "asia", "prob"),
        ("utility", "passages", "perplexity"),
        ("utility", "hellaswag", "acc_norm"),
    )
    named = load_recipe("r.yaml", [tasks, "choose.kept=[exact, loss, exact]"]).recipe
    assert kept_metrics(named) == (
        ("retain", "asia", "exact"),
        ("retain", "asia", "loss"),
        ("utility", "passages", "loss"),
        ("utility", "hellaswag", "acc_norm"),
    )
    alone = load_recipe("r.yaml", ["choose.kept=[exact]"]).recipe
    assert kept_metrics(alone) == (("retain", "asia", "exact"), ("utility", "passages", "perplexity"))


def test_where_a_model_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "whole").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (here / "whole" / name).write_text("{}")
    (here / "m.gguf").write_bytes(b"GGUF")
    snapshot = here / "hub" / "hub" / "models--owner--there" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    digest = "ab" * 32
    wheel = f"model.path=wheel:no-such-package==1.0/folder/m.gguf#sha256={digest}"
    for changes, message in (
        (["model.path=whole"], f"the local folder {here / 'whole'}; nothing is downloaded"),
        (["model.path=m.gguf"], f"the local file {here / 'm.gguf'}, converted to safetensors once; nothing is"),
        (["model.path=owner/name"], "DOWNLOADED once from the hub, unless"),
        (["model.path=owner/name", "model.revision=abc"], "DOWNLOADED once from the hub, revision abc, unless"),
        (["model.path=owner/there"], "in the hub's local cache"),
        ([wheel], "DOWNLOADED once from the package index (no-such-package==1.0)"),
    ):
        assert message.replace(" ", "") in flat(*changes).replace(" ", "")  # a long path is cut to the width
    monkeypatch.setenv("UNLEARN_OFFLINE", "1")
    for change in ("model.path=owner/name", wheel):
        with pytest.raises(ModelError, match="going online is forbidden"):
            flat(change)
    # the entry is named as the code that fetches names it
    cache.entry(here / "cache", fetch.conversion(digest), lambda folder: None)
    assert "converted before and in the cache; nothing is downloaded" in flat(wheel)


def test_the_plan_costs_no_heavy_library(here: Path) -> None:
    heavy = ("torch", "transformers", "datasets", "peft", "lm_eval", "numpy", "pyarrow", "huggingface_hub")
    code = (
        "import sys; from unlearn.recipe.load import load_recipe; from unlearn.plan.words import plan;"
        f"plan(load_recipe('r.yaml', ['retain.0.path=hub:a/b', 'model.path=a/b']));"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HOME": str(here)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


MORE = RECIPE + "holdout: {path: held.jsonl, kind: qa}\nrobustness: {quantize: []}\n"
TOFU = "benchmark: {name: tofu, set: forget01}\n"
TOXIC = "eval: {generate: none, tasks: [{task: unlearn_toxicity, metric: toxicity, whole: true}]}\n"
NEVER = "no reference (a model that never saw the forget set"
SCORES = {
    "neither": (RECIPE, [f"a reference's scores beside all others: {NEVER})", "membership inference (AUC): no holdout",
                         "attacks: no robustness"]),
    "a benchmark": (MORE + TOFU, [f"forget quality: {NEVER}, its log)", "by the difference to a reference: no"]),
    "MUSE": (MORE + "benchmark: {name: muse, set: news}\n", [f"PrivLeak: {NEVER}, its log, or published)"]),
    "published": (MORE + "benchmark: {name: muse, set: news}\nreference: published\n", ["reference is no model"]),
    "all": (MORE + "reference: pico:phi\nteach: {steps: 1}\n", []),
    "a judge": (MORE + "reference: train\nteach: {steps: 1}\n" + TOXIC, [
        "ROUGE-L of written answers: eval.generate is none",
        "unlearn_toxicity: the package detoxify is not installed, and the run would stop at it: pip install detoxify"]),
}  # fmt: skip


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_will_be_absent_are_named(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, wanted = SCORES[name]
    (here / "r.yaml").write_text(recipe)
    monkeypatch.setitem(sys.modules, "detoxify", None)  # as if it were not installed
    text = " ".join(plan(load_recipe("r.yaml")).split())
    told = text.partition(" absent ")[2]
    assert bool(told) == bool(wanted)
    for line in wanted:
        assert line in told
