"""probe(): watch what the prefills of a patched model do to the memory."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from imdc.errors import UnsupportedCallError
from imdc.prefill.patch import PatchHandle, handle_of
from imdc.prefill.recording import ProbeResult


class Probe:
    """Records the prefills of one patched model while it is on; made by `probe`, a context manager.

    Attributes:
        results: a `ProbeResult` of every prompt row that was read, in order. Equal rows of a batch, such as beams, are
            read once. Every turn has results of its own.
    """

    def __init__(self, handle: PatchHandle) -> None:
        """Made by `probe`; off until it is entered."""
        self._handle = handle
        self.results: list[ProbeResult] = []

    @property
    def result(self) -> ProbeResult:
        """The latest of `results`.

        Raises:
            UnsupportedCallError: nothing was read.
        """
        if not self.results:
            raise UnsupportedCallError(
                "the probe has no result: no prefill of its model ended while it was on; call generate() inside the "
                "with block"
            )
        return self.results[-1]

    def __enter__(self) -> Probe:
        """Record from now on."""
        self._handle.probes.append(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop; the results stay."""
        self._handle.probes.remove(self._take)

    def _take(self, result: ProbeResult) -> None:
        self.results.append(result)


def probe(target: Any) -> Probe:
    """Watch what reading does to the memory: which tokens' KV pairs it retains, how old they are, what attention stays.

        with imdc.patch(model, memory_tokens=2048) as handle, imdc.probe(handle) as probe:
            model.generate(**inputs, max_new_tokens=64)
        probe.result.survival

    Answers stay as they are. Recording costs time and some memory that no plan counts; a model without a probe pays
    nothing. While an answer is compressed (`decode_tokens`) nothing is recorded, and of a further turn's memory what
    earlier turns left is one origin, told apart from the chunks.

    Args:
        target: the handle of `imdc.patch`, or the patched model.

    Returns:
        The probe, which records inside its `with` block.

    Raises:
        UnsupportedCallError: the model is not patched, or not any more.
    """
    handle = target if isinstance(target, PatchHandle) else handle_of(target)
    if handle is None:
        raise UnsupportedCallError(
            f"probe() takes the handle of imdc.patch(model) or a model that is patched, got {type(target).__name__}; "
            f"call imdc.patch(model) first"
        )
    handle.check_active("probe")
    return Probe(handle)
