"""explain(): which backend and positions a prefill would use, and why."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from imdc.config import PrefillConfig, resolve_config
from imdc.model.parts import Parts
from imdc.positions import fitted
from imdc.prefill.engine import Engine


def explain(model: PreTrainedModel, config: PrefillConfig | None = None, **options: Any) -> str:
    """What `imdc.patch(model, config, **options)` would choose for this model where it is now.

    Returns:
        A few lines: the family, the backend and why, the compressed and the sliding layers, and the positions.

    Raises:
        UnsupportedModelError: the architecture is not supported.
        ConfigError: an option does not work, or the backend that is asked for cannot serve the model.
    """
    chosen = resolve_config(config, **options)
    parts = Parts.of(model)
    _, why = Engine(parts, chosen, model.forward).backend()
    full = len(parts.full_layers)
    lines = [
        f"family: {parts.family.title}",
        f"backend: {why}",
        f"layers: {full} compressed, {len(parts.windows) - full} with a sliding window of their own",
    ]
    if chosen.positions == "auto" and full:
        lines.append(f"positions: original up to {parts.trained_window} tokens of prompt and answer, compact beyond")
    else:
        lines.append(f"positions: {chosen.positions if full else 'original'}")
    if chosen.positions != "original" and full:
        sizes = fitted(chosen, parts.trained_window)
        lines.append(f"compact positions: memory_tokens={sizes.memory_tokens}, chunk_tokens={sizes.chunk_tokens}")
    return "\n".join(lines)
