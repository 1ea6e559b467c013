"""One step inside one layer: attend over memory | chunk, score, evict, before the next layer begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imdc.layer_budgets import share_out
from imdc.model.parts import Tables
from imdc.prefill.key_entropy import key_entropy
from imdc.prefill.observation import Observation, scored
from imdc.prefill.reading import RowReading, Tools
from imdc.prefill.recording import Recorder
from imdc.prefill.renumber import moved
from imdc.prefill.softmax import Softmax
from imdc.schedule import Step, observing_rows


class StepRun:
    """One running step: what every layer needs to attend, score and compress.

    With compact positions the model is run at position 0, where rotary embedding is the identity, so queries and keys
    arrive canonical; they are rotated here, the memory as 0..m-1 and the chunk after it. `tail_gap` positions lie
    between the chunk and the tail rows.

    A finished row has rotated keys. Read in one step, they stay so and are only moved to their new numbers: what is not
    moved is not rounded, however often that happens.
    """

    def __init__(self, tools: Tools, reading: RowReading, step: Step, *, tail_rows: int, tail_gap: int) -> None:
        """`tail_rows` ride along with the chunk of `step`."""
        parts, row = tools.parts, reading.row
        self.tools, self.reading, self.parts, self.row, self.step = tools, reading, parts, row, step
        full, config = parts.full_layers, reading.config
        held = [row.stored(layer) for layer in full]
        after = share_out(config, step, held, reading.measured(full))
        # To be filled by the first step.
        self._entropies = None if reading.entropies else reading.entropies
        self._after = dict(zip(full, after, strict=True))
        self.fullest_after = max(after, default=0)
        # Memory that the layers of a type hold at most: their keys are numbered backwards from one start.
        self._longest: dict[str | None, int] = {}
        for layer, kind in enumerate(parts.layer_types):
            self._longest[kind] = max(self._longest.get(kind, 0), row.stored(layer))
        self._first = max(held, default=0)
        self.tail_rows, self.tail_gap = tail_rows, tail_gap
        self.questions = reading.questions if tail_rows else ()
        self._votes = observing_rows(config, step.chunk_tokens, tail_rows)
        # Layers whose attention call came; see `imdc.prefill.hook.running`.
        self.reached: set[int] = set()
        self._retained: dict[int, tuple[Tensor, int]] = {}
        self._tables: dict[tuple[Any, ...], Tables | None] = {}
        self._query_scales: dict[torch.device, Tensor | None] = {}

    def serves(self, module: nn.Module) -> bool:
        """Whether `module` is an attention module of the model that this step reads with."""
        return self.parts.layer_of(module) is not None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        """Attention output [1, Hq, Q, D] of one layer, whose memory is replaced by what the step keeps."""
        window = self.parts.windows[layer]
        stored, whole = self.row.stored(layer), None
        if self.reading.store is not None and window is None:
            chunk = self.step.chunk_tokens
            self.reading.store.write(layer, self.step.start, k[:, :, :chunk], v[:, :, :chunk])
        if self.reading.recall is not None and window is None and self.reading.recall.replaces(stored):
            self.row.keys[layer], self.row.values[layer], whole = self.reading.recall.take(
                layer, q, k, v, softmax, keep=stored
            )
        keys, values = self._workspace(layer, k, v, stored)
        q, keys, turned, tables = self._rotated(layer, q, keys, stored)
        candidates = stored + self.step.chunk_tokens
        if self._entropies is not None and window is None:
            # Before attention: its output is larger than what this takes for a moment, so it raises no peak.
            self._entropies[layer] = key_entropy(turned[:, :, stored:candidates])
        keep = self._after.get(layer, candidates)
        drops = keep < candidates
        if drops and self.reading.recorder is not None:
            # Before the questions' keys are moved; see `_attend_apart`.
            self._show(self.reading.recorder, layer, q, turned, softmax)
        compress_step, config = self.tools.backend.compress_step, self.reading.config
        together = self.tools.observer.is_plain and len(self.questions) < 2 and softmax.sinks is None
        if drops and self._votes is not None and together and compress_step is not None:
            out, kept_k, kept_v, chosen = compress_step(
                q,
                turned,
                values,
                keep=keep,
                rows=self._votes,
                stride=config.observation_stride,
                scored_keys=candidates,
                sink_tokens=config.sink_tokens,
                recent_tokens=config.recent_tokens,
                pool_kernel=config.pool_kernel,
                pooling=config.pooling,
                scoring=config.scoring,
                kept_k=keys,
                **softmax.logits,
            )
            self._keep(layer, kept_k, kept_v, chosen, stored, tables)
            return out
        if whole is not None:
            out, scores = whole, None
        elif len(self.questions) > 1:
            out, scores = self._attend_apart(layer, q, turned, values, window, drops, softmax)
        else:
            out, lse = softmax.attend(self.tools.backend, q, turned, values, window)
            rows = self.step.chunk_tokens, self.tail_rows
            seen = self._observation(layer, q, turned, values, out, lse, *rows, softmax)
            scores = scored(self.tools.observer, seen) if drops else None
            del lse, seen
        # Rotated copies have served, and a step's peak may lie in what follows.
        del q, turned
        if scores is not None:
            chosen = self.tools.backend.select(
                scores,
                keep,
                sink_tokens=config.sink_tokens,
                recent_tokens=config.recent_tokens,
            )
            kept_k, kept_v = self.tools.backend.compact(keys[:, :, :candidates], values[:, :, :candidates], chosen)
            self._keep(layer, kept_k, kept_v, chosen, stored, tables)
        else:
            kept = slice(0 if window is None else max(0, candidates - window + 1), candidates)
            places = torch.arange(kept.start, kept.stop, device=keys.device)
            self.row.keys[layer] = self._moved(layer, keys[:, :, kept].clone(), places, tables)
            self.row.values[layer] = values[:, :, kept].clone()
        return out

    def _workspace(self, layer: int, k: Tensor, v: Tensor, stored: int) -> tuple[Tensor, Tensor]:
        """Keys and values of memory | chunk | tail rows in the buffer of all layers; the layer's memory goes."""
        keys, values = self.tools.workspace.take(k, stored + k.shape[2])
        for buffer, memories, states in ((keys, self.row.keys, k), (values, self.row.values, v)):
            memory = memories[layer]
            if memory is not None:
                buffer[:, :, :stored] = memory
            # The workspace has it now: two of it would raise the peak by a layer's memory.
            memory = memories[layer] = None
            buffer[:, :, stored:] = states
        return keys, values

    def _rotated(
        self, layer: int, q: Tensor, keys: Tensor, stored: int
    ) -> tuple[Tensor, Tensor, Tensor, Tables | None]:
        """Queries, keys to keep some of, keys to attend to, and the tables, where positions are compact."""
        tables = self._rotary(layer, stored, keys) if self.row.compact else None
        if tables is None:
            return q, keys, keys, None
        rotate, after = self.tools.backend.rotate, tables.at(slice(stored, None))
        if self.reading.rotated:
            turned = keys.clone()
            turned[:, :, stored:] = rotate(keys[:, :, stored:], *after)
            keys = turned
        else:
            turned = rotate(keys, *tables)
        q, scale = rotate(q, *after), self._query_scales[q.device]
        return q if scale is None else q.mul_(scale), keys, turned, tables

    def _moved(self, layer: int, keys: Tensor, places: Tensor, tables: Tables | None) -> Tensor:
        """Rotated `keys` [1, Hkv, n, D] from `places` [..., n] of the workspace, at the numbers they get."""
        if not self.reading.rotated or tables is None:
            return keys
        end = self.fullest_after
        if end == self._first + self.step.chunk_tokens and keys.shape[2] == tables.cos.shape[-2] - self.tail_rows:
            # Neither this layer nor the fullest one drops any, so all keep their numbers.
            return keys
        numbers = torch.arange(end - keys.shape[2], end, device=keys.device)
        new = self.parts.rotary(layer, numbers, keys.dtype)
        # Tokens seen so far tell one compression of a row from the next.
        return moved(keys, tables.at(places), new, seed=self.row.tokens)

    def _show(self, recorder: Recorder, layer: int, q: Tensor, k: Tensor, softmax: Softmax) -> None:
        config, chunk = self.reading.config, self.step.chunk_tokens
        recorder.see(
            layer,
            q,
            k,
            chunk_tokens=chunk,
            tails=self.questions or (self.tail_rows,),
            rows=self._votes or min(config.observation_tokens, chunk),
            stride=config.observation_stride,
            softmax=softmax,
        )

    def _keep(
        self, layer: int, keys: Tensor, values: Tensor, chosen: Tensor, stored: int, tables: Tables | None
    ) -> None:
        """The layer's memory is what was at the `chosen` places of the workspace, `stored` of which were memory."""
        self.row.keys[layer], self.row.values[layer] = self._moved(layer, keys, chosen, tables), values
        if self.reading.recorder is not None:
            self.reading.recorder.keep(layer, chosen)
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

    def _attend_apart(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None,
        drops: bool,
        softmax: Softmax,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the chunk, then of each question as if it alone followed; the scores are the highest of any.

        One call for the chunk and one for each question: no kernel masks the questions from each other. The slots of
        `k` and `v` after the candidates, where the questions are, are written to.
        """
        chunk, candidates = self.step.chunk_tokens, k.shape[2] - self.tail_rows
        backend, first, scores = self.tools.backend, 0, None
        own = q[:, :, :chunk], k[:, :, :candidates], v[:, :, :candidates]
        outputs = [softmax.attend(backend, *own, window)[0]]
        for rows in self.questions:
            end = candidates + rows
            if first:
                for states in (k, v):
                    states[:, :, candidates:end] = states[:, :, candidates + first : end + first].clone()
            asked = q[:, :, chunk + first : chunk + first + rows]
            out, lse = softmax.attend(backend, asked, k[:, :, :end], v[:, :, :end], window)
            outputs.append(out)
            if drops:
                seen = self._observation(layer, asked, k[:, :, :end], v[:, :, :end], out, lse, 0, rows, softmax)
                found = scored(self.tools.observer, seen)
                scores = found if scores is None else torch.maximum(scores, found)
            first += rows
        return torch.cat(outputs, dim=2), scores

    def _observation(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        chunk_tokens: int,
        tail_rows: int,
        softmax: Softmax,
    ) -> Observation:
        return Observation(
            q=q,
            k=k,
            v=v,
            out=out,
            lse=lse,
            **softmax.logits,
            chunk_tokens=chunk_tokens,
            tail_rows=tail_rows,
            layer=layer,
            step=self.step.index,
            config=self.reading.config,
            backend=self.tools.backend,
        )

    def tail_positions(self, first: int, device: torch.device) -> Tensor:
        """Positions int64 [tail_rows] of the tail rows, where the chunk ends before position `first`."""
        lengths = self.questions or (self.tail_rows,)
        return first + self.tail_gap + torch.cat([torch.arange(length, device=device) for length in lengths])

    def _rotary(self, layer: int, stored: int, keys: Tensor) -> Tables | None:
        """Tables of all keys of the workspace: the chunk starts at the position after the fullest layer's memory.

        Layers that store less, and sliding ones, are numbered backwards from the same start.
        """
        parts = self.parts
        if not parts.rotary_layers[layer]:
            return None
        longest = self._longest[parts.layer_types[layer]]
        name = (parts.layer_types[layer], keys.device, keys.dtype)
        if name not in self._tables:
            positions = torch.arange(self._first - longest, self._first - stored + keys.shape[2], device=keys.device)
            if self.tail_rows:
                end = self._first - stored + keys.shape[2] - self.tail_rows
                positions[-self.tail_rows :] = self.tail_positions(end, keys.device)
            self._tables[name] = parts.rotary(layer, positions, keys.dtype)
            rows = self.step.chunk_tokens + self.tail_rows
            self._query_scales[keys.device] = parts.query_scale(positions[-rows:], keys.dtype)
        tables = self._tables[name]
        return None if tables is None else tables.at(slice(longest - stored, None))
