"""patch(): swap the prefill of a transformers model, and take the swap back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedModel

from imdc.cache.cache import ImdcCache
from imdc.config import PrefillConfig, resolve_config
from imdc.errors import UnsupportedCallError, UnsupportedModelError
from imdc.model import hf
from imdc.model.parts import Parts
from imdc.planner.batch import DEFAULT_ROOM
from imdc.prefill import hook
from imdc.prefill.boundary import Boundary
from imdc.prefill.engine import Engine
from imdc.prefill.questions import question_batch, question_request, read_document, with_questions
from imdc.prefill.reader import OnStep
from imdc.prefill.recording import ProbeResult
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
    return handle_of(model) is not None


def handle_of(model: Any) -> PatchHandle | None:
    """The handle of a model that is patched now, None of any other."""
    handle: PatchHandle | None = getattr(model, "__dict__", {}).get(_MARK)
    return handle


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

    @property
    def probes(self) -> list[Callable[[ProbeResult], None]]:
        """Who is told what every prefill does to the memory; `imdc.probe` adds itself."""
        return self._engine.probes

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
            # copy.copy() looks it up on the instance; the copy's calls would run the original.
            "__getstate__": _refuse_copy,
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
        _refuse_copy()

    def new_cache(self) -> ImdcCache:
        """An empty cache for calls without `generate()`, such as `model(input_ids, past_key_values=cache)`.

        A call of more than one token is a turn and read in chunks, the first one and every later one; a call of one
        token decodes. (The argument is called `cache` in transformers 5.24.) With recall such calls are refused.
        """
        return self._boundary.new_cache()

    def read(
        self, input_ids: Tensor, questions: Sequence[Tensor] | None = None, *, room: int = DEFAULT_ROOM
    ) -> ImdcCache:
        """Read a document without generating, to `ask` it any number of questions.

        Args:
            input_ids: int64 [1, N], the document, with the chat template's beginning where there is one.
            questions: int64 [1, n] each, what will be asked, or examples of it, as `ask` will be given them: they
                decide what is retained in the place of the document's last tokens.
            room: tokens of a question and its answer; where the document and these pass the model's window, its memory
                gets compact positions.

        Returns:
            Its cache, for `ask` and `imdc.save_cache`. `report` says what it took.

        Raises:
            UnsupportedCallError: several documents, questions that the observer has no use for, or the patch was taken
                back.
        """
        self.check_active("read")
        self._boundary.check_mode()
        cache = self.new_cache()
        engine = replace(self._engine, config=with_questions(self.config, questions))
        self._boundary.report = read_document(engine, cache, input_ids, room)
        return cache

    def ask(
        self,
        cache: ImdcCache,
        input_ids: Tensor | Sequence[Tensor],
        attention_mask: Tensor | None = None,
        **generate_options: Any,
    ) -> Tensor:
        """Ask about the document in `cache`, which stays as it is: twenty questions are twenty calls, or one.

        Several questions at once are read one after another and answered together; each has a memory of its own then.

        Args:
            cache: of `read`, or of `imdc.load_cache`.
            input_ids: int64 [n, q], what follows the document: n questions, with the chat template's end where there is
                one; or a list of [1, q].
            attention_mask: [n, q], 0 marks padding, on any side; None: there is none.
            generate_options: of `generate()`, such as max_new_tokens.

        Returns:
            The generated ids alone, int64 [n, new], or [n * num_return_sequences, new].

        Raises:
            UnsupportedCallError: the cache holds no document, question and answer leave the model's window, or the
                patch was taken back.
            CacheMismatchError: another model read the document.
        """
        self.check_active("ask")
        ids, mask = question_batch(input_ids, attention_mask)
        document = self._boundary.checked(cache, "pass that of handle.read(), or of imdc.load_cache()")
        request = question_request(self._engine, document, ids, mask, generate_options)
        answer: Tensor = self._boundary.generate(**request)[:, ids.shape[1] :]
        return answer

    def check_active(self, name: str) -> None:
        """Refuse the call of this name once the patch was taken back."""
        if not self._active:
            raise UnsupportedCallError(f"{name}() of a handle whose patch was taken back; call imdc.patch(model) again")

    @property
    def backend(self) -> str:
        """The backend in use and why, as one sentence."""
        return self._engine.backend()[1]


def _refuse_copy() -> NoReturn:
    raise UnsupportedCallError(
        "a patched model cannot be copied or pickled: the copy would run the original's weights; "
        "call remove() of its handle first, and patch each model afterwards"
    )
