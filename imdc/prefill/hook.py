"""How transformers' attention calls reach the step that is running.

While a prefill runs, the model's attention implementation is `imdc_<its own>`, registered with transformers. That
function hands the step that is running in this thread its queries, keys and values; where none is running (another
thread decoding with the same config) it calls the model's own implementation, masks included.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from imdc.prefill.step import StepRun

_PREFIX = "imdc_"

_RUNNING: ContextVar[StepRun | None] = ContextVar("imdc_running_step", default=None)


@contextmanager
def running(step: StepRun) -> Iterator[None]:
    """Make `step` the one that attention calls of this thread belong to."""
    token = _RUNNING.set(step)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def _attention_function(own: str) -> Callable[..., tuple[Tensor, Any]]:
    def imdc_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        step = _RUNNING.get()
        if step is None:
            # Eager attention is not registered with transformers: every model file has its own.
            eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
            function = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
            result: tuple[Tensor, Any] = function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
            return result
        layer: Any = module.layer_idx
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = step.attend(int(layer), query, key, value, scale=scale, softcap=kwargs.get("softcap"))
        return out.transpose(1, 2), None

    return imdc_attention


def _mask_function(own: str) -> Callable[..., Any]:
    def imdc_mask(*args: Any, **kwargs: Any) -> Any:
        if _RUNNING.get() is not None:
            return None
        return ALL_MASK_ATTENTION_FUNCTIONS[own](*args, **kwargs)

    return imdc_mask


_lock = threading.Lock()
_installed: dict[int, tuple[int, str | None]] = {}


def _register(name: str, own: str) -> None:
    if name not in ALL_ATTENTION_FUNCTIONS._global_mapping:
        ALL_ATTENTION_FUNCTIONS._global_mapping[name] = _attention_function(own)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name] = _mask_function(own)


def unregister_all() -> None:
    """Take imdc's names out of transformers' registries; called when the last patch is removed.

    Not after every prefill: another thread may hold a name it has just read from a config it shares.
    """
    with _lock:
        for registry in (ALL_ATTENTION_FUNCTIONS._global_mapping, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping):
            for name in [name for name in registry if name.startswith(_PREFIX)]:
                del registry[name]


@contextmanager
def installed(config: Any) -> Iterator[None]:
    """Let the attention modules that read `config` call imdc; nested and concurrent uses share one change.

    Models can share a config object, and threads a model, so uses are counted and the last one puts the config back.
    """
    with _lock:
        count, own = _installed.get(id(config), (0, config._attn_implementation))
        if count == 0:
            name = _PREFIX + (own or "eager")
            _register(name, own or "eager")
            config._attn_implementation_internal = name
        _installed[id(config)] = (count + 1, own)
    try:
        yield
    finally:
        with _lock:
            count, own = _installed.pop(id(config))
            if count > 1:
                _installed[id(config)] = (count - 1, own)
            else:
                config._attn_implementation_internal = own
