"""The prefill loop: rows of a batch one after another, each in the steps of its schedule."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from imdc.cache.cache import ImdcCache
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.model import hf
from imdc.model.parts import Parts
from imdc.planner.batch import Batch
from imdc.planner.fit import LEAST_CHUNK, least_chunk
from imdc.prefill.backends import Backend, choose
from imdc.prefill.device_room import chunk_after_shortage, fitting_chunk
from imdc.prefill.hook import overlay
from imdc.prefill.prompts import Prompts
from imdc.prefill.reader import OnStep, Reader, RowsRead
from imdc.prefill.recording import ProbeResult
from imdc.prefill.text_store import check_recall
from imdc.prefill.turn import RowTurn, TurnPlanner, row_turn
from imdc.report import PrefillReport


@dataclass(slots=True)
class Engine:
    """Prefills prompts of one model by one config, or compresses what they left again while it answers.

    `probes` are those who get a `ProbeResult` of every row that a prefill reads, while there are any; engines that are
    made from this one share the list.
    """

    parts: Parts
    config: PrefillConfig
    forward: Callable[..., Any]
    on_step: OnStep | None = None
    compresses: bool = False
    probes: list[Callable[[ProbeResult], None]] = field(default_factory=list)

    def prefill(
        self,
        cache: ImdcCache,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        logits_to_keep: int = 1,
        **forward_options: Any,
    ) -> tuple[Any, PrefillReport]:
        """Read the prompt `input_ids` int64 [B, T] into `cache`.

        Rows that are equal are read once. The cache changes only when everything was read: after an error it is as
        it was.

        Everything is decided and checked for all rows before the first is read.

        Args:
            cache: empty, or filled by earlier turns.
            input_ids: new tokens of every row.
            attention_mask: [B, columns seen + T], or its last T columns; 0 marks padding, on any side. None: none.
            logits_to_keep: for how many last tokens of each row logits are given; 0 for every column of `input_ids`,
                zeros where it is padding.
            forward_options: passed to the model's forward with the last chunk.

        Returns:
            The model's output with logits [B, logits_to_keep or T, V], and the report.

        Raises:
            UnsupportedCallError: an empty prompt, or positions beyond the model's window.
            ConfigError: nothing fits `memory_limit`, or what it is a share of is not known.
        """
        if cache.is_branch and not self.compresses and self.config.schedule != "full":
            return self.whole.prefill(
                cache, input_ids, attention_mask, logits_to_keep=logits_to_keep, **forward_options
            )
        if not self.compresses and self.parts.full_layers:
            check_recall(self.config, cache, input_ids.shape[1])
        began = time.perf_counter()
        # Rows of a branch that was not asked yet hold the same document.
        alike = cache.is_empty or (cache.is_branch and not cache.asked and not self.compresses)
        prompts = Prompts.of(
            input_ids, attention_mask, seen=cache.get_seq_length(), logits_to_keep=logits_to_keep, alike=alike
        )
        # Those that are on when it begins, whatever other threads do. Compressing an answer is no prefill.
        probes = [] if self.compresses else list(self.probes)
        read = self._read(cache, prompts, forward_options, probed=bool(probes))
        for take, result in itertools.product(probes, read.recorded):
            take(result)
        order = torch.tensor(prompts.order, device="cpu")
        cache.load_rows([turn.row for turn in read.turns], order, cache.get_seq_length() + input_ids.shape[1])
        if cache.is_branch:
            # Compressed again, its memory is no longer that of the text with the question behind it.
            cache.asked, cache.store = True, None if self.compresses else cache.store
        output = read.outputs[0]
        output.logits = prompts.wanted.of_batch([output.logits for output in read.outputs])
        setattr(output, hf.cache_argument(type(self.parts.model).forward), cache)
        return output, self._report(cache, read, time.perf_counter() - began)

    def _read(self, cache: ImdcCache, prompts: Prompts, options: dict[str, Any], *, probed: bool) -> RowsRead:
        """Read the rows, and anew with smaller chunks where the device runs out of memory."""
        anew, cache.anew = cache.anew, {}
        backend, _ = self.backend()
        batch = self._batch(cache, [*prompts.texts, *anew.values()], len(prompts.unique), len(prompts.texts))
        chunk, restarts = self._first_chunk(cache, batch, backend), 0
        overlay(hf.attention_implementations(layer.self_attn for layer in self.parts.decoder.layers))
        while True:
            planner = self.planner(chunk, cache.expected_new_tokens)
            # All are planned, and with that checked, before the first is read.
            turns = [self._turn(planner, cache, prompts.texts[row], row, anew.get(row)) for row in prompts.unique]
            # What rows share goes with the reader: its workspace would raise the peak of stacking them.
            reader = Reader(self.parts, self.config, self.forward, backend=backend, on_step=self.on_step, probed=probed)
            try:
                return replace(reader.read_all(turns, prompts.wanted, options), restarts=restarts)
            except torch.OutOfMemoryError:
                mean = chunk or int(_sizes(turns, self.config).chunk_tokens)
                # Pairs are taken back for a question as a whole.
                whole_question = cache.is_branch and cache.store is not None
                if whole_question or min(mean, batch.prompt_tokens) <= least_chunk(batch):
                    raise
            # The frames that the error held are gone, and with them their tensors.
            del reader
            turns = []
            chunk = chunk_after_shortage(self.parts, self.config, batch, backend.name, mean)
            restarts += 1

    def _report(self, cache: ImdcCache, read: RowsRead, seconds: float) -> PrefillReport:
        return PrefillReport(
            config=_sizes(read.turns, self.config),
            backend=read.backend,
            rows=len(read.turns),
            prompt_tokens=sum(turn.ids.numel() for turn in read.turns),
            memory_tokens=cache.stored_tokens(),
            kv_bytes=cache.kv_bytes(),
            seconds=seconds,
            steps=read.reports,
            restarts=read.restarts,
            host_bytes=0 if cache.store is None else cache.store.nbytes(),
            recalled_bytes=read.recalled_bytes,
            recall_seconds=read.recall_seconds,
        )

    @property
    def whole(self) -> Engine:
        """This engine for questions, of which nothing is dropped: layers keep the shares that they have."""
        return replace(self, config=replace(self.config, schedule="full", layer_budget="uniform"))

    def exceeded(self, tokens: int) -> int | None:
        """What memory and chunk hold, where that is less than `tokens`; None where so many may be attended to."""
        memory, chunk = self.config.memory_tokens, self.config.chunk_tokens
        if tokens <= memory:
            return None
        if not isinstance(chunk, int):
            chunk = fitting_chunk(self.parts, self.config, Batch(tokens), self.backend()[0].name)
        return memory + chunk if tokens > memory + chunk else None

    def backend(self) -> tuple[Backend, str]:
        """The backend for the model where it is now, and why."""
        return choose(self.config.backend, self.parts.device(), self.parts.traits)

    def planner(self, chunk: int | None = None, new_tokens: int | None = None) -> TurnPlanner:
        """Who decides how rows are read, before a turn of `new_tokens` (None: not known).

        Where the chunk is "auto" and not chosen yet, the smallest one says whether a turn can fit the window.
        """
        if chunk is None and not isinstance(self.config.chunk_tokens, int):
            chunk = LEAST_CHUNK
        return TurnPlanner(self.parts, self.config, chunk, new_tokens)

    def _turn(
        self, planner: TurnPlanner, cache: ImdcCache, prompt: Tensor, number: int, anew: Tensor | None
    ) -> RowTurn:
        if self.compresses:
            return planner.again(cache.take_row(number), prompt)
        turn = row_turn(planner, cache, prompt, number, anew)
        if cache.store is not None and not cache.is_empty and len(turn.steps) > 1:
            raise UnsupportedCallError(
                f"a question of {turn.ids.numel()} tokens takes {len(turn.steps)} chunks, and pairs are taken back for "
                f"one; raise chunk_tokens={self.config.chunk_tokens}"
            )
        turn.store = cache.store
        turn.row.question = turn.ids[-self.config.observation_tokens :].cpu()
        return turn

    def _batch(self, cache: ImdcCache, texts: list[Tensor], rows: int, copies: int) -> Batch:
        """What is read, as the planner wants it; inside `generate()` at least one token follows."""
        seen = 0 if cache.rows is None else int(cache.rows.tokens.max()) + cache.tail
        new_tokens, question = max(1, cache.expected_new_tokens or 0), 0
        if cache.turn is not None and cache.turn.asked:
            # The longest question takes more than a short one with a long answer.
            question = new_tokens if cache.turn.question is None else cache.turn.question
            new_tokens = max(1, new_tokens - question)
        return Batch(
            prompt_tokens=max(text.numel() for text in texts),
            rows=rows,
            cache_rows=copies,
            new_tokens=new_tokens,
            question_tokens=question,
            seen_tokens=seen,
            stored_tokens=cache.stored_tokens(),
            stored_bytes=cache.held_bytes(),
        )

    def _first_chunk(self, cache: ImdcCache, batch: Batch, backend: Backend) -> int | None:
        """The mean chunk that `memory_limit` allows, where the config asks for "auto"."""
        if isinstance(self.config.chunk_tokens, int):
            return None
        if cache.phase == "decode":
            # The prefill left room for compressing again, and a generation is not refused half way.
            return batch.prompt_tokens
        return fitting_chunk(self.parts, self.config, batch, backend.name, asked=cache.is_branch)


def _sizes(turns: list[RowTurn], config: PrefillConfig) -> PrefillConfig:
    """The options in force: rows with compact positions may have smaller sizes than `config` asks for."""
    return next((turn.config for turn in turns if turn.row.compact), config)
