"""A prompt of generate() with recall: its text is read as a document is, and its last tokens ask about it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from imdc.cache.branch import branch
from imdc.cache.cache import ImdcCache
from imdc.config import MEASURED_BUDGETS
from imdc.errors import UnsupportedCallError
from imdc.model.shape import ModelShape
from imdc.observers import find_observer
from imdc.planner.batch import Batch, Kept
from imdc.prefill.device_room import fitting_chunk
from imdc.prefill.engine import Engine
from imdc.prefill.logits import real_tokens
from imdc.prefill.questions import check_question, check_window, read_document, with_questions
from imdc.prefill.requests import GenerateRequest
from imdc.prefill.turn import RowTurn
from imdc.report import PrefillReport


def check_recalling(engine: Engine, request: GenerateRequest) -> None:
    """Refuse calls of generate(), and of ask(), that cannot take back what they need.

    Raises:
        UnsupportedCallError: drafts for another model, candidates of assisted decoding where the memory is renewed, a
            generation loop of the caller's own, a cache that has read nothing, or several prompts.
    """
    config, stored = engine.config, isinstance(request.cache, ImdcCache) and request.cache.store is not None
    if request.assisted and config.recall_every and (stored or config.recall != "none"):
        raise UnsupportedCallError(
            f"recall_every={config.recall_every} counts single tokens, and assisted decoding or prompt lookup brings "
            f"several at once; leave those out, or set recall_every=0 (with recall='host')"
        )
    if config.recall == "none":
        return
    if request.drafting:
        raise UnsupportedCallError(
            f"recall={config.recall!r} is not for an assistant model, whose drafts are taken back; leave it out"
        )
    if request.cache is None and request.asked("custom_generate") is not None:
        raise UnsupportedCallError(
            f"custom_generate with recall={config.recall!r}: the loop would hand the model the whole prompt, all of "
            f"which but the last tokens was read already; read() the text and ask() with the loop, or leave recall out"
        )
    if isinstance(request.cache, ImdcCache) and request.cache.is_empty:
        raise UnsupportedCallError(
            f"an empty cache with recall={config.recall!r}: generate() makes one with a store; leave it out"
        )
    if request.cache is None and request.input_ids is not None and request.input_ids.shape[0] != 1:
        raise UnsupportedCallError(
            f"input_ids has {request.input_ids.shape[0]} rows, and recall={config.recall!r} reads one prompt at a "
            f"time; call generate() once for each"
        )


def read_text(engine: Engine, cache: ImdcCache, request: GenerateRequest) -> tuple[ImdcCache, PrefillReport] | None:
    """Read all of the prompt but its last tokens into the empty `cache`; None where it is a single token.

    These last tokens, `observation_tokens` of them, are left for generate() to read as a question about the text.

    Returns:
        The cache for generate(), of as many rows as it works with, and what reading took.

    Raises:
        UnsupportedCallError: prompt and answer leave the model's window.
        ConfigError: the text's store finds no room, or its last tokens, with answers or beams, none within
            `memory_limit`.
    """
    ids, config = request.input_ids, engine.config
    if ids is None:
        return None
    mask = _mask(request, ids)
    real = real_tokens(ids, mask)[0]
    columns = real.nonzero()[:, 0]
    chunk = config.chunk_tokens if isinstance(config.chunk_tokens, int) else config.observation_tokens
    asked = min(config.observation_tokens, chunk, columns.numel() - 1)
    if asked < 1:
        return None
    first = int(columns[-asked])
    observer = find_observer(config.observer)
    # Questions of the user's own stay who decides.
    known = [ids[:, first:][:, real[first:]]] if observer.rides_along and not observer.questions else None
    reading = replace(engine, config=with_questions(config, known))
    room = asked + max(1, request.new_tokens)
    planned = reading.planner(new_tokens=room).fresh(ids[0, :first][real[:first]])
    if planned.row.compact and planned.layers[-1]:
        measured = config.layer_budget in MEASURED_BUDGETS
        fullest = planned.steps[-1].memory_after if measured else max(planned.layers[-1])
        check_window(engine, fullest, True, asked, request.new_tokens)
    if not isinstance(config.chunk_tokens, int):
        _check_limit(engine, planned, asked, request)
    report = read_document(
        reading,
        cache,
        ids[:, :first],
        room,
        None if mask is None else mask[:, :first],
        question=asked,
    )
    # Who the user asked to decide, whatever that came to.
    sized = replace(report.config, observer=config.observer, observation_tokens=config.observation_tokens)
    report = replace(report, config=sized)
    # What a measured layer budget gave the fullest layer is not known before.
    check_question(engine, cache, asked, request.new_tokens)
    return branch(cache, request.copies), report


def _check_limit(engine: Engine, planned: RowTurn, asked: int, request: GenerateRequest) -> None:
    """Refuse what would be refused once the text of `planned` was read: its last tokens as a question of one branch."""
    read, shape = planned.ids.numel(), ModelShape.from_model(engine.parts.model)
    stored = planned.steps[-1].memory_after
    batch = Batch(
        asked,
        cache_rows=request.copies,
        new_tokens=max(1, request.new_tokens),
        seen_tokens=read,
        stored_tokens=stored,
        stored_bytes=Kept.after(shape, Batch(read), stored).row_bytes,
    )
    fitting_chunk(engine.parts, engine.whole.config, batch, engine.backend()[0].name, asked=True, ahead=True)


def _mask(request: GenerateRequest, ids: Tensor) -> Tensor | None:
    """The mask of a prompt: the caller's, or where padding tells of itself what generate() is going to make of it."""
    mask: Tensor | None = request.arguments.get("attention_mask")
    if mask is not None:
        return mask
    pad, ends = request.asked("pad_token_id"), request.asked("eos_token_id")
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]) or not bool((ids == pad).any()):
        return None
    shown: Tensor = ids != pad
    return shown.long()
