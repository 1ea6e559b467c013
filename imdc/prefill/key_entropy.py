"""How much there is in the keys of a layer: the truncated matrix entropy of UNComp, for `layer_budget="entropy"`."""

from __future__ import annotations

import torch
from torch import Tensor

# UNComp's code takes the 32 largest eigenvalues of heads of 128 dimensions.
_LARGEST_SHARE = 4


def key_entropy(keys: Tensor) -> float:
    """Truncated matrix entropy of keys, the mean over KV heads, in nats.

    UNComp (arXiv 2410.03090; menik1126/UNComp, `utils/entropy_utils.py`): keys are centred and normalised to length
    one, and of the eigenvalues e_i of their covariance, which add up to one, the k largest count:

        H = - sum over i = 1..k of e_i log e_i,  k = D / 4

    Keys in n <= k directions alike have H = log n; what lies outside of the k does not count. UNComp divides by log D.

    Args:
        keys: [1, Hkv, T, D], rotated. Keys that are all the same, a single one, or keys that are not finite have an
            entropy of 0.

    Returns:
        H; the host waits for the device.
    """
    covariances = []
    # Head by head: that takes 8 T D bytes for a moment, where all at once would be the peak of a step.
    for head in keys[0]:
        states = head.float()
        states = torch.nn.functional.normalize(states - states.mean(dim=0), dim=1)
        covariances.append(states.T @ states)
    # In float64 on the host: not every device has that. Of keys that overflowed there are no eigenvalues; what the
    # model makes of them says so itself.
    covariance = torch.stack(covariances).cpu().double().nan_to_num()
    values = torch.linalg.eigvalsh(covariance).clamp_min(0.0)
    shares = values / values.sum(dim=1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    largest = shares[:, -max(1, keys.shape[3] // _LARGEST_SHARE) :]
    return float(torch.special.entr(largest).sum(dim=1).mean())
