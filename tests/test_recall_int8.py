"""A store in eight bits: what is stored is off by half a step at most, and a question finds what it found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, build, token_ids
from torch import Tensor

import imdc
from imdc.cache.int8 import dequantised, quantised_keys, quantised_values
from imdc.cache.store import HostStore
from imdc.config import INT8_GROUP, PrefillConfig
from imdc.errors import CacheMismatchError, ConfigError
from imdc.model.shape import ModelShape
from imdc.planner import recalling
from imdc.planner.batch import Batch
from imdc.planner.fit import peak_bytes
from imdc.profiler.allocations import DispatchAllocations

TIGHT: dict[str, Any] = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8}
INT8: dict[str, Any] = {"recall": "host", "recall_dtype": "int8"}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
FULL_LAYERS, KV_HEADS, HEAD = 3, 2, 16


def pairs(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random states [1, Hkv, tokens, D], of which one channel is large and far from zero and one does not change."""
    states = torch.randn(1, KV_HEADS, tokens, HEAD, generator=torch.Generator().manual_seed(tokens))
    states[..., 3] = 40 + 5 * states[..., 3]
    states[..., 5] = -7.0
    return states.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, INT8_GROUP - 1, INT8_GROUP, 2 * INT8_GROUP + 44])
def test_the_error_is_half_a_step_at_most(tokens: int, dtype: torch.dtype) -> None:
    states = pairs(tokens, dtype).transpose(1, 2)
    wanted = states.double()
    groups = wanted.split(INT8_GROUP, dim=1)
    of_keys = torch.cat([(one.amax(1, True) - one.amin(1, True)).expand_as(one) for one in groups], dim=1)
    of_values = (wanted.amax(3, True) - wanted.amin(3, True)).expand_as(wanted)
    for quantise, group, ranges in ((quantised_keys, INT8_GROUP, of_keys), (quantised_values, 1, of_values)):
        codes, scales = quantise(states)
        assert codes.dtype == torch.int8 and codes.shape == states.shape
        assert scales.shape[:3] == (1, math.ceil(tokens / group), 2)
        got = dequantised(codes, scales, group)
        # What float32 rounds: the zero, the product and the sum.
        rounding = 4 * torch.finfo(torch.float32).eps * (wanted.abs() + ranges)
        error = (got.double() - wanted).abs()
        assert bool((error <= ranges / 255 / 2 + rounding).all())
        # Half a step is what it takes: the bound is no looser than that.
        assert tokens < INT8_GROUP or bool((error > 0.9 * ranges / 255 / 2).any())


@pytest.mark.parametrize("folder", [False, True], ids=["host", "disk"])
def test_what_is_stored_does_not_depend_on_the_chunks(folder: bool, tmp_path: Path) -> None:
    keys, values, stores = pairs(300), pairs(300).flip(3), []
    for chunks in ([300], [50] * 6, [1, 127, 128, 44], [130, 100, 3, 66, 1]):
        store, start = HostStore([0], 300, tmp_path if folder else None, int8=True), 0
        for chunk in chunks:
            store.write(0, start, keys[:, :, start : start + chunk], values[:, :, start : start + chunk])
            start += chunk
        store.finish()
        stores.append(store.tensors())
    for one in stores[1:]:
        assert one.keys() == stores[0].keys() and all(torch.equal(one[name], stores[0][name]) for name in one)
    assert {name: str(x.dtype) for name, x in stores[0].items() if "scales" not in name} == {
        "store.0.keys": "torch.int8",
        "store.0.values": "torch.int8",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes_are_those_of_the_plan(dtype: torch.dtype) -> None:
    model, width = FAMILIES["llama"]().to(dtype), KV_HEADS * HEAD
    with imdc.patch(model, **TIGHT, **INT8) as handle:
        cache = handle.read(token_ids(300))
        assert handle.report is not None and cache.store is not None
        stored = handle.report.host_bytes
    # Three groups of tokens, and a step and a zero for each channel, then for each token and head.
    # Means of 19 blocks in bfloat16.
    pairs = 300 * width + 3 * 8 * width + 300 * width + 300 * 8 * KV_HEADS
    assert stored == FULL_LAYERS * (pairs + 19 * 2 * width)
    assert stored == cache.store.nbytes() == imdc.plan(model, 300, **TIGHT, **INT8).to_dict()["host_bytes"]
    assert "(int8)" in str(imdc.plan(model, 300, **TIGHT, **INT8))
    with imdc.patch(model, **TIGHT, **INT8, recall_limit=stored) as handle:
        assert handle.read(token_ids(300)).store is not None
        with pytest.raises(ConfigError, match="301 tokens, more than recall_limit"):
            handle.read(token_ids(301))


def test_heads_of_the_usual_size_take_half_of_bfloat16_and_a_quarter_of_float32() -> None:
    for dtype, size, share in (("bfloat16", 2, 0.5), ("float32", 4, 0.25)):
        shape = ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, dtype=dtype, dtype_bytes=size)
        model, int8 = (
            recalling.host_bytes(shape, Batch(100_000), PrefillConfig(recall="host", recall_dtype=one, recall_every=0))
            for one in ("model", "int8")
        )
        assert share < int8 / model < 1.07 * share


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("recall", ["host", "disk"])
def test_saved_questions_and_batches_recall_alike(positions: str, recall: str, tmp_path: Path) -> None:
    model, path = FAMILIES["gemma3"](), tmp_path / "document"
    questions = torch.cat([token_ids(9, seed=seed) for seed in (1, 2)])
    with imdc.patch(model, **TIGHT, recall=recall, recall_dtype="int8", positions=positions) as handle:
        cache = handle.read(token_ids(300))
        imdc.save_cache(cache, path)
        alone = torch.cat([handle.ask(cache, one[None], **GREEDY) for one in questions])
        assert torch.equal(handle.ask(cache, questions, **GREEDY), alone)
        assert handle.report is not None and handle.report.recalled_bytes > 0 and cache.store is not None
    # A store knows by itself what it holds.
    with imdc.patch(model, **TIGHT, positions=positions) as handle:
        for place in ("host", "disk"):
            loaded = imdc.load_cache(path, model, recall=place)
            assert loaded.store is not None and loaded.store.int8
            assert loaded.store.tensors().keys() == cache.store.tensors().keys()
            assert torch.equal(handle.ask(loaded, questions, **GREEDY), alone)
        loaded.store = None
        assert not torch.equal(handle.ask(loaded, questions, **GREEDY), alone)


def test_a_reading_that_began_again_stores_what_one_does_that_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the second step, when keys of the first wait for their group to fill."""
    model = build("llama")
    with imdc.patch(model, **{**TIGHT, "chunk_tokens": 40}, **INT8) as handle:
        wanted = handle.read(token_ids(300)).store
    with imdc.patch(model, **{**TIGHT, "chunk_tokens": 80}, **INT8) as handle, pytest.warns(match="out of memory"):
        write, failures = HostStore.write, [torch.OutOfMemoryError("injected")]

        def once(self: HostStore, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
            if start and layer == 1 and failures:
                raise failures.pop()
            write(self, layer, start, keys, values)

        monkeypatch.setattr(HostStore, "write", once)
        got = handle.read(token_ids(300)).store
        assert handle.report is not None and handle.report.restarts == 1
    assert got is not None and wanted is not None
    # The first layer's pairs do not depend on what was evicted.
    assert all(torch.equal(side[0], wanted.sides[name][0]) for name, side in got.sides.items())
    assert got.nbytes() == wanted.nbytes()


def test_versions_that_do_not_know_the_codes_refuse_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, formats = FAMILIES["llama"](), {}
    for dtype in ("model", "int8"):
        with imdc.patch(model, **TIGHT, recall="host", recall_dtype=dtype) as handle:
            imdc.save_cache(handle.read(token_ids(300)), tmp_path / dtype)
        with safe_open(tmp_path / dtype, framework="pt") as file:
            formats[dtype] = json.loads(file.metadata()["imdc"])["format"]
    # The file of a store in the model's dtype is read by versions before this one.
    assert formats == {"model": 4, "int8": 5}
    monkeypatch.setattr("imdc.cache.file._FORMAT_WITH_INT8", 4)
    assert imdc.load_cache(tmp_path / "model", model).store is not None
    with pytest.raises(CacheMismatchError, match="has format 5, written by"):
        imdc.load_cache(tmp_path / "int8", model)


def test_eight_bits_without_a_store_are_refused() -> None:
    with pytest.raises(ConfigError, match="recall_dtype='int8' has no effect with recall='none'; set recall='host'"):
        PrefillConfig(recall_dtype="int8")
    with pytest.raises(ConfigError, match="recall_dtype must be one of 'model', 'int8', got 'int4'"):
        PrefillConfig(recall="host", recall_dtype="int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reading_takes_what_the_plan_says(dtype: torch.dtype) -> None:
    """Heads wider than the hidden state, one query head for each: the peak is where a chunk is put in eight bits."""
    sizes = {"memory_tokens": 64, "chunk_tokens": 100, "schedule": "fm", "observer": "window", **INT8}
    model = build("llama", intermediate_size=8, num_key_value_heads=4, head_dim=64).to(dtype)
    made = imdc.plan(model, 640, **sizes)
    assert "storing" in {step.footprint.phase for step in made.steps}
    with imdc.patch(model, **sizes) as handle:
        handle.read(token_ids(640))
        with DispatchAllocations() as counter:
            cache = handle.read(token_ids(640))
            measured = counter.take_peak()
    assert cache.store is not None
    reading = max(step.footprint.above_weights for step in made.steps)
    # The store is made by the first step, and counts apart.
    assert reading / (measured - cache.store.nbytes()) == pytest.approx(1.0, abs=0.01)
    # On a GPU a chunk and what waits for the next one are alive as well.
    shape = ModelShape.from_model(model)
    peaks = [
        peak_bytes(shape, Batch(640), PrefillConfig(**{**sizes, **one}), "cuda")
        for one in ({"recall": "none", "recall_dtype": "model"}, {})
    ]
    assert peaks[0] < peaks[1]
