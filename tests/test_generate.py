"""The patch on tiny random models: exactness, batches, turns, decoding modes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, KINDS, greedy, token_ids

import imdc
import imdc.errors
from imdc.cache.layers import MemoryLayer
from imdc.model import hf

ROOMY = {"memory_tokens": 512, "chunk_tokens": 48}
TIGHT = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}


def left_padded(*lengths: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    alone = [token_ids(length, seed=length) for length in lengths]
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(alone):
        ids[row, width - tokens.shape[1] :] = tokens[0]
        mask[row, width - tokens.shape[1] :] = 1
    return ids, mask, alone


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    ("family", "schedule"),
    [
        *((family, "imdc") for family in FAMILIES),
        *((family, name) for family in KINDS for name in ("im", "fm", "full")),
    ],
)
def test_roomy_memory_gives_the_unpatched_logits(family: str, schedule: str, positions: str) -> None:
    model = FAMILIES[family]()
    ids = token_ids(150)
    wanted = greedy(model, ids)
    with imdc.patch(model, schedule=schedule, positions=positions, **ROOMY) as handle:
        got = greedy(model, ids)
        assert handle.report is not None and len(handle.report.steps) > 2
    assert torch.equal(got.sequences, wanted.sequences)
    for ours, theirs in zip(got.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_padded_rows_are_what_they_would_be_alone(family: str, positions: str) -> None:
    model = FAMILIES[family]()
    ids, mask, alone = left_padded(150, 97, 20)
    with imdc.patch(model, positions=positions, **TIGHT):
        together = greedy(model, ids, attention_mask=mask).sequences[:, ids.shape[1] :]
        single = [greedy(model, row).sequences[:, row.shape[1] :] for row in alone]
    for got, wanted in zip(together, single, strict=True):
        assert torch.equal(got, wanted[0])


@pytest.mark.parametrize("family", KINDS)
def test_right_padded_rows_are_what_they_would_be_alone(family: str) -> None:
    model = FAMILIES[family]()
    long, short = token_ids(150), token_ids(90, seed=1)
    ids = torch.cat((long, torch.nn.functional.pad(short, (0, 60))))
    mask = torch.ones_like(ids)
    mask[1, 90:] = 0
    with imdc.patch(model, **TIGHT):
        together = greedy(model, ids, attention_mask=mask).sequences[:, 150:]
        single = [greedy(model, row).sequences[:, row.shape[1] :] for row in (long, short)]
    for got, wanted in zip(together, single, strict=True):
        assert torch.equal(got, wanted[0])


@pytest.mark.parametrize("observer", ["prompt_tail", "window", "all_queries", "sink_recent", "key_diff", "random"])
@pytest.mark.parametrize("schedule", ["imdc", "im", "fm"])
def test_no_layer_ever_stores_more_than_the_plan_says(observer: str, schedule: str) -> None:
    model = FAMILIES["llama"]()
    stored: list[int] = []
    per_token = 3 * 2 * 2 * 16 * 4  # layers, KV heads, keys and values, head size, bytes
    with imdc.patch(
        model, schedule=schedule, observer=observer, on_step=lambda s: stored.append(s.kv_bytes), **TIGHT
    ) as handle:
        output = greedy(model, token_ids(300))
        assert handle.report is not None
        assert stored == [step.memory_after * per_token for step in handle.report.steps]
        assert handle.report.memory_tokens == 64
        assert max(step.memory_after for step in handle.report.steps) == 64
    layer = output.past_key_values.layers[0]
    assert isinstance(layer, MemoryLayer)
    assert layer.stored == 64 + layer.tail


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_turns_stay_bounded(positions: str) -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, positions=positions, **TIGHT) as handle:
        cache, history = None, token_ids(0)
        for turn in range(10):
            new = token_ids([200, 1, 40, 7, 90, 1, 2, 33, 64, 128][turn], seed=turn)
            history = torch.cat((history, new), dim=1)
            output = greedy(model, history, past_key_values=cache, attention_mask=torch.ones_like(history))
            cache, history = output.past_key_values, output.sequences
            assert handle.report is not None
            assert handle.report.memory_tokens <= 64
            assert cache.stored_tokens() <= 64 + output.sequences.shape[1]
            assert cache.get_seq_length() == history.shape[1] - 1


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_two_roomy_turns_equal_the_unpatched_model(positions: str) -> None:
    model = FAMILIES["llama"]()
    first, second = token_ids(120), token_ids(50, seed=1)

    def talk() -> torch.Tensor:
        one = greedy(model, first)
        history = torch.cat((one.sequences, second), dim=1)
        mask = torch.ones_like(history)
        return greedy(model, history, past_key_values=one.past_key_values, attention_mask=mask).sequences

    wanted = talk()
    with imdc.patch(model, positions=positions, **ROOMY):
        assert torch.equal(talk(), wanted)


def test_beams_equal_beams_over_the_unpatched_model_and_read_the_prompt_once() -> None:
    model = FAMILIES["llama"]()
    ids = token_ids(150)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids, pad_token_id=0, **options)
    with imdc.patch(model, **ROOMY) as handle:
        assert torch.equal(model.generate(ids, pad_token_id=0, **options), wanted)
        assert handle.report is not None and handle.report.rows == 1


@pytest.mark.parametrize("limits", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_prompt_lookup_equals_greedy(limits: dict[str, int]) -> None:
    model = FAMILIES["llama"]()
    ids = torch.cat([token_ids(30)] * 5, dim=1)
    with imdc.patch(model, **limits):
        wanted = greedy(model, ids, eos_token_id=2).sequences
        got = greedy(model, ids, eos_token_id=2, prompt_lookup_num_tokens=5).sequences
    assert torch.equal(got, wanted)


def test_sampling_with_a_seed_equals_the_unpatched_model() -> None:
    model = FAMILIES["llama"]()
    ids = token_ids(100)

    def sample() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(ids, do_sample=True, max_new_tokens=12, num_return_sequences=3, pad_token_id=0)

    wanted = sample()
    with imdc.patch(model, **ROOMY):
        assert torch.equal(sample(), wanted)


def test_out_of_memory_starts_again_with_the_smaller_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from imdc.prefill.step import StepRun

    model = FAMILIES["llama"]()
    ids = token_ids(256)
    options = {"memory_tokens": 64, "sink_tokens": 2, "recent_tokens": 8, "schedule": "fm"}
    with imdc.patch(model, chunk_tokens=64, **options):
        wanted = greedy(model, ids)
    attend = StepRun.attend

    def limited(self: StepRun, layer: int, q: torch.Tensor, *rest: torch.Tensor, **named: object) -> torch.Tensor:
        if self.step.chunk_tokens > 64:
            raise torch.OutOfMemoryError("injected")
        return attend(self, layer, q, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(StepRun, "attend", limited)
    with imdc.patch(model, chunk_tokens=128, **options) as handle:
        with pytest.warns(RuntimeWarning, match="starts again"):
            got = greedy(model, ids)
        assert handle.report is not None and handle.report.restarts == 1
    assert torch.equal(got.sequences, wanted.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, wanted.logits, strict=True))


def test_an_error_inside_a_layer_leaves_model_and_cache_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    first, second = token_ids(150), token_ids(60, seed=1)
    with imdc.patch(model, **TIGHT):
        one = greedy(model, first)
        history = torch.cat((one.sequences, second), dim=1)
        mask = torch.ones_like(history)
        keys = one.past_key_values.layers[1].keys.clone()
        own = model.config._attn_implementation
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[2].mlp, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                greedy(model, history, past_key_values=one.past_key_values, attention_mask=mask)
        assert model.config._attn_implementation == own
        assert torch.equal(one.past_key_values.layers[1].keys, keys)
        again = greedy(model, history, past_key_values=one.past_key_values, attention_mask=mask)
        one = greedy(model, first)
        fresh = greedy(model, history, past_key_values=one.past_key_values, attention_mask=mask)
    assert torch.equal(again.sequences, fresh.sequences)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("lookup", [None, 4], ids=["greedy", "lookup"])
def test_decode_tokens_bounds_the_cache_while_generating(family: str, positions: str, lookup: int | None) -> None:
    if lookup and hf.RUNNING < hf.CROPS_ASSISTED:
        pytest.skip("refused before transformers 5.23, see imdc.model.hf")
    model = FAMILIES[family]()
    stored: list[int] = []

    def watch(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        stored.append(caches[0].stored_tokens())
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    with imdc.patch(model, positions=positions, decode_tokens=16, **TIGHT) as handle:
        caches = [handle.new_cache()]
        output = model.generate(
            token_ids(100), max_new_tokens=200, do_sample=False, pad_token_id=0, stopping_criteria=[watch],
            prompt_lookup_num_tokens=lookup, eos_token_id=200, past_key_values=caches[0],
        )  # fmt: skip
        assert handle.report is not None and handle.report.prompt_tokens == 100
    assert output.shape[1] == 300
    assert caches[0].get_seq_length() == output.shape[1] - 1
    assert 64 + 8 < max(stored) <= 64 + 16 + (lookup or 0)


@pytest.mark.parametrize(("family", "extra"), [("llama", True), ("mistral_sliding", False)])
def test_the_prompt_tail_rides_along_only_where_something_is_compressed(family: str, extra: bool) -> None:
    model = FAMILIES[family]()
    rows: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    with imdc.patch(model, memory_tokens=64, chunk_tokens=40, recent_tokens=8) as handle:
        model(torch.randint(3, 128, (1, 200)), past_key_values=handle.new_cache(), logits_to_keep=1)
    hook.remove()
    assert (sum(rows) > 200) == extra


def test_auto_chunks_are_the_largest_that_the_limit_allows() -> None:
    model = FAMILIES["llama"]()
    ids = token_ids(1500)
    plan = imdc.plan(model, 1500, new_tokens=12, chunk_tokens=100, memory_tokens=64)
    limit = plan.peak_bytes
    with imdc.patch(model, chunk_tokens="auto", memory_limit=limit, memory_tokens=64) as handle:
        greedy(model, ids)
        assert handle.report is not None
        assert len(handle.report.steps) == len(plan.steps)
        assert max(step.chunk_tokens for step in handle.report.steps) >= max(s.chunk_tokens for s in plan.steps)
    with (
        imdc.patch(model, chunk_tokens="auto", memory_limit=1000, memory_tokens=64),
        pytest.raises(imdc.errors.ConfigError, match="needs at least"),
    ):
        greedy(model, ids)
