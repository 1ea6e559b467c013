"""Tiny random models of every supported family, and the greedy call that most tests compare."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

_SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    # Out of the vocabulary: nothing stops a generation early.
    "eos_token_id": None,
    # Tied to the scaled embeddings of Gemma, a random head repeats its input whatever the cache holds.
    "tie_word_embeddings": False,
    # Of the usual 0.02, tiny random models attend almost evenly and would hide an exchanged key.
    "initializer_range": 0.2,
}

# Sizes of a real model, for what only plans.
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


def build(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model in eval mode; `overrides` go to its config."""
    name, _ = _CLASSES[family]
    config = getattr(transformers, f"{name}Config")(**{**TEXT_SHAPES[family], **overrides})
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    for layer in model.model.layers if family == "gpt_oss" else ():
        # As they begin, all near 0, they take little and the same of every head.
        torch.nn.init.normal_(layer.self_attn.sinks, std=3.0)
    return model.eval()


_SLIDING = {"sliding_window": 24}
_MIXED = {**_SLIDING, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Queries grow from the 33rd position on.
_SCALED = {
    "rope_type": "default",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 32,
    "llama_4_scaling_beta": 0.5,
}
_EXPERTS = {"num_experts_per_tok": 2}
# One layer without experts, then layers with a shared one.
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_sliding": ("Mistral", _SLIDING),
    "ministral3": ("Ministral3", {"rope_parameters": _SCALED}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    # transformers up to 5.17 at least picks sdpa, which drops the soft-cap without a word.
    "gemma2": ("Gemma2", {**_MIXED, "query_pre_attn_scalar": 16, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3Text", {**_MIXED, "query_pre_attn_scalar": 16}),
    "granite": ("Granite", {"attention_multiplier": 0.25}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _MIXED),
    "seed_oss": ("SeedOss", {}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "qwen3_moe": ("Qwen3Moe", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 64}),
    "mixtral": ("Mixtral", {**_EXPERTS, "num_local_experts": 4}),
    "gpt_oss": ("GptOss", {**_MIXED, **_EXPERTS, "num_local_experts": 4}),
    "gemma": ("Gemma", {}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96},
    ),
    "olmoe": ("Olmoe", {**_EXPERTS, "num_experts": 4}),
    "glm": ("Glm", {"attention_bias": True}),
    "glm4": ("Glm4", {"attention_bias": True}),
    "glm4_moe": ("Glm4Moe", {**_EXPERTS, **_ROUTED, "use_qk_norm": True, "attention_bias": True}),
    "minimax_m2": ("MiniMaxM2", {**_EXPERTS, "num_local_experts": 4, "rotary_dim": 8}),
    "ernie4_5": ("Ernie4_5", {}),
    "exaone4": ("Exaone4", _MIXED),
    "cohere": ("Cohere", {"logit_scale": 1.0, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**_MIXED, "logit_scale": 1.0}),
    "arcee": ("Arcee", {}),
}

# One of every kind that imdc treats in a way of its own: windows; keys that turn otherwise, in float32, in windows only
# or not at all; scaled queries, caps, sinks, a cache that the class drops, experts. What sets the others apart is among
# these, or lies between the attentions.
KINDS = (
    "llama",
    "mistral_sliding",
    "ministral3",
    "phi3",
    "gemma2",
    "gemma3",
    "smollm3",
    "qwen3_moe",
    "gpt_oss",
    "glm4",
    "olmo3",
    "cohere2",
)
# With layers of both kinds.
MIXED = tuple(family for family, (_, extra) in _CLASSES.items() if "layer_types" in extra)
# What their configs are made from.
TEXT_SHAPES = {family: {**_SHAPE, **extra} for family, (_, extra) in _CLASSES.items()}
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {family: functools.partial(build, family) for family in _CLASSES}


def two_layers(family: str) -> dict[str, Any]:
    """Overrides of a smaller model of a family, with a layer of either kind where it has both."""
    if family in MIXED:
        return {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    return {"num_hidden_layers": 2, **({"no_rope_layers": [1, 0]} if family == "smollm3" else {})}


def token_ids(length: int = 110, rows: int = 1, *, seed: int = 0) -> torch.Tensor:
    """Random tokens [rows, length] that no tiny model takes for padding or an end."""
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> GenerateDecoderOnlyOutput:
    """Twelve greedy tokens with their logits and the cache."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    output = model.generate(
        ids,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    assert isinstance(output, GenerateDecoderOnlyOutput)
    return output
