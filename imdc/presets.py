"""Options under one name, in place of the defaults of `PrefillConfig`.

`PAPER` follows the code of the IMDC paper's authors (ZhiYuanZeng/Collie, branch emnlp2024: MemSizeScheduler and
ConvPruner, and the num_sink_tokens of its scripts): memory grows from `memory_tokens` / steps, all queries vote, scores
are averaged over five neighbours, the first four tokens are retained and no latest ones, and positions are contiguous.

What differs from that code: sinks are part of `memory_tokens` here and come on top of it there; a key's mean over the
queries that see it is taken before the average over neighbours here, after it there, which only matters in the last few
keys; votes are pooled within a KV head's own group, there across groups; chunks never become negative; each layer
compresses right after its attention; and beyond the model's window rotary frequencies are not rescaled (dynamic NTK
there), so that memory and chunk must fit into it.

`dataclasses.replace` names every option and so overrides any preset: pass one to
`imdc.patch(model, config, preset=...)` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

# initial_memory in the words of the paper: as much as every step adds.
PER_STEP = "per_step"
PAPER: dict[str, Any] = {
    "schedule": "imdc",
    "growth": "linear",
    "balance": "tokens",
    "initial_memory": PER_STEP,
    "observer": "all_queries",
    "scoring": "attention",
    "pooling": "avg",
    "pool_kernel": 5,
    "sink_tokens": 4,
    "recent_tokens": 0,
    "layer_budget": "uniform",
    "positions": "compact",
}
# By name; the default values of the options that a preset is about are those of the class that `with_presets` gets.
PRESETS: dict[str, Mapping[str, Any]] = {"default": {}, "paper": PAPER}


def preset_options(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the preset among the options `given` sets; nothing where there is none, or none of that name."""
    preset = given.get("preset")
    return PRESETS.get(preset, {}) if isinstance(preset, str) else {}


def with_presets(options: Any) -> Any:
    """The dataclass `options`, which then takes what its option `preset` sets in place of the defaults.

    The default preset is filled with the defaults of the class.
    """
    PRESETS["default"] = {field.name: field.default for field in fields(options) if field.name in PAPER}
    names, init = tuple(field.name for field in fields(options)), options.__init__

    @functools.wraps(init)
    def presetting(self: Any, *args: Any, **given: Any) -> None:
        named = {**dict(zip(names, args, strict=False)), **given}
        filled = {name: value for name, value in preset_options(named).items() if name not in named}
        init(self, *args, **given, **filled)

    options.__init__ = presetting
    return options
