"""The model families that imdc can prefill: one table row each. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from imdc.errors import UnsupportedModelError, did_you_mean


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one architecture apart.

    Attributes:
        model_type: `config.model_type` of transformers.
        title: the name people know it by.
        rope_by_layer_type: the rotary module takes the layer type (Gemma 3 has two bases).
        rope_flag: attribute of an attention module that is false where the layer has no rotary embedding.
        drops_cache: `prepare_inputs_for_generation` of the class drops the KV cache of a text beyond some length.
    """

    model_type: str
    title: str
    rope_by_layer_type: bool = False
    rope_flag: str | None = None
    drops_cache: bool = False


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama, SmolLM2"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2, Qwen2.5"),
        Family("qwen3", "Qwen3"),
        Family("phi3", "Phi-3, Phi-4", drops_cache=True),
        Family("gemma2", "Gemma 2"),
        Family("gemma3_text", "Gemma 3 (text)", rope_by_layer_type=True),
        Family("granite", "Granite"),
        Family("olmo2", "OLMo 2"),
        Family("smollm3", "SmolLM3", rope_flag="use_rope"),
        Family("qwen3_moe", "Qwen3-MoE"),
        Family("mixtral", "Mixtral"),
    )
}


def supported() -> str:
    """All supported families in one line, for messages."""
    return ", ".join(f"{family.title} ({family.model_type})" for family in FAMILIES.values())


def family_of(config: Any) -> Family:
    """The table row of a transformers config.

    Raises:
        UnsupportedModelError: the architecture is not in the table, or is an encoder-decoder.
    """
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"model_type={model_type!r} is an encoder-decoder; imdc prefills decoder-only models: {supported()}"
        )
    if model_type not in FAMILIES:
        hint = did_you_mean(str(model_type), FAMILIES)
        raise UnsupportedModelError(f"model_type={model_type!r} is not supported.{hint} Supported: {supported()}")
    return FAMILIES[model_type]
