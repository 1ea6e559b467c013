"""What is alive in each phase of a decoder layer: the tensors behind `imdc.planner.footprint`.

Written out is what transformers' modelling code and imdc's attention keep alive, with c chunk rows and t rows of the
prompt tail, r = c + t, T = memory_before + r, b bytes per element, H hidden, I intermediate, Q = Hq * D, K = Hkv * D:

    norm        r * (3 b H + 8 H)          embedding, layer input, residual; two float32 copies
    heads       r * b * (3 H + Q) + 8 r Q  query norm, in models that have one
    rotary      r * b * (3 H + 4 Q + 2 K)  queries, their two products, half-swapped copy or sum; keys, values
    storing     r * b * (3 H + Q + 2 K)    and what putting pairs in eight bits needs, see `imdc.planner.recalling`
    attention   the same, and what the backend needs, see `attention_bytes`
    compression the same, output, and what one call that attends, scores and selects allocates, see `compression_bytes`
    recall      the same, and what taking back a question's memory needs, see `imdc.planner.recalling`
    scoring     elsewhere: the same, output, log-sum-exp and what the observer needs, see `scoring_bytes`
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

from imdc.model.backend_rule import KERNELS
from imdc.model.shape import ModelShape
from imdc.planner.backend_bytes import (
    attention_bytes,
    compression_bytes,
    scoring_bytes,
    selection_bytes,
    turned_bytes,
)
from imdc.planner.recalling import recall_bytes, recalls_whole, storing_bytes
from imdc.planner.work import Layers, Phase, Work


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
    turned = rows * queries * (shape.float_rotary or 3 * shape.dtype_bytes)
    yield Phase("rotary", unit * (inputs + queries + 2 * keys) + turned)

    states = unit * (inputs + queries + 2 * keys + shape.fused * (queries + keys))
    if layers.window is None and (storing := storing_bytes(work)):
        yield Phase("storing", states, scoring=storing)
    turned, turning = turned_bytes(work, layers)
    output = unit * queries
    candidates = layers.before + work.step.chunk_tokens
    evicts = layers.after < candidates and layers.window is None
    if evicts and work.in_one_call:
        yield Phase("attention", states, turning, layer_memory="none")
        yield Phase("compression", states, turned + output, compression_bytes(work, layers), layer_memory="after")
        yield from _rest(work, states, inputs, None)
        return
    recalls = work.recalled > 0 and layers.window is None
    if recalls:
        yield Phase("recall", states, scoring=recall_bytes(work, layers), layer_memory="none")
    if recalls and recalls_whole(shape.max_positions, rows, work.recalled, work.compact):
        # What was taken back is attended to by the answer alone.
        turned = 0
    elif len(work.questions) > 1:
        yield Phase("attention", states, turning, layer_memory="none")
        yield from _apart(work, layers, states, turned, evicts)
    else:
        own = attention_bytes(work, rows, layers.before, layers.window)
        yield Phase("attention", states, max(turning, turned + own), layer_memory="none")
        scored = turned + output + 4 * rows * shape.q_heads
        if evicts:
            scoring = scoring_bytes(work, candidates, work.tail, work.voting_rows)
            yield Phase("scoring", states, scored, scoring, layer_memory="none")
    chosen = 0
    if evicts:
        selection = selection_bytes(work, candidates, layers.after)
        yield Phase("selection", states, output, selection, layer_memory="none")
        # Scores, and the kept indices: the reference's are a column of three.
        index = 8 if work.backend in KERNELS else 24
        chosen = shape.kv_heads * (4 * candidates + index * layers.after)
    yield from _rest(work, states, inputs, Phase("compaction", states, output, chosen, layer_memory="after"))


def _apart(work: Work, layers: Layers, states: int, turned: int, evicts: bool) -> Iterator[Phase]:
    """Attention and scoring of the chunk, then of each question; outputs, and scores to compare, build up meanwhile.

    See `imdc.prefill.step.StepRun._attend_apart`.
    """
    shape, done = work.shape, work.step.chunk_tokens
    candidates = layers.before + done
    unit, scores = shape.dtype_bytes * shape.q_heads * shape.head_dim, 4 * shape.kv_heads * candidates * evicts
    own = attention_bytes(work, done, layers.before, layers.window)
    yield Phase("attention", states, turned + own, layer_memory="none")
    log_sums = 0
    for number, rows in enumerate(work.questions):
        # The highest so far, and from the third question on what the one before scored.
        held, alive = scores * min(number, 2), turned + unit * done
        own = attention_bytes(work, rows, candidates, layers.window)
        yield Phase("attention", states, alive + log_sums + own, held, layer_memory="none")
        done, log_sums = done + rows, 4 * rows * shape.q_heads
        if evicts:
            voting = -(-rows // work.config.observation_stride)
            scoring = held + scoring_bytes(work, candidates, rows, voting)
            yield Phase("scoring", states, turned + unit * done + log_sums, scoring, layer_memory="none")
    yield Phase("attention", states, turned + 2 * unit * done + log_sums, 2 * scores, layer_memory="none")


def _rest(work: Work, states: int, inputs: int, compaction: Phase | None) -> Iterator[Phase]:
    """The phases after attention; states as in the module's text, `inputs` elements per row."""
    shape, rows = work.shape, work.rows
    hidden, queries, unit = shape.hidden, shape.q_heads * shape.head_dim, rows * shape.dtype_bytes
    if compaction is not None:
        yield compaction
    yield Phase("output", states + unit * (hidden + queries), unit * queries, layer_memory="after")
    yield Phase("mlp", unit * (inputs + hidden) + rows * _mlp_bytes(shape), layer_memory="after")
    if work.last:
        logits = shape.vocab * shape.dtype_bytes
        yield Phase("head", unit * 2 * hidden + 8 * rows * hidden, logits=logits, layer_memory="after")


def _mlp_bytes(shape: ModelShape) -> int:
    """Bytes per token of the MLP's own tensors that are alive at once."""
    size, hidden = shape.dtype_bytes, shape.hidden
    if shape.experts > 1:
        # Per routed copy of a token: its hidden state; gate and up in one, activation, product. Those of gpt-oss are
        # clamped, and the copy has its expert's biases: gate and up twice, clamped, and three products of them.
        inside = size * (hidden + (9 if shape.biased else 4) * shape.intermediate)
        # Later its hidden state and what its expert gives; that weighed, and in the order of the tokens again.
        weighed = 2 * hidden * (size + (4 if shape.float_routing else size))
        # A shared expert with a gate comes first.
        return shape.experts_per_token * max(inside, weighed) + size * hidden * shape.shared_gate
    return size * (2 if not shape.gated else 4 if shape.fused_mlp else 3) * shape.intermediate
