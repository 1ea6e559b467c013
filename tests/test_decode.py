"""Answers that are compressed while they are written: never cut off, judged by the question, without drifting keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build, token_ids
from torch import Tensor
from traces import positions_of
from transformers import PreTrainedModel

import imdc
from imdc.errors import UnsupportedCallError
from imdc.model.parts import Tables
from imdc.prefill.renumber import moved
from imdc.prefill.step import StepRun

SIZES = {"memory_tokens": 40, "chunk_tokens": 16, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}
WINDOW = 128


def small(family: str = "llama", window: int = WINDOW, **overrides: Any) -> PreTrainedModel:
    return build(family, **{"num_hidden_layers": 3, "max_position_embeddings": window, **overrides})


def generate(model: PreTrainedModel, ids: Tensor, new: int, **options: Any) -> Any:
    options = {"attention_mask": torch.ones_like(ids), "min_new_tokens": new, "pad_token_id": 0, **options}
    return model.generate(ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, **options)


@contextmanager
def compressions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int | None, int]]]:
    """(tail rows, voting rows, KV pairs before) of every step of one chunk token in layer 0."""
    seen: list[tuple[int, int | None, int]] = []
    attend = StepRun.attend

    def noted(run: StepRun, layer: int, *args: Any, **named: Any) -> Tensor:
        if layer == 0 and run.step.chunk_tokens == 1:
            seen.append((run.tail_rows, run._votes, run.step.memory_before))
        return attend(run, layer, *args, **named)

    with monkeypatch.context() as patched:
        patched.setattr(StepRun, "attend", noted)
        yield seen


@pytest.mark.parametrize("decode_tokens", [None, 16])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_answer_that_leaves_the_window_is_compact_from_the_start(family: str, decode_tokens: int | None) -> None:
    model = small(family)
    with imdc.patch(model, decode_tokens=decode_tokens, **SIZES), positions_of(model) as largest:
        output = generate(model, token_ids(120), 120)
        assert output.sequences.shape[1] == 240
        assert output.past_key_values.compact and max(largest) < WINDOW
        # One that stays within the window keeps its positions.
        assert not generate(model, token_ids(120), 9).past_key_values.compact


def test_compressing_again_is_never_refused_in_an_answer_by_hand() -> None:
    model = small()
    with imdc.patch(model, decode_tokens=16, **SIZES) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(token_ids(120), past_key_values=cache, logits_to_keep=1)
        for token in token_ids(40, seed=1)[0]:
            model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
    # How long it would become was not known; like the unpatched model it goes on behind the window.
    assert cache.get_seq_length() == 160 and cache.stored_tokens() <= 40 + 16 and not cache.compact


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_compact_memory_never_leaves_the_window(family: str) -> None:
    model = small(family)
    with imdc.patch(model, positions="compact", **SIZES), positions_of(model) as largest:
        output = generate(model, token_ids(300), 200)
        history = torch.cat((output.sequences, token_ids(30, seed=1)), dim=1)
        generate(model, history, 8, past_key_values=output.past_key_values)
    assert max(largest) < WINDOW


def test_rows_of_a_batch_leave_no_window_and_are_what_they_are_alone() -> None:
    model = small()
    ids, mask = token_ids(150, rows=3), torch.ones(3, 150, dtype=torch.long)
    mask[1, :100], mask[2, :140] = 0, 0
    with imdc.patch(model, **SIZES), positions_of(model) as largest:
        together = generate(model, ids, 150, attention_mask=mask)
        for row in range(3):
            alone = generate(model, ids[row : row + 1, mask[row] == 1], 150)
            assert torch.equal(together.sequences[row, -150:], alone.sequences[0, -150:])
        assert max(largest) < WINDOW + 140


def test_a_memory_that_fills_the_window_refuses_an_answer_before_anything_is_computed() -> None:
    model = small()
    for schedule, remedy in (("imdc", "lower memory_tokens=120"), ("full", "another schedule than 'full'")):
        options = {**SIZES, "memory_tokens": 120, "schedule": schedule}
        with imdc.patch(model, positions="compact", **options) as handle, positions_of(model) as largest:
            with pytest.raises(UnsupportedCallError, match=f"memory and answer take 169 positions.*{remedy}"):
                generate(model, token_ids(100), 70)
            assert not largest and handle.report is None
            generate(model, token_ids(100), 29)
            with torch.no_grad():
                cache = handle.new_cache()
                model(token_ids(100), past_key_values=cache, logits_to_keep=1)
                for _ in range(28):
                    model(token_ids(1), past_key_values=cache, logits_to_keep=1)
                stored = cache.stored_tokens()
                with pytest.raises(UnsupportedCallError, match="decoding reaches position 129 of compact positions"):
                    model(token_ids(1), past_key_values=cache, logits_to_keep=1)
                assert cache.stored_tokens() == stored


@pytest.mark.parametrize("observer", ["prompt_tail", "window", "all_queries"])
def test_the_question_judges_while_the_answer_is_written(observer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = small(), []
    options = {"decode_tokens": 8, "observer": observer, "observation_tokens": 5, **SIZES}
    with imdc.patch(model, **options), compressions(monkeypatch) as seen:
        decoder: Any = model.model
        hook = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
        )
        output = generate(model, token_ids(70, rows=2), 30)
        hook.remove()
    # Beside the new token itself where observers ask the chunk too.
    assert seen == [(5, 5 if observer == "prompt_tail" else 6, 48)] * 6
    asked = [ids for ids in read if ids.shape == (1, 6)]
    assert len(asked) == 6
    for number, ids in enumerate(asked):
        assert torch.equal(ids[0, 1:], token_ids(70, rows=2)[number % 2, -5:])
    assert output.past_key_values.stored_tokens() <= 48


def test_beams_and_saved_caches_keep_their_questions(tmp_path: Path) -> None:
    model = small()
    with imdc.patch(model, decode_tokens=6, observation_tokens=5, **SIZES):
        output = generate(model, token_ids(70, rows=2), 9, num_beams=3)
        cache = output.past_key_values
        wanted = token_ids(70, rows=2)[:, -5:].repeat_interleave(3, dim=0)
        assert cache.rows is not None and torch.equal(cache.rows.question, wanted)
        imdc.save_cache(cache, tmp_path / "cache.safetensors")
        loaded = imdc.load_cache(tmp_path / "cache.safetensors", model)
        assert loaded.rows is not None and torch.equal(loaded.rows.question, wanted)
        # Shorter than the observation.
        short = generate(model, token_ids(3), 20).past_key_values
        assert short.rows is not None and short.rows.question.tolist() == token_ids(3).tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_400_compressions_do_not_move_a_key(family: str, dtype: torch.dtype) -> None:
    model = small(family, window=4096).to(dtype)
    ids, keys = token_ids(30), []
    options = {"memory_tokens": 1000, "chunk_tokens": 16, "positions": "compact", "decode_tokens": 1}
    with imdc.patch(model, **options) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids, past_key_values=cache, logits_to_keep=1)
        for number, token in enumerate(token_ids(803, seed=1)[0]):
            model(token.view(1, 1), past_key_values=cache, logits_to_keep=1)
            if number in (2, 802):
                keys.append([layer.keys[:, :, :30].clone() for layer in cache.layers if not layer.is_sliding])
    assert keys[0] and all(torch.equal(first, last) for first, last in zip(*keys, strict=True))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_that_move_400_times_keep_their_length_and_direction(dtype: torch.dtype, interleaved: bool) -> None:
    keys = torch.randn(1, 2, 200, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    angles = torch.arange(700)[:, None] * 10_000.0 ** -(torch.arange(8) / 8)
    angles = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat((angles, angles), dim=1)

    def tables(first: int) -> Tables:
        rows = angles[first : first + 200]
        return Tables(rows.cos().to(dtype), rows.sin().to(dtype), interleaved)

    turned = keys
    for first in range(500, 100, -1):
        turned = moved(turned, tables(first), tables(first - 1), seed=first)
    wanted = moved(keys.float(), tables(500), tables(100))
    # Rounding to a random neighbour is wrong by eps / sqrt(6) of the binade in the mean square; 400 of them add up like
    # a random walk. Rounding to the nearest one would be wrong by several times that, always to the same side.
    step = torch.finfo(dtype).eps / 6**0.5
    error = (turned.float() - wanted).norm() / wanted.norm()
    assert float(error) < 400**0.5 * step
    stretch = (turned.float().norm(dim=-1) / wanted.norm(dim=-1)).mean()
    assert abs(float(stretch) - 1) < 400**0.5 * step / 10
    assert torch.equal(moved(turned, tables(7), tables(7), seed=1), turned)
