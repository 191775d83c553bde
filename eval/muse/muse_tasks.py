"""How MUSE's items (see muse_items.py) are put to a model, and what MUSE makes of the answers (arXiv 2407.06460)."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

_SHARE = 0.4  # of the tokens that Min-40 % is about

Row = dict[str, Any]


# --- what is asked ---------------------------------------------------------------------------------------------------


class TokenByToken(ConfigurableTask):
    """One request for each piece of a passage, each after all the text before it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def construct_requests(self, doc: Row, ctx: Any, **kwargs: Any) -> list[Instance]:
        """Requests for all pieces; what a chat template made of the prompt, ``ctx``, is not used."""
        kwargs.pop("apply_chat_template", None)
        kwargs.pop("chat_template", None)
        requests, context = [], doc["prompt"]
        for index, piece in enumerate(doc["pieces"]):
            pair = (context, piece)
            requests.append(Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=index, **kwargs))
            context += piece
        return requests


class Generated(ConfigurableTask):
    """Greedy texts of at most ``max_tokens`` tokens (task metadata)."""

    def __init__(self, config: dict[str, Any]) -> None:
        tokens = config["metadata"]["max_tokens"]
        if type(tokens) is not int or tokens < 1:
            raise ValueError(f"metadata max_tokens is {tokens!r}; it must be a whole number, 1 or more")
        kept = {key: value for key, value in config.items() if key != "class"}
        super().__init__(config={**kept, "generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": tokens}})


# --- scores of one item ----------------------------------------------------------------------------------------------


@functools.cache
def _rouge() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)  # MUSE's own does not stem


def score_generation(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-L F-measure of what the model wrote."""
    return {"rougeL_f1": _rouge().score(doc["target"], results[0])["rougeL"].fmeasure}


def score_passage(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """What membership is inferred from (2407.06460, section 3.3).

    ``min_40`` is the mean of the lowest 40 % of the tokens' log-probabilities (their number rounded down, at least one;
    Min-K %, 2310.16789), ``loss`` nats per token, ``zlib`` nats per token and byte of its zlib size.
    """
    logprobs: list[float] = []
    for (logprob, _), tokens in zip(results, doc["piece_tokens"], strict=True):
        logprobs += [logprob / tokens] * tokens
    if any(math.isnan(value) for value in logprobs):  # sorting would put them anywhere
        return {"min_40": math.nan, "loss": math.nan, "zlib": math.nan}
    lowest = sorted(logprobs)[: max(1, int(len(logprobs) * _SHARE))]
    total = math.fsum(logprobs)
    return {
        "min_40": math.fsum(lowest) / len(lowest),
        "loss": -total / len(logprobs),
        "zlib": -total / len(logprobs) / doc["zlib_bytes"],
    }
