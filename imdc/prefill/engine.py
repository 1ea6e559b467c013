"""The prefill loop: rows of a batch one after another, each in the steps of its schedule."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imdc.cache.cache import ImdcCache
from imdc.cache.rows import Row
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.fit import fit_chunk, least_chunk, limit_bytes, smaller_chunk
from imdc.prefill.backends import Backend, choose, traits_of
from imdc.prefill.reader import OnStep, Reader
from imdc.report import PrefillReport
from imdc.schedule import compact_positions


@dataclass(slots=True)
class Engine:
    """Prefills prompts of one model by one config."""

    parts: Parts
    config: PrefillConfig
    forward: Callable[..., Any]
    on_step: OnStep | None = None

    def prefill(
        self, cache: ImdcCache, input_ids: Tensor, attention_mask: Tensor | None, **forward_options: Any
    ) -> tuple[Any, PrefillReport]:
        """Read the prompt `input_ids` int64 [B, T] into `cache`.

        Rows that are equal are read once. The cache changes only when everything was read: after an error it is as
        it was.

        Args:
            cache: empty, or filled by earlier turns.
            input_ids: new tokens of every row.
            attention_mask: [B, columns seen + T], or its last T columns; 0 marks padding, on any side. None: none.
            forward_options: passed to the model's forward with the last chunk.

        Returns:
            The model's output with logits [B, 1, V] of each row's last token, and the report.

        Raises:
            UnsupportedCallError: an empty prompt, or positions beyond the model's window.
            ConfigError: nothing fits `memory_limit`, or what it is a share of is not known.
        """
        began = time.perf_counter()
        prompts = self._prompts(cache, input_ids, attention_mask)
        order, unique = _distinct(prompts) if cache.is_empty else (list(range(len(prompts))), list(range(len(prompts))))
        device = self.parts.device()
        backend, _ = self.backend()
        batch = self._batch(cache, prompts, len(unique))
        chunk, restarts = self._first_chunk(cache, batch, backend, device), 0
        while True:
            reader = Reader(
                self.parts,
                self.config,
                self.forward,
                backend=backend,
                chunk=chunk,
                on_step=self.on_step,
            )
            rows, outputs = [], []
            try:
                for number, index in enumerate(unique):
                    prompt = prompts[index]
                    if cache.is_empty:
                        row = self._new_row(prompt, batch.decoded_tokens)
                    else:
                        row = self._old_row(cache, prompt, index)
                    outputs.append(reader.read(row, prompt.to(device), number, forward_options))
                    rows.append(row)
                break
            except torch.OutOfMemoryError:
                if min(chunk, batch.prompt_tokens) <= least_chunk(batch):
                    raise
            # The frames that the error held are gone, and with them their tensors.
            del reader
            rows, outputs = [], []
            chunk = self._smaller_chunk(chunk, batch, backend, device)
            restarts += 1
        # Its workspace would raise the peak of stacking the rows.
        reports = tuple(reader.reports)
        del reader
        cache.load_rows(rows, torch.tensor(order), cache.get_seq_length() + input_ids.shape[1])
        output = outputs[0]
        output.logits = torch.cat([output.logits for output in outputs])[torch.tensor(order)]
        output.past_key_values = cache
        report = PrefillReport(
            config=self.config,
            backend=backend.name,
            rows=len(unique),
            prompt_tokens=sum(prompts[index].numel() for index in unique),
            memory_tokens=cache.stored_tokens(),
            kv_bytes=cache.kv_bytes(),
            seconds=time.perf_counter() - began,
            steps=reports,
            restarts=restarts,
        )
        return output, report

    def backend(self) -> tuple[Backend, str]:
        """The backend for the model where it is now, and why."""
        parts = self.parts
        weight = parts.decoder.get_input_embeddings().weight
        attention: Any = parts.decoder.layers[0].self_attn
        traits = traits_of(parts.device(), weight.dtype, parts.config, int(attention.head_dim))
        return choose(self.config.backend, traits)

    def _prompts(self, cache: ImdcCache, input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
        rows, columns = input_ids.shape
        if columns == 0 or rows == 0:
            raise UnsupportedCallError(f"input_ids has shape {tuple(input_ids.shape)}: an empty prompt; pass a token")
        if not cache.is_empty and cache.rows is not None and cache.rows.tokens.numel() != rows:
            raise UnsupportedCallError(
                f"past_key_values holds {cache.rows.tokens.numel()} rows, input_ids has {rows}; pass as many rows"
            )
        if attention_mask is None:
            return list(input_ids)
        if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
            raise UnsupportedCallError(
                f"attention_mask has shape {tuple(attention_mask.shape)} for input_ids {tuple(input_ids.shape)}; "
                f"pass one column per token, 1 for tokens and 0 for padding"
            )
        real = attention_mask[:, -columns:].to(input_ids.device, torch.bool)
        prompts = [ids[mask] for ids, mask in zip(input_ids, real, strict=True)]
        for number, prompt in enumerate(prompts):
            if prompt.numel() == 0:
                raise UnsupportedCallError(f"row {number} of input_ids is all padding: an empty prompt; pass a token")
        return prompts

    def _new_row(self, prompt: Tensor, new_tokens: int) -> Row:
        """A row that has read nothing; its own length alone decides whether its memory is numbered 0..m-1."""
        row = Row.empty(len(self.parts.windows))
        row.compact = self._compact(prompt.numel(), new_tokens)
        return row

    def _compact(self, end: int, new_tokens: int) -> bool:
        full = len(self.parts.full_layers)
        return compact_positions(end, new_tokens, self.parts.trained_window, self.config, full_layers=full)

    def _old_row(self, cache: ImdcCache, prompt: Tensor, index: int) -> Row:
        """A row of earlier turns. Where this turn goes beyond the window, "auto" numbers its memory anew from now on.

        Raises:
            UnsupportedCallError: that is too late: of keys that are left between dropped ones no position is known.
        """
        row, window = cache.take_row(index), self.parts.trained_window
        full = self.parts.full_layers
        end = row.position + prompt.numel()
        if self.config.positions == "auto" and not row.compact and self._compact(end, 0):
            if row.stored(full[0]) < row.tokens:
                raise UnsupportedCallError(
                    f"positions='auto' began with original positions and this turn reaches position {end}, the model "
                    f"was trained for {window}; patch with positions='compact' and read the conversation anew"
                )
            row.compact = True
        return row

    def _batch(self, cache: ImdcCache, prompts: list[Tensor], rows: int) -> Batch:
        """What is read, as the planner wants it; inside `generate()` at least one token follows."""
        seen = 0 if cache.rows is None else int(cache.rows.tokens.max()) + cache.tail
        return Batch(
            prompt_tokens=max(prompt.numel() for prompt in prompts),
            rows=rows,
            cache_rows=len(prompts),
            new_tokens=max(1, getattr(cache, "expected_new_tokens", None) or 0),
            seen_tokens=seen,
            stored_tokens=cache.stored_tokens(),
            stored_bytes=cache.held_bytes(),
        )

    def _first_chunk(self, cache: ImdcCache, batch: Batch, backend: Backend, device: torch.device) -> int:
        """The mean chunk: the config's, or the largest that `memory_limit` allows where it asks for "auto"."""
        if isinstance(self.config.chunk_tokens, int):
            return self.config.chunk_tokens
        if cache.phase == "decode":
            # The prefill left room for compressing again, and a generation is not refused half way.
            return batch.prompt_tokens
        shape = ModelShape.from_model(self.parts.model)
        free = _free_bytes(device) if isinstance(self.config.memory_limit, float) else None
        limit = limit_bytes(self.config, None if free is None else free + shape.weights + batch.stored_bytes)
        config = replace(self.config, backend=backend.name)
        return fit_chunk(shape, batch, config, limit, device=device.type)

    def _smaller_chunk(self, chunk: int, batch: Batch, backend: Backend, device: torch.device) -> int:
        """The mean chunk to begin again with after running out of memory."""
        shape = ModelShape.from_model(self.parts.model)
        free = _free_bytes(device)
        limit = None if free is None else free + shape.weights + batch.stored_bytes
        config = replace(self.config, backend=backend.name)
        smaller = smaller_chunk(shape, batch, config, chunk, limit, device=device.type)
        warnings.warn(
            f"imdc: out of memory with chunks of {chunk} tokens; the prefill starts again with {smaller}",
            RuntimeWarning,
            stacklevel=2,
        )
        return smaller


def _free_bytes(device: torch.device) -> int | None:
    """What the device has free for a prefill; None where the system does not tell."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        if not hasattr(module, "mem_get_info"):
            return None
        # The caching allocator holds blocks that it would use again.
        unused = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + unused)
    try:
        # Linux counts what it can reclaim, such as cached files, as available.
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _distinct(prompts: list[Tensor]) -> tuple[list[int], list[int]]:
    """(order, unique): prompt i equals prompt unique[order[i]]."""
    seen: dict[bytes, int] = {}
    unique: list[int] = []
    order: list[int] = []
    for number, prompt in enumerate(prompts):
        name = prompt.cpu().numpy().tobytes()
        if name not in seen:
            seen[name] = len(unique)
            unique.append(number)
        order.append(seen[name])
    return order, unique
