"""plan(): the steps of a prefill, what each takes in memory, and whether it fits, without running anything."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

from imdc.config import PrefillConfig, resolve_config
from imdc.errors import ConfigError
from imdc.layer_budgets import planned_layers, shares_in_words
from imdc.model.backend_rule import ANY_MACHINE, KERNELS, AttentionTraits, Machine
from imdc.model.config_file import read_config
from imdc.model.families import FAMILIES, IMAGE_READERS
from imdc.model.shape import ModelShape
from imdc.planner.allocator import allocator_notes
from imdc.planner.asking import asked
from imdc.planner.batch import Batch, Kept
from imdc.planner.fit import compact_misfit, execution, fit_chunk, foresee, limit_bytes, with_chunk
from imdc.planner.footprint import StepFootprint, predict_unpatched
from imdc.planner.gpus import Gpu
from imdc.planner.model_notes import model_notes
from imdc.planner.recalling import host_bytes, host_notes, moved_bytes, renewal_moved_bytes
from imdc.positions import fitted
from imdc.report import OfStep
from imdc.schedule import Step
from imdc.units import ends_of, format_bytes, format_tokens

__all__ = ["Plan", "PlannedStep", "plan", "plan_shape"]

_SHOWN_STEPS = 24


@dataclass(frozen=True, slots=True)
class PlannedStep(OfStep):
    """One step of a plan, and the predicted footprint."""

    step: Step
    footprint: StepFootprint

    @property
    def predicted_bytes(self) -> int:
        """Bytes at the step's peak, weights included."""
        return self.footprint.total_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """How a prompt will be read, and what that takes. `str()` of it is a table.

    Attributes:
        batch: what is read: prompts, rows, and the answer that follows.
        config: the options with the sizes in force: chunk_tokens is a number, also where "auto" was asked for, and
            what was left out fits the model's window.
        shape: the model.
        steps: the steps in order, of the last row where there are several.
        after: the footprints of what follows: the rows become one cache, and the answer is written.
        backend: the backend whose temporaries are counted.
        compact: whether the memory is numbered anew at every step.
        unpatched: the footprint of the model's own prefill of the same prompt.
    """

    batch: Batch
    config: PrefillConfig
    shape: ModelShape
    steps: tuple[PlannedStep, ...]
    after: tuple[StepFootprint, ...]
    backend: str
    compact: bool
    unpatched: StepFootprint

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, per row."""
        return self.batch.prompt_tokens

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak of the whole prefill and of the answer, weights included."""
        return self.peak.total_bytes

    @property
    def peak(self) -> StepFootprint:
        """The footprint of what takes most: a step, the stacking of rows, or the decoding."""
        footprints = (*(step.footprint for step in self.steps), *self.after)
        return max(footprints, key=lambda footprint: footprint.total_bytes)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the cache that the prefill leaves behind, all rows."""
        return self.batch.copies * Kept.after(self.shape, self.batch, self.steps[-1].memory_after).row_bytes

    @property
    def flops(self) -> int:
        """Floating-point operations of all steps of all rows."""
        return self.batch.rows * sum(step.footprint.flops for step in self.steps)

    @property
    def question_moved_bytes(self) -> int:
        """Bytes that the question reads of the store; 0 without recall."""
        return moved_bytes(self.shape, self.config, self.batch, self._held[-1], self.compact)

    @property
    def renewal_moved_bytes(self) -> int:
        """Bytes that its answer reads of the store each time when it takes its pairs back anew; 0 where it does not."""
        return renewal_moved_bytes(self.shape, self.config, self.batch, self._held[-1])

    @property
    def _held(self) -> list[tuple[int, ...]]:
        """KV pairs that each compressed layer holds before the first step, and after each."""
        return planned_layers(self.config, self.shape.full_layers, [one.step for one in self.steps])

    def least_seconds(self, gpu: Gpu) -> float:
        """Time on `gpu` below which the prefill cannot be: every step's arithmetic or traffic at the peak rates."""
        footprints = [step.footprint for step in self.steps]
        return self.batch.rows * sum(gpu.least_seconds(one.flops, one.moved_bytes) for one in footprints)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers and strings, for JSON; sizes in bytes."""
        steps = [
            {**asdict(one.step), "footprint": asdict(one.footprint), "predicted_bytes": one.predicted_bytes}
            for one in self.steps
        ]
        return {
            "prompt_tokens": self.prompt_tokens,
            "rows": self.batch.rows,
            "new_tokens": self.batch.new_tokens,
            "config": self.config.as_dict(),
            "model": asdict(self.shape),
            "backend": self.backend,
            "compact": self.compact,
            "weight_bytes": self.shape.weights,
            "peak_bytes": self.peak_bytes,
            "memory_bytes": self.memory_bytes,
            "host_bytes": host_bytes(self.shape, self.batch, self.config),
            "question_tokens": self.batch.question_tokens,
            "question_moved_bytes": self.question_moved_bytes,
            "renewal_moved_bytes": self.renewal_moved_bytes,
            "unpatched_peak_bytes": self.unpatched.total_bytes,
            "flops": self.flops,
            "notes": self.notes(),
            "steps": steps,
            "after": [{**asdict(one), "predicted_bytes": one.total_bytes} for one in self.after],
        }

    def __str__(self) -> str:
        """The steps as a table, with the peak and the comparison below it."""
        shown = ends_of(self.steps, _SHOWN_STEPS)
        rows = [[_cell(value) for value in _row(None if end is None else end[1])] for end in shown]
        table = [list(_COLUMNS), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        return "\n".join([self.title(), *lines, *self.summary()])

    def title(self) -> str:
        """One line: model, prompt and schedule."""
        config, shape = self.config, self.shape
        memory = "all" if config.schedule == "full" else format_tokens(config.memory_tokens)
        rows, tokens = f"{self.batch.rows} rows of " if self.batch.rows > 1 else "", format_tokens(self.prompt_tokens)
        return (
            f"{shape.family}, {shape.layers} layers, {shape.dtype}: {rows}{tokens} tokens by "
            f"{config.schedule!r} in {len(self.steps)} step{'s' * (len(self.steps) > 1)}, memory {memory}, "
            f"mean chunk {format_tokens(round(self.prompt_tokens / len(self.steps)))}"
        )

    def summary(self) -> list[str]:
        """The lines below the table."""
        peak, shape, rows = self.peak, self.shape, self.batch.rows
        others = f", other rows and generate() {format_bytes(peak.others)}" if peak.others else ""
        place = f" while {peak.phase}" if peak in self.after else ""
        return [
            f"peak {format_bytes(peak.total_bytes)}{place}: weights {format_bytes(peak.weights)}, memory "
            f"{format_bytes(peak.memory)}, workspace {format_bytes(peak.workspace)}, activations "
            f"{format_bytes(peak.activations + peak.attention + peak.scoring + peak.logits)}{others}",
            f"cache after the prefill {format_bytes(self.memory_bytes)}, of the whole prompt{'s' * (rows > 1)} "
            f"{format_bytes(rows * shape.layers * shape.kv_bytes_per_token * self.prompt_tokens)}",
            f"the unpatched model's own prefill: peak {format_bytes(self.unpatched.total_bytes)}"
            f"{', where a kernel fuses its attention' * (shape.softcap or shape.sinks)}",
            *self.notes(),
        ]

    def notes(self) -> list[str]:
        """What a reader of the numbers has to know of this model; often nothing."""
        shape, moved = self.shape, (self.question_moved_bytes, self.renewal_moved_bytes)
        notes = host_notes(shape, self.batch, self.config, *moved)
        whole = shape.text_part_of
        if shape.family not in FAMILIES or whole not in (None, *IMAGE_READERS):
            unknown = whole if shape.family in FAMILIES else shape.family
            notes.append(f"note: imdc.patch does not support {unknown!r}; this is what it would take if it did")
        steps = [step.step for step in self.steps]
        problem = compact_misfit(shape, self.config, steps, self.batch.new_tokens) if self.compact else None
        if problem is not None:
            notes.append(f"note: imdc.patch will refuse this: {problem}")
        notes += [f"note: {shared}" for shared in shares_in_words(self.config, shape.full_layers, steps)]
        if self.backend in KERNELS:
            notes += allocator_notes(shape, self._held)
        return [*notes, *model_notes(shape)]


_COLUMNS = ("step", "from token", "chunk", "memory before", "after", "predicted peak")


def _row(step: PlannedStep | None) -> tuple[int | str, ...]:
    if step is None:
        return ("..",) * len(_COLUMNS)
    sizes = (step.index, step.start, step.chunk_tokens, step.memory_before, step.memory_after)
    return *sizes, format_bytes(step.predicted_bytes)


def _cell(value: int | str) -> str:
    return format_tokens(value) if isinstance(value, int) else value


def plan(
    model_or_config: Any,
    prompt_tokens: int,
    config: PrefillConfig | None = None,
    *,
    rows: int = 1,
    new_tokens: int = 0,
    question_tokens: int = 0,
    device: str | None = None,
    device_bytes: int | None = None,
    **options: Any,
) -> Plan:
    """How a prompt of that length will be read by `imdc.patch` with the same options.

    Args:
        model_or_config: a model, its transformers config, a `ModelShape`, or where a config is: a folder, a
            config.json, a .gguf file or a hub id.
        prompt_tokens: tokens of the prompt, of the longest row.
        config: the options, or None for the defaults.
        rows: different prompts in one batch.
        new_tokens: tokens that `generate()` writes afterwards; 0 is a prefill by hand, without `generate()`.
        question_tokens: of a question that `handle.ask()` will put to the document, and `new_tokens` answer; 0 is
            none, or with recall one of 64 tokens.
        device: "cuda" or "cpu", for the backend that "auto" takes there; None means where the model is, and "cuda"
            for a config.
        device_bytes: what the device has for weights and prefill together; `memory_limit` may be a share of it.
        options: fields of `PrefillConfig`, instead of or on top of `config`.

    Raises:
        ConfigError: an option, `rows` or `new_tokens` does not work, no config is there, or nothing fits
            `memory_limit`.
        UnsupportedModelError: the config lacks a size that the plan needs.
    """
    chosen = resolve_config(config, **options)
    shape, place, machine = _shape_of(model_or_config)
    machine = machine if device in (None, place) else ANY_MACHINE
    batch = Batch(prompt_tokens, rows, new_tokens=new_tokens, question_tokens=question_tokens)
    place = device or place or "cuda"
    return plan_shape(shape, batch, chosen, device=place, device_bytes=device_bytes, machine=machine)


def _shape_of(source: Any) -> tuple[ModelShape, str | None, Machine]:
    """(sizes, kind of device, machine); a config is planned for a machine that has what is asked for."""
    if isinstance(source, ModelShape):
        return source, None, ANY_MACHINE
    if isinstance(source, str | os.PathLike):
        source = read_config(source)
    if not any(hasattr(source, name) for name in ("model_type", "text_config", "config")):
        raise ConfigError(f"model_or_config = {source!r}: must be a model, its config, or where that is")
    if hasattr(source, "parameters") and hasattr(source, "config"):
        from imdc.model.machine import machine_of

        shape, device = ModelShape.from_model(source), source.device
        return shape, str(device.type), machine_of(device, AttentionTraits.of(shape, device.type))
    return ModelShape.from_config(source), None, ANY_MACHINE


def plan_shape(
    shape: ModelShape,
    batch: Batch,
    config: PrefillConfig,
    *,
    device: str = "cuda",
    device_bytes: int | None = None,
    machine: Machine = ANY_MACHINE,
) -> Plan:
    """`plan` for a shape, a batch and a complete config; `machine` as in `imdc.planner.fit.execution`."""
    batch = asked(batch, config)
    backend, compact = execution(shape, batch, config, device, machine)
    config = fitted(config, shape.max_positions) if compact else config
    if config.chunk_tokens == "auto":
        limit = limit_bytes(config, device_bytes)
        chunk = fit_chunk(shape, batch, replace(config, backend=backend), limit, device=device)
        config = with_chunk(config, chunk)
    steps, footprints, after = foresee(shape, batch, config, (backend, compact), machine)
    return Plan(
        batch=batch,
        config=config,
        shape=shape,
        steps=tuple(PlannedStep(step, footprint) for step, footprint in zip(steps, footprints, strict=True)),
        after=after,
        backend=backend,
        compact=compact,
        unpatched=predict_unpatched(shape, batch),
    )
