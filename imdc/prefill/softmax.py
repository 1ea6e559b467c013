"""How the logits of a layer become weights: its scale, its cap, and its attention sinks.

An attention sink in the sense of gpt-oss is one learned logit per query head, without key and value: it takes a share
of every softmax and gives nothing. With the log-sum-exp L of a query's logits and the sink s, all its weights, and so
its output, are exp(L - log(exp(L) + exp(s))) of what they are without it. That is applied after any attention that
gives L, so no kernel knows of sinks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imdc.errors import ImdcError
from imdc.model.parts import Parts
from imdc.prefill.backends import Backend


@dataclass(frozen=True, slots=True)
class Softmax:
    """The rule of one layer.

    Attributes:
        scale: factor on the logits.
        softcap: cap of the logits, or None.
        sinks: one logit per query head [Hq], or None.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @classmethod
    def of(cls, parts: Parts, scale: float, named: Mapping[str, Any]) -> Softmax:
        """The rule that a layer of the model names in its attention call.

        Raises:
            ImdcError: the call lacks what the model has: transformers hands it over under another name.
        """
        found = cls(scale, named.get("softcap"), named.get("s_aux"))
        has = (parts.caps_logits, found.softcap, "softcap"), (parts.family.sinks, found.sinks, "s_aux")
        for wanted, value, name in has:
            if wanted and value is None:
                raise ImdcError(
                    f"attention of model_type={parts.config.model_type!r} came without {name}; install a release of "
                    f"transformers that imdc was tested with"
                )
        return found

    @property
    def logits(self) -> dict[str, Any]:
        """What kernels are told."""
        return {"scale": self.scale, "softcap": self.softcap}

    def with_sinks(self, lse: Tensor) -> Tensor:
        """Log-sum-exp float32 [..., Hq, Q] of logits, the sinks counted in where there are any."""
        return lse if self.sinks is None else torch.logaddexp(lse, self.sinks.float()[:, None])

    def attend(
        self, backend: Backend, q: Tensor, k: Tensor, v: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`backend.chunk_attention` by this rule: output [B, Hq, Q, D], and log-sum-exp [B, Hq, Q], sinks included."""
        out, lse = backend.chunk_attention(q, k, v, window=window, **self.logits)
        if self.sinks is None:
            return out, lse
        total = self.with_sinks(lse)
        return out.mul_((lse - total).exp_()[..., None].to(out.dtype)), total
