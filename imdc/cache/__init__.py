"""What is kept: the KV cache that `generate()` works with, its layers, its rows and its file."""
