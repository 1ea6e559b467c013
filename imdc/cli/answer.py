"""Reading a document and answering about it, and files: what commands share. No printing here."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imdc.config import PrefillConfig
from imdc.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from imdc.report import PrefillReport, StepReport


@dataclass(frozen=True, slots=True)
class Reading:
    """One answer and what it cost.

    Attributes:
        answer: the new text, without special tokens.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated.
        first_token_seconds: time to first token (TTFT), wall-clock, from the call to the first new token.
        seconds: wall-clock time of the whole call.
        peak_bytes: peak memory above the start, weights not counted; None where the system does not tell.
        peak_kind: what `peak_bytes` counts.
        report: of the prefill; None for the unpatched model.
    """

    answer: str
    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    seconds: float
    peak_bytes: int | None
    peak_kind: str
    report: PrefillReport | None

    def as_json(self) -> dict[str, Any]:
        """Values for `--json`."""
        values: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "answer",
                "prompt_tokens",
                "new_tokens",
                "first_token_seconds",
                "seconds",
                "peak_bytes",
                "peak_kind",
            )  # fmt: skip
        }
        if self.report is not None:
            values["backend"] = self.report.backend
            values["kv_bytes"] = self.report.kv_bytes
            values["memory_tokens"] = self.report.memory_tokens
            values["prefill_seconds"] = self.report.seconds
            values["restarts"] = self.report.restarts
            values["host_bytes"] = self.report.host_bytes
            values["recalled_bytes"] = self.report.recalled_bytes
            values["recall_seconds"] = self.report.recall_seconds
            values["steps"] = [
                {
                    "chunk_tokens": step.chunk_tokens,
                    "memory_before": step.memory_before,
                    "memory_after": step.memory_after,
                    "seconds": step.seconds,
                    "kv_bytes": step.kv_bytes,
                }
                for step in self.report.steps
            ]
        return values


class FirstToken:
    """A streamer for generate() that notes when the first new token comes out.

    `seconds` counts from the moment the object is made; None before the first token.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self.seconds: float | None = None
        self._prompt_seen = False
        self._began = time.perf_counter()

    def put(self, value: Any) -> None:
        """Called by generate() with the prompt, then with every new token."""
        if self._prompt_seen and self.seconds is None:
            self.seconds = time.perf_counter() - self._began
        self._prompt_seen = True

    def end(self) -> None:
        """Called by generate() at its end."""


def read_document(path: str) -> str:
    """Text of a UTF-8 file, or of standard input for "-".

    Raises:
        ConfigError: the file is missing, not UTF-8 text, or empty.
    """
    name = "standard input" if path == "-" else repr(path)
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {(error.strerror or str(error)).lower()}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text (byte {error.start}); convert it to a text file first") from error
    if "\0" in text:
        raise ConfigError(f"{name} is not text: it holds zero bytes; convert it to a text file first")
    if not text.strip():
        raise ConfigError(f"{name} is empty; there is nothing to read")
    return text


def check_writable(path: str | None) -> None:
    """Refuse a file that cannot be written, before anything takes time.

    Raises:
        ConfigError: it is a folder, its folder does not exist, or either may not be written.
    """
    if path is None:
        return
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise ConfigError(f"{path!r} cannot be written: its folder does not exist")
    if target.is_dir():
        raise ConfigError(f"{path!r} cannot be written: it is a folder")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise ConfigError(f"{path!r} cannot be written: permission denied")


def write_text(path: str, text: str) -> None:
    """Write a UTF-8 file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path!r} cannot be written: {(error.strerror or str(error)).lower()}") from error


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and advice off the terminal; for command line processes only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; None takes CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no device of that name can be used here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason.rstrip('.')}; use --device cpu") from error
    return device


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    *,
    max_new_tokens: int,
    config: PrefillConfig | None,
    on_step: Callable[[StepReport], None] | None = None,
) -> Reading:
    """Greedy answer of `model` to the prompt `ids`: patched by `config`, or as it is where that is None."""
    import torch

    import imdc
    from imdc.profiler.allocations import PeakMemory, make_resident

    make_resident(model)
    input_ids = torch.tensor([ids], device=model.device)
    handle = imdc.patch(model, config, on_step=on_step) if config is not None else None
    try:
        with PeakMemory(model.device) as peak:
            first = FirstToken()
            began = time.perf_counter()
            output = model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=first,
            )
            seconds = time.perf_counter() - began
        report = handle.report if handle is not None else None
    finally:
        if handle is not None:
            handle.remove()
    new = output[0, input_ids.shape[1] :].tolist()
    return Reading(
        answer=str(tokenizer.decode(new, skip_special_tokens=True)).strip(),
        prompt_tokens=len(ids),
        new_tokens=len(new),
        first_token_seconds=first.seconds if first.seconds is not None else seconds,
        seconds=seconds,
        peak_bytes=peak.bytes,
        peak_kind=peak.kind,
        report=report,
    )
