"""How TOFU's items (see tofu_items.py) are put to a model, and what TOFU makes of the answers (arXiv 2401.06121)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

_LARGEST = 709.0  # exp of more than this is no float

Row = dict[str, Any]


# --- what is asked ---------------------------------------------------------------------------------------------------


@functools.cache
def _tokenizer(name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"metadata tokenizer: {name} has no tokenizer that can be read ({error})") from error


def load_tokenizer(metadata: Mapping[str, Any]) -> Any:
    """The scored model's tokenizer: ``tokenizer`` in the metadata, else ``pretrained``."""
    name = metadata.get("tokenizer") or metadata.get("pretrained")
    if not isinstance(name, str):
        raise ValueError(
            'no tokenizer to count tokens with: give --metadata \'{"tokenizer": "FOLDER or NAME"}\', that of the '
            "scored model (lm-eval's --model_args pretrained=... names it as well)"
        )
    return _tokenizer(name, bool(metadata.get("trust_remote_code", False)))


def end_text(tokenizer: Any, wanted: Any) -> str:
    """What is written at the end of an answer so that lm-eval encodes it as the end token; empty if not wanted."""
    if not isinstance(wanted, bool):
        raise ValueError(f"metadata eos is {wanted!r}; it must be true or false")
    if not wanted:
        return ""
    end = tokenizer.eos_token
    plain = tokenizer.encode("end", add_special_tokens=False)
    if not end or tokenizer.encode(f"end{end}", add_special_tokens=False) != [*plain, tokenizer.eos_token_id]:
        raise ValueError(
            f"this tokenizer does not read its end token ({end!r}) as one token, so that it cannot be scored; give "
            f"--metadata '{{\"eos\": false}}'"
        )
    return str(end)


class Asked(NamedTuple):  # no dataclass: lm-eval runs this file before it enters it in sys.modules, where those look
    """The scored texts of one item, after one prompt.

    ``tokens`` counts each text's own tokens. ``apart``: the prompt ends in white space, and its tokens stay apart from
    the text's, so that their log-likelihood can be taken off (see :class:`AnswerLosses`).
    """

    texts: tuple[str, ...]
    tokens: tuple[int, ...]
    apart: tuple[bool, ...]


class AnswerLosses(ConfigurableTask):
    """Loss per token of an answer, its paraphrase and its perturbed versions, all after the same prompt.

    lm-eval scores white space at the end of a prompt together with the continuation. A prompt that ends in some (the
    line break before "Answer:" in the authors' layout, or the one that ends most chat templates) is therefore asked
    for once more: the white space alone, after the prompt without it. What it costs is taken off every text, and its
    tokens are not counted. Where a tokenizer merges the white space with the first word of a text, so that there is
    nothing to take off, the merged token is part of that text.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})
        metadata = self.config.metadata or {}
        self._encode = functools.partial(load_tokenizer(metadata).encode, add_special_tokens=False)
        self._end = end_text(load_tokenizer(metadata), metadata.get("eos", True))
        self._start = "Answer: " if metadata.get("tag", "prompt") == "scored" else None
        self._layout: dict[str, Any] = {}
        self._known: dict[tuple[str, str], Asked] = {}

    def build_all_requests(self, **how: Any) -> None:
        """As lm-eval does it; how prompts are laid out is kept, because token counts depend on it."""
        names = ("system_instruction", "apply_chat_template", "fewshot_as_multiturn", "chat_template")
        self._layout = {name: how[name] for name in names if name in how}
        super().build_all_requests(**how)

    def construct_requests(self, doc: Row, ctx: str, **kwargs: Any) -> list[Instance]:
        """One request for each text, and one for white space at the end of the prompt."""
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        asked = self._asked(doc, ctx)
        arguments = [(ctx, text) for text in asked.texts]
        if any(asked.apart):
            bare = ctx.rstrip()
            arguments.append((bare, ctx[len(bare) :]))
        return [
            Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=index, **kwargs)
            for index, pair in enumerate(arguments)
        ]

    def process_results(self, doc: Row, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
        """Log-likelihoods to nats per token; the rest is :func:`combine`."""
        asked = self._asked(doc, self.fewshot_context(doc, num_fewshot=0, **self._layout))
        white = results[-1][0] if any(asked.apart) else 0.0
        rows = zip(results, asked.tokens, asked.apart, strict=False)  # the last result may be the white space
        losses = [-(logprob - (white if apart else 0.0)) / tokens for (logprob, _), tokens, apart in rows]
        scores: dict[str, Any] = self.config.process_results(doc, losses)
        return scores

    def _asked(self, doc: Row, context: str) -> Asked:
        key = doc["id"], context
        if key not in self._known:
            self._known[key] = self._count(doc, context)
        return self._known[key]

    def _count(self, doc: Row, context: str) -> Asked:
        bare = context.rstrip()
        start = self._start if self._start is not None else " " if bare == context else ""
        answers = [doc["answer"], *([doc["paraphrased_answer"]] if "paraphrased_answer" in doc else [])]
        texts = [f"{start}{answer}{self._end}" for answer in (*answers, *doc["perturbed_answer"])]
        before, whole = self._encode(bare), self._encode(context)
        splits = bare != context and whole[: len(before)] == before
        tokens, apart = [], []
        for text in texts:
            ids = self._encode(context + text)
            separate = splits and ids[: len(whole)] == whole
            tokens.append(len(ids) - len(whole if separate else before))
            apart.append(separate)
        if min(tokens) < 1:
            raise ValueError(f"item {doc['id']}: this tokenizer merges an answer into the prompt")
        return Asked(tuple(texts), tuple(tokens), tuple(apart))


class Generated(ConfigurableTask):
    """Greedy answers of at most ``max_tokens`` tokens (task metadata)."""

    def __init__(self, config: dict[str, Any]) -> None:
        tokens = config["metadata"]["max_tokens"]
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"metadata max_tokens is {tokens!r}; it must be a whole number, 1 or more")
        kept = {key: value for key, value in config.items() if key != "class"}
        super().__init__(config={**kept, "generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": tokens}})


# --- scores of one item ----------------------------------------------------------------------------------------------


def combine(doc: Mapping[str, Any], losses: Sequence[float]) -> dict[str, Any]:
    """TOFU's figures of one item (2401.06121, sections 2.2.1 and 2.2.2; R as its aggregator computes it).

    ``truth_ratio`` is R = exp(mean perturbed loss - paraphrased loss): above 1 the model holds the right answer more
    likely than the wrong ones. Everything that is made of it is computed from its logarithm.

    Args:
        doc: The item; whether it has a paraphrase says what the second loss is.
        losses: Nats per token of the answer, of its paraphrase if there is one, and of the perturbed answers.
    """
    loss, others = losses[0], list(losses[1:])
    paraphrased = others.pop(0) if "paraphrased_answer" in doc else loss
    log_ratio = float(np.mean(others)) - paraphrased
    shares = np.exp(min(losses[0], *others) - np.array([loss, *others]))  # of the most likely one, so none is lost
    return {
        "loss": loss,
        "paraphrased_loss": paraphrased,
        "perturbed_losses": others,
        "prob": math.exp(-loss),
        "prob_choice": float(shares[0] / shares.sum()),
        "truth_ratio": math.exp(min(log_ratio, _LARGEST)),
        "truth_ratio_forget": math.exp(-abs(log_ratio)),
        "truth_ratio_prob": 0.5 * (1 + math.tanh(log_ratio / 2)),  # R / (1 + R), without an exp that overflows
        "truth_ratio_kept": -math.expm1(-log_ratio) if log_ratio > 0 else 0.0 if log_ratio <= 0 else math.nan,
    }


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)  # TOFU's own stems its words


def score_generation(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L of what the model wrote against the answer: ``rougeL`` is the recall, which is TOFU's."""
    score = _rouge().score(doc["target"], results[0])["rougeL"]
    return {"rougeL": score.recall, "rougeL_f1": score.fmeasure}


# --- scores of a set -------------------------------------------------------------------------------------------------


def mean_of_means(items: Sequence[Sequence[float]]) -> float:
    """Each item counts the same, however many values it has."""
    return float(np.mean([np.mean(values) for values in items]))
