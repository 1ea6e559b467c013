"""One question read in one way: the answer, its score, and what it cost."""

from __future__ import annotations

import time
from typing import Any

import torch
from longbench_data import Record
from longbench_metrics import score
from longbench_ways import Way

import imdc
from imdc.cli.answer import FirstToken
from imdc.profiler.allocations import PeakMemory


def read(lm: Any, record: Record, way: Way, ids: list[int]) -> dict[str, Any]:
    """Greedy answer of the model in `lm` (an `HFLM`) to `ids`, patched for this call as `way` says.

    Returns:
        Values for one line of JSON; where the device has too little memory, `error` says so and there is no score.
    """
    values: dict[str, Any] = {
        "way": way.name,
        "key": way.key,
        "task": record.task.name,
        "id": record.id,
        "prompt_sha": record.sha,
        "official_prompt": record.official,
        "length": record.length,
        "prompt_tokens": len(ids),
    }
    config = way.config(len(ids))
    handle = imdc.patch(lm.model, config) if config is not None else None
    try:
        values |= _generate(lm, record, ids)
        if handle is not None and handle.report is not None:
            report = handle.report
            values |= {
                "kv_bytes": report.kv_bytes,
                "backend": report.backend,
                "restarts": report.restarts,
                "memory_tokens": report.memory_tokens,
                "host_bytes": report.host_bytes,
                "recalled_bytes": report.recalled_bytes,
                # Tokens read, memory before, memory after.
                "plan": [[step.chunk_tokens, step.memory_before, step.memory_after] for step in report.steps],
            }
    except torch.OutOfMemoryError as error:
        values["error"] = str(error).splitlines()[0]
    finally:
        if handle is not None:
            handle.remove()
    return values


class _FirstToken(FirstToken):
    """Also the processor time up to the first token, of all threads: what a busy machine does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_seconds: float | None = None
        self._cpu_began = time.process_time()

    def put(self, value: Any) -> None:
        super().put(value)
        if self.seconds is not None and self.cpu_seconds is None:
            self.cpu_seconds = time.process_time() - self._cpu_began


def _generate(lm: Any, record: Record, ids: list[int]) -> dict[str, Any]:
    context = torch.tensor([ids], device=lm.device)
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if record.task.name == "samsum":
        # The official code's way out of endless dialogues: a newline ends the answer, but not as its first token.
        newline = lm.tokenizer.encode("\n", add_special_tokens=False)[-1]
        options |= {"min_length": len(ids) + 1, "eos_token_id": [lm.tokenizer.eos_token_id, newline]}
    with PeakMemory(context.device) as peak:
        first = _FirstToken()
        began = time.perf_counter()
        output = lm._model_generate(
            context,
            max_length=len(ids) + record.task.max_new_tokens,
            stop=[],
            attention_mask=torch.ones_like(context),
            streamer=first,
            **options,
        )
        seconds = time.perf_counter() - began
    new = output[0, len(ids) :].tolist()
    ttft = first.seconds if first.seconds is not None else seconds
    prediction = lm.tok_decode(new)
    return {
        "prediction": prediction,
        "score": score(record.task, prediction, record.answers, record.all_classes),
        "new_tokens": len(new),
        "ttft_seconds": ttft,
        "ttft_cpu_seconds": first.cpu_seconds,
        "decode_tokens_per_second": (len(new) - 1) / (seconds - ttft) if len(new) > 1 else None,
        "seconds": seconds,
        "peak_bytes": peak.bytes,
        "peak_kind": peak.kind,
    }
