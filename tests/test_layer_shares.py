"""Layer budgets as arithmetic: shares of one total by depth, by retention and by the entropy of keys."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imdc.config import LAYER_BUDGETS, MEASURED_BUDGETS, PrefillConfig
from imdc.errors import ConfigError
from imdc.layer_budgets import planned_layers, pyramid_shares, share_out
from imdc.prefill.key_entropy import key_entropy
from imdc.schedule import Step, build_steps


@st.composite
def plans(draw: st.DrawFn) -> tuple[PrefillConfig, int, tuple[Step, ...]]:
    schedule = draw(st.sampled_from(["imdc", "im", "fm"]))
    budget = draw(st.sampled_from([name for name in LAYER_BUDGETS if schedule != "fm" or name not in MEASURED_BUDGETS]))
    memory = draw(st.integers(12, 300))
    config = PrefillConfig(
        schedule=schedule,
        layer_budget=budget,
        memory_tokens=memory,
        initial_memory=draw(st.one_of(st.floats(0.05, 1.0), st.just("per_step"))),
        chunk_tokens=draw(st.integers(5, 200)),
        sink_tokens=draw(st.integers(0, 4)),
        recent_tokens=draw(st.integers(0, 8)),
    )
    stored = draw(st.sampled_from([0, memory, memory + 17]))
    return config, draw(st.integers(1, 9)), build_steps(draw(st.integers(1, 1500)), config, stored_tokens=stored)


@given(plans(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_every_budget_hands_out_the_same_total(case: tuple[PrefillConfig, int, tuple[Step, ...]], random: Any) -> None:
    config, layers, steps = case
    before = planned_layers(config, layers, steps)[0]
    assert sum(before) == layers * steps[0].memory_before
    for step in steps:
        measured = [3 * random.random() for _ in range(layers)] if step.memory_before else None
        after = share_out(config, step, before, measured)
        assert sum(after) == layers * step.memory_after
        always = config.sink_tokens + config.recent_tokens
        for held, kept in zip(before, after, strict=True):
            assert min(always, held + step.chunk_tokens) <= kept <= min(held + step.chunk_tokens, 2 * step.memory_after)
            if config.layer_budget in MEASURED_BUDGETS and step.memory_after >= step.memory_before:
                assert kept >= held
        before = after


@pytest.mark.parametrize("budget", MEASURED_BUDGETS)
def test_a_layer_of_low_share_still_keeps_its_recent_tokens(budget: str) -> None:
    """The first chunk has fewer tokens than are always kept: growing layers must not stay below them."""
    config = PrefillConfig(layer_budget=budget, memory_tokens=12, chunk_tokens=5, sink_tokens=0, recent_tokens=6)
    assert share_out(config, Step(1, 5, 9, 5, 6), (5, 5), [3.0, 0.0]) == (6, 6)
    assert share_out(config, Step(1, 5, 9, 5, 7), (5, 5), [3.0, 0.0]) == (8, 6)


def test_pyramid_shares_are_those_of_pyramidkv() -> None:
    """Their code: from 2 * mean - mean / beta down to mean / beta in equal steps, beta 20."""
    mean, layers = 2000, 30
    least = mean / 20
    most = 2 * mean - least
    theirs = [most - layer * (most - least) / (layers - 1) for layer in range(layers)]
    assert [mean * share for share in pyramid_shares(layers)] == pytest.approx(theirs)
    step = Step(0, 0, 10_000, 0, mean)
    config = PrefillConfig(layer_budget="pyramid", memory_tokens=mean, sink_tokens=0, recent_tokens=0)
    assert share_out(config, step, [0] * layers) == pytest.approx(theirs, abs=1)


@pytest.mark.parametrize("budget", MEASURED_BUDGETS)
def test_measured_shares_follow_their_softmax(budget: str) -> None:
    config = PrefillConfig(layer_budget=budget, memory_tokens=1000)
    step, retention = Step(3, 0, 1500, 500, 1000), [0.1, 0.5, 0.9]
    shares = [math.exp(ratio) for ratio in retention]
    expected = [3000 * share / sum(shares) for share in shares]
    assert share_out(config, step, [500] * 3, retention) == pytest.approx(expected, abs=1)
    assert share_out(config, step, [500] * 3) == (1000, 1000, 1000)


@pytest.mark.parametrize("budget", MEASURED_BUDGETS)
@pytest.mark.parametrize("schedule", ["fm", "full"])
def test_what_is_measured_needs_a_memory_that_grows(schedule: str, budget: str) -> None:
    with pytest.raises(ConfigError, match=rf"layer_budget='{budget}' .*take schedule='imdc' or 'im'"):
        PrefillConfig(schedule=schedule, layer_budget=budget)


def unit(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_key_entropy_is_that_of_uncomp() -> None:
    """Their code with singular values in numpy, which divides by log D; keys far from the origin, of any length."""
    keys = unit(1, 2, 300, 16) @ torch.diag(torch.linspace(0.1, 3, 16)) + 5
    entropies = []
    for head in keys[0].double():
        centred = head - head.mean(dim=0, keepdim=True)
        states = (centred / centred.norm(dim=1, keepdim=True)).numpy()
        values = np.linalg.svd(states.T @ states / len(states) + 1e-10 * np.eye(16), compute_uv=False)
        entropies.append(-np.sum(values[:4] * np.log(values[:4])))
    assert key_entropy(keys) == pytest.approx(np.mean(entropies), abs=1e-5)
    assert key_entropy(keys.bfloat16()) == pytest.approx(np.mean(entropies), abs=1e-2)


@pytest.mark.parametrize("directions", [1, 3, 4, 8, 16])
def test_key_entropy_counts_the_directions_of_keys_up_to_a_quarter_of_them(directions: int) -> None:
    """Keys to and fro along some of 16 axes: eigenvalues of equal size, of which four count."""
    axes = torch.eye(16)[:directions]
    keys = 7 + torch.cat((axes, -3 * axes, 2 * axes))[None, None]
    entropy = min(directions, 4) / directions * math.log(directions)
    assert key_entropy(keys) == pytest.approx(entropy, abs=1e-5)


def test_keys_that_are_all_the_same_or_overflowed_have_no_entropy() -> None:
    assert key_entropy(unit(1, 2, 1, 16)) == key_entropy(torch.ones(1, 2, 9, 16)) == 0.0
    assert key_entropy(1e5 * unit(1, 2, 30, 16).half() * 1e5) == 0.0
