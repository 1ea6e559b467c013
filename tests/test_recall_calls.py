"""Calls with recall that are refused, planned or reported: before anything is read, for what is really read."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import build, token_ids
from torch import Tensor

import imdc
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.model.shape import ModelShape
from imdc.prefill.recall import Recall
from imdc.profiler.allocations import DispatchAllocations

TIGHT: dict[str, Any] = {"memory_tokens": 64, "sink_tokens": 2, "recent_tokens": 8, "observation_tokens": 8}
RECALL: dict[str, Any] = {**TIGHT, "recall": "host", "chunk_tokens": 32}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class AtSecond:
    """A streamer that calls a function once, at the second token."""

    def __init__(self, call: Any) -> None:
        self.call, self.count = call, 0

    def put(self, value: Tensor) -> None:
        self.count += 1
        if self.count == 2:
            self.call()

    def end(self) -> None:
        pass


def test_what_would_leave_the_window_is_refused_before_anything_is_read() -> None:
    model, steps = build("llama", max_position_embeddings=256), []  # type: ignore[var-annotated]
    with imdc.patch(model, on_step=steps.append, **{**RECALL, "memory_tokens": 100}) as handle:
        with pytest.raises(UnsupportedCallError, match="question and answer reach position 287"):
            model.generate(token_ids(1000), **{**GREEDY, "max_new_tokens": 180})
        assert not steps
        model.generate(token_ids(1000), **{**GREEDY, "max_new_tokens": 148})
        assert steps and handle.report is not None


def test_padding_that_tells_of_itself_needs_no_mask() -> None:
    model, prompt = build("llama"), token_ids(200)
    padded = torch.cat((torch.zeros(1, 10, dtype=torch.long), prompt), dim=1)
    with imdc.patch(model, **RECALL):
        alone = model.generate(prompt, **GREEDY)[:, 200:]
        assert torch.equal(model.generate(padded, **GREEDY)[:, 210:], alone)
        assert torch.equal(model.generate(padded, attention_mask=(padded != 0).long(), **GREEDY)[:, 210:], alone)


@pytest.mark.parametrize("recall", ["none", "host"])
def test_a_mask_of_another_shape_is_named(recall: str) -> None:
    model, steps = build("llama"), []  # type: ignore[var-annotated]
    named = pytest.raises(UnsupportedCallError, match=r"attention_mask has shape \(1, 100\) for input_ids \(1, 200\)")
    with imdc.patch(model, on_step=steps.append, **{**RECALL, "recall": recall}), named:
        model.generate(token_ids(200), attention_mask=torch.ones(1, 100, dtype=torch.long), **GREEDY)
    assert not steps


def test_a_long_answer_is_not_planned_as_a_long_question() -> None:
    model, prompt = build("llama"), token_ids(1000)
    with imdc.patch(model, **RECALL) as handle:
        with DispatchAllocations() as counted:
            model.generate(prompt, **{**GREEDY, "max_new_tokens": 100})
            peak = counted.take_peak()
        assert handle.report is not None
        measured = ModelShape.from_model(model).weights + peak - handle.report.host_bytes
    with imdc.patch(model, **{**RECALL, "chunk_tokens": "auto", "memory_limit": 2 * measured}) as handle:
        model.generate(prompt, **{**GREEDY, "max_new_tokens": 100})
        assert handle.report is not None and handle.report.steps[0].chunk_tokens >= 32


def test_a_question_that_does_not_fit_the_limit_is_named() -> None:
    with imdc.patch(build("llama"), **{**RECALL, "chunk_tokens": "auto", "memory_limit": 1_500_000}) as handle:
        cache = handle.read(token_ids(400), room=20)
        with pytest.raises(ConfigError, match="for a question of 300 tokens; raise the limit or ask a shorter one"):
            handle.ask(cache, token_ids(300, seed=4), **GREEDY)
        with pytest.raises(ConfigError, match="questions of up to 20 tokens of 20 rows"):
            handle.ask(cache, [token_ids(20, seed=number) for number in range(20)], **GREEDY)


def test_beams_of_a_question_are_read_once() -> None:
    model = build("llama")
    with imdc.patch(model, **RECALL) as handle:
        cache = handle.read(token_ids(200))
        handle.ask(cache, token_ids(6, seed=2), num_beams=4, **GREEDY)
        assert handle.report is not None and (handle.report.rows, handle.report.prompt_tokens) == (1, 6)
        model.generate(token_ids(200), num_beams=4, **GREEDY)
        assert handle.report.prompt_tokens == 200
        handle.ask(cache, [token_ids(6, seed=2), token_ids(6, seed=3), token_ids(6, seed=2)], **GREEDY)
        assert handle.report.prompt_tokens == 12


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"layer_budget": "adaptive", "observer": "window"}),
        ("gemma3", {"layer_budget": "pyramid", "recall_dtype": "int8"}),
    ],
)
@pytest.mark.parametrize("call", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 3}])
def test_beams_that_do_not_fit_the_limit_are_refused_before_the_text_is_read(
    family: str, options: dict[str, Any], call: dict[str, Any]
) -> None:
    model, steps, refused = build(family), [], []  # type: ignore[var-annotated]
    options = {**TIGHT, "recall": "host", "chunk_tokens": "auto", **options}
    weights = ModelShape.from_model(model).weights
    for limit in range(weights + 100_000, weights + 2_500_000, 100_000):
        steps.clear()
        with imdc.patch(model, on_step=steps.append, memory_limit=limit, **options):
            try:
                model.generate(token_ids(300), **{**GREEDY, **call})
            except ConfigError:
                assert not steps, f"{limit:,} bytes: refused after the text was read"
                refused.append(limit)
                continue
            break
    # What the smallest chunks need says nothing of this: some of these limits hold the text.
    assert steps and refused


def test_out_of_memory_while_taking_back_is_not_called_a_matter_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("simulated")

    with imdc.patch(build("llama"), **{**RECALL, "chunk_tokens": 100}) as handle:
        cache = handle.read(token_ids(200))
        monkeypatch.setattr(Recall, "take", fail)
        with pytest.raises(torch.OutOfMemoryError, match="simulated"):
            handle.ask(cache, token_ids(90, seed=2), **GREEDY)


def test_a_report_is_of_its_own_call_whatever_other_threads_read() -> None:
    model = build("llama")

    def elsewhere() -> None:
        thread = threading.Thread(target=lambda: model.generate(token_ids(100), **GREEDY))
        thread.start()
        thread.join()

    with imdc.patch(model, **RECALL) as handle:
        model.generate(token_ids(300), **GREEDY)
        alone = handle.report
        model.generate(token_ids(300), streamer=AtSecond(elsewhere), **GREEDY)
        report = handle.report
    assert alone is not None and report is not None
    for name in ("prompt_tokens", "host_bytes", "recalled_bytes", "memory_tokens"):
        assert getattr(report, name) == getattr(alone, name), name


def test_a_report_names_the_observer_that_was_asked_for() -> None:
    model = build("llama")
    with imdc.patch(model, **RECALL) as handle:
        model.generate(token_ids(200), **GREEDY)
        assert handle.report is not None and str(handle.report.config.observer) == "prompt_tail"
        assert handle.report.config.observation_tokens == 8


def test_recall_over_a_cache_without_a_store_is_refused() -> None:
    model, ids = build("llama"), token_ids(350)
    with imdc.patch(model, **{**RECALL, "recall": "none"}) as handle:
        plain = handle.read(ids[:, :200])
    with imdc.patch(model, **RECALL) as handle:
        with pytest.raises(UnsupportedCallError, match="a cache whose text has no store"):
            model.generate(ids, past_key_values=plain, **GREEDY)
        # It is still there to be asked, by what it holds.
        assert handle.ask(plain, token_ids(6, seed=2), **GREEDY).shape == (1, 6)
        short = model.generate(ids[:, :1], **GREEDY, return_dict_in_generate=True)
        longer = torch.cat((short.sequences, ids), dim=1)
        with pytest.raises(UnsupportedCallError, match="pass the whole conversation as input_ids and no cache"):
            model.generate(longer, past_key_values=short.past_key_values, **GREEDY)
        model.generate(longer, **GREEDY)
        assert handle.report is not None and handle.report.host_bytes > 0
