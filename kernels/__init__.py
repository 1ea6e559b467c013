"""Chunk attention, key scoring, selection and compaction: Triton kernels beside their plain PyTorch reference."""
