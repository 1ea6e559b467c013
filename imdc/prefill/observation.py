"""What an observer sees of one layer of one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imdc.config import PrefillConfig
from imdc.errors import ConfigError
from imdc.kernels.limits import OUTPUT_CHANGE
from imdc.observers import Observer
from imdc.prefill.backends import Backend
from imdc.schedule import observing_rows


@dataclass(frozen=True, slots=True)
class Observation:
    """One layer of one step, after its attention.

    Attributes:
        q: queries [1, Hq, Q, D]: the chunk, then the tail rows that ride along.
        k: keys [1, Hkv, T, D]: memory | chunk | tail rows.
        v: values [1, Hkv, T, D].
        out: outputs of the attention, as `q`.
        lse: log-sum-exp of the logits, and of attention sinks where there are any, float32 [1, Hq, Q].
        scale: factor on the logits.
        softcap: cap of the logits, or None.
        chunk_tokens: queries of the chunk itself.
        tail_rows: queries of the prompt tail after them, 0 if none ride along.
        layer: number of the layer.
        step: number of the step.
        config: the options of the prefill.
        backend: who computes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    softcap: float | None
    chunk_tokens: int
    tail_rows: int
    layer: int
    step: int
    config: PrefillConfig
    backend: Backend

    @property
    def scored_keys(self) -> int:
        """Keys of memory | chunk, the candidates."""
        return self.k.shape[2] - self.tail_rows

    def scores(self) -> Tensor:
        """What the config asks for: `mass`, or `output_change`."""
        return self.output_change() if self.config.scoring == OUTPUT_CHANGE else self.mass()

    def mass(self) -> Tensor:
        """Attention mass of the candidates, pooled as the config says, float32 [1, Hkv, scored_keys].

        The mean over the query heads of a KV group and over those of the observing queries
        (`imdc.observers.Observer.queries`) that vote.

        Raises:
            ConfigError: the observer names no queries.
        """
        return self._seen_by_voters()

    def output_change(self) -> Tensor:
        """By how much the outputs of these queries would change without each candidate, pooled, shape as `mass`.

        See `imdc.kernels.reference.key_mass` (CAOTE, arXiv 2504.14051).

        Raises:
            ConfigError: the observer names no queries.
        """
        return self._seen_by_voters(v=self.v, out=self.out)

    def _seen_by_voters(self, **values: Tensor) -> Tensor:
        rows = observing_rows(self.config, self.chunk_tokens, self.tail_rows)
        if rows is None:
            raise ConfigError(
                f"observer={str(self.config.observer)!r} asks for attention mass, but its queries() gives None; derive "
                f"it from imdc.observers.AttentionObserver"
            )
        return self.backend.key_mass(
            self.q,
            self.k,
            self.lse,
            scale=self.scale,
            rows=rows,
            stride=self.config.observation_stride,
            scored_keys=self.scored_keys,
            softcap=self.softcap,
            pool_kernel=self.config.pool_kernel,
            pooling=self.config.pooling,
            **values,
        )


def scored(observer: Observer, seen: Observation) -> Tensor:
    """What `observer` gives the candidates, float32 [1, Hkv, scored_keys].

    Raises:
        ConfigError: an observer of the user's own gives scores of another shape, or no numbers.
    """
    scores = observer.score(seen)
    if observer.is_plain:
        return scores
    wanted = (1, seen.k.shape[1], seen.scored_keys)
    if tuple(scores.shape) != wanted:
        raise ConfigError(
            f"observer={str(observer)!r} gives scores of shape {tuple(scores.shape)}; return one for each KV head and "
            f"candidate, {wanted}"
        )
    if bool(scores.isnan().any()):
        raise ConfigError(f"observer={str(observer)!r} gives scores that are NaN; return -inf for what is to go first")
    return scores
