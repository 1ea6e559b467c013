"""Predicted bytes against measured ones, on tiny models of every family, and what must hold for any prediction."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

from imdc.config import MEASURED_BUDGETS, PrefillConfig
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.footprint import balanced_steps, memory_cost, predict, predict_unpatched
from imdc.profiler.measure import measure, measure_unpatched
from imdc.schedule import attention_pairs, build_steps

NAMED = ("llama", "mistral", "qwen2", "qwen3", "phi3")
OTHERS = tuple(family for family in FAMILIES if family not in NAMED)
LLAMA_8B = ModelShape(
    family="llama", layers=32, hidden=4096, intermediate=14336, q_heads=32, kv_heads=8, head_dim=128, vocab=128256,
    max_positions=131072, rotary=128, dtype="bfloat16", dtype_bytes=2,
)  # fmt: skip


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", NAMED)
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_tokens": 120, "initial_memory": 0.25},
        {"chunk_tokens": 60, "memory_tokens": 300, "schedule": "fm"},
        {"chunk_tokens": 300, "memory_tokens": 100, "positions": "compact", "initial_memory": 0.25},
    ],
    ids=["imdc", "fm", "compact"],
)
def test_prediction_is_the_measured_peak(family: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    model = FAMILIES[family]().to(dtype)
    measured = measure(model, prompt(1200), PrefillConfig(**{"memory_tokens": 200, **options}))
    assert measured.backend == "sdpa"
    assert measured.error == pytest.approx(0.0, abs=0.01)
    assert max(abs(step.error) for step in measured.steps) < 0.02


@pytest.mark.parametrize("family", OTHERS)
def test_prediction_is_close_for_the_other_families(family: str) -> None:
    model = FAMILIES[family]().to(torch.bfloat16)
    measured = measure(model, prompt(1200), PrefillConfig(memory_tokens=200, chunk_tokens=120, initial_memory=0.25))
    assert measured.error == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("family", ["olmo2", "ernie4_5", "cohere", "cohere2", "exaone4"])
def test_prediction_knows_keys_that_turn_otherwise_or_not(family: str) -> None:
    config = PrefillConfig(chunk_tokens=40, memory_tokens=400, positions="compact", schedule="fm")
    measured = measure(FAMILIES[family]().to(torch.bfloat16), prompt(1200), config)
    assert measured.error == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "minimax_m2"])
def test_prediction_knows_experts_narrower_than_what_they_give(family: str) -> None:
    width = "intermediate_size" if family in ("mixtral", "minimax_m2") else "moe_intermediate_size"
    model = FAMILIES[family](**{width: 16}).to(torch.bfloat16)
    measured = measure(model, prompt(1200), PrefillConfig(memory_tokens=200, chunk_tokens=120, initial_memory=0.25))
    assert measured.error == pytest.approx(0.0, abs=0.06)


@pytest.mark.parametrize("observer", ["window", "all_queries", "key_diff", "sink_recent", "random"])
def test_prediction_knows_the_observers(observer: str) -> None:
    model = FAMILIES["llama"]().to(torch.bfloat16)
    config = PrefillConfig(memory_tokens=300, chunk_tokens=60, schedule="fm", observer=observer)
    measured = measure(model, prompt(1000), config)
    assert measured.error == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"schedule": "full"}], ids=["reference", "full"])
def test_prediction_knows_backend_and_schedule(options: dict[str, Any]) -> None:
    model = FAMILIES["llama"]()
    measured = measure(
        model, prompt(1000), PrefillConfig(memory_tokens=200, chunk_tokens=100, initial_memory=0.25, **options)
    )
    assert measured.error == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"schedule": "fm", "memory_tokens": 100}, {"positions": "compact"}, {"backend": "reference"}],
    ids=["imdc", "fm", "compact", "reference"],
)
def test_prediction_knows_a_pyramid_of_layers(family: str, options: dict[str, Any]) -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = FAMILIES[family](num_hidden_layers=4, **({"layer_types": types} if family == "gemma3" else {}))
    config = PrefillConfig(**{"memory_tokens": 200, "chunk_tokens": 120, "layer_budget": "pyramid", **options})
    measured = measure(model, prompt(1200), config)
    assert measured.error == pytest.approx(0.0, abs=0.03)
    assert measured.error != measure(model, prompt(1200), replace(config, layer_budget="uniform")).error


@pytest.mark.parametrize("budget", MEASURED_BUDGETS)
def test_prediction_bounds_layers_that_are_measured(budget: str) -> None:
    """Which layer becomes the fullest is measured, so the plan takes one that holds as much as any may."""
    config = PrefillConfig(memory_tokens=200, chunk_tokens=120, layer_budget=budget)
    measured = measure(FAMILIES["llama"](num_hidden_layers=4), prompt(1200), config)
    assert all(step.error >= -0.01 for step in measured.steps) and measured.error < 0.35


@pytest.mark.parametrize("family", NAMED)
def test_unpatched_prediction_is_the_measured_peak(family: str) -> None:
    measured = measure_unpatched(FAMILIES[family](), prompt(1000))
    assert measured.error == pytest.approx(0.0, abs=0.02)


def test_flops_are_those_that_torch_counts() -> None:
    model = FAMILIES["qwen3"](attn_implementation="eager")
    shape, tokens = ModelShape.from_model(model), 50
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(prompt(tokens), logits_to_keep=1)
    # Eager attention multiplies the whole square, the prediction only what is seen.
    config = PrefillConfig(schedule="full", chunk_tokens=tokens)
    steps = build_steps(tokens, config)
    unseen = tokens**2 - attention_pairs(steps)
    predicted = predict(shape, config, steps)[0].flops
    expected = predicted + 4 * shape.q_heads * shape.head_dim * unseen * shape.layers
    # Earlier releases make the rotary tables by a matrix product: a multiply-add per pair of head dimensions.
    assert counter.get_total_flops() in (expected, expected + tokens * shape.head_dim)


@pytest.mark.parametrize("schedule", ["imdc", "im", "fm"])
def test_memory_counts_every_layer_and_head(schedule: str) -> None:
    config = PrefillConfig(schedule=schedule, memory_tokens=4096, chunk_tokens=2048)
    last = predict(LLAMA_8B, config, build_steps(32_768, config))[-1]
    kept = 32 * 8 * 128 * 2 * 2 * 4096
    layer = kept // 32
    assert kept - layer <= last.memory <= kept + layer


def test_peak_rises_with_chunk_and_memory() -> None:
    def peak(**options: int) -> int:
        config = PrefillConfig(**{"memory_tokens": 2048, "chunk_tokens": 1024, **options})  # type: ignore[arg-type]
        return max(step.above_weights for step in predict(LLAMA_8B, config, build_steps(65_536, config)))

    assert peak(chunk_tokens=512) < peak() < peak(chunk_tokens=2048)
    assert peak(memory_tokens=1024) < peak() < peak(memory_tokens=4096)


@pytest.mark.parametrize(("tokens", "chunk"), [(8192, 512), (16_384, 1024), (131_072, 4096)])
def test_imdc_takes_less_than_fm_and_bytes_balance_better_than_tokens(tokens: int, chunk: int) -> None:
    """At M = 1.8 C the peak above the weights falls by 23.3 per cent, the paper's figure, when bytes are balanced."""
    config = PrefillConfig(memory_tokens=round(1.8 * chunk), chunk_tokens=chunk)

    def peak(**options: Any) -> int:
        chosen = replace(config, **options)
        steps = balanced_steps(LLAMA_8B, tokens, chosen)
        return max(step.above_weights for step in predict(LLAMA_8B, chosen, steps))

    fm, by_tokens, by_bytes = peak(schedule="fm"), peak(), peak(balance="bytes")
    assert by_bytes < by_tokens < fm
    assert 1 - by_bytes / fm > 0.233


def test_balanced_steps_are_the_papers_where_tokens_are_balanced() -> None:
    config = PrefillConfig(memory_tokens=2048, chunk_tokens=1024)
    assert balanced_steps(LLAMA_8B, 32_768, config) == build_steps(32_768, config)
    equal = replace(config, schedule="im", balance="bytes")
    assert balanced_steps(LLAMA_8B, 32_768, equal) == build_steps(32_768, equal)
    weighed = replace(config, balance="bytes")
    cost = memory_cost(LLAMA_8B, weighed, 512)
    expected = build_steps(32_768, weighed, stored_tokens=700, chunk_tokens=512, cost=cost)
    assert balanced_steps(LLAMA_8B, 32_768, weighed, stored_tokens=700, chunk_tokens=512) == expected


def test_memory_cost_is_the_ratio_of_bytes() -> None:
    config = PrefillConfig(memory_tokens=4096, chunk_tokens=2048)
    cost = memory_cost(LLAMA_8B, config, 2048)
    pair = 2 * 8 * 128 * 2
    # A chunk token holds four states and three MLP rows, its place in the workspace, tables, id and position.
    token = 2 * (4 * 4096 + 3 * 14336) + pair + 2 * 2 * 128 + 16
    assert cost.after == pytest.approx(32 * pair / token)
    assert cost.before == pytest.approx(pair / token)


def test_moved_bytes_are_those_of_the_weights_that_are_touched() -> None:
    config = PrefillConfig(observer="window", chunk_tokens=64, memory_tokens=512)

    def moved(shape: ModelShape, chunk: int) -> int:
        steps = build_steps(chunk, replace(config, chunk_tokens=chunk))
        (step,) = predict(shape, config, steps)
        return step.moved_bytes - chunk * shape.layers * shape.kv_bytes_per_token

    layers = LLAMA_8B.layers * LLAMA_8B.layer_parameters
    assert moved(LLAMA_8B, 64) == 2 * layers
    mixture = replace(LLAMA_8B, experts=8, experts_per_token=2)
    # One token reaches two of eight experts, four reach all.
    assert moved(mixture, 4) == 2 * mixture.layers * mixture.layer_parameters
    assert moved(mixture, 1) == 2 * mixture.layers * (mixture.layer_parameters - 6 * mixture.expert_parameters)
    halved = replace(LLAMA_8B, weight_bytes=LLAMA_8B.weights - layers)
    assert moved(halved, 64) == layers


def test_unpatched_peak_holds_the_whole_cache() -> None:
    step = predict_unpatched(LLAMA_8B, Batch(100_000))
    assert step.memory == 100_000 * LLAMA_8B.layers * LLAMA_8B.kv_bytes_per_token
    assert step.workspace < 100_000 * 1000
    assert step.total_bytes == step.weights + step.above_weights


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_from_the_config_are_those_of_the_model(family: str) -> None:
    model = FAMILIES[family]()
    shape = ModelShape.from_config(model.config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_tied_weights_count_once() -> None:
    model = FAMILIES["llama"](tie_word_embeddings=True)
    shape = ModelShape.from_model(model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert shape.tied
    assert shape.weights == shape.parameters * 4 + buffers


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("chunk", "memory"), [(256, 512), (512, 922)])
def test_prediction_is_the_measured_peak_of_smollm2(smollm2: Any, data_dir: Any, chunk: int, memory: int) -> None:
    model, tokenizer = smollm2
    text = (data_dir / "books" / "dracula.txt").read_text(encoding="utf-8")[:12_000]
    ids = torch.tensor([tokenizer(text).input_ids[:2048]])
    assert ids.shape[1] == 2048
    measured = measure(model, ids, PrefillConfig(chunk_tokens=chunk, memory_tokens=memory))
    assert measured.error == pytest.approx(0.0, abs=0.01)
