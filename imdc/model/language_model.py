"""The language model inside a model that also reads images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from imdc.errors import UnsupportedModelError
from imdc.model import hf
from imdc.model.families import IMAGE_READERS, supported


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model inside one that also reads images, such as Gemma 3 of 4B and up, for prompts of text.

    It shares its weights and its generation config with `model`, and gives the logits that `model` gives for text.
    `model` itself is left as it is; once nothing holds it, the memory of its vision tower is free.

    Args:
        model: of a family that the README lists, loaded by transformers; one that reads nothing but text is returned
            as it is.

    Raises:
        UnsupportedModelError: another model that reads images, or its parts are not where they are expected.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "text_config", None) is None:
        return model
    decoder: Any = getattr(getattr(model, "model", None), "language_model", None)
    head = model.get_output_embeddings()
    if config.model_type not in IMAGE_READERS or decoder is None or head is None:
        raise UnsupportedModelError(
            f"model_type={config.model_type!r} has no language model that imdc knows how to take out; those of "
            f"{', '.join(IMAGE_READERS)} can be. Supported: {supported()}"
        )
    with torch.device("meta"):
        # A copy, since its dtype is written to it.
        made: Any = AutoModelForCausalLM.from_config(copy.deepcopy(decoder.config), dtype=model.dtype)
    if type(made.model) is not type(decoder):
        raise UnsupportedModelError(
            f"the language model in {type(model).__name__} is a {type(decoder).__name__}, and "
            f"{type(made).__name__} has a {type(made.model).__name__}"
        )
    # One config for both, as in a model that was loaded so: its attention modules read the decoder's.
    made.config, made.model, made.lm_head = decoder.config, decoder, head
    made.generation_config, made.name_or_path = model.generation_config, model.name_or_path
    hf.take_hook(model, made)
    found: PreTrainedModel = made.train(model.training)
    return found
