"""A model whose parts lie on two devices beside the same model on the CPU: prints, as JSON, what each computes.

A program of its own, as the pretended devices stay for good: ``python split_arena.py FOLDER_OF_A_MODEL WORK``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from pretended import ONE, OTHER, pretend

from unlearn.data.encoding import Encoded
from unlearn.evidence.foresight import slope
from unlearn.model.load import Loaded, fingerprint, linear_modules, load
from unlearn.recipe.methods import GradientDifferenceSpec, LearnedSpec, LoraSpec, NpoSpec, RetainKLSpec, TrainSpec
from unlearn.recipe.schema import ModelSpec
from unlearn.score.packed import PackedLM
from unlearn.train.learned import gradients, learn
from unlearn.train.losses import Against, Keep
from unlearn.train.moments import shrinkers
from unlearn.train.vectors import merge, train_vector
from unlearn.vector.edit import Edit
from unlearn.vector.task_vector import TaskVector

ROWS = [Encoded(tuple(range(5, 5 + n)), (-100,) * 3 + tuple(range(8, 5 + n))) for n in (8, 9, 12, 10)]
PROMPTS = [[*range(4, 24)], [*range(4, 20), 7, 8], [9, 4, 6]]
ANSWERS = [(PROMPTS[0], [3, 5]), (PROMPTS[0], [7, 5, 9]), (PROMPTS[1], [7]), (PROMPTS[2], [2, 1])]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "penalty at both signs": {"keep": Keep(ROWS[:2], RetainKLSpec(batch_size=1, coefficients=(0.5, 2.0)))},
    "npo": {"against": Against("npo", NpoSpec(), batch_size=3)},
    "gradient difference": {"against": Against("gradient_difference", GradientDifferenceSpec(), ROWS[2:])},
}


def halves(folder: Path) -> dict[str, int | str]:
    """Where each part goes: the second layer, and what comes after it, to the other device."""
    config = json.loads((folder / "config.json").read_text())
    norm = "norm" if config["model_type"] == "llama" else "final_layernorm"
    head = ONE if config["tie_word_embeddings"] else OTHER
    first = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), ONE)
    return {**first, "model.layers.1": OTHER, f"model.{norm}": OTHER, "lm_head": head}


def computed(loaded: Loaded, vector: TaskVector | None, work: Path) -> tuple[dict[str, Any], TaskVector]:
    """Everything that a run has a model do."""
    model, tokenizer, found = loaded.model, loaded.tokenizer, {}
    for name, more in OBJECTIVES.items():
        spec = TrainSpec(steps=3, batch_size=3, learning_rate=1e-2, trainer={"optim": "adamw_torch"})
        what = (spec, LoraSpec(rank=4), 0, work / name, name, {})
        fitted, log = train_vector(model, tokenizer, ROWS, *what, **more)
        found[name] = [*log.losses, *(norm for _, norm in sorted(fitted.norms().items()))]
        vector = vector if vector is not None else fitted  # the CPU's, for both
    assert vector is not None
    names = list(linear_modules(model))
    weights, steps = learn(model, vector, ROWS[:2], ROWS[2:], LearnedSpec(steps=2, batch_size=2), 0, 0)
    found["learned"] = [*(x for step in steps for x in step), *(float(w.sum()) for w in weights.values())]
    found["importances"] = [float(g.sum()) for g in gradients(model, ROWS, names).values()]
    shrinking = shrinkers(model, ROWS, names, 0, 10.0)
    found["shrinking"] = [float(p.cpu().norm()) for _, p in sorted(shrinking.items())]
    found["slope"] = [slope(model, vector, ROWS, "qa", 0)]
    lm = PackedLM(model, tokenizer, batch_size=2)
    before = fingerprint(model)
    asked = [(("", ""), *pair) for pair in ANSWERS]
    with Edit(model, vector) as edit:
        for coefficient in (0.0, 1.0, 3.0):
            edit.subtract(coefficient)
            found[f"log-likelihoods at {coefficient:g}"] = [x for x, _ in lm._loglikelihood_tokens(asked)]
        ids = torch.tensor([row[:3] for row in PROMPTS])
        with lm._all_at_once():
            mask = torch.ones_like(ids)
            found["written"] = lm._model_generate(ids, 9, [], attention_mask=mask, do_sample=False).tolist()
    assert lm.packs
    assert fingerprint(model) == before, "the model is not as it was"
    found["weights"] = before
    merge(model, vector)
    found["merged"] = [float(model.get_parameter(f"{name}.weight").double().norm()) for name in names]
    return found, vector


if __name__ == "__main__":
    folder, work = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    pretend()  # before anything goes backward
    whole = load(ModelSpec(path=str(folder), device="cpu"), str(folder))
    on_cpu, fitted = computed(whole, None, work / "cpu")
    split = load(ModelSpec(path=str(folder), dtype="float32", device_map=halves(folder)), str(folder))
    devices = sorted({str(p.device) for p in split.model.parameters()})
    on_two, _ = computed(split, fitted, work / "two")
    print(
        json.dumps({"devices": devices, "same": split.fingerprint == whole.fingerprint, "cpu": on_cpu, "two": on_two})
    )
