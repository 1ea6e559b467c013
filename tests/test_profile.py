"""Measuring: the allocation counter, the profiler, and the command `imdc profile`."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from tiny_models import FAMILIES, build
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import imdc.cli.profile as command
from imdc.cli.answer import answer
from imdc.cli.main import build_parser, main
from imdc.config import PrefillConfig
from imdc.errors import UnsupportedCallError
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.fit import peak_bytes
from imdc.prefill.patch import patch
from imdc.profiler.allocations import (
    DispatchAllocations,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
    return_free_heap,
)
from imdc.profiler.measure import cuda_snapshot, measure, measure_unpatched
from imdc.report import StepReport
from imdc.units import MIB

CONFIG = PrefillConfig(memory_tokens=128, chunk_tokens=100, initial_memory=0.25)


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens))


def test_counter_follows_storages_not_tensors() -> None:
    outside = torch.zeros(1000)
    with DispatchAllocations() as counter:
        first = torch.empty(1000)
        view = first[10:]
        del first
        assert counter.current() == 4000
        second = view * 2
        assert counter.current() == 4000 + 3960
        del view
        assert counter.current() == 3960
        outside.add_(1)
        outside.view(10, 100).t()
        assert counter.current() == 3960
        del second
        assert counter.current() == 0
        assert counter.take_peak() == 7960
        assert counter.take_peak() == 0
        inner = torch.nn.functional.silu(outside) * outside
        assert counter.take_peak() == 8000
        assert counter.current() == inner.nbytes


def test_counter_survives_reused_addresses() -> None:
    with DispatchAllocations() as counter:
        for size in [10, 1000, 10, 500] * 25:
            block = torch.empty(size)
            assert counter.current() == block.nbytes
            del block
    gc.collect()
    assert counter.current() == 0


def test_resident_memory_sees_a_peak() -> None:
    if resident_bytes() is None:
        pytest.skip("/proc does not tell the resident memory here")
    # What earlier tests have freed would hold the block without any growth.
    return_free_heap()
    reset_peak_resident()
    before = peak_resident_bytes()
    block = torch.ones(64 * MIB // 4)
    after = peak_resident_bytes()
    assert before is not None and after is not None
    assert after - before > 0.8 * block.nbytes


@pytest.mark.parametrize("reads", ["generate", "profile"])
def test_weights_that_loading_left_in_their_file_count_as_no_memory_of_a_prompt(reads: str, tmp_path: Path) -> None:
    if resident_bytes() is None:
        pytest.skip("/proc does not tell the resident memory here")
    build("llama", vocab_size=200_000).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    head = model.lm_head.weight.nbytes
    assert head > 45 * MIB
    if reads == "profile":
        peak = measure(model, prompt(300), CONFIG).resident_bytes
    else:
        tokenizer = mock.Mock(decode=lambda *_, **__: "")
        peak = answer(model, tokenizer, prompt(300)[0].tolist(), max_new_tokens=1, config=CONFIG).peak_bytes
    assert peak is not None and peak < head / 2


def test_measure_reports_every_step_and_layer() -> None:
    model = FAMILIES["llama"]()
    seen: list[StepReport] = []
    measured = measure(model, prompt(1000), CONFIG, on_step=seen.append)
    assert [step.chunk_tokens for step in measured.steps] == [report.chunk_tokens for report in seen]
    assert sum(step.chunk_tokens for step in measured.steps) == measured.prompt_tokens == 1000
    for step, report in zip(measured.steps, seen, strict=True):
        assert len(step.layer_peaks) == 3
        assert step.peak_bytes >= max(step.layer_peaks)
        assert step.kv_bytes == report.kv_bytes == step.memory_after * 3 * 2 * 2 * 16 * 4
        assert step.kv_bytes < step.held_bytes < step.peak_bytes
        assert step.seconds > 0
    assert measured.peak_bytes == max(step.peak_bytes for step in measured.steps)
    assert measured.reserved_bytes is None


def test_measure_leaves_the_model_as_it_was() -> None:
    model = FAMILIES["qwen3"]()
    before = dict(model.__dict__)
    hooks = [dict(layer._forward_hooks) for layer in model.model.layers]
    measure(model, prompt(300), CONFIG)
    measure_unpatched(model, prompt(300))
    with pytest.raises(RuntimeError, match="stop here"):
        measure(model, prompt(1000), CONFIG, on_step=_stop)
    assert model.__dict__ == before
    assert [dict(layer._forward_hooks) for layer in model.model.layers] == hooks


def _stop(report: StepReport) -> None:
    raise RuntimeError("stop here")


def test_counting_changes_no_logits() -> None:
    model, ids = FAMILIES["llama"](), prompt(600)
    with patch(model, CONFIG) as handle:
        plain = model(ids, past_key_values=handle.new_cache(), logits_to_keep=1).logits
        with DispatchAllocations():
            counted = model(ids, past_key_values=handle.new_cache(), logits_to_keep=1).logits
    assert torch.equal(plain, counted)


@pytest.mark.parametrize("ids", [torch.zeros(2, 5, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)])
def test_measure_takes_one_row(ids: torch.Tensor) -> None:
    with pytest.raises(UnsupportedCallError, match=r"pass one row \[1, N\]"):
        measure(FAMILIES["llama"](), ids, CONFIG)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_snapshot_needs_cuda() -> None:
    with pytest.raises(UnsupportedCallError, match="needs a CUDA device"), cuda_snapshot("out.pickle"):
        pass


@pytest.fixture(scope="module")
def model_folder(byte_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on disk, as `imdc profile` loads it."""
    folder = tmp_path_factory.mktemp("model")
    FAMILIES["llama"](vocab_size=320).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return str(folder)


SIZES = ("--memory-tokens", "128", "--chunk-tokens", "100")


def test_command_compares_schedules_in_one_run(model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [model_folder, "--prompt-tokens", "1k", "--compare", "full,fm,im,imdc,unpatched", *SIZES]
    assert main(["profile", *arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["prompt_tokens"] == 1000
    peaks = {prefill["name"]: prefill["peak_bytes"] for prefill in values["prefills"]}
    assert list(peaks) == ["full", "fm", "im", "imdc", "unpatched"]
    assert max(peaks["imdc"], peaks["im"], peaks["fm"]) < peaks["full"] < peaks["unpatched"]
    assert all(abs(prefill["error"]) < 0.05 for prefill in values["prefills"])
    assert main(["profile", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "below fm's" in printed
    assert "predicted saving of imdc over fm with this chunk size, bytes levelled: " in printed


def test_command_reads_the_beginning_of_a_file(model_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("All the world's a stage. " * 40, encoding="utf-8")
    parse = build_parser().parse_args
    whole = command.compute(parse(["profile", model_folder, "--file", str(path), *SIZES]))
    assert whole.prompt_tokens == 1000
    part = command.compute(parse(["profile", model_folder, "--file", str(path), "--prompt-tokens", "300", *SIZES]))
    assert part.prompt_tokens == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --prompt-tokens N, --file FILE, or both"),
        (("--prompt-tokens", "0"), "must be greater than zero"),
        (("--prompt-tokens", "1k", "--compare", "fm,imcd"), "got 'imcd'. Did you mean 'imdc'?"),
        (("--prompt-tokens", "1k", "--snapshot", "out.pickle", "--device", "cpu"), "--snapshot needs a CUDA device"),
        (("--prompt-tokens", "1k", "--html", "/no/such/folder/report.html"), "its folder does not exist"),
        (("--prompt-tokens", "1k", "--html", "/tmp"), "it is a folder"),
        (("--prompt-tokens", "1k", "--plot", "out.docx"), ".docx is no picture format; use one of"),
        (("--file", "/no/such/file.txt"), "cannot read '/no/such/file.txt': no such file"),
        (("--prompt-tokens", "1k", "--memory-tokens", "8"), "raise memory_tokens to at least 36"),
    ],
)
def test_command_refuses_bad_input(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "/no/such/model", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_command_refuses_a_file_that_is_too_short(
    model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("Brevity.", encoding="utf-8")
    assert main(["profile", model_folder, "--file", str(path), "--prompt-tokens", "1k"]) == 2
    assert "--file holds 8 tokens, fewer than --prompt-tokens 1,000" in capsys.readouterr().err


def test_command_draws_a_picture(model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install matplotlib")
    path = tmp_path / "out.png"
    assert main(["profile", model_folder, "--prompt-tokens", "500", *SIZES, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


def test_predicted_savings_are_those_of_the_planner() -> None:
    shape = ModelShape.from_model(FAMILIES["llama"]())
    savings = command.predicted_savings(shape, 10_000, CONFIG, "cpu")
    assert list(savings) == list(command.RATIOS)
    config = replace(CONFIG, memory_tokens=180)
    fm = peak_bytes(shape, Batch(10_000), replace(config, schedule="fm"), "cpu") - shape.weights
    imdc = peak_bytes(shape, Batch(10_000), config, "cpu") - shape.weights
    assert savings[1.8] == pytest.approx(1 - imdc / fm)
    assert list(command.predicted_savings(shape, 150, CONFIG, "cpu")) == [0.5, 1.0]
