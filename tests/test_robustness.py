"""The patch in bad company: threads, interrupts, and memory that runs out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, greedy, token_ids
from torch import Tensor
from traces import TIGHT, FailingAt, trace_of
from transformers import LlamaForCausalLM, PreTrainedModel

import imdc
from imdc.cache.cache import ImdcCache
from imdc.prefill import hook

FAILURES = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError, SystemExit]


def content_of(cache: ImdcCache) -> list[Any]:
    """Everything a later call would read from the cache."""
    assert cache.rows is not None
    rows = [getattr(cache.rows, name).tolist() for name in ("tokens", "position", "padding")]
    tensors = [side.tolist() for layer in cache.layers for side in (layer.keys, layer.values)]
    return [cache.width, cache.compact, [layer.get_seq_length() for layer in cache.layers], rows, tensors]


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns far more often than they would by themselves."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of `jobs`, each in a thread of its own, begun at the same moment."""
    results: list[Any] = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(number: int) -> None:
        barrier.wait()
        try:
            results[number] = jobs[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_threads_of_models_that_share_a_config_do_not_meet(switching: None, implementation: str) -> None:
    first = build("llama", attn_implementation=implementation)
    torch.manual_seed(1)
    second, plain = LlamaForCausalLM(first.config).eval(), LlamaForCausalLM(first.config).eval()
    assert first.config is second.config is plain.config

    def answers(model: PreTrainedModel) -> list[list[int]]:
        return [greedy(model, token_ids(90 + 7 * seed, seed=seed)).sequences[0].tolist() for seed in range(4)]

    own = first.config._attn_implementation
    with imdc.patch(first, **TIGHT), imdc.patch(second, schedule="fm", observer="window", **TIGHT):
        wanted = [answers(model) for model in (first, second, plain)]
        got = together(*(lambda model=model: answers(model) for model in (first, second, plain)))
    assert got == wanted
    assert wanted[0] != wanted[1] != wanted[2]
    assert first.config._attn_implementation == own and not hook._overlays


def test_two_threads_may_use_one_patched_model(switching: None) -> None:
    model = FAMILIES["gemma3"]()

    def talk(seed: int) -> list[int]:
        one = greedy(model, token_ids(100, seed=seed))
        history = torch.cat((one.sequences, token_ids(30, seed=seed + 50)), dim=1)
        return greedy(model, history, past_key_values=one.past_key_values).sequences[0].tolist()

    with imdc.patch(model, **TIGHT):
        wanted = [talk(seed) for seed in range(3)]
        assert together(*(lambda seed=seed: talk(seed) for seed in range(3))) == wanted


def test_a_thread_that_fails_disturbs_no_other(switching: None) -> None:
    first = build("llama")
    second = LlamaForCausalLM(first.config).eval()

    def fail() -> int:
        failures = 0
        for number in range(1, 8):
            with FailingAt(first.model.layers[1], number, KeyboardInterrupt):
                try:
                    greedy(first, token_ids())
                except KeyboardInterrupt:
                    failures += 1
        return failures

    with imdc.patch(first, **TIGHT), imdc.patch(second, **TIGHT):
        wanted = greedy(second, token_ids()).sequences
        failures, answers = together(fail, lambda: [greedy(second, token_ids()).sequences for _ in range(7)])
    assert failures == 7
    assert all(torch.equal(answer, wanted) for answer in answers)
    assert not hook._overlays


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("place", ["embed_tokens", "layers.0.self_attn", "layers.1.mlp", "layers.2", "norm"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_failure_in_the_prefill_leaves_model_and_cache(family: str, place: str, failure: type[BaseException]) -> None:
    model = FAMILIES[family]()
    with imdc.patch(model, **TIGHT) as handle:
        fresh = greedy(model, token_ids()).sequences
        first = greedy(model, token_ids())
        history = torch.cat((first.sequences, token_ids(60, seed=1)), dim=1)
        wanted = greedy(model, history, past_key_values=first.past_key_values.copy()).sequences
        assert handle.report is not None
        cache, before = first.past_key_values, trace_of(model)
        content = content_of(cache)
        for number in range(1, len(handle.report.steps) + 1):
            with pytest.raises(failure), FailingAt(model.model.get_submodule(place), number, failure):
                greedy(model, history, past_key_values=cache)
            assert content_of(cache) == content
        changed = {key for key, value in trace_of(model).items() if value != before[key]} - {"._imdc_handle"}
        assert not changed
        assert torch.equal(greedy(model, history, past_key_values=cache).sequences, wanted)
        assert torch.equal(greedy(model, token_ids()).sequences, fresh)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("place", ["layers.0.self_attn", "layers.1.mlp", "layers.2", "norm"])
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "gemma3"])
def test_a_failure_while_decoding_leaves_whole_tokens(family: str, place: str, failure: type[BaseException]) -> None:
    model = FAMILIES[family]()
    with imdc.patch(model, **TIGHT) as handle:
        answer = greedy(model, token_ids()).sequences
        assert handle.report is not None
        reads = len(handle.report.steps)
        cache = handle.new_cache()
        with pytest.raises(failure), FailingAt(model.model.get_submodule(place), reads + 5, failure):
            greedy(model, token_ids(), past_key_values=cache)
        # Four decoded tokens are in the cache; the fifth, which failed, is in no layer of it.
        assert [layer.get_seq_length() for layer in cache.layers] == [110 + 4] * 3
        resumed = greedy(model, answer[:, : 110 + 5], past_key_values=cache.copy()).sequences
        assert torch.equal(resumed[:, : 110 + 5], answer[:, : 110 + 5])
        again = handle.new_cache()
        model.generate(token_ids(), past_key_values=again, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert content_of(again) == content_of(cache)


def test_an_observer_of_steps_may_fail() -> None:
    model = FAMILIES["llama"]()

    def interrupt(step: imdc.StepReport) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    before = trace_of(model)
    with pytest.raises(KeyboardInterrupt), imdc.patch(model, on_step=interrupt, **TIGHT):
        greedy(model, token_ids())
    assert trace_of(model) == before


def test_a_cache_that_could_not_be_built_is_empty_and_reads_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    stack = ImdcCache._stack
    calls: list[int] = []

    def failing(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("injected")
        return stack(*args)

    with imdc.patch(model, **TIGHT):
        first = greedy(model, token_ids().repeat(2, 1))
        history = torch.cat((first.sequences, token_ids(60, seed=1).expand(2, -1)), dim=1)
        cache = first.past_key_values
        with monkeypatch.context() as patched:
            patched.setattr(ImdcCache, "_stack", staticmethod(failing))
            with pytest.raises(torch.OutOfMemoryError):
                greedy(model, history, past_key_values=cache)
        assert cache.is_empty and cache.get_seq_length() == 0 and cache.kv_bytes() == 0
        assert torch.equal(greedy(model, history, past_key_values=cache).sequences, greedy(model, history).sequences)
