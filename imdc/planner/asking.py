"""What a question takes that is asked of a document which was read before: bytes while it is read and answered.

The document's cache stays as it is. The question is read into a branch of it, which shares what is stored until a layer
has run and holds memory and question of its own then: a second memory. With recall each layer takes its memory back
from the store; what that needs comes on top, see `imdc.planner.recalling`, and again where its answer does.
"""

from __future__ import annotations

from dataclasses import replace

from imdc.config import MEASURED_BUDGETS, PrefillConfig
from imdc.model.backend_rule import KERNELS, Machine
from imdc.planner.batch import Batch, Kept, row_activations, row_logits, tail_room
from imdc.planner.footprint import StepFootprint, predict
from imdc.planner.recalling import recall_bytes
from imdc.planner.work import Layers, Work
from imdc.schedule import Step

# Tokens of a question where recall is planned and nobody says how many.
_QUESTION_TOKENS = 64


def asked(batch: Batch, config: PrefillConfig) -> Batch:
    """`batch` with a question where recall is planned and none was named."""
    if config.recall == "none" or batch.question_tokens:
        return batch
    return replace(batch, question_tokens=_QUESTION_TOKENS)


def predict_question(
    config: PrefillConfig, batch: Batch, kept: Kept, chosen: tuple[str, bool], machine: Machine
) -> tuple[StepFootprint, ...]:
    """The footprints of the question of `batch` and of its answer, about a document of which `kept` is stored.

    `chosen` are the backend and whether positions are compact, as `imdc.planner.fit.execution` says.
    """
    shape, tokens, rows = kept.shape, batch.prompt_tokens, batch.question_tokens
    recalled = tokens if config.recall != "none" and kept.full < tokens else 0
    question = Batch(rows, seen_tokens=tokens, stored_tokens=kept.full, recalled_tokens=recalled)
    # What is measured while reading is not known: the fullest layer stands for all there.
    measured = config.layer_budget in MEASURED_BUDGETS
    whole = replace(config, schedule="full", layer_budget="uniform" if measured else config.layer_budget)
    memory = kept.fullest if measured else kept.full
    step = Step(0, 0, rows, memory, memory + rows)
    backend, compact = chosen
    (read,) = predict(shape, whole, [step], backend=backend, compact=compact, batch=question, machine=machine)
    if measured:
        read = replace(read, memory=replace(kept, full=kept.full + rows).row_bytes)
    # Masks of all columns, int64: the caller's and that of generate(), and one of their positions.
    mask = 8 * (tokens + rows)
    # Places and scores of what the question took stay on the host, which may be the device too.
    taken = 8 * shape.kv_heads * kept.full * shape.full_layers if recalled and config.recall_every else 0
    held = kept.row_bytes + (taken if backend not in KERNELS else 0)
    found = [replace(read, phase="asking", others=held + 2 * mask)]
    if batch.decoded_tokens:
        after = Kept.after(shape, question, kept.full + rows, kept.fullest + rows)
        others = held + 3 * mask
        found.append(replace(_answering(batch, after), others=others))
        if recalled and config.recall_every:
            token = Step(0, 0, 1, kept.full, kept.full + 1)
            work = Work(shape, config, token, 0, True, backend, compact, machine=machine, recalled=recalled)
            renewal = recall_bytes(work, Layers(1, kept.fullest, kept.fullest, None), rows + batch.decoded_tokens)
            found.append(replace(_renewing(batch, after, renewal), others=others))
    return tuple(found)


def _renewing(batch: Batch, branch: Kept, renewal: int) -> StepFootprint:
    """A layer that has made room takes its pairs back anew before it attends."""
    found = _answering(batch, branch)
    return replace(found, phase="renewing", memory=found.memory - branch.layer_bytes, scoring=renewal, logits=0)


def _answering(batch: Batch, branch: Kept) -> StepFootprint:
    """One row is decoded without a mask: each layer makes room in a copy, one after another."""
    shape, pair, room = branch.shape, branch.shape.kv_bytes_per_token, tail_room(batch.decoded_tokens)
    return StepFootprint(
        phase="answering",
        weights=shape.weights,
        memory=branch.row_bytes + pair * (room * shape.full_layers + shape.sliding_layers) + branch.layer_bytes,
        activations=row_activations(shape),
        logits=row_logits(shape),
    )
