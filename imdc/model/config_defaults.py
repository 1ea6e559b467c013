"""What a model's config leaves out, or says in one of several ways; needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imdc.errors import UnsupportedModelError

# What a plan needs and config.json of google/gemma-3-4b-it leaves out; from transformers' Gemma3TextConfig.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    }
}
# A config of several parts may say these once, for all of them.
_SHARED = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
# The rows of `imdc.model.families`, which needs torch; a test holds them together.
SUPPORTED = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text", "granite", "olmo2", "smollm3"),
    *("qwen3_moe", "mixtral"),
)


def completed(config: Any) -> tuple[Any, str]:
    """The text part of a config with what it leaves out, and its `model_type`."""
    text = getattr(config, "text_config", None)
    text = config if text is None else text
    family = str(getattr(text, "model_type", "unknown"))
    shared = {name: getattr(config, name, None) for name in _SHARED}
    return _Completed(text, {**_DEFAULTS.get(family, {}), **shared}), family


class _Completed:
    """A config whose missing entries, or those that are None, come from a mapping."""

    def __init__(self, config: Any, missing: Mapping[str, Any]) -> None:
        self._config, self._missing = config, missing

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name, None)
        return self._missing.get(name) if value is None else value


def weight_bits(config: Any) -> int | None:
    """Bits per weight that the `quantization_config` of a config.json names, by the ways of the common formats."""
    quantised = getattr(config, "quantization_config", None)
    if not isinstance(quantised, Mapping):
        return None
    bits = 4 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else quantised.get("bits")
    # compressed-tensors names them for groups of layers; the first one is that of the matrices.
    groups = quantised.get("config_groups")
    for group in groups.values() if bits is None and isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if bits is None and isinstance(weights, Mapping) else bits
    if bits is None and "fp8" in str(quantised.get("quant_method")):
        return 8
    return bits if isinstance(bits, int) and 1 <= bits <= 8 else None


def size_of(config: Any, family: str, *names: str, default: int | None = None) -> int:
    """The first of the entries that is there; `default`, where there is one, stands for what is left out or 0.

    Raises:
        UnsupportedModelError: it is no positive int.
    """
    value = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if default is not None and not value:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModelError(
            f"the config of model type {family!r} has {names[0]}={value!r}; a plan needs it as a positive int"
        )
    return value
