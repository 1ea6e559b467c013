"""Prefill very long prompts with Hugging Face models chunk by chunk, in bounded memory."""
