"""A store of random pairs and a question, which the tests of recall take back from."""

from __future__ import annotations

import torch
from tiny_models import FAMILIES
from torch import Tensor

from imdc.cache.store import HostStore
from imdc.config import PrefillConfig
from imdc.model.parts import Parts
from imdc.prefill.backends import REFERENCE
from imdc.prefill.recall import Recall

# Attention sinks of its four query heads.
SINKS = torch.tensor([-2.0, 0.0, 1.0, 4.0])


def random_recall(tokens: int, compact: bool, int8: bool) -> tuple[Recall, Tensor, Tensor, Tensor]:
    """A store of one layer with random pairs, and queries, keys and values of a question of 7 tokens."""
    model = FAMILIES["llama"](max_position_embeddings=256)
    generator = torch.Generator().manual_seed(1)
    store = HostStore([0], tokens, int8=int8)
    keys, values = (torch.randn(1, 2, tokens, 16, generator=generator) for _ in range(2))
    for start in range(0, tokens, 50):
        store.write(0, start, keys[:, :, start : start + 50], values[:, :, start : start + 50])
    config = PrefillConfig(sink_tokens=2, recent_tokens=4, memory_tokens=20, pool_kernel=3, recall="host")
    q = torch.randn(1, 4, 7, 16, generator=generator)
    own_k, own_v = (torch.randn(1, 2, 7, 16, generator=generator) for _ in range(2))
    return Recall(store, Parts.of(model), config, REFERENCE, compact), q, own_k, own_v
