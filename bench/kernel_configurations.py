"""Every configuration that production launches on a chip, planned on tensors without storage. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TYPE_NAMES |= {torch.int32: "i32", torch.int64: "i64"}
QUERIES, KEYS, KEEP, KV_HEADS = 4096, 8192, 4096, 8


def _ghost(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor with a shape and no storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def chip(capability: int) -> Any:
    """The target of a compute capability such as 90."""
    from imdc.kernels._launch import target

    return target(*divmod(capability, 10))


def attention_cases(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Shapes and options for the three kernels that work on logits."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    plain: dict[str, Any] = {"dtype": bf16, "group": 4, "softcap": None, "window": None}
    for dim in (64, 128):
        yield f"D={dim} bf16 G=4", plain | {"dim": dim}
    if quick:
        return
    for dim in (64, 128, 256):
        yield f"D={dim} bf16 G=4 unaligned", plain | {"dim": dim, "padding": 4}
    for dim in (96, 256):
        yield f"D={dim} bf16 G=4", plain | {"dim": dim}
    for dtype in (fp16, fp32):
        for dim in (64, 96, 128, 256):
            yield f"D={dim} {TYPE_NAMES[dtype]} G=4", plain | {"dim": dim, "dtype": dtype}
    for dim in (64, 128):
        for group in (1, 3, 7, 8):
            yield f"D={dim} bf16 G={group}", plain | {"dim": dim, "group": group}
    for dim in (64, 96, 128, 256):
        for group in (4, 7):
            yield f"D={dim} bf16 G={group} window", plain | {"dim": dim, "group": group, "window": 4096}
            yield f"D={dim} bf16 G={group} softcap", plain | {"dim": dim, "group": group, "softcap": 50.0}
            both = plain | {"dim": dim, "group": group, "softcap": 50.0, "window": 4096}
            yield f"D={dim} bf16 G={group} window softcap", both


def launches(capability: int, quick: bool) -> Iterator[tuple[str, str, Any]]:
    """(kernel, case, Launch) of every production configuration on a chip."""
    from imdc.kernels._compress import Rules, Written
    from imdc.kernels.chunk_attention import attention_config, plan_chunk_attention
    from imdc.kernels.compact import plan_compact
    from imdc.kernels.compress import compression_config, plan_compress
    from imdc.kernels.fused_step import plan_fused_step
    from imdc.kernels.key_mass import plan_key_mass
    from imdc.kernels.limits import (
        OUTPUT_CHANGE,
        POOLINGS,
        SCORINGS,
        StepSizes,
        compression_fits,
        fused_step_fits,
    )
    from imdc.kernels.rotate import plan_rotate
    from imdc.kernels.select import plan_select

    target, poolings = chip(capability), POOLINGS[:1] if quick else POOLINGS
    for case, options in attention_cases(quick):
        dim, dtype, group = options["dim"], options["dtype"], options["group"]
        logits = {"scale": dim**-0.5, "softcap": options["softcap"]}
        q = _ghost(1, KV_HEADS * group, QUERIES, dim, dtype=dtype)
        k = _ghost(1, KV_HEADS, KEYS, dim + options.get("padding", 0), dtype=dtype)[..., :dim]
        lse = _ghost(1, KV_HEADS * group, QUERIES, dtype=torch.float32)
        forward = plan_chunk_attention(q, k, k, q, lse, window=options["window"], target=target, **logits)
        yield "chunk_attention", case, forward
        if options["window"] is None:
            mass, ranks = (_ghost(1, KV_HEADS, KEYS, dtype=kind) for kind in (torch.float32, torch.int32))
            for scoring in SCORINGS:
                name = f"{case} {scoring}"
                launch = plan_key_mass(q, k, k, q, lse, mass, rows=64, scoring=scoring, target=target, **logits)
                yield "key_mass", name, launch
            if not fed_in_blocks("fused_step", case):
                continue  # never launched, see `compress_step`
            kept = _ghost(1, KV_HEADS, KEEP, dim, dtype=dtype)
            written = Written(mass, ranks, _ghost(1, KV_HEADS, KEEP, dtype=torch.int64), kept, kept)
            heads = (1, q.shape[1], KV_HEADS)
            sized: dict[str, Any] = {"keep": KEEP, "pool_kernel": 15}
            ways = [(scoring, POOLINGS[0]) for scoring in SCORINGS]
            # The products' registers, which groups and caps change, are free again when scores are pooled.
            if group == 4 and options["softcap"] is None:
                ways += [(OUTPUT_CHANGE, pooling) for pooling in poolings[1:]]
            for scoring, pooling in ways:
                name = f"{case} {scoring} {pooling}"
                kinds: dict[str, Any] = {"pooling": pooling, "scoring": scoring}
                rules = Rules(rows=16, scored_keys=KEYS, **sized, **kinds, **logits)
                sizes = StepSizes(*heads, QUERIES, KEYS, dim, 2, observers=16, scoring=scoring, **sized)
                if fused_step_fits(sizes, target.major):
                    blocks = attention_config(q, k, k, target)
                    yield "fused_step", name, plan_fused_step(q, k, k, k, q, written, rules, blocks)
                if compression_fits(sizes):
                    blocks = compression_config(q, k, k, sizes, target)
                    yield "compress", name, plan_compress(q, k, k, k, q, lse, written, rules, blocks)
    for keys in (8192, 65536) if quick else (1024, 4096, 8192, 16384, 32768, 65536):
        scores = _ghost(1, KV_HEADS, keys, dtype=torch.float32)
        indices = _ghost(1, KV_HEADS, keys // 2, dtype=torch.int64)
        options = {"ranks": _ghost(1, KV_HEADS, keys, dtype=torch.int32), "sink_tokens": 4, "recent_tokens": 0}
        yield "select", f"T={keys}", plan_select(scores, indices, **options)
        for pooling in poolings:
            options |= {"pool_kernel": 15, "pooling": pooling}
            yield "select", f"T={keys} {pooling}", plan_select(scores, indices, **options)
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16, torch.float32)
    for dtype in dtypes:
        for dim, turned in ((128, 128),) if quick else ((64, 64), (80, 32), (96, 96), (128, 128), (256, 256)):
            k = _ghost(1, KV_HEADS, KEYS, dim, dtype=dtype)
            kept = _ghost(1, KV_HEADS, KEEP, dim, dtype=dtype)
            cos = _ghost(KEEP, turned, dtype=dtype)
            indices = _ghost(1, KV_HEADS, KEEP, dtype=torch.int64)
            case = f"D={dim} {TYPE_NAMES[dtype]}"
            yield "compact", case, plan_compact(k, k, indices, kept, kept)
            yield "rotate", f"{case} R={turned}", plan_rotate(kept, cos, cos, kept)
            yield "rotate", f"{case} R={turned} interleaved", plan_rotate(kept, cos, cos, kept, interleaved=True)
            if dtype != torch.float32:
                wide = cos.float()
                yield "rotate", f"{case} R={turned} float32 tables", plan_rotate(kept, wide, wide, kept)


def fed_in_blocks(kernel: str, case: str) -> bool:
    """Whether a kernel should reach the matrix units' speed: attention on 16-bit tensors that load in whole vectors."""
    return kernel in ("chunk_attention", "fused_step") and "fp32" not in case and "unaligned" not in case
