"""Attention sinks, as gpt-oss has them: a logit per query head that takes attention and gives nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE
from recall_cases import SINKS
from tiny_models import FAMILIES, greedy, token_ids
from torch import Tensor

import imdc
from imdc.errors import ConfigError, ImdcError
from imdc.model import hf
from imdc.model.backend_rule import ANY_MACHINE, AttentionTraits, choose_backend
from imdc.prefill.backends import REFERENCE, make_backend
from imdc.prefill.softmax import Softmax

# openai/gpt-oss-20b, whose config names no dtype.
GPT_OSS_20B = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4,
    "vocab_size": 201088, "max_position_embeddings": 131072, "sliding_window": 128, "attention_bias": True,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "tie_word_embeddings": False,
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"],
    },
}  # fmt: skip


def states(keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, heads, keys, 16, generator=generator, device="cpu") for heads in (4, 2, 2)]
    q, k, v = (x.to(DEVICE, dtype) for x in drawn)
    return q[:, :, -33:], k, v


def weights(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """[Hq, Q, T] of a softmax that has the sink for one more key."""
    logits = 0.4 * torch.einsum("hqd,htd->hqt", q[0].float(), k[0].float().repeat_interleave(2, 0))
    queries, keys = logits.shape[1:]
    row, column = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    unseen = (column > row) | (column <= row - (window or keys))
    logits.masked_fill_(unseen.to(DEVICE), float("-inf"))
    sinks = SINKS.to(DEVICE)[:, None, None].expand(-1, queries, 1)
    return torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sink_is_one_more_key_without_a_value(backend: str, window: int | None, dtype: torch.dtype) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed")
    (q, k, v), rule = states(70, dtype), Softmax(0.4, sinks=SINKS.to(DEVICE, dtype))
    out, lse = rule.attend(make_backend(backend, torch.device(DEVICE)), q, k, v, window)
    seen = weights(q, k, window)
    near = {"atol": 2e-5 if dtype == torch.float32 else 2e-2, "rtol": 0}
    torch.testing.assert_close(out[0].float(), seen @ v[0].float().repeat_interleave(2, 0), **near)
    # What the log-sum-exp makes of a logit is the weight, the sink's share included.
    first = 0.4 * (q[0].float() * k[0].float().repeat_interleave(2, 0)[:, 60:61]).sum(-1)
    torch.testing.assert_close((first - lse[0])[:, -1].exp(), seen[:, -1, 60], **near)


def test_what_an_output_changes_by_without_a_key_knows_the_sink() -> None:
    (q, k, v), rule = states(50), Softmax(0.4, sinks=SINKS.to(DEVICE))
    out, lse = rule.attend(REFERENCE, q, k, v)
    scores = REFERENCE.key_mass(q, k, lse, rows=1, v=v, out=out, **rule.logits)
    for key in (0, 7, 48):
        rest = [x[:, :, [at for at in range(50) if at != key]] for x in (k, v)]
        without, _ = rule.attend(REFERENCE, q[:, :, -1:], *rest)
        change = (without - out[:, :, -1:]).square().sum(-1).view(1, 2, 2).mean(-1)
        torch.testing.assert_close(scores[:, :, key], change, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"schedule": "full", "chunk_tokens": 16}, {"recall": "host"}], ids=str)
def test_a_budget_that_holds_the_prompt_changes_nothing(options: dict[str, Any]) -> None:
    model, ids = FAMILIES["gpt_oss"]().to(DEVICE), token_ids().to(DEVICE)
    wanted = greedy(model, ids)
    with imdc.patch(model, **{"memory_tokens": 200, "chunk_tokens": 32, **options}):
        found = greedy(model, ids)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_question_attends_to_the_whole_text_with_sinks(positions: str) -> None:
    """The store has all pairs, so what a single question's first token is does not depend on the memory."""
    model = FAMILIES["gpt_oss"](layer_types=["full_attention"] * 3).to(DEVICE)
    sizes = {"chunk_tokens": 200, "sink_tokens": 2, "recent_tokens": 4, "positions": positions}
    ids = token_ids(160).to(DEVICE)
    logits = []
    for memory in (150, 16):
        with imdc.patch(model, memory_tokens=memory, recall="host", observation_tokens=12, **sizes):
            logits.append(greedy(model, ids).logits[0])
    # One chunk reads the text, so that its keys are those of the unpatched model.
    unpatched = greedy(model, ids).logits[0]
    for one in logits:
        torch.testing.assert_close(one, unpatched, atol=1e-3, rtol=1e-3)


def test_sdpa_is_not_taken_for_sinks() -> None:
    with imdc.patch(FAMILIES["gpt_oss"]()) as handle:
        assert handle.backend.startswith("reference: ") and "which attention sinks need" in handle.backend
    traits = AttentionTraits("cuda", "bfloat16", 64, softcap=False, sinks=True)
    assert choose_backend("auto", traits, ANY_MACHINE)[0] == "triton"
    with pytest.raises(ConfigError, match="'sdpa' cannot be used: it gives no log-sum-exp"):
        imdc.patch(FAMILIES["gpt_oss"](), backend="sdpa")


def test_a_plan_counts_what_the_checkpoint_has() -> None:
    made = imdc.plan(SimpleNamespace(**GPT_OSS_20B), 32_768)
    shape = made.shape
    assert (shape.dtype, shape.full_layers, shape.window) == ("bfloat16", 12, 128)
    assert shape.parameters == 20_914_757_184
    # Experts in 4.25 bits, the rest in bfloat16.
    assert shape.weights == 24 * 32 * 3 * 2880**2 * 17 // 32 + 2 * (shape.parameters - 24 * 32 * 3 * 2880**2)
    assert "where a kernel fuses its attention" in str(made)


@pytest.mark.parametrize(("family", "name"), [("gpt_oss", "s_aux"), ("gemma2", "softcap")])
def test_a_call_that_lacks_what_the_model_has_raises(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a release of transformers had renamed the argument: nothing is left out without a word."""
    model, ids = FAMILIES[family](), token_ids()
    with imdc.patch(model, memory_tokens=40, chunk_tokens=32), monkeypatch.context() as patched:
        greedy(model, ids)
        ours = hf.ALL_ATTENTION_FUNCTIONS["eager"]

        def renamed(*args: Any, **named: Any) -> Any:
            return ours(*args, **{("other" if one == name else one): value for one, value in named.items()})

        patched.setitem(hf.ALL_ATTENTION_FUNCTIONS, "eager", renamed)
        with pytest.raises(ImdcError, match=f"model_type='{family}' came without {name}"):
            greedy(model, ids)
