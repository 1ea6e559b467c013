"""The parts of a loaded model that the engine drives, and where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from imdc.errors import UnsupportedModelError
from imdc.model import hf
from imdc.model.backend_rule import AttentionTraits
from imdc.model.config_terms import layer_windows, trained_window
from imdc.model.families import Family, family_of


class Tables(NamedTuple):
    """What `rotate` turns heads by, in the order of its arguments.

    Attributes:
        cos: cosines [T, R] of the positions of T tokens, of R dimensions.
        sin: sines, as `cos`.
        interleaved: which dimensions turn together, see `imdc.kernels.reference.rotate`.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def at(self, places: Tensor | slice) -> Tables:
        """Those of some of the tokens."""
        return self._replace(cos=self.cos[places], sin=self.sin[places])


@dataclass(slots=True)
class Parts:
    """The parts of a causal language model that the engine drives.

    Attributes:
        model: the model with its LM head.
        decoder: the model without it.
        config: the config that the decoder and its attention modules read.
        family: its table row.
        rotary_layers: per layer, whether it rotates queries and keys.
        layer_types: per layer, the key of its rotary base, None where all share one.
        windows: per layer, the sliding window in tokens, None for full attention.
    """

    model: PreTrainedModel
    decoder: Any
    config: Any
    family: Family
    rotary_layers: tuple[bool, ...]
    layer_types: tuple[str | None, ...]
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parts:
        """Find the parts of `model`.

        Raises:
            UnsupportedModelError: `model` is not a causal language model of a supported family.
        """
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedModelError(
                f"model is a {type(model).__name__}, not a transformers PreTrainedModel; pass the loaded causal model"
                f"{', such as model.get_base_model()' if hasattr(model, 'get_base_model') else ''}"
            )
        family = family_of(model.config)
        decoder: Any = getattr(model, "model", None)
        layers = getattr(decoder, "layers", None)
        if model.get_output_embeddings() is None or not isinstance(decoder, nn.Module) or layers is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no language-model head over a decoder; load it with AutoModelForCausalLM"
            )
        config: Any = decoder.config
        if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
            # transformers 5.17 drops the cap there without a word, 5.23 raises at the first token.
            raise UnsupportedModelError(
                "attn_implementation='sdpa' cannot cap logits as this model does; load it with "
                "attn_implementation='eager'"
            )
        if trained_window(config) is None:
            raise UnsupportedModelError(
                f"the config of model_type={config.model_type!r} has no max_position_embeddings; set it to the "
                f"context length that the model was trained for"
            )
        attentions: list[Any] = [layer.self_attn for layer in layers]
        return cls(
            model=model,
            decoder=decoder,
            config=config,
            family=family,
            rotary_layers=tuple(family.rotates(attention) for attention in attentions),
            layer_types=tuple(
                config.layer_types[number] if family.rope_by_layer_type else None for number in range(len(layers))
            ),
            windows=_windows(config, len(layers)),
        )

    @property
    def full_layers(self) -> list[int]:
        """Layers that attend to everything, whose memory is compressed."""
        return [layer for layer, window in enumerate(self.windows) if window is None]

    @property
    def rope_type(self) -> str:
        """The kind of rotary embedding, "default" where the config names none for all layers."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        return str(rope.get("rope_type") or "default")

    @property
    def trained_window(self) -> int:
        """Positions that the model was trained for."""
        window = trained_window(self.config)
        assert window is not None, "checked in `of`"
        return window

    @property
    def caps_logits(self) -> bool:
        """Whether attention logits are capped (Gemma 2)."""
        return getattr(self.config, "attn_logit_softcapping", None) is not None

    @property
    def traits(self) -> AttentionTraits:
        """What its attention asks of a backend, where its weights are now."""
        attention: Any = self.decoder.layers[0].self_attn
        return AttentionTraits(
            self.device().type,
            str(self.decoder.get_input_embeddings().weight.dtype).removeprefix("torch."),
            int(attention.head_dim),
            softcap=self.caps_logits,
            sinks=self.family.sinks,
            windowed=any(self.windows),
        )

    def layer_of(self, module: nn.Module) -> int | None:
        """The number of the layer whose attention module is `module`; None for those of other models."""
        layers: Any = self.decoder.layers
        number: Any = getattr(module, "layer_idx", None)
        known = number is not None and number < len(layers) and layers[number].self_attn is module
        return int(number) if known else None

    def is_compressed(self, module: nn.Module) -> bool:
        """Whether `module` is an attention module of the model, of a layer that is compressed."""
        layer = self.layer_of(module)
        return layer is not None and self.windows[layer] is None

    def device(self, layer: int | None = None) -> torch.device:
        """Where a layer computes, or the embedding, which takes the token ids; also while weights are offloaded."""
        module = self.decoder.get_input_embeddings() if layer is None else self.decoder.layers[layer]
        return hf.execution_device(module)

    def rotary(self, layer: int, positions: Tensor, dtype: torch.dtype) -> Tables | None:
        """Tables of `positions` (int64 [T]) for keys of `dtype`, without attention scaling; None where nothing turns.

        The scaling of long-context variants (YaRN) is already in the canonical keys, which the model computes at
        position 0.
        """
        if not self.rotary_layers[layer]:
            return None
        module: Any = self.decoder.rotary_emb
        kind = self.layer_types[layer]
        probe = torch.empty(0, dtype=torch.float32, device=positions.device)
        if kind is None:
            cos, sin = module(probe, positions[None])
            scaling = getattr(module, "attention_scaling", 1.0)
        else:
            cos, sin = module(probe, positions[None], kind)
            scaling = getattr(module, f"{kind}_attention_scaling", 1.0)
        if scaling != 1.0:
            cos, sin = cos / scaling, sin / scaling
        family = self.family
        if family.half_rotary:
            cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((sin, sin), dim=-1)
        elif family.interleaved and not family.interleaved_tables:
            cos, sin = (x[..., : x.shape[-1] // 2].repeat_interleave(2, dim=-1) for x in (cos, sin))
        if not family.float_tables:
            cos, sin = cos.to(dtype), sin.to(dtype)
        if family.float_rotary:
            cos, sin = cos.float(), sin.float()
        return Tables(cos[0], sin[0], family.interleaved)

    def query_scale(self, positions: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Factor [T, 1] on queries at `positions` (int64 [T]), as Ministral 3 applies it; None where there is none.

        1 + beta log(1 + floor(position / original window)), 1 at position 0, where canonical queries are computed.
        """
        if not self.family.scaled_queries:
            return None
        rope: Any = self.config.rope_parameters
        passed = torch.floor(positions / float(rope["original_max_position_embeddings"]))
        return torch.log(1 + passed).mul_(float(rope["llama_4_scaling_beta"])).add_(1)[:, None].to(dtype)


def _windows(config: Any, count: int) -> tuple[int | None, ...]:
    """Per layer the sliding window, as a plan sees it; transformers' own cache must see the same.

    Raises:
        UnsupportedModelError: a layer keeps another kind of state (linear attention, chunked attention), or
            transformers' cache gives it another window.
    """
    windows, own = layer_windows(config, count), hf.sliding_windows(config, count)
    if own != windows:
        number = next(number for number in range(count) if own[number] != windows[number])
        raise UnsupportedModelError(
            f"layer {number} of model_type={config.model_type!r} has a window of {own[number]} in transformers' cache "
            f"and of {windows[number]} by its config; imdc does not know this version's rule for it"
        )
    return windows
