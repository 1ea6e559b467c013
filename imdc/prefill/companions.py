"""What generate() has read beside the prompt by other means than imdc: a negative prompt, an assistant's text."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from imdc.errors import UnsupportedCallError
from imdc.prefill.engine import Engine
from imdc.prefill.requests import GenerateRequest


def check_guidance(engine: Engine, request: GenerateRequest) -> None:
    """Refuse classifier-free guidance whose second prompt would grow too long: transformers reads it on its own.

    Raises:
        UnsupportedCallError: memory and chunk hold less than that.
    """
    scale = request.asked("guidance_scale")
    if scale is None or scale == 1:
        return
    negative = request.arguments.get("negative_prompt_ids")
    tokens = (1 if negative is None else int(negative.shape[-1])) + request.new_tokens
    limit = engine.exceeded(tokens)
    if limit is not None:
        raise UnsupportedCallError(
            f"guidance_scale={scale} reads negative_prompt_ids without imdc: {tokens} tokens with the answer, but "
            f"memory and chunk hold {limit}; shorten it, or leave guidance_scale out"
        )


def warn_of_assistant(engine: Engine, request: GenerateRequest, is_patched: Callable[[Any], bool]) -> None:
    """Say that an assistant model which is not patched reads the whole prompt at once."""
    assistant = request.assistant
    if assistant is None or is_patched(assistant):
        return
    if engine.exceeded(request.columns) is not None:
        warnings.warn(
            f"imdc: assistant_model ({type(assistant).__name__}) is not patched and reads the whole prompt of "
            f"{request.columns} tokens at once; call imdc.patch(assistant_model) too",
            RuntimeWarning,
            stacklevel=4,
        )
