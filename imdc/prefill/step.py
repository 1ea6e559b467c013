"""One step inside one layer: attend over memory | chunk, score, evict, before the next layer begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imdc.cache.rows import Row
from imdc.config import PrefillConfig
from imdc.model.parts import Parts
from imdc.observers import Observer
from imdc.prefill.backends import Backend
from imdc.prefill.observation import Observation
from imdc.prefill.renumber import Tables, moved
from imdc.schedule import Step, observing_rows


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

    A finished row has rotated keys. Read in one step, they stay so and are only moved to their new numbers: what is not
    moved is not rounded, however often that happens.
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
        rotated: bool = False,
    ) -> None:
        """`row` is read and replaced layer by layer; the rest stays as it is. `rotated`: its keys come and stay so."""
        self.parts, self.row, self.step = parts, row, step
        self.tail_rows, self.tail_gap = tail_rows, tail_gap
        self.config, self.backend, self.observer = config, backend, observer
        self.workspace, self.compact, self.rotated = workspace, compact, rotated
        self._votes = observing_rows(config, step.chunk_tokens, tail_rows)
        # Layers whose attention call came; see `imdc.prefill.hook.running`.
        self.reached: set[int] = set()
        self._retained: dict[int, tuple[Tensor, int]] = {}
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor] | None] = {}

    def serves(self, module: nn.Module) -> bool:
        """Whether `module` is an attention module of the model that this step reads with."""
        layers: Any = self.parts.decoder.layers
        layer: Any = getattr(module, "layer_idx", None)
        return layer is not None and layer < len(layers) and layers[layer].self_attn is module

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
            if self.rotated:
                turned = keys.clone()
                turned[:, :, stored:] = self.backend.rotate(keys[:, :, stored:], cos[stored:], sin[stored:])
                keys = turned
            else:
                turned = self.backend.rotate(keys, cos, sin)
            q = self.backend.rotate(q, cos[stored:], sin[stored:])
        candidates = stored + self.step.chunk_tokens
        drops = window is None and self.step.memory_after < candidates
        if drops and self._votes is not None and self.observer.is_mass and self.backend.compress_step is not None:
            out, kept_k, kept_v, chosen = self.backend.compress_step(
                q,
                turned,
                values,
                scale=scale,
                keep=self.step.memory_after,
                rows=self._votes,
                stride=self.config.observation_stride,
                scored_keys=candidates,
                sink_tokens=self.config.sink_tokens,
                recent_tokens=self.config.recent_tokens,
                pool_kernel=self.config.pool_kernel,
                softcap=softcap,
                kept_k=keys,
            )
            self._store(layer, self._moved(layer, kept_k, chosen, tables), kept_v)
            self._count_retained(layer, chosen, stored)
            return out
        out, lse = self.backend.chunk_attention(q, turned, values, scale=scale, softcap=softcap, window=window)
        seen = self._observation(layer, q, turned, values, lse, scale, softcap)
        scores = self.observer.score(seen) if drops else None
        # Rotated copies have served, and a step's peak may lie in what follows.
        del q, turned, lse, seen
        if scores is not None:
            chosen = self.backend.select(
                scores,
                self.step.memory_after,
                sink_tokens=self.config.sink_tokens,
                recent_tokens=self.config.recent_tokens,
            )
            kept_k, kept_v = self.backend.compact(keys[:, :, :candidates], values[:, :, :candidates], chosen)
            self._store(layer, self._moved(layer, kept_k, chosen, tables), kept_v)
            self._count_retained(layer, chosen, stored)
        else:
            kept = slice(0 if window is None else max(0, candidates - window + 1), candidates)
            places = torch.arange(kept.start, kept.stop, device=keys.device)
            kept_k = self._moved(layer, keys[:, :, kept].clone(), places, tables)
            self._store(layer, kept_k, values[:, :, kept].clone())
        return out

    def _moved(self, layer: int, keys: Tensor, places: Tensor, tables: Tables | None) -> Tensor:
        """Rotated `keys` [1, Hkv, n, D] from `places` [..., n] of the workspace, at the numbers they get."""
        if not self.rotated or tables is None:
            return keys
        end = self.step.memory_after
        numbers = torch.arange(end - keys.shape[2], end, device=keys.device)
        new = self.parts.rotary(layer, numbers, tables[0].dtype)
        # Tokens seen so far tell one compression of a row from the next.
        return moved(keys, (tables[0][places], tables[1][places]), new, seed=self.row.tokens)

    def _store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.row.keys[layer], self.row.values[layer] = keys, values

    def _count_retained(self, layer: int, chosen: Tensor, stored: int) -> None:
        if stored:
            # Not read here: that would make the host wait for the device in every layer.
            self._retained[layer] = torch.count_nonzero(chosen < stored), stored * chosen.shape[1]

    def retention(self) -> tuple[float | None, ...]:
        """Per layer the share of its memory that survived the step; see `imdc.report.StepReport`.

        Waits for the device once, which is also what makes the seconds of a step those of its work.
        """
        counts = [count for count, _ in self._retained.values()]
        read = torch.stack([count.to(counts[0].device) for count in counts]).tolist() if counts else []
        pairs = [pairs for _, pairs in self._retained.values()]
        known = dict(zip(self._retained, (kept / of for kept, of in zip(read, pairs, strict=True)), strict=True))
        nothing_dropped = 1.0 if self.step.memory_before else None
        return tuple(
            known.get(layer, nothing_dropped) if window is None else None
            for layer, window in enumerate(self.parts.windows)
        )

    def _observation(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float, softcap: float | None
    ) -> Observation:
        return Observation(
            q=q,
            k=k,
            v=v,
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
