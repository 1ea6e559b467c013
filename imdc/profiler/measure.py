"""Measure what a prefill really takes, step by step and layer by layer, and hold it against the prediction.

Bytes are those alive above what was alive before the prefill: the weights do not count. On CUDA they are the caching
allocator's own statistics. On the CPU a dispatch mode counts every tensor that an operator returns, exactly, but not
what an operator allocates and frees inside itself; the process's resident memory stands beside it. Counting costs
time on the CPU, some ten microseconds per operator, which the seconds of a step include.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from imdc.config import UNPATCHED, PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.model import hf
from imdc.model.backend_rule import AttentionTraits
from imdc.model.machine import machine_of
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.footprint import StepFootprint, predict, predict_unpatched
from imdc.prefill.patch import patch
from imdc.profiler.allocations import (
    Allocations,
    allocations_of,
    make_resident,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
    return_free_heap,
)
from imdc.report import OfStep, StepReport
from imdc.schedule import Step


@dataclass(frozen=True, slots=True)
class MeasuredStep(OfStep):
    """One step: what was read and kept, and the bytes above those before the prefill.

    Attributes:
        step: chunk and memory, as planned.
        peak_bytes: highest number of bytes alive.
        held_bytes: bytes alive when the step ended: memory, and the workspace for the next one.
        kv_bytes: bytes of the memory of all layers when the step ended.
        layer_peaks: the peak inside each decoder layer; what comes before the first counts to it.
        retention: per layer the share of its memory that survived, see `imdc.report.StepReport`.
        predicted: what `imdc.planner.footprint` says.
        reserved_bytes: peak of what CUDA's caching allocator holds in all; None on the CPU.
        resident_bytes: peak of the process's resident memory above that before the prefill; None where unknown.
        seconds: wall-clock time.
    """

    step: Step
    peak_bytes: int
    held_bytes: int
    kv_bytes: int
    layer_peaks: tuple[int, ...]
    retention: tuple[float | None, ...]
    predicted: StepFootprint
    reserved_bytes: int | None
    resident_bytes: int | None
    seconds: float

    @property
    def error(self) -> float:
        """Predicted over measured peak, minus one."""
        return self.predicted.above_weights / self.peak_bytes - 1.0


@dataclass(frozen=True, slots=True)
class MeasuredPrefill:
    """One prefill, measured.

    Attributes:
        name: the schedule, or "unpatched" for the model's own prefill.
        prompt_tokens: tokens read.
        backend: the backend that computed.
        config: the options; None for the unpatched model.
        weight_bytes: bytes of the model's parameters and buffers.
        steps: the steps in order.
    """

    name: str
    prompt_tokens: int
    backend: str
    config: PrefillConfig | None
    weight_bytes: int
    steps: tuple[MeasuredStep, ...]

    @property
    def peak_bytes(self) -> int:
        """Highest number of bytes alive above the weights."""
        return max(step.peak_bytes for step in self.steps)

    @property
    def predicted_bytes(self) -> int:
        """The predicted peak above the weights."""
        return max(step.predicted.above_weights for step in self.steps)

    @property
    def resident_bytes(self) -> int | None:
        """Peak of the process's resident memory above that before the prefill."""
        return max((step.resident_bytes for step in self.steps if step.resident_bytes is not None), default=None)

    @property
    def reserved_bytes(self) -> int | None:
        """Peak of what CUDA's caching allocator holds in all."""
        return max((step.reserved_bytes for step in self.steps if step.reserved_bytes is not None), default=None)

    @property
    def error(self) -> float:
        """Predicted over measured peak, minus one."""
        return self.predicted_bytes / self.peak_bytes - 1.0

    @property
    def seconds(self) -> float:
        """Wall-clock time of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def tokens_per_second(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; sizes in bytes."""
        values = {**asdict(self), "peak_bytes": self.peak_bytes, "predicted_bytes": self.predicted_bytes}
        totals = {
            "error": self.error,
            "resident_bytes": self.resident_bytes,
            "reserved_bytes": self.reserved_bytes,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return {**values, **totals}


def measure(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: PrefillConfig,
    *,
    on_step: Callable[[StepReport], None] | None = None,
) -> MeasuredPrefill:
    """Prefill `input_ids` int64 [1, N] of a model that is not patched, and measure every step.

    Args:
        model: a model that `imdc.patch` supports; it is patched meanwhile and left as it was.
        input_ids: one prompt row; rows are prefilled one after another anyway.
        config: the options.
        on_step: called after every step, with the engine's own report of it.

    Raises:
        UnsupportedCallError: more than one row, or an empty prompt.
    """
    _check(input_ids)
    meter = _Meter(model)
    reports: list[StepReport] = []
    measured: list[dict[str, Any]] = []

    def after_step(report: StepReport) -> None:
        if report.index < len(reports):
            # The prefill ran out of memory and began again with smaller chunks.
            reports.clear()
            measured.clear()
        reports.append(report)
        measured.append({"kv_bytes": report.kv_bytes, "retention": report.retention, **meter.take()})
        if on_step is not None:
            on_step(report)

    with patch(model, config, on_step=after_step) as handle, meter:
        cache = handle.new_cache()
        model(input_ids, logits_to_keep=1, **{hf.CACHE_NAME: cache})
    assert handle.report is not None, "the prefill has run"
    steps = [report.step for report in reports]
    shape = ModelShape.from_model(model)
    machine = machine_of(meter.device, AttentionTraits.of(shape, meter.device.type))
    chosen: dict[str, Any] = {"backend": handle.report.backend, "compact": bool(cache.compact), "machine": machine}
    predicted = predict(shape, config, steps, **chosen)
    return MeasuredPrefill(
        name=config.schedule,
        prompt_tokens=input_ids.shape[1],
        backend=handle.report.backend,
        config=config,
        weight_bytes=shape.weights,
        steps=tuple(
            MeasuredStep(step=step, predicted=footprint, **values)
            for step, footprint, values in zip(steps, predicted, measured, strict=True)
        ),
    )


def measure_unpatched(model: PreTrainedModel, input_ids: Tensor) -> MeasuredPrefill:
    """The model's own prefill of `input_ids` int64 [1, N] in one step, with its own attention, measured alike."""
    _check(input_ids)
    meter = _Meter(model)
    with torch.no_grad(), meter:
        output = model(input_ids, use_cache=True, logits_to_keep=1)
        values = meter.take()
        del output
    shape = ModelShape.from_model(model)
    tokens = input_ids.shape[1]
    values |= {"kv_bytes": predict_unpatched(shape, Batch(tokens)).memory, "retention": ()}
    step = MeasuredStep(step=Step(0, 0, tokens, 0, tokens), predicted=predict_unpatched(shape, Batch(tokens)), **values)
    layers: Any = meter.layers
    own, *_ = hf.attention_implementations(layer.self_attn for layer in layers)
    return MeasuredPrefill(UNPATCHED, tokens, own, None, shape.weights, (step,))


def _check(input_ids: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise UnsupportedCallError(f"input_ids has shape {tuple(input_ids.shape)}; pass one row [1, N] with N >= 1")


class _Meter:
    """Reads the allocation counter at the end of every layer and step."""

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = Parts.of(model).decoder
        self.device: torch.device = decoder.get_input_embeddings().weight.device
        self.layers: nn.ModuleList = decoder.layers
        self.counter: Allocations = allocations_of(self.device)
        make_resident(model)
        self._layer_peaks: list[int] = []
        self._resident = 0
        self._began = 0.0

    def __enter__(self) -> _Meter:
        self._hooks = [layer.register_forward_hook(self._after_layer) for layer in self.layers]
        return_free_heap()
        self._resident = resident_bytes() or 0
        reset_peak_resident()
        self.counter.__enter__()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        self.counter.__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _after_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._layer_peaks.append(self.counter.take_peak())

    def take(self) -> dict[str, Any]:
        """What happened since the last call: the fields of `MeasuredStep` that are measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        rest = self.counter.take_peak()
        resident = peak_resident_bytes()
        values = {
            # A step that failed and was repeated leaves more layers behind than there are.
            "layer_peaks": tuple(self._layer_peaks[-len(self.layers) :]),
            "peak_bytes": max([rest, *self._layer_peaks[-len(self.layers) :]]),
            "held_bytes": self.counter.current(),
            "reserved_bytes": self.counter.reserved(),
            "resident_bytes": None if resident is None else resident - self._resident,
            "seconds": now - self._began,
        }
        self._layer_peaks.clear()
        reset_peak_resident()
        self._began = time.perf_counter()
        return values


@contextmanager
def cuda_snapshot(path: str) -> Iterator[None]:
    """Record every CUDA allocation in the block and write PyTorch's memory snapshot for its viewer to `path`.

    https://pytorch.org/memory_viz opens the file.

    Raises:
        UnsupportedCallError: there is no CUDA device, whose allocator alone records them.
    """
    if not torch.cuda.is_available():
        raise UnsupportedCallError("a memory snapshot needs a CUDA device: only its allocator records allocations")
    memory: Any = torch.cuda.memory
    memory._record_memory_history()
    try:
        yield
        memory._dump_snapshot(path)
    finally:
        memory._record_memory_history(enabled=None)
