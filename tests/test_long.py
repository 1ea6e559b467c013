"""Conversations and answers that go on: what is stored stays bounded from the first token to the last."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny_models import build, token_ids
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import imdc
from imdc.cache.cache import ImdcCache
from imdc.cache.layers import MemoryLayer

MEMORY, CHUNK, TAIL = 64, 32, 32
LIMITS = {"memory_tokens": MEMORY, "chunk_tokens": CHUNK, "sink_tokens": 2, "recent_tokens": 8}
# The sliding window of the tiny models.
WINDOW = 24
TURNS = (300, 1, 6_000, 40, 7, 500, 1, 90, 2, 128)
NEW = 12


def write(model: PreTrainedModel, ids: Tensor, new: int, cache: ImdcCache) -> tuple[Tensor, list[int], list[int]]:
    """Exactly `new` tokens; and what the largest layer of either kind stored after each of as many forward calls."""
    memories: list[int] = []
    windows: list[int] = []

    def count(*_: Any) -> None:
        assert {layer.get_seq_length() for layer in cache.layers} == {ids.shape[1] + len(memories)}
        lengths = [(isinstance(layer, MemoryLayer), layer.keys.shape[2]) for layer in cache.layers]
        memories.append(max((length for full, length in lengths if full), default=0))
        windows.append(max((length for full, length in lengths if not full), default=0))

    hook = model.register_forward_hook(count)
    try:
        sequences = model.generate(
            ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    finally:
        hook.remove()
    assert sequences.shape[1] == ids.shape[1] + new
    assert cache.get_seq_length() == sequences.shape[1] - 1
    assert len(memories) == new
    return sequences, memories, windows


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral_sliding"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_600_new_tokens_stay_bounded(family: str, positions: str) -> None:
    # Compact positions never pass what is stored, so that a small window will do for any answer.
    model = build(family, max_position_embeddings=4096 if positions == "original" else MEMORY + 2 * CHUNK)
    with imdc.patch(model, positions=positions, decode_tokens=TAIL, **LIMITS) as handle:
        cache = handle.new_cache()
        _, memories, windows = write(model, token_ids(300), 600, cache)
        # Compressing again is no prefill: the report is still that of the prompt.
        assert handle.report is not None and handle.report.prompt_tokens == 300
    if family == "mistral_sliding":
        assert set(memories) == {0}
    else:
        # The prompt's memory and a tail that grows token by token; when it is full, the next token finds it merged.
        assert memories == [MEMORY + number % (TAIL + 1) for number in range(600)]
    assert set(windows) == ({0} if family == "llama" else {WINDOW - 1})
    assert cache.compact == (positions == "compact" and family != "mistral_sliding")
    if cache.compact:
        assert cache.rows is not None and int(cache.rows.position[0]) + cache.tail <= MEMORY + TAIL + 1


@pytest.mark.parametrize(
    ("schedule", "positions", "family"),
    [
        *itertools.product(["imdc"], ["original", "compact"], ["llama", "gemma3", "mistral_sliding"]),
        ("im", "original", "gemma3"),
        ("fm", "compact", "llama"),
    ],
)
def test_ten_turns_of_any_length_stay_bounded(schedule: str, positions: str, family: str) -> None:
    window = 32_768 if positions == "original" else MEMORY + 2 * CHUNK
    model = build(family, max_position_embeddings=window)
    with imdc.patch(model, positions=positions, schedule=schedule, **LIMITS) as handle:
        cache, history = handle.new_cache(), token_ids(0)
        for turn, length in enumerate(TURNS):
            unread = history.shape[1] + length - cache.get_seq_length()
            history = torch.cat((history, token_ids(length, seed=turn)), dim=1)
            left = cache.stored_tokens()
            history, memories, windows = write(model, history, NEW, cache)
            report = handle.report
            assert report is not None
            # The last answer's last token was never read; it is the turn's first.
            assert report.prompt_tokens == unread == length + (turn > 0)
            assert sum(step.chunk_tokens for step in report.steps) == unread
            assert report.steps[0].memory_before == left
            if family == "mistral_sliding":
                assert set(memories) == {0} and report.memory_tokens == 0
            else:
                assert all(step.memory_after <= MEMORY for step in report.steps)
                # The first step may find the last answer on top of the memory.
                before = max(MEMORY, left)
                assert all(step.memory_before <= before for step in report.steps)
                assert report.steps[0].memory_before + report.steps[0].chunk_tokens <= max(MEMORY + CHUNK, before + 8)
                assert all(step.memory_before + step.chunk_tokens <= MEMORY + CHUNK for step in report.steps[1:])
                assert report.memory_tokens == MEMORY
                assert memories == [MEMORY + number for number in range(NEW)]
            assert set(windows) == ({0} if family == "llama" else {WINDOW - 1})
    assert cache.get_seq_length() == sum(TURNS) + len(TURNS) * NEW - 1


@pytest.mark.slow
def test_smollm2_writes_200_tokens_in_bounded_memory(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    text = "Long ago, in a harbour town, there lived a clockmaker. Tell his story, chapter by chapter.\n\nChapter 1"
    ids = torch.tensor([tokenizer(text * 10).input_ids])
    with imdc.patch(model, memory_tokens=128, chunk_tokens=128, decode_tokens=64) as handle:
        cache = handle.new_cache()
        _, memories, _ = write(model, ids, 200, cache)
    assert memories == [128 + number % 65 for number in range(200)]
    per_token = 30 * 2 * 3 * 64 * model.dtype.itemsize  # layers, keys and values, KV heads, head size, bytes
    assert cache.kv_bytes() == memories[-1] * per_token


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
def test_auto_positions_change_when_a_turn_leaves_the_window(family: str) -> None:
    model = build(family, max_position_embeddings=256)
    answers = []
    for positions in ("auto", "compact"):
        with imdc.patch(model, positions=positions, memory_tokens=128, chunk_tokens=32) as handle:
            cache, history = handle.new_cache(), token_ids(0)
            for turn, length in enumerate((90, 400, 30)):
                history, *_ = write(model, torch.cat((history, token_ids(length, seed=turn)), dim=1), NEW, cache)
            answers.append(history)
    assert torch.equal(*answers)
