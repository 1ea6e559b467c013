"""Every invariant of the schedule, for prompts, chunks, memories and growths of all proportions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from imdc.config import GROWTHS, PrefillConfig
from imdc.errors import ConfigError
from imdc.schedule import MemoryCost, Step, attention_pairs, build_steps, least_chunk

COMPRESSING = ("imdc", "im", "fm")


def _config(schedule: str, memory: int, chunk: int, **options: Any) -> PrefillConfig:
    return PrefillConfig(
        schedule=schedule, memory_tokens=memory, chunk_tokens=chunk, sink_tokens=0, recent_tokens=0, **options
    )


@st.composite
def cases(draw: st.DrawFn, schedules: tuple[str, ...] = COMPRESSING) -> tuple[int, PrefillConfig, int]:
    """A prompt length, a config of one of `schedules`, and a stored cache."""
    memory = draw(st.integers(1, 3000))
    share = st.floats(0.001, 1.0, allow_nan=False)
    start = draw(st.one_of(st.sampled_from(["auto", "per_step"]), st.integers(1, memory), share))
    sinks = draw(st.integers(0, min(8, memory)))
    config = PrefillConfig(
        schedule=draw(st.sampled_from(schedules)),
        growth=draw(st.sampled_from(GROWTHS)),
        initial_memory=start,
        memory_tokens=memory,
        chunk_tokens=draw(st.integers(1, 2000)),
        sink_tokens=sinks,
        recent_tokens=draw(st.integers(0, min(40, memory - sinks))),
    )
    prompt = draw(st.integers(1, 12_000))
    assume(prompt / int(config.chunk_tokens) < 500)
    stored = draw(st.one_of(st.just(0), st.integers(0, memory), st.integers(memory, memory + 500)))
    return prompt, config, stored


@given(cases())
@settings(max_examples=400, deadline=None)
def test_chunks_cover_the_prompt_once(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    steps = build_steps(prompt, config, stored_tokens=stored)
    assert [step.index for step in steps] == list(range(len(steps)))
    assert all(step.chunk_tokens >= 1 for step in steps)
    end = 0
    for step in steps:
        assert step.start == end
        end += step.chunk_tokens
    assert end == prompt


@given(cases())
@settings(max_examples=400, deadline=None)
def test_memory_chains_grows_and_stays_within_the_limit(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    memory = stored
    for step in build_steps(prompt, config, stored_tokens=stored):
        assert step.memory_before == memory
        assert step.memory_after <= min(config.memory_tokens, step.attended_tokens)
        assert step.memory_after >= min(step.memory_before, config.memory_tokens)
        memory = step.memory_after


@given(cases())
@settings(max_examples=400, deadline=None)
def test_nothing_is_dropped_that_need_not_be(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    steps = build_steps(prompt, config, stored_tokens=stored)
    assert steps[-1].memory_after == min(config.memory_tokens, stored + prompt)
    if stored + prompt <= config.memory_tokens:
        assert all(step.memory_after == step.attended_tokens for step in steps)


@given(cases())
@settings(max_examples=400, deadline=None)
def test_always_kept_tokens_find_room(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    for step in build_steps(prompt, config, stored_tokens=stored):
        assert step.memory_after >= min(config.sink_tokens + config.recent_tokens, step.attended_tokens)


@given(cases())
@settings(max_examples=400, deadline=None)
def test_no_step_exceeds_the_budget(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    chunk = int(config.chunk_tokens)
    steps = build_steps(prompt, config, stored_tokens=stored)
    budget = config.memory_tokens + chunk
    assert steps[0].attended_tokens <= max(budget, stored + max(1, chunk // 4))
    assert all(step.attended_tokens <= budget for step in steps[1:])


@given(cases())
@settings(max_examples=400, deadline=None)
def test_step_count_is_that_of_equal_chunks(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    count = len(build_steps(prompt, config, stored_tokens=stored))
    expected = math.ceil(prompt / int(config.chunk_tokens))
    # A cache over its limit leaves a first chunk below C, which may cost one step more.
    assert expected <= count <= expected + (stored > config.memory_tokens)


@given(cases(("imdc",)))
@settings(max_examples=400, deadline=None)
def test_imdc_chunks_shrink_but_never_to_crumbs(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    assume(stored + prompt > config.memory_tokens)
    steps = build_steps(prompt, config, stored_tokens=stored)
    least = least_chunk((prompt - steps[0].chunk_tokens) // max(1, len(steps) - 1))
    assert all(step.chunk_tokens >= least for step in steps[1:])
    chunks = [step.chunk_tokens for step in steps[1:]]
    assert all(later <= earlier + 1 for earlier, later in zip(chunks, chunks[1:], strict=False))


@given(st.integers(1, 5000), st.integers(1, 600), st.integers(1, 4000), st.integers(0, 4000))
@settings(max_examples=200, deadline=None)
def test_full_keeps_everything(prompt: int, chunk: int, memory: int, stored: int) -> None:
    assume(prompt / chunk < 500)
    steps = build_steps(prompt, _config("full", memory, chunk), stored_tokens=stored)
    assert sum(step.chunk_tokens for step in steps) == prompt
    assert max(step.chunk_tokens for step in steps) <= chunk
    seen = stored
    for step in steps:
        assert (step.memory_before, step.memory_after) == (seen, seen + step.chunk_tokens)
        seen = step.memory_after


@pytest.mark.parametrize("schedule", ["im", "fm"])
@pytest.mark.parametrize("prompt", [1, 511, 512, 513, 5000])
def test_equal_chunks_differ_by_one_token(schedule: str, prompt: int) -> None:
    chunks = [step.chunk_tokens for step in build_steps(prompt, _config(schedule, 1024, 512))]
    assert len(chunks) == math.ceil(prompt / 512)
    assert max(chunks) - min(chunks) <= 1
    assert max(chunks) <= 512


def test_fm_is_full_as_soon_as_enough_was_read() -> None:
    steps = build_steps(4096, _config("fm", 1000, 512))
    assert [step.memory_after for step in steps] == [512, 1000, 1000, 1000, 1000, 1000, 1000, 1000]


@pytest.mark.parametrize(
    ("growth", "expected"),
    [
        # M = 800, a = M / n = 100, n = 8: the paper's own start.
        ("linear", [100, 200, 300, 400, 500, 600, 700, 800]),
        ("sqrt", [100, 365, 474, 558, 629, 692, 748, 800]),
        ("square", [100, 114, 157, 229, 329, 457, 614, 800]),
        ("inverse_convex", [100, 114, 133, 160, 200, 267, 400, 800]),
        ("inverse_concave", [100, 500, 633, 700, 740, 767, 786, 800]),
    ],
)
def test_growth_shapes(growth: str, expected: list[int]) -> None:
    config = _config("im", 800, 1000, growth=growth, initial_memory=100)
    assert [step.memory_after for step in build_steps(8000, config)] == expected


@given(cases(("im", "imdc")))
@settings(max_examples=300, deadline=None)
def test_the_first_memory_of_nobodys_choice_is_no_sliver(case: tuple[int, PrefillConfig, int]) -> None:
    prompt, config, stored = case
    config = replace(config, initial_memory="auto", growth="linear")
    memory, chosen = config.memory_tokens, config.sink_tokens + config.recent_tokens + 192
    floor = max(min(memory, chosen, int(config.chunk_tokens)), memory // 4)
    for step in build_steps(prompt, config, stored_tokens=stored):
        assert step.memory_after >= min(step.attended_tokens, floor)


@pytest.mark.parametrize("schedule", ["im", "imdc"])
@given(st.integers(1, 20_000), st.integers(36, 228), st.integers(0, 500))
@settings(max_examples=100, deadline=None)
def test_a_memory_that_has_no_room_to_grow_is_fms(schedule: str, prompt: int, memory: int, more: int) -> None:
    config = PrefillConfig(schedule=schedule, memory_tokens=memory, chunk_tokens=memory + more)
    assert [step.memory_after for step in build_steps(prompt, config)] == [
        step.memory_after for step in build_steps(prompt, replace(config, schedule="fm"))
    ]


@pytest.mark.parametrize("start", [0.25, 55])
def test_an_explicit_first_memory_is_kept_where_it_is_small(start: float | int) -> None:
    config = PrefillConfig(schedule="im", memory_tokens=219, chunk_tokens=512, initial_memory=start)
    assert build_steps(1752, config)[0].memory_after == 55


def test_balanced_chunks_are_the_papers_where_nothing_is_clamped() -> None:
    # N = 8000, n = 8, m = 100, 200 .. 800: c_0 = 1000, c_i = 1000 + mean(100..700) - m_(i-1) = 1400 - m_(i-1).
    steps = build_steps(8000, _config("imdc", 800, 1000, initial_memory=100))
    assert [step.chunk_tokens for step in steps] == [1000, 1300, 1200, 1100, 1000, 900, 800, 700]
    assert [step.memory_after for step in steps] == [100, 200, 300, 400, 500, 600, 700, 800]


@given(cases(), st.floats(0.0, 20.0), st.floats(0.0, 20.0))
@settings(max_examples=300, deadline=None)
def test_any_memory_cost_keeps_coverage_budget_and_order(
    case: tuple[int, PrefillConfig, int], before: float, after: float
) -> None:
    prompt, config, stored = case
    assume(config.schedule == "imdc")
    steps = build_steps(prompt, config, stored_tokens=stored, cost=MemoryCost(before, after))
    chunks = [step.chunk_tokens for step in steps]
    assert sum(chunks) == prompt
    assert min(chunks) >= 1
    assert all(step.attended_tokens <= config.memory_tokens + int(config.chunk_tokens) for step in steps[1:])
    assert steps[-1].memory_after == min(config.memory_tokens, stored + prompt)
    if stored + prompt > config.memory_tokens:
        assert all(later <= earlier + 1 for earlier, later in zip(chunks[1:], chunks[2:], strict=False))


def test_memory_cost_levels_the_weighed_sum() -> None:
    config = _config("imdc", 2000, 1000, initial_memory=500)
    steps = build_steps(20_000, config, cost=MemoryCost(before=0.5, after=1.0))
    levels = [0.5 * s.memory_before + s.memory_after + s.chunk_tokens for s in steps[:-1] if s.chunk_tokens > 128]
    assert len(levels) > len(steps) // 2
    assert max(levels) - min(levels) <= 2


@pytest.mark.parametrize(("mean", "least"), [(1, 1), (3, 1), (100, 25), (512, 128), (2048, 128), (4096, 256)])
def test_least_chunk(mean: int, least: int) -> None:
    assert least_chunk(mean) == least


def test_bytes_stay_level_where_little_may_be_dropped() -> None:
    # 410 of 4,096 go: memory follows what is read, not the target of the first step.
    steps = build_steps(4096, _config("imdc", 3686, 2048), cost=MemoryCost(before=0.05, after=1.5))
    first, second = (0.05 * s.memory_before + 1.5 * s.memory_after + s.chunk_tokens for s in steps)
    assert abs(first - second) < 4


def test_large_memory_no_longer_yields_a_negative_chunk() -> None:
    # The authors' rule ends with a chunk of -227 here.
    steps = build_steps(5000, _config("imdc", 4096, 1024))
    assert min(step.chunk_tokens for step in steps) == 128
    assert steps[-1].memory_after == 4096


def test_second_turn_over_a_cache_above_its_limit() -> None:
    steps = build_steps(2000, _config("imdc", 1000, 500), stored_tokens=1300)
    assert steps[0] == Step(0, 0, 200, 1300, 1000)
    assert all(step.memory_after == 1000 for step in steps)
    assert max(step.attended_tokens for step in steps) == 1500


@pytest.mark.parametrize("prompt", [16_384, 32_768, 131_072])
@pytest.mark.parametrize("chunk", [128, 512])
def test_attention_work_at_eight_chunks_of_memory(prompt: int, chunk: int) -> None:
    pairs = {name: attention_pairs(build_steps(prompt, _config(name, 8 * chunk, chunk))) for name in COMPRESSING}
    assert pairs["fm"] / pairs["imdc"] > (1.75 if prompt >= 64 * chunk else 1.5)
    assert pairs["imdc"] < pairs["im"] < pairs["fm"]


def test_attention_pairs_count_the_causal_triangle() -> None:
    step = Step(index=0, start=0, chunk_tokens=3, memory_before=2, memory_after=5)
    assert step.attention_pairs == 3 + 4 + 5
    assert attention_pairs([step, step]) == 24


def test_a_very_long_prompt_is_planned_at_once() -> None:
    steps = build_steps(10_000_000, _config("imdc", 16_384, 1024))
    assert len(steps) == math.ceil(10_000_000 / 1024)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be at least 1, got 0"),
        ({"prompt_tokens": -3}, "prompt_tokens must be at least 1, got -3"),
        ({"prompt_tokens": 5, "stored_tokens": -1}, "stored_tokens must be at least 0"),
        ({"prompt_tokens": 5, "chunk_tokens": 0}, "chunk_tokens must be at least 1"),
    ],
)
def test_bad_counts(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_steps(config=PrefillConfig(), **arguments)  # type: ignore[arg-type]


def test_auto_chunks_must_be_resolved_first() -> None:
    config = PrefillConfig(chunk_tokens="auto", memory_limit=2**30)
    with pytest.raises(ConfigError, match=r"resolve it with imdc\.plan"):
        build_steps(100, config)
    assert len(build_steps(100, config, chunk_tokens=50)) == 2
