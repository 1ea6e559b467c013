"""patch(): swap the prefill of a transformers model, and take the swap back."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from imdc.cache.cache import ImdcCache
from imdc.config import PrefillConfig, resolve_config
from imdc.errors import CacheMismatchError, UnsupportedCallError, UnsupportedModelError
from imdc.model.parts import Parts
from imdc.prefill.decode_room import check_decoding, compression_due
from imdc.prefill.engine import Engine
from imdc.prefill.hook import unregister_all
from imdc.prefill.reader import OnStep
from imdc.prefill.requests import check_generate, check_history, check_positions, refuse_continuous_batching
from imdc.prefill.turn import begin_turn
from imdc.report import PrefillReport

_MARK = "_imdc_handle"
_SWAPPED = ("forward", "_prepare_cache_for_generation", "init_continuous_batching", "generate")

_lock = threading.Lock()
_live = 0


def patch(
    model: PreTrainedModel, config: PrefillConfig | None = None, *, on_step: OnStep | None = None, **options: Any
) -> PatchHandle:
    """Let `model` read prompts chunk by chunk into a bounded memory; `generate()` is called as before.

    Args:
        model: a causal language model of a supported family, loaded by transformers.
        config: the options, or None for the defaults.
        on_step: called with a `StepReport` after every step.
        options: fields of `PrefillConfig`, instead of or on top of `config`.

    Returns:
        The handle that takes the patch back; it is also a context manager.

    Raises:
        UnsupportedModelError: another architecture, or a model that is patched already.
        ConfigError: an option is unknown or does not fit.
    """
    chosen = resolve_config(config, **options)
    if _MARK in getattr(model, "__dict__", {}):
        raise UnsupportedModelError(
            "model is patched already; call remove() of its handle first, or change nothing and use that handle"
        )
    parts = Parts.of(model)
    handle = PatchHandle(parts, chosen, on_step)
    handle._install()
    return handle


class PatchHandle:
    """A patched model's way back, and what its last prefill did.

    Attributes:
        config: the options as given; `report.config` has the sizes that a prefill used.
        report: `PrefillReport` of the last prefill, None before the first.
    """

    def __init__(self, parts: Parts, config: PrefillConfig, on_step: OnStep | None) -> None:
        """Made by `patch`."""
        model: Any = parts.model
        self.config = config
        self.report: PrefillReport | None = None
        self._parts = parts
        self._forward: Callable[..., Any] = model.forward
        self._prepare: Callable[..., Any] = model._prepare_cache_for_generation
        self._signature = inspect.signature(model.forward)
        self._engine = Engine(parts, config, self._forward, on_step)
        # Compressing again while decoding is no prefill: it does not report its steps.
        self._quiet_engine = Engine(parts, config, self._forward, compresses=True)
        self._engine.backend()
        self._generate: Callable[..., Any] = model.generate
        # What the running generate() call of this thread was given.
        self._given = threading.local()
        self._before = {name: model.__dict__[name] for name in _SWAPPED if name in model.__dict__}
        self._active = False

    def _install(self) -> None:
        global _live
        model = self._parts.model

        @functools.wraps(self._forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(args, kwargs) if self._active else self._forward(*args, **kwargs)

        @functools.wraps(self._prepare)
        def prepare(
            generation_config: GenerationConfig,
            model_kwargs: dict[str, Any],
            mode: GenerationMode,
            *args: Any,
            **kw: Any,
        ) -> Any:
            if self._active:
                self._take_over(generation_config, model_kwargs, mode)
            return self._prepare(generation_config, model_kwargs, mode, *args, **kw)

        @functools.wraps(self._generate)
        def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._given.ids = kwargs.get("input_ids") if inputs is None else inputs
            return self._generate(inputs, *args, **kwargs)

        with _lock:
            self._ours = dict(zip(_SWAPPED, (forward, prepare, refuse_continuous_batching, generate), strict=True))
            model.__dict__.update({_MARK: self, **self._ours})
            _live += 1
        self._active = True

    def remove(self) -> None:
        """Take the patch back; a second call does nothing."""
        global _live
        if not self._active:
            return
        self._active = False
        state = self._parts.model.__dict__
        with _lock:
            del state[_MARK]
            for name, ours in self._ours.items():
                # Where somebody wrapped ours since, theirs stays and calls on into ours, which now does nothing.
                if state.get(name) is ours and name in self._before:
                    state[name] = self._before[name]
                elif state.get(name) is ours:
                    del state[name]
            # Each of them holds this handle, and with it the model.
            self._ours.clear()
            _live -= 1
            last = _live == 0
        if last:
            unregister_all()

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
        """An empty cache for `model(input_ids, past_key_values=cache, logits_to_keep=1)` without `generate()`."""
        return ImdcCache(
            self._parts.windows,
            owner=weakref.ref(self._parts.model),
            can_crop=self.config.decode_tokens is None,
        )

    @property
    def backend(self) -> str:
        """The backend in use and why, as one sentence."""
        return self._engine.backend()[1]

    def _take_over(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], mode: GenerationMode
    ) -> None:
        """Check a generate() call and give it an imdc cache, before anything else happens."""
        self._check_mode()
        check_generate(generation_config, model_kwargs, self._parts.model.generation_config)
        drafting = bool(generation_config.is_assistant)
        if drafting and self.config.decode_tokens is not None:
            raise UnsupportedCallError(
                f"decode_tokens={self.config.decode_tokens} compresses tokens that an assistant model must be able to "
                f"take back; patch the assistant without decode_tokens"
            )
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = model_kwargs["past_key_values"] = self.new_cache()
        self._check_cache(cache)
        cache.history = None
        ids, new = getattr(self._given, "ids", None), generation_config.max_new_tokens
        if new is None and generation_config.max_length is not None and ids is not None:
            new = max(1, generation_config.max_length - ids.shape[1])
        cache.expected_new_tokens = new
        mask = model_kwargs.get("attention_mask")
        if not drafting and isinstance(ids, Tensor):
            begin_turn(self._engine.planner(new_tokens=new), cache, ids, mask)
        if not cache.is_empty and not drafting:
            columns: Any = generation_config._mask_length if mask is None else mask.shape[1]
            check_history(cache.get_seq_length(), columns)
            cache.history = columns if mode == GenerationMode.ASSISTED_GENERATION else None
        # An assistant goes on drafting from its cache; any other call begins a turn.
        if cache.is_empty or not drafting:
            cache.phase = "prefill"
        cache.drafting = drafting
        cache.record_past(drafting or mode == GenerationMode.ASSISTED_GENERATION)

    def _check_mode(self) -> None:
        if self._parts.model.training:
            raise UnsupportedCallError("the model is in training mode; call model.eval() before generating")

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, ImdcCache):
            raise UnsupportedCallError(
                f"past_key_values is a {type(cache).__name__}; pass the cache a patched generate() returned, or none"
            )
        if cache.owner() is not self._parts.model:  # type: ignore[operator]
            raise CacheMismatchError("past_key_values belongs to another model; prefill this model's own cache")

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._signature.bind_partial(*args, **kwargs)
        named: dict[str, Any] = {**call.arguments, **call.arguments.get("kwargs", {})}
        named.pop("kwargs", None)
        cache = named.get("past_key_values")
        if not isinstance(cache, ImdcCache):
            return self._forward(*args, **kwargs)
        self._check_cache(cache)
        self._check_mode()
        for name in ("output_attentions", "output_hidden_states", "labels", "inputs_embeds"):
            if named.get(name) is not None and named.get(name) is not False:
                raise UnsupportedCallError(f"{name} is not supported with an imdc cache; leave it out")
        if cache.phase == "prefill":
            check_positions(named)
            output, self.report = self._read(self._engine, cache, named)
            return output
        if compression_due(self._parts, self.config, cache, named["input_ids"].shape[1]):
            # The oldest of the new tokens is never taken back: in assisted decoding it is the one accepted last.
            named["logits_to_keep"] = named["input_ids"].shape[1]
            named["attention_mask"] = None
            return self._read(self._quiet_engine, cache, named)[0]
        return self._decode(cache, named)

    def _read(self, engine: Engine, cache: ImdcCache, named: dict[str, Any]) -> tuple[Any, PrefillReport]:
        """Prefill, then decode the tokens of which the caller wants logits too (assisted decoding's candidates)."""
        input_ids: Tensor = named.pop("input_ids")
        mask = named.pop("attention_mask", None)
        keep = named.pop("logits_to_keep", 1)
        if not isinstance(keep, int) or keep < 1:
            raise UnsupportedCallError(f"logits_to_keep={keep!r} asks for logits of the whole prompt; pass 1")
        if cache.history is not None and input_ids.shape[1] - (keep - 1) == cache.history:
            # Assisted decoding of transformers (5.6 to 5.23) passes what the cache holds once more.
            input_ids = input_ids[:, cache.get_seq_length() :]
        cache.history = None
        as_tuple = named.pop("return_dict", None) is False
        for name in ("past_key_values", "position_ids", "use_cache"):
            named.pop(name, None)
        # If none of its drafts is accepted, an assistant must take back the last prompt token too.
        extra = min(max(keep - 1, int(cache.drafting)), input_ids.shape[1] - 1)
        prompt, candidates = input_ids[:, : input_ids.shape[1] - extra], input_ids[:, input_ids.shape[1] - extra :]
        if mask is not None and extra:
            mask = mask[:, : mask.shape[1] - extra]
        output, report = engine.prefill(cache, prompt, mask, **named)
        cache.phase = "decode"
        if extra:
            inputs = {**named, "input_ids": candidates, "past_key_values": cache, "use_cache": True}
            rest = self._decode(cache, {**inputs, "return_dict": True})
            rest.logits = torch.cat((output.logits, rest.logits), dim=1)[:, -keep:]
            output = rest
        return (output.to_tuple() if as_tuple else output), report

    def _decode(self, cache: ImdcCache, named: dict[str, Any]) -> Any:
        check_decoding(self._parts, cache, named["input_ids"].shape[1])
        with cache.appending():
            return self._forward(**self._decode_inputs(cache, named))

    def _decode_inputs(self, cache: ImdcCache, named: dict[str, Any]) -> dict[str, Any]:
        """Positions and masks that fit what is stored; the caller's speak of the whole sequence."""
        rows = cache.rows
        assert rows is not None
        input_ids: Tensor = named["input_ids"]
        count, device = input_ids.shape[1], input_ids.device
        start = (rows.position + cache.tail).to(device)
        named["position_ids"] = start[:, None] + torch.arange(count, device=device)
        named["attention_mask"] = self._decode_mask(cache, input_ids, named["position_ids"])
        return named

    def _decode_mask(self, cache: ImdcCache, input_ids: Tensor, position_ids: Tensor) -> Any:
        rows = cache.rows
        assert rows is not None
        windows = self._parts.windows
        full, sliding = None in windows, any(window is not None for window in windows)
        seen, device = cache.get_seq_length(), input_ids.device
        column = torch.arange(seen + input_ids.shape[1], device=device)[None, :]
        full_mask = sliding_mask = None
        if full and bool(rows.padding.any()):
            full_mask = column >= (rows.padding + seen - cache.stored_tokens()).to(device)[:, None]
        if sliding and bool((rows.tokens < cache.width).any()):
            sliding_mask = column >= (cache.width - rows.tokens).to(device)[:, None]
        if full_mask is None and sliding_mask is None:
            return None
        if not (full and sliding):
            return full_mask if full else sliding_mask
        shared = {
            "config": self._parts.config,
            "inputs_embeds": torch.empty(*input_ids.shape, 0, device=device, dtype=self._parts.model.dtype),
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        return {
            "full_attention": create_causal_mask(attention_mask=full_mask, **shared),
            "sliding_attention": create_sliding_window_causal_mask(attention_mask=sliding_mask, **shared),
        }
