"""Who decides what is kept: one function per observer, all in one registry.

An observer gives every key of memory | chunk a score per KV head; the lowest are dropped. "prompt_tail", "window" and
"all_queries" score by attention mass (see `imdc.kernels.reference.key_mass`), each with other observing rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imdc.config import PrefillConfig
from imdc.errors import ConfigError, did_you_mean
from imdc.prefill.backends import Backend
from imdc.schedule import observing_rows


@dataclass(frozen=True, slots=True)
class Observation:
    """One layer of one step, after its attention.

    Attributes:
        q: queries [1, Hq, Q, D]: the chunk, then the tail rows that ride along.
        k: keys [1, Hkv, T, D]: memory | chunk | tail rows.
        lse: float32 [1, Hq, Q].
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


Observer = Callable[[Observation], Tensor]


def _mass(seen: Observation) -> Tensor:
    rows = observing_rows(seen.config, seen.chunk_tokens, seen.tail_rows)
    assert rows is not None, "only observers with queries ask for mass"
    return seen.backend.key_mass(
        seen.q,
        seen.k,
        seen.lse,
        scale=seen.scale,
        rows=rows,
        scored_keys=seen.scored_keys,
        softcap=seen.softcap,
        pool_kernel=seen.config.pool_kernel,
    )


def prompt_tail(seen: Observation) -> Tensor:
    """The last tokens of the prompt vote at every step (FINCH, TACL 2024, made incremental).

    The last chunk holds those tokens itself, so there it is `window`.
    """
    return _mass(seen)


def window(seen: Observation) -> Tensor:
    """The last tokens of the chunk vote (SnapKV, arXiv 2404.14469; TOVA, arXiv 2401.06104)."""
    return _mass(seen)


def all_queries(seen: Observation) -> Tensor:
    """Every token of the chunk votes (the IMDC paper; H2O, arXiv 2306.14048)."""
    return _mass(seen)


def sink_recent(seen: Observation) -> Tensor:
    """The latest keys win; the sinks are kept anyway (StreamingLLM, arXiv 2309.17453)."""
    order = torch.arange(seen.scored_keys, dtype=torch.float32, device=seen.k.device)
    return order.expand(*seen.k.shape[:2], -1).contiguous()


def key_diff(seen: Observation) -> Tensor:
    """Keys that differ from the mean key direction win: 1 - cosine (KeyDiff, arXiv 2504.15364); no query needed."""
    directions = torch.nn.functional.normalize(seen.k[:, :, : seen.scored_keys].float(), dim=-1)
    mean = torch.nn.functional.normalize(directions.mean(dim=2, keepdim=True), dim=-1)
    return 1.0 - (directions * mean).sum(dim=-1)


def random(seen: Observation) -> Tensor:
    """Uniform scores, the same in every run: the baseline that any observer must beat."""
    generator = torch.Generator().manual_seed(seen.layer * 1_000_003 + seen.step)
    scores = torch.rand(*seen.k.shape[:2], seen.scored_keys, generator=generator)
    return scores.to(seen.k.device)


OBSERVERS: dict[str, Observer] = {
    "prompt_tail": prompt_tail,
    "window": window,
    "all_queries": all_queries,
    "sink_recent": sink_recent,
    "key_diff": key_diff,
    "random": random,
}


def get_observer(name: str) -> Observer:
    """The observer called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return OBSERVERS[name]
    except KeyError:
        raise ConfigError(
            f"observer={name!r} is not known; use one of {', '.join(OBSERVERS)}.{did_you_mean(name, OBSERVERS)}"
        ) from None
