"""What a call of a patched model asks for, and what is refused before anything happens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from imdc.errors import UnsupportedCallError
from imdc.model import hf
from imdc.model.parts import Parts

# Arguments of forward; the first three may also be asked for by the model's config.
_REFUSED = ("output_attentions", "output_hidden_states", "output_router_logits", "labels", "inputs_embeds")
# transformers' own default where neither a length nor a number of new tokens is named.
_DEFAULT_NEW_TOKENS = 20


@dataclass(slots=True)
class GenerateRequest:
    """One generate() call.

    Attributes:
        arguments: of the call by name, without the KV cache.
        cache: the KV cache of the call, None where it names none.
        defaults: the model's own options, which hold where the call does not say otherwise.
    """

    arguments: dict[str, Any]
    cache: Any
    defaults: GenerationConfig

    @classmethod
    def of(cls, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerateRequest:
        """The request that the arguments of `model.generate` make."""
        arguments = bind(GenerationMixin.generate, model, args, kwargs)
        caches = [cache for name in hf.CACHE_NAMES if (cache := arguments.pop(name, None)) is not None]
        return cls(arguments, caches[0] if caches else None, model.generation_config)

    def asked(self, name: str) -> Any:
        """An option of generation by transformers' precedence: the call's own, its config's, the model's."""
        if name in self.arguments:
            return self.arguments[name]
        value = getattr(self.arguments.get("generation_config"), name, None)
        return getattr(self.defaults, name, None) if value is None else value

    @property
    def input_ids(self) -> Tensor | None:
        """The prompt, int64 [B, T]; None where transformers begins with the start token alone."""
        inputs = self.arguments.get("inputs")
        ids: Tensor | None = self.arguments.get("input_ids") if inputs is None else inputs
        return ids

    @property
    def columns(self) -> int:
        """Columns of the conversation so far: of the attention mask, or of the prompt where there is none."""
        mask, ids = self.arguments.get("attention_mask"), self.input_ids
        return int(mask.shape[-1]) if mask is not None else 1 if ids is None else int(ids.shape[-1])

    @property
    def assistant(self) -> Any:
        """The assistant model, if there is one."""
        return self.arguments.get("assistant_model")

    @property
    def assisted(self) -> bool:
        """Whether candidates are drafted, by an assistant or from the prompt."""
        return self.assistant is not None or self.asked("prompt_lookup_num_tokens") is not None

    @property
    def drafting(self) -> bool:
        """Whether the model drafts for another one."""
        return bool(getattr(self.arguments.get("generation_config"), "is_assistant", False))

    @property
    def new_tokens(self) -> int:
        """Tokens that are generated at most."""
        wanted, length = self.asked("max_new_tokens"), self.asked("max_length")
        if wanted is not None:
            return int(wanted)
        return _DEFAULT_NEW_TOKENS if length is None else max(0, int(length) - self.columns)

    @property
    def copies(self) -> int:
        """Rows that generate() makes of each prompt: beams, or several answers."""
        return max(int(self.asked(name) or 1) for name in ("num_beams", "num_return_sequences"))

    def without_cache_choice(self) -> dict[str, Any]:
        """The arguments, with no choice of a cache left: imdc hands over its own.

        Some checkpoints name a cache in their generation_config.json, which no caller asked for.
        """
        config = self.arguments.get("generation_config")
        named = (self.arguments.get("cache_implementation"), getattr(config, "cache_implementation", None))
        if named == (None, None) and self.defaults.cache_implementation is None:
            return self.arguments
        return {**self.arguments, "cache_implementation": None}


def bind(
    function: Callable[..., Any], model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a method of `model` by name, those that only its **kwargs takes included."""
    bound = inspect.signature(function).bind_partial(model, *args, **kwargs).arguments
    named = dict(list(bound.items())[1:])
    return {**named, **named.pop("kwargs", {})}


def check_generate(request: GenerateRequest) -> None:
    """Refuse what imdc cannot do; nothing is done by half.

    Raises:
        UnsupportedCallError: an option that needs another cache, attention matrices or embeddings.
    """
    chosen = request.arguments.get("cache_implementation")
    if chosen is None:
        chosen = getattr(request.arguments.get("generation_config"), "cache_implementation", None)
    if chosen == "paged":
        refuse_continuous_batching()
    cached = request.asked("use_cache")
    refused = {
        # None counts as unset in a config only; as an argument it is taken as False.
        "use_cache": (
            not cached and (cached is not None or "use_cache" in request.arguments),
            "the memory is a KV cache; leave use_cache=True",
        ),
        "output_attentions": (bool(request.asked("output_attentions")), "no attention matrix is built; leave it off"),
        "output_hidden_states": (
            bool(request.asked("output_hidden_states")),
            "only the last chunk's exist; leave it off",
        ),
        "prefill_chunk_size": (
            request.asked("prefill_chunk_size") is not None,
            "imdc chunks the prompt itself; set chunk_tokens in imdc.patch()",
        ),
        "use_mtp": (bool(request.asked("use_mtp")), "only the last chunk's hidden states exist; leave it off"),
        "assistant_early_exit": (
            request.asked("assistant_early_exit") is not None,
            "the memory has all layers; use prompt_lookup_num_tokens or an assistant_model",
        ),
    }
    for name, (wrong, remedy) in refused.items():
        if wrong:
            raise UnsupportedCallError(f"{name}={request.asked(name)!r} is not supported: {remedy}")
    if chosen not in (None, "dynamic", request.defaults.cache_implementation):
        raise UnsupportedCallError(
            f"cache_implementation={chosen!r} is not supported: imdc brings its own cache; leave it unset"
        )
    if request.arguments.get("inputs_embeds") is not None:
        raise UnsupportedCallError("inputs_embeds is not supported: observers re-read token ids; pass input_ids")
    ids = request.input_ids
    if ids is not None:
        check_ids(ids)


def check_forward(named: dict[str, Any], config: Any, cache_name: str) -> None:
    """Refuse arguments of a forward call with an imdc cache that it cannot honour.

    Args:
        named: the arguments, without the cache.
        config: of the decoder, whose defaults hold where the call does not say otherwise.
        cache_name: what the model calls its cache.

    Raises:
        UnsupportedCallError: the message names argument and remedy.
    """
    for name in _REFUSED:
        value = named.get(name)
        if value is not None and value is not False:
            raise UnsupportedCallError(f"{name} is not supported with an imdc cache; leave it out")
        if value is None and name.startswith("output_") and getattr(config, name, False):
            raise UnsupportedCallError(
                f"config.{name}=True is not supported with an imdc cache: only the last chunk's exist; set it to False"
            )
    if named.get("use_cache") is False:
        raise UnsupportedCallError(f"use_cache=False contradicts {cache_name}, an imdc cache; leave one of them out")
    check_ids(named.get("input_ids"))


def check_ids(input_ids: Any) -> None:
    """Refuse a prompt that is no batch of token ids.

    Raises:
        UnsupportedCallError: not a tensor [batch, tokens], or without a token.
    """
    if not isinstance(input_ids, Tensor):
        raise UnsupportedCallError(
            f"input_ids is {type(input_ids).__name__}: imdc reads token ids; pass a tensor [batch, tokens]"
        )
    if input_ids.ndim != 2:
        raise UnsupportedCallError(
            f"input_ids has shape {tuple(input_ids.shape)}; pass [batch, tokens], such as input_ids[None]"
        )
    if input_ids.numel() == 0:
        raise UnsupportedCallError(f"input_ids has shape {tuple(input_ids.shape)}: an empty prompt; pass a token")


def check_prompt_learning(model: PreTrainedModel) -> None:
    """Refuse PEFT's prompt learning, which hands the model KV pairs of its own.

    Raises:
        UnsupportedCallError: prefix tuning, prompt tuning or p-tuning is active.
    """
    owner = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", None)
    config = getattr(owner, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        raise UnsupportedCallError(
            f"{type(config).__name__} is prompt learning, whose virtual tokens live in a KV cache of its own; imdc "
            f"supports adapters of weights such as LoRA"
        )


def refuse_continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """Stand in for `init_continuous_batching`, which would attend to whole prompts in paged blocks of its own.

    Raises:
        UnsupportedCallError: always.
    """
    raise UnsupportedCallError(
        "continuous batching (generate_batch, or cache_implementation='paged') is not supported: it brings its own "
        "paged cache; call generate() without it, or remove the patch first"
    )


def check_masks(parts: Parts) -> set[str]:
    """The names of a model's attention implementations, where each layer can be given a mask of its own.

    Raises:
        UnsupportedCallError: one of them takes masks of a form that is not known here.
    """
    names = hf.attention_implementations(layer.self_attn for layer in parts.decoder.layers)
    unknown = sorted(names - {"eager", "sdpa"})
    if unknown:
        raise UnsupportedCallError(
            f"layers that store different numbers of KV pairs decode with attn_implementation 'sdpa' or 'eager', and "
            f"the model has {unknown[0]!r}; load it with one of those, or take layer_budget='uniform'"
        )
    return names
