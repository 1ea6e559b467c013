"""How transformers' attention calls reach the step that is running.

Attention modules look up their implementation by name in a registry of transformers. While a model is patched, the
entries that its modules ask for are overlaid: such an entry hands the step that is running in this thread its queries,
keys and values, and calls what it overlays where none is running, or where another model calls. The model's config is
never changed, so that a copy of it carries nothing of imdc.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from imdc.cache.cache import ImdcCache
from imdc.errors import ImdcError
from imdc.model import hf
from imdc.model.parts import Parts
from imdc.prefill.decode import DecodeMasks
from imdc.prefill.renewal import Renewal
from imdc.prefill.requests import check_masks
from imdc.prefill.softmax import Softmax
from imdc.prefill.step import StepRun

_RUNNING: ContextVar[StepRun | None] = ContextVar("imdc_running_step", default=None)
_DECODING: ContextVar[tuple[DecodeMasks | None, Renewal | None]] = ContextVar("imdc_decoding", default=(None, None))


@contextmanager
def running(step: StepRun) -> Iterator[None]:
    """Make `step` the one that attention calls of this thread belong to, and check that all its layers came.

    Raises:
        ImdcError: a layer attended by other means than transformers' registry.
    """
    token = _RUNNING.set(step)
    try:
        yield
    finally:
        _RUNNING.reset(token)
    missing = sorted(set(range(len(step.parts.windows))) - step.reached)
    if missing:
        raise ImdcError(
            f"layers {missing} of {type(step.parts.model).__name__} never reached imdc: they do not look up their "
            f"attention in transformers' registry; load the model without a replacement of its attention modules"
        )


def decode_masks(parts: Parts, cache: ImdcCache) -> DecodeMasks | None:
    """The masks of a forward call that appends to `cache`, where its layers need different ones.

    Raises:
        UnsupportedCallError: the model's attention takes masks of a form that is not known here.
    """
    if not cache.ragged:
        return None
    overlay(check_masks(parts))
    return DecodeMasks(parts, cache)


@contextmanager
def decoding(masks: DecodeMasks | None, renewal: Renewal | None) -> Iterator[None]:
    """Give attention calls of this thread that belong to the model the mask of their layer, and its memory anew."""
    token = _DECODING.set((masks, renewal))
    try:
        yield
    finally:
        _DECODING.reset(token)


class _Overlay:
    """An entry of a registry of transformers that is put over the one of the same name, and taken off again."""

    def __init__(self, registry: Any, name: str, make: Callable[[Callable[[], Any]], Callable[..., Any]]) -> None:
        # A new object of the registry's class has no entries of its own, so it shows those that all objects share.
        shared = type(registry)()
        found = registry.get(name)
        self._registry, self._name = registry, name
        self._own = found if found is not shared.get(name) else None
        self._ours = make(lambda: self._own or shared.get(name))
        registry[name] = self._ours

    def remove(self) -> None:
        if self._registry.get(self._name) is not self._ours:
            # Somebody has put an entry over ours since; it stays.
            return
        del self._registry[self._name]
        if self._own is not None:
            self._registry[self._name] = self._own


def _own_precision(states: Tensor) -> AbstractContextManager[object]:
    """Without autocast, which is for the model's modules: scores are float32 whatever the states are."""
    kind = states.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _attention(overlaid: Callable[[], Any]) -> Callable[..., tuple[Tensor, Any]]:
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
        # As PyTorch's fused attention does where a model names no scale.
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if step is None or not step.serves(module):
            found, (masks, renewal) = overlaid(), _DECODING.get()
            function = found or hf.eager_attention(module)
            if renewal is not None and renewal.serves(module):
                renewed: Any = module.layer_idx
                with _own_precision(query):
                    renewal.renew(int(renewed), query, Softmax.of(renewal.recall.parts, scale, kwargs))
            if masks is not None and masks.serves(module):
                number: Any = module.layer_idx
                attention_mask = masks.of(int(number), query, key, eager=found is None)
            result: tuple[Tensor, Any] = function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
            return result
        layer: Any = module.layer_idx
        step.reached.add(int(layer))
        with _own_precision(query):
            out = step.attend(int(layer), query, key, value, Softmax.of(step.parts, scale, kwargs))
        return out.transpose(1, 2), None

    return imdc_attention


def _mask(overlaid: Callable[[], Any]) -> Callable[..., Any]:
    def imdc_mask(*args: Any, **kwargs: Any) -> Any:
        step = _RUNNING.get()
        # A step knows its masks; they would be as large as the chunk times the keys.
        if step is not None and kwargs.get("config", step.parts.config) is step.parts.config:
            return None
        return overlaid()(*args, **kwargs)

    return imdc_mask


# Reentrant: the garbage collector may find a patched model, and drop its patch, while this thread holds the lock.
_lock = threading.RLock()
_patches = 0
_overlays: dict[str, list[_Overlay]] = {}


def add_patch(handle: object) -> Callable[[], Any]:
    """Count a patched model; what is returned drops it, and is called where `handle` goes without having called it."""
    global _patches
    with _lock:
        _patches += 1
    drop = weakref.finalize(handle, _drop_patch)
    drop.atexit = False
    return drop


def _drop_patch() -> None:
    """Count one patched model less; after the last one the registries are as they were.

    Not after every prefill: another thread may hold an entry that it has just looked up.
    """
    global _patches
    with _lock:
        _patches -= 1
        if _patches == 0:
            for overlay in (overlay for overlays in _overlays.values() for overlay in overlays):
                overlay.remove()
            _overlays.clear()


def overlay(implementations: Iterable[str]) -> None:
    """Overlay the registry entries of these names, where that was not done since the first model was patched."""
    with _lock:
        for name in implementations:
            if name in _overlays:
                continue
            _overlays[name] = [_Overlay(hf.ALL_ATTENTION_FUNCTIONS, name, _attention)]
            if name in hf.ALL_MASK_ATTENTION_FUNCTIONS:
                _overlays[name].append(_Overlay(hf.ALL_MASK_ATTENTION_FUNCTIONS, name, _mask))
