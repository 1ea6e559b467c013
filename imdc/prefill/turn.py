"""What a turn will do to every row, decided and checked before anything is computed.

A row's own text alone decides about its positions, never the other rows of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imdc.cache.cache import ImdcCache
from imdc.cache.rows import Row
from imdc.cache.store import HostStore
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.layer_budgets import planned_layers
from imdc.model.parts import Parts
from imdc.model.shape import ModelShape
from imdc.observers import find_observer
from imdc.planner.footprint import balanced_steps
from imdc.positions import compact_positions, fitted, last_position, misfit, widest_step
from imdc.schedule import Step, tail_rows


class HistoryLostError(UnsupportedCallError):
    """A turn that does not fit what is stored, and would fit if the whole conversation were read anew."""


@dataclass(slots=True)
class RowTurn:
    """One row and how it will be read.

    Attributes:
        row: its memory, which reading replaces.
        config: the options with the sizes in force for this row.
        steps: what is read when.
        ids: int64 [n], what is read.
        tails: rows that ride along with each step.
        tail_ids: int64 [n]; the last of them are those rows.
        layers: KV pairs of the compressed layers before the first step and after each; see `planned_layers`.
        questions: lengths of the questions that those rows are, one after another; empty for a single one.
        store: where all pairs that are read go, or from which a question takes them back.
    """

    row: Row
    ids: Tensor
    config: PrefillConfig
    steps: tuple[Step, ...]
    tails: list[int]
    tail_ids: Tensor
    layers: list[tuple[int, ...]]
    questions: tuple[int, ...] = ()
    store: HostStore | None = None

    @property
    def tail_spans(self) -> list[int]:
        """Positions that the rows of each step take: questions take the same ones, as each follows the text alone."""
        longest = max(self.questions, default=None)
        return [tail if longest is None else min(tail, longest) for tail in self.tails]


@dataclass(slots=True)
class TurnPlanner:
    """Decides how rows are read; `chunk` replaces the config's chunk_tokens where it is not None."""

    parts: Parts
    config: PrefillConfig
    chunk: int | None = None
    new_tokens: int | None = None

    def fresh(self, prompt: Tensor) -> RowTurn:
        """The turn of a row that has read nothing.

        Raises:
            UnsupportedCallError: it would not stay within the model's window.
        """
        row = Row.empty(len(self.parts.windows))
        if not self.parts.full_layers or self.config.positions == "original":
            return self._checked(self._planned(row, prompt))
        if self._compact(prompt, None):
            return self._checked(self._planned(row, prompt, compact=True))
        open_end = self.new_tokens is None and self.parts.rope_type == "longrope"
        if open_end or self._compact(prompt, self.new_tokens):
            turn = self._planned(row, prompt, compact=True)
            if self._misfit(turn) is None:
                return turn
        # The answer alone passes the window, as it does without imdc.
        return self._checked(self._planned(row, prompt))

    def _compact(self, prompt: Tensor, new_tokens: int | None) -> bool:
        window, full = self.parts.trained_window, len(self.parts.full_layers)
        return compact_positions(0, prompt.numel(), new_tokens, window, self.config, full)

    def further(self, row: Row, prompt: Tensor, *, can_reread: bool = False) -> RowTurn:
        """The turn of a row that goes on from earlier ones.

        Args:
            row: of the cache.
            prompt: int64 [n], the new tokens.
            can_reread: whether the whole conversation is at hand, so that reading it anew is worth asking for.

        Raises:
            HistoryLostError: it would not stay within the model's window, unless it is read anew.
            UnsupportedCallError: it would not stay within the model's window.
        """
        window, full = self.parts.trained_window, self.parts.full_layers
        end = row.position + prompt.numel()
        if row.compact:
            turn = self._planned(row, prompt, compact=True)
            problem = self._misfit(turn)
            if problem is not None:
                raise HistoryLostError(f"{problem}; or read the conversation anew")
            return turn
        last = last_position(row.position, prompt.numel(), self.new_tokens)
        if self.config.positions != "auto" or not full or last <= window:
            return self._checked(self._planned(row, prompt))
        if all(row.stored(layer) == row.tokens for layer in full):
            # Nothing was dropped, so its keys are numbered 0..m-1 already.
            turn = self._planned(row, prompt, compact=True)
            if self._misfit(turn) is None:
                return turn
            row.compact = False
        if end > window or can_reread:
            raise HistoryLostError(
                f"positions='auto' began with original positions and this turn reaches position {last}, the model "
                f"was trained for {window}; pass the whole conversation as input_ids of generate(), which then reads "
                f"it anew, or patch with positions='compact' and read the conversation anew"
            )
        return self._checked(self._planned(row, prompt))

    def again(self, row: Row, token: Tensor) -> RowTurn:
        """Compress a row while it answers: its next token is read, and the prompt's last tokens judge with it.

        The question is still the same, so it is asked again: its tokens ride along as they did while the prompt was
        read. Nothing is refused here, in the middle of an answer.
        """
        window, full, question = self.parts.trained_window, self.parts.full_layers, row.question
        if self.config.decode_tokens is None and not row.compact:
            # Another row of the batch has filled its window; this one loses nothing.
            config = replace(self.config, schedule="full", layer_budget="uniform")
            turn = self._planned(row, token, config=config)
        else:
            turn = self._planned(row, token, compact=row.compact)
        if question is not None and full and find_observer(self.config.observer).queries(self.config, 1) is not None:
            step = turn.steps[0]
            rows = question.numel() if step.memory_after < step.attended_tokens else 0
            room = window - row.position - 1
            if row.compact or (self.parts.rope_type == "longrope" and room >= 0):
                rows = max(0, min(rows, room))
            turn.tails, turn.tail_ids, turn.questions = [rows], question.to(token.device), ()
        return turn

    def _planned(
        self, row: Row, prompt: Tensor, *, compact: bool = False, config: PrefillConfig | None = None
    ) -> RowTurn:
        row.compact = compact
        config = config or (fitted(self.config, self.parts.trained_window) if compact else self.config)
        full = self.parts.full_layers
        held = [row.stored(layer) for layer in full]
        stored = sum(held) // len(held) if held else 0
        shape = ModelShape.from_model(self.parts.model) if config.levels_bytes else None
        steps = balanced_steps(shape, prompt.numel(), config, stored_tokens=stored, chunk_tokens=self.chunk)
        tails = tail_rows(steps, config, full_layers=len(full))
        turn = RowTurn(row, prompt, config, steps, tails, prompt, planned_layers(config, len(full), steps, held))
        asked = find_observer(config.observer).questions
        if asked:
            turn.tail_ids, turn.questions = (
                torch.tensor([token for one in asked for token in one], device="cpu"),
                tuple(map(len, asked)),
            )
        return turn

    def _misfit(self, turn: RowTurn) -> str | None:
        return misfit(
            turn.config,
            self.parts.trained_window,
            widest=widest_step(turn.steps, turn.tail_spans, turn.layers),
            left=max(turn.layers[-1]),
            new_tokens=self.new_tokens,
        )

    def _checked(self, turn: RowTurn) -> RowTurn:
        if turn.row.compact:
            problem = self._misfit(turn)
            if problem is not None:
                raise UnsupportedCallError(problem)
        else:
            self._check_factors(turn)
        return turn

    def _check_factors(self, turn: RowTurn) -> None:
        """Refuse original positions where the rotary embedding changes between one call of the model and the next.

        longrope takes other factors for a call that passes the window, the dynamic kind a base that grows with it.
        Keys of one text must share them.
        """
        kind, window, row = self.parts.rope_type, self.parts.trained_window, turn.row
        if kind not in ("longrope", "dynamic"):
            return
        ends = [row.position + end for end in step_ends(self.parts, turn)]
        last = last_position(row.position, sum(step.chunk_tokens for step in turn.steps), self.new_tokens)
        if kind == "dynamic":
            differ = len({max(end, window) for end in ends}) > 1
        else:
            stored = [row.position] if row.tokens else []
            differ = len({end > window for end in (*stored, *ends, last)}) > 1
        if differ:
            raise UnsupportedCallError(
                f"positions='original' up to position {max(*ends, last)} changes the rotary base of rope_type={kind!r} "
                f"at {window}, so that some keys would not fit the others; use positions='compact'"
            )


def step_ends(parts: Parts, turn: RowTurn) -> list[int]:
    """Original positions that each step reaches, tail rows included, counted from the turn's first token."""
    tokens = sum(step.chunk_tokens for step in turn.steps)
    return [
        tokens if tail and not any(parts.windows) else step.start + step.chunk_tokens + tail
        for step, tail in zip(turn.steps, turn.tail_spans, strict=True)
    ]


def begin_turn(planner: TurnPlanner, cache: ImdcCache, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """Find the rows that no longer fit what `cache` holds of them, and note their whole text to be read anew.

    That needs the whole conversation in `input_ids`. Where only the new tokens were passed nothing is noted, and the
    prefill says what is wrong.

    Args:
        planner: with the engine's options, and what is known of the call.
        cache: empty, or filled by earlier turns.
        input_ids: int64 [B, T] of the caller; beams repeat its rows.
        attention_mask: [B, columns of all turns], or None.
    """
    cache.anew = {}
    held = cache.get_seq_length()
    if cache.rows is None or input_ids.ndim != 2 or input_ids.shape[1] <= held:
        return
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        return
    rows = cache.rows.tokens.numel()
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for number in range(rows if rows % input_ids.shape[0] == 0 else 0):
        place = number * input_ids.shape[0] // rows
        mask = real[place].to(input_ids.device, torch.bool)
        prompt = input_ids[place, held:][mask[held:]]
        try:
            if prompt.numel():
                planner.further(cache.take_row(number), prompt, can_reread=True)
        except HistoryLostError:
            cache.anew[number] = input_ids[place][mask]


def row_turn(planner: TurnPlanner, cache: ImdcCache, prompt: Tensor, number: int, anew: Tensor | None) -> RowTurn:
    """The turn of row `number`: the first one, a further one, or one that reads the text `anew`.

    Raises:
        UnsupportedCallError: it would not stay within the model's window.
    """
    if cache.is_empty:
        return planner.fresh(prompt)
    row = cache.take_row(number)
    # A text that was noted for another call does not end in this prompt.
    if anew is not None and anew.numel() == row.tokens + prompt.numel() and torch.equal(anew[row.tokens :], prompt):
        return planner.fresh(anew)
    return planner.further(row, prompt)
