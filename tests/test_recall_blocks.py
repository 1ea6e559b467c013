"""A token of an answer finds the keys that it is compared with by the mean keys of blocks of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from imdc.kernels.reference import rotate
from recall_cases import SINKS, random_recall
from tiny_models import FAMILIES, token_ids
from torch import Tensor

import imdc
from imdc.config import SUMMARY_TOKENS
from imdc.planner import recalling
from imdc.prefill.backends import REFERENCE
from imdc.prefill.softmax import Softmax

TOKENS, KEEP, BLOCKS = 300, 20, 3


def rotated(one: Any, states: Tensor, places: Tensor, compact: bool) -> Tensor:
    tables = one.parts.rotary(0, places, torch.float32) if compact else None
    return states if tables is None else rotate(states, *tables)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("int8", [False, True], ids=["model", "int8"])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(None, None), (3.0, None), (None, SINKS)], ids=["plain", "cap", "sinks"]
)
def test_keys_of_the_best_blocks_are_compared(
    compact: bool, int8: bool, softcap: float | None, sinks: Tensor | None
) -> None:
    assert recalling.compared_blocks(KEEP, TOKENS) == BLOCKS
    one, q, own, own_v = random_recall(TOKENS, compact, int8)
    rule = Softmax(0.4, softcap, sinks)
    one.take(0, q, own, own_v, rule, keep=KEEP)
    keys = one.store.block("keys", 0, range(TOKENS), q.device)[0].transpose(1, 2)
    means = one.store.means[0].float().transpose(1, 2)
    wanted = [keys[:, :, first : first + SUMMARY_TOKENS].mean(dim=2) for first in range(0, TOKENS, SUMMARY_TOKENS)]
    torch.testing.assert_close(means, torch.stack(wanted, dim=2), atol=0.02, rtol=0.01)
    assert one.store.nbytes() == sum(x.nbytes for x in one.store.tensors().values()) + one.store.means[0].nbytes

    # What a question took is another test's.
    one.taken, moved = {}, one.moved_bytes
    _, values, out = one.take(0, q[:, :, -1:], own, own_v, rule, keep=KEEP, attends=False)
    assert out is None

    def logits(x: Tensor) -> Tensor:
        found = 0.4 * torch.einsum("hgd,htd->hgt", asked[0, :, 0].view(2, 2, 16), x[0])
        return found if softcap is None else softcap * torch.tanh(found / softcap)

    span = 256 - 7
    middles = torch.arange(SUMMARY_TOKENS // 2, 19 * SUMMARY_TOKENS, SUMMARY_TOKENS).clamp(max=TOKENS - 1)
    asked = rotated(one, q[:, :, -1:], torch.tensor([span + 6]), compact)
    of_means = logits(rotated(one, means, middles * span // TOKENS, compact))
    best = of_means.softmax(dim=-1).amax(dim=1).topk(BLOCKS).indices
    among = torch.zeros(2, 19, dtype=torch.bool).scatter_(1, best, True).repeat_interleave(SUMMARY_TOKENS, 1)
    all_logits = logits(rotated(one, keys, torch.arange(TOKENS) * span // TOKENS, compact))
    all_logits = all_logits.masked_fill(~among[:, None, :TOKENS], float("-inf"))
    own_logits = logits(rotated(one, own, torch.arange(span, span + 7), compact))
    # The other blocks count as so many keys like their means.
    others = of_means.scatter(-1, best[:, None].expand(-1, 2, -1), float("-inf")).repeat_interleave(SUMMARY_TOKENS, -1)
    compared = [all_logits, own_logits, others, *([] if sinks is None else [sinks.view(2, 2, 1)])]
    attended = torch.cat(compared, dim=-1).softmax(dim=-1)[..., :TOKENS].amax(dim=1)
    scores = torch.nn.functional.max_pool1d(attended[None], 3, stride=1, padding=1)
    chosen = REFERENCE.select(scores, KEEP, sink_tokens=2, recent_tokens=0)
    stored = one.store.block("values", 0, range(TOKENS), q.device)[0]
    assert torch.equal(values, torch.stack([stored[0, chosen[0, head], head] for head in range(2)])[None])
    # The means, the keys that are compared, and the pairs that are taken, of two heads.
    read, scales = (1, 3 * 2 * 2 * 16 * 4) if int8 else (4, 0)
    read_keys = BLOCKS * SUMMARY_TOKENS * 2 * 16 * read + scales
    taken = 2 * KEEP * 2 * 16 * read + scales + int8 * KEEP * 2 * 8
    assert one.moved_bytes - moved == 19 * 2 * 16 * 2 + read_keys + taken


def test_a_key_that_stands_out_is_found_in_the_last_short_block() -> None:
    one, q, own, own_v = random_recall(TOKENS, False, False)
    token, rule = TOKENS - 1, Softmax(0.4)
    one.store.sides["keys"][0][0, token] = 20 * q[0, ::2, -1]
    one.take(0, q, own, own_v, rule, keep=KEEP)
    one.taken = {}
    _, values, _ = one.take(0, q[:, :, -1:], own, own_v, rule, keep=KEEP, attends=False)
    stored = one.store.sides["values"][0][0, token]
    assert all(values[0, head].eq(stored[head]).all(dim=1).any() for head in range(2))


def test_a_large_memory_compares_all_keys() -> None:
    one, q, own, own_v = random_recall(TOKENS, False, False)
    rule = Softmax(0.4)
    assert recalling.compared_blocks(72, TOKENS) == 9 and recalling.compared_blocks(73, TOKENS) == 0
    one.take(0, q, own, own_v, rule, keep=100)
    moved = one.moved_bytes
    one.take(0, q[:, :, -1:], own, own_v, rule, keep=100, attends=False)
    assert one.moved_bytes - moved == one.store.sides["keys"][0].nbytes + 2 * 100 * 2 * 16 * 4


def test_blocks_may_hold_many_means(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for size in (4096, 16):
        monkeypatch.setattr(recalling, "BLOCK_TOKENS", size)
        one, q, own, own_v = random_recall(TOKENS, False, False)
        for attends in (True, False):
            taken = one.take(0, q[:, :, -1:], own, own_v, Softmax(0.4), keep=KEEP, attends=attends)
        found.append(taken[1])
    assert torch.equal(*found)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_an_answer_of_a_model_reads_less(positions: str) -> None:
    model = FAMILIES["llama"]()
    sizes = {"memory_tokens": 64, "chunk_tokens": 64, "positions": positions, "recall": "host"}
    ids = token_ids(1000)
    with imdc.patch(model, **sizes, recall_every=1) as handle:
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert handle.report is not None
        first = handle.report.recalled_bytes
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        renewal = (handle.report.recalled_bytes - first) / 3
    planned = imdc.plan(model, 1000, **sizes, recall_every=1)
    assert renewal < 0.4 * planned.shape.kv_bytes_per_token * 968 * 3 / 2
