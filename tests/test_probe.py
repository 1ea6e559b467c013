"""Probes: what a reading did to the memory, against rules, reports and attention computed another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from tiny_models import FAMILIES, build, greedy, token_ids
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import imdc
from imdc.cli.demo import reference_text
from imdc.errors import UnsupportedCallError
from imdc.model import hf
from imdc.observers import AttentionObserver
from imdc.prefill.observation import Observation
from imdc.prefill.step import StepRun
from imdc.report import PrefillReport

TIGHT: dict[str, Any] = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8}
GROWING = {**TIGHT, "initial_memory": 0.25}
CASES: dict[str, dict[str, Any]] = {
    "original": {"positions": "original"},
    "compact": {"positions": "compact"},
    "pyramid": {"layer_budget": "pyramid"},
    "adaptive": {"layer_budget": "adaptive", "positions": "compact"},
    "all queries": {"observer": "all_queries", "observation_stride": 3, "schedule": "fm"},
    "no queries": {"observer": "key_diff", "backend": "reference"},
    "chance": {"observer": "random", "decode_tokens": 4},
}


def by_hand(model: PreTrainedModel, handle: imdc.PatchHandle, ids: Tensor) -> Any:
    cache = handle.new_cache()
    model(ids, **{hf.CACHE_NAME: cache})
    return cache


def reported(report: PrefillReport) -> Tensor:
    """Retention as the report has it, [steps, layers]."""
    rows = [[float("nan") if ratio is None else ratio for ratio in step.retention] for step in report.steps]
    return torch.tensor(rows, dtype=torch.float64)


def assert_consistent(result: imdc.ProbeResult, report: PrefillReport | None) -> None:
    assert report is not None
    assert result.steps == tuple(step.step for step in report.steps)
    assert torch.equal(result.retention.nan_to_num(-1), reported(report).nan_to_num(-1))
    # What was forgotten never comes back, and a memory is of all its origins.
    assert bool((result.survival[1:].nan_to_num(-1) <= result.survival[:-1].nan_to_num(2)).all())
    compressed = torch.tensor([places is not None for places in result.places])
    shares, mass = result.origins[:, compressed], result.mass_kept[:, compressed]
    torch.testing.assert_close(shares.sum(dim=2), torch.ones_like(mass))
    assert bool(((mass > 0) & (mass <= 1)).all()) and bool((mass < 1).any())
    for values in (result.origins, result.mass_kept, result.survival, result.retention):
        assert bool(values[:, ~compressed].isnan().all())
    for places in result.places:
        assert places is None or bool((places.diff() > 0).all())


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm3"])
def test_a_probe_changes_no_answer_and_agrees_with_the_report(family: str, options: dict[str, Any]) -> None:
    model, ids = FAMILIES[family](), token_ids(300)
    with imdc.patch(model, **{**GROWING, **options}) as handle:
        alone = greedy(model, ids)
        with imdc.probe(handle) as probe:
            probed = greedy(model, ids)
        assert_consistent(probe.result, handle.report)
        greedy(model, ids)
        # Neither what decoding compressed nor what came after it.
        assert len(probe.results) == 1
    assert torch.equal(alone.sequences, probed.sequences)
    assert all(torch.equal(a, b) for a, b in zip(alone.logits, probed.logits, strict=True))


def test_a_model_whose_layers_all_slide_has_nothing_to_show() -> None:
    model = FAMILIES["mistral_sliding"]()
    with imdc.patch(model, **TIGHT) as handle, imdc.probe(handle) as probe:
        greedy(model, token_ids(150))
    assert probe.result.places == (None,) * 3 and int(probe.result.pairs.sum()) == 0
    assert probe.result.to_dict()["survival"][-1] == [None] * len(probe.result.steps)
    with pytest.raises(IndexError, match="layer 1 has a sliding window"):
        probe.result.ages(1)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
@pytest.mark.parametrize("budget", ["uniform", "pyramid"])
def test_places_name_the_tokens_whose_keys_are_stored(backend: str, budget: str) -> None:
    """Keys of the first layer depend on token and position alone, so the unpatched model has the same ones."""
    if backend == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed")
    model, ids = FAMILIES["llama"](num_hidden_layers=2).to(DEVICE), token_ids(90).to(DEVICE)
    with torch.no_grad():
        own = getattr(model(ids, use_cache=True), hf.CACHE_NAME).layers[0].keys[0]
    options = {**GROWING, "memory_tokens": 24, "layer_budget": budget, "backend": backend}
    with imdc.patch(model, **options) as handle, imdc.probe(model) as probe:
        stored = by_hand(model, handle, ids).layers[0].keys[0]
    places = probe.result.places[0]
    assert places is not None and places.shape == stored.shape[:2] and places.unique().numel() > places.shape[1]
    torch.testing.assert_close(stored.cpu(), own.cpu().gather(1, places[..., None].expand(-1, -1, 16)))


def assert_sink_recent(result: imdc.ProbeResult, report: PrefillReport | None, sinks: int) -> None:
    """Its rule: after every step the first tokens and the latest ones, as many as the memory holds."""
    assert_consistent(result, report)
    layers, heads = result.pairs.shape[1:3]
    for number, step in enumerate(result.steps):
        read = step.start + step.chunk_tokens
        kept = [*range(sinks), *range(read - step.memory_after + sinks, read)]
        bounds = [(one.start, one.start + one.chunk_tokens) for one in result.steps]
        counts = torch.tensor([0, *(sum(low <= place < high for place in kept) for low, high in bounds)])
        assert torch.equal(result.pairs[number + 1], counts.expand(layers, heads, -1))
        share = counts / counts.sum()
        torch.testing.assert_close(result.origins[number], share.double().expand(layers, -1))
    ages = [*range(result.prompt_tokens - 1, result.prompt_tokens - 1 - sinks, -1), *range(len(kept) - sinks)[::-1]]
    for layer in range(layers):
        assert torch.equal(result.ages(layer), torch.tensor(ages).expand(heads, -1))


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_latest_tokens_have_the_ages_of_their_rule(positions: str) -> None:
    model = FAMILIES["llama"]()
    options = {**GROWING, "observer": "sink_recent", "positions": positions}
    with imdc.patch(model, **options) as handle, imdc.probe(handle) as probe:
        greedy(model, token_ids(300))
        assert_sink_recent(probe.result, handle.report, sinks=2)


@pytest.mark.parametrize("options", [{"schedule": "full"}, {"memory_tokens": 400}])
def test_nothing_is_forgotten_where_nothing_is_dropped(options: dict[str, Any]) -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **{**TIGHT, **options}) as handle, imdc.probe(handle) as probe:
        greedy(model, token_ids(300))
    result, count = probe.result, len(probe.result.steps)
    assert count > 5
    read = torch.ones(count, count).tril().bool()[:, None].expand(-1, 3, -1)
    assert bool((result.survival[read] == 1).all()) and bool(result.survival[~read].isnan().all())
    assert bool((result.mass_kept == 1).all()) and bool((result.retention[1:] == 1).all())
    assert all(places is not None and torch.equal(places[0], torch.arange(300)) for places in result.places)


class Latest(AttentionObserver):
    """Keeps the latest keys, and notes what attention it saw, computed plainly in float64."""

    name, query_aware, rides_along = "latest", True, True

    def __init__(self, stride: int, model: Any) -> None:
        self.stride, self.noted = stride, {}  # type: ignore[var-annotated]
        attentions = [layer.self_attn for layer in model.model.layers]
        self.sinks = [getattr(attention, "sinks", torch.full((4,), float("-inf"))) for attention in attentions]

    def score(self, seen: Observation) -> Tensor:
        """The place of each key."""
        rows = (self.queries(seen.config, seen.chunk_tokens) or 0) if not seen.tail_rows else seen.tail_rows
        heads = seen.k.shape[1]
        q = seen.q[0, :, -rows:].double().unflatten(0, (heads, -1))
        logits = q @ seen.k[0, :, None].double().transpose(2, 3) * seen.scale
        future = torch.ones(rows, seen.k.shape[2]).triu(seen.k.shape[2] - rows + 1).bool()
        voting = list(range(rows - 1, -1, -self.stride))
        sinks = self.sinks[seen.layer].double().view(heads, -1, 1, 1).expand(-1, -1, rows, 1)
        logits = torch.cat((logits.masked_fill(future, float("-inf")), sinks), dim=-1)
        shares = logits.softmax(dim=-1)[:, :, voting, : seen.scored_keys]
        self.noted.setdefault((seen.step, seen.layer), []).append(shares.mean(dim=(1, 2)))
        return torch.arange(seen.scored_keys, dtype=torch.float32).expand(1, heads, -1).contiguous()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("questions", [None, (7,), (7, 4, 9)])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_mass_kept_is_the_share_of_the_observers_attention(
    family: str, stride: int, questions: tuple[int, ...] | None
) -> None:
    model = build(family, **({"layer_types": ["full_attention"] * 3} if family == "gpt_oss" else {}))
    observer = Latest(stride, model)
    asked = None if questions is None else [token_ids(length, seed=length) for length in questions]
    options = {**GROWING, "observer": observer, "observation_stride": stride, "observation_tokens": 6}
    with imdc.patch(model, **options) as handle, imdc.probe(handle) as probe:
        handle.read(token_ids(200), asked)
    result = probe.result
    # The last step has room for all that is there. read() asks a copy of the observer, which shares the notes.
    assert len(observer.noted) == 3 * (len(result.steps) - 1)
    assert bool((result.mass_kept[-1] == 1).all()) and float(result.mass_kept.min()) < 0.9
    for (number, layer), noted in observer.noted.items():
        assert len(noted) == len(questions or (1,))
        seen, keep = torch.stack(noted).mean(dim=0), result.steps[number].memory_after
        kept = seen[:, :2].sum() + seen[:, seen.shape[1] - keep + 2 :].sum()
        assert float(result.mass_kept[number, layer]) == pytest.approx(float(kept / seen.sum()), abs=1e-5)


def test_every_row_and_turn_has_a_result_of_its_own() -> None:
    model, ids = FAMILIES["llama"](), token_ids(300, rows=2, seed=1)
    mask = (torch.arange(300) >= torch.tensor([[0], [180]])).long()
    with imdc.patch(model, **GROWING) as handle:
        with imdc.probe(handle) as probe:
            both = greedy(model, ids, attention_mask=mask)
        assert handle.report is not None and handle.report.rows == 2
        assert [(one.row, one.prompt_tokens) for one in probe.results] == [(0, 300), (1, 120)]
        for row, result in enumerate(probe.results):
            with imdc.probe(handle) as alone:
                greedy(model, ids[row : row + 1, 300 - result.prompt_tokens :])
            assert torch.equal(alone.result.pairs, result.pairs)
        with imdc.probe(handle) as beams:
            model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=4, num_beams=3, pad_token_id=0)
        assert len(beams.results) == 1 and torch.equal(beams.result.pairs, probe.results[0].pairs)

        # A further turn: 64 pairs of the first one and what was answered since are one origin.
        history = torch.cat((both.sequences[:1], token_ids(80, seed=5)), dim=1)
        with imdc.probe(handle) as turn:
            first = greedy(model, ids[:1])
            greedy(model, history, **{hf.CACHE_NAME: getattr(first, hf.CACHE_NAME)})
        result = turn.result
        assert [one.row for one in turn.results] == [0, 0] and result.prompt_tokens == 81
        assert bool((result.pairs[0, :, :, 0] == 64 + 11).all()) and int(result.pairs[0, ..., 1:].sum()) == 0
        assert torch.equal(result.retention, reported(handle.report))
        assert bool((result.origins[-1, :, 0] > 0).all()) and bool((result.origins[-1, :, 0] < 1).all())
        assert int(result.ages(0).max()) == 81


@pytest.mark.parametrize("recall", ["none", "host"])
def test_a_question_about_a_document_drops_nothing(recall: str) -> None:
    model, ask = FAMILIES["llama"](), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with imdc.patch(model, recall=recall, layer_budget="entropy", **GROWING) as handle:
        with imdc.probe(handle) as probe:
            cache = handle.read(token_ids(300))
            answer = handle.ask(cache, token_ids(9, seed=1), **ask)
        assert torch.equal(handle.ask(cache, token_ids(9, seed=1), **ask), answer)
    document, question = probe.results
    assert document.prompt_tokens == 300 and float(document.retention[1:].min()) < 1
    assert question.prompt_tokens == 9 and bool((question.retention == 1).all())
    # What answers, also what was taken back in its place, is of an earlier turn.
    assert torch.equal(question.pairs[0, ..., 0], document.pairs[-1].sum(dim=2))


def test_a_reading_that_begins_again_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attend, failed = FAMILIES["llama"](), StepRun.attend, []

    def failing(run: StepRun, layer: int, *states: Tensor, **options: Any) -> Tensor:
        if run.step.index == 1 and layer == 1 and not failed:
            failed.append(layer)
            raise torch.OutOfMemoryError("no more")
        return attend(run, layer, *states, **options)

    monkeypatch.setattr(StepRun, "attend", failing)
    with imdc.patch(model, **{**GROWING, "chunk_tokens": 128}) as handle, imdc.probe(handle) as probe:
        with pytest.warns(RuntimeWarning, match="starts again"):
            by_hand(model, handle, token_ids(600))
        assert len(probe.results) == 1 and handle.report is not None and failed
        assert handle.report.restarts == 1
        assert_consistent(probe.result, handle.report)


def test_several_probes_and_none_after_their_block() -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **GROWING) as handle:
        with imdc.probe(handle) as outer:
            with imdc.probe(model) as inner:
                by_hand(model, handle, token_ids(150))
            by_hand(model, handle, token_ids(200))
        assert [len(outer.results), len(inner.results)] == [2, 1] and handle.probes == []
        with pytest.raises(KeyError), imdc.probe(handle) as broken:
            raise KeyError
        assert handle.probes == []
        with pytest.raises(UnsupportedCallError, match="no prefill of its model ended while it was on"):
            broken.result  # noqa: B018


def test_a_probe_needs_a_patched_model() -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(UnsupportedCallError, match=r"got LlamaForCausalLM; call imdc.patch\(model\) first"):
        imdc.probe(model)
    handle = imdc.patch(model, **TIGHT)
    handle.remove()
    with pytest.raises(UnsupportedCallError, match=r"probe\(\) of a handle whose patch was taken back"):
        imdc.probe(handle)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_model_keeps_what_the_rule_says(smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = smollm2
    ids = torch.tensor([tokenizer(reference_text()[:8_000]).input_ids[:1200]])
    options: dict[str, Any] = {"memory_tokens": 256, "chunk_tokens": 256}
    with imdc.patch(model, observer="sink_recent", **options) as handle, imdc.probe(handle) as probe:
        by_hand(model, handle, ids)
        assert_sink_recent(probe.result, handle.report, sinks=4)
        latest = probe.result.mass_kept
    with imdc.patch(model, **options) as handle, imdc.probe(handle) as probe:
        by_hand(model, handle, ids)
        assert_consistent(probe.result, handle.report)
    # Those that attention chose hold more of the attention than the latest ones do.
    assert float(probe.result.mass_kept.mean()) > float(latest.mean())
