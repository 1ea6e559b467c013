"""What a reading does to the memory: which tokens' KV pairs are there after every step, recorded for `imdc.probe`.

Retention is the IMDC paper's ratio; the share of a chunk that later steps leave is what its code calls forgetting
(ZhiYuanZeng/Collie, branch emnlp2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from imdc.kernels import reference
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.prefill.backends import REFERENCE
from imdc.prefill.softmax import Softmax
from imdc.prefill.turn import RowTurn
from imdc.schedule import Step


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What the reading of one prompt row did to its memory; all tensors are on the CPU.

    Layers are all of the model. Those with a sliding window are not compressed: there `pairs` is 0, `places` is None
    and shares are NaN. Chunks are those of this turn; what earlier turns left is told apart as one more origin, the
    first.

    Attributes:
        row: number of the row among those that were read; see `imdc.report.StepReport`.
        steps: chunk and memory of every step.
        pairs: int64 [1 + steps, layers, KV heads, 1 + chunks], KV pairs by origin, before the first step and after
            each.
        mass_kept: float64 [steps, layers], share of the observing queries' attention over memory | chunk that the
            retained pairs hold, in exact softmax and before any pooling. Where the observer asks for no queries, the
            last `observation_tokens` of the chunk count; several questions count alike.
        places: per layer int64 [KV heads, pairs], which token of this turn's prompt each pair of the finished memory
            is of, ascending; -1 is an earlier turn.
    """

    row: int
    steps: tuple[Step, ...]
    pairs: Tensor
    mass_kept: Tensor
    places: tuple[Tensor | None, ...]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of this turn."""
        return sum(step.chunk_tokens for step in self.steps)

    @property
    def retention(self) -> Tensor:
        """Share of the memory before a step that survived it, float64 [steps, layers]; NaN before there is any."""
        by_layer = self.pairs.sum(dim=2)
        # Chunk i is origin i + 1, so a step's memory before is of the origins up to its own number.
        old = [after[:, : number + 1].sum(dim=1) for number, after in enumerate(by_layer[1:])]
        return torch.stack(old).double() / by_layer[:-1].sum(dim=2)

    @property
    def survival(self) -> Tensor:
        """The forgetting curve: share of a chunk's pairs that are there after a step, float64 [steps, layers, chunks].

        NaN where the chunk was not read yet.
        """
        read = torch.tensor([step.chunk_tokens for step in self.steps], device="cpu")
        unread = torch.ones(len(self.steps), len(self.steps), device="cpu").triu(1).bool()
        compressed = torch.tensor([places is not None for places in self.places], device="cpu")
        found = self.pairs[1:, ..., 1:].sum(dim=2).double() / (read * self.pairs.shape[2])
        return found.masked_fill(unread[:, None] | ~compressed[:, None], float("nan"))

    @property
    def origins(self) -> Tensor:
        """The age distribution: share of the memory by the chunk it is of, float64 [steps, layers, 1 + chunks].

        After each step; the first origin is what earlier turns left.
        """
        by_layer = self.pairs[1:].sum(dim=2)
        return by_layer.double() / by_layer.sum(dim=2, keepdim=True)

    def ages(self, layer: int) -> Tensor:
        """How many tokens before the prompt's last one each pair of the finished memory was read, int64 [heads, pairs].

        Pairs of earlier turns have the age of the whole prompt, which is the least that it can be.

        Args:
            layer: number of a layer without a sliding window.

        Raises:
            IndexError: there is no such layer, or it has a sliding window.
        """
        places = self.places[layer]
        if places is None:
            raise IndexError(f"layer {layer} has a sliding window, so nothing of it was compressed")
        return self.prompt_tokens - 1 - places

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers for JSON, NaN as None.

        `survival` [steps][chunks] and `origins` [steps][1 + chunks] are of all layers together, `layer_origins`
        [layers][1 + chunks] of each layer after the last step, `retention` and `mass_kept` [steps][layers].
        """
        together = self.pairs[1:].sum(dim=(1, 2)).double()
        return {
            "row": self.row,
            "steps": [asdict(step) for step in self.steps],
            "retention": _numbers(self.retention),
            "mass_kept": _numbers(self.mass_kept),
            "survival": _numbers(self.survival.nanmean(dim=1)),
            "origins": _numbers(together / together.sum(dim=1, keepdim=True)),
            "layer_origins": _numbers(self.origins[-1]),
        }


class Recorder:
    """Records one row while it is read: the steps tell it what their layers saw and kept.

    It computes what it needs besides, so that a reading that is recorded gives what it gives alone.
    """

    def __init__(self, turn: RowTurn, parts: Parts, number: int) -> None:
        """Before the first step of row `number`."""
        self._steps, self._number, self._layers = turn.steps, number, len(parts.windows)
        self._heads = ModelShape.from_model(parts.model).kv_heads
        self._starts = torch.tensor([step.start for step in turn.steps], device="cpu")
        held = {layer: (self._heads, turn.row.stored(layer)) for layer in parts.full_layers}
        self._places = {layer: torch.full(size, -1, device="cpu") for layer, size in held.items()}
        self._pairs = [self._count()]
        self._mass: list[list[float]] = []
        self._seen: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}

    def see(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        *,
        chunk_tokens: int,
        tails: Sequence[int],
        rows: int,
        stride: int,
        softmax: Softmax,
    ) -> None:
        """A layer is about to drop some of memory | chunk; `keep` will say which.

        Args:
            layer: its number.
            q: queries [1, Hq, Q, D]: the chunk, then the questions that ride along.
            k: keys [1, Hkv, T, D]: memory | chunk | questions.
            chunk_tokens: queries of the chunk.
            tails: queries of each question, none of which sees another.
            rows: observing queries, the last ones; of several questions all.
            stride: every how manyth of them votes.
            softmax: how logits become weights in this layer.
        """
        candidates = k.shape[2] - sum(tails)
        if len(tails) < 2:
            self._seen[layer] = _attention(q[:, :, -rows:], k, candidates, rows, stride, softmax)
            return
        first, seen = 0, torch.zeros(k.shape[1], candidates, device=k.device)
        for length in tails:
            asked, own = (x.narrow(2, start + first, length) for x, start in ((q, chunk_tokens), (k, candidates)))
            keys = torch.cat((k[:, :, :candidates], own), dim=2)
            seen += _attention(asked, keys, candidates, length, stride, softmax) / len(range(0, length, stride))
            first += length
        self._seen[layer] = seen

    def keep(self, layer: int, chosen: Tensor) -> None:
        """The layer kept these of memory | chunk: int64 [1, Hkv, n]."""
        self._chosen[layer] = chosen[0]

    def end_step(self, step: Step) -> None:
        """All layers have run."""
        read = torch.arange(step.start, step.start + step.chunk_tokens, device="cpu").expand(self._heads, -1)
        mass = [float("nan")] * self._layers
        for layer, before in self._places.items():
            candidates = torch.cat((before, read), dim=1)
            # A layer that said nothing dropped nothing.
            mass[layer] = 1.0
            if layer in self._chosen:
                chosen, seen = self._chosen[layer], self._seen[layer]
                mass[layer] = float(seen.gather(1, chosen).sum() / seen.sum())
                candidates = candidates.gather(1, chosen.cpu())
            self._places[layer] = candidates
        self._mass.append(mass)
        self._pairs.append(self._count())
        self._seen, self._chosen = {}, {}

    def result(self) -> ProbeResult:
        """What was recorded, after the last step."""
        return ProbeResult(
            row=self._number,
            steps=tuple(self._steps),
            pairs=torch.stack(self._pairs),
            mass_kept=torch.tensor(self._mass, dtype=torch.float64, device="cpu"),
            places=tuple(self._places.get(layer) for layer in range(self._layers)),
        )

    def _count(self) -> Tensor:
        """KV pairs by origin now, int64 [layers, heads, 1 + chunks]."""
        pairs = torch.zeros(self._layers, self._heads, 1 + len(self._steps), dtype=torch.long, device="cpu")
        for layer, places in self._places.items():
            # A place belongs to the last chunk that starts at or before it, -1 to none of them.
            origin = torch.bucketize(places, self._starts, right=True)
            pairs[layer].scatter_add_(1, origin, torch.ones_like(origin))
        return pairs


def _attention(q: Tensor, k: Tensor, candidates: int, rows: int, stride: int, softmax: Softmax) -> Tensor:
    """Attention that each of the first `candidates` keys gets from the observing queries in all.

    Args:
        q: the last queries [1, Hq, rows, D].
        k: keys [1, Hkv, T, D]; the last query sees all.
        candidates: keys that are asked about.
        rows: queries.
        stride: every how manyth of them votes.
        softmax: how logits become weights.

    Returns:
        float32 [Hkv, candidates], the mean over the query heads of a group of the sum over queries.
    """
    _, lse = softmax.attend(REFERENCE, q, k, k)
    mean = reference.key_mass(q, k, lse, rows=rows, stride=stride, scored_keys=candidates, **softmax.logits)[0]
    # The mean is over those queries that see the key, and later keys of a chunk are seen by fewer.
    last_seen = torch.arange(rows, device=k.device)[reference.voters(rows, rows, stride)] + k.shape[2] - rows
    blind = torch.searchsorted(last_seen, torch.arange(candidates, device=k.device))
    return mean * (last_seen.numel() - blind)


def _numbers(values: Tensor) -> Any:
    """Nested lists, NaN as None."""
    if values.ndim:
        return [_numbers(value) for value in values]
    number = float(values)
    return None if number != number else number
