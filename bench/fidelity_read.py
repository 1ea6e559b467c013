"""One question read in one way: the greedy answer, how likely the right one was, and what it took."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from begin import stopwatch
from fidelity_questions import Question
from longbench_ways import Way
from torch import Tensor
from transformers import DynamicCache

import imdc
from imdc.model import hf

# Answers are scored by so many of their tokens: enough for nearly all right ones, and each takes a decoding step. How
# a text goes on is scored by all that is given of it.
_MOST_SCORED = 32


@torch.no_grad()
def read(model: Any, tokenizer: Any, question: Question, way: Way, unpatched: Sequence[int] | None) -> dict[str, Any]:
    """Read the prompt once, then answer greedily and score known answers from copies of the same cache.

    Args:
        model: unpatched.
        tokenizer: its own.
        question: what is asked.
        way: how the prompt is read.
        unpatched: tokens of the unpatched model's answer; None where it has not answered, or is asked now.

    Returns:
        Values for one line of JSON. `gold_nats` and `own_nats` are mean negative log-likelihoods of a token: of the
        right answer, or of how the text goes on, and of the unpatched model's own answer. The latter says what a way
        loses of the model's answer also where that is wrong. `seconds` is the time to the first token and of the
        greedy answer; scoring is not counted.
    """
    record, ids = question.record, torch.tensor([question.ids], device=model.device)
    gold = question.gold or tokenizer(record.answers[0], add_special_tokens=False).input_ids[:_MOST_SCORED]
    config = way.config(len(question.ids))
    with _cache(model, config) as (cache, handle):
        elapsed = stopwatch()
        recalls = config is not None and config.recall != "none"
        logits, cache = _asked(model, ids) if recalls else (_forward(model, ids, cache), cache)
        ttft, cpu_ttft = elapsed()
        before = copy.deepcopy(cache)
        gold_nats = _nats(model, copy.deepcopy(before), logits, gold)
        elapsed = stopwatch()
        new = _greedy(model, cache, logits, record.task.max_new_tokens)
        seconds, _ = elapsed()
        own_nats = _nats(model, before, logits, (new if config is None else unpatched or [])[:_MOST_SCORED])
        steps = [] if handle is None or handle.report is None else handle.report.steps
        plan = [[step.chunk_tokens, step.memory_before, step.memory_after] for step in steps]
    prediction = str(tokenizer.decode(new, skip_special_tokens=True)).strip()
    return {
        "way": way.name,
        "task": record.task.name,
        "group": question.group,
        "id": record.id,
        "prompt_sha": record.sha,
        "prompt_tokens": len(question.ids),
        "prediction": prediction,
        "score": question.score(prediction),
        "gold_nats": gold_nats,
        "own_nats": own_nats,
        "tokens": new,
        "ttft_seconds": ttft,
        "ttft_cpu_seconds": cpu_ttft,
        "seconds": ttft + seconds,
        "plan": plan,
    }


@contextlib.contextmanager
def _cache(model: Any, config: imdc.PrefillConfig | None) -> Iterator[tuple[Any, Any]]:
    """(an empty cache, the patch's handle): transformers' own cache and None for the unpatched model."""
    if config is None:
        yield DynamicCache(config=model.config), None
        return
    handle = imdc.patch(model, config)
    try:
        yield handle.new_cache(), handle
    finally:
        handle.remove()


def _asked(model: Any, ids: Tensor) -> tuple[Tensor, Any]:
    """As `_forward`, and the cache: with recall it is generate() that reads a prompt."""
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    result = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    return result.logits[0][0].float(), result.past_key_values


def _forward(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits [vocabulary] after the last of `ids` [1, tokens]."""
    name = hf.cache_argument(type(model).forward)
    logits: Tensor = model(ids, **{name: cache}, use_cache=True, logits_to_keep=1).logits
    return logits[0, -1].float()


def _nats(model: Any, cache: Any, logits: Tensor, answer: Sequence[int]) -> float | None:
    """Mean negative log-likelihood of `answer`, None where it is empty.

    Token by token, because several would be a turn that is compressed.
    """
    if not answer:
        return None
    total = 0.0
    for position, token in enumerate(answer):
        total -= float(torch.log_softmax(logits, dim=-1)[token])
        if position + 1 < len(answer):
            logits = _forward(model, torch.tensor([[token]], device=model.device), cache)
    return total / len(answer)


def _greedy(model: Any, cache: Any, logits: Tensor, most: int) -> list[int]:
    """Greedy tokens up to the one that ends the text, which is among them, or `most`."""
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, (list, tuple)) else [ends])
    new: list[int] = []
    while len(new) < most:
        token = int(logits.argmax())
        new.append(token)
        if token in stops:
            break
        if len(new) < most:
            logits = _forward(model, torch.tensor([[token]], device=model.device), cache)
    return new
