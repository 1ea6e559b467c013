"""One step inside one layer: attend over memory | chunk, then compress, before the next layer begins.

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

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from imdc.backends import Backend
from imdc.config import PrefillConfig
from imdc.families import Parts
from imdc.observers import Observation, Observer, observing_rows
from imdc.rows import Row
from imdc.schedule import Step

_PREFIX = "imdc_"


class Workspace:
    """The one buffer for memory | chunk | tail rows that all layers of a prefill share, per device and head shape."""

    def __init__(self) -> None:
        """Nothing is allocated before the first layer asks."""
        self._buffers: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def take(self, states: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, Hkv, length, D], not initialised, of the device and dtype of `states`."""
        key = (states.device, states.dtype, states.shape[1], states.shape[3])
        if key not in self._buffers or self._buffers[key][0].shape[2] < length:
            self._buffers.pop(key, None)
            size = (1, states.shape[1], length, states.shape[3])
            self._buffers[key] = (states.new_empty(size), states.new_empty(size))
        keys, values = self._buffers[key]
        return keys[:, :, :length], values[:, :, :length]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(k.nbytes + v.nbytes for k, v in self._buffers.values())


class StepRun:
    """One running step: what every layer needs to attend, score and compress.

    With compact positions the model is run at position 0, where rotary embedding is the identity, so queries and keys
    arrive canonical; they are rotated here, the memory as 0..m-1 and the chunk after it. `tail_gap` positions lie
    between the chunk and the tail rows.
    """

    def __init__(
        self,
        parts: Parts,
        row: Row,
        step: Step,
        *,
        tail_rows: int,
        tail_gap: int,
        config: PrefillConfig,
        backend: Backend,
        observer: Observer,
        workspace: Workspace,
        compact: bool,
    ) -> None:
        """`row` is read and replaced layer by layer; the rest stays as it is."""
        self.parts, self.row, self.step = parts, row, step
        self.tail_rows, self.tail_gap = tail_rows, tail_gap
        self.config, self.backend, self.observer = config, backend, observer
        self.workspace, self.compact = workspace, compact
        self._votes = observing_rows(config, step.chunk_tokens, tail_rows)
        self._retained: dict[int, Tensor] = {}
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor] | None] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None) -> Tensor:
        """Attention output [1, Hq, Q, D] of one layer, whose memory is replaced by what the step keeps."""
        window = self.parts.windows[layer]
        stored = self.row.stored(layer)
        keys, values = self.workspace.take(k, stored + k.shape[2])
        for buffer, memories, states in ((keys, self.row.keys, k), (values, self.row.values, v)):
            memory = memories[layer]
            if memory is not None:
                buffer[:, :, :stored] = memory
            # The workspace has it now: two of it would raise the peak by a layer's memory.
            memory = memories[layer] = None
            buffer[:, :, stored:] = states
        turned = keys
        tables = self._rotary(layer, stored, keys) if self.compact else None
        if tables is not None:
            cos, sin = tables
            turned = self.backend.rotate(keys, cos, sin)
            q = self.backend.rotate(q, cos[stored:], sin[stored:])
        candidates = stored + self.step.chunk_tokens
        drops = window is None and self.step.memory_after < candidates
        if drops and self._votes is not None and self.backend.compress_step is not None:
            out, kept_k, kept_v, chosen = self.backend.compress_step(
                q,
                turned,
                values,
                scale=scale,
                keep=self.step.memory_after,
                rows=self._votes,
                scored_keys=candidates,
                sink_tokens=self.config.sink_tokens,
                recent_tokens=self.config.recent_tokens,
                pool_kernel=self.config.pool_kernel,
                softcap=softcap,
                kept_k=keys,
            )
            self._store(layer, kept_k, kept_v)
            self._count_retained(layer, chosen, stored)
            return out
        out, lse = self.backend.chunk_attention(q, turned, values, scale=scale, softcap=softcap, window=window)
        scores = self.observer(self._observation(layer, q, turned, lse, scale, softcap)) if drops else None
        # Rotated copies have served, and a step's peak may lie in what follows.
        del q, turned, lse
        if scores is not None:
            chosen = self.backend.select(
                scores,
                self.step.memory_after,
                sink_tokens=self.config.sink_tokens,
                recent_tokens=self.config.recent_tokens,
            )
            self._store(layer, *self.backend.compact(keys[:, :, :candidates], values[:, :, :candidates], chosen))
            self._count_retained(layer, chosen, stored)
        else:
            kept = slice(0 if window is None else max(0, candidates - window + 1), candidates)
            self._store(layer, keys[:, :, kept].clone(), values[:, :, kept].clone())
        return out

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.row.keys[layer], self.row.values[layer] = keys, values

    def _count_retained(self, layer: int, chosen: Tensor, stored: int) -> None:
        if stored:
            # Not read here: that would make the host wait for the device in every layer.
            self._retained[layer] = (chosen < stored).sum() / (stored * chosen.shape[1])

    def retention(self) -> tuple[float | None, ...]:
        """Per layer the share of its memory that survived the step; see `imdc.report.StepReport`."""
        known = {layer: float(share) for layer, share in self._retained.items()}
        nothing_dropped = 1.0 if self.step.memory_before else None
        return tuple(
            known.get(layer, nothing_dropped) if window is None else None
            for layer, window in enumerate(self.parts.windows)
        )

    def _observation(
        self, layer: int, q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None
    ) -> Observation:
        return Observation(
            q=q,
            k=k,
            lse=lse,
            scale=scale,
            softcap=softcap,
            chunk_tokens=self.step.chunk_tokens,
            tail_rows=self.tail_rows,
            layer=layer,
            step=self.step.index,
            config=self.config,
            backend=self.backend,
        )

    def _rotary(self, layer: int, stored: int, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """Tables of all keys of the workspace: the chunk starts at the position after the full layers' memory.

        A sliding layer stores other pairs than the full ones; its keys are numbered backwards from the same start.
        """
        parts = self.parts
        if not parts.rotary_layers[layer]:
            return None
        name = (parts.layer_types[layer], stored, keys.device, keys.dtype)
        if name not in self._tables:
            first = self.step.memory_before - stored
            positions = torch.arange(first, first + keys.shape[2], device=keys.device)
            if self.tail_rows:
                positions[-self.tail_rows :] += self.tail_gap
            self._tables[name] = parts.rotary(layer, positions, keys.dtype)
        return self._tables[name]


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
