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
from imdc.prefill.history import check_mask_shape
from imdc.prefill.hook import overlay
from imdc.prefill.logits import WantedLogits, real_tokens
from imdc.prefill.reader import OnStep, Reader
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
        prompts = self._prompts(cache, input_ids, attention_mask)
        wanted = WantedLogits(real_tokens(input_ids, attention_mask), logits_to_keep)
        # Rows of a branch that was not asked yet hold the same document.
        alike = cache.is_empty or (cache.is_branch and not cache.asked and not self.compresses)
        order, unique = _distinct(prompts) if alike else (list(range(len(prompts))), list(range(len(prompts))))
        anew, cache.anew = cache.anew, {}
        device = self.parts.device()
        backend, _ = self.backend()
        # Those that are on when it begins, whatever other threads do. Compressing an answer is no prefill.
        probes = [] if self.compresses else list(self.probes)
        batch = self._batch(cache, [*prompts, *anew.values()], len(unique), len(prompts))
        chunk, restarts = self._first_chunk(cache, batch, backend), 0
        overlay(hf.attention_implementations(layer.self_attn for layer in self.parts.decoder.layers))
        while True:
            planner = self.planner(chunk, cache.expected_new_tokens)
            turns = [self._turn(planner, cache, prompts[index], index, anew.get(index)) for index in unique]
            # Rows with compact positions may have smaller sizes than asked for; the report says so.
            config = next((turn.config for turn in turns if turn.row.compact), self.config)
            reader = Reader(
                self.parts,
                self.config,
                self.forward,
                backend=backend,
                on_step=self.on_step,
                probed=bool(probes),
            )
            outputs: list[Any] = []
            try:
                for number, turn in enumerate(turns):
                    keep = wanted.keep(order, number)
                    outputs.append(reader.read(turn, turn.ids.to(device), number, forward_options, keep=keep))
                break
            except torch.OutOfMemoryError:
                mean = chunk or int(config.chunk_tokens)
                # Pairs are taken back for a question as a whole.
                whole_question = cache.is_branch and cache.store is not None
                if whole_question or min(mean, batch.prompt_tokens) <= least_chunk(batch):
                    raise
            # The frames that the error held are gone, and with them their tensors.
            del reader
            turns, outputs = [], []
            chunk = chunk_after_shortage(self.parts, self.config, batch, backend.name, mean)
            restarts += 1
        # Its workspace would raise the peak of stacking the rows.
        reports = tuple(reader.reports)
        for take, result in itertools.product(probes, reader.recorded or ()):
            take(result)
        recalled, recall_seconds = reader.recalled_bytes, reader.recall_seconds
        del reader
        rows = [turn.row for turn in turns]
        cache.load_rows(rows, torch.tensor(order, device="cpu"), cache.get_seq_length() + input_ids.shape[1])
        if cache.is_branch:
            # Compressed again, its memory is no longer that of the text with the question behind it.
            cache.asked, cache.store = True, None if self.compresses else cache.store
        output = outputs[0]
        output.logits = wanted.of_batch([output.logits for output in outputs], order)
        setattr(output, hf.cache_argument(type(self.parts.model).forward), cache)
        report = PrefillReport(
            config=config,
            backend=backend.name,
            rows=len(unique),
            prompt_tokens=sum(turn.ids.numel() for turn in turns),
            memory_tokens=cache.stored_tokens(),
            kv_bytes=cache.kv_bytes(),
            seconds=time.perf_counter() - began,
            steps=reports,
            restarts=restarts,
            host_bytes=0 if cache.store is None else cache.store.nbytes(),
            recalled_bytes=recalled,
            recall_seconds=recall_seconds,
        )
        return output, report

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
        parts = self.parts
        weight = parts.decoder.get_input_embeddings().weight
        attention: Any = parts.decoder.layers[0].self_attn
        softcap = getattr(parts.config, "attn_logit_softcapping", None) is not None
        return choose(self.config.backend, parts.device(), weight.dtype, int(attention.head_dim), softcap)

    def _prompts(self, cache: ImdcCache, input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
        rows, columns = input_ids.shape
        if columns == 0 or rows == 0:
            raise UnsupportedCallError(f"input_ids has shape {tuple(input_ids.shape)}: an empty prompt; pass a token")
        if attention_mask is None:
            return list(input_ids)
        check_mask_shape(attention_mask, (rows, columns), cache.get_seq_length())
        real = real_tokens(input_ids, attention_mask)
        prompts = [ids[mask] for ids, mask in zip(input_ids, real, strict=True)]
        for number, prompt in enumerate(prompts):
            if prompt.numel() == 0:
                raise UnsupportedCallError(f"row {number} of input_ids is all padding: an empty prompt; pass a token")
        return prompts

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


def _distinct(prompts: list[Tensor]) -> tuple[list[int], list[int]]:
    """(order, unique): prompt i equals prompt unique[order[i]]."""
    seen: dict[bytes, int] = {}
    unique: list[int] = []
    order: list[int] = []
    for number, prompt in enumerate(prompts):
        name = prompt.cpu().numpy().tobytes()
        if name not in seen:
            seen[name] = len(unique)
            unique.append(number)
        order.append(seen[name])
    return order, unique
