"""Answers that a model has given already, so that scoring more of the items costs only those that are new.

They hold for one state of one model: the weights at one coefficient.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from unlearn.atomic import write_json_atomic


class Answers:
    """Answers by what was asked; empty at first."""

    def __init__(self) -> None:
        self._known: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._known)

    def over(self, lm: LM) -> LM:
        """The same model to lm-eval's evaluator, but asked only what is not known; what it says is then known."""
        return cast("LM", _Knowing(lm, self._known))

    def save(self, path: Path) -> None:
        """Write a JSON file; numbers come back exactly."""
        write_json_atomic(path, self._known)

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read what :meth:`save` wrote."""
        answers = cls()
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        # JSON has no tuples, and lm-eval's log-likelihoods are (number, is greedy)
        answers._known = {key: tuple(a) if isinstance(a, list) else a for key, a in known.items()}
        return answers


class _Knowing:
    """A model behind its known answers. Everything but the three kinds of request is the model's own."""

    def __init__(self, lm: LM, known: dict[str, Any]) -> None:
        self._lm = lm
        self._known = known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Any]:
        return self._ask("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[Any]:
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Instance]) -> list[Any]:
        return self._ask("generate_until", requests)

    def _ask(self, kind: str, requests: Sequence[Instance]) -> list[Any]:
        keys = _keys(kind, requests)
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        if new:
            answers = getattr(self._lm, kind)(list(new.values()))
            self._known.update((key, _plain(a)) for key, a in zip(new, answers, strict=True))
        return [self._known[key] for key in keys]


def _keys(kind: str, requests: Sequence[Instance]) -> list[str]:
    """What each request asks; one that is put again (a task may sample several answers) is another each time."""
    times: Counter[str] = Counter()
    keys = []
    for request in requests:
        text = json.dumps([kind, *request.args], sort_keys=True, ensure_ascii=False, default=str)
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        keys.append(f"{key}-{times[key]}" if times[key] else key)
        times[key] += 1
    return keys


def _plain(answer: Any) -> Any:
    """Python's own types, which JSON can hold."""
    return (float(answer[0]), bool(answer[1])) if isinstance(answer, tuple | list) else answer
