"""memory_limit: the measured peak of everything that generate() does stays below it, weights apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, token_ids
from torch import Tensor
from transformers import PreTrainedModel

import imdc
import imdc.prefill.device_room as device_room
from imdc.config import PrefillConfig
from imdc.errors import ConfigError
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.fit import least_chunk, peak_bytes, smaller_chunk
from imdc.profiler.allocations import DispatchAllocations

TOKENS, MEMORY = 1000, 256


def limit_for(model: PreTrainedModel, chunk: int, rows: int = 1, new_tokens: int = 1) -> int:
    """The planned peak of chunks of that size, which "auto" then has to stay within."""
    options: dict[str, Any] = {"chunk_tokens": chunk, "memory_tokens": MEMORY, "device": "cpu"}
    return imdc.plan(model, TOKENS, rows=rows, new_tokens=new_tokens, **options).peak_bytes


def generate(model: PreTrainedModel, ids: Tensor, cache: Any, new_tokens: int, **options: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        past_key_values=cache,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize(
    ("family", "rows", "beams", "new_tokens"),
    [
        ("llama", 1, 1, 1),
        ("llama", 8, 1, 1),
        ("llama", 32, 1, 1),
        ("llama", 1, 8, 1),
        ("llama", 1, 1, 200),
        ("llama", 1, 8, 20),
        ("gemma3", 4, 1, 1),
        ("gemma3", 4, 1, 40),
    ],
    ids=lambda value: str(value),
)
def test_measured_peak_is_within_the_limit(family: str, rows: int, beams: int, new_tokens: int) -> None:
    model = FAMILIES[family]()
    limit = limit_for(model, 100, max(rows, beams), new_tokens)
    with imdc.patch(model, chunk_tokens="auto", memory_limit=limit, memory_tokens=MEMORY) as handle:
        cache = handle.new_cache()
        with DispatchAllocations() as counted, torch.no_grad():
            generate(model, token_ids(TOKENS, rows), cache, new_tokens, num_beams=beams)
            peak = counted.take_peak()
    allowed = limit - ModelShape.from_model(model).weights
    # Not by leaving the room unused: most of it is taken where the answer is short.
    assert peak <= allowed
    assert peak > (0.6 if new_tokens == 1 else 0.4) * allowed


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_turn_keeps_within_the_limit_while_the_first_ones_cache_lives(rows: int, positions: str) -> None:
    model = FAMILIES["llama"]()
    limit = 2 * limit_for(model, 200, rows)
    options: dict[str, Any] = {"memory_limit": limit, "memory_tokens": MEMORY, "positions": positions}
    patched = imdc.patch(model, chunk_tokens="auto", **options)
    with patched as handle, DispatchAllocations() as counted, torch.no_grad():
        first = generate(model, token_ids(TOKENS, rows), handle.new_cache(), 1)
        history = torch.cat((first.sequences, token_ids(700, rows, seed=1)), dim=1)
        cache = first.past_key_values
        del first
        counted.take_peak()
        generate(model, history, cache, 1)
        peak = counted.take_peak()
    assert peak <= limit - ModelShape.from_model(model).weights


def test_stored_turns_leave_smaller_chunks() -> None:
    model = FAMILIES["llama"]()
    shape = ModelShape.from_model(model)
    config = PrefillConfig(memory_tokens=MEMORY, chunk_tokens=100, schedule="fm")
    empty = Batch(1500, new_tokens=1)
    stored = shape.layers * shape.kv_bytes_per_token * MEMORY
    filled = replace(empty, seen_tokens=TOKENS, stored_tokens=MEMORY, stored_bytes=stored)
    assert peak_bytes(shape, filled, config, "cpu") > peak_bytes(shape, empty, config, "cpu") + stored


def test_a_limit_too_small_for_all_rows_is_refused_before_anything_is_read() -> None:
    model = FAMILIES["llama"]()
    limit = limit_for(model, 100)
    with imdc.patch(model, chunk_tokens="auto", memory_limit=limit, memory_tokens=MEMORY) as handle:
        with pytest.raises(ConfigError, match=r"smallest chunks of 32 rows; .* or read fewer rows or beams at once"):
            generate(model, token_ids(TOKENS, 32), handle.new_cache(), 1)
        assert handle.report is None


def test_compressing_while_decoding_is_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    limit = limit_for(model, 100, new_tokens=200)
    fitted: list[int] = []
    fit = device_room.fit_chunk

    def counted(*args: Any, **named: Any) -> int:
        fitted.append(1)
        return fit(*args, **named)

    monkeypatch.setattr(device_room, "fit_chunk", counted)
    options: dict[str, Any] = {"memory_limit": limit, "memory_tokens": MEMORY, "decode_tokens": 16}
    patched = imdc.patch(model, chunk_tokens="auto", **options)
    with patched as handle, DispatchAllocations() as allocations, torch.no_grad():
        generate(model, token_ids(TOKENS), handle.new_cache(), 100)
        peak = allocations.take_peak()
    assert len(fitted) == 1
    assert peak <= limit - ModelShape.from_model(model).weights


def test_plan_counts_rows_and_the_answer() -> None:
    model = FAMILIES["llama"]()
    shape = ModelShape.from_model(model)
    one, many, long = (
        imdc.plan(model, TOKENS, chunk_tokens=150, memory_tokens=MEMORY, rows=rows, new_tokens=new)
        for rows, new in ((1, 0), (8, 0), (8, 1001))
    )
    assert many.memory_bytes == 8 * one.memory_bytes
    assert many.flops == 8 * one.flops
    assert many.peak_bytes > 8 * one.memory_bytes + shape.weights
    pairs = 8 * 1000 * shape.layers * shape.kv_bytes_per_token
    assert long.peak_bytes > many.memory_bytes + pairs + shape.weights
    assert long.unpatched.total_bytes >= many.unpatched.total_bytes + pairs
    assert [footprint.phase for footprint in long.after] == ["stacking", "decoding"]
    assert "8 rows of 1,000 tokens" in str(many)


@pytest.mark.parametrize(
    ("options", "message"), [({"rows": 0}, "rows must be"), ({"new_tokens": -1}, "new_tokens must")]
)
def test_plan_refuses_bad_rows_and_new_tokens(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        imdc.plan(FAMILIES["llama"](), 100, **options)  # type: ignore[arg-type]


def test_after_running_out_of_memory_half_of_what_can_be_saved_is() -> None:
    shape = ModelShape.from_model(FAMILIES["llama"]())
    batch, config = Batch(10_000), PrefillConfig(memory_tokens=MEMORY, schedule="fm")

    def peak(chunk: int) -> int:
        return peak_bytes(shape, batch, replace(config, chunk_tokens=chunk), "cpu")

    smaller = smaller_chunk(shape, batch, config, 2000, None, device="cpu")
    least = least_chunk(batch)
    assert least < smaller < 2000
    half = (peak(2000) + peak(least)) // 2
    assert peak(smaller) <= half < 1.05 * peak(smaller)
    # What the device has left may ask for more, but never for less than the smallest chunks.
    assert smaller_chunk(shape, batch, config, 2000, (peak(2000) + 3 * peak(least)) // 4, device="cpu") < smaller
    assert smaller_chunk(shape, batch, config, 2000, 0, device="cpu") == least


def meminfo(text: str) -> Callable[..., Any]:
    import io

    def opened(*_: Any, **__: Any) -> Any:
        return io.StringIO(text)

    return opened


def test_free_memory_counts_what_linux_can_reclaim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "builtins.open", meminfo("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 60 kB\nCached: 59 kB\n")
    )
    assert device_room.free_bytes(torch.device("cpu")) == 60 * 1024


def test_free_memory_that_no_system_tells_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> int:
        raise ValueError(f"unrecognized configuration name {name}")

    model = FAMILIES["llama"]()
    ids = token_ids(200)
    with imdc.patch(model, chunk_tokens="auto", memory_limit=0.5, memory_tokens=64) as handle:
        cache = handle.new_cache()
        with monkeypatch.context() as patched:
            patched.setattr(device_room, "open", meminfo("MemTotal: 100 kB\n"), raising=False)
            patched.setattr(device_room, "os", SimpleNamespace(sysconf=unknown))
            assert device_room.free_bytes(torch.device("cpu")) is None
            with pytest.raises(
                ConfigError, match=r"memory_limit=0\.5 is a share of the device, whose size is not known"
            ):
                model(ids, past_key_values=cache)
        model(ids, past_key_values=cache)
        assert handle.report is not None
