"""All keys and values of a text in host memory, from which a question takes back what was evicted from the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HostStore:
    """The pairs of one text in its full-attention layers, as the layers computed them, in the order of the text.

    Everything that is read is stored, also what the device keeps: a memory is a small share of a long text, and pairs
    that lie in the order of the text need no list of places. Keys are rotated to their positions in the text, or not
    rotated at all where the memory's positions are compact.

    On a device the copies run beside the computation, in a stream of their own. One layer's chunk is alive until the
    next layer has computed its own.

    Attributes:
        tokens: of the text, for which there is room.
        keys: per full-attention layer [1, tokens, Hkv, D] on the CPU: what is copied at once lies in one piece.
        values: as `keys`.
    """

    def __init__(self, layers: Sequence[int], tokens: int) -> None:
        """Room is made when a layer brings its first chunk."""
        self.layers, self.tokens = tuple(layers), tokens
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> HostStore:
        """Itself: it does not change once its text is read, so copies of a cache share it."""
        return self

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> HostStore | None:
        """The store whose `tensors()` are among those given; None where there are none."""
        layers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("store.") and "keys" in name)
        if not layers:
            return None
        store = cls(layers, tensors[f"store.{layers[0]}.keys"].shape[1])
        store.keys = {layer: tensors[f"store.{layer}.keys"] for layer in layers}
        store.values = {layer: tensors[f"store.{layer}.values"] for layer in layers}
        return store

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by names for a file."""
        sides = (("keys", self.keys), ("values", self.values))
        return {f"store.{layer}.{name}": side[layer] for layer in self.keys for name, side in sides}

    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(x.nbytes for x in (*self.keys.values(), *self.values.values()))

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store the pairs [1, Hkv, n, D] of the tokens from `start` on."""
        if layer not in self.keys:
            size = (1, self.tokens, keys.shape[1], keys.shape[3])
            # Only what is pinned is copied while the device goes on.
            pinned = keys.is_cuda
            self.keys[layer] = torch.empty(size, dtype=keys.dtype, pin_memory=pinned)
            self.values[layer] = torch.empty(size, dtype=values.dtype, pin_memory=pinned)
        places = slice(start, start + keys.shape[2])
        targets = self.keys[layer][:, places], self.values[layer][:, places]
        keys, values = (x.transpose(1, 2) for x in (keys, values))
        if not keys.is_cuda:
            for target, states in zip(targets, (keys, values), strict=True):
                target.copy_(states)
            return
        if keys.device not in self._streams:
            self._streams[keys.device] = torch.cuda.Stream(keys.device)
        stream = self._streams[keys.device]
        # The chunk that was copied last may go, and this one was computed by the stream that runs now.
        self._wait()
        self._copied = keys, values = keys.contiguous(), values.contiguous()
        stream.wait_stream(torch.cuda.current_stream(keys.device))
        with torch.cuda.stream(stream):
            for target, states in zip(targets, (keys, values), strict=True):
                target.copy_(states, non_blocking=True)

    def finish(self) -> None:
        """Wait until everything is stored."""
        self._wait()
        for stream in self._streams.values():
            stream.synchronize()
        self._streams = {}

    def _wait(self) -> None:
        if self._copied is not None:
            device = self._copied[0].device
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
            self._copied = None
