"""Reads one prompt row: its steps in order, each in one pass through the decoder."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from imdc.cache.rows import Row
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.kernels.reference import rotate
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner.footprint import balanced_steps
from imdc.prefill.backends import Backend
from imdc.prefill.hook import installed, running
from imdc.prefill.observers import get_observer
from imdc.prefill.step import StepRun, Workspace
from imdc.report import StepReport
from imdc.schedule import Step, tail_rows, window_exceeded

OnStep = Callable[[StepReport], None]


class _PassingCache(Cache):
    """What the decoder sees as its cache during a step: it returns the chunk's own states; imdc does the rest."""

    def __init__(self) -> None:
        """It has no layers."""
        super().__init__(layers=[])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class Reader:
    """Reads rows; it holds what they share: the workspace and the reports."""

    def __init__(
        self,
        parts: Parts,
        config: PrefillConfig,
        forward: Callable[..., Any],
        *,
        backend: Backend,
        chunk: int,
        on_step: OnStep | None,
    ) -> None:
        """`forward` is the model's own; `chunk` replaces the config's chunk_tokens."""
        self.parts, self.config, self.forward = parts, config, forward
        self.backend, self.chunk, self.on_step = backend, chunk, on_step
        self.shape = ModelShape.from_model(parts.model) if config.levels_bytes else None
        self.workspace = Workspace()
        self.observer = get_observer(config.observer)
        self.reports: list[StepReport] = []
        self.finished_bytes = 0

    def read(self, row: Row, ids: Tensor, number: int, forward_options: dict[str, Any]) -> Any:
        """Read `ids` int64 [n] into `row`; returns the model's output for the last token."""
        full = self.parts.full_layers
        stored = row.stored(full[0]) if full else 0
        steps = balanced_steps(self.shape, ids.numel(), self.config, stored_tokens=stored, chunk_tokens=self.chunk)
        tails = tail_rows(steps, self.config, full_layers=len(full))
        self._check_window(row, steps, tails)
        if row.compact and row.tokens:
            self._turn(row, -1.0, row.position)
        output: Any = None
        for step, tail in zip(steps, tails, strict=True):
            began = time.perf_counter()
            run = self._run(row, step, ids.numel(), tail)
            output = self._step(run, ids, last=step is steps[-1], options=forward_options)
            retention = run.retention()
            row.tokens += step.chunk_tokens
            row.position = step.memory_after if row.compact else row.position + step.chunk_tokens
            self._report(row, step, len(steps), ids.numel(), number, time.perf_counter() - began, retention)
        if row.compact:
            self._turn(row, 1.0, row.position)
        self.finished_bytes += row.nbytes()
        return output

    def _run(self, row: Row, step: Step, prompt_tokens: int, tail: int) -> StepRun:
        return StepRun(
            self.parts,
            row,
            step,
            tail_rows=tail,
            tail_gap=self._tail_gap(row, step, prompt_tokens, tail),
            config=self.config,
            backend=self.backend,
            observer=self.observer,
            workspace=self.workspace,
            compact=row.compact,
        )

    def _step(self, run: StepRun, ids: Tensor, *, last: bool, options: dict[str, Any]) -> Any:
        step, tail, start = run.step, run.tail_rows, run.row.position
        chunk = ids[step.start : step.start + step.chunk_tokens]
        if tail:
            chunk = torch.cat((chunk, ids[-tail:]))
        if run.compact:
            positions = torch.zeros_like(chunk)
        else:
            positions = torch.arange(start, start + chunk.numel(), device=chunk.device)
            positions[chunk.numel() - tail :] += run.tail_gap
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
            return self.forward(**{**options, **inputs, "logits_to_keep": 1, "return_dict": True})

    def _tail_gap(self, row: Row, step: Step, prompt_tokens: int, tail: int) -> int:
        """Positions between the chunk and the tail rows that ride along: those of the tokens not read yet.

        Right behind the chunk, the tail would attend mostly to its last tokens, as text does to what precedes it, and
        the memory would fill with them. Compact positions have to stay within the model's window, and sliding-window
        layers only know near positions.
        """
        if any(window is not None for window in self.parts.windows):
            return 0
        unread = max(0, prompt_tokens - tail - step.start - step.chunk_tokens)
        if not row.compact:
            return unread
        return min(unread, self.parts.trained_window - step.memory_before - step.chunk_tokens - tail)

    def _check_window(self, row: Row, steps: tuple[Step, ...], tails: list[int]) -> None:
        window = self.parts.trained_window
        rope = getattr(self.parts.config, "rope_parameters", None) or {}
        if row.compact:
            widest = window_exceeded(steps, tails, window)
            if widest is not None:
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

    def _report(
        self,
        row: Row,
        step: Step,
        count: int,
        prompt_tokens: int,
        number: int,
        seconds: float,
        retention: tuple[float | None, ...],
    ) -> None:
        report = StepReport(
            row=number,
            step=step,
            step_count=count,
            prompt_tokens=prompt_tokens,
            seconds=seconds,
            kv_bytes=self.finished_bytes + row.nbytes(),
            retention=retention,
        )
        self.reports.append(report)
        if self.on_step is not None:
            self.on_step(report)
