"""What a generate() call costs: time to the first token, and peak memory above the start."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SAMPLE_SECONDS = 0.005


class FirstToken:
    """A streamer for generate() that notes when the first new token comes out.

    `seconds` counts from the moment the object is made; None before the first token.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self.seconds: float | None = None
        self._prompt_seen = False
        self._began = time.perf_counter()

    def put(self, value: Any) -> None:
        """Called by generate() with the prompt, then with every new token."""
        if self._prompt_seen and self.seconds is None:
            self.seconds = time.perf_counter() - self._began
        self._prompt_seen = True

    def end(self) -> None:
        """Called by generate() at its end."""


class PeakMemory:
    """Peak memory inside the `with` block, above what was in use at its start.

    On CUDA the peak that torch's allocator counts; elsewhere the process's resident memory, sampled every 5 ms.

    Attributes:
        bytes: the peak; None where the system does not tell (no /proc).
        kind: "allocated on cuda" or "resident", for a table's heading.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is measured before the block is entered."""
        self.bytes: int | None = None
        self.kind = "allocated on cuda" if device.type == "cuda" else "resident"
        self._device = device
        self._start = 0
        self._highest = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        """Note what is in use now."""
        from imdc.profiler.allocations import resident_bytes, return_free_heap

        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        return_free_heap()
        start = resident_bytes()
        if start is not None:
            self._start = self._highest = start
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop measuring and set `bytes`."""
        if self._device.type == "cuda":
            import torch

            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._start
        elif self._thread is not None:
            self._stop.set()
            self._thread.join()
            self.bytes = self._highest - self._start

    def _sample(self) -> None:
        from imdc.profiler.allocations import resident_bytes

        while not self._stop.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, resident_bytes() or 0)
