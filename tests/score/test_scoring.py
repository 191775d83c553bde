"""Packed scoring against lm-eval's own model, request by request."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Live
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
)

from unlearn.errors import EvaluationError
from unlearn.evidence.attacks_weights import quantised
from unlearn.model.load import Loaded
from unlearn.model.pico import corpus
from unlearn.recipe.evaluation import EvalSpec
from unlearn.score import forward, harness
from unlearn.score.forward import Attention, Forward, KeysValues, lay_out
from unlearn.score.packed import PackedLM, interface
from unlearn.score.tree import Costs, Piece
from unlearn.vector.change import LowRank
from unlearn.vector.edit import Edit
from unlearn.vector.task_vector import TaskVector

Patch = pytest.MonkeyPatch
Log = pytest.LogCaptureFixture
FAMILIES = ["phi", "llama", "gpt2", "qwen2", "gpt_neox"]
Load = Callable[..., Loaded]
Texts = list[tuple[str, str]]
ODD = "Naïve cafés – 東京 is 😀  far,\n\n\tand 12345 ... done."


@pytest.fixture(params=FAMILIES)
def got(request: pytest.FixtureRequest, loaded: Load) -> Loaded:
    return loaded(request.getfixturevalue(f"pico_{request.param}"))


def reference(model: Loaded, **options: Any) -> HFLM:
    return HFLM(pretrained=model.model, tokenizer=model.tokenizer, backend="causal", batch_size=4, **options)


def packed(model: Loaded, **options: Any) -> PackedLM:
    return PackedLM(model.model, model.tokenizer, **options)


def asked(texts: Sequence[tuple[Any, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, arguments, i) for i, arguments in enumerate(texts)]


def assert_same(got: Sequence[tuple[float, bool]], wanted: Sequence[tuple[float, bool]], within: float = 1e-4) -> None:
    assert len(got) == len(wanted)
    for i, ((value, greedy), (other, other_greedy)) in enumerate(zip(got, wanted, strict=True)):
        # lm-eval adds up a long answer in float32, hence the second term
        assert abs(value - other) <= within + 1e-6 * abs(other), (i, value, other)
        assert greedy is other_greedy, i


def compare(model: Loaded, texts: Texts, **options: Any) -> list[tuple[float, bool]]:
    lm = packed(model, **options)
    answers = lm.loglikelihood(asked(texts))
    assert lm.packs  # not by way of lm-eval's own code
    assert_same(answers, reference(model).loglikelihood(asked(texts), disable_tqdm=True))
    return answers


def questions() -> Texts:
    """Four choices each: of one token and of several, sharing beginnings, some questions sharing theirs."""
    cities = ["Paris", "Rome", "Madrid", "Papeete on Tahiti", "Paris, France", "New York"]
    texts = []
    for country in ("France", "Italy", "Francia", "Spain", "Peru"):
        for template in ("The capital of {} is", "Question: What is the capital of {}?\nAnswer:"):
            texts += [(template.format(country), f" {city}") for city in cities]
    return texts


EXAMPLES = "".join(f"Question: What is the capital of {x}?\nAnswer: {y}\n\n" for x, y in [("A", "B"), ("C", "D")] * 4)


def few_shot() -> Texts:
    """Questions after the same worked examples."""
    return [(EXAMPLES + context, answer) for context, answer in questions()]


# --- the same numbers ------------------------------------------------------------------------------------------------


def test_choices(got: Loaded) -> None:
    answers = compare(got, questions())
    assert len({round(v, 3) for v, _ in answers}) > 40  # they do differ


def test_odd_requests(got: Loaded) -> None:
    long = " ".join(corpus()) * 3
    assert len(got.tokenizer(long)["input_ids"]) > 2 * 512  # the window
    texts = [
        ("", "Paris"),
        ("", " Paris is a city"),
        ("a", "b"),
        ("The capital of France is ", "Paris"),  # the space goes over to the answer
        ("The capital  ", "  is"),
        (ODD, " " + ODD),
        ("東京", "は"),
        ("😀" * 5, "😀"),
        ("\nThe", "\n\n"),
        (long, " Paris"),
        (long, " Rome and more"),
        (long[:2500], " Paris"),
        ("x" + long, " Paris"),
        ("The capital", " is" * 400),
    ]
    compare(got, texts + texts[::-1])


def test_an_answer_that_the_model_would_give(got: Loaded) -> None:
    """The greedy flag is True for what the model itself goes on with, False one token off it."""
    prompt = "The capital of France is"
    ids = got.tokenizer(prompt, return_tensors="pt")["input_ids"]
    own = got.model.generate(ids, max_new_tokens=5, do_sample=False, attention_mask=torch.ones_like(ids))[
        0, ids.shape[1] :
    ].tolist()
    other = [*own[:-1], (own[-1] + 1) % 256]
    requests = [(("", ""), ids[0].tolist(), answer) for answer in (own, other, own[:1], own[:4])]
    flags = [greedy for _, greedy in packed(got)._loglikelihood_tokens(requests)]
    assert flags == [True, False, True, True]


def test_no_request_and_one_again_and_again(phi: Loaded) -> None:
    assert packed(phi).loglikelihood([]) == packed(phi)._loglikelihood_tokens([]) == []
    answers = compare(phi, [("The capital of France is", " Paris"), ("The capital of Italy is", " Rome")] * 3)
    assert answers[0] == answers[2] == answers[4] != answers[1]


def test_answers_reach_lm_eval_s_cache_and_the_model_is_not_changed(phi: Loaded) -> None:
    class Hook:
        def __init__(self) -> None:
            self.kept: dict[tuple[str, str], tuple[float, bool]] = {}

        def add_partial(self, attr: str, request: tuple[str, str], answer: tuple[float, bool]) -> None:
            assert attr == "loglikelihood"
            self.kept[request] = answer

    before, config = copy.deepcopy(phi.model.state_dict()), phi.model.config.to_dict()
    lm = packed(phi)
    lm.cache_hook = Hook()
    answers = lm.loglikelihood(asked(questions()))
    assert lm.cache_hook.kept == dict(zip(questions(), answers, strict=True))
    assert all(torch.equal(t, before[n]) for n, t in phi.model.state_dict().items())
    assert phi.model.config.to_dict() == config
    assert not phi.model.training


PROMPTS = st.text(max_size=30).filter(lambda text: not text or bool(text.strip()))
ANSWERS = st.text(min_size=1, max_size=12)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            PROMPTS | st.sampled_from(["The capital of", "The capital of France is", "The "]),
            ANSWERS | st.sampled_from([" Paris", " Paris is", " Rome"]),
        ),
        min_size=1,
        max_size=10,
    )
)
def test_any_strings(phi: Loaded, texts: Texts) -> None:
    # an answer may vanish into the prompt's last token; such requests have no score (see below)
    lm = packed(phi)
    texts = [pair for pair in texts if not pair[0] or all(lm._encode_pair(*pair))]
    compare(phi, texts or [("a", "b")])


@pytest.mark.parametrize("wrong", [0, -5, 2.5, "abc", True])
def test_a_budget_that_is_none(phi: Loaded, wrong: Any) -> None:
    with pytest.raises(EvaluationError, match="whole number of tokens, 1 or more"):
        packed(phi, batch_tokens=wrong)


@pytest.mark.parametrize(("batch_tokens", "chunk"), [(1, 1), (40, 3), (100_000, 1000)])
def test_however_the_rows_are_batched_and_the_head_is_chunked(
    phi: Loaded, batch_tokens: int, chunk: int, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(forward, "_HEAD_BYTES", chunk * 4 * phi.model.get_output_embeddings().weight.shape[0])
    compare(phi, questions(), batch_tokens=batch_tokens)


@pytest.mark.parametrize("costs", [Costs(0.0, math.inf), Costs(1.0, 0.0)])
def test_however_the_tree_is_cut(got: Loaded, costs: Costs, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Forward, "costs", lambda self: costs)
    compare(got, questions() + few_shot())


def test_few_shot_examples_are_computed_once(phi: Loaded, forwards: list[tuple[int, int]]) -> None:
    lm = packed(phi)
    lm.loglikelihood(asked(questions()[:1]))
    forwards.clear()
    compare(phi, few_shot())
    start = len(phi.tokenizer(EXAMPLES)["input_ids"])
    lengths = [len(phi.tokenizer("".join(t))["input_ids"]) for t in few_shot()]
    forwards.clear()
    lm.loglikelihood(asked(few_shot()))
    assert sum(rows * width for rows, width in forwards) < start + 0.8 * sum(n - start for n in lengths)


@pytest.mark.parametrize("window", [8, 24, 37])
def test_a_small_window(got: Loaded, window: int) -> None:
    """Longer contexts lose tokens on the left; with 8 the probe itself does not fit and lm-eval's code takes over."""
    key = "n_positions" if hasattr(got.model.config, "n_positions") else "max_position_embeddings"
    setattr(got.model.config, key, window)
    texts = [t for t in questions() if len(got.tokenizer(t[1])["input_ids"]) <= window]
    lm = packed(got)
    assert lm.max_length == window
    assert_same(lm.loglikelihood(asked(texts)), reference(got).loglikelihood(asked(texts), disable_tqdm=True))
    assert lm.packs is (window > 8)


def test_rolling_log_likelihoods(got: Loaded) -> None:
    long = " ".join(corpus())
    texts = [(corpus()[0],), (ODD,), (long,), (long[: len(long) // 2],), ("a",), (corpus()[0],)]
    lm = packed(got)
    values = lm.loglikelihood_rolling(asked(texts, "loglikelihood_rolling"))
    wanted = reference(got).loglikelihood_rolling(asked(texts, "loglikelihood_rolling"), disable_tqdm=True)
    assert lm.packs
    assert values == pytest.approx(wanted, rel=1e-5, abs=1e-3)
    assert values[2] < values[3] < values[0] < 0


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_prompts_with_and_without_a_beginning_token_in_one_batch(phi: Loaded, engine: Any, caplog: Log) -> None:
    """Whether a prompt brings it itself is asked of each: lm-eval asks the first of a batch for all."""
    end, backend = phi.tokenizer.eos_token, phi.tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        f"{end} $A", special_tokens=[(end, phi.tokenizer.eos_token_id)]
    )
    lm = interface(phi.model, phi.tokenizer, EvalSpec(engine=engine))
    prompts = [f"{end}The capital of France is", "A dog", "The colour of snow is as white as"]
    ids, mask = lm.tok_batch_encode(prompts)
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == [lm.tok_encode(p) for p in prompts]
    assert [lm.tok_encode(p).count(phi.tokenizer.eos_token_id) for p in prompts] == [1, 1, 1]
    right = lm.tok_batch_encode(prompts, padding_side="right")
    assert [row[m.bool()].tolist() for row, m in zip(*right, strict=True)] == [lm.tok_encode(p) for p in prompts]
    asked = [Instance("generate_until", {}, (p, {"until": [], "max_gen_toks": 5}), 0) for p in prompts]
    assert lm.generate_until(asked) == [lm.generate_until([one])[0] for one in asked]
    with caplog.at_level(logging.WARNING, "unlearn.score.packed"):
        room = len(lm.tok_encode(prompts[1]))
        ids, mask = lm.tok_batch_encode(prompts, left_truncate_len=room)
        lm.tok_batch_encode(prompts, left_truncate_len=room - 1)
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == [
        lm.tok_encode(p)[-room:] for p in prompts
    ]
    said = [r.getMessage() for r in caplog.records if r.name == "unlearn.score.packed"]
    assert said == [f"2 of 3 prompts are longer than {room} tokens: their beginnings are not read"], "once"


@pytest.mark.parametrize("engine", ["packed", "hf"])
def test_prompts_longer_than_the_window_are_told_of(phi: Loaded, engine: Any, caplog: Log) -> None:
    lm = interface(phi.model, phi.tokenizer, EvalSpec(engine=engine))
    pairs = [("far away " * 600, "Paris"), ("A dog", " barks")]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    with caplog.at_level(logging.WARNING, "unlearn.score.packed"):
        said = []
        for some in (asked[1:], asked, asked):
            lm.loglikelihood(some, disable_tqdm=True)
            said.append([r.getMessage() for r in caplog.records if r.name == "unlearn.score.packed"])
    assert (said[0], said[1]) == ([], said[2])
    assert said[2] == ["1 of 2 prompts are longer than 512 tokens: their beginnings are not read"], "once"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_edited_model_is_scored_as_edited(loaded: Load, pico_phi: Path, dtype: str) -> None:
    got = loaded(pico_phi, dtype)
    generator = torch.Generator().manual_seed(0)
    vector = TaskVector(
        {
            f"model.layers.{layer}.mlp.fc1": LowRank(
                torch.randn(2, 64, generator=generator) * 0.1, torch.randn(128, 2, generator=generator)
            )
            for layer in range(2)
        }
    )
    lm, plain = packed(got), reference(got, softmax_dtype="float32")
    within = 1e-4 if dtype == "float32" else 1.0
    before = lm.loglikelihood(asked(questions()))
    with Edit(got.model, vector) as edit:
        for c in (-1.0, -0.5):
            edit.subtract(-c)
            here = lm.loglikelihood(asked(questions()))
            there = plain.loglikelihood(asked(questions()), disable_tqdm=True)
            assert max(abs(a - b) for (a, _), (b, _) in zip(here, there, strict=True)) < within
            assert max(abs(a - b) for (a, _), (b, _) in zip(here, before, strict=True)) > 2 * within
    assert lm.loglikelihood(asked(questions())) == before


# --- less work -------------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(phi: Loaded, monkeypatch: Patch) -> list[tuple[int, int]]:
    """Shapes of the batches that the pico Phi's body is run on, as they come."""
    seen: list[tuple[int, int]] = []
    body = phi.model.model
    plain = body.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return plain(*args, **kwargs)

    monkeypatch.setattr(body, "forward", forward)
    return seen


def test_batches_stay_within_the_budget(phi: Loaded, forwards: list[tuple[int, int]], monkeypatch: Patch) -> None:
    monkeypatch.setattr(Forward, "costs", lambda self: Costs(1e-4, math.inf))  # no passes for trunks
    lm = packed(phi, batch_tokens=64)
    lm.loglikelihood(asked(questions()[:1]))
    forwards.clear()
    texts = [(text, " x") for text in corpus()]
    lm.loglikelihood(asked(texts))
    longest = max(len(phi.tokenizer(text)["input_ids"]) for text, _ in texts)
    sizes = [width for _, width in forwards]
    assert len(sizes) > 3
    assert max(sizes) <= max(64, longest)
    assert all(rows == 1 for rows, _ in forwards)  # laid end to end: nothing is padded
    assert sum(sizes) <= sum(len(phi.tokenizer(text + answer)["input_ids"]) for text, answer in texts)
    assert min(sizes) > 0.3 * max(sizes)  # of like cost


# --- out of memory ---------------------------------------------------------------------------------------------------


def limited(body: nn.Module, limit: int, error: Callable[[], BaseException], monkeypatch: Patch) -> list[int]:
    """Let the body fail on more than ``limit`` tokens; returns the sizes it was asked for."""
    sizes: list[int] = []
    plain = body.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > limit:
            raise error()
        return plain(*args, **kwargs)

    monkeypatch.setattr(body, "forward", forward)
    return sizes


@pytest.mark.parametrize("error", [lambda: torch.OutOfMemoryError("CUDA out of memory"), MemoryError])
def test_running_out_of_memory_loses_nothing(
    phi: Loaded, error: Callable[[], BaseException], monkeypatch: Patch
) -> None:
    texts = [(text, answer) for text in corpus() for answer in (" Paris", " x")]
    wanted = reference(phi).loglikelihood(asked(texts), disable_tqdm=True)
    sizes = limited(phi.model.model, 300, error, monkeypatch)
    lm = packed(phi, batch_tokens=2000)
    assert_same(lm.loglikelihood(asked(texts)), wanted)
    failed = [size for size in sizes if size > 300]
    assert 1 <= len(failed) <= 4  # halved for what follows too, instead of failing at every batch
    assert 50 <= lm.batch_tokens <= 300
    # and the next call keeps within what fitted
    sizes.clear()
    assert_same(lm.loglikelihood(asked(texts)), wanted)
    assert max(sizes) <= 300


def test_a_tree_that_does_not_fit_is_cut(phi: Loaded, monkeypatch: Patch) -> None:
    wanted = reference(phi).loglikelihood(asked(questions()), disable_tqdm=True)
    lm = packed(phi, batch_tokens=4000)
    monkeypatch.setattr(Forward, "costs", lambda self: Costs(0.0, math.inf))  # all questions in one tree
    assert lm.packs
    sizes = limited(phi.model.model, 100, lambda: torch.OutOfMemoryError("out of memory"), monkeypatch)
    assert_same(lm.loglikelihood(asked(questions())), wanted)
    assert sizes[0] > 100 >= sizes[-1]


def test_other_errors_are_not_taken_for_it(phi: Loaded, monkeypatch: Patch) -> None:
    lm = packed(phi)
    lm.loglikelihood(asked(questions()))
    sizes = limited(phi.model.model, 0, lambda: RuntimeError("expected all tensors on one device"), monkeypatch)
    with pytest.raises(RuntimeError, match="on one device"):
        lm.loglikelihood(asked(questions()))
    assert len(sizes) == 1
    # during the probe it must not look like a model that cannot be packed, either
    monkeypatch.undo()
    fresh = packed(phi)
    limited(phi.model.model, 0, lambda: torch.OutOfMemoryError("out of memory"), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        fresh.loglikelihood(asked(questions()))


# --- models that cannot be packed ------------------------------------------------------------------------------------


def small(config_type: type, phi: Loaded, dtype: torch.dtype = torch.float32, **more: Any) -> Loaded:
    """A tiny model of another family with the pico tokenizer."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(phi.tokenizer)}
    own = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0) | {"initializer_range": 0.12}
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_type(**{**shape, **own, **more})).to(dtype).eval()
    return Loaded(model, phi.tokenizer, "", dtype, torch.device("cpu"))


def falls_back(model: Loaded, caplog: Log) -> str:
    """Compare with lm-eval's numbers; returns what was said about the detour."""
    lm = packed(model)
    with caplog.at_level(logging.WARNING, "unlearn.score.packed"):
        answers = lm.loglikelihood(asked(questions()))
        lm.loglikelihood(asked(questions()[:2]))
    assert not lm.packs
    assert_same(answers, reference(model).loglikelihood(asked(questions()), disable_tqdm=True))
    said = [r.getMessage() for r in caplog.records if r.name == "unlearn.score.packed"]
    assert len(said) == 1  # once, not at every call
    assert "one row per answer" in said[0]
    return said[0]


def test_a_model_that_scales_its_logits(phi: Loaded) -> None:
    compare(small(GraniteConfig, phi, logits_scaling=4.0), questions())
    compare(small(CohereConfig, phi, logit_scale=0.25), questions())


def test_a_model_that_caps_its_logits_and_its_attention(phi: Loaded) -> None:
    capped = {"head_dim": 16, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0}
    compare(small(Gemma2Config, phi, **capped, sliding_window=8), questions() + few_shot())


@pytest.mark.parametrize("window", [1, 8, 30])
def test_a_model_with_a_sliding_window(phi: Loaded, window: int, monkeypatch: Patch) -> None:
    model = small(MistralConfig, phi, sliding_window=window)
    wide = small(MistralConfig, phi, sliding_window=None)
    narrow = compare(model, questions() + few_shot())
    assert narrow != packed(wide).loglikelihood(asked(questions() + few_shot()))
    monkeypatch.setattr(Forward, "costs", lambda self: Costs(1.0, 0.0))
    compare(model, questions() + few_shot())


@pytest.mark.parametrize(
    ("family", "own", "said"),
    [
        (MambaConfig, {}, "one row per answer"),  # no attention
        (BloomConfig, {"n_head": 4}, "one row per answer"),  # biases by distance
        (
            Llama4TextConfig,
            {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
            "layers of chunked_attention",
        ),
    ],
)
def test_models_that_mix_tokens_in_other_ways(
    phi: Loaded, family: type, own: dict[str, Any], said: str, caplog: Log
) -> None:
    assert said in falls_back(small(family, phi, **own), caplog)


def exactly(model: Loaded, texts: Texts) -> list[float]:
    """Log-likelihoods from the model's own logits, one text at a time, added up in float64."""
    found = []
    for context, answer in texts:
        before, whole = (model.tokenizer(text)["input_ids"] for text in (context, context + answer))
        with torch.inference_mode():
            logits = model.model(torch.tensor([whole[:-1]], device=model.model.device)).logits[0].double()
        logp = logits.log_softmax(-1)[len(before) - 1 :]
        found.append(float(logp.gather(-1, torch.tensor(whole[len(before) :])[:, None]).sum()))
    return found


@pytest.mark.parametrize("way", ["engine hf", "no packed rows", "int8", "harness"])
def test_long_answers_of_models_in_16_bits(
    way: str, loaded: Load, pico_phi: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """lm-eval's own code would take log-softmax and sums in bfloat16, whose steps at -1,000 are of 4 nats and more."""
    phi = loaded(pico_phi, "bfloat16")
    lines = [line for line in corpus() if line.endswith(".")]
    texts = [("Once upon a time.", " " + " ".join(lines[n : n + 14])) for n in range(20)]
    with quantised(phi.model, "int8") if way == "int8" else nullcontext(phi.model) as model:
        one = replace(phi, model=model)
        monkeypatch.setattr(Forward, "probe", lambda self, max_length: math.inf)
        if way == "harness":
            lm: HFLM = get_model(harness.MODEL)(pretrained=str(pico_phi), dtype="bfloat16", device="cpu", batch_size=1)
        else:
            lm = interface(
                model, phi.tokenizer, EvalSpec(engine="hf" if way == "engine hf" else "packed", batch_size=1)
            )
        assert isinstance(lm, PackedLM) is (way != "engine hf")
        assert not getattr(lm, "packs", False)
        values = [value for value, _ in lm.loglikelihood(asked(texts), disable_tqdm=True)]
        wanted = exactly(one, texts)
    assert min(len(phi.tokenizer(answer)["input_ids"]) for _, answer in texts) > 100
    assert max(abs(a - b) for a, b in zip(values, wanted, strict=True)) < 1e-3
    assert len(set(values)) == len(texts)


@pytest.mark.parametrize(
    ("trouble", "said"),
    [("refuses", "unexpected keyword 'position_ids'"), ("ignores", "rows differ by"), ("layout", "rows differ by")],
)
def test_a_body_that_goes_its_own_way(phi: Loaded, caplog: Log, monkeypatch: Patch, trouble: str, said: str) -> None:
    """Answers that see each other would score wrongly without any error: the probe must notice."""
    plain = phi.model.model.forward

    def body(position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if trouble == "refuses" and position_ids is not None:
            raise TypeError("unexpected keyword 'position_ids'")
        return plain(**kwargs)

    if trouble == "layout":
        monkeypatch.setattr(forward, "NAME", "sdpa")
    else:
        monkeypatch.setattr(phi.model.model, "forward", body)
    assert said in falls_back(phi, caplog)


def test_a_probe_that_ends_in_nan_is_no_proof(phi: Loaded, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Forward, "score", lambda self, layout: [(i, math.nan, False, 1) for i in range(3)])
    assert not packed(phi).packs


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (("\n", " Paris"), r"nothing but white space: '\\n' ' Paris'"),
        (("The capital", ""), "nothing but white space"),
        (
            ("The capital", " is" * 40),
            r"an answer has 40 tokens, but the model reads 32 at a time: 'The capital' ' is is",
        ),
    ],
)
def test_requests_that_have_no_score(phi: Loaded, texts: tuple[str, str], said: str) -> None:
    """lm-eval's own model stops at a bare assertion here."""
    phi.model.config.max_position_embeddings = 32
    with pytest.raises(EvaluationError, match=said):
        packed(phi).loglikelihood(asked([("The capital", " of"), texts]))
    with pytest.raises(AssertionError):
        reference(phi).loglikelihood(asked([texts]), disable_tqdm=True)


# --- memory of a pass ------------------------------------------------------------------------------------------------


def wide(kind: str, phi: Loaded, dtype: torch.dtype = torch.float32) -> Loaded:
    """A model of some width, so that its states outweigh what is the same for all, and of some reach."""
    family, own = {
        "llama": (LlamaConfig, {"num_key_value_heads": 8}),
        "shared heads": (LlamaConfig, {}),
        "window": (MistralConfig, {"sliding_window": 64}),
        "capped": (Gemma2Config, {"head_dim": 16, "attn_logit_softcapping": 50.0}),
    }[kind]
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "max_position_embeddings": 2048}
    return small(family, phi, dtype, num_attention_heads=8, initializer_range=0.02, **shape, **own)


def chain(tokens: int, before: int = 0) -> Piece:
    none = np.empty(0, dtype=np.int64)
    return Piece(np.arange(tokens) % 50 + 1, ((0, tokens, -1),), None, before, False, none, none, none)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("llama", torch.float32),
        ("shared heads", torch.bfloat16),
        ("window", torch.float32),
        ("capped", torch.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("lengths", "before", "most"),
    [([512], 0, 4), ([16] * 32, 0, 3), ([8] * 64, 500, 2), ([8] * 16, 1500, 1.8), (list(range(4, 40)), 300, 5)],
)
def test_what_a_pass_takes_is_known_beforehand(
    phi: Loaded, kind: str, dtype: torch.dtype, lengths: list[int], before: int, most: float
) -> None:
    """Against the bytes of all tensors that are alive at once: never less, and not much more."""
    model = Forward(wide(kind, phi, dtype).model)
    states: dict[nn.Module, KeysValues] = {}
    with torch.inference_mode():
        if before:
            trunk = lay_out([chain(before)], model.device)
            trunk.keep = states
            model.hidden(trunk)
            kept = sum(t.nbytes for pair in states.values() for t in pair)
            assert kept == model.sizes.kept * before
        with Live() as live:
            model.hidden(lay_out([chain(n, before) for n in lengths], model.device, states))
    told = sum(model.sizes.of(n, before) for n in lengths)
    assert live.peak <= told <= most * live.peak


@pytest.mark.parametrize(("kind", "room"), [("llama", 6_000_000), ("capped", 20_000_000)])
def test_what_stands_before_many_rows_is_counted(phi: Loaded, kind: str, room: int, monkeypatch: Patch) -> None:
    """Each row of a pass has a copy of its trunk's keys and values: that of a long trunk outweighs short rows."""
    model = wide(kind, phi)
    texts = [(" ".join(corpus()[:40]) + f"\nThe capital of {name} is", " Paris") for name in range(150)]
    lm = packed(model, batch_tokens=8192)
    wanted = [value for value, _ in lm.loglikelihood(asked(texts))]
    monkeypatch.setattr(forward, "_ROOM", room, raising=False)
    shape = model.model.config
    longest = max(len(model.tokenizer(text + answer)["input_ids"]) for text, answer in texts)
    assert longest > 350
    before = longest * 2 * shape.num_key_value_heads * 16 * 4 * 3  # the trunk's own, in three layers
    with Live() as live:
        found = [value for value, _ in lm.loglikelihood(asked(texts))]
    assert live.peak < room + 2 * before
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-3


def test_heads_that_share_keys_are_not_given_copies_on_a_gpu() -> None:
    class OnGPU(Tensor):
        is_cuda = True

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 8, 5, 16), torch.randn(3, 2, 105, 16), torch.randn(3, 2, 105, 16)
    mask = torch.rand(3, 1, 5, 105) < 0.7
    mask[..., 0] = True
    many = [t.repeat_interleave(4, dim=1) for t in (key, value)]
    for softcap in (None, 20.0):
        scores = query @ many[0].transpose(2, 3) * 0.3
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        wanted = scores.masked_fill(~mask, -math.inf).softmax(-1) @ many[1]
        with Live() as live:
            found = forward.attend(
                *(t.as_subclass(OnGPU) for t in (query, key, value)), mask, Attention(0.3, None, softcap)
            )
        torch.testing.assert_close(found.as_subclass(Tensor), wanted)
        assert softcap is not None or live.peak < many[0].nbytes


def test_one_row_that_does_not_fit_is_an_error(phi: Loaded, monkeypatch: Patch) -> None:
    lm = packed(phi)
    lm.loglikelihood(asked(questions()))
    limited(phi.model.model, 10, lambda: torch.OutOfMemoryError("out of memory"), monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        lm.loglikelihood(asked([(" ".join(corpus()[:4]), " x")]))


def test_half_precision_is_near(loaded: Load, pico_phi: Path) -> None:
    """In bfloat16 the two add up in another order, so they agree to its few digits only."""
    half = loaded(pico_phi, "bfloat16")
    lm = packed(half)
    answers = lm.loglikelihood(asked(questions()))
    assert lm.packs
    wanted = reference(half, softmax_dtype="float32").loglikelihood(asked(questions()), disable_tqdm=True)
    exact = reference(loaded(pico_phi)).loglikelihood(asked(questions()), disable_tqdm=True)
    tokens = [len(half.tokenizer(answer)["input_ids"]) for _, answer in questions()]
    for (mine, _), (other, _), (true, _), count in zip(answers, wanted, exact, tokens, strict=True):
        assert abs(mine - other) / count < 0.1
        assert abs(mine - true) / count < 0.1
