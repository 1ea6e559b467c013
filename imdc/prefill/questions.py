"""Read a document once, ask it many questions: the read() and ask() of a patched model's handle.

A question is a second turn over a branch of the document's cache: it drops nothing, so the question is complete, and
the branch goes with its answer. What the document's cache stores is shared by all branches.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from imdc.cache.branch import branch
from imdc.cache.cache import ImdcCache
from imdc.cache.turn import Turn
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.model import hf
from imdc.observers import PromptTail, Questions, find_observer
from imdc.prefill.device_room import free_bytes
from imdc.prefill.engine import Engine
from imdc.prefill.logits import real_tokens
from imdc.prefill.requests import GenerateRequest, check_ids
from imdc.prefill.text_store import text_store
from imdc.report import PrefillReport


def read_document(
    engine: Engine,
    cache: ImdcCache,
    input_ids: Tensor,
    room: int,
    attention_mask: Tensor | None = None,
    *,
    question: int | None = None,
) -> PrefillReport:
    """Read `input_ids` int64 [1, N] into the empty `cache`; see `imdc.prefill.patch.PatchHandle.read`.

    Args:
        engine: with the options of the reading.
        cache: empty.
        input_ids: the document.
        room: tokens of a question and its answer.
        attention_mask: [1, N], zeros where there is padding.
        question: how many of `room` are the question's; None where that is not known.

    Raises:
        UnsupportedCallError: several documents, or none.
    """
    check_ids(input_ids)
    if input_ids.shape[0] != 1:
        raise UnsupportedCallError(
            f"input_ids has shape {tuple(input_ids.shape)}: read() takes one document, [1, tokens]; call it once for "
            f"each"
        )
    if isinstance(room, bool) or not isinstance(room, int) or room < 1:
        raise UnsupportedCallError(f"room={room!r} must be an int of at least 1: tokens of a question and its answer")
    available, tokens = free_bytes(torch.device("cpu")), int(real_tokens(input_ids, attention_mask).sum())
    cache.store = text_store(engine.parts, engine.config, tokens, available)
    with cache.during(Turn(new_tokens=room, asked=True, question=question)):
        _, report = engine.prefill(cache, input_ids, attention_mask)
    cache.phase = "decode"
    return report


def with_questions(config: PrefillConfig, questions: Sequence[Tensor] | None) -> PrefillConfig:
    """The options with `questions`, token ids [1, n] or [n] each, in place of the prompt's last tokens.

    Raises:
        UnsupportedCallError: the observer asks for questions and there are none, or has no use for them.
    """
    observer = find_observer(config.observer)
    if questions is None:
        if isinstance(observer, Questions) and not observer.questions:
            raise UnsupportedCallError(
                "observer='questions' needs questions: read(input_ids, questions=[...]) with the token ids of each; "
                "where they are not known, those of imdc.GENERAL_QUESTIONS help"
            )
        return config
    if not observer.rides_along:
        raise UnsupportedCallError(
            f"questions have no effect with observer={str(observer)!r}; leave them out, or patch with "
            f"observer='questions'"
        )
    ids, mask = question_batch(list(questions), None)
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    if type(observer) in (PromptTail, Questions):
        observer = Questions(rows)
    else:
        observer = copy.copy(observer)
        observer.questions = tuple(map(tuple, rows))
    longest = max(map(len, rows))
    return replace(config, observer=observer, observation_tokens=max(config.observation_tokens, longest))


def question_batch(input_ids: Tensor | Sequence[Tensor], attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, mask), both int64 [n, q] with padding on the left, of one or several questions.

    Args:
        input_ids: [n, q], or a list of [1, q] or [q].
        attention_mask: [n, q], 0 marks padding; only with a tensor.

    Raises:
        UnsupportedCallError: no question, one without tokens, or a mask of another shape.
    """
    if not isinstance(input_ids, Tensor):
        rows = list(input_ids)
        if not rows or not all(
            isinstance(row, Tensor) and row.numel() and row.numel() == row.shape[-1] for row in rows
        ):
            shapes = [tuple(row.shape) if isinstance(row, Tensor) else type(row).__name__ for row in rows]
            raise UnsupportedCallError(f"input_ids is a list of {shapes}; pass token ids [1, tokens] for each question")
        if attention_mask is not None:
            raise UnsupportedCallError("attention_mask with a list of questions: a list has no padding; leave it out")
        rows = [row.reshape(-1) for row in rows]
        ids = pad_sequence(rows, batch_first=True, padding_side="left")
        masks = [torch.ones_like(row) for row in rows]
        return ids, pad_sequence(masks, batch_first=True, padding_side="left")
    check_ids(input_ids)
    if attention_mask is None:
        return input_ids, torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise UnsupportedCallError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for questions of {tuple(input_ids.shape)}; pass "
            f"one column for each token of the questions"
        )
    return input_ids, attention_mask


def question_request(
    engine: Engine, cache: ImdcCache, ids: Tensor, mask: Tensor, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of generate() that ask `ids` [n, q] of a branch of `cache`, checked.

    Raises:
        UnsupportedCallError: the cache holds no single document, or question and answer leave the model's window.
    """
    for name in (*hf.CACHE_NAMES, "inputs", "return_dict_in_generate"):
        if options.get(name) is not None:
            raise UnsupportedCallError(f"{name} is not for ask(), which returns new ids alone; call generate() instead")
    if cache.is_branch:
        raise UnsupportedCallError(
            "the cache is that of one question, and what it took back is about that alone; ask the one that read() or "
            "load_cache() returned"
        )
    if cache.rows is None or cache.rows.tokens.numel() != 1:
        held = 0 if cache.rows is None else cache.rows.tokens.numel()
        raise UnsupportedCallError(f"the cache holds {held} documents; ask one that read() or load_cache() returned")
    if cache.store is not None and cache.tail:
        raise UnsupportedCallError(
            f"{cache.tail} tokens were decoded after the document, which its store does not have; ask "
            f"the cache as read() or load_cache() returned it"
        )
    request = GenerateRequest.of(engine.parts.model, (ids,), {**options, "attention_mask": mask})
    check_question(engine, cache, ids.shape[1], request.new_tokens)
    seen = mask.new_ones(ids.shape[0], cache.get_seq_length())
    # A text that generate() has read may have had padding.
    seen[:, : seen.shape[1] - int(cache.rows.tokens[0]) - cache.tail] = 0
    # The model's own options may ask for a record, of which only the ids would be returned.
    plain = {"return_dict_in_generate": False} if request.asked("return_dict_in_generate") else {}
    return {
        **options,
        **plain,
        "input_ids": ids,
        "attention_mask": torch.cat((seen, mask), dim=1),
        hf.cache_argument(type(engine.parts.model).forward): branch(cache, ids.shape[0] * request.copies),
    }


def check_question(engine: Engine, cache: ImdcCache, question: int, answer: int) -> None:
    """Refuse a question about what `cache` has read that would leave the window; see `check_window`."""
    rows = cache.rows
    assert rows is not None, "checked before"
    check_window(engine, int(rows.position[0]) + cache.tail, bool(rows.compact.any()), question, answer)


def check_window(engine: Engine, read: int, compact: bool, question: int, answer: int) -> None:
    """Refuse positions of a question and its answer that the model was not trained for.

    Nothing can make room for them: the document is not at hand to be read anew, and dropping a part of its memory for
    a question would make the answer depend on the question's length.

    Args:
        engine: with the options of the call.
        read: positions that the document takes.
        compact: whether they are numbered anew.
        question: its tokens.
        answer: tokens of the answer at most.

    Raises:
        UnsupportedCallError: the last position lies beyond the window.
    """
    parts = engine.parts
    if not parts.full_layers or (engine.config.positions == "original" and not compact):
        return
    end = read + question + max(0, answer - 1)
    if end > parts.trained_window:
        raise UnsupportedCallError(
            f"question and answer reach position {end}, the model was trained for {parts.trained_window}; lower "
            f"max_new_tokens={answer}, or read the document with a larger room or a smaller memory_tokens"
        )
