"""Fidelity: what is lost of the unpatched model's answers, by method and memory, and in what time.

    python bench/fidelity.py --output DIR
    python bench/fidelity.py --output DIR --memory 1/8 --methods full,fm,imdc,imdc:initial_memory=0.25 --records 40

Real questions (F1 by LongBench's rules), and answers that were planted: needles (numbers, words, two at once),
LongEval's lines, pairs of a JSON object. With the observer "prompt_tail" they are known while the prompt is read
(query-aware). `--tails` asks nothing, but how likely a novel is to go on as it does; give it an observer that needs no
question. Every answer is a line of JSON as soon as it is there, and the same command goes on with a run that was cut
off or was up. The default run ends within two hours on one core of two; more needs `--max-minutes`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import begin
from fidelity_planted import questions as planted_questions
from fidelity_questions import QA_TASKS, Question, qa_questions, qa_records
from fidelity_read import read
from fidelity_report import draw, markdown, summarize
from fidelity_ways import parse_methods
from longbench_store import Store, StoreError
from longbench_ways import FULL, Amount, Way
from record import RESULTS, ROOT, circumstances, options, write

from imdc.cli.answer import choose_device
from imdc.config import PrefillConfig
from imdc.model.loading import load_model
from imdc.observers import OBSERVERS

_UNFINISHED = 1
_DATA = ROOT.parent / "shared" / "data"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every answer is there, 1 when time was up."""
    return begin.run(_parser().parse_args(argv), run, "fidelity.py")


def run(args: argparse.Namespace) -> int:
    """Check, read, report.

    Raises:
        ImdcError: bad input, missing data or models, or a folder of another run.
    """
    began = time.perf_counter()
    device = choose_device(args.device)
    shares = [Amount.parse(text) for text in args.memory.split(",")]
    ways = parse_methods(args.methods, shares=shares, chunk=Amount.parse(args.chunk_tokens), observer=args.observer)
    records = qa_records(args.data_dir, args.tasks.split(","), args.seed) if args.records else []
    # Before the run, whose code is what is loaded now: a commit made meanwhile is not what was measured.
    started = circumstances(commit=args.commit) | {"device": str(device)}
    wanted = answered = 0
    with Store(args.output, 0) as store:
        store.check_settings({"dtype": args.dtype, "seed": args.seed, "observer": args.observer})
        store.note_session(started)
        names = args.models.split(",")
        for number, name in enumerate(names):
            model, tokenizer = load_model(begin.model_source(name), dtype=args.dtype, device=device)
            questions = [
                *qa_questions(tokenizer, records, args.records, (args.min_prompt_tokens, args.max_prompt_tokens)),
                *planted_questions(tokenizer, args),
            ]
            wanted += len(questions) * len(ways)
            # Each model has its share of the time, so that none goes without.
            deadline = began + 60 * args.max_minutes * (number + 1) / len(names)
            answered += answer_all(name, model, tokenizer, questions, ways, store, deadline)
        samples, sessions = list(store.samples().values()), store.sessions()
    report(samples, ways, args, {**started, "sessions": sessions})
    return 0 if answered == wanted else _UNFINISHED


def answer_all(
    name: str,
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    ways: Sequence[Way],
    store: Store,
    deadline: float,
) -> int:
    """Read each question in every way that the folder has no answer of, until `deadline`; how many answers are there.

    Question by question, so that a run that is cut off has compared all ways on the same ones.

    Raises:
        StoreError: an answer in the folder is to another prompt of the same name.
    """
    done, there, total = store.samples(), 0, len(questions) * len(ways)
    for question in questions:
        record, unpatched = question.record, None
        for way in ways:
            key = f"{name} {way.key}"
            before = done.get((key, record.task.name, record.id))
            if before is not None:
                if before["prompt_sha"] != record.sha:
                    raise StoreError(
                        f"{store.folder} holds an answer to another prompt of {record.task.name} {record.id}: the data "
                        f"have changed; give another --output"
                    )
            elif time.perf_counter() > deadline:
                print(f"--max-minutes is up for {name}; the same command goes on", file=sys.stderr)
                return there
            else:
                sample = {"model": name, "key": key, **read(model, tokenizer, question, way, unpatched)}
                store.add(sample)
                done[key, record.task.name, record.id] = sample
                score = "" if sample["score"] is None else f"score {sample['score']:.2f}, "
                print(
                    f"[{there + 1}/{total}] {name} {record.task.name} {record.id}, {way.name}: "
                    f"{score}{sample['gold_nats']:.2f} nats, {sample['prompt_tokens']:,} tokens, "
                    f"{sample['seconds']:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
            there += 1
            if way.schedule == FULL:
                unpatched = done[key, record.task.name, record.id]["tokens"]
    return there


def report(
    samples: Sequence[dict[str, Any]], ways: Sequence[Way], args: argparse.Namespace, started: dict[str, Any]
) -> None:
    """Print the table, write it with the picture into the folder of the run, and its figures to `--out`."""
    lines = summarize(samples, [way.name for way in ways], args.seed)
    text = markdown(lines)
    (args.output / "table.md").write_text(text, encoding="utf-8")
    print(text)
    begin.drawn(partial(draw, lines), args.output / "plot.png")
    result = {**started, "options": options(args), "lines": lines}
    print(f"Written to {args.output.name} and {write('fidelity', result, args.out)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fidelity.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the run, new or to go on with")
    parser.add_argument("--models", default="smollm2,gemma3", help="smollm2, gemma3, folders, .gguf files or hub ids")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one, else cpu)")
    parser.add_argument(
        "--methods",
        default="full,one-shot,fm,im,imdc",
        help="METHOD[:OPTION=VALUE]... with commas between them; one-shot compresses once, after reading everything, "
        "append-only each chunk once",
    )
    parser.add_argument("--memory", default="1/8,1/16", help="shares of the prompt (default: 1/8,1/16)")
    parser.add_argument("--chunk-tokens", default="512", help="mean tokens per step, or a share of the prompt")
    parser.add_argument("--observer", choices=list(OBSERVERS), default=PrefillConfig().observer)
    parser.add_argument("--tasks", default=",".join(QA_TASKS), help="QA tasks of LongBench and L-Eval that F1 judges")
    parser.add_argument(
        "--data-dir",
        type=Path,
        nargs="+",
        default=[_DATA / "minilongbench", _DATA / "longbench", _DATA / "leval"],
        help="folders with TASK.jsonl or TASK.sample.jsonl",
    )
    parser.add_argument("--records", type=int, default=12, help="QA records")
    parser.add_argument("--min-prompt-tokens", type=int, default=1024)
    parser.add_argument("--max-prompt-tokens", type=int, default=5120)
    parser.add_argument("--books", type=Path, default=_DATA / "books", help="novels that needles are planted in")
    parser.add_argument("--needles", type=int, default=8)
    parser.add_argument("--words", type=int, default=4, help="needles that are a word, among five others")
    parser.add_argument("--two-facts", type=int, default=4, help="questions for two of six needles at once")
    parser.add_argument("--needle-tokens", type=int, default=4096, help="of a prompt with needles")
    parser.add_argument("--tails", type=int, default=0, help="novels that go on")
    parser.add_argument("--tail-tokens", type=int, default=6144, help="read of a novel before its tail")
    parser.add_argument("--lines", type=int, default=4, help="questions of LongEval")
    parser.add_argument(
        "--longeval", type=Path, default=_DATA / "longeval_lines" / "200_lines.jsonl", help="file of LongEval's lines"
    )
    parser.add_argument("--pairs", type=int, default=4, help="questions for the value of a key")
    parser.add_argument(
        "--pairs-file", type=Path, default=_DATA / "kv_retrieval" / "kv-retrieval-75_keys.jsonl", help="JSON objects"
    )
    parser.add_argument("--max-minutes", type=float, default=110, help="begin no further answer after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="of records, needles and intervals")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--commit", help="the commit that is run, where there is no git to ask")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
