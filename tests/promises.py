"""What every generate() call of a patched model has to keep to, whatever is asked: the promises of the design."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_models import build, two_layers
from torch import Tensor
from transformers import PreTrainedModel

import imdc
from imdc.cache.layers import MemoryLayer
from imdc.errors import UnsupportedCallError
from imdc.layer_budgets import fullest_share
from imdc.model import hf
from imdc.prefill.softmax import Softmax
from imdc.prefill.step import StepRun

MODES = ("greedy", "beams", "lookup", "assisted")


@functools.cache
def model_of(family: str, window: int) -> PreTrainedModel:
    return build(family, max_position_embeddings=window, **two_layers(family))


@functools.cache
def assistant() -> PreTrainedModel:
    return build("llama", seed=5, num_hidden_layers=1)


@dataclass(frozen=True)
class Call:
    """One or two generate() calls over one cache.

    Attributes:
        family: a row of `tiny_models.FAMILIES`.
        turns: per turn the number of new tokens of each row; a second turn is only taken by greedy and lookup.
        options: of `imdc.patch`.
        mode: how tokens are chosen.
        new_tokens: generated per turn.
        side: where shorter rows are padded.
        twins: whether the first two rows are equal.
        period: the rows repeat themselves after so many tokens.
        window: `max_position_embeddings`.
        seed: of the prompts.
    """

    family: str
    turns: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    mode: str = "greedy"
    new_tokens: int = 4
    side: str = "left"
    twins: bool = False
    period: int = 50
    window: int = 4096
    seed: int = 0

    def row(self, turn: int, number: int) -> Tensor:
        """The new tokens of a row in a turn."""
        number = 0 if self.twins and number == 1 else number
        generator = torch.Generator().manual_seed(self.seed * 1000 + turn * 100 + number)
        tokens = torch.randint(3, 128, (self.period,), generator=generator)
        return tokens.repeat(-(-self.turns[turn][number] // self.period))[: self.turns[turn][number]]

    def decoding(self, mode: str) -> dict[str, Any]:
        """The options of generate()."""
        chosen = {
            "greedy": {},
            "beams": {"num_beams": 2, "num_return_sequences": 2},
            "lookup": {"prompt_lookup_num_tokens": 3},
            "assisted": {"assistant_model": assistant()},
        }[mode]
        return {"max_new_tokens": self.new_tokens, "do_sample": False, "pad_token_id": 0, **chosen}


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [n_i] as ids and mask [B, max n]."""
    width = max(row.numel() for row in rows)
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for number, row in enumerate(rows):
        place = slice(width - row.numel(), None) if side == "left" else slice(0, row.numel())
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


@contextmanager
def refused_before_anything(model: PreTrainedModel) -> Iterator[None]:
    """A refusal may come before the model computes anything, never in the middle of a prompt or an answer."""
    calls: list[None] = []
    decoder: Any = model.model
    hook = decoder.register_forward_pre_hook(lambda module, args: calls.append(None))
    try:
        yield
    except UnsupportedCallError as error:
        if calls:
            raise AssertionError("refused in mid-generation") from error
        raise
    finally:
        hook.remove()


def talk(model: PreTrainedModel, call: Call, rows: list[int], mode: str) -> list[tuple[Tensor, ...]]:
    """Per turn the tokens that every row [in `rows`] of the call got, in one batch."""
    ids = mask = torch.zeros(len(rows), 0, dtype=torch.long)
    cache: Any = None
    answers = []
    for turn in range(len(call.turns)):
        new, new_mask = padded([call.row(turn, row) for row in rows], call.side)
        ids, mask = torch.cat((ids, new), dim=1), torch.cat((mask, new_mask), dim=1)
        with refused_before_anything(model):
            output = model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                eos_token_id=None,
                return_dict_in_generate=True,
                **call.decoding(mode),
            )
        generated = output.sequences[:, ids.shape[1] :]
        answers.append(generated.chunk(len(rows)))
        cache = output.past_key_values
        if mode == "beams":
            break
        ids = output.sequences
        mask = torch.nn.functional.pad(mask, (0, generated.shape[1]), value=1)
    return answers


@contextmanager
def watched(model: PreTrainedModel, config: imdc.PrefillConfig) -> Iterator[None]:
    """Hold every layer of every step against its plan."""
    attend = StepRun.attend

    def checked(run: StepRun, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        window, step = run.parts.windows[layer], run.step
        before = run.row.stored(layer)
        out = attend(run, layer, q, k, v, softmax)
        after = run.row.stored(layer)
        assert out.shape == q.shape and bool(out.isfinite().all())
        if window is not None:
            assert after <= window - 1
        else:
            full = run.parts.full_layers
            if layer == full[-1]:
                assert sum(run.row.stored(one) for one in full) == len(full) * step.memory_after
            if config.layer_budget == "uniform":
                assert (before, after) == (step.memory_before, step.memory_after)
            keys, values = run.row.keys[layer], run.row.values[layer]
            assert keys is not None and values is not None and keys.shape == values.shape
            if config.schedule != "full":
                assert after <= max(fullest_share(config) * config.memory_tokens, before)
        return out

    StepRun.attend = checked  # type: ignore[method-assign]
    try:
        yield
    finally:
        StepRun.attend = attend  # type: ignore[method-assign]


def same(ours: list[tuple[Tensor, ...]], theirs: list[tuple[Tensor, ...]], row: int) -> bool:
    """Whether `row` of one batch got the tokens of another call's first row, turn by turn."""
    return all(torch.equal(our_rows[row], their_rows[0]) for our_rows, their_rows in zip(ours, theirs, strict=True))


def check(call: Call) -> bool:
    """Hold a call against all promises; returns False where it was refused, for positions or for an old release."""
    model = model_of(call.family, call.window)
    config = imdc.PrefillConfig(**call.options)
    rows = list(range(len(call.turns[0])))
    total = max(sum(turn[row] for turn in call.turns) for row in rows) + len(call.turns) * call.new_tokens
    has_memory = call.family != "mistral_sliding"
    roomy = config.memory_tokens >= total or config.schedule == "full" or not has_memory
    with imdc.patch(model, config) as handle:
        try:
            with watched(model, config):
                together = talk(model, call, rows, call.mode)
        except UnsupportedCallError as error:
            old = hf.RUNNING < hf.CROPS_ASSISTED and "transformers 5.23" in str(error)
            assert old or (call.window < 4096 and "the model was trained for" in str(error))
            return False
        assert handle.report is not None
        if call.twins and len(call.turns) == 1:
            assert handle.report.rows < len(rows) or len(rows) == 1
        if config.schedule != "full":
            assert handle.report.memory_tokens <= config.memory_tokens
            chunk = config.chunk_tokens
            assert isinstance(chunk, int)
            for step in handle.report.steps:
                assert step.memory_before + step.chunk_tokens <= max(
                    config.memory_tokens + chunk, step.memory_before + max(1, chunk // 4)
                )
        for row in rows:
            assert same(together, talk(model, call, [row], call.mode), row), "a row in a batch differs from it alone"
        if call.mode in ("lookup", "assisted") and (config.decode_tokens is None or roomy):
            assert same(together, talk(model, call, rows, "greedy"), 0), f"{call.mode} differs from greedy"
    if roomy:
        for row in rows:
            plain = talk(model, call, [row], call.mode if call.mode == "beams" else "greedy")
            assert same(together, plain, row), "a memory that holds all differs from the unpatched model"
    return True


def bounded_after(call: Call) -> None:
    """The cache of one greedy call stays within its memory and decode_tokens."""
    model = model_of(call.family, call.window)
    config = imdc.PrefillConfig(**call.options)
    ids, mask = padded([call.row(0, row) for row in range(len(call.turns[0]))], call.side)
    with imdc.patch(model, config):
        output = model.generate(
            ids, attention_mask=mask, eos_token_id=None, return_dict_in_generate=True, **call.decoding("greedy")
        )
    grown = call.new_tokens - 1 if config.decode_tokens is None else min(call.new_tokens - 1, config.decode_tokens)
    cache = output.past_key_values
    assert cache.get_seq_length() == output.sequences.shape[1] - 1
    for layer in cache.layers:
        if isinstance(layer, MemoryLayer) and config.schedule != "full":
            most = fullest_share(config) * config.memory_tokens
            assert layer.keys is not None and layer.keys.shape[2] <= most + grown
