"""Reading a document once and asking it many questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, KINDS, build, token_ids
from torch import Tensor

import imdc
from imdc.cache.cache import ImdcCache
from imdc.errors import CacheMismatchError, UnsupportedCallError

TIGHT = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def content(cache: ImdcCache) -> list[Tensor]:
    return [x.clone() for layer in cache.layers for x in (layer.keys, layer.values)]


@pytest.mark.parametrize("family", KINDS)
def test_a_document_that_fits_answers_as_the_unpatched_model(family: str) -> None:
    model, document = FAMILIES[family](), token_ids(150)
    questions = [token_ids(length, seed=seed) for length, seed in ((9, 1), (1, 2), (40, 3))]
    wanted = [model.generate(torch.cat((document, one), dim=1), **GREEDY)[:, 150 + one.shape[1] :] for one in questions]
    with imdc.patch(model, memory_tokens=256, chunk_tokens=32) as handle:
        cache = handle.read(document)
        got = [handle.ask(cache, one, **GREEDY) for one in questions]
    assert [one.tolist() for one in got] == [one.tolist() for one in wanted]


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_questions_leave_the_cache_as_it_was(family: str, positions: str) -> None:
    model = FAMILIES[family]()
    questions = torch.cat([token_ids(9, seed=seed) for seed in (1, 2, 3)])
    with imdc.patch(model, **TIGHT, positions=positions) as handle:
        cache = handle.read(token_ids(300))
        before = content(cache)
        alone = torch.cat([handle.ask(cache, one[None], **GREEDY) for one in questions])
        again = torch.cat([handle.ask(cache, one[None], **GREEDY) for one in questions])
        together = handle.ask(cache, questions, **GREEDY)
        listed = handle.ask(cache, [questions[:1], questions[1], questions[2:, :4]], **GREEDY)
        short = handle.ask(cache, questions[2:, :4], **GREEDY)
        padded = torch.nn.functional.pad(questions[2:, :4], (0, 5))
        mask = torch.tensor([[1] * 4 + [0] * 5])
        right = handle.ask(
            cache, torch.cat((questions[:1], padded)), torch.cat((torch.ones_like(mask), mask)), **GREEDY
        )
    assert torch.equal(alone, again) and torch.equal(alone, together)
    assert torch.equal(listed, torch.cat((alone[:2], short)))
    assert torch.equal(right, torch.cat((alone[:1], short)))
    assert len({tuple(row) for row in alone.tolist()}) == 3
    assert cache.stored_tokens() == 64 and cache.get_seq_length() == 300 and not cache.is_branch
    assert all(torch.equal(one, other) for one, other in zip(content(cache), before, strict=True))


def test_a_question_drops_nothing_of_the_document() -> None:
    model, document, question = FAMILIES["llama"](), token_ids(300), token_ids(50, seed=1)
    with imdc.patch(model, **TIGHT) as handle:
        cache = handle.read(document)
        got = handle.ask(cache, question, **GREEDY)
        assert handle.report is not None and handle.report.memory_tokens == 64 + 50
        # An ordinary turn drops as many pairs as it reads, and answers otherwise.
        mask = torch.ones(1, 350, dtype=torch.long)
        turn = model.generate(question, attention_mask=mask, past_key_values=cache.copy(), **GREEDY)[:, 50:]
    with imdc.patch(model, **{**TIGHT, "schedule": "full"}):
        whole = model.generate(question, attention_mask=mask, past_key_values=cache.copy(), **GREEDY)[:, 50:]
    assert torch.equal(got, whole)
    assert not torch.equal(got, turn)


def test_a_saved_document_is_asked_after_loading(tmp_path: Path) -> None:
    model = FAMILIES["gemma3"]()
    with imdc.patch(model, **TIGHT) as handle:
        cache = handle.read(token_ids(300))
        imdc.save_cache(cache, tmp_path / "document")
        wanted = handle.ask(cache, token_ids(9, seed=1), **GREEDY)
    with imdc.patch(model, **TIGHT) as handle:
        loaded = imdc.load_cache(tmp_path / "document", model)
        assert torch.equal(handle.ask(loaded, token_ids(9, seed=1), **GREEDY), wanted)
        assert torch.equal(handle.ask(loaded, token_ids(9, seed=1), **GREEDY), wanted)


def test_beams_and_samples_share_the_document() -> None:
    model = FAMILIES["llama"]()
    questions = torch.cat([token_ids(9, seed=seed) for seed in (1, 2)])
    with imdc.patch(model, **TIGHT) as handle:
        cache = handle.read(token_ids(300))
        alone = [handle.ask(cache, one[None], num_beams=3, **GREEDY) for one in questions]
        assert torch.equal(handle.ask(cache, questions, num_beams=3, **GREEDY), torch.cat(alone))
        options = {**GREEDY, "do_sample": True, "num_return_sequences": 4}
        assert handle.ask(cache, questions, **options).shape == (8, 8)


@pytest.mark.parametrize(("length", "compact"), [(200, False), (230, True), (300, True)])
def test_room_is_kept_for_question_and_answer(length: int, compact: bool) -> None:
    model = build("llama", max_position_embeddings=256)
    with imdc.patch(model, **TIGHT) as handle:
        cache = handle.read(token_ids(length), room=40)
        assert cache.compact == compact
        handle.ask(cache, token_ids(30, seed=1), **GREEDY)
        with pytest.raises(UnsupportedCallError, match=r"question and answer reach position .* lower max_new_tokens=8"):
            handle.ask(cache, token_ids(250, seed=1), **GREEDY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda handle, cache: handle.read(token_ids(9).expand(2, -1)), "one document"),
        (lambda handle, cache: handle.read(token_ids(9), room=0), "room=0"),
        (lambda handle, cache: handle.read(token_ids(9)[:, :0]), "empty prompt"),
        (lambda handle, cache: handle.ask(cache, []), "input_ids is a list"),
        (lambda handle, cache: handle.ask(cache, [token_ids(9), [1, 2]]), "'list'"),
        (lambda handle, cache: handle.ask(cache, [token_ids(9)], torch.ones(1, 9)), "leave it out"),
        (lambda handle, cache: handle.ask(cache, token_ids(9), torch.ones(1, 8)), r"attention_mask has shape \(1, 8\)"),
        (lambda handle, cache: handle.ask(cache, token_ids(9), past_key_values=cache), "not for ask"),
        (lambda handle, cache: handle.ask(cache, token_ids(9), return_dict_in_generate=True), "not for ask"),
        (lambda handle, cache: handle.ask(handle.new_cache(), token_ids(9)), "holds 0 documents"),
        (lambda handle, cache: handle.ask(None, token_ids(9)), "NoneType"),
    ],
)
def test_what_cannot_be_read_or_asked_is_refused(call: Any, message: str) -> None:
    with imdc.patch(FAMILIES["llama"](), **TIGHT) as handle:
        cache = handle.read(token_ids(100))
        before = content(cache)
        with pytest.raises(UnsupportedCallError, match=message):
            call(handle, cache)
        assert all(torch.equal(one, other) for one, other in zip(content(cache), before, strict=True))


def test_neither_a_removed_patch_nor_another_model_answers() -> None:
    with imdc.patch(FAMILIES["llama"](), **TIGHT) as handle:
        cache = handle.read(token_ids(100))
    with pytest.raises(UnsupportedCallError, match="ask.*taken back"):
        handle.ask(cache, token_ids(9))
    with pytest.raises(UnsupportedCallError, match="read.*taken back"):
        handle.read(token_ids(9))
    with imdc.patch(build("llama", seed=1), **TIGHT) as other, pytest.raises(CacheMismatchError, match="another model"):
        other.ask(cache, token_ids(9))
