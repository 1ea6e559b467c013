"""Positions stay within the model's window: sizes that fit it, histories read anew, rotary factors that agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, greedy, token_ids
from torch import Tensor
from traces import positions_of
from transformers import PreTrainedModel

import imdc
from imdc.cache.cache import ImdcCache
from imdc.config import PrefillConfig
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.model.shape import ModelShape
from imdc.positions import answer_room, fitted
from imdc.schedule import least_first_chunk
from imdc.units import DefaultSize

TIGHT = {"memory_tokens": 48, "chunk_tokens": 24, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}
SHORT = 64
LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": SHORT,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": SHORT,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 5.0, 8.0],
    },
}


def small(family: str = "llama", window: int = 256, **overrides: Any) -> PreTrainedModel:
    return build(family, **{"num_hidden_layers": 2, "max_position_embeddings": window, **overrides})


def longrope() -> PreTrainedModel:
    return small("phi3", **LONGROPE)


def generate(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": new, **options}
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("window", [2048, 4096, 8192, 131_072])
@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_tokens": 512}, {"memory_tokens": 1024}, {"observation_tokens": 64}, {"initial_memory": 3000}],
)
def test_sizes_nobody_chose_fit_the_window_and_others_stay(window: int, options: dict[str, int]) -> None:
    config = PrefillConfig(**options)
    sizes = fitted(config, window)
    assert isinstance(sizes.chunk_tokens, int)
    assert sizes.memory_tokens + sizes.chunk_tokens + sizes.observation_tokens <= window
    room = answer_room(sizes, window)
    assert room is not None and room >= window // 8
    # After such an answer the next turn's first step fits too.
    after = sizes.memory_tokens + room + least_first_chunk(sizes.chunk_tokens) + sizes.observation_tokens
    assert after <= window
    for name in ("memory_tokens", "chunk_tokens"):
        chosen, used = getattr(config, name), getattr(sizes, name)
        assert used == chosen if name in options else used <= chosen
    assert fitted(sizes, window) == sizes
    if window > 8000:
        assert sizes == config


def test_a_size_that_was_given_is_never_changed() -> None:
    assert (
        isinstance(PrefillConfig().memory_tokens, DefaultSize) and PrefillConfig(memory_tokens=4096) == PrefillConfig()
    )
    config = PrefillConfig(memory_tokens=4096, chunk_tokens=2048)
    assert fitted(config, 4096) is config
    assert repr(PrefillConfig().memory_tokens) == "4096"


@pytest.mark.parametrize(("family", "window"), [("llama", 2048), ("llama", 4096), ("phi3", 4096)])
def test_defaults_read_prompts_longer_than_a_small_window(family: str, window: int) -> None:
    overrides: dict[str, Any] = {"num_hidden_layers": 1, "max_position_embeddings": window}
    if family == "phi3":
        rope = {**LONGROPE["rope_parameters"], "original_max_position_embeddings": window}
        overrides |= {"max_position_embeddings": 131_072, "rope_parameters": rope}
        overrides["original_max_position_embeddings"] = window
    model = build(family, **overrides)
    with imdc.patch(model) as handle, positions_of(model) as largest, torch.no_grad():
        model(token_ids(window + 900), past_key_values=handle.new_cache(), logits_to_keep=1)
        assert max(largest) < window
        assert handle.report is not None
        used = handle.report.config
        assert used.memory_tokens < handle.config.memory_tokens == 4096
        assert handle.report.memory_tokens == used.memory_tokens
    plan = imdc.plan(model, window + 900)
    assert plan.config == used and not plan.notes()
    assert [step.chunk_tokens for step in plan.steps] == [step.chunk_tokens for step in handle.report.steps]


def test_chosen_sizes_that_do_not_fit_are_refused_before_anything_is_computed() -> None:
    model = small(window=128)
    with imdc.patch(model, memory_tokens=100, chunk_tokens=64) as handle, positions_of(model) as largest:
        # A batch is refused as a whole: the first row alone would fit.
        ids, mask = token_ids(400, rows=2), torch.ones(2, 400, dtype=torch.long)
        mask[0, :350] = 0
        with pytest.raises(
            UnsupportedCallError, match=r"lower memory_tokens=100 or chunk_tokens=64, or leave both out"
        ):
            generate(model, ids, 4, attention_mask=mask)
        assert not largest and handle.report is None
    assert any("will refuse" in note for note in imdc.plan(model, 400, memory_tokens=100, chunk_tokens=64).notes())


def test_auto_chunks_fit_limit_and_window() -> None:
    model = small(window=1024)
    shape = ModelShape.from_model(model)
    options: dict[str, Any] = {"chunk_tokens": "auto", "memory_limit": shape.weights + 2**30}
    plan = imdc.plan(model, 5000, device="cpu", **options)
    assert isinstance(plan.config.chunk_tokens, int)
    assert plan.config.memory_tokens + plan.config.chunk_tokens + plan.config.observation_tokens <= 1024
    with imdc.patch(model, **options) as handle, torch.no_grad():
        model(token_ids(5000), past_key_values=handle.new_cache(), logits_to_keep=1)
    assert handle.report is not None
    assert [step.chunk_tokens for step in plan.steps] == [step.chunk_tokens for step in handle.report.steps]
    with pytest.raises(ConfigError, match="memory_limit"):
        imdc.plan(model, 5000, device="cpu", chunk_tokens="auto")


def test_longrope_never_mixes_factors_in_a_prompt() -> None:
    model = longrope()
    with imdc.patch(model, positions="original", memory_tokens=256, chunk_tokens=36) as handle, torch.no_grad():
        with positions_of(model) as largest, pytest.raises(UnsupportedCallError, match=r"use positions='compact'"):
            model(token_ids(70), past_key_values=handle.new_cache(), logits_to_keep=1)
        assert not largest


def test_longrope_never_mixes_factors_in_an_answer() -> None:
    model = longrope()
    with imdc.patch(model, positions="original", memory_tokens=256, chunk_tokens=36) as handle, torch.no_grad():
        with positions_of(model) as largest, pytest.raises(UnsupportedCallError, match=r"use positions='compact'"):
            generate(model, token_ids(SHORT - 4), 6)
        assert not largest
        cache = handle.new_cache()
        model(token_ids(SHORT - 4), past_key_values=cache, logits_to_keep=1)
        model(token_ids(4), past_key_values=cache, logits_to_keep=1)
        with pytest.raises(UnsupportedCallError, match=rf"decoding reaches position {SHORT + 1} of original"):
            model(token_ids(1), past_key_values=cache, logits_to_keep=1)


@pytest.mark.parametrize("positions", ["original", "auto", "compact"])
@pytest.mark.parametrize(("length", "new"), [(SHORT - 8, 8), (SHORT - 7, 8)])
def test_longrope_within_its_short_window_is_the_unpatched_model(positions: str, length: int, new: int) -> None:
    model = longrope()
    wanted = generate(model, token_ids(length), new)
    with imdc.patch(model, positions=positions, memory_tokens=256, chunk_tokens=24):
        got = generate(model, token_ids(length), new)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", [256, 48], ids=["roomy", "tail rows at the end of the prompt"])
def test_longrope_that_passes_its_short_window_at_once_has_long_factors_only(memory: int) -> None:
    model, ids, chunk = longrope(), token_ids(90), 96 if memory > 90 else 50
    options = {**TIGHT, "memory_tokens": memory, "chunk_tokens": chunk, "initial_memory": 20}
    with torch.no_grad():
        wanted = model(ids, logits_to_keep=1).logits
        with imdc.patch(model, positions="original", **options) as handle, positions_of(model) as largest:
            got = model(ids, past_key_values=handle.new_cache(), logits_to_keep=1).logits
            assert min(largest) >= SHORT
    if memory > 90:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_longrope_by_hand_stays_short_by_itself() -> None:
    model = longrope()
    with imdc.patch(model, **{**TIGHT, "memory_tokens": 24, "chunk_tokens": 8}, observation_tokens=4) as handle:
        with torch.no_grad(), positions_of(model) as largest:
            cache = handle.new_cache()
            model(token_ids(40), past_key_values=cache, logits_to_keep=1)
            for token in token_ids(80, seed=1)[0]:
                model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
        assert cache.compact and max(largest) < SHORT


def chat(model: PreTrainedModel, turns: int, new: int = 8) -> tuple[Tensor, ImdcCache]:
    cache, history = None, token_ids(0)
    for turn in range(turns):
        history = torch.cat((history, token_ids(60, seed=turn)), dim=1)
        output = generate(model, history, new, past_key_values=cache)
        history, cache = output.sequences, output.past_key_values
    assert isinstance(cache, ImdcCache)
    return history, cache


def test_a_chat_that_leaves_the_window_reads_its_history_anew() -> None:
    model = small(window=256)
    with imdc.patch(model, **TIGHT) as handle:
        history, cache = chat(model, 3)
        assert not cache.compact and handle.report is not None
        following = torch.cat((history, token_ids(60, seed=3)), dim=1)
        output = generate(model, following, 8, past_key_values=cache)
        assert handle.report.prompt_tokens == following.shape[1]
        wanted = generate(model, following, 8)
        assert cache.compact and torch.equal(output.sequences, wanted.sequences)
        assert cache.get_seq_length() == output.sequences.shape[1] - 1
        # From now on it goes on from its cache.
        last = torch.cat((output.sequences, token_ids(60, seed=4)), dim=1)
        generate(model, last, 8, past_key_values=cache)
        assert handle.report.prompt_tokens == 61


def test_only_the_row_that_leaves_the_window_is_read_anew() -> None:
    model = small(window=128)
    lengths = (100, 60)
    ids, mask = token_ids(100, rows=2), torch.ones(2, 100, dtype=torch.long)
    mask[1, :40] = 0
    more = token_ids(40, rows=2, seed=1)
    with imdc.patch(model, **{**TIGHT, "memory_tokens": 40}, observation_tokens=4) as handle:
        first = generate(model, ids, 4, attention_mask=mask)
        history = torch.cat((first.sequences, more), dim=1)
        wide = torch.nn.functional.pad(mask, (0, 44), value=1)
        second = generate(model, history, 4, attention_mask=wide, past_key_values=first.past_key_values)
        assert handle.report is not None and handle.report.prompt_tokens == 144 + 41
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, 100 - length :], 4)
            text = torch.cat((alone.sequences, more[row : row + 1]), dim=1)
            wanted = generate(model, text, 4, past_key_values=alone.past_key_values)
            assert torch.equal(second.sequences[row, -4:], wanted.sequences[0, -4:])


def test_new_tokens_alone_cannot_be_read_anew() -> None:
    model = small(window=256)
    with imdc.patch(model, **TIGHT):
        history, cache = chat(model, 3)
        # The last token of the answer was never read.
        new = torch.cat((history[:, -1:], token_ids(60, seed=3)), dim=1)
        mask = torch.ones(1, history.shape[1] + 60, dtype=torch.long)
        stored = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(
            UnsupportedCallError, match="has 60; pass the whole.*or its last 61 tokens: the last one of"
        ):
            generate(model, new[:, 1:], 8, past_key_values=cache, attention_mask=mask)
        with pytest.raises(UnsupportedCallError, match=r"reaches position 2\d\d, the model was trained for 256.*whole"):
            generate(model, new, 8, past_key_values=cache, attention_mask=mask)
        # The cache is as it was: a turn that fits goes on from it.
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, stored, strict=True))
        generate(model, torch.cat((history, token_ids(20, seed=2)), dim=1), 8, past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_positions_turn_keys_to_the_bit_as_the_model_does(family: str) -> None:
    # Scaled by YaRN, as gpt-oss begins, keys at position 0 are rounded once more.
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}} if family == "gpt_oss" else {}
    model, ids = FAMILIES[family](**rope).to(torch.bfloat16), token_ids(150)
    found = []
    for positions in ("original", "compact"):
        with imdc.patch(model, memory_tokens=512, chunk_tokens=64, positions=positions):
            found.append(greedy(model, ids).logits)
    assert all(torch.equal(original, compact) for original, compact in zip(*found, strict=True))


@pytest.mark.parametrize(("family", "window"), [("exaone4", None), ("exaone4", 24), ("cohere2", 24)])
def test_layers_without_a_window_turn_keys_only_where_the_model_does(family: str, window: int | None) -> None:
    """Where a config names a window and gives it to no layer, EXAONE 4 and Cohere have no rotary embedding at all."""
    model = build(family, sliding_window=window, layer_types=["full_attention"] * 3)
    ids = token_ids(150)
    wanted = greedy(model, ids)
    with imdc.patch(model, memory_tokens=512, chunk_tokens=32, positions="compact"):
        got = greedy(model, ids)
    for ours, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
