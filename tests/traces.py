"""What a patch could leave behind or asks of a model, and modules that fail while it is at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from imdc.prefill import hook

TIGHT = {"memory_tokens": 48, "chunk_tokens": 24, "sink_tokens": 2, "recent_tokens": 8, "initial_memory": 0.25}


def trace_of(model: PreTrainedModel) -> dict[str, Any]:
    """All that a patch could leave behind: attributes of every module and config, and transformers' registries."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            state[f"{name}.{key}"] = dict(value) if isinstance(value, dict) else value
        for key, config in vars(module).items():
            if key.endswith("config") and hasattr(config, "__dict__"):
                state[f"{name}.{key}.*"] = dict(vars(config))
    state["attention"] = dict(ALL_ATTENTION_FUNCTIONS)
    state["masks"] = dict(ALL_MASK_ATTENTION_FUNCTIONS)
    state["class"] = dict(vars(type(model)))
    state["overlays"] = (hook._patches, dict(hook._overlays))
    state["running"] = hook._RUNNING.get()
    return state


@contextmanager
def positions_of(model: PreTrainedModel) -> Iterator[list[int]]:
    """The largest position of every rotary table that is asked for, by the model or by imdc."""
    largest: list[int] = []
    decoder: Any = model.model

    def note(module: Any, args: Any, kwargs: Any) -> None:
        largest.append(int((kwargs["position_ids"] if "position_ids" in kwargs else args[1]).max()))

    hook = decoder.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield largest
    finally:
        hook.remove()


class FailingAt:
    """Lets a module raise in its n-th call, and counts the calls."""

    def __init__(self, module: nn.Module, number: int, failure: type[BaseException]) -> None:
        self.calls = 0

        def hook(*_: Any) -> None:
            self.calls += 1
            if self.calls == number:
                raise failure("injected")

        self.handle = module.register_forward_hook(hook)

    def __enter__(self) -> FailingAt:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()
