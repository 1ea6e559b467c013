"""`imdc plan`: will this prompt fit, what does each step take, and what is the most that fits? Needs no torch."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from typing import Any

from imdc.cli.options import add_config_options, config_from
from imdc.config import MEASURED_BUDGETS, PrefillConfig
from imdc.errors import ConfigError
from imdc.model.config_file import read_config
from imdc.model.shape import DTYPE_BYTES, ModelShape
from imdc.planner.asking import asked
from imdc.planner.batch import Batch
from imdc.planner.fit import LEAST_CHUNK, MOST_STEPS, fit_chunk, largest_within, peak_bytes, with_chunk, with_memory
from imdc.planner.footprint import predict_unpatched
from imdc.planner.gpus import GPUS, Gpu, find_gpu
from imdc.planner.plan import Plan, plan_shape
from imdc.units import format_bytes, format_tokens, parse_bytes, parse_tokens

# A bounded prefill takes the same memory for any longer prompt; looking further would only take time.
_LONGEST_PROMPT = 2**24
# Planning so many steps, and the schedules they are compared with, takes about a second.
_MOST_PLANNED = 2 * MOST_STEPS
# Prompts of up to so many chunks may take more than longer ones.
_FEW = 8


@dataclass(frozen=True, slots=True)
class Outcome:
    """What `imdc plan` found.

    Attributes:
        plan: the plan asked for, or the largest that fits where something was solved for.
        solved: name of what was solved for, and whether it ran into the end of the search instead of the limit.
        limit: bytes that everything has to fit into; None where none was given.
        gpu: the GPU, where one was named.
        others: peaks in bytes of other ways to read the same prompt, weights included.
        longest_unpatched: the longest prompt of the unpatched model's own prefill within the limit.
    """

    plan: Plan
    solved: tuple[str, bool] | None
    limit: int | None
    gpu: Gpu | None
    others: dict[str, int]
    longest_unpatched: int | None

    @property
    def least_recall_seconds(self) -> float | None:
        """Time below which a question cannot take back its pairs; None without recall or a GPU whose link is known."""
        moved = self.plan.question_moved_bytes
        return self.gpu.least_transfer(moved) if self.gpu is not None and moved else None

    def as_json(self) -> dict[str, Any]:
        """Values for `--json`."""
        values = {**self.plan.to_dict(), "other_peak_bytes": self.others}
        if self.limit is not None:
            values["limit_bytes"] = self.limit
            values["fits"] = self.plan.peak_bytes <= self.limit
            values["longest_unpatched_prompt"] = self.longest_unpatched
        if self.gpu is not None:
            values["gpu"] = self.gpu.name
            values["least_seconds"] = self.plan.least_seconds(self.gpu)
            values["least_recall_seconds"] = self.least_recall_seconds
        if self.solved is not None:
            values["solved"] = self.solved[0]
            values["solved_without_bound"] = self.solved[1]
        return values


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the parser of `imdc`."""
    parser = subparsers.add_parser(
        "plan",
        help="predict the memory of every step, and find what fits",
        description="Predict the memory of every step of a prefill, and find the largest prompt, memory or chunk "
        "that fits. Reads the model's config only.",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder, a .gguf file or a hub id")
    parser.add_argument("--config-json", dest="model_config", metavar="FILE", help="a config.json in place of MODEL")
    parser.add_argument("--prompt-tokens", metavar="N", help="tokens of the prompt, such as 32768, 128k or 1M")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="different prompts in one batch (default: 1)")
    parser.add_argument(
        "--new-tokens", default="0", metavar="N", help="tokens that generate() writes afterwards (default: 0)"
    )
    parser.add_argument(
        "--question-tokens",
        default="0",
        metavar="N",
        help="of a question that ask() puts to the document, --new-tokens long answered (default: 0; with recall 64)",
    )
    parser.add_argument(
        "--gpu", metavar="NAME_OR_SIZE", help=f"what it has to fit into: {', '.join(GPUS)}, or a size such as 24GiB"
    )
    parser.add_argument("--solve", choices=["prompt", "memory", "chunk"], help="the largest that fits --gpu")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPE_BYTES), help="type of weights and activations (default: model's)"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="whose kernels (default: cuda)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_config_options(parser)


def compute(args: argparse.Namespace) -> Outcome:
    """Read the config, plan, solve, compare.

    Raises:
        ImdcError: bad input, see its message.
    """
    shape = _shape(args)
    gpu = None if args.gpu is None else find_gpu(args.gpu)
    limit = gpu.memory_bytes if gpu else None if args.gpu is None else parse_bytes(args.gpu, "--gpu")
    # All of the GPU is the default limit of chunk_tokens="auto".
    config = config_from(args, {"memory_limit": limit} if limit and args.config_chunk_tokens == "auto" else None)
    if limit is not None and limit < shape.weights:
        raise ConfigError(
            f"--gpu {args.gpu} holds {format_bytes(limit)}, and the weights alone need at least "
            f"{format_bytes(shape.weights)} in {shape.dtype}; take a larger GPU or a shorter --dtype"
        )
    if args.solve and limit is None:
        raise ConfigError(f"--solve {args.solve} needs --gpu: a name or a size such as 24GiB")
    if args.solve == "memory" and config.schedule == "full":
        raise ConfigError(
            "--solve memory means nothing with --schedule full, which keeps everything; try --solve prompt"
        )
    prompt = None if args.prompt_tokens is None else parse_tokens(args.prompt_tokens, "--prompt-tokens")
    if (prompt is None) != (args.solve == "prompt"):
        raise ConfigError(
            "--prompt-tokens is missing: give a number such as 32768, 128k or 1M"
            if prompt is None
            else "--prompt-tokens and --solve prompt contradict each other; leave one of them out"
        )
    if prompt is not None and args.solve != "chunk":
        _check_steps(prompt, config)
    new_tokens, question_tokens = (
        0 if text == "0" else parse_tokens(text, name)
        for text, name in ((args.new_tokens, "--new-tokens"), (args.question_tokens, "--question-tokens"))
    )
    batch = asked(Batch(prompt or 0, args.rows, new_tokens=new_tokens, question_tokens=question_tokens), config)
    solved = None
    if args.solve and limit is not None:
        batch, config, at_end = _solve(args.solve, shape, batch, config, limit, args.device)
        solved = (args.solve, at_end)
    plan = plan_shape(shape, batch, config, device=args.device, device_bytes=limit)
    return Outcome(
        plan=plan,
        solved=solved,
        limit=limit,
        gpu=gpu,
        others=_others(plan, args.device),
        longest_unpatched=None if limit is None else _longest_unpatched(shape, batch, limit),
    )


def _check_steps(prompt: int, config: PrefillConfig) -> None:
    chunk = config.chunk_tokens
    if isinstance(chunk, int) and prompt > _MOST_PLANNED * chunk:
        steps, most = math.ceil(prompt / chunk), format_tokens(_MOST_PLANNED)
        raise ConfigError(
            f"{format_tokens(prompt)} tokens in chunks of {format_tokens(chunk)} are {format_tokens(steps)} steps, and "
            f"a plan has {most} at most; raise --chunk-tokens to at least {math.ceil(prompt / _MOST_PLANNED)}"
        )


def _shape(args: argparse.Namespace) -> ModelShape:
    if (args.model is None) == (args.model_config is None) or "" in (args.model, args.model_config):
        raise ConfigError("give one model: MODEL (a folder, a .gguf file or a hub id) or --config-json FILE")
    shape = ModelShape.from_config(read_config(args.model_config if args.model is None else args.model))
    if args.dtype:
        shape = replace(shape, dtype=args.dtype, dtype_bytes=DTYPE_BYTES[args.dtype])
    return shape


def _solve(
    what: str, shape: ModelShape, batch: Batch, config: PrefillConfig, limit: int, device: str
) -> tuple[Batch, PrefillConfig, bool]:
    """(batch, config, whether the search ended before the limit did) with the largest value that fits."""
    prompt = batch.prompt_tokens
    if what == "chunk":
        chunk = fit_chunk(shape, batch, config, limit, device=device)
        return batch, with_chunk(config, chunk), chunk == prompt
    if isinstance(config.chunk_tokens, str):
        raise ConfigError(f"--solve {what} needs chunk_tokens as a number, got 'auto'; solve one thing at a time")
    if what == "prompt":
        mean = config.chunk_tokens
        longest = min(_LONGEST_PROMPT, MOST_STEPS * mean)

        def peak_at_prompt(tokens: int) -> int:
            # The peak is not monotonic in the prompt length: one token past a whole number of chunks adds a step and
            # shrinks every chunk; and where memory grows little, a few chunks take more than many. Take the largest
            # peak of any shorter prompt.
            whole = tokens // mean
            lengths = {tokens, whole * mean, *(few * mean for few in range(1, min(whole, _FEW) + 1))} - {0}
            return max(peak_bytes(shape, replace(batch, prompt_tokens=some), config, device) for some in lengths)

        found = largest_within(limit, peak_at_prompt, LEAST_CHUNK, longest, "a prompt of one short chunk")
        return replace(batch, prompt_tokens=found), config, found == longest
    least = max(1, config.sink_tokens + config.recent_tokens)

    def peak_at_memory(tokens: int) -> int:
        return peak_bytes(shape, batch, with_memory(config, tokens), device)

    # Upper bound: the memory whose KV cache alone fills the limit.
    pairs = (limit - shape.weights) // max(1, shape.kv_bytes_per_token * shape.full_layers)
    memory = largest_within(limit, peak_at_memory, least, max(least, min(prompt, pairs)), "the smallest memory")
    return batch, with_memory(config, memory), memory >= prompt


def _others(plan: Plan, device: str) -> dict[str, int]:
    """Peaks of the other schedules with the same memory and chunk, and of the unpatched model."""
    peaks = {}
    # Only what grows can be shared out by what is measured meanwhile.
    others = "uniform" if plan.config.layer_budget in MEASURED_BUDGETS else plan.config.layer_budget
    for schedule in ("imdc", "im", "fm", "full"):
        if schedule != plan.config.schedule:
            config = replace(plan.config, schedule=schedule, layer_budget=others)
            peaks[schedule] = peak_bytes(plan.shape, plan.batch, config, device)
    return {**peaks, "unpatched": plan.unpatched.total_bytes}


def _longest_unpatched(shape: ModelShape, batch: Batch, limit: int) -> int | None:
    """None where not even a short prompt fits."""

    def peak(tokens: int) -> int:
        return predict_unpatched(shape, replace(batch, prompt_tokens=tokens)).total_bytes

    try:
        return largest_within(limit, peak, 1, _LONGEST_PROMPT, "one token")
    except ConfigError:
        return None


def run(args: argparse.Namespace) -> int:
    """Run `imdc plan`; 0 also where the plan does not fit, which the output says."""
    outcome = compute(args)
    if args.json:
        print(json.dumps(outcome.as_json(), indent=2))
        return 0
    print(render(outcome))
    return 0


def render(outcome: Outcome) -> str:
    """The outcome as plain text."""
    plan, limit = outcome.plan, outcome.limit
    lines = []
    if outcome.solved is not None:
        lines += [_solution(outcome), ""]
    lines += [str(plan), "", "peak of other ways to read this prompt:"]
    for name, peak in {plan.config.schedule: plan.peak_bytes, **outcome.others}.items():
        above = format_bytes(peak - plan.shape.weights)
        verdict = "" if limit is None else "  fits" if peak <= limit else "  does not fit"
        lines.append(f"  {name:<9}  {format_bytes(peak):>9}  ({above} above the weights){verdict}")
    if limit is not None:
        longest = outcome.longest_unpatched
        lines.append(
            f"the unpatched model reads {'no prompt' if longest is None else f'up to {format_tokens(longest)} tokens'} "
            f"in {format_bytes(limit)}"
        )
    if outcome.gpu is not None:
        seconds, work, reads = plan.least_seconds(outcome.gpu), plan.flops / 1e12, len(plan.steps)
        lines.append(
            f"no faster than {_three_digits(seconds)} s on {outcome.gpu.title}: {_three_digits(work)} TFLOP and the "
            f"weights read {reads:,} time{'s' * (reads > 1)} at its peak rates"
        )
    if outcome.least_recall_seconds is not None and outcome.gpu is not None:
        lines.append(
            f"no question faster than {_three_digits(1000 * outcome.least_recall_seconds)} ms there: its reading of "
            f"the store over the link to the host"
        )
    return "\n".join(lines)


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _solution(outcome: Outcome) -> str:
    plan = outcome.plan
    assert outcome.solved is not None and outcome.limit is not None
    what, unbounded = outcome.solved
    value = {
        "prompt": plan.prompt_tokens,
        "memory": plan.config.memory_tokens,
        "chunk": plan.config.chunk_tokens,
    }[what]
    size = format_bytes(outcome.limit)
    if unbounded and what == "prompt":
        return f"no prompt is too long for {size}: up to {format_tokens(int(value))} tokens were looked at"
    if what == "prompt":
        return f"largest prompt that fits {size}: {format_tokens(int(value))} tokens, and so does every shorter one"
    if unbounded:
        return f"the whole prompt fits {size}: {what} of {format_tokens(int(value))} tokens, nothing to cut down"
    return f"largest {what} that fits {size}: {format_tokens(int(value))} tokens"
