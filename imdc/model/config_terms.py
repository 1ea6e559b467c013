"""What the entries of a config mean for the model, by the rules of transformers' own classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from imdc.model.config_file import size_of
from imdc.model.families import describe


def default_of(config: Any, name: str, default: Any) -> Any:
    """An entry of a config, or `default` where it is left out or None."""
    value = getattr(config, name, None)
    return default if value is None else value


def _rope_entry(config: Any, *names: str) -> Any:
    """An entry of the rotary settings, where they are one mapping for all layers."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    entries = rope if isinstance(rope, Mapping) else {}
    return next((entries[name] for name in names if entries.get(name) is not None), None)


def trained_window(config: Any) -> int | None:
    """Positions that a model was trained for; None where its config does not say."""
    family = str(getattr(config, "model_type", "unknown"))
    window = size_of(config, family, "max_position_embeddings", "n_positions", default=0)
    if _rope_entry(config, "rope_type", "type") == "longrope":
        # The short factors, which hold for all positions of a bounded memory, end here.
        original = _rope_entry(config, "original_max_position_embeddings")
        window = original or getattr(config, "original_max_position_embeddings", None) or window
    return int(window) if window else None


def rotary_width(config: Any, head_dim: int) -> int:
    """Dimensions of a head that rotary embedding turns."""
    share = _rope_entry(config, "partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    # MiniMax-M2 names the dimensions instead.
    width = getattr(config, "rotary_dim", None)
    return int(head_dim * float(share)) if share is not None else head_dim if width is None else int(width)


def shared_width(config: Any, family: str) -> int:
    """Width of the MLP of a mixture that every token passes."""
    count = size_of(config, family, "n_shared_experts", default=0)
    each = size_of(config, family, "moe_intermediate_size", default=0)
    return count * each or size_of(config, family, "shared_expert_intermediate_size", default=0)


def dense_layers(config: Any, layers: int) -> int:
    """Layers of a mixture without experts, by the rules of DeepSeek's and Qwen's configs."""
    first = getattr(config, "first_k_dense_replace", None) or 0
    named, every = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", None) or 1
    return sum(layer < first or layer in named or (layer + 1) % every != 0 for layer in range(layers))


def layer_windows(config: Any, layers: int) -> tuple[int | None, ...]:
    """Per layer its sliding window in tokens, None for full attention, by the rules of transformers' own caches."""
    family = str(getattr(config, "model_type", "unknown"))
    row = describe(family)
    window = size_of(config, family, "sliding_window", default=0)
    kinds = getattr(config, "layer_types", None)
    if not window:
        slides = [False] * layers
    elif isinstance(kinds, (list, tuple)):
        slides = ["sliding" in str(kind) for kind in kinds]
    elif not default_of(config, "use_sliding_window", not row.opt_in_window):
        slides = [False] * layers
    else:
        pattern = getattr(config, "sliding_window_pattern", None)
        # EXAONE 4 spells it out, beside `layer_types`.
        pattern = pattern if isinstance(pattern, int) and pattern else row.window_pattern
        skipped = getattr(config, "max_window_layers", None) or 0
        slides = [(layer + 1) % pattern != 0 if pattern else layer >= skipped for layer in range(layers)]
    return tuple(window if slide else None for slide in slides)
