"""One read, many questions: documents that are read once and asked everything, by way of reading.

Haystacks are pages of a novel with six made-up facts of different kinds at different depths; L-Eval's documents have
questions of their own. Every way reads a document once and answers its questions from that one cache, but "own", which
reads it anew for each; "full" keeps everything. Known questions are given to the reading, generic ones are given in
their place, and "recall" takes back from host memory what each question needs. Every line of the output is one document
read in one way; a run that was cut off, or was up, goes on where it stopped.

    python bench/questions.py --output runs/questions.jsonl
    python bench/questions.py --data quality --models gemma3 --output runs/questions.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from begin import drawn, model_source, run, show, stopwatch
from questions_data import HAYSTACKS, LEVAL, Document, documents
from questions_report import document_of, draw, table
from record import ROOT, circumstances, relative

import imdc
from imdc.cli.document import Frame
from imdc.errors import ImdcError
from imdc.model.loading import load_model

_UNFINISHED = 1
_DATA = ROOT.parent / "shared" / "data"
_RECALL: dict[str, Any] = {"observer": "questions", "recall": "host", "recall_every": 0}
# Way: options of the patch, and which questions the reading knows.
WAYS: dict[str, tuple[dict[str, Any], str | None]] = {
    "full": ({"schedule": "full"}, None),
    "own": ({"observer": "prompt_tail"}, "own"),
    "known": ({"observer": "questions"}, "all"),
    "generic": ({"observer": "questions"}, "generic"),
    "first": ({"observer": "questions"}, "first"),
    "recall": (_RECALL, "generic"),
    **{f"recall every {every}": ({**_RECALL, "recall_every": every}, "generic") for every in (1, 2, 4)},
    "recall int8": ({**_RECALL, "recall_dtype": "int8"}, "generic"),
    "recall window": ({**_RECALL, "observer": "window"}, None),
}


def measure(model: Any, tokenizer: Any, one: Document, way: str, share: int, chunk_tokens: int) -> dict[str, Any]:
    """One document, read in one way with a memory of 1/`share` of it, and asked everything."""
    frame = Frame.of(tokenizer)
    ids = frame.document(one.text)
    asked = [frame.question(question) for question in one.questions]
    options, knows = WAYS[way]
    known = {"all": asked, "first": asked[:1], "generic": [frame.question(text) for text in imdc.GENERAL_QUESTIONS]}
    replies, reading, asking, moved, cache = [], [], [], 0, None
    sizes = {"memory_tokens": ids.shape[1] // share, "chunk_tokens": chunk_tokens}
    with imdc.patch(model, **{**sizes, **options}) as handle:
        for question in asked:
            if cache is None or knows == "own":
                elapsed = stopwatch()
                cache = handle.read(ids, [question] if knows == "own" else known.get(knows or ""))
                reading.append(elapsed())
            elapsed = stopwatch()
            new = handle.ask(cache, question, max_new_tokens=one.new_tokens, do_sample=False)
            asking.append(elapsed())
            assert handle.report is not None
            moved += handle.report.recalled_bytes
            replies.append(tokenizer.decode(new[0], skip_special_tokens=True).strip())
    assert cache is not None
    return {
        "way": way,
        "share": share,
        "seed": one.number,
        "tokens": ids.shape[1],
        "scores": [one.score(number, reply) for number, reply in enumerate(replies)],
        "facts": list(one.answers),
        "answers": replies,
        "reads": len(reading),
        "read_seconds": sum(wall for wall, _ in reading),
        "read_cpu_seconds": sum(cpu for _, cpu in reading),
        "question_seconds": [wall for wall, _ in asking],
        "question_cpu_seconds": [cpu for _, cpu in asking],
        "kv_bytes": cache.kv_bytes(),
        "host_bytes": 0 if cache.store is None else cache.store.nbytes(),
        "recalled_bytes": moved,
    }


def benchmark(args: argparse.Namespace) -> int:
    """Run what is not in the output yet; 0 when all is there, 1 when time was up."""
    deadline = time.perf_counter() + 60 * args.max_minutes
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if not all("scores" in line for line in lines):
        raise ImdcError(f"{args.output.name} has lines of another version of this benchmark; give another --output")
    done = {(*document_of(line), line["way"], line["share"]) for line in lines}
    started, up = circumstances(), False
    for source in args.models.split(","):
        model, tokenizer = load_model(model_source(source), dtype=args.dtype)
        name = relative(source)
        for one in documents(args, tokenizer):
            for way, share in ((way, share) for way in args.ways for share in args.shares):
                if way == "full" and share != args.shares[0] or (name, args.data, one.number, way, share) in done:
                    continue
                up = up or time.perf_counter() > deadline
                if up:
                    break
                line = {"model": name, "data": args.data}
                line |= measure(model, tokenizer, one, way, share, args.chunk_tokens)
                lines.append({**line, "circumstances": started})
                with args.output.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                found = f"{sum(line['scores']):.1f}/{len(line['scores'])}"
                print(f"{name} {args.data} {one.number} {way} 1/{share}: {found}", file=sys.stderr, flush=True)
    show(table(lines))
    picture = args.output.with_suffix(".png")
    if drawn(partial(draw, lines), picture):
        print(f"The picture is {picture.name}")
    if up:
        print("--max-minutes is up; the same command goes on", file=sys.stderr)
    return _UNFINISHED if up else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when everything is answered, 1 when time was up, 2 after bad input."""
    return run(_parser().parse_args(argv), benchmark, "questions.py")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="questions.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", choices=(HAYSTACKS, *LEVAL), default=HAYSTACKS, help="what is read and asked")
    parser.add_argument("--books", type=Path, default=_DATA / "books", help="folder of books for haystacks")
    parser.add_argument("--leval", type=Path, default=_DATA / "leval", help="folder of L-Eval's files")
    parser.add_argument("--models", default="smollm2", help="smollm2, gemma3, folders, .gguf files or hub ids")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--prompt-tokens", type=int, default=4096, help="tokens of a haystack; L-Eval's longer documents are left out"
    )
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument(
        "--shares", type=int, nargs="+", default=[8], help="memory as one part in so many of the document"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--max-minutes", type=float, default=110, help="no document is begun later (default: 110)")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; an existing file is gone on with")
    return parser


if __name__ == "__main__":
    sys.exit(main())
