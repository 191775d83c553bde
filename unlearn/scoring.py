"""lm-eval's model interface, scored without computing the same token twice.

lm-eval's own model runs one row per (context, continuation), and the LM head on every position. Here the requests are
merged into prefix trees: a context and all its answers, or a passage scored token by token, become one row in which
every token attends to its ancestors only and keeps its own position. The head runs at scored positions alone, in
chunks, so memory never holds batch x length x vocabulary. What cannot be scored this way exactly (checked against the
model itself once) goes through lm-eval's code.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from unlearn.console import progress
from unlearn.errors import EvaluationError
from unlearn.memory import is_out_of_memory
from unlearn.tree import Row, pack

log = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
_HEAD_BYTES = 64 * 2**20  # logits held at a time
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1}


class PackedLM(HFLM):
    """Drop-in for lm-eval's ``HFLM``, for causal models.

    Args:
        pretrained: A loaded transformers causal LM, or what lm-eval's own model takes: a folder or a name on the hub.
        tokenizer: Its tokenizer; found beside the model when not given.
        batch_tokens: Tokens per forward pass; halved when memory runs out.
        options: Everything else that ``HFLM`` takes. Its batch_size counts only where its own code must score.

    Raises:
        EvaluationError: the model is not a causal one.
    """

    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_tokens: int | None = None, **options: Any) -> None:
        backend = options.pop("backend", "causal")
        if backend not in ("causal", "default"):
            raise EvaluationError(f"backend={backend}: only causal models are scored here; use --model hf")
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, backend="causal", **options)
        self.batch_tokens = batch_tokens or (16384 if self.device.type == "cuda" else 2048)
        self.label = "scoring"
        self._exact: bool | None = None
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

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
        if self._exact is None:
            self._exact = self._probe()
        if not self._exact:
            return super()._loglikelihood_tokens(list(requests), disable_tqdm=True, override_bs=override_bs)
        answers: list[tuple[float, bool] | None] = [None] * len(requests)
        linear, pairwise = self._costs()
        rows = pack([(c, t) for _, c, t in requests], self.max_length, linear / pairwise)
        with progress(self.label, len(requests)) as advance, torch.inference_mode():
            for batch in _batches(rows, lambda: self.batch_tokens):
                todo = [batch]
                while todo:
                    part = todo.pop()
                    try:
                        scored = list(self._score(part))
                    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as e:
                        if not is_out_of_memory(e) or len(part) == 1:
                            raise
                        self.batch_tokens = max(1, min(self.batch_tokens, _size(part)) // 2)
                        half = len(part) // 2
                        todo += [part[half:], part[:half]]
                        continue
                    for index, answer in scored:
                        answers[index] = answer
                        text = requests[index][0]
                        if text is not None:  # rolling windows have no text
                            self.cache_hook.add_partial("loglikelihood", text, answer)
                    advance(len(scored))
        missing = [i for i, a in enumerate(answers) if a is None]
        assert not missing, f"{len(missing)} requests were lost in packing"
        return [a for a in answers if a is not None]

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

    def _score(self, rows: Sequence[Row]) -> Iterable[tuple[int, tuple[float, bool]]]:
        """One forward pass over ``rows``; yields (request index, (log-likelihood, is greedy))."""
        hidden = self._hidden(rows)  # (B, T, d)
        width = hidden.shape[1]
        nodes = np.concatenate([b * width + row.scored_nodes for b, row in enumerate(rows)])
        wanted, inverse = np.unique(nodes, return_inverse=True)  # positions whose logits are needed, each once
        targets = torch.from_numpy(np.concatenate([row.scored_targets for row in rows])).to(hidden.device)
        where = torch.from_numpy(inverse).to(hidden.device)
        flat = hidden.reshape(-1, hidden.shape[-1])[torch.from_numpy(wanted).to(hidden.device)]
        values, greedy = self._head(flat, where, targets)
        at = 0
        for row in rows:
            for index, length in row.requests:
                yield index, (float(values[at : at + length].sum()), bool(greedy[at : at + length].all()))
                at += length

    def _head(self, hidden: Tensor, where: Tensor, targets: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Log-probability of each target at its position, and whether it is the argmax there.

        Args:
            hidden: (N, d) last hidden states.
            where: (M,) index into hidden, per target.
            targets: (M,) token ids.
        """
        head = self.model.get_output_embeddings()
        chunk = max(1, _HEAD_BYTES // (4 * head.weight.shape[0]))
        order = torch.argsort(where, stable=True)
        sorted_where = where[order]
        values = torch.empty(len(targets), dtype=torch.float64)
        greedy = torch.empty(len(targets), dtype=torch.bool)
        for start in range(0, len(hidden), chunk):
            logits = head(hidden[start : start + chunk]).float()  # (n, V)
            low, high = torch.searchsorted(sorted_where, torch.tensor([start, start + chunk], device=where.device))
            mine = order[int(low) : int(high)]
            rows, ids = where[mine] - start, targets[mine]
            picked = logits[rows, ids] - torch.logsumexp(logits, dim=-1)[rows]
            values[mine.cpu()] = picked.double().cpu()
            greedy[mine.cpu()] = (logits.argmax(dim=-1)[rows] == ids).cpu()
        return values.numpy(), greedy.numpy()

    def _hidden(self, rows: Sequence[Row]) -> Tensor:
        """Last hidden states (B, T, d) of packed rows; plain causal attention where no row branches."""
        width = max(len(r.tokens) for r in rows)
        tokens = np.zeros((len(rows), width), dtype=np.int64)
        positions = np.zeros((len(rows), width), dtype=np.int64)
        for b, row in enumerate(rows):
            tokens[b, : len(row.tokens)] = row.tokens
            positions[b, : len(row.tokens)] = row.positions
        mask: Tensor | None = None
        if not all(r.is_chain for r in rows):
            allowed = np.zeros((len(rows), 1, width, width), dtype=bool)
            for b, row in enumerate(rows):
                row.fill_mask(allowed[b, 0])
            mask = torch.from_numpy(allowed).to(self.device)
        base: nn.Module = getattr(self.model, self.model.base_model_prefix)
        out = base(
            input_ids=torch.from_numpy(tokens).to(self.device),
            attention_mask=mask,
            position_ids=torch.from_numpy(positions).to(self.device),
            use_cache=False,
        )
        return out.last_hidden_state

    def _costs(self) -> tuple[float, float]:
        """Multiply-adds per token, and per attended pair of tokens, of the body of the model."""
        config = self.model.config.get_text_config()
        body: nn.Module = getattr(self.model, self.model.base_model_prefix)
        embedding = self.model.get_input_embeddings().weight.numel()
        linear = sum(p.numel() for p in body.parameters()) - embedding
        layers = getattr(config, "num_hidden_layers", 1)
        return float(max(linear, 1)), float(2 * config.hidden_size * layers)

    def _probe(self) -> bool:
        """Whether a tree gives this model's own logits: no hidden recurrence, no scaled head, no position bias."""
        limit = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if limit is not None and limit < self.max_length and getattr(self.model.config, "use_sliding_window", True):
            log.warning("the model attends in a sliding window: scoring one row per answer")
            return False
        try:
            worst = self._probe_difference()
        except (AttributeError, TypeError, ValueError, RuntimeError) as e:
            if is_out_of_memory(e):
                raise
            log.warning("packed rows do not work on %s (%s): scoring one row per answer", type(self.model).__name__, e)
            return False
        if worst > _PROBE_TOLERANCE.get(self.model.dtype, 3e-1):
            name = type(self.model).__name__
            log.warning("packed rows differ by %.2g on %s: scoring one row per answer", worst, name)
            return False
        return True

    def _probe_difference(self) -> float:
        """Largest difference in log-likelihood between a branching row and plain forwards, on made-up tokens."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        draw = np.random.default_rng(0).integers(0, vocabulary, size=24).tolist()
        pairs = [(draw[:8], draw[8:12]), (draw[:8], draw[12:18]), (draw[:5], draw[18:24])]
        (row,) = pack(pairs, self.max_length, math.inf)
        worst = 0.0
        with torch.inference_mode():
            packed = dict(self._score([row]))
            for i, (context, continuation) in enumerate(pairs):
                ids = torch.tensor([context + continuation], device=self.device)
                logits = self.model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 : -1].float()
                plain = functional.log_softmax(logits, -1)[range(len(continuation)), continuation].sum()
                difference = abs(float(plain) - packed[i][0])
                worst = max(worst, difference if math.isfinite(difference) else math.inf)  # max() would drop a NaN
        return worst


def _size(rows: Sequence[Row]) -> int:
    """Tokens of a batch of rows, padding included."""
    return len(rows) * max(len(row.tokens) for row in rows)


def _batches(rows: Sequence[Row], budget: Callable[[], int]) -> Iterator[list[Row]]:
    """Rows of like length together, so that rows x longest stays within the budget; the longest first.

    The budget is asked for at every row, because it shrinks on the way when memory runs out.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda r: len(r.tokens), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0].tokens) > budget():
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
