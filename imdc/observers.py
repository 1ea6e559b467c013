"""Observers decide what is retained: they score the keys of memory | chunk, and the lowest scores are evicted.

Each is one class here. `imdc.patch(model, observer=...)` also takes an object of your own class; see `Observer`. The
planner asks an observer how many queries it needs and what it allocates, so a plan holds for yours too. torch is only
imported where scores are computed: a plan needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from imdc.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from imdc.config import PrefillConfig
    from imdc.prefill.observation import Observation

# Sample questions where nobody knows what will be asked. They find more together than any of them alone.
GENERAL_QUESTIONS = (
    "What is the code, the number or the password?",
    "Who is it, and what is the name?",
    "Where is it, and in which place or city?",
    "When will it happen, on which day, in which month or year?",
    "Which colour, animal, object or food is it?",
    "What was decided, promised or agreed?",
)


class Observer:
    """Base of all observers: who votes, and how votes become scores.

    A subclass overrides `score`, and what else differs. One that scores by attention derives from
    `AttentionObserver` instead.

    Attributes:
        name: what reports and tables call it.
        query_aware: whether it knows the question at the end of the prompt; results of both kinds are told apart.
        rides_along: whether the last `observation_tokens` tokens of the prompt ride along with every chunk as further
            queries; their KV pairs are not kept.
        questions: token ids of sample questions, which then ride along in the place of the prompt's last tokens, each
            as if it alone followed the prompt; a key's score is the highest that it gets from any of them.
    """

    name: str = ""
    query_aware: bool = False
    rides_along: bool = False
    questions: tuple[tuple[int, ...], ...] = ()

    def queries(self, config: PrefillConfig, chunk_tokens: int) -> int | None:
        """How many of a chunk's last queries vote by their attention; None where scores need no query.

        Args:
            config: the options of the prefill.
            chunk_tokens: tokens of the chunk.
        """
        return None

    def score(self, seen: Observation) -> Tensor:
        """Scores of the candidates, float32 [1, Hkv, seen.scored_keys]; the highest are retained.

        Sinks and recent tokens are retained whatever they score.
        """
        raise NotImplementedError(f"{type(self).__name__} does not override score()")

    @property
    def is_plain(self) -> bool:
        """Whether its scores are those of `Observation.scores`, which a backend may compute and use in one launch."""
        return type(self).score is AttentionObserver.score

    def scratch_bytes(self, keys: int, kv_heads: int, head_dim: int) -> int:
        """Bytes that `score` allocates at once besides its result and what `Observation.mass` takes."""
        return 0

    def __str__(self) -> str:
        """Its name."""
        return self.name


class AttentionObserver(Observer):
    """Scores by the attention of the observing queries: what a key gets of it, or what their outputs owe to the key.

    The option `scoring` says which; see `imdc.kernels.reference.key_mass`. The last `observation_tokens` queries of the
    chunk vote.
    """

    def queries(self, config: PrefillConfig, chunk_tokens: int) -> int | None:
        """The observation window, as far as the chunk has so many tokens."""
        return min(config.observation_tokens, chunk_tokens)

    def score(self, seen: Observation) -> Tensor:
        """What the option `scoring` asks for."""
        return seen.scores()


class PromptTail(AttentionObserver):
    """The last tokens of the prompt vote at every step (FINCH, TACL 2024, made incremental).

    The last chunk holds those tokens itself, so there it is `Window`.
    """

    name, query_aware, rides_along = "prompt_tail", True, True


class Questions(PromptTail):
    """Sample questions vote at every step: the highest score over them, each the mean over its own tokens.

    Without any, where nobody knows the questions, the prompt's last tokens are the only one.
    """

    name = "questions"

    def __init__(self, questions: Sequence[Sequence[int]] = ()) -> None:
        """`questions` are token ids, as they would follow the prompt; none may be empty."""
        self.questions = tuple(tuple(int(token) for token in question) for question in questions)
        if not all(self.questions):
            raise ConfigError("questions holds one without tokens; leave it out, or give its token ids")


class Window(AttentionObserver):
    """The last tokens of the chunk vote (SnapKV, arXiv 2404.14469; TOVA, arXiv 2401.06104)."""

    name = "window"


class AllQueries(AttentionObserver):
    """Every token of the chunk votes (the IMDC paper; H2O, arXiv 2306.14048)."""

    name = "all_queries"

    def queries(self, config: PrefillConfig, chunk_tokens: int) -> int | None:
        """All of them."""
        return chunk_tokens


class SinkRecent(Observer):
    """The latest keys win; the attention sinks are retained anyway (StreamingLLM, arXiv 2309.17453)."""

    name = "sink_recent"

    def score(self, seen: Observation) -> Tensor:
        """The place of each key."""
        import torch

        order = torch.arange(seen.scored_keys, dtype=torch.float32, device=seen.k.device)
        return order.expand(*seen.k.shape[:2], -1).contiguous()


class KeyDiff(Observer):
    """Keys that differ from the mean key direction win: 1 - cosine (KeyDiff, arXiv 2504.15364); no query needed."""

    name = "key_diff"

    def score(self, seen: Observation) -> Tensor:
        """One minus the cosine with the mean direction."""
        from torch.nn.functional import normalize

        directions = normalize(seen.k[:, :, : seen.scored_keys].float(), dim=-1)
        mean = normalize(directions.mean(dim=2, keepdim=True), dim=-1)
        return 1.0 - (directions * mean).sum(dim=-1)

    def scratch_bytes(self, keys: int, kv_heads: int, head_dim: int) -> int:
        """Two float32 copies of the keys."""
        return 8 * keys * kv_heads * head_dim


class Random(Observer):
    """Uniform scores, the same in every run: the baseline that any observer must beat."""

    name = "random"

    def score(self, seen: Observation) -> Tensor:
        """Numbers that depend on layer and step alone."""
        import torch

        generator = torch.Generator().manual_seed(seen.layer * 1_000_003 + seen.step)
        scores = torch.rand(*seen.k.shape[:2], seen.scored_keys, generator=generator, device="cpu")
        return scores.to(seen.k.device)


OBSERVERS: dict[str, Observer] = {
    observer.name: observer
    for observer in (PromptTail(), Questions(), Window(), AllQueries(), SinkRecent(), KeyDiff(), Random())
}


def find_observer(observer: str | Observer) -> Observer:
    """The observer of that name, or the object itself.

    Raises:
        ConfigError: there is none of that name, or the object cannot be used.
    """
    if isinstance(observer, Observer):
        taken = OBSERVERS.get(observer.name)
        if not observer.name or (taken is not None and type(observer) is not type(taken)):
            raise ConfigError(
                f"observer={type(observer).__name__}() has name={observer.name!r}; set `name` to one that is not taken "
                f"({', '.join(OBSERVERS)})"
            )
        return observer
    if not isinstance(observer, str) or observer not in OBSERVERS:
        hint = did_you_mean(observer, OBSERVERS) if isinstance(observer, str) else ""
        raise ConfigError(
            f"observer must be one of {', '.join(map(repr, OBSERVERS))} or an object of a subclass of imdc.Observer, "
            f"got {observer!r}.{hint}"
        )
    return OBSERVERS[observer]
