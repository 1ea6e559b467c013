"""Reads prompt rows one after another: the steps of each in order, each step in one pass through the decoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imdc.cache.rows import Row
from imdc.config import PrefillConfig
from imdc.model import hf
from imdc.model.parts import Parts
from imdc.observers import find_observer
from imdc.prefill.backends import Backend
from imdc.prefill.hook import running
from imdc.prefill.logits import WantedLogits
from imdc.prefill.reading import RowReading, Tools
from imdc.prefill.recording import ProbeResult, Recorder
from imdc.prefill.renumber import turned
from imdc.prefill.step import StepRun
from imdc.prefill.turn import RowTurn
from imdc.report import StepReport
from imdc.schedule import Step

OnStep = Callable[[StepReport], None]


@dataclass(frozen=True, slots=True)
class RowsRead:
    """Rows that were read.

    Attributes:
        turns: what was read; their rows are the memory now.
        outputs: of the model, of each row, with logits [1, n, V] of its last tokens.
        backend: who attended.
        reports: of all steps.
        recorded: of each row, where it was asked for.
        recalled_bytes: read of the store.
        recall_seconds: how long that took.
        restarts: how often an out-of-memory step began all rows again with a smaller chunk.
    """

    turns: list[RowTurn]
    outputs: list[Any]
    backend: str
    reports: tuple[StepReport, ...]
    recorded: tuple[ProbeResult, ...]
    recalled_bytes: int
    recall_seconds: float
    restarts: int = 0


class _PassingCache(hf.Cache):
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
        on_step: OnStep | None,
        probed: bool,
    ) -> None:
        """`forward` is the model's own; `probed` is whether to record what becomes of the memory."""
        self._parts, self._forward, self._on_step = parts, forward, on_step
        self._tools = Tools(parts, backend, find_observer(config.observer))
        self._reports: list[StepReport] = []
        self._recorded: list[ProbeResult] | None = [] if probed else None
        self._finished_bytes = self._recalled_bytes = 0
        self._recall_seconds = 0.0

    def read_all(self, turns: list[RowTurn], wanted: WantedLogits, forward_options: dict[str, Any]) -> RowsRead:
        """Read rows as `turns` say, and give logits of as many last tokens of each as are `wanted`."""
        device = self._parts.device()
        outputs = [
            self._read(turn, turn.ids.to(device), number, forward_options, keep=wanted.keep(number))
            for number, turn in enumerate(turns)
        ]
        return RowsRead(
            turns=turns,
            outputs=outputs,
            backend=self._tools.backend.name,
            reports=tuple(self._reports),
            recorded=tuple(self._recorded or ()),
            recalled_bytes=self._recalled_bytes,
            recall_seconds=self._recall_seconds,
        )

    def _read(self, turn: RowTurn, ids: Tensor, number: int, forward_options: dict[str, Any], *, keep: int) -> Any:
        """Read `ids` int64 [n] as `turn` says; returns the output with logits [1, keep, V] of the last tokens."""
        row, steps, tokens = turn.row, turn.steps, ids.numel()
        recorder = None if self._recorded is None else Recorder(turn, self._parts, number)
        reading = RowReading.of(turn, self._tools, recorder)
        if row.compact and row.tokens and not reading.rotated:
            full, recall = self._parts.full_layers, reading.recall
            replaced = [layer for layer in full if recall is not None and recall.replaces(row.stored(layer))]
            self._turn(row, row.position, back=True, leave_out=replaced)
        output: Any = None
        logits: list[Tensor] = []
        for step, tail in zip(steps, turn.tails, strict=True):
            began = time.perf_counter()
            run = StepRun(self._tools, reading, step, tail_rows=tail, tail_gap=self._tail_gap(turn, step, tokens, tail))
            chunk = ids[step.start : step.start + step.chunk_tokens]
            if tail:
                chunk = torch.cat((chunk, turn.tail_ids[-tail:].to(chunk.device)))
            wanted = min(step.chunk_tokens, step.start + step.chunk_tokens - max(0, tokens - keep))
            output = self._step(run, chunk, wanted=wanted, options=forward_options)
            if output is not None:
                logits.append(output.logits)
            retention = run.retention()
            reading.retention.add(retention)
            if recorder is not None:
                recorder.end_step(step)
            row.tokens += step.chunk_tokens
            row.position = run.fullest_after if row.compact else row.position + step.chunk_tokens
            self._report(row, step, len(steps), tokens, number, time.perf_counter() - began, retention)
        if row.compact and not reading.rotated:
            self._turn(row, row.position)
        if self._recorded is not None and recorder is not None:
            self._recorded.append(recorder.result())
        if reading.store is not None:
            reading.store.finish()
        if reading.recall is not None:
            self._recalled_bytes += reading.recall.moved_bytes
            self._recall_seconds += reading.recall.seconds
            row.taken = reading.recall.taken
        self._finished_bytes += row.nbytes()
        output.logits = torch.cat(logits, dim=1) if len(logits) > 1 else logits[0]
        return output

    def _step(self, run: StepRun, chunk: Tensor, *, wanted: int, options: dict[str, Any]) -> Any:
        """Pass `chunk` int64 [n], tail rows included, through the decoder.

        Returns:
            The model's output with logits of the last `wanted` tokens before the tail rows; None where that is < 1.
        """
        tail, start = run.tail_rows, run.row.position
        if run.row.compact:
            positions = torch.zeros_like(chunk)
        else:
            positions = torch.arange(start, start + chunk.numel(), device=chunk.device)
            positions[chunk.numel() - tail :] = run.tail_positions(start + chunk.numel() - tail, chunk.device)
        inputs = {
            "input_ids": chunk[None],
            "position_ids": positions[None],
            hf.cache_argument(type(self._parts.model).forward): _PassingCache(),
            "use_cache": True,
            **hf.silenced(self._parts.config),
        }
        with torch.no_grad(), running(run):
            if wanted < 1:
                self._parts.decoder(**inputs)
                return None
            end = chunk.numel() - tail
            rows: Any = torch.arange(end - wanted, end, device=chunk.device) if tail else wanted
            return self._forward(**{**options, **inputs, "logits_to_keep": rows, "return_dict": True})

    def _tail_gap(self, turn: RowTurn, step: Step, prompt_tokens: int, tail: int) -> int:
        """Positions between the chunk and the tail rows that ride along: those of the tokens not read yet.

        Right behind the chunk, the tail would attend mostly to its last tokens, as text does to what precedes it, and
        the memory would fill with them. Compact positions have to stay within the model's window, and sliding-window
        layers only know near positions.
        """
        if any(window is not None for window in self._parts.windows):
            return 0
        # The prompt's tail is a part of what is unread, questions follow it.
        unread = max(0, prompt_tokens - (0 if turn.questions else tail) - step.start - step.chunk_tokens)
        if not turn.row.compact:
            return unread
        fullest = max(turn.row.stored(layer) for layer in self._parts.full_layers)
        span = max(turn.questions, default=tail)
        return min(unread, self._parts.trained_window - fullest - step.chunk_tokens - span)

    def _turn(self, row: Row, end: int, *, back: bool = False, leave_out: Sequence[int] = ()) -> None:
        """Rotate the canonical keys of all layers to the positions before `end`, or take that back."""
        for layer, keys in enumerate(row.keys):
            if keys is None or layer in leave_out:
                continue
            row.keys[layer] = turned(self._parts, layer, keys, end, back=back)

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
            kv_bytes=self._finished_bytes + row.nbytes(),
            retention=retention,
        )
        self._reports.append(report)
        if self._on_step is not None:
            self._on_step(report)
