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

from imdc.cache.int8 import dequantised, dequantised_at, quantised_keys, quantised_values
from imdc.config import INT8_GROUP, SUMMARY_TOKENS
from imdc.errors import ConfigError
from imdc.units import format_bytes

_SIDES = ("keys", "values", "key_scales", "value_scales")


class HostStore:
    """The pairs of one text in its full-attention layers, in the order of the text, as computed or in eight bits.

    Everything that is read is stored, also what the device keeps: a memory is a small share of a long text, and pairs
    that lie in the order of the text need no list of places. Keys are rotated to their positions in the text, or not
    rotated at all where the memory's positions are compact.

    On a device the copies run beside the computation, in a stream of their own. One layer's chunk is alive until the
    next layer has computed its own.

    In eight bits a group of keys shares scales, see `imdc.cache.int8`. Groups lie at fixed places in the text, so what
    is stored does not depend on the chunks in which it was read: keys that fill no group yet wait for the next chunk,
    where they were computed.

    Attributes:
        tokens: of the text, for which there is room.
        folder: where the files are that are mapped in place of host memory; None for that.
        int8: whether the pairs are in eight bits.
        sides: "keys" and "values", and with `int8` "key_scales" and "value_scales", per full-attention layer: keys and
            values [1, tokens, Hkv, D] on the CPU, since what is copied at once lies in one piece; scales as in
            `imdc.cache.int8`.
        means: per full-attention layer the mean key of every block of `SUMMARY_TOKENS`, bfloat16 [1, blocks, Hkv, D],
            once a question has seen all of its keys. Files do not hold them; `summarised` makes room beforehand.
    """

    def __init__(
        self,
        layers: Sequence[int],
        tokens: int,
        folder: Path | None = None,
        *,
        int8: bool = False,
        summarised: bool = False,
    ) -> None:
        """Room is made when a layer brings its first chunk."""
        self.layers, self.tokens, self.folder = tuple(layers), tokens, folder
        self.int8, self.summarised = int8, summarised
        self.sides: dict[str, dict[int, Tensor]] = {name: {} for name in _SIDES}
        self.means: dict[int, Tensor] = {}
        self._mean_rooms: dict[int, Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._copied: list[Tensor] = []
        # Keys that fill no group yet.
        self._rest: dict[int, Tensor] = {}
        # Of a chunk on its way to files: pinned copies, and where they go. What is mapped cannot be pinned.
        self._landed: list[tuple[Tensor, Tensor]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> HostStore:
        """Itself: it does not change once its text is read, so copies of a cache share it."""
        return self

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> HostStore | None:
        """The store whose `tensors()` are among those given; None where there are none."""
        names = [name.split(".") for name in tensors if name.startswith("store.")]
        if not names:
            return None
        layers = sorted({int(layer) for _, layer, _ in names})
        int8 = any(side == "key_scales" for _, _, side in names)
        store = cls(layers, tensors[f"store.{layers[0]}.keys"].shape[1], int8=int8)
        for _, layer, side in names:
            store.sides[side][int(layer)] = tensors[f"store.{layer}.{side}"]
        return store

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by names for a file."""
        return {f"store.{layer}.{name}": side[layer] for name, side in self.sides.items() for layer in side}

    def nbytes(self) -> int:
        """Bytes of host memory, or of the files in its place."""
        return sum(x.nbytes for x in (*self.tensors().values(), *self._mean_rooms.values()))

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Store the pairs [1, Hkv, n, D] of the tokens from `start` on; in eight bits, chunk after chunk."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        # The chunk that was copied last may go, and this one was computed by the stream that runs now.
        self._wait()
        if not self.int8:
            self._send([self._piece("keys", layer, start, keys), self._piece("values", layer, start, values)])
            return
        codes, scales = quantised_values(values)
        pieces = [self._piece("values", layer, start, codes), self._piece("value_scales", layer, start, scales)]
        waiting, end = self._rest.pop(layer, None), start + keys.shape[1]
        if start == 0:
            # A reading that ran out of memory begins again.
            waiting = None
        if waiting is not None:
            keys, start = torch.cat((waiting, keys), dim=1), start - waiting.shape[1]
        whole = keys.shape[1] if end == self.tokens else keys.shape[1] // INT8_GROUP * INT8_GROUP
        if whole < keys.shape[1]:
            self._rest[layer] = keys[:, whole:].clone()
        if whole:
            codes, scales = quantised_keys(keys[:, :whole])
            pieces.append(self._piece("keys", layer, start, codes))
            pieces.append(self._piece("key_scales", layer, start // INT8_GROUP, scales))
        self._send(pieces)

    def _piece(self, side: str, layer: int, start: int, states: Tensor) -> tuple[Tensor, Tensor]:
        """Where `states` [1, n, ...] go that begin at `start`, and they themselves."""
        room = self.sides[side]
        if layer not in room:
            count = -(-self.tokens // INT8_GROUP) if side == "key_scales" else self.tokens
            room[layer] = self._room((1, count, *states.shape[2:]), states.dtype, pinned=states.is_cuda)
            if side == "keys" and self.summarised:
                self.room_for_means(layer, states.transpose(1, 2))
        return room[layer][:, start : start + states.shape[1]], states

    def _room(self, size: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> Tensor:
        # A tensor made in inference mode could not be written outside it, where a question may be asked.
        with torch.inference_mode(False):
            if self.folder is not None:
                return _mapped(self.folder, size, dtype)
            # Only what is pinned is copied while the device goes on.
            return torch.empty(size, dtype=dtype, device="cpu", pin_memory=pinned)

    def _send(self, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """Copy what `_piece` says, from a device in a stream of its own."""
        device = pieces[0][1].device
        if device.type != "cuda":
            for target, states in pieces:
                target.copy_(states)
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        pieces = [(target, states.contiguous()) for target, states in pieces]
        self._copied = [states for _, states in pieces]
        stream.wait_stream(torch.cuda.current_stream(device))
        if self.folder is not None:
            landed = [torch.empty_like(states, device="cpu", pin_memory=True) for states in self._copied]
            self._landed = [(target, there) for (target, _), there in zip(pieces, landed, strict=True)]
            pieces = list(zip(landed, self._copied, strict=True))
        with torch.cuda.stream(stream):
            for target, states in pieces:
                target.copy_(states, non_blocking=True)

    def block(self, side: str, layer: int, block: range, device: torch.device) -> tuple[Tensor, int]:
        """(keys or values [1, block, Hkv, D] of the tokens of `block` on `device`, bytes read of the store).

        Those in eight bits are float32 there; `block` has to begin at a group then.
        """
        states = self.sides[side][layer][:, block.start : block.stop]
        if not self.int8:
            return states.to(device, non_blocking=True), states.nbytes
        group, scales = self._scales(side, layer)
        scales = scales[:, block.start // group : -(-block.stop // group)]
        codes, steps = (x.to(device, non_blocking=True) for x in (states, scales))
        return dequantised(codes, steps, group), states.nbytes + scales.nbytes

    def gather(self, side: str, layer: int, places: Tensor, device: torch.device) -> tuple[Tensor, int]:
        """(keys or values [1, m, Hkv, D] of the tokens `places` on `device`, bytes read of the store).

        Args:
            side: "keys" or "values".
            layer: number of a full-attention layer.
            places: int64 [1, m, Hkv] on the CPU.
            device: where they go; those in eight bits are float32 there.
        """
        room, heads = self.sides[side][layer], places.shape[2]
        # Whole rows of one head each, which is several times as fast as number by number.
        lines = room.view(-1, room.shape[3])
        states = lines.index_select(0, (places * heads + torch.arange(heads, device="cpu")).flatten())
        states = states.view(*places.shape, room.shape[3])
        if not self.int8:
            return states.to(device), states.nbytes
        group, scales = self._scales(side, layer)
        if group == 1:
            scales = scales.gather(1, places[:, :, None, :, None].expand(-1, -1, 2, -1, -1))
            return dequantised(states.to(device), scales.to(device), group), states.nbytes + scales.nbytes
        # All scales of the layer: they are less than those of each channel of each pair would be.
        groups = (places // group).to(device)
        return dequantised_at(states.to(device), scales.to(device), groups), states.nbytes + scales.nbytes

    def room_for_means(self, layer: int, like: Tensor) -> Tensor:
        """Room for the `means` of a layer with keys as `like` [1, Hkv, n, D]; they are that once all are in it."""
        if layer not in self._mean_rooms:
            size = (1, -(-self.tokens // SUMMARY_TOKENS), like.shape[1], like.shape[3])
            self._mean_rooms[layer] = self._room(size, torch.bfloat16, pinned=like.is_cuda)
        return self._mean_rooms[layer]

    def mean_keys(self, layer: int, block: range, device: torch.device) -> tuple[Tensor, int]:
        """(mean keys [1, block, Hkv, D] of the blocks of `block` on `device`, bytes read of the store)."""
        states = self.means[layer][:, block.start : block.stop]
        return states.to(device, non_blocking=True), states.nbytes

    def _scales(self, side: str, layer: int) -> tuple[int, Tensor]:
        """Tokens that share scales, and the scales."""
        if side == "keys":
            return INT8_GROUP, self.sides["key_scales"][layer]
        return 1, self.sides["value_scales"][layer]

    def finish(self) -> None:
        """Wait until everything is stored."""
        self._wait()
        for stream in self._streams.values():
            stream.synchronize()
        self._streams = {}

    def _wait(self) -> None:
        if self._copied:
            device = self._copied[0].device
            torch.cuda.current_stream(device).wait_stream(self._streams[device])
            if self._landed:
                self._streams[device].synchronize()
            for target, landed in self._landed:
                target.copy_(landed)
            self._copied, self._landed = [], []


def write_means(room: Tensor, start: int, keys: Tensor) -> None:
    """Put the means of `keys` [1, Hkv, n, D] of the tokens from `start` on, where a block begins, into their `room`."""
    states, first = keys.transpose(1, 2), start // SUMMARY_TOKENS
    whole = states.shape[1] // SUMMARY_TOKENS
    blocks = states[:, : whole * SUMMARY_TOKENS].unflatten(1, (whole, SUMMARY_TOKENS))
    room[:, first : first + whole] = blocks.mean(dim=2)
    if whole * SUMMARY_TOKENS < states.shape[1]:
        room[:, first + whole] = states[:, whole * SUMMARY_TOKENS :].mean(dim=1)


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
