"""Sample questions that ride along while a document is read: each alone, and the best of them counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, build, token_ids
from torch import Tensor

import imdc
from imdc.config import PrefillConfig
from imdc.errors import ConfigError, UnsupportedCallError
from imdc.observers import Observer, Questions, Window
from imdc.schedule import build_steps, tail_rows

TIGHT = {"memory_tokens": 64, "chunk_tokens": 32, "sink_tokens": 2, "recent_tokens": 8, "pool_kernel": 1}


class Noted(Questions):
    """Notes what every layer of every step was scored."""

    name = "noted"

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[Tensor] = []

    def score(self, seen: Any) -> Tensor:
        scores: Tensor = seen.mass()
        self.scores.append(scores)
        return scores


def scores_of_one_step(model: Any, questions: list[Tensor], positions: str) -> list[Tensor]:
    """Per layer the scores of the only step that drops anything: what led to it is the same whoever votes."""
    observer = Noted()
    with imdc.patch(model, **{**TIGHT, "chunk_tokens": 300}, positions=positions, observer=observer) as handle:
        handle.read(token_ids(100), questions)
    return observer.scores


@pytest.mark.parametrize("family", ["llama", "gemma3", "smollm3", "phi3"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_every_question_votes_as_if_it_were_alone(family: str, positions: str) -> None:
    model = FAMILIES[family]()
    questions = [token_ids(length, seed=seed) for length, seed in ((5, 1), (9, 2), (3, 3))]
    together = scores_of_one_step(model, questions, positions)
    alone = [scores_of_one_step(model, [one], positions) for one in questions]
    layers = len(alone[0])
    assert len(together) == 3 * layers and layers in (1, 3)
    for layer in range(layers):
        # Below the first layer all that was read is the same, so what differs is rounding.
        for number in range(3):
            torch.testing.assert_close(together[3 * layer + number], alone[number][layer], rtol=1e-4, atol=1e-6)


def test_the_highest_score_of_any_question_counts() -> None:
    model = FAMILIES["llama"]()
    with imdc.patch(model, **{**TIGHT, "chunk_tokens": 300, "memory_tokens": 20}, backend="reference") as handle:
        kept = []
        for seeds in ((1,), (2,), (1, 2), (2, 1)):
            cache = handle.read(token_ids(100), [token_ids(6, seed=seed) for seed in seeds])
            kept.append(cache.layers[0].keys[0, 0].tolist())
    assert kept[0] != kept[1] and kept[2] == kept[3] and kept[2] not in kept[:2]
    assert all(key in kept[0] + kept[1] for key in kept[2])


def test_planned_rows_are_those_that_ride_along() -> None:
    config = PrefillConfig(observer=Questions([[5, 6, 7], [8, 9]]), memory_tokens=64, chunk_tokens=32)
    steps = build_steps(200, config)
    drops = [step.memory_after < step.attended_tokens for step in steps]
    assert any(drops) and drops[-1]
    assert tail_rows(steps, config, full_layers=3) == [5 * drop for drop in drops]
    assert tail_rows(steps, config, full_layers=0) == [0] * len(steps)


def test_positions_of_questions_fit_the_window_each_by_itself() -> None:
    model = build("llama", max_position_embeddings=128)
    questions = [token_ids(10, seed=seed) for seed in range(9)]
    with imdc.patch(model, **TIGHT) as handle:
        cache = handle.read(token_ids(300), questions, room=32)
        assert cache.compact
        assert handle.ask(cache, questions[0], max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (1, 4)
        with pytest.raises(UnsupportedCallError, match="the model was trained for 128"):
            handle.read(token_ids(300), [token_ids(100)], room=32)


@pytest.mark.parametrize(
    ("observer", "questions", "message"),
    [
        ("questions", None, "needs questions"),
        ("window", [token_ids(5)], "no effect with observer='window'"),
        (Window(), [token_ids(5)], "no effect"),
        ("prompt_tail", [], "input_ids is a list"),
        ("questions", [token_ids(5)[:, :0]], "pass token ids"),
    ],
)
def test_questions_that_nobody_would_read_are_refused(observer: str | Observer, questions: Any, message: str) -> None:
    with imdc.patch(FAMILIES["llama"](), **TIGHT, observer=observer) as handle:
        with pytest.raises(UnsupportedCallError, match=message):
            handle.read(token_ids(100), questions)
        assert handle.report is None


def test_an_empty_question_is_no_question() -> None:
    with pytest.raises(ConfigError, match="without tokens"):
        Questions([[1, 2], []])
