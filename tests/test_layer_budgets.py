"""Layer budgets in a model: layers of different lengths in every mode that generate() has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, greedy, token_ids
from transformers import PreTrainedModel

import imdc
from imdc.cache.cache import ImdcCache
from imdc.cache.turn import Turn
from imdc.config import LAYER_BUDGETS, PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.layer_budgets import planned_layers
from imdc.model import hf
from imdc.schedule import build_steps

TIGHT: dict[str, Any] = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8}
RAGGED = [budget for budget in LAYER_BUDGETS if budget != "uniform"]


def model_of(**options: Any) -> PreTrainedModel:
    """Four layers whose keys lie in fewer and fewer directions: random weights alone make all layers alike."""
    model: Any = build("llama", num_hidden_layers=4, **options)
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.weight.data.view(2, 16, -1)[:, : 4 * number] *= 0.2
    return model


def cache_of(output: Any) -> ImdcCache:
    cache = getattr(output, hf.CACHE_NAME)
    assert isinstance(cache, ImdcCache)
    return cache


def lengths(cache: ImdcCache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


def test_layers_whose_keys_have_more_entropy_get_more() -> None:
    """Three layers whose keys are cut to one direction, and one as it is."""
    model: Any = model_of()
    for layer in model.model.layers[:3]:
        weight = layer.self_attn.k_proj.weight.data.view(2, 16, -1)
        weight[:, 1:] = 0.0
        # A key that rotary embedding leaves in its direction.
        weight[:, 0] = 0.0
        weight[:, 7] = torch.randn(weight.shape[-1], generator=torch.Generator().manual_seed(0))
    shares = {}
    for positions in ("original", "compact"):
        with imdc.patch(model, layer_budget="entropy", positions=positions, initial_memory=0.25, **TIGHT) as handle:
            cache = handle.new_cache()
            model(token_ids(500), **{hf.CACHE_NAME: cache})
        shares[positions] = lengths(cache)
        # Shares of 1, 1, 1 and above 3, of which no layer takes more than twice the average.
        assert sorted(lengths(cache)[:3]) == [42, 43, 43] and lengths(cache)[3] == 128
    # Keys are measured rotated in both, so positions change nothing of it.
    assert shares["original"] == shares["compact"]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("budget", RAGGED)
def test_layers_differ_at_the_total_of_the_uniform_budget(budget: str, positions: str) -> None:
    model, ids = model_of(), token_ids(300)
    bytes_by_step: dict[str, list[int]] = {}
    for name in ("uniform", budget):
        options = {"layer_budget": name, "positions": positions, **TIGHT}
        with imdc.patch(model, **options) as handle:
            stored = lengths(cache_of(greedy(model, ids)))
            assert handle.report is not None and handle.report.memory_tokens == 64
            bytes_by_step[name] = [step.kv_bytes for step in handle.report.steps]
        assert sum(stored) == 4 * (64 + 11)
    assert bytes_by_step[budget] == bytes_by_step["uniform"]
    assert len(set(stored)) > 1
    if budget == "pyramid":
        config = PrefillConfig(layer_budget=budget, **TIGHT)
        planned = planned_layers(config, 4, build_steps(300, config))[-1]
        assert stored == [kept + 11 for kept in planned] and stored == sorted(stored, reverse=True)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("budget", RAGGED)
def test_a_prompt_that_fits_changes_nothing(budget: str, positions: str) -> None:
    model, ids = model_of(), token_ids(100)
    alone = greedy(model, ids)
    with imdc.patch(model, layer_budget=budget, positions=positions, memory_tokens=256, chunk_tokens=32):
        ours = greedy(model, ids)
    assert torch.equal(alone.sequences, ours.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(alone.logits), atol=2e-4, rtol=1e-4)


def by_hand(model: PreTrainedModel, cache: ImdcCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of tokens decoded one by one: no mask is needed, so none can be wrong."""
    return torch.cat(
        [model(tokens[:, i : i + 1], **{hf.CACHE_NAME: cache}).logits for i in range(tokens.shape[1])], dim=1
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", RAGGED)
def test_batches_beams_and_drafts_are_the_row_alone(budget: str, implementation: str) -> None:
    model = model_of(attn_implementation=implementation)
    long, short = token_ids(300, seed=1), token_ids(90, seed=2)
    padded = torch.cat((long, torch.nn.functional.pad(short, (210, 0), value=0)))
    mask = (torch.arange(300) >= torch.tensor([[0], [210]])).long()
    with imdc.patch(model, layer_budget=budget, **TIGHT):
        alone = [greedy(model, ids) for ids in (long, short)]
        both = greedy(model, padded, attention_mask=mask)
        assert cache_of(both).ragged
        for row in range(2):
            assert torch.equal(both.sequences[row, -12:], alone[row].sequences[0, -12:])
            logits = [torch.stack(output.logits)[:, index] for output, index in ((both, row), (alone[row], 0))]
            torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
        looked_up = greedy(model, long, prompt_lookup_num_tokens=3)
        assert torch.equal(looked_up.sequences, alone[0].sequences)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
        beams = [model.generate(ids, attention_mask=seen, **options) for ids, seen in ((long, None), (padded, mask))]
        assert torch.equal(beams[0][0, -8:], beams[1][0, -8:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_several_candidates_at_once_are_decoded_as_one_by_one(implementation: str) -> None:
    model, new = model_of(attn_implementation=implementation), token_ids(5, seed=3)
    with imdc.patch(model, layer_budget="pyramid", **TIGHT) as handle:
        cache = handle.new_cache()
        model(token_ids(300), **{hf.CACHE_NAME: cache})
        expected = by_hand(model, cache.copy(), new)
        cache.turn = Turn(assisted=True)
        found = model(new, **{hf.CACHE_NAME: cache}).logits
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("budget", RAGGED)
def test_turns_and_long_answers_keep_the_total_and_the_shares(budget: str, positions: str) -> None:
    model, text = model_of(), token_ids(700)
    with imdc.patch(model, layer_budget=budget, positions=positions, **TIGHT) as handle:
        cache = handle.new_cache()
        for end in (300, 340, 700):
            model(text[:, cache.get_seq_length() : end], **{hf.CACHE_NAME: cache})
            assert sum(lengths(cache)) == 4 * 64 and max(lengths(cache)) <= 2 * 64
            assert cache.kv_bytes() == 4 * 64 * 2 * 2 * 16 * 4
        assert len(set(lengths(cache))) > 1
    with imdc.patch(model, layer_budget=budget, positions=positions, decode_tokens=8, **TIGHT):
        stored = lengths(cache_of(greedy(model, text)))
        assert sum(stored) <= 4 * (64 + 8) and len(set(stored)) > 1


@pytest.mark.parametrize("budget", RAGGED)
def test_saved_caches_go_on_and_tails_are_cropped(budget: str, tmp_path: Path) -> None:
    model, ids, new = model_of(), token_ids(300), token_ids(4, seed=5)
    with imdc.patch(model, layer_budget=budget, **TIGHT) as handle:
        cache = handle.new_cache()
        model(ids, **{hf.CACHE_NAME: cache})
        imdc.save_cache(cache, tmp_path / "cache")
        expected = by_hand(model, cache, new)
        loaded = imdc.load_cache(tmp_path / "cache", model)
        assert torch.equal(by_hand(model, loaded, new), expected)
        loaded.crop(-4)
        assert torch.equal(by_hand(model, loaded, new), expected)
        with pytest.raises(UnsupportedCallError, match="read the prompt again"):
            loaded.crop(-5)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("budget", RAGGED)
def test_questions_about_a_document_keep_every_layer_as_it_is(budget: str, positions: str) -> None:
    model, question = model_of(), token_ids(9, seed=3)
    with imdc.patch(model, layer_budget=budget, positions=positions, **TIGHT) as handle:
        cache = handle.read(token_ids(300))
        before = [layer.keys.clone() for layer in cache.layers]
        answer = handle.ask(cache, question, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
        # As if the question were decoded token by token over the same memory.
        logits, new = by_hand(model, cache, question), []
        for _ in range(6):
            new.append(int(logits[0, -1].argmax()))
            logits = by_hand(model, cache, torch.tensor([new[-1:]]))
    assert answer.tolist() == [new] and len(set(lengths(cache))) > 1


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "smollm3"])
def test_sliding_layers_have_no_budget_of_their_own(family: str) -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    options = {"layer_types": types} if family.startswith("gemma") else {}
    options |= {"no_rope_layers": [1, 0, 1, 1]} if family == "smollm3" else {}
    model = FAMILIES[family](num_hidden_layers=4, **options)
    long, short = token_ids(300, seed=1), token_ids(90, seed=2)
    padded = torch.cat((long, torch.nn.functional.pad(short, (210, 0), value=0)))
    mask = (torch.arange(300) >= torch.tensor([[0], [210]])).long()
    for positions in ("original", "compact"):
        with imdc.patch(model, layer_budget="pyramid", positions=positions, **TIGHT) as handle:
            alone = [greedy(model, ids) for ids in (long, short)]
            full = handle._parts.full_layers
            stored = [lengths(cache_of(alone[0]))[layer] for layer in full]
            assert sum(stored) == len(full) * (64 + 11) and stored == sorted(stored, reverse=True)
            both = greedy(model, padded, attention_mask=mask)
        for row in range(2):
            assert torch.equal(both.sequences[row, -12:], alone[row].sequences[0, -12:])


def test_other_attention_is_refused_when_the_model_is_patched() -> None:
    model = model_of(attn_implementation="flex_attention")
    with pytest.raises(UnsupportedCallError, match=r"attn_implementation 'sdpa' or 'eager'.*layer_budget='uniform'"):
        imdc.patch(model, layer_budget="pyramid", **TIGHT)


def test_a_cache_goes_on_under_another_budget() -> None:
    model, text = model_of(), token_ids(500)
    cache = None
    for end, budget in ((300, "pyramid"), (400, "uniform"), (500, "pyramid")):
        with imdc.patch(model, layer_budget=budget, **TIGHT) as handle:
            cache = cache or handle.new_cache()
            model(text[:, cache.get_seq_length() : end], **{hf.CACHE_NAME: cache})
        assert sum(lengths(cache)) == 4 * 64
        assert (len(set(lengths(cache))) == 1) is (budget == "uniform")
