"""What was evicted is taken back from host memory when a question needs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from imdc.kernels.reference import rotate
from recall_cases import SINKS, random_recall
from tiny_models import FAMILIES, build, token_ids
from torch import Tensor

import imdc
from imdc.cache.rows import Taken
from imdc.config import PrefillConfig
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.planner import recalling
from imdc.planner.batch import Batch
from imdc.planner.fit import peak_bytes
from imdc.prefill import text_store
from imdc.prefill.backends import REFERENCE
from imdc.prefill.softmax import Softmax

TIGHT = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8, "recall": "host"}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("int8", [False, True], ids=["model", "int8"])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, None), (3.0, None), (None, SINKS)], ids=["plain", "cap", "sinks"]
)
@pytest.mark.parametrize(("block", "held"), [(4096, 2**26), (128, 2**26), (128, 0), (128, 2 * 128 * 4 * 4 * 7)])
def test_what_is_taken_back_is_what_one_token_attends_to_most(
    compact: bool,
    int8: bool,
    softcap: float | None,
    sinks: Tensor | None,
    block: int,
    held: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recalling, "BLOCK_TOKENS", block)
    monkeypatch.setattr(recalling, "HELD_BYTES", held)
    tokens = 300
    one, q, own, own_v = random_recall(tokens, compact, int8)
    keys, values, out = one.take(0, q, own, own_v, Softmax(0.4, softcap, sinks), keep=20)

    stored = {side: one.store.block(side, 0, range(tokens), q.device)[0] for side in ("keys", "values")}
    asked, all_keys = q, torch.cat((stored["keys"].transpose(1, 2), own), dim=2)
    if compact:
        # The window of 256 positions less the question; 300 keys share what is left of them.
        span = 256 - 7
        places = torch.cat((torch.arange(tokens) * span // tokens, torch.arange(span, span + 7)))
        tables = one.parts.rotary(0, places, torch.float32)
        assert tables is not None
        all_keys = rotate(all_keys, *tables)
        asked = rotate(q, *tables.at(slice(-7, None)))
    all_values = torch.cat((stored["values"].transpose(1, 2), own_v), dim=2)
    attended, lse = Softmax(0.4, softcap, sinks).attend(REFERENCE, asked, all_keys, all_values)
    if compact:
        assert out is None
    else:
        torch.testing.assert_close(out, attended)
    logits = 0.4 * torch.einsum("hgnd,htd->hgnt", asked[0].view(2, 2, 7, 16), all_keys[0, :, :tokens])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    highest = (logits - lse.view(2, 2, 7, 1)).exp().amax(dim=(1, 2))
    scores = torch.nn.functional.max_pool1d(highest[None], 3, stride=1, padding=1)
    chosen = REFERENCE.select(scores, 20, sink_tokens=2, recent_tokens=0)
    for got, side in ((keys, stored["keys"]), (values, stored["values"])):
        assert torch.equal(got, torch.stack([side[0, chosen[0, head], head] for head in range(2)])[None])
    taken = sum(one.store.gather(side, 0, chosen.transpose(1, 2), q.device)[1] for side in stored)
    assert one.moved_bytes >= one.store.sides["keys"][0].nbytes + taken


@pytest.mark.parametrize("compact", [False, True])
def test_an_answer_keeps_what_its_question_attended_to_more(compact: bool) -> None:
    one, q, own, own_v = random_recall(300, compact, False)
    rule = Softmax(0.4)
    one.take(0, q, own, own_v, rule, keep=20)
    asked = one.taken[0]
    assert asked.places.shape == asked.scores.shape == (1, 2, 20)
    stored = one.store.sides["values"][0]

    def places() -> list[set[int]]:
        _, values, out = one.take(0, q[:, :, -1:], own, own_v, rule, keep=20, attends=False)
        assert out is None
        found = [
            [stored[0, :, head].eq(value).all(dim=1).nonzero().item() for value in values[0, head]] for head in (0, 1)
        ]
        assert found == [sorted(head) for head in found]
        return [set(map(int, head)) for head in found]

    one.taken = {}
    alone = places()
    # As much as a share of attention can be, and next to nothing.
    ten = torch.arange(100, 120, 2, dtype=torch.int32).expand(1, 2, 10)
    one.taken = {0: Taken(ten, torch.full((1, 2, 10), 2.0))}
    assert all(set(range(100, 120, 2)) <= head for head in places())
    one.taken = {0: Taken(ten, torch.full((1, 2, 10), 1e-30))}
    assert places() == alone


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "phi3", "glm4"])
@pytest.mark.parametrize(("memory", "exact"), [(99, 3), (20, 1)])
def test_questions_attend_to_the_whole_text(family: str, memory: int, exact: int) -> None:
    """One chunk reads all, as full attention does, and then most goes: the answer's first token is the same.

    Where one pair goes, the one that the question attends to least, so are the next ones.
    """
    model, document, question = FAMILIES[family](), token_ids(100), token_ids(9, seed=1)
    options = {**TIGHT, "memory_tokens": memory, "chunk_tokens": 128, "positions": "original"}
    with imdc.patch(model, **options, observer="random", backend="reference") as handle:
        cache = handle.read(document)
        assert cache.store is not None and cache.store.tokens == 100
        answer = handle.ask(cache, question, **GREEDY)
        assert handle.report is not None and handle.report.recalled_bytes > 0
    wanted = model.generate(torch.cat((document, question), dim=1), **GREEDY)[:, 109:]
    assert torch.equal(answer[:, :exact], wanted[:, :exact])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_store_holds_every_pair_as_it_was_computed(family: str) -> None:
    model, document = FAMILIES[family](), token_ids(100)
    with imdc.patch(model, **{**TIGHT, "memory_tokens": 128}) as handle:
        cache = handle.read(document)
    assert cache.store is not None
    for layer in Parts.of(model).full_layers:
        assert torch.equal(cache.store.sides["keys"][layer].transpose(1, 2), cache.layers[layer].keys)
        assert torch.equal(cache.store.sides["values"][layer].transpose(1, 2), cache.layers[layer].values)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_saved_questions_and_batches_recall_alike(positions: str, tmp_path: Path) -> None:
    model = FAMILIES["gemma3"]()
    questions = torch.cat([token_ids(9, seed=seed) for seed in (1, 2)])
    with imdc.patch(model, **TIGHT, positions=positions) as handle:
        cache = handle.read(token_ids(300))
        assert handle.report is not None and cache.store is not None
        assert handle.report.host_bytes == cache.store.nbytes() == 300 * 2 * 2 * 16 * 4 + 19 * 2 * 16 * 2
        imdc.save_cache(cache, tmp_path / "document")
        alone = torch.cat([handle.ask(cache, one[None], **GREEDY) for one in questions])
        moved = handle.report.recalled_bytes
        assert torch.equal(handle.ask(cache, questions, **GREEDY), alone)
        assert handle.report.recalled_bytes == 2 * moved and handle.report.recall_seconds > 0
        assert torch.equal(handle.ask(cache.copy(), questions, **GREEDY), alone)
        assert handle.report.memory_tokens == 64 + 9 and cache.stored_tokens() == 64
    with imdc.patch(model, **{**TIGHT, "recall": "none"}, positions=positions) as handle:
        loaded = imdc.load_cache(tmp_path / "document", model)
        assert loaded.store is not None and loaded.store.tensors().keys() == cache.store.tensors().keys()
        assert torch.equal(handle.ask(loaded, questions, **GREEDY), alone)
        loaded.store = None
        assert not torch.equal(handle.ask(loaded, questions, **GREEDY), alone)


def test_rows_of_a_loaded_cache_can_be_chosen(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **TIGHT) as handle:
        imdc.save_cache(handle.read(token_ids(300)), tmp_path / "document")
        loaded = imdc.load_cache(tmp_path / "document", model)
    loaded.batch_repeat_interleave(3)
    loaded.reorder_cache(torch.tensor([2, 0]))
    loaded.batch_select_indices(torch.tensor([1]))
    assert loaded.rows is not None and loaded.rows.tokens.tolist() == [300] and loaded.layers[0].keys.shape[0] == 1


def test_host_memory_is_bounded() -> None:
    model = FAMILIES["llama"]()
    # Pairs in float32, and means of 19 blocks in bfloat16.
    needed = 3 * 2 * 16 * (2 * 4 * 300 + 2 * 19)
    with imdc.patch(model, **TIGHT, recall_limit=needed) as handle:
        assert handle.read(token_ids(300)).store is not None
        with pytest.raises(ConfigError, match=rf"301 tokens, more than recall_limit={needed} bytes; raise it"):
            handle.read(token_ids(301))
    with pytest.raises(ConfigError, match="no effect with recall='none'"):
        PrefillConfig(recall_limit=5)
    with pytest.raises(ConfigError, match="host memory are available"):
        text_store.text_store(Parts.of(model), PrefillConfig(recall="host"), 300, needed - 1)


def test_plans_count_host_memory() -> None:
    shape = ModelShape.from_model(FAMILIES["gemma3"]())
    options = {name: value for name, value in TIGHT.items() if name != "recall"}
    with_store, without = (imdc.plan(shape, 300, **options, recall=one) for one in ("host", "none"))
    # And means of 19 blocks in bfloat16.
    assert with_store.to_dict()["host_bytes"] == 300 * 2 * 2 * 16 * 4 + 19 * 2 * 16 * 2
    assert without.to_dict()["host_bytes"] == 0
    assert "of host memory" in str(with_store) and "of host memory" not in str(without)
    assert json.dumps(with_store.to_dict())
    # On a GPU a layer's chunk is alive until it is copied.
    chunk = max(step.chunk_tokens for step in with_store.steps)
    added = [peak_bytes(shape, Batch(300), one.config, "cuda") for one in (with_store, without)]
    assert 0 < added[0] - added[1] <= chunk * shape.kv_bytes_per_token


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, handle, cache: model(token_ids(100), cache=handle.new_cache()), "recall='host' is for"),
        (lambda model, handle, cache: model(token_ids(10), cache=cache), "nothing can be added"),
        (lambda model, handle, cache: handle.ask(cache, token_ids(33)), "33 tokens takes 2 chunks.*chunk_tokens=32"),
    ],
)
def test_what_would_part_text_and_store_is_refused(call: Any, message: str) -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **TIGHT) as handle:
        cache = handle.read(token_ids(300))
        wanted = handle.ask(cache, token_ids(9, seed=1), **GREEDY)
        cache.phase = "prefill"
        with pytest.raises(UnsupportedCallError, match=message):
            call(model, handle, cache)
        assert torch.equal(handle.ask(cache, token_ids(9, seed=1), **GREEDY), wanted)


def test_a_cache_that_has_decoded_is_not_asked() -> None:
    model = build("llama")
    with imdc.patch(model, **TIGHT) as handle, torch.no_grad():
        cache = handle.read(token_ids(300))
        model(token_ids(1), cache=cache)
        with pytest.raises(UnsupportedCallError, match="1 tokens were decoded"):
            handle.ask(cache, token_ids(9))
