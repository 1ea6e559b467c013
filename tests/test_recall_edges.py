"""Recall and its caches where calls are unusual: inference mode, crop, interrupts, layers that keep nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import build, token_ids

import imdc
from imdc.errors import UnsupportedCallError
from imdc.model import hf
from imdc.prefill.engine import Engine

TIGHT: dict[str, Any] = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("recall_dtype", ["model", "int8"])
@pytest.mark.parametrize("recall", ["host", "disk"])
def test_a_document_read_in_inference_mode_is_asked_outside(recall: str, recall_dtype: str) -> None:
    with imdc.patch(build("llama"), recall=recall, recall_dtype=recall_dtype, **TIGHT) as handle:
        with torch.inference_mode():
            cache = handle.read(token_ids(200))
        asked = handle.ask(cache, token_ids(6, seed=2), **GREEDY)
        torch.testing.assert_close(asked, handle.ask(handle.read(token_ids(200)), token_ids(6, seed=2), **GREEDY))


def test_a_cache_of_inference_mode_is_cropped_outside() -> None:
    with imdc.patch(build("llama"), memory_tokens=400) as handle:
        with torch.inference_mode():
            cache = handle.read(token_ids(200))
        cache.crop(-10)
        assert (cache.tail, cache.stored_tokens(), cache.rows.tokens.tolist()) == (0, 190, [190])


def test_a_document_with_a_store_is_not_cropped() -> None:
    # Questions would take back what was cut.
    with imdc.patch(build("llama"), memory_tokens=400, recall="host") as handle:
        cache = handle.read(token_ids(200))
        with pytest.raises(UnsupportedCallError, match="would cut tokens of the document, which its store keeps"):
            cache.crop(-50)
        assert cache.stored_tokens() == 200 and handle.ask(cache, token_ids(6, seed=2), **GREEDY).shape == (1, 8)


@pytest.mark.parametrize("recall", ["none", "host"])
def test_layers_may_keep_nothing(recall: str) -> None:
    model = build("llama", num_hidden_layers=6)
    options = {**TIGHT, "sink_tokens": 0, "recent_tokens": 0, "memory_tokens": 8, "layer_budget": "pyramid"}
    with imdc.patch(model, schedule="fm", recall=recall, **options) as handle:
        cache = handle.read(token_ids(200))
        assert 0 in [layer.stored for layer in cache.layers]
        assert handle.ask(cache, token_ids(6, seed=2), **GREEDY).shape == (1, 8)


@pytest.mark.parametrize("recall", ["none", "host"])
def test_an_answer_that_fits_the_window_drops_nothing(recall: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed, prefill = [], Engine.prefill

    def watched(self: Engine, *args: Any, **kwargs: Any) -> Any:
        compressed.append(self.compresses)
        return prefill(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "prefill", watched)
    model = build("llama", max_position_embeddings=256)
    with imdc.patch(model, recall=recall, **{**TIGHT, "memory_tokens": 60, "chunk_tokens": 100}) as handle:
        cache = handle.read(token_ids(1000), room=190)
        handle.ask(cache, token_ids(6, seed=3), **{**GREEDY, "max_new_tokens": 180})
    assert compressed and not any(compressed)


def test_an_interrupted_turn_leaves_a_cache_that_decodes() -> None:
    def interrupt(step: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    armed: list[bool] = []
    model, one = build("llama"), token_ids(1, seed=9)
    with imdc.patch(model, on_step=interrupt, **TIGHT) as handle:
        cache = handle.read(token_ids(200))
        armed.append(True)
        turn = torch.cat((token_ids(200), token_ids(40, seed=2)), dim=1)
        with pytest.raises(KeyboardInterrupt):
            model.generate(turn, past_key_values=cache, **GREEDY)
        armed.clear()
        model(one, **{hf.cache_argument(type(model).forward): cache})
        assert (cache.phase, cache.tail, cache.stored_tokens()) == ("decode", 1, 65)
