"""Assisted decoding: any assistant, a patched one, and what is taken back again."""

from __future__ import annotations

import pytest
import torch
from mode_cases import LENGTH, ROOMY, TIGHT, Calls, assistant_of, generate, model_of, prompt

import imdc
from imdc.errors import UnsupportedCallError


@pytest.mark.parametrize("noise", [0.02, 0.4], ids=["agrees often", "agrees rarely"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_any_assistant_gives_greedy_tokens(family: str, noise: float, positions: str) -> None:
    model, new = model_of(family), 24
    # So little is dropped that an unpatched assistant still agrees with what the memory says.
    with imdc.patch(model, positions=positions, memory_tokens=LENGTH - 2, chunk_tokens=32) as handle:
        wanted = generate(model, prompt(), max_new_tokens=new, eos_token_id=None)
        with Calls(model) as calls:
            got = generate(model, prompt(), max_new_tokens=new, assistant_model=assistant_of(family, noise))
        assert handle.report is not None
        decoded = calls.tokens[len(handle.report.steps) :]
    assert torch.equal(got, wanted)
    # Otherwise nothing would be known about candidates that are accepted, or that are taken back.
    assert len(decoded) <= new * 2 / 3 if noise < 0.1 else sum(decoded) > new * 2


@pytest.mark.parametrize("noise", [0.02, 0.4], ids=["agrees often", "agrees rarely"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("limits", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_a_patched_assistant_drafts_and_takes_back(family: str, noise: float, limits: dict[str, int]) -> None:
    model, assistant = model_of(family), assistant_of(family, noise)
    wanted = generate(model, prompt(), max_new_tokens=16)
    with imdc.patch(assistant, **limits) as drafts:
        with Calls(assistant) as calls:
            assert torch.equal(generate(model, prompt(), max_new_tokens=16, assistant_model=assistant), wanted)
        assert drafts.report is not None
        # The prompt is read once; after that drafting adds one or two tokens at a time.
        assert max(calls.tokens[len(drafts.report.steps) :]) <= 2
        with imdc.patch(model, **ROOMY):
            assert torch.equal(generate(model, prompt(), max_new_tokens=16, assistant_model=assistant), wanted)


def test_an_assistant_that_compresses_while_decoding_is_refused() -> None:
    assistant = assistant_of("llama", 0.4)
    with (
        imdc.patch(assistant, decode_tokens=16, **TIGHT),
        pytest.raises(UnsupportedCallError, match="decode_tokens=16"),
    ):
        generate(model_of("llama"), prompt(), assistant_model=assistant)


@pytest.mark.parametrize("family", ["mistral_sliding", "gemma3"])
def test_windows_stay_bounded_after_assisted_decoding(family: str) -> None:
    model = model_of(family)
    with imdc.patch(model, **TIGHT):
        first = generate(model, prompt(), prompt_lookup_num_tokens=4, return_dict_in_generate=True)
        history = torch.cat((first.sequences, prompt()), dim=1)
        second = generate(
            model,
            history,
            past_key_values=first.past_key_values,
            max_new_tokens=40,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
    windows = [layer for layer in second.past_key_values.layers if layer.is_sliding]
    assert windows and all(layer.keys.shape[2] == layer.sliding_window - 1 for layer in windows)
