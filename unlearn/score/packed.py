"""lm-eval's model interface, scored without computing the same token twice.

lm-eval's own model runs one row per (context, continuation), and the LM head on every position. Here the requests are
merged into prefix trees: a context and all its answers become one row in which every token attends to its ancestors
only and keeps its own position. The head runs at scored positions alone, in chunks. What cannot be scored this way
exactly (checked against the model itself once) goes through lm-eval's code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor

from unlearn.console import progress
from unlearn.errors import EvaluationError, ModelError
from unlearn.model.checkpoint import doubled_weights
from unlearn.model.load import fingerprint, untie
from unlearn.processes import is_out_of_memory, share_requests
from unlearn.recipe.evaluation import EvalSpec
from unlearn.score.decoding import greedy
from unlearn.score.forward import Forward, NotPackableError, Part, run
from unlearn.score.tree import Piece, pack
from unlearn.store.cache import condensed, hub_away, model_in_cache
from unlearn.vector.interop import strangers
from unlearn.vector.task_vector import ADAPTER_CONFIG

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
# lm-eval's own code takes log-softmax and sums in the model's format: in bfloat16 a long answer is off by whole nats
_SOFTMAX = "float32"
_ALL = 1 << 30  # a batch size that no list of requests reaches
_ADAPTER = "pretrained={} is an adapter, or holds one: give its base as pretrained=... and the adapter as peft=..."
_UNFIT = ("size mismatch", "arget modules", "adapter_config.json")  # in what PEFT says of an adapter that does not fit
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


class WholeLM(HFLM):
    """lm-eval's ``HFLM``, but prompts are encoded singly, cut ones are told of, and what has no score is refused."""

    label = "scoring"  # of progress
    _told = False

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As lm-eval does it, but it asks the first text alone whether all begin with the beginning token."""
        if truncation:
            found: tuple[Tensor, Tensor] = super().tok_batch_encode(
                strings, padding_side, left_truncate_len, truncation
            )
            return found
        rows = [self.tok_encode(text) for text in strings]
        if left_truncate_len:
            self._tell_cut(sum(len(row) > left_truncate_len for row in rows), len(rows), left_truncate_len)
            rows = [row[-left_truncate_len:] for row in rows]
        fills = [[self.tokenizer.pad_token_id] * (max(map(len, rows)) - len(row)) for row in rows]
        left = padding_side == "left"
        ids = [[*fill, *row] if left else [*row, *fill] for row, fill in zip(rows, fills, strict=True)]
        masks = [[0] * len(fill) + [1] * len(row) for row, fill in zip(rows, fills, strict=True)]
        return torch.tensor(ids), torch.tensor([mask if left else mask[::-1] for mask in masks])

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """As lm-eval does it, but a text ends at a special token of the stops.

        Its batch goes on until all texts have met a stop, and a special token is gone before texts are cut there.
        """
        known = self.tokenizer.added_tokens_decoder.items()
        ends = self.end_tokens()
        if more := {i for i, token in known if token.special and token.content in stop} - ends:
            generation_kwargs["eos_token_id"] = sorted(ends | more)
        whole: Tensor = super()._model_generate(context, max_length, stop, **generation_kwargs)
        return whole

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._check(requests)
        how = {"disable_tqdm": disable_tqdm, "override_bs": override_bs}
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(list(requests), **how)
        return found

    def end_tokens(self) -> set[int]:
        """Those that end what the model writes."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return {*(ends if isinstance(ends, list) else [ends]), self.eot_token_id} - {None}

    def _check(self, requests: Sequence[Request]) -> None:
        """Refuse what has no score: lm-eval asserts the same, without a word."""
        for text, context, continuation in requests:
            shown = "" if text is None else f": {text[0][-60:]!r} {text[1][:60]!r}"
            if not context or not continuation:
                raise EvaluationError(f"a prompt or an answer is nothing but white space{shown}")
            if len(continuation) > self.max_length:
                raise EvaluationError(
                    f"an answer has {len(continuation)} tokens, but the model reads {self.max_length} at a time{shown}"
                )
        long = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        self._tell_cut(long, len(requests), self.max_length)

    def _tell_cut(self, cut: int, count: int, room: int) -> None:
        if cut and not self._told:
            self._told = True
            log.warning("%d of %d prompts are longer than %d tokens: their beginnings are not read", cut, count, room)


class PackedLM(WholeLM):
    """Drop-in for lm-eval's ``HFLM``, for causal models.

    Args:
        pretrained: A loaded transformers causal LM, a folder, or a name on the hub.
        batch_tokens: Tokens per forward pass; found when not given, halved when memory runs out.
        options: Everything else that ``HFLM`` takes. Its batch_size counts only where its own code must score.
    """

    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_tokens: int | None = None, **options: Any) -> None:
        backend = options.pop("backend", "causal")
        if backend not in ("causal", "default"):
            raise EvaluationError(f"backend={backend}: only causal models are scored here; use --model hf")
        if batch_tokens is not None and (type(batch_tokens) is not int or batch_tokens < 1):
            raise EvaluationError(f"batch_tokens={batch_tokens}: give a whole number of tokens, 1 or more")
        if options.get("device") is None and not torch.cuda.is_available():  # HFLM's own choice is cuda, there or not
            options["device"] = "mps" if torch.backends.mps.is_available() else "cpu"
        if isinstance(pretrained, str):
            _look_at(pretrained, tokenizer, options)
        else:
            untie(pretrained)
        # HFLM's cache of logits scores a text that is asked for with two different continuations at the wrong place
        options.setdefault("logits_cache", False)
        options.setdefault("softmax_dtype", _SOFTMAX)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, backend="causal", **options)
        if hasattr(self, "accelerator"):  # lm-eval found several processes, each with a whole model
            share_requests(self)
        self.batch_tokens = batch_tokens
        self._forward: Forward | Literal[False] | None = None
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def _create_model(self, pretrained: str, peft: str | None = None, **options: Any) -> None:
        """As lm-eval does it, but an adapter that the model does not take in whole is refused."""
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Found missing adapter keys")  # below it is an error
                super()._create_model(pretrained, peft=peft, **options)
        except (ValueError, RuntimeError) as e:
            if not peft or is_out_of_memory(e) or not any(sign in str(e) for sign in _UNFIT):
                raise
            raise EvaluationError(f"peft={peft} does not fit {pretrained}: {condensed(e)}") from e
        if getattr(self._model, "_hf_peft_config_loaded", False):
            raise EvaluationError(_ADAPTER.format(pretrained))
        if peft and (said := strangers(self._model, peft, options.get("revision"))):
            raise EvaluationError(f"peft={peft} does not fit {pretrained}:\n{said}")
        untie(self._model)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Where lm-eval hands over its cache of answers (``use_cache``), which by itself knows texts and no model.

        So each model gets a table of its own in the file: another one has other weights, another adapter, number
        format, tokenizer or setting of those that count.
        """
        table = cache_hook.dbdict
        if table is not None:
            if any(module._forward_hooks for module in self.model.modules()):
                raise EvaluationError(
                    "use_cache: this model is edited by hooks beside its weights, so answers cannot be kept for it"
                )
            table.tablename = self._identity()
            table.conn.execute(f'CREATE TABLE IF NOT EXISTS "{table.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
            table.conn.commit()
        super().set_cache_hook(cache_hook)

    def _identity(self) -> str:
        """A key for all that answers depend on beside the texts: weights, configurations, tokenizer, settings."""
        adapters = getattr(self.model, "peft_config", {})
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = [
            fingerprint(self.model),
            self.model.config.to_json_string(use_diff=False),
            [(name, _in_order(config.to_dict())) for name, config in sorted(adapters.items())],
            getattr(self.model, "generation_config", None),
            fast.to_str() if fast is not None else sorted(self.tokenizer.get_vocab().items()),
            (self.eot_token_id, self.prefix_token_id, self.tokenizer.pad_token_id),
            (self.max_length, self.add_bos_token, self.truncation, self.think_end_token),
            (self.mixed_precision_dtype, self.softmax_dtype),
        ]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As lm-eval does it, but once: a sweep asks for the same pairs at every coefficient."""
        pair = context, continuation
        if pair not in self._encoded:
            self._encoded[pair] = super()._encode_pair(context, continuation)
        return self._encoded[pair]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not requests:
            return []
        self._check(requests)
        forward = self._packable()
        if forward is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        budget = forward.budget(self.batch_tokens)
        answers: dict[int, tuple[float, bool]] = {}
        with progress(self.label, len(requests)) as advance, torch.inference_mode(), self._precision():
            while len(answers) < len(requests):
                left = [i for i in range(len(requests)) if i not in answers]
                pairs = [requests[i][1:] for i in left]
                pieces = pack(pairs, self.max_length, forward.costs(), longest=budget.tokens)
                try:
                    for index, answer in _finished(run(forward, pieces, budget), pieces):
                        answers[left[index]] = answer
                        text = requests[left[index]][0]
                        if text is not None:  # rolling windows have no text
                            self.cache_hook.add_partial("loglikelihood", text, answer)
                        advance(1)
                except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
                    if not is_out_of_memory(e) or all(p.is_chain for p in pieces):
                        raise
                    budget.halve(budget.tokens, budget.room)  # cut what is left into smaller trees
        self.batch_tokens = min(self.batch_tokens or budget.tokens, budget.tokens)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval does it, but all windows of all passages at once instead of ``batch_size`` at a time."""
        with self._all_at_once() if self._packable() is not None else nullcontext():
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As lm-eval does it, with its truncation and its stop sequences; greedy texts come from :mod:`decoding`."""
        ours = self._packable() is not None and all(_is_greedy(self.model, r.args[1]) for r in requests)
        with self._all_at_once() if ours else nullcontext():
            return super().generate_until(requests, disable_tqdm=True)

    @contextmanager
    def _all_at_once(self) -> Iterator[None]:
        before = self.__dict__["batch_size_per_gpu"]
        self.batch_size_per_gpu: Any = _ALL
        try:
            yield
        finally:
            self.batch_size_per_gpu = before

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """(rows, padded prompts + texts), as ``HFLM`` returns it; ``context`` is padded on the left."""
        forward = self._packable()
        if forward is None or self.batch_size_per_gpu != _ALL:
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        masks = generation_kwargs["attention_mask"].bool()
        prompts = [row[mask].tolist() for row, mask in zip(context, masks, strict=True)]
        ends = self.end_tokens()
        back = max((len(self.tokenizer.encode(s, add_special_tokens=False)) for s in stop), default=0) + 2

        def done(text: Sequence[int]) -> bool:
            return text[-1] in ends or any(s in self.tokenizer.decode(text[-back:]) for s in stop if s)

        room = max_length - context.shape[1]
        found = context.new_full((len(prompts), room), self.tokenizer.pad_token_id)
        slots = 256 if self.device.type == "cuda" else 64
        with progress("generating", len(prompts)) as advance, torch.inference_mode(), self._precision():
            for index, text in greedy(forward, prompts, room, done, slots, forward.budget(self.batch_tokens)):
                found[index, : len(text)] = torch.tensor(text)
                advance(1)
        return torch.cat([context, found], dim=1)

    @property
    def packs(self) -> bool:
        """Whether this model is scored in packed rows; if not, lm-eval's own code does it."""
        return self._packable() is not None

    def _packable(self) -> Forward | None:
        """How to run packed rows on this model, or None if its numbers cannot be had that way; found out once."""
        if self._forward is None:
            try:
                forward = Forward(self.model)
                worst = forward.probe(self.max_length)
                if worst > _PROBE_TOLERANCE.get(self.model.dtype, 3e-1):
                    raise NotPackableError(f"packed rows differ by {worst:.2g}")
                self._forward = forward
            except (NotPackableError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as e:
                if is_out_of_memory(e):
                    raise
                name = type(self.model).__name__
                log.warning("%s cannot be scored in packed rows (%s): one row per answer", name, e)
                self._forward = False
        return self._forward or None

    def _precision(self) -> AbstractContextManager[Any]:
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext()


def _in_order(settings: Mapping[str, Any]) -> str:
    """Settings as text that is the same in every process: PEFT keeps names in sets, which each lists as it likes."""
    return json.dumps(settings, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))


def _look_at(pretrained: str, tokenizer: Any, options: Mapping[str, Any]) -> None:
    """Refuse folders of which transformers would pass something over in silence, or that it would ask for in vain."""
    names = {"pretrained": pretrained, **{key: options.get(key) for key in ("delta", "peft")}, "tokenizer": tokenizer}
    folders = {key: Path(name) for key, name in names.items() if isinstance(name, str)}
    for key, folder in folders.items():
        if not folder.exists() and not model_in_cache(str(folder)) and (away := hub_away()):
            raise EvaluationError(
                f"{key}={folder}: there is no such folder, nothing of it in the hub's cache, and {away}"
            )
    for key in ("pretrained", "delta"):
        folder = folders.get(key, Path()) / str(options.get("subfolder") or "")
        if key not in folders or not folder.is_dir() or options.get("gguf_file"):
            continue
        try:
            said = doubled_weights(folder)
        except ModelError as e:
            said = str(e)
        if said:
            raise EvaluationError(f"{key}: {said}")
        if (folder / ADAPTER_CONFIG).exists():
            raise EvaluationError(_ADAPTER.format(pretrained))


def _finished(passes: Iterable[Sequence[Part]], pieces: Sequence[Piece]) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(request, (log-likelihood, greedy)) as soon as the last part of an answer is there."""
    missing = np.bincount(np.concatenate([p.requests for p in pieces]))  # tokens of each answer still to come
    assert missing.all(), "a request was lost in packing"
    values, greedy = [0.0] * len(missing), [True] * len(missing)
    for scores in passes:
        for index, value, is_greedy, tokens in scores:
            values[index] += value
            greedy[index] &= is_greedy
            missing[index] -= tokens
            if not missing[index]:
                yield index, (values[index], greedy[index])
    assert not missing.any(), f"{np.count_nonzero(missing)} requests were not scored"


# settings of transformers' generate that leave greedy decoding what it is
_HARMLESS = {"use_cache", "cache_implementation", "return_dict_in_generate", "transformers_version", "do_sample"}
_HARMLESS |= {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "max_length", "max_new_tokens"}
_HARMLESS |= {"temperature", "top_p", "top_k", "min_p", "typical_p"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "output_scores"}


def _is_greedy(model: Any, options: dict[str, Any]) -> bool:
    """Whether generation with these options is plain greedy decoding, which needs nothing of transformers' own."""
    wanted = normalize_gen_kwargs(options)
    own = getattr(model, "generation_config", None)
    settings = {k: v for k, v in (own.to_diff_dict() if own is not None else {}).items() if not k.startswith("_")}
    unknown = set(wanted) - {"until", "max_gen_toks", "do_sample", "temperature"} | set(settings) - _HARMLESS
    return not wanted["do_sample"] and not unknown


def interface(model: Any, tokenizer: Any, spec: EvalSpec) -> WholeLM:
    """lm-eval's interface to a model in memory, by the recipe's engine; several processes share its requests."""
    lm: WholeLM
    if spec.engine == "hf":
        # its cache of logits (on by default) scores a text that is cut in two places at the wrong one
        own: dict[str, Any] = {"logits_cache": False, "softmax_dtype": _SOFTMAX}
        lm = WholeLM(pretrained=model, tokenizer=tokenizer, batch_size=spec.batch_size, **own)
    else:
        lm = PackedLM(model, tokenizer, spec.batch_tokens, batch_size=spec.batch_size)
    share_requests(lm)
    return lm
