"""The prefill loop: rows of a batch one after another, each in the steps of its schedule."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from imdc.attention import StepRun, Workspace, installed, running
from imdc.backends import Backend, choose, traits_of
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.families import Parts
from imdc.kernels.reference import rotate
from imdc.memory import ImdcCache, Row
from imdc.modelshape import ModelShape
from imdc.observers import get_observer
from imdc.plan import fit_chunk, limit_bytes
from imdc.report import PrefillReport, StepReport
from imdc.schedule import Step, build_steps

OnStep = Callable[[StepReport], None]

# A step that does not fit is retried with half the chunk, down to this: below, activations no longer matter.
_LEAST_CHUNK = 32


class _PassingCache(Cache):
    """What the decoder sees as its cache during a step: it returns the chunk's own states; imdc does the rest."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


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
            attention_mask: [B, columns seen + T], or its last T columns; 0 marks padding, on any side. None: no padding.
            forward_options: passed to the model's forward with the last chunk.

        Returns:
            The model's output with logits [B, 1, V] of each row's last token, and the report.

        Raises:
            UnsupportedCallError: an empty prompt, or positions beyond the model's window.
        """
        began = time.perf_counter()
        prompts = self._prompts(cache, input_ids, attention_mask)
        order, unique = _distinct(prompts) if cache.is_empty else (list(range(len(prompts))), list(range(len(prompts))))
        longest = max(prompt.numel() for prompt in prompts)
        compact = self._compact(cache, longest)
        device = self.parts.decoder.get_input_embeddings().weight.device
        backend, _ = self.backend()
        chunk, restarts = self._fitting_chunk(longest, device), 0
        while True:
            try:
                reader = _Reader(self, backend, compact, chunk)
                rows, outputs = [], []
                for number, index in enumerate(unique):
                    row = Row.empty(len(self.parts.windows)) if cache.is_empty else cache.take_row(index)
                    outputs.append(reader.read(row, prompts[index].to(device), number, forward_options))
                    rows.append(row)
                break
            except torch.OutOfMemoryError as error:
                rows, outputs = [], []
                chunk = self._smaller_chunk(chunk, longest, error)
                restarts += 1
        cache.load_rows(rows, torch.tensor(order), cache.get_seq_length() + input_ids.shape[1], compact)
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
            steps=tuple(reader.reports),
            restarts=restarts,
        )
        return output, report

    def backend(self) -> tuple[Backend, str]:
        """The backend for the model where it is now, and why."""
        parts = self.parts
        weight = parts.decoder.get_input_embeddings().weight
        attention: Any = parts.decoder.layers[0].self_attn  # type: ignore[union-attr, index]
        windowed = any(window is not None for window in parts.windows)
        traits = traits_of(weight.device, weight.dtype, parts.config, int(attention.head_dim), windowed)
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

    def _compact(self, cache: ImdcCache, new_tokens: int) -> bool:
        """Whether memory is numbered 0..m-1: as asked, or where the prompt would pass the model's window."""
        if cache.compact is not None:
            return cache.compact
        if all(window is not None for window in self.parts.windows):
            return False
        if self.config.positions == "auto":
            return new_tokens > self.parts.trained_window
        return self.config.positions == "compact"

    def steps(self, prompt_tokens: int, stored: int, chunk: int | None) -> tuple[Step, ...]:
        """The steps of one row with `stored` KV pairs in its memory."""
        return build_steps(prompt_tokens, self.config, stored_tokens=stored, chunk_tokens=chunk)

    def _fitting_chunk(self, prompt_tokens: int, device: torch.device) -> int | None:
        """The chunk that `memory_limit` allows, where the config asks for "auto"."""
        if self.config.chunk_tokens != "auto":
            return None
        shape = ModelShape.from_model(self.parts.model)
        free = None
        if isinstance(self.config.memory_limit, float):
            free = _free_bytes(device) + shape.weights
        limit = limit_bytes(self.config, free)
        return fit_chunk(shape, prompt_tokens, self.config, limit, device=device.type)

    def _smaller_chunk(self, chunk: int | None, prompt_tokens: int, error: Exception) -> int:
        if chunk is None:
            chunk = max(step.chunk_tokens for step in self.steps(prompt_tokens, 0, None))
        if chunk // 2 < _LEAST_CHUNK:
            raise error
        warnings.warn(
            f"imdc: out of memory with chunks of {chunk} tokens; the prefill starts again with {chunk // 2}",
            RuntimeWarning,
            stacklevel=2,
        )
        return chunk // 2


def _free_bytes(device: torch.device) -> int:
    """What the device has free for a prefill."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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


class _Reader:
    """Reads rows; it holds what they share: the workspace and the reports."""

    def __init__(self, engine: Engine, backend: Backend, compact: bool, chunk: int | None) -> None:
        self.engine, self.backend, self.compact, self.chunk = engine, backend, compact, chunk
        self.parts, self.config = engine.parts, engine.config
        self.workspace = Workspace()
        self.observer = get_observer(engine.config.observer)
        self.reports: list[StepReport] = []
        self.finished_bytes = 0

    def read(self, row: Row, ids: Tensor, number: int, forward_options: dict[str, Any]) -> Any:
        """Read `ids` int64 [n] into `row`; returns the model's output for the last token."""
        full = [layer for layer, window in enumerate(self.parts.windows) if window is None]
        stored = row.stored(full[0]) if full else 0
        steps = self.engine.steps(ids.numel(), stored, self.chunk)
        tails = [self._tail_rows(step, ids.numel()) for step in steps]
        self._check_window(row, steps, tails)
        if self.compact and row.tokens:
            self._turn(row, -1.0, row.position)
        output: Any = None
        for step, tail in zip(steps, tails, strict=True):
            began = time.perf_counter()
            output = self._step(row, step, ids, tail, last=step is steps[-1], options=forward_options)
            row.tokens += step.chunk_tokens
            row.position = step.memory_after if self.compact else row.position + step.chunk_tokens
            self._report(row, step, len(steps), ids.numel(), number, time.perf_counter() - began)
        if self.compact:
            self._turn(row, 1.0, row.position)
        self.finished_bytes += row.nbytes()
        return output

    def _step(self, row: Row, step: Step, ids: Tensor, tail: int, *, last: bool, options: dict[str, Any]) -> Any:
        chunk = ids[step.start : step.start + step.chunk_tokens]
        if tail:
            chunk = torch.cat((chunk, ids[-tail:]))
        gap = self._tail_gap(step, ids.numel(), tail)
        if self.compact:
            positions = torch.zeros_like(chunk)
        else:
            positions = torch.arange(row.position, row.position + chunk.numel(), device=chunk.device)
            positions[chunk.numel() - tail :] += gap
        run = StepRun(
            self.parts,
            row,
            step,
            tail_rows=tail,
            tail_gap=gap,
            config=self.config,
            backend=self.backend,
            observer=self.observer,
            workspace=self.workspace,
            compact=self.compact,
        )
        inputs = {
            "input_ids": chunk[None],
            "position_ids": positions[None],
            "past_key_values": _PassingCache(),
            "use_cache": True,
        }
        with torch.no_grad(), installed(self.parts.config), running(run):
            if not last:
                self.parts.decoder(**inputs)
                return None
            return self.engine.forward(**{**options, **inputs, "logits_to_keep": 1, "return_dict": True})

    def _tail_rows(self, step: Step, prompt_tokens: int) -> int:
        """Prompt-tail rows that ride along: none where nothing is dropped, nor in the last chunk, which holds them."""
        drops = step.memory_after < step.memory_before + step.chunk_tokens
        is_last = step.start + step.chunk_tokens == prompt_tokens
        if self.config.observer != "prompt_tail" or not drops or is_last:
            return 0
        return min(self.config.observation_tokens, prompt_tokens)

    def _tail_gap(self, step: Step, prompt_tokens: int, tail: int) -> int:
        """Positions between the chunk and the tail rows that ride along: those of the tokens not read yet.

        Right behind the chunk, the tail would attend mostly to its last tokens, as text does to what precedes it, and
        the memory would fill with them. Compact positions have to stay within the model's window, and sliding-window
        layers only know near positions.
        """
        if any(window is not None for window in self.parts.windows):
            return 0
        unread = max(0, prompt_tokens - tail - step.start - step.chunk_tokens)
        if not self.compact:
            return unread
        return min(unread, self.parts.trained_window - step.memory_before - step.chunk_tokens - tail)

    def _check_window(self, row: Row, steps: tuple[Step, ...], tails: list[int]) -> None:
        window = self.parts.trained_window
        rope = getattr(self.parts.config, "rope_parameters", None) or {}
        if self.compact:
            widest = max(s.memory_before + s.chunk_tokens + t for s, t in zip(steps, tails, strict=True))
            if widest > window:
                raise UnsupportedCallError(
                    f"memory and chunk take {widest} positions, the model was trained for {window}; lower "
                    f"memory_tokens={self.config.memory_tokens} or chunk_tokens={self.config.chunk_tokens}"
                )
        elif rope.get("rope_type") in ("longrope", "dynamic") and row.position + steps[-1].start > window:
            raise UnsupportedCallError(
                f"positions='original' beyond {window} tokens changes the rotary base of rope_type="
                f"{rope['rope_type']!r} between chunks; use positions='compact'"
            )

    def _turn(self, row: Row, sign: float, end: int) -> None:
        """Rotate the stored keys of all layers to the positions before `end` (sign 1), or back to canonical (-1)."""
        for layer, keys in enumerate(row.keys):
            if keys is None:
                continue
            positions = torch.arange(end - keys.shape[2], end, device=keys.device)
            # transformers rotates in the model's dtype, and a memory that dropped nothing must equal its cache.
            dtype = keys.dtype if sign > 0 else torch.float32
            tables = self.parts.rotary(layer, positions, dtype)
            if tables is not None:
                row.keys[layer] = rotate(keys.to(dtype), tables[0], sign * tables[1]).to(keys.dtype)

    def _report(self, row: Row, step: Step, count: int, prompt_tokens: int, number: int, seconds: float) -> None:
        report = StepReport(
            row=number,
            index=step.index,
            step_count=count,
            prompt_tokens=prompt_tokens,
            tokens_read=step.start + step.chunk_tokens,
            chunk_tokens=step.chunk_tokens,
            memory_before=step.memory_before,
            memory_after=step.memory_after,
            seconds=seconds,
            kv_bytes=self.finished_bytes + row.nbytes(),
        )
        self.reports.append(report)
        if self.engine.on_step is not None:
            self.engine.on_step(report)
