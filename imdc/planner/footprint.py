"""Predicted bytes and FLOPs of every step, from the sizes of the model alone.

A step's peak is the largest of the phases that `imdc.planner.layer_bytes` lists. To them come the memory of all layers
(2 b K m per layer; m is memory_after for layers that are done), the workspace 2 b K T that all layers share and that
keeps the largest T so far, token ids, positions and rotary tables, and what `imdc.planner.batch` lists. Not predicted:
what an operator allocates inside itself, a CUDA context, and the blocks that a caching allocator holds but does not
use.

FLOPs count two per multiply-add of every matrix product; `moved_bytes` is what must cross the memory bus at least:
the layers' weights once per step, the memory read and written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from imdc.config import PrefillConfig
from imdc.layer_budgets import planned_layers
from imdc.model.backend_rule import ANY_MACHINE, Machine
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch, Kept, decoding_bytes, stacking_bytes, waiting_bytes
from imdc.planner.layer_bytes import phases
from imdc.planner.recalling import sending_bytes
from imdc.planner.work import Layers, Phase, Work
from imdc.schedule import MemoryCost, Step, build_steps, tail_rows


@dataclass(frozen=True, slots=True)
class StepFootprint:
    """Bytes alive at the peak of one step, by kind, and what the step computes and moves.

    `phase` names where in a layer the peak is; see the module's text. `others` are bytes of other rows, earlier turns
    and `generate()` itself.
    """

    phase: str
    weights: int
    memory: int
    workspace: int = 0
    activations: int = 0
    attention: int = 0
    scoring: int = 0
    logits: int = 0
    flops: int = 0
    moved_bytes: int = 0
    others: int = 0

    @property
    def above_weights(self) -> int:
        """Bytes besides the weights."""
        working = self.activations + self.attention + self.scoring + self.logits
        return self.memory + self.workspace + working + self.others

    @property
    def total_bytes(self) -> int:
        """All bytes."""
        return self.weights + self.above_weights


def predict(
    shape: ModelShape,
    config: PrefillConfig,
    steps: Sequence[Step],
    *,
    backend: str = "triton",
    compact: bool = False,
    batch: Batch | None = None,
    machine: Machine = ANY_MACHINE,
) -> tuple[StepFootprint, ...]:
    """The footprint of every step of a prefill of one prompt row, the last one of a batch.

    Args:
        shape: the model.
        config: the options; its schedule has been turned into `steps` already.
        steps: the steps in order, as `build_steps` gives them.
        backend: "triton", "flash", "varlen", "sdpa" or "reference": which temporaries attention and scoring need.
        compact: the memory is numbered anew at every step, which takes rotated copies of the keys.
        batch: what surrounds that row; None is one prompt, read by hand into an empty cache.
        machine: where it runs; how a step is launched depends on it.
    """
    footprints, workspace_keys = [], 0
    batch = batch or Batch(sum(step.chunk_tokens for step in steps))
    held = planned_layers(config, shape.full_layers, steps)
    waiting = waiting_bytes(shape, batch, Kept.after(shape, batch, steps[-1].memory_after, max(held[-1], default=0)))
    tails = tail_rows(steps, config, full_layers=shape.full_layers)
    for step, tail, before, after in zip(steps, tails, held, held[1:], strict=False):
        layers = tuple(zip(before, after, strict=True)) if len({*before}) > 1 or len({*after}) > 1 else ()
        last = step is steps[-1]
        work = Work(
            *(shape, config, step, tail, last, backend, compact),
            seen_tokens=batch.seen_tokens,
            layers=layers,
            machine=machine,
            recalled=batch.recalled_tokens,
        )
        workspace_keys = max(workspace_keys, work.keys)
        footprints.append(replace(_peak(work, workspace_keys), others=waiting))
    return tuple(footprints)


def predict_after(config: PrefillConfig, batch: Batch, kept: Kept) -> tuple[StepFootprint, ...]:
    """The footprints of what follows the steps: the rows become one cache, then the answer is written.

    Args:
        config: the options.
        batch: what was read.
        kept: what the last step leaves.
    """
    shape = kept.shape
    memory, logits = stacking_bytes(shape, batch, kept)
    found = [StepFootprint("stacking", shape.weights, memory, logits=logits)]
    if batch.decoded_tokens and not batch.question_tokens:
        memory, activations, logits = decoding_bytes(shape, batch, kept, config)
        found.append(StepFootprint("decoding", shape.weights, memory, activations=activations, logits=logits))
    return tuple(found)


def _peak(work: Work, workspace_keys: int) -> StepFootprint:
    shape, kinds = work.shape, work.kinds
    per_key = 2 * shape.rotary * shape.rotary_bases
    # Token ids and positions are int64.
    per_key *= 4 if shape.float_rotary else shape.dtype_bytes
    tables = work.rows * (per_key + 16) + work.keys * per_key * work.compact
    # A chunk's pairs are alive until a GPU has copied them to the host, while the next layer begins.
    tables += sending_bytes(work)
    pair = shape.kv_bytes_per_token
    memory, phase = max(
        (
            (pair * (others + _own(layers, phase)), phase)
            for layers, others in _running(kinds)
            for phase in phases(work, layers)
        ),
        key=lambda found: found[0] + found[1].total_bytes,
    )
    return StepFootprint(
        phase=phase.name,
        weights=shape.weights,
        memory=memory,
        workspace=workspace_keys * pair + tables,
        activations=phase.activations,
        attention=phase.attention,
        scoring=phase.scoring,
        logits=phase.logits,
        flops=_flops(work),
        moved_bytes=_moved_bytes(work),
    )


def _running(kinds: Sequence[Layers]) -> Iterator[tuple[Layers, int]]:
    """Each layer that may run, and the KV pairs that all others hold meanwhile.

    Layers before it hold what they keep, those after it what they had. Where layers are alike, or where they lie among
    the others is not known (sliding windows), the larger of both is counted: the peak lies in the first or the last.
    """
    alike = [layers for layers in kinds if layers.count > 1 or layers.window is not None]
    single = [layers for layers in kinds if layers.count == 1 and layers.window is None]
    most = sum(layers.count * max(layers.before, layers.after) for layers in alike)
    later, done = sum(layers.before for layers in single), 0
    for layers in alike:
        yield layers, most - max(layers.before, layers.after) + max(later, sum(one.after for one in single))
    for layers in single:
        later -= layers.before
        yield layers, most + done + later
        done += layers.after


def _own(running: Layers, phase: Phase) -> int:
    """KV pairs that the running layer itself holds."""
    return {"before": running.before, "none": 0, "after": running.after}[phase.layer_memory]


def _flops(work: Work) -> int:
    shape, rows, before = work.shape, work.rows, work.step.memory_before
    queries = shape.q_heads * shape.head_dim
    idle_experts = shape.experts - shape.experts_per_token
    active = shape.layer_matrices - idle_experts * shape.expert_parameters
    full_pairs = rows * before + rows * (rows + 1) // 2
    sliding_pairs = min(full_pairs, rows * (shape.window or 0))
    pairs = shape.full_layers * full_pairs + shape.sliding_layers * sliding_pairs
    scored = shape.full_layers * work.voting_rows * (before + rows)
    head = 2 * shape.vocab * shape.hidden if work.last else 0
    products = active * shape.layers - shape.less_when_dense(shape.experts_per_token)
    return 2 * rows * products + 4 * queries * pairs + 2 * queries * scored + head


def _moved_bytes(work: Work) -> int:
    shape, step = work.shape, work.step
    # Embeddings stay out, and so do experts that no row of a small chunk can reach.
    embeddings = (shape.parameters - shape.all_layers_parameters) * shape.dtype_bytes
    idle = max(0, shape.experts - work.rows * shape.experts_per_token) * shape.expert_parameters
    weights = int((shape.weights - embeddings) * (1 - idle / shape.layer_parameters))
    # A sliding layer's memory is left out: it makes this less of a bound, never a wrong one.
    return weights + shape.full_layers * shape.kv_bytes_per_token * (step.memory_before + step.memory_after)


def balanced_steps(
    shape: ModelShape | None,
    prompt_tokens: int,
    config: PrefillConfig,
    *,
    stored_tokens: int = 0,
    chunk_tokens: int | None = None,
) -> tuple[Step, ...]:
    """The steps in which a model of that shape reads a prompt: `build_steps` with what the config balances.

    `shape` may be None where the config levels no bytes. Other arguments, returns and errors are those of
    `imdc.schedule.build_steps`.
    """
    chunk = config.chunk_tokens if chunk_tokens is None else chunk_tokens
    cost = None
    if config.levels_bytes and isinstance(chunk, int) and chunk > 0:
        assert shape is not None, "bytes are levelled by the model's sizes"
        cost = memory_cost(shape, config, chunk)
    return build_steps(prompt_tokens, config, stored_tokens=stored_tokens, chunk_tokens=chunk_tokens, cost=cost)


def memory_cost(shape: ModelShape, config: PrefillConfig, chunk_tokens: int) -> MemoryCost:
    """What a KV pair of memory weighs in bytes against a token of the chunk, for byte-balanced "imdc" chunks.

    A pair that is kept takes its place in all layers, one that is attended to in the workspace; a chunk token takes
    what the step's peak grows by where chunks are as large as they can be, M + C. Temporaries are the Triton backend's
    whatever runs, so that the steps of a prompt are the same on every machine.
    """

    def peak(chunk: int) -> int:
        step = Step(0, 0, chunk, config.memory_tokens, config.memory_tokens)
        work = Work(shape, config, step, 0, False, "triton", False)
        return _peak(work, work.keys).above_weights

    largest = config.memory_tokens + chunk_tokens
    token = max(1.0, (peak(2 * largest) - peak(largest)) / largest)
    pair = shape.kv_bytes_per_token
    return MemoryCost(before=pair / token, after=pair * shape.full_layers / token)


def predict_unpatched(shape: ModelShape, batch: Batch) -> StepFootprint:
    """The footprint of the model's own prefill: one step over the whole prompts, all rows at once, last logits only.

    Attention is taken to be fused and to need no mask, as flash attention does. transformers' sdpa builds a mask of
    N x N for sliding windows, and eager attention a float32 matrix; these take more.
    """
    whole = Step(0, 0, batch.prompt_tokens, 0, batch.prompt_tokens)
    config = PrefillConfig(schedule="full", observer="window")
    one = _peak(Work(shape, config, whole, 0, True, "flash", False), 0)
    kinds = ("memory", "workspace", "activations", "attention", "scoring", "logits", "flops")
    all_rows = replace(one, **{kind: batch.rows * getattr(one, kind) for kind in kinds})
    answer = batch.copies * batch.decoded_tokens * shape.layers * shape.kv_bytes_per_token
    repeated = (batch.copies - batch.rows) * one.memory
    return replace(all_rows, memory=all_rows.memory + repeated + answer)
