"""Everything that imdc needs of transformers beyond its documented interface: this module alone knows those names.

`check` runs when a model is patched, so that a release that has changed one of them is refused with one sentence.

| name | what for | seen in |
|---|---|---|
| `cache` or `past_key_values` of forward and generate | to hand over and find the KV cache | `cache` from 5.24 on |
| `ALL_ATTENTION_FUNCTIONS`, `ALL_MASK_ATTENTION_FUNCTIONS` | attention calls reach the running step | 5.17 to 5.24 |
| `config._attn_implementation` of an attention module | which entry of those it asks for | 5.17 to 5.24 |
| `eager_attention_forward` of a model's file | the entry that is not in the registry | 5.17 to 5.24 |
| `module.layer_idx` of an attention module | which layer calls | 5.17 to 5.24 |
| `scaling`, `softcap`, `s_aux` of an attention call | how its logits become weights | 5.17 to 5.24 |
| `create_causal_mask`, `create_sliding_window_causal_mask` | decode masks of layers of both kinds | 5.17 to 5.24 |
| the layers of `DynamicCache(config=...)` | which layers have a sliding window | 5.17 to 5.24 |
| `CacheLayerMixin`, `DynamicSlidingWindowLayer` | bases of imdc's cache layers | 5.17 to 5.24 |
| assisted decoding passes the whole text of a later turn again | `Turn.columns` of imdc's cache | 5.17 to 5.24 |
| `Phi3ForCausalLM.prepare_inputs_for_generation` drops the cache | `keeping_cache` | 5.17 to 5.24 |
| `_hf_hook.execution_device`, `.skip_keys` (accelerate) | where offloaded weights compute | accelerate 1.1 and newer |
| `GenerationConfig.is_assistant` | whether a model drafts for another one | 5.17 to 5.24 |
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from imdc.errors import UnsupportedModelError

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS",
    "CACHE_NAME",
    "CACHE_NAMES",
    "Cache",
    "CacheLayerMixin",
    "DynamicSlidingWindowLayer",
    "attention_implementations",
    "cache_argument",
    "check",
    "decode_masks",
    "eager_attention",
    "execution_device",
    "keeping_cache",
    "silenced",
    "sliding_windows",
    "take_hook",
]

# Releases that the tests pass with: from the first on, and below the second. setup.py says the same to pip.
LOWEST, BELOW = (5, 17), (5, 25)
# The release that runs, and the first whose assisted decoding takes candidates back as imdc expects it to while an
# answer is compressed, or behind a cache of an earlier turn.
RUNNING = tuple(int(part) if part.isdigit() else 0 for part in transformers.__version__.split(".")[:2])
CROPS_ASSISTED = (5, 23)
# Set it to 1 to try a release that is not in that range; every other check stays.
UNTESTED = "IMDC_UNTESTED_TRANSFORMERS"
# The KV cache's argument, newest name first.
CACHE_NAMES = ("cache", "past_key_values")
CACHE_NAME = next((name for name in CACHE_NAMES if name in inspect.signature(create_causal_mask).parameters), "cache")


def check(model: PreTrainedModel) -> None:
    """Refuse a release of transformers, or a model class, on which imdc would work by half.

    Raises:
        UnsupportedModelError: the release is not tested, or a name of this module's table is missing; the message
            says which and what to do.
    """
    version = transformers.__version__
    remedy = (
        f"install one that imdc was tested with: pip install 'transformers>={_dotted(LOWEST)},<{_dotted(BELOW)}' "
        f"(or set {UNTESTED}=1 to try this one)"
    )
    numbers = tuple(int(part) if part.isdigit() else 0 for part in version.split(".")[:2])
    if not LOWEST <= numbers < BELOW and os.environ.get(UNTESTED) != "1":
        raise UnsupportedModelError(f"transformers {version} was not tested with imdc; {remedy}")
    # The last entry is a probe: transformers renames arguments of functions that keep their names.
    needed = {
        "cache argument of forward": any(name in _parameters(type(model).forward) for name in CACHE_NAMES),
        "prepare_inputs_for_generation": hasattr(model, "prepare_inputs_for_generation"),
        "GenerationConfig.is_assistant": hasattr(GenerationConfig(), "is_assistant"),
        "logits_to_keep argument of forward": "logits_to_keep" in _parameters(type(model).forward),
        "cache argument of create_causal_mask": any(name in _parameters(create_causal_mask) for name in CACHE_NAMES),
        "attention registry": all(
            hasattr(registry, "__setitem__") and "sdpa" in registry
            for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
        ),
    }
    missing = [name for name, found in needed.items() if not found]
    if missing:
        raise UnsupportedModelError(
            f"transformers {version} with {type(model).__name__} lacks what imdc needs ({', '.join(missing)}); "
            f"{remedy.partition(' (or')[0]}"
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    return inspect.signature(function).parameters.keys()


@functools.cache
def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which `function` takes a KV cache."""
    parameters = _parameters(function)
    return next(name for name in CACHE_NAMES if name in parameters)


def keeping_cache(model: PreTrainedModel) -> Callable[..., Any]:
    """A `prepare_inputs_for_generation` for `model` that never drops the cache: the one all models inherit.

    Phi-3 drops it where a text grows beyond `config.original_max_position_embeddings`, to read everything again
    with other rotary factors; the memory of imdc stays within the positions of one set of factors.
    """
    inherited: Callable[..., Any] = GenerationMixin.prepare_inputs_for_generation.__get__(model)
    return inherited


def attention_implementations(attentions: Iterable[nn.Module]) -> set[str]:
    """The names under which attention modules look up their implementation."""
    configs: list[Any] = [attention.config for attention in attentions]
    return {config._attn_implementation or "eager" for config in configs}


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of an attention module: not in the registry, every model file has its own."""
    function: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return function


def decode_masks(
    config: Any, cache: Cache, input_ids: Tensor, position_ids: Tensor, full: Tensor | None, sliding: Tensor | None
) -> dict[str, Any]:
    """The masks of a decoder with layers of both kinds, by layer type.

    Args:
        config: of the decoder.
        cache: what the new tokens are appended to.
        input_ids: new tokens, int64 [B, Q].
        position_ids: their positions, int64 [B, Q].
        full: bool [B, columns] of full-attention layers, False for padding; None where there is none.
        sliding: the same of sliding-window layers.
    """
    shared = {
        "config": config,
        # Only shape, dtype and device of this are read.
        "inputs_embeds": torch.empty(*input_ids.shape, 0, device=input_ids.device, dtype=config.dtype),
        cache_argument(create_causal_mask): cache,
        "position_ids": position_ids,
    }
    return {
        "full_attention": create_causal_mask(attention_mask=full, **shared),
        "sliding_attention": create_sliding_window_causal_mask(attention_mask=sliding, **shared),
    }


def silenced(config: Any) -> dict[str, bool]:
    """Arguments of forward that keep it from collecting attentions and hidden states where its config says so."""
    return {name: False for name in ("output_attentions", "output_hidden_states") if getattr(config, name, False)}


def sliding_windows(config: Any, count: int) -> tuple[int | None, ...]:
    """Per layer the sliding window that transformers' own cache would use, None for full attention.

    Raises:
        UnsupportedModelError: a layer keeps another kind of state (linear attention, chunked attention).
    """
    own = DynamicCache(config=config).layers
    if not own:
        return (None,) * count
    windows: list[int | None] = []
    for number, layer in enumerate(own):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer:
            windows.append(int(layer.sliding_window))
        else:
            raise UnsupportedModelError(
                f"layer {number} of model_type={config.model_type!r} keeps a {type(layer).__name__}; imdc knows full "
                f"and sliding-window attention only"
            )
    return tuple(windows)


def execution_device(module: nn.Module) -> torch.device:
    """The device that accelerate moves a module's weights to, else the one they are on."""
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    weight = next(module.parameters())
    return torch.device("cpu") if weight.is_meta else weight.device


def take_hook(source: nn.Module, target: nn.Module) -> None:
    """Let `target` bring its inputs and outputs to one device as accelerate makes `source` do, where it does."""
    hook: Any = getattr(source, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        add_hook_to_module(target, AlignDevicesHook(io_same_device=True, skip_keys=getattr(hook, "skip_keys", None)))
