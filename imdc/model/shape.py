"""The sizes of a decoder-only model that its memory and arithmetic follow from, read from its config alone.

Works on any object with the attributes of a transformers config (or a namespace made from config.json), so that a plan
needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from imdc.errors import UnsupportedModelError
from imdc.model.config_file import attention_is_quantised, completed, size_of, weight_bits
from imdc.model.families import describe

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "float": 4}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of one model.

    Attributes:
        family: the config's `model_type`.
        layers: decoder layers, of which `sliding_layers` see a window of `window` keys only and are not compressed.
        hidden: width H of the residual stream.
        intermediate: width I of the MLP (of one expert, in a mixture).
        q_heads: query heads Hq.
        kv_heads: KV heads Hkv.
        head_dim: head size D.
        vocab: rows of the embedding.
        max_positions: the trained window in tokens; None where the config does not say.
        rotary: head dimensions that rotary embedding turns, R <= D.
        dtype: name of the weights' type.
        dtype_bytes: bytes per weight and per activation.
        tied: the output head shares the embedding.
        gated: the MLP has a gate and an up projection (SwiGLU) rather than one.
        fused: gate and up are one matrix, and so are queries, keys and values (Phi-3); a result lives as long as any
            part of it.
        experts: experts per MLP; 1 for a dense model.
        experts_per_token: experts that each token passes.
        qkv_bias: query, key and value projections have a bias.
        biased: all matrices of a layer have biases, those of its experts and its router included.
        qk_norm: queries and keys are normalised per head.
        softcap: attention logits are capped (Gemma 2), which fused attention cannot do.
        sinks: attention sinks, one logit per query head (gpt-oss).
        post_norm: norms follow attention and MLP instead of preceding them (OLMo 2).
        float_rotary: rotary embedding works in float32 whatever the dtype (OLMo 2).
        rotary_bases: sets of rotary tables; sliding layers of Gemma 3 have their own.
        norms_per_layer: RMS norms per layer besides those of queries and keys.
        weight_bits: bits per weight of the layers' matrices where the checkpoint is quantised, else None.
        attention_quantised: whether these include attention's, and the router's of a mixture.
        text_part_of: `model_type` of a config that has other parts too, such as a vision tower, which are not counted.
        weight_bytes: bytes of all parameters, as counted from a loaded model; None computes them from the sizes.
    """

    family: str
    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int | None = None
    rotary: int = 0
    dtype: str = "float32"
    dtype_bytes: int = 4
    sliding_layers: int = 0
    window: int | None = None
    tied: bool = False
    gated: bool = True
    fused: bool = False
    experts: int = 1
    experts_per_token: int = 1
    qkv_bias: bool = False
    biased: bool = False
    qk_norm: bool = False
    softcap: bool = False
    sinks: bool = False
    post_norm: bool = False
    float_rotary: bool = False
    rotary_bases: int = 1
    norms_per_layer: int = 2
    weight_bits: int | None = None
    attention_quantised: bool = True
    text_part_of: str | None = None
    weight_bytes: int | None = None

    @property
    def full_layers(self) -> int:
        """Layers that attend to everything, whose memory is compressed."""
        return self.layers - self.sliding_layers

    @property
    def expert_parameters(self) -> int:
        """Parameters of one MLP, or of one expert of a mixture."""
        return (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def layer_matrices(self) -> int:
        """Parameters of one decoder layer that are matrices, over which a token is multiplied."""
        q_width, kv_width = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (q_width + 2 * kv_width) + q_width * self.hidden
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + self.expert_parameters * self.experts + router

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        q_width, kv_width = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        biases = (q_width + 2 * kv_width) * (self.qkv_bias or self.biased) + self.q_heads * self.sinks
        if self.biased:
            expert = (2 if self.gated else 1) * self.intermediate + self.hidden
            biases += self.hidden + expert * self.experts + (self.experts if self.experts > 1 else 0)
        # OLMo 2 normalises all heads of a token at once, the others each head by itself.
        head_norms = (q_width + kv_width if self.post_norm else 2 * self.head_dim) * self.qk_norm
        return self.layer_matrices + biases + head_norms + self.norms_per_layer * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_parameters + embeddings + self.hidden

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        layer = self.layer_matrices if self.attention_quantised else self.expert_parameters * self.experts
        matrices = self.layers * layer if self.weight_bits else 0
        # Scales and zero points of groups of 64 or 128 weights take about a quarter of a bit per weight.
        quantised = matrices * (4 * (self.weight_bits or 0) + 1) // 32
        return (self.parameters - matrices) * self.dtype_bytes + quantised

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token's key and value take in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype_bytes

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """The shape that a transformers config describes (its text part, where it has several).

        Raises:
            UnsupportedModelError: not a decoder-only transformer, or a size is missing.
        """
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError("the model is an encoder-decoder; imdc reads prompts of decoder-only models")
        whole = str(config.model_type) if getattr(config, "text_config", None) is not None else None
        config, family = completed(config)
        row = describe(family)
        q_heads = size_of(config, family, "num_attention_heads", "n_head")
        hidden = size_of(config, family, "hidden_size", "n_embd")
        head_dim = size_of(config, family, "head_dim", default=hidden // q_heads)
        kv_heads = size_of(config, family, "num_key_value_heads", default=q_heads)
        if q_heads % kv_heads:
            raise UnsupportedModelError(
                f"the config of model type {family!r} has num_attention_heads={q_heads}, which is no multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
        layers = size_of(config, family, "num_hidden_layers", "n_layer")
        dtype = _dtype_name(config)
        windows = [window for window in layer_windows(config, layers) if window is not None]
        experts = size_of(config, family, "num_local_experts", "num_experts", "n_routed_experts", default=1)
        widths = (*(("moe_intermediate_size",) if experts > 1 else ()), "intermediate_size", "n_inner")
        return cls(
            family=family,
            layers=layers,
            hidden=hidden,
            intermediate=size_of(config, family, *widths, default=hidden * row.mlp_factor if row.mlp_factor else None),
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=size_of(config, family, "vocab_size"),
            max_positions=trained_window(config),
            rotary=int(head_dim * _partial_rotary(config, rope)),
            dtype=dtype,
            dtype_bytes=DTYPE_BYTES[dtype],
            sliding_layers=len(windows),
            window=windows[0] if windows else None,
            tied=bool(_default(config, "tie_word_embeddings", row.tied)),
            gated=row.gated,
            fused=row.fused,
            experts=experts,
            experts_per_token=size_of(config, family, "num_experts_per_tok", default=1),
            qkv_bias=bool(_default(config, "attention_bias", False)) or row.qkv_bias,
            biased=row.biased,
            qk_norm=row.qk_norm,
            softcap=getattr(config, "attn_logit_softcapping", None) is not None,
            sinks=row.sinks,
            post_norm=row.post_norm,
            float_rotary=row.float_rotary,
            rotary_bases=1 + row.rope_by_layer_type,
            weight_bits=weight_bits(config),
            attention_quantised=attention_is_quantised(config),
            text_part_of=whole,
            norms_per_layer=row.norms,
        )

    @classmethod
    def from_model(cls, model: Any) -> ModelShape:
        """The shape of a loaded model, with the bytes its parameters and buffers really take."""
        storages: dict[int, int] = {}
        tensors: Iterable[Any] = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            storages[tensor.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
        shape = cls.from_config(model.config)
        # What the embedding gives runs through the model, also where its other weights are quantised.
        dtype = _dtype_name(model.get_input_embeddings().weight)
        return replace(shape, weight_bytes=sum(storages.values()), dtype=dtype, dtype_bytes=DTYPE_BYTES[dtype])


def _default(config: Any, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value


def _rope_entry(rope: Any, *names: str) -> Any:
    """An entry of the rotary settings, where they are one mapping for all layers."""
    entries = rope if isinstance(rope, Mapping) else {}
    return next((entries[name] for name in names if entries.get(name) is not None), None)


def trained_window(config: Any) -> int | None:
    """Positions that a model was trained for; None where its config does not say."""
    family = str(getattr(config, "model_type", "unknown"))
    window = size_of(config, family, "max_position_embeddings", "n_positions", default=0)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if _rope_entry(rope, "rope_type", "type") == "longrope":
        # The short factors, which hold for all positions of a bounded memory, end here.
        original = _rope_entry(rope, "original_max_position_embeddings")
        window = original or getattr(config, "original_max_position_embeddings", None) or window
    return int(window) if window else None


def _partial_rotary(config: Any, rope: Any) -> float:
    share = _rope_entry(rope, "partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return 1.0 if share is None else float(share)


def _dtype_name(source: Any) -> str:
    """Name of the `dtype` of a config or tensor."""
    value = getattr(source, "dtype", None)
    if value is None:
        value = getattr(source, "torch_dtype", None)
    name = "float32" if value is None else str(value).rpartition(".")[2]
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"the model has dtype {name!r}; a plan knows {', '.join(sorted(DTYPE_BYTES))}")
    return name


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
    elif not _default(config, "use_sliding_window", not row.opt_in_window):
        slides = [False] * layers
    else:
        pattern = getattr(config, "sliding_window_pattern", None) or row.window_pattern
        skipped = getattr(config, "max_window_layers", None) or 0
        slides = [(layer + 1) % pattern != 0 if pattern else layer >= skipped for layer in range(layers)]
    return tuple(window if slide else None for slide in slides)
