"""All keys and values of a text, in host memory or a file, from which a question takes back what the device evicted."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from imdc.errors import ConfigError
from imdc.units import format_bytes


class HostStore:
    """The pairs of one text in its full-attention layers, as the layers computed them, in the order of the text.

    Everything that is read is stored, also what the device keeps: a memory is a small share of a long text, and pairs
    that lie in the order of the text need no list of places. Keys are rotated to their positions in the text, or not
    rotated at all where the memory's positions are compact.

    On a device the copies run beside the computation, in a stream of their own. One layer's chunk is alive until the
    next layer has computed its own.

    Attributes:
        tokens: of the text, for which there is room.
        folder: where the files are that are mapped in place of host memory; None for that.
        keys: per full-attention layer [1, tokens, Hkv, D] on the CPU: what is copied at once lies in one piece.
        values: as `keys`.
    """

    def __init__(self, layers: Sequence[int], tokens: int, folder: Path | None = None) -> None:
        """Room is made when a layer brings its first chunk."""
        self.layers, self.tokens, self.folder = tuple(layers), tokens, folder
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: tuple[Tensor, Tensor] | None = None
        # Of a chunk on its way to files: pinned copies, and where they go. What is mapped cannot be pinned.
        self._landed: list[tuple[Tensor, Tensor]] = []

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
        """Bytes of host memory, or of the files in its place."""
        return sum(x.nbytes for x in (*self.keys.values(), *self.values.values()))

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store the pairs [1, Hkv, n, D] of the tokens from `start` on."""
        if layer not in self.keys:
            size = (1, self.tokens, keys.shape[1], keys.shape[3])
            self.keys[layer], self.values[layer] = (self._room(size, states) for states in (keys, values))
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
        if self.folder is not None:
            files, landed = targets, [torch.empty_like(x, device="cpu", pin_memory=True) for x in (keys, values)]
            self._landed, targets = list(zip(files, landed, strict=True)), (landed[0], landed[1])
        with torch.cuda.stream(stream):
            for target, states in zip(targets, (keys, values), strict=True):
                target.copy_(states, non_blocking=True)

    def _room(self, size: tuple[int, ...], states: Tensor) -> Tensor:
        if self.folder is not None:
            return _mapped(self.folder, size, states.dtype)
        # Only what is pinned is copied while the device goes on.
        return torch.empty(size, dtype=states.dtype, pin_memory=states.is_cuda)

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
            if self._landed:
                self._streams[device].synchronize()
            for target, landed in self._landed:
                target.copy_(landed)
            self._copied, self._landed = None, []


def _mapped(folder: Path, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor over a file of its own in `folder`; what is written to it leaves host memory when that is short.

    The file has no name any more: it goes with the tensor, or with the process, however that ends.

    Raises:
        ConfigError: there is no room for it.
    """
    count = math.prod(size)
    handle, name = tempfile.mkstemp(prefix="imdc-recall-", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            # A file without its blocks would end the process when the disk fills, not raise.
            os.posix_fallocate(handle, 0, max(1, count * dtype.itemsize))
        tensor = torch.from_file(name, shared=True, size=count, dtype=dtype)
    except OSError as error:
        raise ConfigError(
            f"recall='disk' finds no room for {format_bytes(count * dtype.itemsize)} in {os.fspath(folder)!r} "
            f"({error}); name a folder on another disk with recall_dir"
        ) from error
    finally:
        os.close(handle)
        # Windows refuses that while it is mapped.
        with contextlib.suppress(PermissionError):
            os.unlink(name)
    return tensor.view(size)
