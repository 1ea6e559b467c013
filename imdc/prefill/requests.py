"""What a `generate()` call may ask of a patched model, and what is refused before anything happens."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from imdc.errors import UnsupportedCallError


def check_generate(options: GenerationConfig, model_kwargs: dict[str, Any], defaults: GenerationConfig) -> None:
    """Refuse what imdc cannot honour; nothing is ever honoured by half.

    Args:
        options: of this call, as transformers has merged them; the choice of a cache is taken out.
        model_kwargs: what the call passes to the model.
        defaults: the model's own options. Some checkpoints (Gemma) name a cache there, which no caller asked for.

    Raises:
        UnsupportedCallError: an option that needs another cache, attention matrices or embeddings.
    """
    caches = [None, "dynamic", defaults.cache_implementation]
    if options.is_assistant:
        # transformers before 5.14 asks an assistant for full layers, to take tokens back; imdc's layers all can.
        caches.append("dynamic_full")
    refused = {
        "use_cache": (options.use_cache is False, "the memory is a KV cache; leave use_cache=True"),
        "output_attentions": (options.output_attentions, "no attention matrix is ever built; leave it off"),
        "output_hidden_states": (options.output_hidden_states, "only the last chunk's exist; leave it off"),
        "prefill_chunk_size": (
            options.prefill_chunk_size is not None,
            "imdc chunks the prompt itself; set chunk_tokens in imdc.patch()",
        ),
        "cache_implementation": (
            options.cache_implementation not in caches,
            "imdc brings its own cache; leave cache_implementation unset",
        ),
        "assistant_early_exit": (
            options.assistant_early_exit is not None,
            "the memory has all layers; use prompt_lookup_num_tokens or an assistant_model",
        ),
    }
    for name, (wrong, remedy) in refused.items():
        if wrong:
            raise UnsupportedCallError(f"{name}={getattr(options, name)!r} is not supported: {remedy}")
    options.cache_implementation = None
    if model_kwargs.get("inputs_embeds") is not None:
        raise UnsupportedCallError("inputs_embeds is not supported: observers re-read token ids; pass input_ids")


def check_history(held: int, given: int) -> None:
    """Refuse a turn whose text ends before what the cache holds; transformers would read only a part of it.

    Args:
        held: tokens of earlier turns that the cache has seen.
        given: columns of the call's attention mask, or of its input_ids.

    Raises:
        UnsupportedCallError: the call has nothing new.
    """
    if given <= held:
        raise UnsupportedCallError(
            f"the call speaks of {given} tokens, past_key_values already holds {held}; pass the whole conversation as "
            f"input_ids, or the new tokens with an attention_mask for the whole conversation"
        )


def check_positions(named: dict[str, Any]) -> None:
    """Refuse position_ids of the caller's own: those that do not count the tokens of a prompt one by one.

    Args:
        named: the arguments of a forward call that reads a prompt.

    Raises:
        UnsupportedCallError: positions that imdc would replace by its own.
    """
    positions, mask = named.get("position_ids"), named.get("attention_mask")
    if positions is None:
        return
    steps = positions.diff() == 1
    if mask is not None and mask.ndim == 2 and mask.shape[1] >= positions.shape[-1]:
        real = mask[:, -positions.shape[-1] :].to(positions.device).bool()
        steps = steps | ~(real[:, 1:] & real[:, :-1])
    if not bool(steps.all()):
        row, column = (~steps).nonzero()[0].tolist()
        pair = positions.expand(steps.shape[0], -1)[row, column : column + 2].tolist()
        raise UnsupportedCallError(
            f"position_ids go from {pair[0]} to {pair[1]} in row {row}: imdc numbers prompt and memory itself, one by "
            f"one; leave position_ids out"
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
