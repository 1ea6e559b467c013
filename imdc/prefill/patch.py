"""patch(): swap the prefill of a transformers model, and take the swap back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from imdc.cache.cache import ImdcCache
from imdc.config import PrefillConfig, resolve_config
from imdc.errors import UnsupportedCallError, UnsupportedModelError
from imdc.model import hf
from imdc.model.parts import Parts
from imdc.prefill import hook
from imdc.prefill.boundary import Boundary
from imdc.prefill.engine import Engine
from imdc.prefill.reader import OnStep
from imdc.prefill.requests import check_masks, refuse_continuous_batching
from imdc.report import PrefillReport

_MARK = "_imdc_handle"


def patch(
    model: PreTrainedModel, config: PrefillConfig | None = None, *, on_step: OnStep | None = None, **options: Any
) -> PatchHandle:
    """Let `model` read prompts chunk by chunk into a bounded memory; `generate()` is called as before.

    Every call of the patched model goes through imdc or raises before anything is computed; only calls in training mode
    and calls that attend to no more tokens than memory and chunk hold stay the model's own.

    Args:
        model: a causal language model of a supported family, loaded by transformers.
        config: the options, or None for the defaults.
        on_step: called with a `StepReport` after every step.
        options: fields of `PrefillConfig`, instead of or on top of `config`.

    Returns:
        The handle that takes the patch back; it is also a context manager.

    Raises:
        UnsupportedModelError: another architecture, a model that is patched already, or a release of transformers that
            imdc does not know.
        ConfigError: an option is unknown or does not fit.
    """
    chosen = resolve_config(config, **options)
    if is_patched(model):
        raise UnsupportedModelError(
            "model is patched already; call remove() of its handle first, or change nothing and use that handle"
        )
    parts = Parts.of(model)
    hf.check(model)
    handle = PatchHandle(parts, chosen, on_step)
    handle._install()
    return handle


def is_patched(model: Any) -> bool:
    """Whether `model` is patched now."""
    return _MARK in getattr(model, "__dict__", {})


class PatchHandle:
    """A patched model's way back, and what its last prefill did.

    Attributes:
        config: the options in force.
    """

    def __init__(self, parts: Parts, config: PrefillConfig, on_step: OnStep | None) -> None:
        """Made by `patch`."""
        model: Any = parts.model
        self.config = config
        self._parts = parts
        self._engine = Engine(parts, config, model.forward, on_step)
        # A backend that cannot serve the model is refused now rather than at the first prompt.
        self._engine.backend()
        if config.layer_budget != "uniform":
            check_masks(parts)
        self._boundary = Boundary(self._engine, model.generate, is_patched)
        self._ours: dict[str, Callable[..., Any]] = {}
        self._before: dict[str, Any] = {}
        self._active = False

    @property
    def report(self) -> PrefillReport | None:
        """What the last prefill did, None before the first."""
        return self._boundary.report

    def _install(self) -> None:
        model: Any = self._parts.model
        own_forward, own_generate = model.forward, model.generate

        @functools.wraps(own_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return (self._boundary.forward if self._active else own_forward)(*args, **kwargs)

        @functools.wraps(own_generate)
        def generate(*args: Any, **kwargs: Any) -> Any:
            return (self._boundary.generate if self._active else own_generate)(*args, **kwargs)

        self._ours = {
            "forward": forward,
            "generate": generate,
            "init_continuous_batching": refuse_continuous_batching,
        }
        if self._parts.family.drops_cache:
            self._ours["prepare_inputs_for_generation"] = hf.keeping_cache(model)
        self._before = {name: model.__dict__[name] for name in self._ours if name in model.__dict__}
        model.__dict__.update({_MARK: self, **self._ours})
        self._drop = hook.add_patch(self)
        self._active = True

    def remove(self) -> None:
        """Take the patch back; a second call does nothing."""
        if not self._active:
            return
        self._active = False
        state = self._parts.model.__dict__
        del state[_MARK]
        for name, ours in self._ours.items():
            # Where somebody wrapped ours since, theirs stays and calls on into ours, which now does nothing.
            if state.get(name) is ours and name in self._before:
                state[name] = self._before[name]
            elif state.get(name) is ours:
                del state[name]
        # Each of them holds this handle, and with it the model.
        self._ours.clear()
        self._drop()

    def __enter__(self) -> PatchHandle:
        """The handle itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the patch back, also after an exception."""
        self.remove()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled, which a copy of the patched model would come to."""
        raise UnsupportedCallError(
            "a patched model cannot be copied or pickled: the copy would run the original's weights; "
            "call remove() of its handle first, and patch each model afterwards"
        )

    def new_cache(self) -> ImdcCache:
        """An empty cache for calls without `generate()`, such as `model(input_ids, past_key_values=cache)`.

        A call of more than one token is a turn and read in chunks, the first one and every later one; a call of one
        token decodes. (The argument is called `cache` in transformers 5.24.)
        """
        return self._boundary.new_cache()

    @property
    def backend(self) -> str:
        """The backend in use and why, as one sentence."""
        return self._engine.backend()[1]
