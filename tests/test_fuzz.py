"""Random generate() calls on random models: whatever is asked, the promises of the design hold.

`IMDC_FUZZ_EXAMPLES=3000 pytest tests/test_fuzz.py` draws other calls each time; the default draws the same 300.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from promises import MODES, Call, bounded_after, check
from tiny_models import FAMILIES

from imdc.config import BALANCES, GROWTHS, LAYER_BUDGETS, SCHEDULES
from imdc.model import hf
from imdc.observers import OBSERVERS

EXAMPLES = int(os.environ.get("IMDC_FUZZ_EXAMPLES", "0"))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    family = draw(st.sampled_from(sorted(FAMILIES)))
    mode = draw(st.sampled_from(MODES))
    alone = mode in ("lookup", "assisted")
    count = 1 if alone else draw(st.integers(1, 3))
    lengths = st.tuples(*[st.integers(1, 120)] * count)
    turns = draw(st.lists(lengths, min_size=1, max_size=1 if mode == "beams" else 2))
    twins = count > 1 and draw(st.booleans())
    if twins:
        turns = [(turn[0], turn[0], *turn[2:]) for turn in turns]
    sinks, recent = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    memory = draw(st.one_of(st.integers(max(1, sinks + recent), 100), st.just(400)))
    schedule = draw(st.sampled_from(SCHEDULES))
    options = {
        "schedule": schedule,
        "growth": draw(st.sampled_from(GROWTHS)),
        "balance": draw(st.sampled_from(BALANCES)),
        "observer": draw(st.sampled_from(list(OBSERVERS))),
        "positions": draw(st.sampled_from(["original", "compact", "auto"])),
        "memory_tokens": memory,
        "chunk_tokens": draw(st.integers(6, 64)),
        "initial_memory": draw(
            st.one_of(st.sampled_from(["auto", "per_step"]), st.floats(0.05, 1.0), st.integers(1, memory))
        ),
        "observation_tokens": draw(st.integers(1, 20)),
        "observation_stride": draw(st.sampled_from([1, 1, 2, 5])),
        "pooling": draw(st.sampled_from(["max", "avg"])),
        "pool_kernel": draw(st.sampled_from([1, 3, 15])),
        "sink_tokens": sinks,
        "recent_tokens": recent,
        "layer_budget": draw(st.sampled_from([*LAYER_BUDGETS][: None if schedule in ("imdc", "im") else 2])),
        "decode_tokens": draw(st.one_of(st.none(), st.integers(1, 12))),
        "backend": draw(st.sampled_from(["auto", "reference"])),
    }
    return Call(
        family=family,
        turns=tuple(turns),
        options=options,
        mode=mode,
        new_tokens=draw(st.integers(1, 8)),
        side=draw(st.sampled_from(["left", "right"])),
        twins=twins,
        period=draw(st.sampled_from([7, 50])),
        window=draw(st.sampled_from([4096, 64])),
        seed=draw(st.integers(0, 99)),
    )


SMALL = {"memory_tokens": 40, "chunk_tokens": 16, "sink_tokens": 1, "recent_tokens": 4, "initial_memory": 0.25}
# Calls that once broke a promise.
FOUND = {
    # There was no layer that could have had a share.
    "a layer budget without full layers": Call("mistral_sliding", ((60,),), {**SMALL, "layer_budget": "pyramid"}),
    # transformers passes the whole history of an assisted call again, and the cache held its beginning twice.
    "lookup in a second turn": Call("llama", ((91,), (48,)), {"schedule": "full"}, mode="lookup", period=7),
    "windows, lookup in a second turn": Call("gemma2", ((91,), (48,)), SMALL, mode="lookup", new_tokens=6, period=7),
    # The longest row of a batch chose the positions of all.
    "auto positions on both sides of the window": Call(
        "llama", ((50, 100),), {**SMALL, "memory_tokens": 30, "observation_tokens": 4}, new_tokens=6, window=64
    ),
    # An old release of transformers gave an eighth token.
    "lookup that overshoots": Call(
        "phi3",
        ((59,), (72,)),
        {"schedule": "fm", "memory_tokens": 400, "chunk_tokens": 30},
        mode="lookup",
        new_tokens=7,
        period=7,
        seed=41,
    ),
    # The short row fills a layer beyond its share, which the report then counted for the long ones too.
    "a short row where layers differ": Call(
        "mistral",
        ((2, 59, 82),),
        {
            "schedule": "imdc",
            "growth": "sqrt",
            "observer": "questions",
            "positions": "original",
            "memory_tokens": 3,
            "chunk_tokens": 6,
            "initial_memory": 1,
            "observation_tokens": 2,
            "pool_kernel": 1,
            "sink_tokens": 0,
            "recent_tokens": 0,
            "layer_budget": "pyramid",
            "decode_tokens": 1,
        },
        mode="beams",
        new_tokens=1,
        side="right",
        period=7,
        window=64,
    ),
    "assisted in a second turn": Call("gemma3", ((30,), (1,)), SMALL, mode="assisted", new_tokens=6),
}


@pytest.mark.parametrize("name", FOUND)
def test_calls_that_once_failed(name: str) -> None:
    call = FOUND[name]
    refused = hf.RUNNING < hf.CROPS_ASSISTED and call.mode != "greedy" and len(call.turns) > 1
    assert check(call) != refused
    if not refused:
        bounded_after(call)


@pytest.mark.slow
@pytest.mark.timeout(max(600, 4 * EXAMPLES))
@settings(
    max_examples=EXAMPLES or 120,
    derandomize=EXAMPLES == 0,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # Shrinking a call takes minutes; the call itself says what to repeat.
    phases=(Phase.explicit, Phase.generate),
    print_blob=True,
)
@given(calls())
def test_any_call_keeps_the_promises(call: Call) -> None:
    if check(call):
        bounded_after(call)
