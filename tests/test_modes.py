"""Every way in which generate() decodes, on every kind of family: the table of modes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mode_cases import LENGTH, NEW, ROOMY, TIGHT, Calls, assistant_of, by_hand, generate, model_of, prompt
from tiny_models import KINDS, build, token_ids
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import imdc
from imdc.errors import UnsupportedCallError


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


class StopAfter(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def plain(**options: Any) -> Callable[[str, PreTrainedModel], Tensor]:
    return lambda family, model: generate(model, prompt(), **options)


def assisted(noise: float, **options: Any) -> Callable[[str, PreTrainedModel], Tensor]:
    return lambda family, model: generate(model, prompt(), assistant_model=assistant_of(family, noise), **options)


def streamed(family: str, model: PreTrainedModel) -> Tensor:
    collector = Collector()
    generate(model, prompt(), streamer=collector)
    assert collector.ended
    return torch.tensor([collector.tokens])


def as_record(family: str, model: PreTrainedModel) -> Tensor:
    output = generate(model, prompt(), return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert len(output.scores) == len(output.logits) == output.sequences.shape[1] - LENGTH
    assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
    return output.sequences


def at_least_six(family: str, model: PreTrainedModel) -> Tensor:
    """The end token is one that greedy decoding chooses early; both the stop and its delay must show."""
    third = int(generate(model, prompt(), eos_token_id=None)[0, LENGTH + 2])
    short = generate(model, prompt(), eos_token_id=third)
    long = generate(model, prompt(), eos_token_id=third, min_new_tokens=6)
    assert short.shape[1] <= LENGTH + 3 and long.shape[1] >= LENGTH + 6
    return torch.cat((short, long), dim=1)


def uneven_ends(family: str, model: PreTrainedModel) -> Tensor:
    """One row ends before the other and is filled with padding."""
    rows = prompt(2)
    third = int(generate(model, rows, eos_token_id=None)[0, LENGTH + 2])
    return generate(model, rows, eos_token_id=third)


def stopped(family: str, model: PreTrainedModel) -> Tensor:
    tokens = generate(
        model, prompt(), stopping_criteria=StoppingCriteriaList([StopAfter(LENGTH + 5)]), eos_token_id=None
    )
    assert tokens.shape[1] == LENGTH + 5
    return tokens


MODES: dict[str, Callable[[str, PreTrainedModel], Tensor]] = {
    "greedy": plain(),
    "sampling": plain(do_sample=True, temperature=0.8, top_k=20),
    "beams": plain(num_beams=3, num_return_sequences=2),
    "beam sampling": plain(num_beams=2, do_sample=True),
    "return sequences": plain(do_sample=True, num_return_sequences=3),
    "penalties": plain(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "guidance": plain(guidance_scale=1.5),
    "prompt lookup": plain(prompt_lookup_num_tokens=4),
    "assisted": assisted(0.05),
    "assisted sampling": assisted(0.05, do_sample=True),
    "streaming": streamed,
    "record": as_record,
    "stopping criteria": stopped,
    "min new tokens": at_least_six,
    "uneven ends": uneven_ends,
    "custom loop": plain(custom_generate=by_hand),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", KINDS)
def test_roomy_memory_decodes_as_the_unpatched_model(family: str, mode: str) -> None:
    model, run = model_of(family), MODES[mode]
    wanted = run(family, model)
    with imdc.patch(model, **ROOMY) as handle:
        got = run(family, model)
        assert handle.report is not None and len(handle.report.steps) > 2
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", ["prompt lookup", "assisted", "streaming", "record", "custom loop"])
@pytest.mark.parametrize("family", KINDS)
def test_tight_memory_decodes_as_its_own_greedy(family: str, mode: str) -> None:
    model = model_of(family)
    with imdc.patch(model, **TIGHT) as handle:
        wanted = MODES["greedy"](family, model)
        got = MODES[mode](family, model)
        assert handle.report is not None
        # A model of sliding windows only has no memory to bound.
        assert handle.report.memory_tokens == (0 if family == "mistral_sliding" else TIGHT["memory_tokens"])
    assert torch.equal(got[:, : wanted.shape[1]], wanted)


@pytest.mark.parametrize("family", KINDS)
def test_tight_beams_of_a_row_are_those_of_the_row_alone(family: str) -> None:
    model = model_of(family)
    other = token_ids(LENGTH, seed=5)
    rows = torch.cat((prompt(), other, prompt()))
    with imdc.patch(model, **TIGHT) as handle:
        together = generate(model, rows, num_beams=3)
        assert handle.report is not None and handle.report.rows == 2
        alone = [generate(model, row[None], num_beams=3)[0] for row in rows]
    for got, wanted in zip(together, alone, strict=True):
        # Rows that end early are filled up.
        assert torch.equal(got[: wanted.shape[0]], wanted) and (got.numel() == wanted.numel() or wanted[-1] == 2)


TEXTS = ["Call me Ishmael. " * 9, "Some years ago"]


def texts_of_a_pipeline(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    return generator(TEXTS, batch_size=2, max_new_tokens=NEW, do_sample=False)


def text_from_another_thread(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    options = {"max_new_tokens": NEW, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **options})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def tokens_of_a_compiled_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    model.compile(backend="eager")
    tokens = generate(model, prompt()).tolist()
    torch.compiler.reset()
    return tokens


@pytest.mark.parametrize(
    "use",
    [
        texts_of_a_pipeline,
        text_from_another_thread,
        pytest.param(tokens_of_a_compiled_model, marks=pytest.mark.slow),
    ],
    ids=lambda use: use.__name__,
)
def test_what_calls_generate_for_the_caller_gives_the_same(
    use: Callable[[PreTrainedModel, PreTrainedTokenizerBase], Any], byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = build("llama", vocab_size=len(byte_tokenizer))
    wanted = use(model, byte_tokenizer)
    with imdc.patch(model, **ROOMY) as handle:
        assert use(model, byte_tokenizer) == wanted
        assert handle.report is not None and len(handle.report.steps) > 2


@pytest.mark.parametrize("default", [False, True], ids=["asked for", "default of the model"])
def test_a_growing_cache_may_be_asked_for(default: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    wanted = generate(model, prompt())
    options = {} if default else {"cache_implementation": "dynamic"}
    if default:
        # Checkpoints of Gemma say this in their generation_config.json.
        monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
    with imdc.patch(model, **ROOMY) as handle:
        assert torch.equal(generate(model, prompt(), **options), wanted)
        assert handle.report is not None


@pytest.mark.parametrize(
    "options", [{"num_beams": 4}, {"do_sample": True, "num_return_sequences": 4}], ids=["beams", "n"]
)
def test_identical_rows_are_prefilled_once(options: dict[str, Any]) -> None:
    model = model_of("llama")
    counts: list[list[int]] = []
    with imdc.patch(model, **TIGHT):
        for settings in ({}, options):
            with Calls(model) as calls:
                generate(model, prompt(), eos_token_id=None, **settings)
            counts.append(calls.tokens)
    assert counts[0] == counts[1]
    assert len([count for count in counts[0] if count > 1]) == -(-LENGTH // TIGHT["chunk_tokens"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prefill_chunk_size": 16}, "prefill_chunk_size=16.*chunk_tokens"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"assistant_early_exit": 1}, "assistant_early_exit=1"),
        ({"use_cache": False}, "use_cache=False"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
    ],
)
def test_options_that_imdc_cannot_honour_are_refused(options: dict[str, Any], named: str) -> None:
    model = model_of("llama")
    wanted = generate(model, prompt())
    with imdc.patch(model, **ROOMY):
        with pytest.raises(UnsupportedCallError, match=named):
            generate(model, prompt(), **options)
        assert torch.equal(generate(model, prompt()), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"dola_layers": "low"},
        {"num_beams": 2, "force_words_ids": [[5]]},
    ],
    ids=["contrastive", "group beams", "dola", "constrained beams"],
)
def test_modes_that_transformers_moved_to_the_hub_raise_its_own_error(options: dict[str, Any]) -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="trust_remote_code") as theirs:
        generate(model, prompt(), **options)
    with imdc.patch(model, **ROOMY):
        with pytest.raises(ValueError, match="trust_remote_code") as ours:
            generate(model, prompt(), **options)
        assert str(ours.value) == str(theirs.value) and type(ours.value) is type(theirs.value)
