"""What sets each architecture apart, one table row each: what imdc can prefill, and what a plan can describe.

The rows hold what a config leaves unsaid: a config.json leaves out what equals the default of its config class, and
these classes differ. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from imdc.errors import UnsupportedModelError, did_you_mean


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one architecture apart.

    Attributes:
        model_type: `config.model_type` of transformers.
        title: the name people know it by; empty for what `imdc.plan` describes and `imdc.patch` does not support.
        and_kin: the row also describes model types without a row whose name begins with this one's.
        rope_by_layer_type: the rotary module takes the layer type (Gemma 3 has two bases).
        rotates: whether the layer of an attention module has rotary embedding.
        turns_in_windows: only sliding layers have it where the config names a window; the same for plans.
        drops_cache: `prepare_inputs_for_generation` of the class drops the KV cache of a text beyond some length.
        float_rotary: where rotary embedding works in float32 whatever the dtype, the bytes that it takes per element of
            the queries at its peak.
        float_tables: the rotary module keeps its cosines and sines in float32 too.
        half_rotary: the rotary module gives the cosine and sine of each angle once, not once per half of a head.
        interleaved: rotary embedding turns neighbouring dimensions together, not those half a head apart.
        interleaved_tables: the rotary module gives the cosine and sine of each angle twice in a row.
        scaled_queries: queries grow with their position, see `imdc.model.parts.Parts.query_scale`.
        sinks: attention sinks, a learned logit per query head; see `imdc.prefill.softmax`.
        tied: the output head shares the embedding unless the config says otherwise.
        qkv_bias: query, key and value projections have a bias, also where the config does not say so.
        biased: all matrices of a layer have biases.
        qk_norm: queries and keys are normalised per head, unless the config says otherwise.
        wide_qk_norm: all heads of a token are normalised at once instead.
        norms: RMS norms per layer besides those of queries and keys.
        post_norm: norms follow attention and MLP instead of preceding them.
        fused: gate and up are one matrix, and so are queries, keys and values.
        fused_mlp: gate and up are one matrix.
        shared_gate: a gate weighs what the shared expert of a mixture gives.
        float_routing: what the experts of a mixture give is weighed in float32.
        gated: the MLP has a gate and an up projection rather than one.
        mlp_factor: width of the MLP in hidden sizes where the config does not say; None where it always does.
        opt_in_window: a sliding window counts only with `use_sliding_window`.
        window_pattern: every n-th layer sees everything, where the config is older than `layer_types`.
        gguf: llama.cpp's name of the architecture where it is another one.
        missing: entries that a plan needs and config.json files in use leave out.
    """

    model_type: str
    title: str = ""
    and_kin: bool = False
    rope_by_layer_type: bool = False
    rotates: Callable[[Any], bool] = lambda attention: True
    turns_in_windows: bool = False
    drops_cache: bool = False
    float_rotary: int = 0
    float_tables: bool = False
    half_rotary: bool = False
    interleaved: bool = False
    interleaved_tables: bool = False
    scaled_queries: bool = False
    sinks: bool = False
    tied: bool = False
    qkv_bias: bool = False
    biased: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    norms: int = 2
    post_norm: bool = False
    fused: bool = False
    fused_mlp: bool = False
    shared_gate: bool = False
    float_routing: bool = False
    gated: bool = True
    mlp_factor: int | None = None
    opt_in_window: bool = False
    window_pattern: int | None = None
    gguf: str | None = None
    missing: Mapping[str, Any] = field(default_factory=dict)


# google/gemma-3-4b-it leaves these out; from transformers' Gemma3TextConfig.
_GEMMA3 = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}

_ROWS = (
    Family("llama", "Llama, SmolLM2"),
    Family("mistral", "Mistral"),
    Family("ministral3", "Ministral 3", scaled_queries=True),
    Family("qwen2", "Qwen2, Qwen2.5", and_kin=True, qkv_bias=True, opt_in_window=True),
    Family("qwen3", "Qwen3", and_kin=True, qk_norm=True, opt_in_window=True),
    Family("phi3", "Phi-3, Phi-4", drops_cache=True, fused=True),
    Family("gemma2", "Gemma 2", tied=True, norms=4, window_pattern=2),
    Family(
        "gemma3_text",
        "Gemma 3 (text)",
        rope_by_layer_type=True,
        tied=True,
        qk_norm=True,
        norms=4,
        window_pattern=6,
        gguf="gemma3",
        missing=_GEMMA3,
    ),
    Family("granite", "Granite"),
    Family("olmo2", "OLMo 2", float_rotary=12, float_tables=True, qk_norm=True, wide_qk_norm=True, post_norm=True),
    Family(
        "olmo3",
        "OLMo 3",
        rope_by_layer_type=True,
        float_rotary=12,
        float_tables=True,
        qk_norm=True,
        wide_qk_norm=True,
        post_norm=True,
        window_pattern=4,
    ),
    Family("seed_oss", "Seed-OSS", qkv_bias=True),
    Family("smollm3", "SmolLM3", rotates=lambda attention: bool(attention.use_rope)),
    Family("qwen3_moe", "Qwen3-MoE", qk_norm=True, opt_in_window=True, gguf="qwen3moe"),
    Family("mixtral", "Mixtral", float_routing=True),
    Family(
        "gpt_oss",
        "gpt-oss",
        half_rotary=True,
        sinks=True,
        biased=True,
        window_pattern=2,
        gguf="gpt-oss",
        # Of openai/gpt-oss-20b and -120b.
        missing={"dtype": "bfloat16"},
    ),
    Family("gemma", "Gemma", and_kin=True, tied=True),
    Family("qwen2_moe", "Qwen2-MoE", qkv_bias=True, opt_in_window=True, shared_gate=True, gguf="qwen2moe"),
    Family("olmoe", "OLMoE", qk_norm=True, wide_qk_norm=True),
    Family("glm", "GLM-4-9B", interleaved=True, fused_mlp=True),
    Family("glm4", "GLM-4-0414", interleaved=True, norms=4, fused_mlp=True),
    Family("glm4_moe", "GLM-4.5", float_routing=True),
    Family("minimax_m2", "MiniMax-M2", qk_norm=True, wide_qk_norm=True, float_routing=True),
    Family("ernie4_5", "ERNIE 4.5", interleaved=True, float_rotary=14, float_tables=True, tied=True),
    Family(
        "exaone4",
        "EXAONE 4",
        rotates=lambda attention: attention.sliding_window is None or attention.is_sliding,
        turns_in_windows=True,
        qk_norm=True,
        post_norm=True,
        window_pattern=4,
    ),
    Family(
        "cohere",
        "Command R",
        and_kin=True,
        interleaved=True,
        interleaved_tables=True,
        float_rotary=16,
        tied=True,
        wide_qk_norm=True,
        norms=1,
    ),
    Family(
        "cohere2",
        "Command A, Command R7B",
        rotates=lambda attention: attention.sliding_window is not None,
        turns_in_windows=True,
        interleaved=True,
        interleaved_tables=True,
        float_rotary=16,
        tied=True,
        norms=1,
        window_pattern=4,
    ),
    Family("arcee", "AFM", gated=False),
    # Described in plans only.
    Family("gemma3", and_kin=True, tied=True, qk_norm=True, norms=4),
    Family("gpt2", tied=True, gated=False, mlp_factor=4),
    *(Family(name, gated=False) for name in ("gpt_neox", "phi", "starcoder2", "falcon", "opt", "bloom", "mpt")),
)
_KNOWN = {row.model_type: row for row in _ROWS}
FAMILIES: dict[str, Family] = {name: row for name, row in _KNOWN.items() if row.title}
# Models of images and text whose language model is of a supported family; see `imdc.language_model`.
IMAGE_READERS = ("gemma3", "mistral3")
GGUF_NAMES = {row.gguf: row.model_type for row in _ROWS if row.gguf}


def describe(model_type: str) -> Family:
    """The row of a model type, that of its next kin, or one without any quirk."""
    if model_type in _KNOWN:
        return _KNOWN[model_type]
    kin = [row for row in _ROWS if row.and_kin and model_type.startswith(row.model_type)]
    return max(kin, key=lambda row: len(row.model_type), default=Family(model_type))


def supported() -> str:
    """All supported families in one line, for messages."""
    return ", ".join(f"{family.title} ({family.model_type})" for family in FAMILIES.values())


def family_of(config: Any) -> Family:
    """The table row of a transformers config.

    Raises:
        UnsupportedModelError: the architecture is not supported, is an encoder-decoder, or reads images too.
    """
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model_type={model_type!r} is an encoder-decoder; imdc prefills decoder-only models: {supported()}"
        )
    if model_type in IMAGE_READERS:
        raise UnsupportedModelError(
            f"model_type={model_type!r} also reads images; prefill with the language model in it, which shares its "
            f"weights: model = imdc.language_model(model)"
        )
    if model_type not in FAMILIES:
        hint = did_you_mean(str(model_type), FAMILIES)
        raise UnsupportedModelError(f"model_type={model_type!r} is not supported.{hint} Supported: {supported()}")
    return FAMILIES[model_type]
