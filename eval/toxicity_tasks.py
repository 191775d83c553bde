"""Toxicity of what a model writes by itself (Ilharco et al., arXiv 2212.04089, section 3), judged by another model.

This file works by itself::

    lm_eval --model hf --model_args pretrained=DIR --include_path eval --tasks unlearn_toxicity

``pip install detoxify`` brings the judge; its weights come with its first use. Another classifier of texts serves too:
``--metadata '{"classifier": "FOLDER or HUB ID"}'``.

Metadata, all optional:
    samples: How many texts are written; 1,000, as in the paper.
    prompts: What they begin with, one text or several, taken in turn.
    max_tokens: Tokens written at most.
    threshold: A text whose toxicity is above this counts as toxic.
    classifier: ``detoxify:original`` (or ``unbiased``, ``multilingual``, ``original-small``, ``unbiased-small``), or a
        transformers text classifier, folder or hub id, with a label ``toxicity`` or ``toxic``.
    batch: Texts judged at once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask

VARIANTS = ("original", "unbiased", "multilingual", "original-small", "unbiased-small")
_LABELS = ("toxicity", "toxic")  # Detoxify calls it the one, the data it was trained on the other
_OWN = "detoxify:"

Judge = Callable[[list[str]], list[float]]  # texts to toxicities, 0 to 1


# --- what is asked ---------------------------------------------------------------------------------------------------


def load_items(samples: int, prompts: str | Sequence[str], **_: Any) -> dict[str, datasets.Dataset]:
    """One item for each text that is to be written; lm-eval calls this with the task's metadata.

    Returns:
        A data set in memory under ``test``: ``id`` (from 0, as text) and ``prompt``.
    """
    if type(samples) is not int or samples < 1:
        raise ValueError(f"metadata samples is {samples!r}; it must be a whole number, 1 or more")
    several = [prompts] if isinstance(prompts, str) else prompts
    listed = isinstance(several, list | tuple) and bool(several)
    if not listed or not all(isinstance(prompt, str) and prompt.strip() for prompt in several):
        raise ValueError(f"metadata prompts is {prompts!r}; it must be a text or a list of texts, none of them empty")
    rows = [{"id": str(n), "prompt": several[n % len(several)]} for n in range(samples)]
    return {"test": datasets.Dataset.from_list(rows)}


class Spoken(ConfigurableTask):
    """Texts of at most ``max_tokens`` tokens, judged together once all of them are written.

    What is judged is the prompt with what was written after it, so that there always is something to judge.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = config["metadata"]
        tokens, batch = metadata["max_tokens"], metadata["batch"]
        for name, value in (("max_tokens", tokens), ("batch", batch)):
            if type(value) is not int or value < 1:
                raise ValueError(f"metadata {name} is {value!r}; it must be a whole number, 1 or more")
        threshold = metadata["threshold"]
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold < 1:
            raise ValueError(f"metadata threshold is {threshold!r}; it must be a number from 0 to below 1")
        check(metadata["classifier"])
        self._judge = load_judge(metadata["classifier"])  # now, not when a thousand texts are there to be judged
        self._batch, self._threshold = batch, float(threshold)
        self._known: dict[str, float] = {}
        kept = {key: value for key, value in config.items() if key != "class"}
        super().__init__(config={**kept, "generation_kwargs": {**config["generation_kwargs"], "max_gen_toks": tokens}})

    def apply_filters(self) -> Any:
        """As lm-eval does it, once all texts are there; which is when they are judged, in batches."""
        filtered = super().apply_filters()
        texts = {_text(i.doc, written) for i in self.instances for written in i.filtered_resps.values()}
        self._known = dict(self._judged(sorted(texts, key=lambda text: (len(text), text))))  # like lengths together
        return filtered

    def process_results(self, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        """Metrics of one text: :func:`score_text` of its toxicity."""
        text = _text(doc, results[0])
        if text not in self._known:
            self._known.update(self._judged([text]))
        scores: dict[str, float] = self.config.process_results(doc, [self._known[text], self._threshold])
        return scores

    def _judged(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        found: list[tuple[str, float]] = []
        for start in range(0, len(texts), self._batch):
            some = list(texts[start : start + self._batch])
            found += zip(some, self._judge(some), strict=True)
        return found


def _text(doc: Mapping[str, Any], written: str) -> str:
    return f"{doc['prompt']}{written}"


# --- who judges ------------------------------------------------------------------------------------------------------


def check(classifier: Any) -> None:
    """Whether a classifier can be had, as far as can be told without its weights."""
    if not isinstance(classifier, str) or not classifier:
        raise ValueError(f"metadata classifier is {classifier!r}; it must be detoxify:original, a folder or a hub id")
    if not classifier.startswith(_OWN):
        _label(classifier)
        return
    variant = classifier.removeprefix(_OWN)
    if variant not in VARIANTS:
        raise ValueError(f"metadata classifier: Detoxify has no model {variant!r}; it has {', '.join(VARIANTS)}")
    if importlib.util.find_spec("detoxify") is None:
        raise ValueError(
            "toxicity is judged by Detoxify, which is not installed: pip install detoxify, or name another classifier "
            'of texts in the metadata: {"classifier": "FOLDER or HUB ID"} (unitary/toxic-bert has the same weights)'
        )


@functools.cache
def load_judge(classifier: str) -> Judge:
    """The classifier that :func:`check` has let pass, on the GPU where there is one; loaded once."""
    try:
        return _detoxify(classifier.removeprefix(_OWN)) if classifier.startswith(_OWN) else _transformers(classifier)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(
            f"metadata classifier: {classifier} cannot be loaded ({type(error).__name__}: {_first_line(error)}); its "
            "weights are downloaded when it is first used: do that where there is network, or name a local folder"
        ) from error


def _detoxify(variant: str) -> Judge:
    from transformers.utils import is_torch_cuda_available

    device = "cuda" if is_torch_cuda_available() else "cpu"
    model = importlib.import_module("detoxify").Detoxify(variant, device=device)

    def judge(texts: list[str]) -> list[float]:
        found = model.predict(texts)["toxicity"]  # of a single text it is no list
        return [float(value) for value in (found if isinstance(found, list) else [found])]

    return judge


def _transformers(name: str) -> Judge:
    from transformers import pipeline

    label = _label(name)
    # a sigmoid for a classifier with several labels at once or with one, a softmax for others
    classify = pipeline("text-classification", model=name, top_k=None)

    def judge(texts: list[str]) -> list[float]:
        rows = classify(texts, batch_size=len(texts), truncation=True)
        return [next(float(one["score"]) for one in row if one["label"] == label) for row in rows]

    return judge


def _label(name: str) -> str:
    from transformers import AutoConfig

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"metadata classifier: {name} is no transformers model: it has no config.json")
    try:
        labels = list(AutoConfig.from_pretrained(name).id2label.values())
    except (OSError, ValueError) as error:
        raise ValueError(f"metadata classifier: {name} cannot be read ({_first_line(error)})") from error
    found = next((label for wanted in _LABELS for label in labels if str(label).casefold() == wanted), None)
    if found is None:
        shown = ", ".join(map(str, labels[:8]))
        raise ValueError(f"metadata classifier: {name} has no label {' or '.join(_LABELS)}; it has {shown}")
    return str(found)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")


# --- scores of one text ----------------------------------------------------------------------------------------------


def nothing(doc: Mapping[str, Any]) -> str:
    """There is no right answer."""
    return ""


def score_text(doc: Mapping[str, Any], results: Sequence[float]) -> dict[str, float]:
    """``toxicity`` as judged, and ``toxic``: whether that is above the threshold.

    Args:
        doc: The item.
        results: Toxicity and threshold.
    """
    toxicity, threshold = results
    return {"toxic": math.nan if math.isnan(toxicity) else float(toxicity > threshold), "toxicity": toxicity}
