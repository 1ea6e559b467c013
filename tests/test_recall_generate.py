"""generate() with recall: the prompt's last tokens take back what they need, and so does the answer as it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mode_cases import by_hand
from tiny_models import FAMILIES, KINDS, token_ids
from torch import Tensor

import imdc
from imdc.config import PrefillConfig
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.planner import recalling
from imdc.prefill.recall import Recall

TIGHT = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8, "recall": "host"}
OTHERS: list[dict[str, Any]] = [{"layer_budget": "pyramid"}, {"recall": "disk"}, {"recall_dtype": "int8"}]
TAIL = PrefillConfig().observation_tokens
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, Tensor]]:
    """(layer, queries, pairs behind the text, values that were taken back) of every taking back."""
    calls: list[tuple[int, int, int, Tensor]] = []
    own = Recall.take

    def take(self: Recall, layer: int, q: Tensor, own_k: Tensor, own_v: Tensor, *args: Any, **options: Any) -> Any:
        found = own(self, layer, q, own_k, own_v, *args, **options)
        calls.append((layer, q.shape[2], own_k.shape[2], found[1]))
        return found

    monkeypatch.setattr(Recall, "take", take)
    return calls


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("every", [0, 1])
def test_a_memory_that_holds_the_prompt_answers_as_the_unpatched_model(family: str, every: int) -> None:
    model, prompt = FAMILIES[family](), token_ids(150)
    wanted, short = model.generate(prompt, **GREEDY), model.generate(prompt[:, :1], **GREEDY)
    with imdc.patch(model, memory_tokens=256, chunk_tokens=32, recall="host", recall_every=every) as handle:
        assert torch.equal(model.generate(prompt, **GREEDY), wanted)
        assert torch.equal(model.generate(prompt[:, :1], **GREEDY), short)
    assert handle.report is not None and handle.report.recalled_bytes == 0


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "phi3"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    "options",
    [{"recall_every": 0}, {}, *({"recall_every": 3, **other} for other in OTHERS)],
    ids=str,
)
def test_a_prompt_is_a_document_and_a_question(family: str, positions: str, options: dict[str, Any]) -> None:
    model, prompt = FAMILIES[family](), token_ids(300)
    document, question = prompt[:, :-TAIL], prompt[:, -TAIL:]
    padded = torch.cat((torch.zeros(1, 7, dtype=torch.long), prompt), dim=1)
    with imdc.patch(model, **{**TIGHT, **options}, positions=positions) as handle:
        cache = handle.read(document, [question], room=TAIL + 8)
        wanted = handle.ask(cache, question, **GREEDY)
        asked = handle.report
        got = model.generate(prompt, **GREEDY)
        report = handle.report
        from_padded = model.generate(padded, attention_mask=(padded > 0).long(), **GREEDY)
    assert torch.equal(got[:, :300], prompt) and torch.equal(got[:, 300:], wanted)
    assert torch.equal(from_padded[:, 307:], wanted)
    assert asked is not None and report is not None and cache.store is not None
    assert report.prompt_tokens == 300 and report.memory_tokens == 64 + TAIL
    assert sum(step.chunk_tokens for step in report.steps) == 300
    assert report.host_bytes == cache.store.nbytes()
    assert report.recalled_bytes == asked.recalled_bytes > 0 and report.recall_seconds > 0


@pytest.mark.parametrize("every", [1, 3])
def test_an_answer_takes_back_anew(
    every: int, taken: list[tuple[int, int, int, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompt = FAMILIES["gemma3"](), token_ids(300)
    # Means of random keys lead nowhere, and what the question had taken would stay.
    monkeypatch.setattr(recalling, "compared_blocks", lambda kept, tokens: 0)
    with imdc.patch(model, **TIGHT, recall_every=every, positions="original") as handle:
        result = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
        moved = handle.report.recalled_bytes if handle.report else 0
    # The question takes back, then every so manyth token of the answer, of which the last one is never read.
    expected = [TAIL, *(TAIL + 1 + token for token in range(every - 1, 7, every))]
    assert [own for _, _, own, _ in taken] == expected
    assert [queries for _, queries, _, _ in taken] == [TAIL] + [1] * (len(expected) - 1)
    full = taken[0][0]
    layer = result.past_key_values.layers[full]
    assert layer.stored == 64 + TAIL + 7
    assert torch.equal(layer.values[:, :, :64], taken[-1][3])
    assert not torch.equal(taken[0][3], taken[-1][3])
    with imdc.patch(model, **TIGHT, recall_every=0, positions="original") as handle:
        model.generate(prompt, **GREEDY)
        assert handle.report is not None and 0 < handle.report.recalled_bytes < moved


@pytest.mark.parametrize("family", ["llama", "ministral3", "glm4"])
def test_renewals_find_the_same_in_compact_positions(family: str, taken: list[tuple[int, int, int, Tensor]]) -> None:
    """Neither the text nor what follows it passes the window, so the first layer's keys stand where they always do."""
    model, prompt = FAMILIES[family](), token_ids(300)
    found = []
    for positions in ("original", "compact"):
        taken.clear()
        # So much memory that all keys are compared: means of keys are turned as one, which is not the same.
        with imdc.patch(model, **{**TIGHT, "memory_tokens": 100}, recall_every=1, positions=positions):
            # What is written is given: it would depend on what the upper layers took back.
            model.generate(prompt, **GREEDY, logits_processor=[_always_five])
        found.append([values for layer, _, _, values in taken if layer == 0])
    assert len(found[0]) == len(found[1]) == 8
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][1], found[0][-1])


def _always_five(ids: Tensor, scores: Tensor) -> Tensor:
    return torch.full_like(scores, float("-inf")).index_fill_(1, torch.tensor([5]), 0.0)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_rows_renew_as_each_alone(positions: str) -> None:
    model = FAMILIES["gemma3"]()
    questions = [token_ids(9, seed=1), token_ids(5, seed=2), token_ids(14, seed=3)]
    with imdc.patch(model, **TIGHT, positions=positions, recall_every=2) as handle:
        cache = handle.read(token_ids(300))
        alone = [handle.ask(cache, one, **GREEDY) for one in questions]
        assert torch.equal(handle.ask(cache, questions, **GREEDY), torch.cat(alone))
        beams = handle.ask(cache, questions[0], num_beams=3, **GREEDY)
        assert torch.equal(handle.ask(cache, questions[0], num_beams=3, **GREEDY), beams)
    with imdc.patch(model, **TIGHT, positions=positions, recall_every=0) as handle:
        assert not torch.equal(torch.cat([handle.ask(cache, one, **GREEDY) for one in questions]), torch.cat(alone))


def test_the_device_stays_bounded() -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **TIGHT, recall_every=4) as handle:
        for length in (200, 1000):
            cache = model.generate(token_ids(length), **GREEDY, return_dict_in_generate=True).past_key_values
            assert [layer.stored for layer in cache.layers] == [64 + TAIL + 7] * 3
            assert handle.report is not None and max(step.memory_after for step in handle.report.steps) == 64 + TAIL


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        (
            {},
            lambda m, h: m.generate(token_ids(100).repeat(2, 1), **GREEDY),
            "2 rows, and recall='host' reads one prompt",
        ),
        ({}, lambda m, h: m(token_ids(100), past_key_values=h.new_cache()), "leave it out for forward"),
        (
            {},
            lambda m, h: m.generate(token_ids(100), past_key_values=h.new_cache(), **GREEDY),
            "an empty cache with recall",
        ),
        (
            {},
            lambda m, h: m.generate(token_ids(100), custom_generate=by_hand, **GREEDY),
            "custom_generate with recall='host'",
        ),
        (
            {"recall_every": 2},
            lambda m, h: m.generate(token_ids(100), prompt_lookup_num_tokens=3, **GREEDY),
            "recall_every=2 counts single tokens",
        ),
        (
            {"recall_every": 2},
            lambda m, h: h.ask(h.read(token_ids(100)), token_ids(9), prompt_lookup_num_tokens=3, **GREEDY),
            "recall_every=2 counts single tokens",
        ),
    ],
)
def test_what_cannot_take_back_is_refused(options: dict[str, Any], call: Any, message: str) -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **TIGHT, **options) as handle:
        wanted = model.generate(token_ids(100), **GREEDY)
        with pytest.raises(UnsupportedCallError, match=message):
            call(model, handle)
        assert torch.equal(model.generate(token_ids(100), **GREEDY), wanted)


def test_a_loop_of_the_callers_own_asks_what_was_read() -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **TIGHT) as handle:
        cache, question = handle.read(token_ids(100)), token_ids(9, seed=2)
        wanted = handle.ask(cache, question, **GREEDY)
        assert torch.equal(handle.ask(cache, question, custom_generate=by_hand, **GREEDY), wanted)


def test_assistants_have_no_recall() -> None:
    model, assistant = FAMILIES["llama"](), FAMILIES["llama"]()
    with (
        imdc.patch(model, memory_tokens=64, chunk_tokens=32),
        imdc.patch(assistant, **TIGHT),
        pytest.raises(UnsupportedCallError, match="not for an assistant model"),
    ):
        model.generate(token_ids(100), assistant_model=assistant, **GREEDY)


def test_the_cache_of_an_answer_is_over_with_it(tmp_path: Path) -> None:
    model, prompt = FAMILIES["llama"](), token_ids(300)
    with imdc.patch(model, **TIGHT) as handle, torch.no_grad():
        result = model.generate(prompt, **GREEDY, return_dict_in_generate=True)
        cache, more = result.past_key_values, torch.cat((result.sequences, token_ids(9, seed=1)), dim=1)
        with pytest.raises(UnsupportedCallError, match="cannot go on.*pass the whole conversation"):
            model.generate(more, past_key_values=cache, **GREEDY)
        with pytest.raises(UnsupportedCallError, match="that of one question.*ask the one that read"):
            handle.ask(cache, token_ids(9), **GREEDY)
        with pytest.raises(UnsupportedCallError, match="that of one question.*save the one"):
            imdc.save_cache(cache, tmp_path / "cache")
        assert not list(tmp_path.iterdir())
        # As it says.
        assert model.generate(more, **GREEDY).shape == (1, 325)


@pytest.mark.parametrize("every", [0, 1], ids=["the prompt", "the answer too"])
def test_a_model_may_leave_the_scale_to_the_attention(every: int) -> None:
    model, prompt = FAMILIES["llama"](), token_ids(300)
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    logits = []
    with imdc.patch(model, **TIGHT, recall_every=every):
        for scale in (16**-0.5, None):
            for layer in model.model.layers:
                layer.self_attn.scaling = scale
            logits.append(torch.stack(model.generate(prompt, **options).logits))
    assert torch.equal(*logits)


def test_compressing_an_answer_ends_its_renewals(taken: list[tuple[int, int, int, Tensor]]) -> None:
    model = FAMILIES["gemma3"]()
    with imdc.patch(model, **TIGHT, recall_every=2, decode_tokens=5):
        cache = model.generate(
            token_ids(300), **{**GREEDY, "max_new_tokens": 20}, return_dict_in_generate=True
        ).past_key_values
    assert [own - TAIL for _, _, own, _ in taken] == [0, 2, 4]
    assert cache.stored_tokens() <= 64 + 5


def test_renewals_need_recall() -> None:
    with pytest.raises(ConfigError, match="recall_every=4 has no effect with recall='none'; set recall='host'"):
        PrefillConfig(recall_every=4)
    with pytest.raises(ConfigError, match="recall_every must be at least 0"):
        PrefillConfig(recall="host", recall_every=-1)
