"""Observers against dense attention, and the limits of their temporaries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from imdc.kernels import reference
from tiny_models import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode

import imdc
import imdc.errors
from imdc.config import PrefillConfig
from imdc.observers import OBSERVERS, AttentionObserver, Observer, find_observer
from imdc.prefill.backends import REFERENCE, SDPA, Backend
from imdc.prefill.observation import Observation

B, HQ, HKV, D = 1, 6, 2, 16


def observation(
    observer: str, backend: Backend, *, memory: int = 20, chunk: int = 12, tail: int = 4, **pooled: Any
) -> Observation:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, HQ, chunk + tail, D, generator=generator)
    k, v = (torch.randn(B, HKV, memory + chunk + tail, D, generator=generator) for _ in range(2))
    out, lse = backend.chunk_attention(q, k, v, scale=0.25)
    config = PrefillConfig(
        **{"observer": observer, "observation_tokens": 4, "memory_tokens": 16, "sink_tokens": 2, "recent_tokens": 2},
        **{"pool_kernel": 1, "scoring": "attention", **pooled},
    )
    return Observation(
        q=q, k=k, v=v, out=out, lse=lse, scale=0.25, softcap=None, chunk_tokens=chunk, tail_rows=tail, layer=1, step=2,
        config=config, backend=backend,
    )  # fmt: skip


def dense_mass(seen: Observation, rows: int, stride: int = 1, *, changes: bool = False) -> torch.Tensor:
    """The definition, head by head and key by key, in float64: from the whole attention matrix, or with `changes` from
    the outputs with each key left out."""
    queries, keys = seen.q.shape[2], seen.k.shape[2]
    group = HQ // HKV
    mass = torch.zeros(B, HKV, seen.scored_keys, dtype=torch.float64)
    for kv_head in range(HKV):
        for j in range(seen.scored_keys):
            found = []
            for head in range(kv_head * group, (kv_head + 1) * group):
                for i in range(queries - 1, queries - rows - 1, -stride):
                    visible = keys - queries + i + 1
                    if j < visible:
                        logits = seen.k[0, kv_head, :visible].double() @ seen.q[0, head, i].double() * seen.scale
                        others = torch.arange(visible) != j
                        values = seen.v[0, kv_head, :visible].double()
                        out, without = logits.softmax(0) @ values, logits[others].softmax(0) @ values[others]
                        found.append((out - without).square().sum() if changes else logits.softmax(0)[j])
            mass[0, kv_head, j] = torch.stack(found).mean() if found else 0.0
    return mass


@pytest.mark.parametrize("backend", [REFERENCE, SDPA], ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    ("observer", "tail", "rows"),
    [("prompt_tail", 4, 4), ("prompt_tail", 0, 4), ("window", 0, 4), ("all_queries", 0, 12)],
)
def test_mass_is_the_mean_over_rows_that_see_the_key_and_heads_of_its_own_group(
    backend: Backend, observer: str, tail: int, rows: int
) -> None:
    seen = observation(observer, backend, tail=tail)
    scores = find_observer(observer).score(seen)
    torch.testing.assert_close(scores.double(), dense_mass(seen, rows), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", [REFERENCE, SDPA], ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    ("observer", "tail", "rows"), [("prompt_tail", 4, 4), ("window", 0, 4), ("all_queries", 0, 12)]
)
def test_change_is_that_of_the_outputs_without_the_key(backend: Backend, observer: str, tail: int, rows: int) -> None:
    seen = observation(observer, backend, tail=tail, scoring="output_change")
    scores = find_observer(observer).score(seen)
    torch.testing.assert_close(scores.double(), dense_mass(seen, rows, changes=True), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("stride", [2, 4, 5, 30])
@pytest.mark.parametrize(("observer", "rows"), [("window", 4), ("all_queries", 12)])
def test_with_a_stride_every_nth_query_votes_and_the_last_one_always(observer: str, rows: int, stride: int) -> None:
    seen = observation(observer, REFERENCE, tail=0, observation_stride=stride)
    scores = find_observer(observer).score(seen)
    torch.testing.assert_close(scores.double(), dense_mass(seen, rows, stride), atol=1e-6, rtol=1e-5)


def test_pooling_over_the_wrong_heads_would_be_seen() -> None:
    """One query head attends to key 3 only: exactly its own KV head may see that."""
    q, k = torch.zeros(1, HQ, 1, D), torch.zeros(1, HKV, 8, D)
    q[0, 2, 0, 0] = 40.0  # head 2 of heads 0..5 belongs to KV head 0; pooled as heads 0, 2, 4 it would not stay there
    k[0, :, 3, 0] = 40.0
    v = torch.zeros_like(k)
    _, lse = reference.chunk_attention(q, k, v, scale=1.0)
    mass = reference.key_mass(q, k, lse, scale=1.0, rows=1)
    even = 1 / 8
    assert mass[0, 0, 3].item() == pytest.approx((1 + 2 * even) / 3)
    assert mass[0, 1, 3].item() == pytest.approx(even)


def test_max_pooling_keeps_neighbours() -> None:
    plain = find_observer("window").score(observation("window", REFERENCE, tail=0))
    pooled = find_observer("window").score(observation("window", REFERENCE, tail=0, pool_kernel=5))
    for j in range(plain.shape[-1]):
        assert torch.equal(pooled[..., j], plain[..., max(0, j - 2) : j + 3].amax(-1))


def test_average_pooling_counts_zeros_beyond_the_ends() -> None:
    """As the code of the IMDC paper does: it calls avg_pool1d with its default of count_include_pad."""
    plain = find_observer("window").score(observation("window", REFERENCE, tail=0))
    pooled = find_observer("window").score(observation("window", REFERENCE, tail=0, pool_kernel=5, pooling="avg"))
    for j in range(plain.shape[-1]):
        mean = plain[..., max(0, j - 2) : j + 3].sum(-1) / 5
        torch.testing.assert_close(pooled[..., j], mean, atol=1e-7, rtol=1e-5)


def test_sink_recent_prefers_the_latest() -> None:
    seen = observation("sink_recent", REFERENCE, tail=0)
    chosen = REFERENCE.select(OBSERVERS["sink_recent"].score(seen), 8, sink_tokens=2, recent_tokens=2)
    assert chosen[0, 0].tolist() == [0, 1, 26, 27, 28, 29, 30, 31]


def test_key_diff_drops_what_is_like_the_mean() -> None:
    seen = observation("key_diff", REFERENCE, tail=0)
    seen.k[:] = 1.0
    seen.k[:, :, 7] = -1.0
    assert OBSERVERS["key_diff"].score(seen).argmax(-1).tolist() == [[7, 7]]


def test_random_differs_by_layer_and_step_and_repeats() -> None:
    seen = observation("random", REFERENCE, tail=0)
    again = observation("random", REFERENCE, tail=0)
    assert torch.equal(OBSERVERS["random"].score(seen), OBSERVERS["random"].score(again))


class _Largest(TorchDispatchMode):
    """The largest tensor that any operator returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 4096], ids=["w=16", "all queries"])
def test_scoring_llama_8b_shapes_needs_no_temporary_above_64_mib(rows: int) -> None:
    chunk, memory, q_heads, kv_heads, dim = 4096, 8192, 32, 8, 128
    if rows == chunk:  # one KV head shows the block size; the others only repeat it
        q_heads, kv_heads = 4, 1
    q = torch.randn(1, q_heads, chunk, dim, dtype=torch.bfloat16)
    k = torch.randn(1, kv_heads, memory + chunk, dim, dtype=torch.bfloat16)
    lse = torch.full((1, q_heads, chunk), math.log(memory + chunk) + 1.0)
    with _Largest() as seen:
        mass = reference.key_mass(q, k, lse, scale=dim**-0.5, rows=rows, pool_kernel=15)
    assert mass.shape == (1, kv_heads, memory + chunk)
    assert 0 < seen.bytes <= 64 * 2**20


@pytest.mark.parametrize("keep", [1, 6, 40, 99, 100])
@pytest.mark.parametrize("levels", [3, 1000])
def test_select_equals_a_stable_sort(keep: int, levels: int) -> None:
    scores = torch.randint(0, levels, (2, 3, 100), generator=torch.Generator().manual_seed(keep)).float()
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values
    assert torch.equal(reference.select(scores, keep), best)
    if keep >= 6:
        forced = reference.select(scores, keep, sink_tokens=4, recent_tokens=2)
        assert torch.equal(forced[..., :4], torch.arange(4).expand(2, 3, 4))
        assert torch.equal(forced[..., -2:], torch.arange(98, 100).expand(2, 3, 2))


def test_retention_is_the_share_of_memory_that_survives() -> None:
    """With "sink_recent" it is known beforehand: the sinks, and what of the latest keys reaches back into memory."""
    model = FAMILIES["gemma3"]()
    ids = torch.randint(3, 128, (1, 400))
    options = {"memory_tokens": 64, "chunk_tokens": 40, "sink_tokens": 2, "recent_tokens": 8, "observer": "sink_recent"}
    with imdc.patch(model, **options) as handle:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
        assert handle.report is not None
    for step in handle.report.steps:
        sliding, full, also_sliding = step.retention
        assert sliding is None and also_sliding is None
        if step.memory_before == 0:
            assert full is None
            continue
        kept = 2 + max(0, step.memory_after - 2 - step.chunk_tokens)
        assert full == pytest.approx(kept / step.memory_before)


class LongKeys(Observer):
    """A user's own: keys of the largest norm stay."""

    name = "long_keys"

    def score(self, seen: Observation) -> torch.Tensor:
        return seen.k[:, :, : seen.scored_keys].float().norm(dim=-1)

    def scratch_bytes(self, keys: int, kv_heads: int, head_dim: int) -> int:
        return 4 * keys * kv_heads * head_dim


class HeavyValues(AttentionObserver):
    """A user's own: attention mass times the norm of the value, as in VATP (arXiv 2406.12335)."""

    name, query_aware, rides_along = "heavy_values", True, True

    def score(self, seen: Observation) -> torch.Tensor:
        return seen.mass() * seen.v[:, :, : seen.scored_keys].float().norm(p=1, dim=-1)


@pytest.mark.parametrize("own", [LongKeys(), HeavyValues()], ids=str)
def test_an_observer_of_the_users_own_goes_through_plan_and_engine(own: Observer) -> None:
    model, ids = FAMILIES["llama"](), torch.randint(3, 128, (1, 300))
    options: dict[str, object] = {"memory_tokens": 48, "chunk_tokens": 40, "sink_tokens": 2, "recent_tokens": 8}
    plan = imdc.plan(model, 300, observer=own, device="cpu", **options)
    assert plan.to_dict()["config"]["observer"] == own.name
    stored = []
    for observer in (own, "sink_recent"):
        with imdc.patch(model, observer=observer, decode_tokens=8, **options) as handle:
            cache = handle.new_cache()
            model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0)
            assert handle.report is not None and handle.report.memory_tokens == 48
            assert [step.chunk_tokens for step in handle.report.steps] == [step.chunk_tokens for step in plan.steps]
            stored.append(cache.layers[1].keys.clone())
    assert not torch.equal(*stored)


@pytest.mark.parametrize("name", ["", "window"])
def test_an_observer_needs_a_name_of_its_own(name: str) -> None:
    own = LongKeys()
    own.name = name
    with pytest.raises(imdc.errors.ConfigError, match=r"LongKeys\(\) has name="):
        PrefillConfig(observer=own)


def test_an_observer_without_queries_cannot_ask_for_mass() -> None:
    class Confused(LongKeys):
        name = "confused"

        def score(self, seen: Observation) -> torch.Tensor:
            return seen.mass()

    model = FAMILIES["llama"]()
    with (
        imdc.patch(model, observer=Confused(), memory_tokens=48, chunk_tokens=40) as handle,
        pytest.raises(imdc.errors.ConfigError, match="AttentionObserver"),
    ):
        model(torch.randint(3, 128, (1, 300)), past_key_values=handle.new_cache(), logits_to_keep=1)


@pytest.mark.parametrize("riding", [False, True], ids=["alone", "with questions"])
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda heads, keys: torch.zeros(1, heads, keys - 5), r"scores of shape \(1, 2, .*for each KV head"),
        (lambda heads, keys: torch.zeros(1, heads, keys + 5), "scores of shape"),
        (lambda heads, keys: torch.zeros(1, 2 * heads, keys), r"scores of shape \(1, 4"),
        (lambda heads, keys: torch.full((1, heads, keys), torch.nan), "scores that are NaN"),
    ],
)
def test_scores_that_are_none_are_named(scores: Any, message: str, riding: bool) -> None:
    class Own(Observer):
        name, rides_along = "own", riding
        questions = ((5, 6), (7, 8)) if riding else ()

        def score(self, seen: Observation) -> torch.Tensor:
            found: torch.Tensor = scores(seen.k.shape[1], seen.scored_keys)
            return found

    model, ids = FAMILIES["llama"](), torch.randint(3, 128, (1, 100))
    options: dict[str, Any] = {"memory_tokens": 20, "chunk_tokens": 16, "sink_tokens": 2, "recent_tokens": 4}
    named = pytest.raises(imdc.errors.ConfigError, match=f"observer='own' gives {message}")
    with imdc.patch(model, observer=Own(), **options), named:
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
