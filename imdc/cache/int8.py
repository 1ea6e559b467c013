"""Keys and values in eight bits: keys per channel, values per token, both asymmetric (KIVI, arXiv 2402.02750, 3.1).

A few channels of the keys are large in every token, so each channel of a KV head has a scale of its own, which the
tokens of a group share; values have no such channels, and each token of a KV head has its own. For the n numbers x_i
that share one, with low and high the least and the greatest of them:

    step = (high - low) / 255            code_i = round((x_i - low) / step) - 128
    zero = low + 128 step                x_i is about step * code_i + zero

which is off by half a step at most, and by what float32 rounds. KIVI quantises to two bits in groups of 32 tokens and
keeps the latest tokens as they are; in eight bits larger groups will do, and a text is complete when it is asked.

Shapes are those of `imdc.cache.store.HostStore`: states [1, n, Hkv, D], their codes int8 likewise, and of g groups the
steps and zeros together, float32 [1, g, 2, Hkv, D] for keys and [1, n, 2, Hkv, 1] for values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imdc.config import INT8_GROUP


def quantised_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of keys [1, n, Hkv, D], whose first token begins a group; the last group may be shorter."""
    tokens = keys.shape[1]
    short = -tokens % INT8_GROUP
    if short:
        # Its last token again and again: the least and the greatest number stay what they are.
        keys = torch.cat((keys, keys[:, -1:].expand(-1, short, -1, -1)), dim=1)
    codes, scales = _quantised(keys.unflatten(1, (-1, INT8_GROUP)), 2)
    return codes[:, :tokens], scales


def quantised_values(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of values [1, n, Hkv, D]."""
    return _quantised(values[:, :, None], 4)


def _quantised(states: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Codes [1, g * n, Hkv, D] of states [1, g, n, Hkv, D] that share scales along dimension `shared`, and those."""
    low, high = (states.amin(shared, keepdim=True).float(), states.amax(shared, keepdim=True).float())
    step = (high - low).div_(255)
    # Where all are the same there is no step to divide by, and every code is that of the least.
    codes = (states - low).div_(step.masked_fill(step == 0, 1)).round_().clamp_(0, 255).sub_(128).to(torch.int8)
    return codes.flatten(1, 2), torch.cat((step, low.add_(step, alpha=128)), dim=2)


def dequantised(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    """States float32 [1, n, Hkv, D] of tokens of which `group` share each of the scales, from the first one on."""
    states = codes.float()
    step, zero = scales.unbind(2)
    groups = codes.shape[1] // group
    whole = groups * group
    if groups:
        shared = states[:, :whole].unflatten(1, (groups, group))
        shared.mul_(step[:, :groups, None]).add_(zero[:, :groups, None])
    states[:, whole:].mul_(step[:, groups:]).add_(zero[:, groups:])
    return states


def dequantised_at(codes: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """Keys float32 [1, m, Hkv, D] of tokens that lie in the groups int64 [1, m, Hkv] of all those of `scales`."""
    states = codes.float()
    step, zero = scales.unbind(2)
    index = groups[..., None].expand(codes.shape)
    return states.mul_(step.gather(1, index)).add_(zero.gather(1, index))
