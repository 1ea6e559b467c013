"""While an answer is written, take its memory back anew: what it needs changes with every sentence.

Every `recall_every` tokens each layer compares the token that is decoded with the keys in the store, as a question is
(`imdc.prefill.recall`); where the memory holds a quarter of the text or less, with the mean keys of blocks first and
with the keys of the best blocks then. The pairs of the text that it or the question attends to most replace those that
the cache held of it: a key's score is the higher of the two, and of the question's only those of the pairs that it took
can matter. What was read and written since the text stays. Then the layer attends as ever. Values are read of the
chosen pairs alone, so a renewal moves about half of what a question does, and with blocks far less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imdc.cache.cache import ImdcCache
from imdc.config import PrefillConfig
from imdc.prefill.recall import Recall
from imdc.prefill.renumber import turned
from imdc.prefill.softmax import Softmax


def renewal_due(config: PrefillConfig, cache: ImdcCache) -> bool:
    """Whether the next token takes back anew: every `recall_every`-th of an answer."""
    every = config.recall_every
    return every > 0 and (cache.tail + 1) % every == 0


@dataclass(slots=True)
class Renewal:
    """The renewal of one forward call that appends to `cache`, whose rows all asked about the text of one store."""

    recall: Recall
    cache: ImdcCache

    def serves(self, module: nn.Module) -> bool:
        """Whether `module` is an attention module of the model, of a layer that is compressed."""
        return self.recall.parts.is_compressed(module)

    def renew(self, layer: int, q: Tensor, softmax: Softmax) -> None:
        """Replace what `layer` holds of the text, in place, for the queries `q` [B, Hq, n, D] of its last tokens."""
        held, rows = self.cache.layers[layer], self.cache.rows
        store, parts = self.recall.store, self.recall.parts
        assert rows is not None, "only a filled cache decodes"
        for row in range(q.shape[0]):
            padding, asked = int(rows.padding[row, layer]), int(rows.tokens[row]) - store.tokens
            own = asked + held.tail
            text = slice(padding, held.stored - own)
            if not self.recall.replaces(text.stop - text.start):
                continue
            asking, own_k = q[row : row + 1], held.keys[row : row + 1, :, text.stop :]
            end = int(rows.position[row]) + held.tail
            if self.recall.compact:
                asking, own_k = (turned(parts, layer, x, end, back=True) for x in (asking, own_k))
                grown = parts.query_scale(torch.arange(end - asking.shape[2], end, device=asking.device), asking.dtype)
                asking = asking if grown is None else asking.div_(grown)
            self.recall.taken = rows.taken[row]
            keys, values, _ = self.recall.take(
                layer,
                asking,
                own_k,
                held.values[row : row + 1, :, text.stop :],
                softmax,
                keep=text.stop - text.start,
                attends=False,
            )
            if self.recall.compact:
                keys = turned(parts, layer, keys, end - own)
            held.keys[row, :, text], held.values[row, :, text] = keys[0], values[0]
