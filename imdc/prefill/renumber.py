"""Give rotated keys other positions without turning them back first."""

from __future__ import annotations

import torch
from torch import Tensor

from imdc.kernels.reference import rotate
from imdc.model.parts import Parts, Tables

# Bits of a float32 mantissa that a shorter type has no room for.
_LOST_BITS = {torch.bfloat16: 16, torch.float16: 13}


def moved(keys: Tensor, old: Tables, new: Tables | None, *, seed: int = 0) -> Tensor:
    """`keys` that were rotated by the tables `old`, as if rotated by `new`; None means not at all.

    The rotation by the difference is computed in float32 and rounded once, at random to one of the two neighbours:
    rounding to the nearer one would hold back every key that moves by less, or stretch it, in the same way each time.
    Tables of a short dtype are not quite rotations, they stretch a little; dividing by that keeps it from growing with
    every move. Keys whose tables stay the same stay the same bit for bit.

    Args:
        keys: [..., T, D].
        old: with cosines and sines [..., T, R], R <= D, in the dtype in which they were applied.
        new: as `old`.
        seed: of the rounding; another one for every move, so that the errors are independent.
    """
    cos, sin = old.cos.float(), old.sin.float()
    stretch = cos * cos + sin * sin
    if new is None:
        return rotate(keys.float(), cos / stretch, -sin / stretch, old.interleaved).to(keys.dtype)
    to_cos, to_sin = new.cos.float(), new.sin.float()
    cos, sin = (to_cos * cos + to_sin * sin) / stretch, (to_sin * cos - to_cos * sin) / stretch
    return _rounded(rotate(keys.float(), cos, sin, old.interleaved), keys.dtype, seed)


def turned(parts: Parts, layer: int, states: Tensor, end: int, *, back: bool = False) -> Tensor:
    """`states` [1, H, n, D] of `layer`, rotated to the positions before `end`, or with that taken `back`."""
    positions = torch.arange(end - states.shape[2], end, device=states.device)
    # transformers rotates in the model's dtype, and a memory that dropped nothing must equal its cache.
    tables = parts.rotary(layer, positions, states.dtype)
    if tables is None:
        return states
    return moved(states, tables, None) if back else rotate(states, *tables)


def _rounded(x: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """float32 `x` in `dtype`, rounded so that the mean error is zero; what `dtype` can hold stays as it is."""
    lost = _LOST_BITS.get(dtype)
    if lost is None:
        return x.to(dtype)
    generator = torch.Generator(x.device).manual_seed(seed)
    noise = torch.randint(0, 1 << lost, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return ((x.view(torch.int32) + noise) & -(1 << lost)).view(torch.float32).to(dtype)
