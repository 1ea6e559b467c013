"""PrefillConfig: defaults that work, and a clear error for everything that cannot."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from imdc.config import PrefillConfig, option_names, resolve_config
from imdc.errors import ConfigError, ImdcError


def test_defaults_are_valid_and_frozen() -> None:
    config = PrefillConfig()
    assert config.schedule == "imdc"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.schedule = "fm"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "idmc"}, r"schedule must be one of .*'idmc'.*Did you mean 'imdc'"),
        ({"schedule": 3}, r"schedule must be one of .* got 3"),
        ({"growth": "squared"}, r"growth .*Did you mean 'square'"),
        ({"observer": "prompttail"}, r"observer .*Did you mean 'prompt_tail'"),
        ({"positions": "compacted"}, r"positions .*Did you mean 'compact'"),
        ({"backend": "tritn"}, r"backend .*Did you mean 'triton'"),
        ({"memory_tokens": 0}, r"memory_tokens must be at least 1, got 0"),
        ({"memory_tokens": -5}, r"memory_tokens must be at least 1, got -5"),
        ({"memory_tokens": 512.0}, r"memory_tokens must be an int, got 512.0 of type float"),
        ({"memory_tokens": True}, r"memory_tokens must be an int, got True"),
        ({"memory_tokens": 35}, r"memory_tokens=35 is smaller than .*4 \+ 32 = 36; raise memory_tokens"),
        ({"chunk_tokens": 0}, r"chunk_tokens must be at least 1, got 0"),
        ({"chunk_tokens": "atuo"}, r"chunk_tokens must be one of 'auto'.*Did you mean 'auto'"),
        ({"chunk_tokens": 1.5}, r"chunk_tokens must be an int"),
        ({"chunk_tokens": "auto"}, r"chunk_tokens='auto' needs a memory_limit"),
        ({"memory_limit": 2**30}, r"memory_limit=1073741824 has no effect with chunk_tokens=2048"),
        ({"chunk_tokens": "auto", "memory_limit": 0}, r"memory_limit must be at least 1, got 0"),
        ({"chunk_tokens": "auto", "memory_limit": 1.5}, r"memory_limit=1.5 as a float is a share"),
        ({"initial_memory": 0}, r"initial_memory must be at least 1, got 0"),
        ({"initial_memory": 0.0}, r"initial_memory=0.0 as a float is a share"),
        ({"initial_memory": 1.01}, r"initial_memory=1.01 as a float is a share"),
        ({"initial_memory": float("nan")}, r"initial_memory=nan as a float is a share"),
        ({"initial_memory": 5000}, r"initial_memory=5000 is larger than memory_tokens=4096"),
        (
            {"initial_memory": "half"},
            r"initial_memory must be 'auto' or 'per_step', an int .*, got 'half'",
        ),
        ({"initial_memory": None}, r"initial_memory must be an int"),
        ({"observation_tokens": 0}, r"observation_tokens must be at least 1"),
        ({"pool_kernel": 4}, r"pool_kernel must be odd.*use 3 or 5"),
        ({"pooling": "mean"}, r"pooling must be one of 'max', 'avg', got 'mean'"),
        ({"pool_kernel": -1}, r"pool_kernel must be at least 1"),
        ({"sink_tokens": -1}, r"sink_tokens must be at least 0"),
        ({"recent_tokens": -1}, r"recent_tokens must be at least 0"),
        ({"decode_tokens": 0}, r"decode_tokens must be at least 1"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefillConfig(**options)


def test_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, ImdcError)


def test_unknown_option_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'memory_token'\. Did you mean 'memory_tokens'\?"):
        resolve_config(None, memory_token=512)


def test_unknown_option_without_a_neighbour_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'zzz'\. Options are: schedule, growth") as caught:
        resolve_config(None, zzz=1)
    assert "Did you mean" not in str(caught.value)


def test_options_go_on_top_of_a_config() -> None:
    config = resolve_config(PrefillConfig(memory_tokens=512), chunk_tokens=128)
    assert (config.memory_tokens, config.chunk_tokens) == (512, 128)
    with pytest.raises(ConfigError, match="sink_tokens"):
        resolve_config(config, sink_tokens=500)
    with pytest.raises(ConfigError, match="config must be a PrefillConfig or None, got dict"):
        resolve_config({"memory_tokens": 512})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({}, 1024),
        # A quarter of a small memory is little more than the 36 sinks and recent tokens.
        ({"memory_tokens": 912}, 228),
        ({"memory_tokens": 911}, 228),
        ({"memory_tokens": 916}, 229),
        ({"memory_tokens": 219}, 219),
        ({"memory_tokens": 300, "sink_tokens": 0, "recent_tokens": 0}, 192),
        # A first chunk leaves no more than it has.
        ({"memory_tokens": 500, "chunk_tokens": 200}, 200),
        ({"memory_tokens": 500, "chunk_tokens": 100}, 125),
        # What is asked for stays what it says.
        ({"memory_tokens": 219, "initial_memory": 0.25}, 55),
        ({"memory_tokens": 219, "initial_memory": 40}, 40),
        ({"initial_memory": 100}, 100),
        ({"initial_memory": 1.0}, 4096),
        ({"initial_memory": 1}, 36),
        ({"initial_memory": "per_step"}, 585),
        ({"initial_memory": "per_step", "memory_tokens": 70}, 36),
        ({"initial_memory": 1, "sink_tokens": 0, "recent_tokens": 0}, 1),
    ],
)
def test_first_memory_in_tokens(options: dict[str, Any], tokens: int) -> None:
    config = PrefillConfig(**options)
    assert config.first_memory_tokens(7, int(config.chunk_tokens)) == tokens


def test_option_names_are_the_interface() -> None:
    assert option_names() == (
        "schedule", "growth", "balance", "initial_memory", "memory_tokens", "chunk_tokens", "memory_limit", "observer",
        "observation_tokens", "observation_stride", "scoring", "pooling", "pool_kernel", "sink_tokens",
        "recent_tokens", "layer_budget", "positions", "decode_tokens", "backend", "preset", "recall", "recall_every",
        "recall_limit", "recall_dir", "recall_dtype",
    )  # fmt: skip


def test_config_and_schedule_do_not_import_torch() -> None:
    code = (
        "import sys, importlib.util as u, types; "
        "import imdc.config, imdc.schedule; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
