"""`imdc profile`: run real prefills, measure every step, and hold the prediction against it."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from os.path import expanduser
from typing import TYPE_CHECKING, Any

from imdc.cli.answer import check_writable, choose_device, quiet_transformers, read_document, write_text
from imdc.cli.options import add_config_options, add_loading_options, config_from
from imdc.config import BALANCES, SCHEDULES, UNPATCHED, PrefillConfig, option_names
from imdc.errors import ConfigError, did_you_mean
from imdc.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from imdc.model.shape import ModelShape
    from imdc.prefill.recording import ProbeResult
    from imdc.profiler.measure import MeasuredPrefill
    from imdc.report import StepReport

    Progress = Callable[[int], AbstractContextManager[Callable[[StepReport], None]]]

# Memory against chunk, where the saving of IMDC over FM is looked up: it is largest near 2.
RATIOS = (0.5, 1.0, 1.8, 4.0, 8.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `imdc profile` measured.

    Attributes:
        model: what was loaded.
        device: where it ran.
        shape: its sizes.
        prompt_tokens: tokens of the prompt.
        prefills: the measured prefills, in the order asked for.
        savings: what IMDC levels -> memory over chunk -> share of FM's predicted peak above the weights that it saves.
        probes: name of a prefill -> what reading did to the memory; empty without --probe.
    """

    model: str
    device: str
    shape: ModelShape
    prompt_tokens: int
    prefills: tuple[MeasuredPrefill, ...]
    savings: dict[str, dict[float, float]]
    probes: dict[str, ProbeResult] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Values for `--json`, and the data of the report page."""
        return {
            "model": self.model,
            "device": self.device,
            "family": self.shape.family,
            "layers": self.shape.layers,
            "dtype": self.shape.dtype,
            "weight_bytes": self.shape.weights,
            "prompt_tokens": self.prompt_tokens,
            "prefills": [prefill.to_dict() for prefill in self.prefills],
            "predicted_savings": [
                {"balance": balance, "ratio": ratio, "saving": saving}
                for balance, savings in self.savings.items()
                for ratio, saving in savings.items()
            ],
            "probes": {name: result.to_dict() for name, result in self.probes.items()},
        }


def add_parser(subparsers: Any) -> None:
    """Add `profile` to the parser of `imdc`."""
    parser = subparsers.add_parser(
        "profile",
        help="measure the memory of every step of a real prefill against the prediction",
        description="Run real prefills of a model, measure memory and time of every step, and compare with what "
        "`imdc plan` predicts. Bytes are those above the weights.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file or a hub id")
    add_loading_options(parser)
    parser.add_argument("--prompt-tokens", metavar="N", help="length of the prompt, such as 32768 or 128k")
    parser.add_argument(
        "--file", type=expanduser, metavar="FILE", help="the prompt, UTF-8 text (default: CPython's help topics)"
    )
    parser.add_argument(
        "--compare",
        metavar="LIST",
        help=f"several in one run, such as fm,imdc; of {', '.join(SCHEDULES)} and {UNPATCHED}, the model's own prefill",
    )
    parser.add_argument(
        "--snapshot", type=expanduser, metavar="FILE", help="write PyTorch's memory snapshot for its viewer (CUDA only)"
    )
    parser.add_argument(
        "--plot",
        type=expanduser,
        metavar="FILE",
        help="draw memory over the prompt, such as out.png (needs matplotlib)",
    )
    parser.add_argument("--probe", action="store_true", help="read once more and show what became of the memory")
    parser.add_argument("--html", type=expanduser, metavar="FILE", help="write a report page that needs no network")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    # What is measured is a reading without a question, so nothing is taken back.
    add_config_options(parser, leave_out=[name for name in option_names() if name.startswith("recall")])


def compute(args: argparse.Namespace, progress: Progress | None = None) -> Outcome:
    """Load the model, then prefill and measure once per schedule; everything is checked before the model is loaded.

    Raises:
        ImdcError: bad input, see its message.
    """
    config = config_from(args)
    names = _names(args.compare, config)
    if args.prompt_tokens is None and args.file is None:
        raise ConfigError("give --prompt-tokens N, --file FILE, or both to read the first N tokens of the file")
    wanted = None if args.prompt_tokens is None else parse_tokens(args.prompt_tokens, "--prompt-tokens")
    text = None if args.file is None else read_document(args.file)
    for path in (args.snapshot, args.plot, args.html):
        check_writable(path)
    device = choose_device(args.device)
    if args.snapshot and device.type != "cuda":
        raise ConfigError("--snapshot needs a CUDA device: only its allocator records allocations")
    quiet_transformers()

    from imdc.model.loading import load_model
    from imdc.model.shape import ModelShape
    from imdc.profiler.measure import cuda_snapshot, measure, measure_unpatched

    model, tokenizer = load_model(args.model, gguf_file=args.gguf_file, dtype=args.dtype, device=device)
    shape = ModelShape.from_model(model)
    ids = _prompt_ids(tokenizer, text, wanted).to(model.device)
    tokens = int(ids.shape[1])
    found, probes = [], dict[str, "ProbeResult"]()
    with cuda_snapshot(args.snapshot) if args.snapshot else contextlib.nullcontext():
        for name in names:
            if name == UNPATCHED:
                found.append(measure_unpatched(model, ids))
                continue
            chosen = replace(config, schedule=name)
            if progress is None:
                found.append(measure(model, ids, chosen))
            else:
                with progress(tokens) as on_step:
                    found.append(measure(model, ids, chosen, on_step=on_step))
    if args.probe:
        # Apart from what is measured, which recording would change.
        ways = {name: replace(config, schedule=name) for name in names if name != UNPATCHED}
        probes = {name: _read_probed(model, ids, way) for name, way in ways.items()}
    levelled = {balance: replace(config, balance=balance) for balance in BALANCES}
    savings = {balance: predicted_savings(shape, tokens, way, device.type) for balance, way in levelled.items()}
    return Outcome(args.model, device.type, shape, tokens, tuple(found), savings, probes)


def _read_probed(model: Any, ids: Any, config: PrefillConfig) -> ProbeResult:
    """What reading `ids` int64 [1, N] by this config does to the memory."""
    from imdc.model import hf
    from imdc.prefill.patch import patch
    from imdc.prefill.probe import probe

    with patch(model, config) as handle, probe(handle) as probing:
        model(ids, logits_to_keep=1, **{hf.CACHE_NAME: handle.new_cache()})
    return probing.result


def _names(text: str | None, config: PrefillConfig) -> list[str]:
    known = (*SCHEDULES, UNPATCHED)
    names = [config.schedule] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(f"--compare knows {', '.join(known)}, got {name!r}.{did_you_mean(name, known)}")
    return list(dict.fromkeys(names))


def _prompt_ids(tokenizer: Any, text: str | None, wanted: int | None) -> Any:
    """Token ids int64 [1, N] of the text, or of the reference prose, which is repeated where it is too short."""
    import torch

    from imdc.cli.demo import reference_text

    ids: list[int] = tokenizer(reference_text() if text is None else text).input_ids
    if wanted is not None and len(ids) < wanted:
        if text is not None:
            raise ConfigError(
                f"--file holds {format_tokens(len(ids))} tokens, fewer than --prompt-tokens {format_tokens(wanted)}; "
                f"give a longer file or leave --prompt-tokens out"
            )
        ids = ids * -(-wanted // len(ids))
    return torch.tensor([ids[:wanted]])


def predicted_savings(shape: ModelShape, tokens: int, config: PrefillConfig, device: str) -> dict[float, float]:
    """Share of FM's peak above the weights that IMDC saves, by prediction, at several ratios of memory to chunk.

    The chunk stays the config's; ratios whose memory holds the whole prompt, or too few tokens, are left out.
    """
    from imdc.planner.batch import Batch
    from imdc.planner.fit import peak_bytes, with_memory

    savings, batch = {}, Batch(tokens)
    for ratio in RATIOS:
        if isinstance(config.chunk_tokens, str):
            break
        memory = round(ratio * config.chunk_tokens)
        if not config.sink_tokens + config.recent_tokens <= memory < tokens or memory < 1:
            continue
        base = with_memory(config, memory)
        fm, imdc = (
            peak_bytes(shape, batch, replace(base, schedule=schedule), device) - shape.weights
            for schedule in ("fm", "imdc")
        )
        savings[ratio] = 1 - imdc / fm
    return savings


def run(args: argparse.Namespace) -> int:
    """Run `imdc profile`; 0 when everything was measured."""
    from imdc.cli.tables import reading_progress

    if args.plot:
        from imdc.cli.figure import check_figure, draw

        check_figure(args.plot)
    outcome = compute(args, None if args.json else reading_progress)
    if args.html:
        from imdc.cli.report_page import page

        write_text(args.html, page(outcome.as_json()))
    if args.plot:
        draw(outcome.prefills, args.plot)
    if args.json:
        print(json.dumps(outcome.as_json(), indent=2))
        return 0

    from rich.console import Console

    from imdc.cli.profile_tables import age_line, probe_table, steps_table, summary_table

    console = Console()
    for prefill in outcome.prefills:
        if len(prefill.steps) > 1:
            console.print(steps_table(prefill))
    console.print(summary_table(outcome.prefills))
    for name, result in outcome.probes.items():
        console.print(probe_table(name, result))
        if line := age_line(name, result):
            print(line)
    for line in notes(outcome):
        print(line)
    return 0


def notes(outcome: Outcome) -> list[str]:
    """Lines below the tables: what IMDC saved, and where it would save less."""
    peaks = {prefill.name: prefill.peak_bytes for prefill in outcome.prefills}
    lines = []
    if "fm" in peaks and "imdc" in peaks:
        lines.append(f"imdc's measured peak is {100 * (1 - peaks['imdc'] / peaks['fm']):.1f}% below fm's")
    for balance, savings in outcome.savings.items():
        values = ", ".join(f"{100 * saving:.1f}% at M = {ratio:g}C" for ratio, saving in savings.items())
        if values:
            lines.append(f"predicted saving of imdc over fm with this chunk size, {balance} levelled: {values}")
    if outcome.device != "cuda":
        lines.append("counted by operator results; the seconds include the counting")
    return lines
