"""The boundary with transformers fails closed: a call goes through imdc or raises, whatever transformers does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, KINDS, build, greedy, token_ids, two_layers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import imdc
from imdc.cache.cache import ImdcCache
from imdc.errors import ImdcError, UnsupportedCallError, UnsupportedModelError
from imdc.model import hf

TIGHT: dict[str, Any] = {
    "memory_tokens": 48,
    "chunk_tokens": 24,
    "sink_tokens": 2,
    "recent_tokens": 8,
    "initial_memory": 0.25,
}
LONG = 4300


class Widths:
    """The number of tokens in every pass through a model's decoder."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.tokens = model, []

    def __enter__(self) -> list[int]:
        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self.tokens.append(kwargs["input_ids"].shape[1])

        self.hook = self.model.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.tokens

    def __exit__(self, *error: object) -> None:
        self.hook.remove()


@pytest.fixture
def model() -> PreTrainedModel:
    return FAMILIES["llama"]()


@pytest.mark.parametrize(
    ("family", "length", "size"),
    [*((family, LONG, 512) for family in KINDS), *((name, 1100, 128) for name in FAMILIES if name not in KINDS)],
)
def test_a_long_prompt_is_bounded_in_every_family(family: str, length: int, size: int) -> None:
    model = build(family, max_position_embeddings=16384, **two_layers(family))
    with imdc.patch(model, memory_tokens=size, chunk_tokens=size) as handle, Widths(model) as widths:
        output = model.generate(token_ids(length), max_new_tokens=2, do_sample=False, pad_token_id=0,
                                return_dict_in_generate=True)  # fmt: skip
        most = 2 * size + handle.config.observation_tokens
        assert max(widths) <= most < length
        assert handle.report is not None and handle.report.prompt_tokens == length
        assert isinstance(output[hf.CACHE_NAME], ImdcCache)
        widths.clear()
        cache = handle.new_cache()
        for seed in (1, 2):
            model(token_ids(length, seed=seed), **{hf.CACHE_NAME: cache}, logits_to_keep=1)
        assert max(widths) <= most
        assert cache.stored_tokens() <= size and handle.report.prompt_tokens == length
        assert cache.get_seq_length() == 2 * length


def test_an_answer_of_phi3_may_cross_its_switching_length() -> None:
    model = build("phi3", num_hidden_layers=1, max_position_embeddings=131072)
    with imdc.patch(model, memory_tokens=256, chunk_tokens=512) as handle, Widths(model) as widths:
        output = model.generate(token_ids(4090), max_new_tokens=12, do_sample=False, pad_token_id=0,
                                return_dict_in_generate=True)  # fmt: skip
        assert handle.report is not None
        assert widths[len(handle.report.steps) :] == [1] * 11
    assert isinstance(output[hf.CACHE_NAME], ImdcCache)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_turn_by_hand_gives_what_generate_gives(model: PreTrainedModel, rows: int) -> None:
    first, second = token_ids(150, rows), token_ids(90, rows, seed=1)
    with imdc.patch(model, **TIGHT) as handle:
        cache = handle.new_cache()
        model(first, **{hf.CACHE_NAME: cache}, logits_to_keep=1)
        by_hand = model(second, **{hf.CACHE_NAME: cache}, logits_to_keep=1).logits
        assert handle.report is not None and handle.report.prompt_tokens == 90 * rows
        cache = handle.new_cache()
        model(first, **{hf.CACHE_NAME: cache}, logits_to_keep=1)
        history = torch.cat((first, second), dim=1)
        wanted = greedy(model, history, **{hf.CACHE_NAME: cache}).logits[0]
    assert torch.equal(by_hand[:, -1], wanted)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_sliding", "mixtral"])
@pytest.mark.parametrize("keep", [None, 0, 1, 37], ids=["omitted", "all", "last", "some"])
def test_logits_to_keep_means_what_transformers_means(family: str, keep: int | None) -> None:
    model = FAMILIES[family]()
    ids, more = token_ids(100, 2), token_ids(50, 2, seed=1)
    options = {} if keep is None else {"logits_to_keep": keep}
    with torch.no_grad():
        wanted = model(torch.cat((ids, more), dim=1)).logits
    with imdc.patch(model, memory_tokens=512, chunk_tokens=32) as handle:
        cache = handle.new_cache()
        first = model(ids, **{hf.CACHE_NAME: cache}, **options).logits
        second = model(more, **{hf.CACHE_NAME: cache}, **options).logits
    for got, all_of_it in ((first, wanted[:, :100]), (second, wanted[:, 100:])):
        torch.testing.assert_close(got, all_of_it[:, -(keep or 0) :], atol=2e-5, rtol=1e-4)


def test_logits_of_a_padded_batch_stand_at_its_tokens(model: PreTrainedModel) -> None:
    rows = [token_ids(80), token_ids(50, seed=1)]
    ids = torch.cat((rows[0], torch.nn.functional.pad(rows[1], (30, 0))))
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    with imdc.patch(model, memory_tokens=512, chunk_tokens=32) as handle:
        logits = model(ids, attention_mask=mask, **{hf.CACHE_NAME: handle.new_cache()}).logits
        alone = model(rows[1], **{hf.CACHE_NAME: handle.new_cache()}).logits
    assert not logits[1, :30].any()
    torch.testing.assert_close(logits[1:, 30:], alone)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, ids: m(ids),
        lambda m, ids: m(ids, use_cache=True),
        lambda m, ids: m(ids, use_cache=False),
        lambda m, ids: m(ids, labels=ids),
        lambda m, ids: m(inputs_embeds=torch.zeros(1, ids.shape[1], 64)),
        lambda m, ids: m(ids, **{hf.CACHE_NAME: DynamicCache()}),
    ],
    ids=["plain", "cache", "no cache", "labels", "embeddings", "DynamicCache"],
)
def test_a_long_call_without_our_cache_raises_before_it_computes(
    model: PreTrainedModel, call: Callable[[PreTrainedModel, Tensor], Any]
) -> None:
    with imdc.patch(model, **TIGHT), Widths(model) as widths:
        with pytest.raises(UnsupportedCallError, match=r"attend to 73 tokens without imdc.*hold 72.*new_cache\(\)"):
            call(model, token_ids(73))
        assert not widths


def test_a_foreign_cache_counts(model: PreTrainedModel) -> None:
    with imdc.patch(model, **TIGHT):
        cache = model(token_ids(40), use_cache=True)[hf.CACHE_NAME]
        model(token_ids(32), **{hf.CACHE_NAME: cache})
        with pytest.raises(UnsupportedCallError, match="attend to 73 tokens"):
            model(token_ids(1), **{hf.CACHE_NAME: cache})


def test_guidance_is_refused_where_its_own_prompt_would_grow(model: PreTrainedModel) -> None:
    with imdc.patch(model, **TIGHT), Widths(model) as widths:
        for options in ({"negative_prompt_ids": token_ids(60)}, {"max_new_tokens": 80}):
            settings = {"max_new_tokens": 20, "guidance_scale": 1.5, "pad_token_id": 0, **options}
            with pytest.raises(UnsupportedCallError, match="guidance_scale=1.5"):
                model.generate(token_ids(100), **settings)
        assert not widths
        model.generate(token_ids(100), max_new_tokens=8, guidance_scale=1.5, pad_token_id=0)


def test_an_unpatched_assistant_is_named(model: PreTrainedModel) -> None:
    assistant = FAMILIES["llama"](seed=5, num_hidden_layers=1)
    with imdc.patch(model, **TIGHT), pytest.warns(RuntimeWarning, match=r"assistant_model \(LlamaForCausalLM\)"):
        greedy(model, token_ids(100), assistant_model=assistant)


def test_a_renamed_cache_makes_generate_raise(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in transformers 5.24 seen by a version of imdc that did not know the new name."""
    prepare = model.prepare_inputs_for_generation

    def renamed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name != hf.CACHE_NAME}

    with imdc.patch(model, **TIGHT) as handle, Widths(model) as widths:
        monkeypatch.setattr(model, "prepare_inputs_for_generation", renamed)
        for length in (20, 200):
            with pytest.raises(UnsupportedCallError, match="without the KV cache that imdc gave it"):
                greedy(model, token_ids(length))
        assert not widths and handle.report is None


def test_a_generation_that_never_calls_forward_raises(model: PreTrainedModel) -> None:
    def elsewhere(model: PreTrainedModel, input_ids: Tensor, **kwargs: Any) -> Tensor:
        return input_ids

    with imdc.patch(model, **TIGHT), pytest.raises(ImdcError, match="never handed the KV cache"):
        model.generate(token_ids(100), custom_generate=elsewhere)


def test_a_layer_that_does_not_ask_the_registry_is_named(model: PreTrainedModel) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with imdc.patch(model, **TIGHT), pytest.raises(ImdcError, match=r"layers \[1\] of LlamaForCausalLM never reached"):
        greedy(model, token_ids(100))


def test_a_layer_with_a_config_of_its_own_is_reached(model: PreTrainedModel) -> None:
    model.model.layers[1] = copy.deepcopy(model.model.layers[1])
    wanted = greedy(model, token_ids(100)).sequences
    with imdc.patch(model, memory_tokens=512, chunk_tokens=32):
        assert torch.equal(greedy(model, token_ids(100)).sequences, wanted)


def test_the_config_carries_nothing_of_imdc(model: PreTrainedModel) -> None:
    copies: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model.config)))
    before = model.config.to_dict()
    with imdc.patch(model, **TIGHT):
        greedy(model, token_ids(100))
    assert copies and all(one.to_dict() == before and one._attn_implementation == "sdpa" for one in copies)


def test_another_model_may_run_inside_a_step(model: PreTrainedModel) -> None:
    other, ids = FAMILIES["llama"](seed=3), token_ids(30)
    wanted, got = other(ids).logits, []
    model.model.layers[1].register_forward_hook(lambda *_: got.append(other(ids).logits))
    with imdc.patch(model, **TIGHT):
        greedy(model, token_ids(100))
    assert got and all(torch.equal(logits, wanted) for logits in got)


@pytest.mark.parametrize(
    ("version", "message"),
    [("5.16.1", "5.16.1 was not tested"), ("5.99.0", "5.99.0 was not tested"), ("6.0.0.dev0", "6.0.0.dev0 was not")],
)
def test_an_unknown_transformers_is_refused(
    model: PreTrainedModel, version: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(hf.UNTESTED, raising=False)
    monkeypatch.setattr(hf.transformers, "__version__", version)
    with pytest.raises(UnsupportedModelError, match=message):
        imdc.patch(model, **TIGHT)
    monkeypatch.setenv(hf.UNTESTED, "1")
    imdc.patch(model, **TIGHT).remove()
    monkeypatch.setattr(hf, "CACHE_NAMES", ("kv_cache",))
    with pytest.raises(UnsupportedModelError, match="lacks what imdc needs .cache argument of forward"):
        imdc.patch(model, **TIGHT)
