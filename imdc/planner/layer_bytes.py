"""What is alive in each phase of a decoder layer: the tensors behind `imdc.planner.footprint`.

Written out is what transformers' modelling code and imdc's attention keep alive, with c chunk rows and t rows of the
prompt tail, r = c + t, T = memory_before + r, b bytes per element, H hidden, I intermediate, Q = Hq * D, K = Hkv * D:

    norm        r * (3 b H + 8 H)          embedding, layer input, residual; two float32 copies
    heads       r * b * (3 H + Q) + 8 r Q  query norm, in models that have one
    rotary      r * b * (3 H + 4 Q + 2 K)  queries, their two products, half-swapped copy or sum; keys, values
    attention   r * b * (3 H + Q + 2 K)    and what the backend needs, see `_attention`
    compression the same, output, and what one call that attends, scores and selects allocates, see `_compression`
    scoring     elsewhere: the same, output, log-sum-exp and what the observer needs, see `_scoring`
    selection   the same without rotated copies, and what selecting needs
    compaction  the same, scores and the kept indices
    output      r * b * (4 H + 3 Q + 2 K)  attention output, its copy in row order, the projection
    mlp         r * b * (4 H + 3 I)        embedding, layer input, residual, norm; gate, up, product
    head        r * (2 b H + 8 H), b V     the last step's final norm, one row of logits

Models whose norms follow instead of preceding have one H less. Mixtures of experts are predicted for
transformers' grouped matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from imdc.config import PrefillConfig
from imdc.kernels.limits import (
    StepSizes,
    attention_rows,
    compression_in_one_launch,
    fused_step_fits,
    rows_per_block,
    step_in_one_launch,
)
from imdc.model.backend_rule import ANY_MACHINE, KERNELS, Machine
from imdc.model.shape import ModelShape
from imdc.observers import Questions, find_observer
from imdc.schedule import Step, observing_rows


@dataclass(frozen=True, slots=True)
class Phase:
    """Bytes besides memory and workspace, by kind.

    `layer_memory` says which memory of the running layer exists: that from "before", "none" while the workspace alone
    holds it, or that from "after".
    """

    name: str
    activations: int
    attention: int = 0
    scoring: int = 0
    logits: int = 0
    layer_memory: str = "before"

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.activations + self.attention + self.scoring + self.logits


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers of one kind, and the KV pairs that each of them stores before and after the step."""

    count: int
    before: int
    after: int
    window: int | None


@dataclass(frozen=True, slots=True)
class Work:
    """What one step of a plan asks of a model; r, T and the rest as in the module's text.

    `seen_tokens` were read by earlier turns. `layers` are the KV pairs of each full-attention layer before and after,
    where these differ. `machine` is where it runs.
    """

    shape: ModelShape
    config: PrefillConfig
    step: Step
    tail: int
    last: bool
    backend: str
    compact: bool
    seen_tokens: int = 0
    layers: tuple[tuple[int, int], ...] = ()
    machine: Machine = ANY_MACHINE

    @property
    def rows(self) -> int:
        """Query rows r: the chunk and the prompt tail."""
        return self.step.chunk_tokens + self.tail

    @property
    def kinds(self) -> list[Layers]:
        """Full-attention layers, which follow the plan, and sliding-window layers, which keep window - 1 pairs."""
        shape, step = self.shape, self.step
        full = [Layers(shape.full_layers, step.memory_before, step.memory_after, None)]
        if self.layers:
            full = [Layers(1, before, after, None) for before, after in self.layers]
        limit = (shape.window or 1) - 1
        begin = self.seen_tokens + step.start
        end = begin + step.chunk_tokens
        sliding = Layers(shape.sliding_layers, min(begin, limit), min(end, limit), shape.window)
        return [layers for layers in (sliding, *full) if layers.count]

    @property
    def keys(self) -> int:
        """KV pairs in the workspace while the layer with the most of them runs."""
        return max(layers.before for layers in self.kinds) + self.rows

    @property
    def drops(self) -> bool:
        """Whether any KV pair goes."""
        return self.step.memory_after < self.step.attended_tokens

    @property
    def observing_rows(self) -> int:
        """Query rows that score keys, 0 where nothing is dropped or the observer asks no queries."""
        return (observing_rows(self.config, self.step.chunk_tokens, self.tail) or 0) if self.drops else 0

    @property
    def voting_rows(self) -> int:
        """Those of them that vote."""
        return -(-self.observing_rows // self.config.observation_stride)

    @property
    def in_one_call(self) -> bool:
        """Whether one call of the backend attends, scores and selects."""
        observer = find_observer(self.config.observer)
        # Several questions attend one after another, see `imdc.prefill.step`.
        apart = isinstance(observer, Questions) and len(observer.questions) > 1
        return self.backend in KERNELS and self.observing_rows > 0 and observer.is_mass and not apart


def phases(work: Work, layers: Layers) -> Iterator[Phase]:
    """The phases of one layer of that kind, and of what follows the layers."""
    shape, rows = work.shape, work.rows
    hidden = shape.hidden
    queries, keys = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    unit = rows * shape.dtype_bytes
    # Embedding, layer input, and the norm's output where a norm comes first.
    inputs = (3 - shape.post_norm) * hidden

    yield Phase("norm", unit * 3 * hidden + 8 * rows * hidden)
    if shape.qk_norm:
        yield Phase("heads", unit * (inputs + queries) + 8 * rows * queries)
    turned_unit = rows * 4 if shape.float_rotary else unit
    yield Phase("rotary", unit * (inputs + queries + 2 * keys) + turned_unit * 3 * queries)

    states = unit * (inputs + queries + 2 * keys + shape.fused * (queries + keys))
    turned, turning, own = _attention(work, layers)
    output = unit * queries
    candidates = layers.before + work.step.chunk_tokens
    evicts = layers.after < candidates and layers.window is None
    if evicts and work.in_one_call:
        yield Phase("attention", states, turning, layer_memory="none")
        yield Phase("compression", states, turned + output, _compression(work, layers), layer_memory="after")
        yield from _rest(work, states, inputs, None)
        return
    yield Phase("attention", states, max(turning, turned + own), layer_memory="none")
    scored = turned + output + 4 * rows * shape.q_heads
    chosen = 0
    if evicts:
        yield Phase("scoring", states, scored, _scoring(work, candidates), layer_memory="none")
        yield Phase("selection", states, output, _selection(work, candidates, layers.after), layer_memory="none")
        # Scores, and the kept indices: the reference's are a column of three.
        index = 8 if work.backend in KERNELS else 24
        chosen = shape.kv_heads * (4 * candidates + index * layers.after)
    yield from _rest(work, states, inputs, Phase("compaction", states, output, chosen, layer_memory="after"))


def _rest(work: Work, states: int, inputs: int, compaction: Phase | None) -> Iterator[Phase]:
    """The phases after attention; states as in the module's text, `inputs` elements per row."""
    shape, rows = work.shape, work.rows
    hidden, queries, unit = shape.hidden, shape.q_heads * shape.head_dim, rows * shape.dtype_bytes
    if compaction is not None:
        yield compaction
    yield Phase("output", states + unit * (hidden + queries), unit * queries, layer_memory="after")
    yield Phase("mlp", unit * (inputs + hidden + _mlp_widths(shape)), layer_memory="after")
    if work.last:
        logits = shape.vocab * shape.dtype_bytes
        yield Phase("head", unit * 2 * hidden + 8 * rows * hidden, logits=logits, layer_memory="after")


def _mlp_widths(shape: ModelShape) -> int:
    """Elements per token of the MLP's own tensors that are alive at once."""
    if shape.experts > 1:
        # Per routed copy of a token: its hidden state; gate and up in one, activation, product.
        return shape.experts_per_token * (shape.hidden + 4 * shape.intermediate)
    return (2 if not shape.gated else 4 if shape.fused else 3) * shape.intermediate


def _attention(work: Work, layers: Layers) -> tuple[int, int, int]:
    """Bytes of rotated copies, of the temporaries of rotating, and of what the backend needs, its output included.

    Those with this project's kernels need the output and the log-sum-exp only. "sdpa" attends to memory and chunk apart
    and merges: grouped queries, two outputs, their float32 sum where the dtype is shorter, log-sum-exps; through a
    window it repeats the keys and values of a block for every query head. "reference" works on one KV head in float32,
    in blocks of scores.
    """
    shape, rows, total = work.shape, work.rows, layers.before + work.rows
    queries, kv_width = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    unit, log_sums = rows * shape.dtype_bytes, 4 * rows * shape.q_heads
    turned = turning = 0
    if work.compact:
        keys = total * kv_width * shape.dtype_bytes
        turned = keys + unit * queries
        # PyTorch needs a product beside the result, of half the width.
        turning = turned if work.backend == "triton" else max(3 * keys // 2, keys + 3 * unit * queries // 2)
    most = unit * queries + log_sums
    if work.backend == "reference":
        most += 2 * _float_copy(shape, total) + _score_blocks(shape, rows, total)
    elif work.backend == "sdpa" and layers.window is not None and layers.window < total:
        block = min(rows, layers.window)
        span = min(total, block + layers.window - 1)
        most += (2 * span + block) * queries * shape.dtype_bytes + block * span * (2 + shape.dtype_bytes)
    elif work.backend == "sdpa" and layers.before:
        # Phi-3's queries, and those rotated here, are in the order in which they can be grouped without a copy.
        merged = (2 if shape.fused or work.compact else 3) * unit * queries
        shorter = 3 * log_sums + 4 * rows * queries + unit * queries
        most = merged + (4 * log_sums if shape.dtype_bytes == 4 else shorter)
    return turned, turning, most


def _scoring(work: Work, candidates: int) -> int:
    """Bytes of the observer's temporaries, scores included."""
    shape = work.shape
    total = candidates + work.tail
    observer = find_observer(work.config.observer)
    scratch = observer.scratch_bytes(candidates, shape.kv_heads, shape.head_dim)
    mass = 4 * shape.kv_heads * total
    if not work.observing_rows or work.backend in KERNELS:
        return max(scratch, 2 * mass) if scratch and not work.observing_rows else 2 * mass + scratch
    return scratch + mass + 4 * total + _float_copy(shape, total) + _score_blocks(shape, work.voting_rows, total)


def _compression(work: Work, layers: Layers) -> int:
    """Bytes of what `imdc.kernels.compress_step` allocates besides output and new memory: see there.

    Scores and indices; the log-sum-exp unless one launch does it all; ranks or pooled scores. Where the machine is not
    known, both of the latter.
    """
    shape, step, machine = work.shape, work.step, work.machine
    scores, pooled = 4 * shape.kv_heads * (layers.before + step.chunk_tokens), work.config.pool_kernel > 1
    log_sums = 4 * work.rows * shape.q_heads
    if machine.multiprocessors is not None:
        major = 0 if machine.capability is None else machine.capability[0]
        heads = (shape.q_heads, shape.kv_heads)
        sizes = StepSizes(
            *(1, *heads, work.rows, layers.before + work.rows, shape.head_dim, shape.dtype_bytes),
            observers=work.observing_rows,
            keep=layers.after,
            pool_kernel=work.config.pool_kernel,
        )
        chip = (major, machine.multiprocessors)
        fed = major == 0 or (shape.dtype_bytes == 2 and shape.head_dim % 16 == 0)
        fits = fed and (major == 0 or fused_step_fits(shape.head_dim, shape.dtype_bytes, major))
        fused = fits and work.backend == "triton" and work.config.observation_stride == 1
        if fused and step_in_one_launch(sizes, attention_rows(shape.head_dim, major), *chip):
            log_sums, pooled = 0, True
        else:
            pooled = pooled or (fed and compression_in_one_launch(sizes, *chip))
    else:
        pooled = True
    return log_sums + (2 if pooled else 1) * scores + 8 * shape.kv_heads * layers.after


def _selection(work: Work, candidates: int, kept: int) -> int:
    """Bytes of scores, their copy, masks, and either running counts of ties or the indices found."""
    if work.backend in KERNELS:
        return work.shape.kv_heads * (4 * candidates + 8 * kept)
    return work.shape.kv_heads * (11 * candidates + max(9 * candidates, 24 * kept))


def _float_copy(shape: ModelShape, keys: int) -> int:
    """Bytes of one KV head's keys in float32, where they are not in it already."""
    return 0 if shape.dtype_bytes == 4 else 4 * keys * shape.head_dim


def _score_blocks(shape: ModelShape, rows: int, keys: int) -> int:
    """Bytes of the reference kernels' score blocks: one is alive while the next is computed, under two masks."""
    group = shape.q_heads // shape.kv_heads
    block = rows_per_block(rows, group * keys)
    count = (1 if block == rows and shape.kv_heads == 1 else 2) + shape.softcap
    return block * keys * (4 * group * count + 2)
