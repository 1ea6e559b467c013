"""preset="paper": the IMDC paper's setting by one word, through configs, command line, plan and engine."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, greedy

import imdc
from imdc.cli.main import build_parser
from imdc.cli.options import add_config_options, config_from
from imdc.config import PrefillConfig, resolve_config
from imdc.errors import ConfigError
from imdc.presets import PRESETS
from imdc.schedule import build_steps

WRITTEN_OUT: dict[str, Any] = {
    "schedule": "imdc",
    "growth": "linear",
    "balance": "tokens",
    "initial_memory": "per_step",
    "observer": "all_queries",
    "scoring": "attention",
    "pooling": "avg",
    "pool_kernel": 5,
    "sink_tokens": 4,
    "recent_tokens": 0,
    "layer_budget": "uniform",
    "positions": "compact",
}


def values(config: PrefillConfig) -> dict[str, Any]:
    return {name: value for name, value in config.as_dict().items() if name != "preset"}


def test_the_paper_s_preset_is_these_options() -> None:
    assert values(PrefillConfig(preset="paper")) == values(PrefillConfig(**WRITTEN_OUT))
    assert PrefillConfig(preset="paper").preset == "paper"
    assert PrefillConfig(preset="default") == PrefillConfig()


@pytest.mark.parametrize("name", sorted(WRITTEN_OUT))
def test_an_option_beside_the_preset_takes_precedence_also_where_it_is_a_default(name: str) -> None:
    default = getattr(PrefillConfig(), name)
    changed = PrefillConfig(preset="paper", **{name: default})
    assert values(changed) == {**values(PrefillConfig(**WRITTEN_OUT)), name: default}
    assert resolve_config(preset="paper", **{name: default}) == changed


def test_options_by_place_take_precedence_too() -> None:
    assert PrefillConfig("fm", preset="paper").schedule == "fm"


def test_a_preset_goes_on_top_of_a_config_and_other_options_on_top_of_it() -> None:
    own = PrefillConfig(memory_tokens=512, pool_kernel=9, observation_tokens=64)
    paper = resolve_config(own, preset="paper", sink_tokens=0)
    assert (paper.memory_tokens, paper.observation_tokens) == (512, 64)
    assert (paper.pool_kernel, paper.sink_tokens, paper.observer) == (5, 0, "all_queries")
    assert values(resolve_config(paper, preset="default")) == values(
        PrefillConfig(memory_tokens=512, observation_tokens=64)
    )


def test_copies_keep_what_was_chosen() -> None:
    config = PrefillConfig(preset="paper", pool_kernel=7)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, sink_tokens=1).pool_kernel == 7


@pytest.mark.parametrize("preset", ["papr", 3])
def test_unknown_presets_are_refused_with_the_choices(preset: object) -> None:
    with pytest.raises(ConfigError, match=r"preset must be one of 'default', 'paper', got"):
        PrefillConfig(preset=preset)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"preset must be one of 'default', 'paper', got"):
        resolve_config(PrefillConfig(), preset=preset)


def test_every_preset_sets_the_same_options() -> None:
    assert {frozenset(options) for options in PRESETS.values()} == {frozenset(WRITTEN_OUT)}


@pytest.mark.parametrize("prompt", [700, 8000, 32_768])
def test_memory_starts_at_its_share_of_a_step_whatever_the_prompt(prompt: int) -> None:
    """The authors' scheduler: floor(M / n) * (i + 1) after step i, M after the last."""
    config = PrefillConfig(preset="paper", schedule="im", memory_tokens=1024, chunk_tokens=512)
    steps = build_steps(prompt, config)
    count = -(-prompt // 512)
    theirs = [1024 // count * (index + 1) for index in range(count - 1)]
    for step, target in zip(steps, theirs, strict=False):
        assert step.memory_after == pytest.approx(min(target, step.attended_tokens), abs=count)
    assert steps[0].memory_after == min(1024 // count, 512) or prompt <= 1024
    assert steps[-1].memory_after == min(1024, prompt)


def test_command_lines_take_it_over_the_command_s_own_defaults() -> None:
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    args = parser.parse_args(["--preset", "paper", "--pool-kernel", "9", "--memory-tokens", "1k"])
    config = config_from(args, {"memory_tokens": 64, "chunk_tokens": 32, "observer": "window"})
    assert config == PrefillConfig(preset="paper", pool_kernel=9, memory_tokens=1000, chunk_tokens=32)
    assert config_from(parser.parse_args(["--initial-memory", "per_step"])).initial_memory == "per_step"


@pytest.mark.parametrize("command", ["demo", "generate --model m --file f", "plan m", "profile m"])
def test_every_command_that_reads_takes_it(command: str) -> None:
    args = build_parser().parse_args([*command.split(), "--preset", "paper", "--pooling", "max"])
    assert (args.config_preset, args.config_pooling) == ("paper", "max")


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_reading_by_the_preset_is_reading_by_its_options(backend: str) -> None:
    model, ids = FAMILIES["llama"](), torch.randint(3, 128, (1, 300))
    sizes: dict[str, Any] = {"memory_tokens": 64, "chunk_tokens": 48, "backend": backend}
    found = []
    for options in ({"preset": "paper"}, WRITTEN_OUT, {**WRITTEN_OUT, "pooling": "max"}):
        with imdc.patch(model, **sizes, **options) as handle:
            output = greedy(model, ids)
            assert handle.report is not None and output.logits is not None
        found.append((output.sequences, torch.stack(output.logits), handle.report.steps[0].memory_after))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][1], found[2][1])
    assert found[0][2] == 64 // 7
    plan = imdc.plan(model, 300, device="cpu", preset="paper", **sizes)
    assert plan.compact and [step.memory_after for step in plan.steps] == [s.memory_after for s in handle.report.steps]
