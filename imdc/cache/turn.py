"""What a running generate() call is about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from imdc.report import PrefillReport


@dataclass(slots=True)
class Turn:
    """What a running generate() call is about, as far as its forward calls must know.

    Attributes:
        assisted: whether several tokens in one forward call are candidates, of which some are taken back.
        drafting: whether this is the cache of an assistant model, which takes back what the other model rejects.
        columns: columns of all turns where an assisted call goes on from a filled cache, until its first forward
            call, which transformers gives the whole text once more; None in others.
        new_tokens: tokens that will be generated at most; None where that is not known.
        asked: whether a document is read for questions: `new_tokens` are then those of one and its answer.
        question: how many of those are the question's; None where that is not known.
        reached: whether a forward call came with the cache.
        report: of what its forward calls have read, the handle's own may be that of a call in another thread.
    """

    assisted: bool = False
    drafting: bool = False
    columns: int | None = None
    new_tokens: int | None = None
    asked: bool = False
    question: int | None = None
    reached: bool = False
    report: PrefillReport | None = None
