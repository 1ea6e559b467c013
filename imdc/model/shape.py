"""The sizes of a decoder-only model that its memory and arithmetic follow from, read from its config alone.

Works on any object with the attributes of a transformers config (or a namespace made from config.json), so that a plan
needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from imdc.errors import UnsupportedModelError
from imdc.model.config_file import attention_is_quantised, completed, size_of, weight_bits
from imdc.model.config_terms import default_of, dense_layers, layer_windows, rotary_width, shared_width, trained_window
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
        fused_mlp: gate and up are one matrix.
        experts: experts per MLP; 1 for a dense model.
        experts_per_token: experts that each token passes.
        shared: width of the MLP that every token passes besides its experts (GLM-4.5).
        shared_gate: a gate weighs what that MLP gives (Qwen2-MoE).
        float_routing: what experts give is weighed in float32 (Mixtral, GLM-4.5, MiniMax-M2).
        dense_layers: layers of a mixture that have one MLP, of width `dense`, in place of experts.
        dense: see `dense_layers`.
        qkv_bias: query, key and value projections have a bias.
        biased: all matrices of a layer have biases, those of its experts and its router included.
        qk_norm: queries and keys are normalised per head.
        wide_qk_norm: all heads of a token are normalised at once instead (OLMo 2, MiniMax-M2).
        softcap: attention logits are capped (Gemma 2), which fused attention cannot do.
        sinks: attention sinks, one logit per query head (gpt-oss).
        post_norm: norms follow attention and MLP instead of preceding them (OLMo 2).
        float_rotary: where rotary embedding works in float32 whatever the dtype (OLMo 2), the bytes that it takes per
            element of the queries.
        turns_in_windows: layers that see everything have no rotary embedding (EXAONE 4, Command A).
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
    fused_mlp: bool = False
    experts: int = 1
    experts_per_token: int = 1
    shared: int = 0
    shared_gate: bool = False
    float_routing: bool = False
    dense_layers: int = 0
    dense: int = 0
    qkv_bias: bool = False
    biased: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    softcap: bool = False
    sinks: bool = False
    post_norm: bool = False
    float_rotary: int = 0
    turns_in_windows: bool = False
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
        return self._mlp(self.intermediate)

    @property
    def layer_matrices(self) -> int:
        """Parameters of one decoder layer that are matrices, over which a token is multiplied; see `less_when_dense`.

        Those of a mixture's layer with experts.
        """
        q_width, kv_width = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (q_width + 2 * kv_width) + q_width * self.hidden
        return attention + self._mixture(self.experts)

    def less_when_dense(self, experts: int) -> int:
        """What all layers without experts have less than `layer_matrices`, of whose experts so many count."""
        return self.dense_layers * (self._mixture(experts) - self._mlp(self.dense))

    def _mlp(self, width: int) -> int:
        return (3 if self.gated else 2) * self.hidden * width

    def _mixture(self, experts: int) -> int:
        """Parameters of so many experts and of what goes with them."""
        router = self.hidden * (self.experts + self.shared_gate) if self.experts > 1 else 0
        return self.expert_parameters * experts + self._mlp(self.shared) + router

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        q_width, kv_width = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        biases = (q_width + 2 * kv_width) * (self.qkv_bias or self.biased) + self.q_heads * self.sinks
        if self.biased:
            expert = (2 if self.gated else 1) * self.intermediate + self.hidden
            biases += self.hidden + expert * self.experts + (self.experts if self.experts > 1 else 0)
        head_norms = (q_width + kv_width if self.wide_qk_norm else 2 * self.head_dim) * self.qk_norm
        return self.layer_matrices + biases + head_norms + self.norms_per_layer * self.hidden

    @property
    def all_layers_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return self.layers * self.layer_parameters - self.less_when_dense(self.experts)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.all_layers_parameters + embeddings + self.hidden

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        if self.weight_bytes is not None:
            return self.weight_bytes
        layer = self.layer_matrices if self.attention_quantised else self.expert_parameters * self.experts
        matrices = self.layers * layer - self.less_when_dense(self.experts) if self.weight_bits else 0
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
            rotary=rotary_width(config, head_dim),
            dtype=dtype,
            dtype_bytes=DTYPE_BYTES[dtype],
            sliding_layers=len(windows),
            window=windows[0] if windows else None,
            tied=bool(default_of(config, "tie_word_embeddings", row.tied)),
            gated=row.gated,
            fused=row.fused,
            fused_mlp=row.fused or row.fused_mlp,
            experts=experts,
            experts_per_token=size_of(config, family, "num_experts_per_tok", default=1),
            shared=shared_width(config, family) if experts > 1 else 0,
            shared_gate=row.shared_gate,
            float_routing=row.float_routing,
            dense_layers=dense_layers(config, layers) if experts > 1 else 0,
            dense=size_of(config, family, "intermediate_size", default=0),
            qkv_bias=bool(default_of(config, "attention_bias", False)) or row.qkv_bias,
            biased=row.biased,
            qk_norm=bool(default_of(config, "use_qk_norm", row.qk_norm)),
            wide_qk_norm=row.wide_qk_norm,
            softcap=getattr(config, "attn_logit_softcapping", None) is not None,
            sinks=row.sinks,
            post_norm=row.post_norm,
            float_rotary=row.float_rotary,
            turns_in_windows=row.turns_in_windows and bool(getattr(config, "sliding_window", None)),
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


def _dtype_name(source: Any) -> str:
    """Name of the `dtype` of a config or tensor."""
    value = getattr(source, "dtype", None)
    if value is None:
        value = getattr(source, "torch_dtype", None)
    name = "float32" if value is None else str(value).rpartition(".")[2]
    if name not in DTYPE_BYTES:
        raise UnsupportedModelError(f"the model has dtype {name!r}; a plan knows {', '.join(sorted(DTYPE_BYTES))}")
    return name
