"""The boundary with transformers: what the generate() and forward() of a patched model do instead of the model's own.

It fails closed. Every call goes through imdc or raises before anything is computed; only calls in training mode and
short ones are the model's own. `generate()` gets its cache here, and is held to having brought it to `forward()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imdc.cache.cache import ImdcCache
from imdc.cache.turn import Turn
from imdc.errors import CacheMismatchError, ImdcError, UnsupportedCallError
from imdc.model import hf
from imdc.prefill.companions import check_guidance, warn_of_assistant
from imdc.prefill.decode import decode_inputs
from imdc.prefill.decode_room import check_decoding, compression_due
from imdc.prefill.engine import Engine
from imdc.prefill.history import check_history, check_mask_shape, check_text
from imdc.prefill.hook import decode_masks, decoding
from imdc.prefill.recall import Recall
from imdc.prefill.recalled_prompt import check_recalling, read_text
from imdc.prefill.renewal import Renewal, renewal_due
from imdc.prefill.requests import (
    GenerateRequest,
    bind,
    check_forward,
    check_generate,
    check_prompt_learning,
)
from imdc.prefill.turn import begin_turn
from imdc.report import PrefillReport

# The boundary and the cache of the generate() call that runs in this thread.
_GENERATING: ContextVar[tuple[Boundary, ImdcCache] | None] = ContextVar("imdc_generating", default=None)


class Boundary:
    """The generate() and forward() of one patched model.

    Attributes:
        report: `PrefillReport` of the last prefill, None before the first.
    """

    def __init__(
        self,
        engine: Engine,
        own_generate: Callable[..., Any],
        is_patched: Callable[[Any], bool],
    ) -> None:
        """`own_generate` is the model's own, as `engine.forward` is its own forward."""
        self._engine = engine
        # Compressing again while decoding is no prefill: it does not report its steps.
        self._quiet_engine = replace(engine, on_step=None, compresses=True)
        self._parts, self._config = engine.parts, engine.config
        self._own_forward, self._own_generate = engine.forward, own_generate
        self._is_patched = is_patched
        self._recalls = self._config.recall != "none" and bool(self._parts.full_layers)
        self._cache_name = hf.cache_argument(type(self._parts.model).forward)
        self.report: PrefillReport | None = None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as transformers does, with a cache of imdc; arguments and result are those of transformers.

        Raises:
            UnsupportedCallError: an option that imdc cannot do, or a call that would not stay bounded.
            CacheMismatchError: the cache belongs to another model.
            ImdcError: the call did not bring the cache to the model; its result is dropped.
        """
        request = GenerateRequest.of(self._parts.model, args, kwargs)
        self.check_mode()
        check_generate(request)
        check_prompt_learning(self._parts.model)
        check_guidance(self._engine, request)
        check_recalling(self._engine, request)
        cache = self.new_cache() if request.cache is None else self.checked(request.cache)
        mask, ids = request.arguments.get("attention_mask"), request.input_ids
        if cache.is_empty and mask is not None and ids is not None:
            check_mask_shape(mask, (ids.shape[0], ids.shape[-1]), 0)
        warn_of_assistant(self._engine, request, self._is_patched)
        text = read_text(self._engine, cache, request) if self._recalls and request.cache is None else None
        cache = cache if text is None else text[0]
        turn = self._turn(request, cache)
        if request.input_ids is not None and not turn.drafting and text is None:
            planner = self._engine.planner(new_tokens=turn.new_tokens)
            begin_turn(planner, cache, request.input_ids, request.arguments.get("attention_mask"))
        with cache.during(turn), _generating(self, cache):
            result = self._own_generate(**request.without_cache_choice(), **{self._cache_name: cache})
            if not turn.reached:
                raise ImdcError(
                    "generate() never handed the KV cache of imdc to the model: what it gave was computed without "
                    "imdc and is dropped; call remove() of the handle for such a call, or report it with the "
                    "version of transformers"
                )
        if text is not None and turn.report is not None:
            self.report = text[1].followed_by(turn.report)
        return result

    def new_cache(self) -> ImdcCache:
        """An empty cache of this model."""
        owner, can_crop = weakref.ref(self._parts.model), self._config.decode_tokens is None
        return ImdcCache(self._parts.windows, owner=owner, can_crop=can_crop)

    def _turn(self, request: GenerateRequest, cache: ImdcCache) -> Turn:
        turn = Turn(request.assisted, request.drafting, new_tokens=request.new_tokens)
        if turn.drafting and self._config.decode_tokens is not None:
            raise UnsupportedCallError(
                f"decode_tokens={self._config.decode_tokens} compresses tokens that an assistant model must be able to "
                f"take back; patch the assistant without decode_tokens"
            )
        if turn.assisted and hf.RUNNING < hf.CROPS_ASSISTED:
            compressed = self._config.decode_tokens is not None
            if compressed or not (cache.is_empty or turn.drafting):
                other = f"decode_tokens={self._config.decode_tokens}" if compressed else f"a used {self._cache_name}"
                raise UnsupportedCallError(
                    f"{other} with assisted decoding or prompt lookup needs transformers 5.23 or newer; upgrade, or "
                    f"leave one of them out"
                )
        if not cache.is_empty and not turn.drafting:
            passed = request.columns if request.input_ids is None else int(request.input_ids.shape[-1])
            check_history(cache.get_seq_length(), request.columns, passed)
            turn.columns = request.columns if turn.assisted else None
        return turn

    def check_mode(self) -> None:
        """Refuse training mode."""
        parts = self._parts
        if any(module.training for module in (parts.model, parts.decoder, *parts.decoder.layers)):
            raise UnsupportedCallError("the model is in training mode; call model.eval() before generating")

    def checked(self, cache: Any, remedy: str = "pass the cache a patched generate() returned, or none") -> ImdcCache:
        """`cache`, if it is one of this model; `remedy` says what to pass instead of what is no cache of imdc."""
        if not isinstance(cache, ImdcCache):
            raise UnsupportedCallError(f"{self._cache_name} is a {type(cache).__name__}; {remedy}")
        if cache.owner() is not self._parts.model:  # type: ignore[operator]
            raise CacheMismatchError(f"{self._cache_name} belongs to another model; prefill this model's own cache")
        return cache

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward: a turn is read in chunks, other tokens are decoded; results are as transformers gives.

        Without a cache of imdc it is the model's own, for calls in training mode and for short ones.

        Raises:
            UnsupportedCallError: an argument that imdc cannot honour, or too many tokens without a cache of imdc.
            CacheMismatchError: the cache belongs to another model.
        """
        named = bind(type(self._parts.model).forward, self._parts.model, args, kwargs)
        found = [name for name, value in named.items() if isinstance(value, ImdcCache)]
        if not found:
            self._check_bounded(named)
            return self._own_forward(*args, **kwargs)
        cache = self.checked(named.pop(found[0]))
        for name in hf.CACHE_NAMES:
            named.pop(name, None)
        self.check_mode()
        turn = cache.turn
        # generate() goes by its own options, whatever the config says.
        named = named if turn is None else {**hf.silenced(self._parts.config), **named}
        check_forward(named, self._parts.config, self._cache_name)
        if turn is not None:
            turn.reached = True
        reads = cache.is_empty or cache.phase == "prefill"
        decodes = not reads and self._decodes(cache, named["input_ids"].shape[1])
        check_text(cache, named, decodes=decodes)
        if not decodes:
            output, report = self._read(self._engine, cache, named)
            self._keep_report(turn, report)
            return output
        if compression_due(self._parts, self._config, cache, named["input_ids"].shape[1]):
            # Only the first new token joins the compression: it is already accepted. The other candidates are decoded
            # after it, because assisted decoding may roll them back.
            named.update(logits_to_keep=named["input_ids"].shape[1], attention_mask=None)
            return self._read(self._quiet_engine, cache, named)[0]
        return self._decode(cache, named)

    def _check_bounded(self, named: dict[str, Any]) -> None:
        """Refuse a call without imdc's cache that would attend to more than imdc ever does.

        Raises:
            UnsupportedCallError: the message names what to do instead.
        """
        if self._parts.model.training:
            return
        running = _GENERATING.get()
        if running is not None and running[0] is self and not _reached(running[1]):
            raise UnsupportedCallError(
                "generate() calls the model without the KV cache that imdc gave it, so the prompt would be read "
                "without imdc; call remove() of the handle for such a call"
            )
        states = next((x for name in ("input_ids", "inputs_embeds") if (x := named.get(name)) is not None), None)
        tokens = 0 if states is None or states.ndim < 2 else int(states.shape[1])
        for name in hf.CACHE_NAMES:
            held = named.get(name)
            if held is not None and not isinstance(held, hf.Cache):
                raise UnsupportedCallError(
                    f"{name} is a {type(held).__name__}, no Cache of transformers; pass handle.new_cache()"
                )
            tokens += 0 if held is None else int(held.get_seq_length())
        limit = self._engine.exceeded(tokens)
        if limit is not None:
            raise UnsupportedCallError(
                f"forward() would attend to {tokens} tokens without imdc, whose memory and chunk hold {limit}; pass "
                f"{self._cache_name}=handle.new_cache(), or call remove() of the handle to use the model as it was"
            )

    @staticmethod
    def _decodes(cache: ImdcCache, count: int) -> bool:
        """Whether `count` new tokens are appended to the tail rather than read as a turn."""
        return count == 1 or (cache.turn is not None and (cache.turn.assisted or cache.turn.drafting))

    # A compiled model compiles its decoding; the loop over chunks runs as it stands.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _read(self, engine: Engine, cache: ImdcCache, named: dict[str, Any]) -> tuple[Any, PrefillReport]:
        """Prefill, then decode the tokens of which the caller wants logits too (assisted decoding's candidates)."""
        input_ids: Tensor = named.pop("input_ids")
        mask = named.pop("attention_mask", None)
        keep = named.pop("logits_to_keep", None)
        keep = 0 if keep is None else keep
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 0:
            raise UnsupportedCallError(
                f"logits_to_keep is {keep!r}; pass the number of last tokens, or leave it out for the logits of all"
            )
        turn = cache.turn or Turn()
        if turn.columns is not None and input_ids.shape[1] - max(0, keep - 1) == turn.columns:
            # Assisted decoding passes what the cache holds once more.
            input_ids = input_ids[:, cache.get_seq_length() :]
        turn.columns = None
        as_tuple = named.pop("return_dict", None) is False
        for name in ("position_ids", "use_cache"):
            named.pop(name, None)
        takes_back = engine is self._quiet_engine or turn.assisted or turn.drafting
        # If none of its drafts is accepted, an assistant must take back the last prompt token too.
        extra = min(max(keep - 1, int(turn.drafting)), input_ids.shape[1] - 1) if takes_back else 0
        prompt, candidates = input_ids[:, : input_ids.shape[1] - extra], input_ids[:, input_ids.shape[1] - extra :]
        if mask is not None and extra:
            mask = mask[:, : mask.shape[1] - extra]
        output, report = engine.prefill(cache, prompt, mask, logits_to_keep=1 if takes_back else keep, **named)
        cache.phase = "decode"
        if extra:
            rest = self._decode(cache, {**named, "input_ids": candidates, "use_cache": True, "return_dict": True})
            rest.logits = torch.cat((output.logits, rest.logits), dim=1)[:, -keep:]
            output = rest
        return (output.to_tuple() if as_tuple else output), report

    def _decode(self, cache: ImdcCache, named: dict[str, Any]) -> Any:
        count = named["input_ids"].shape[1]
        limit = self._engine.exceeded(count)
        if limit is not None:
            raise UnsupportedCallError(
                f"{count} candidates in one call are more than memory and chunk hold ({limit}); lower "
                f"num_assistant_tokens or prompt_lookup_num_tokens"
            )
        check_decoding(self._parts, cache, count)
        with cache.appending():
            inputs = decode_inputs(self._parts, cache, named)
            renewal = self._renewal(cache)
            with decoding(decode_masks(self._parts, cache), renewal):
                output = self._own_forward(**inputs, **{self._cache_name: cache})
        report = self.report if cache.turn is None else cache.turn.report
        if renewal is not None and report is not None:
            self._keep_report(cache.turn, report.renewed(renewal.recall.moved_bytes, renewal.recall.seconds))
        return output

    def _keep_report(self, turn: Turn | None, report: PrefillReport) -> None:
        self.report = report
        if turn is not None:
            turn.report = report

    def _renewal(self, cache: ImdcCache) -> Renewal | None:
        if cache.store is None or not renewal_due(self._config, cache):
            return None
        backend, _ = self._engine.backend()
        return Renewal(Recall(cache.store, self._parts, self._config, backend, cache.compact), cache)


@contextmanager
def _generating(boundary: Boundary, cache: ImdcCache) -> Iterator[None]:
    token = _GENERATING.set((boundary, cache))
    try:
        yield
    finally:
        _GENERATING.reset(token)


def _reached(cache: ImdcCache) -> bool:
    return cache.turn is None or cache.turn.reached
