"""imdc.plan(): steps, tables, limits, what fits, and configs that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, LLAMA_8B

from imdc.config import PrefillConfig
from imdc.errors import ConfigError, UnsupportedCallError, UnsupportedModelError
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.fit import fit_chunk, largest_within, peak_bytes
from imdc.planner.plan import plan
from imdc.prefill.patch import patch
from imdc.units import GIB


@pytest.mark.parametrize("options", [{}, {"initial_memory": 0.25}, {"memory_tokens": 128}], ids=str)
def test_plan_of_a_model_is_what_the_prefill_does(options: dict[str, Any]) -> None:
    model = FAMILIES["llama"]()
    options = {"memory_tokens": 400, "chunk_tokens": 100, **options}
    made = plan(model, 1000, **options)
    ids = torch.randint(3, 128, (1, 1000))
    with patch(model, **options) as handle:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0)
        report = handle.report
    assert report is not None
    done = [(step.chunk_tokens, step.memory_before, step.memory_after) for step in report.steps]
    assert [(step.chunk_tokens, step.memory_before, step.memory_after) for step in made.steps] == done
    assert made.memory_bytes == report.kv_bytes
    assert made.backend == report.backend


def test_plan_reads_config_objects_shapes_and_models_alike() -> None:
    model = FAMILIES["qwen3"]()
    shape = ModelShape.from_config(model.config)
    by_config = plan(model.config, 500, memory_tokens=100)
    assert by_config.steps == plan(shape, 500, memory_tokens=100).steps
    assert by_config.backend == "triton"
    assert plan(model, 500, memory_tokens=100).backend == "sdpa"


def test_plan_prints_a_table() -> None:
    text = str(plan(SimpleNamespace(**LLAMA_8B), 131_072))
    lines = text.splitlines()
    assert lines[0] == (
        "llama, 32 layers, bfloat16: 131,072 tokens by 'imdc' in 64 steps, memory 4,096, mean chunk 2,048"
    )
    assert lines[1].split() == ["step", "from", "token", "chunk", "memory", "before", "after", "predicted", "peak"]
    assert lines[2].split()[:5] == ["0", "0", "2,048", "0", "1,024"]
    assert len({len(line) for line in lines[1:27]}) == 1
    assert "weights 15.0 GiB" in text
    assert "cache after the prefill 512 MiB, of the whole prompt 16.0 GiB" in text


def test_plan_as_numbers_survives_json() -> None:
    made = plan(SimpleNamespace(**LLAMA_8B), 10_000)
    values = json.loads(json.dumps(made.to_dict()))
    assert values["peak_bytes"] == made.peak_bytes
    assert values["steps"][1]["chunk_tokens"] == made.steps[1].chunk_tokens
    assert values["config"]["memory_tokens"] == 4096


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # Keys and values of 32 layers, each of 4,096 pairs with 2 KiB.
        ({"schedule": "imdc"}, "64.0 MiB"),
        ({"schedule": "im"}, "64.0 MiB"),
        # One size finds the blocks of the step before; a mebibyte and less is always split off; a CPU lends no blocks.
        ({"schedule": "fm"}, None),
        ({"memory_tokens": 512}, None),
        ({"device": "cpu"}, None),
    ],
)
def test_what_the_allocator_may_add_is_named(options: dict[str, Any], said: str | None) -> None:
    notes = plan(
        SimpleNamespace(**LLAMA_8B), 100_000, **{"memory_tokens": 4096, "chunk_tokens": 2048, **options}
    ).notes()
    wanted = f"note: up to {said} more, as PyTorch's allocator lends blocks that a growing memory does not fill"
    assert notes == ([] if said is None else [wanted])


@pytest.mark.parametrize(
    ("prompt", "positions", "compact"),
    [(131_072, "auto", False), (131_073, "auto", True), (1000, "compact", True), (200_000, "original", False)],
)
def test_positions_follow_the_trained_window(prompt: int, positions: str, compact: bool) -> None:
    assert plan(SimpleNamespace(**LLAMA_8B), prompt, positions=positions).compact is compact


def test_auto_takes_the_largest_chunk_within_the_limit() -> None:
    shape = ModelShape.from_config(SimpleNamespace(**LLAMA_8B))
    limit = 17 * GIB
    made = plan(shape, 200_000, chunk_tokens="auto", memory_limit=limit)
    chunk = int(made.config.chunk_tokens)
    assert made.peak_bytes <= limit
    assert peak_bytes(shape, Batch(200_000), PrefillConfig(chunk_tokens=round(chunk * 1.1)), "cuda") > limit
    share = plan(shape, 200_000, chunk_tokens="auto", memory_limit=0.5, device_bytes=2 * limit)
    assert share.config.chunk_tokens == chunk


def test_auto_refuses_what_cannot_fit() -> None:
    shape = ModelShape.from_config(SimpleNamespace(**LLAMA_8B))
    with pytest.raises(ConfigError, match=r"a limit of 15\.1 GiB is too small: it needs at least 15\.\d GiB"):
        fit_chunk(shape, Batch(200_000), PrefillConfig(chunk_tokens="auto", memory_limit=1), int(15.1 * GIB))
    with pytest.raises(ConfigError, match=r"memory_limit=0\.5 is a share of the device"):
        plan(shape, 1000, chunk_tokens="auto", memory_limit=0.5)


@pytest.mark.parametrize("limit", [*range(0, 120, 7), 1000])
def test_largest_within_finds_the_bound(limit: int) -> None:
    if limit < 20:
        with pytest.raises(ConfigError, match="needs at least 20 B for it"):
            largest_within(limit, lambda value: 2 * value, 10, 50, "it")
    else:
        assert largest_within(limit, lambda value: 2 * value, 10, 50, "it") == min(limit // 2, 50)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"hidden_size": None}, r"model type 'llama' has hidden_size=None"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn'"),
        ({"num_key_value_heads": "eight"}, "num_key_value_heads='eight'"),
        ({"num_key_value_heads": -8}, "num_key_value_heads=-8"),
        ({"num_key_value_heads": 5}, "no multiple of num_key_value_heads=5"),
        ({"head_dim": [128]}, r"head_dim=\[128\]"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings='long'"),
        ({"num_local_experts": "many"}, "num_local_experts='many'"),
        ({"sliding_window": "wide"}, "sliding_window='wide'"),
    ],
)
def test_unusable_configs_are_named(missing: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        plan(SimpleNamespace(**{**LLAMA_8B, **missing}), 100)


def test_config_in_parts_takes_what_the_whole_says() -> None:
    # As google/gemma-3-4b-it has it: transformers' defaults are left out, and the dtype stands outside.
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "sliding_window": 1024,
    }  # fmt: skip
    whole = SimpleNamespace(model_type="gemma3", torch_dtype="bfloat16", text_config=SimpleNamespace(**text))
    made = plan(whole, 32_000)
    assert (made.shape.dtype, made.shape.q_heads, made.shape.kv_heads, made.shape.head_dim) == ("bfloat16", 8, 4, 256)
    assert (made.shape.sliding_layers, made.shape.full_layers) == (29, 5)
    # As many as transformers makes for these entries.
    assert made.shape.parameters == 3_880_263_168
    assert "29 of 34 layers see a window of 1,024 tokens" in str(made)
    assert "such as a vision tower" in str(made)


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "mxfp4"}, 4),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 4),
        ({"quant_method": "mystery", "config_groups": [1]}, None),
    ],
)
def test_quantised_weights_are_not_counted_in_full(settings: dict[str, Any], bits: int | None) -> None:
    full = ModelShape.from_config(SimpleNamespace(**LLAMA_8B))
    made = plan(SimpleNamespace(**LLAMA_8B, quantization_config=settings), 1000)
    assert made.shape.weight_bits == bits
    if bits is None:
        assert made.shape.weights == full.weights
        return
    matrices = full.layers * full.layer_matrices
    assert bits / 8 * matrices < made.shape.weights - 2 * (full.parameters - matrices) < (bits + 1) / 8 * matrices
    assert f"weights of {bits} bits" in str(made)


def test_plan_says_where_patch_refuses_positions() -> None:
    model = FAMILIES["llama"]()
    window = model.config.max_position_embeddings
    for memory in (window // 2, window):
        made = plan(model, 2 * window, memory_tokens=memory, chunk_tokens=1024, schedule="fm")
        said = any("imdc.patch will refuse this" in note for note in made.notes())
        assert made.compact and said is (memory == window)
    ids = torch.randint(3, 128, (1, 2 * window))
    refusal = pytest.raises(UnsupportedCallError, match="the model was trained for")
    with patch(model, memory_tokens=window, chunk_tokens=1024, schedule="fm") as handle, refusal:
        model(ids, past_key_values=handle.new_cache(), logits_to_keep=1)


def test_plan_takes_where_a_config_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    wanted = plan(SimpleNamespace(**LLAMA_8B), 100_000).to_dict()
    for source in (tmp_path, str(tmp_path), str(tmp_path / "config.json")):
        assert plan(source, 100_000).to_dict() == wanted
    with pytest.raises(ConfigError, match="'./no-such-model' was not found"):
        plan("./no-such-model", 1000)
    with pytest.raises(ConfigError, match="model_or_config = None: must be a model"):
        plan(None, 1000)


def test_plan_says_what_patch_does_not_support() -> None:
    sizes = {"n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
    made = plan(SimpleNamespace(model_type="gpt2", **sizes), 1000)
    assert made.shape.intermediate == 3072
    assert "imdc.patch does not support 'gpt2'" in str(made)
    assert "note:" not in str(plan(SimpleNamespace(**LLAMA_8B), 1000))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_sees_the_windows_and_the_context_length_that_the_engine_uses(family: str) -> None:
    from imdc.model.parts import Parts

    model = FAMILIES[family]()
    parts, shape = Parts.of(model), ModelShape.from_config(model.config)
    assert shape.full_layers == len(parts.full_layers)
    assert {shape.window} == {window for window in parts.windows if window is not None} or not shape.sliding_layers
    assert shape.max_positions == parts.trained_window


def test_a_window_that_transformers_gives_another_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from imdc.model.parts import Parts

    model = FAMILIES["gemma3"]()
    monkeypatch.setattr("imdc.model.parts.layer_windows", lambda config, layers: (None,) * layers)
    with pytest.raises(UnsupportedModelError, match="layer 0 .* has a window of 24 in transformers' cache and of None"):
        Parts.of(model)


def test_rows_describe_kin_and_no_more() -> None:
    from imdc.model.families import describe

    assert describe("qwen3_next").qk_norm and describe("gemma3n_text").norms == 4
    assert describe("phimoe").gated and not describe("phi").gated
    assert describe("no_such_model").title == ""
