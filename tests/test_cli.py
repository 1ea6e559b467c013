"""The command line: its options, what it prints and its exit status."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from imdc.cli.answer import FirstToken
from imdc.cli.demo import reference_text
from imdc.cli.generate import compute
from imdc.cli.main import COMMANDS, build_parser, main
from imdc.cli.options import config_from
from imdc.config import PrefillConfig
from imdc.profiler.allocations import PeakMemory

SMALL = ["--memory-tokens", "64", "--chunk-tokens", "40", "--max-new-tokens", "8"]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", output, flags=re.MULTILINE) for name in COMMANDS)


def test_parser_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = "import sys, imdc.cli.main as cli; cli.build_parser(); print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_options_mirror_the_config(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(PrefillConfig):
        assert f"--{field.name.replace('_', '-')} " in text


def test_options_without_values_are_the_defaults() -> None:
    args = build_parser().parse_args(["generate", "--model", "m", "--file", "f"])
    assert config_from(args) == PrefillConfig()


def test_options_take_counts_shares_and_bytes() -> None:
    words = "--memory-tokens 8Ki --chunk-tokens auto --memory-limit 2GiB --initial-memory 0.5 --decode-tokens 1k"
    args = build_parser().parse_args(["generate", "--model", "m", "--file", "f", *words.split(), "--sink-tokens", "0"])
    assert config_from(args) == PrefillConfig(
        memory_tokens=8192,
        chunk_tokens="auto",
        memory_limit=2 * 2**30,
        initial_memory=0.5,
        decode_tokens=1000,
        sink_tokens=0,
    )


@pytest.mark.parametrize(("word", "value"), [("0.5", 0.5), ("0.5GiB", 2**29), ("26GB", 26 * 10**9)])
def test_a_limit_is_a_share_or_a_size(word: str, value: object) -> None:
    words = ["generate", "--model", "m", "--file", "f", "--chunk-tokens", "auto", "--memory-limit", word]
    assert config_from(build_parser().parse_args(words)).memory_limit == value


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--model", "m", "--file", "~/a"],
        ["read", "--model", "m", "--file", "~/a", "--save", "~/a", "--recall-dir", "~/a"],
        ["ask", "~/a", "--model", "m", "--question", "q"],
        ["profile", "m", "--file", "~/a", "--snapshot", "~/a", "--plot", "~/a", "--html", "~/a"],
    ],
)
def test_paths_may_begin_with_the_home_folder(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # A shell leaves the ~ of --save=~/a as it is.
    monkeypatch.setenv("HOME", "/home/someone")
    given = [value for value in vars(build_parser().parse_args(words)).values() if "/a" in str(value)]
    assert given == ["/home/someone/a"] * words.count("~/a")


@pytest.mark.parametrize(("word", "value"), [("auto", "auto"), ("0.5", 0.5), ("300", 300)])
def test_the_first_memory_is_auto_a_share_or_tokens(word: str, value: object) -> None:
    args = build_parser().parse_args(["generate", "--model", "m", "--file", "f", "--initial-memory", word])
    assert config_from(args).initial_memory == value


def test_generate_answers_as_the_library_does(
    tiny_model_dir: Path, document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_model_dir), "--file", str(document), "--question", "When?", "--json"]
    assert main([*argv, "--compare", "full", "--memory-tokens", "2048"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    ids = tokenizer(f"{document.read_text()}\n\nWhen?\n", return_tensors="pt").input_ids
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert found["prompt_tokens"] == ids.shape[1]
    assert found["full"]["answer"] == expected
    # The memory holds the whole prompt, so that reading in chunks changes nothing.
    assert found["answer"] == expected
    assert 0 < found["first_token_seconds"] <= found["seconds"]


def test_generate_keeps_to_the_memory(tiny_model_dir: Path, document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny_model_dir), "--file", str(document), "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["memory_tokens"] == found["memory_tokens"] == 64
    assert sum(step["chunk_tokens"] for step in found["steps"]) == found["prompt_tokens"]
    assert max(step["memory_after"] for step in found["steps"]) == 64
    # Two tensors, three layers, two KV heads of 16 float32 each.
    assert found["kv_bytes"] == 64 * 2 * 3 * 2 * 16 * 4


def test_generate_takes_back_what_it_needs(
    tiny_model_dir: Path, document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_model_dir), "--file", str(document), *SMALL, "--recall", "host"]
    assert main([*argv, "--recall-every", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pair = 2 * 3 * 2 * 16 * 4
    read = found["prompt_tokens"] - 16
    # Pairs, and the mean key of each 16 in bfloat16.
    assert found["memory_tokens"] == 64 + 16 and found["host_bytes"] == read * pair + -(-read // 16) * pair // 4
    assert found["recalled_bytes"] > 0 < found["recall_seconds"]
    assert main(argv) == 0
    output = capsys.readouterr()
    assert "all KV pairs, on the host" in output.out
    # The bar goes on where the question is read.
    tokens = [int(text.replace(",", "")) for text in re.findall(r"([\d,]+) tokens ", " ".join(output.err.split()))]
    assert tokens == sorted(tokens) and tokens[-1] == found["prompt_tokens"]


def test_generate_reads_standard_input(
    tiny_model_dir: Path, document: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_model_dir), "--json", *SMALL, "--file"]
    assert main([*argv, str(document)]) == 0
    from_file = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(document.read_bytes())))
    assert main([*argv, "-"]) == 0
    from_stdin = json.loads(capsys.readouterr().out)
    assert from_stdin["answer"] == from_file["answer"]
    assert from_stdin["prompt_tokens"] == from_file["prompt_tokens"]


def test_generate_shows_progress_costs_and_both_answers(
    tiny_model_dir: Path, document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_model_dir), "--file", str(document), "--compare", "full", *SMALL]
    assert main(argv) == 0
    output = capsys.readouterr()
    assert re.search(r"step \d+/\d+ .* tokens/s memory [\d.]+ [KM]iB", " ".join(output.err.split()))
    assert "time to first token" in output.out
    assert "peak memory" in output.out
    assert re.search(r"^imdc: .*^unpatched: ", output.out, flags=re.MULTILINE | re.DOTALL)


def test_compute_leaves_nothing_behind(tiny_model_dir: Path, document: Path) -> None:
    argv = ["generate", "--model", str(tiny_model_dir), "--file", str(document), *SMALL]
    outcome = compute(build_parser().parse_args(argv), show_progress=False)
    assert outcome.full is None
    assert outcome.patched.report is not None
    assert outcome.patched.new_tokens == 8
    assert outcome.trained_window == 4096


def test_first_token_ignores_the_prompt() -> None:
    first = FirstToken()
    first.put("prompt")
    assert first.seconds is None
    first.put("token")
    noted = first.seconds
    assert noted is not None
    first.put("token")
    first.end()
    assert first.seconds == noted


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory needs /proc")
def test_peak_memory_sees_what_was_freed_again() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        block = torch.ones(64 * 2**20, dtype=torch.uint8)
        for _ in range(20):
            block.add_(1)
        del block
    assert peak.bytes is not None
    assert 0.9 * 64 * 2**20 < peak.bytes < 2 * 64 * 2**20


def test_a_peak_that_cannot_be_reset_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imdc.profiler.allocations.reset_peak_resident", lambda: False)
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(10)
    assert peak.bytes is None


def test_reference_text_is_long_prose() -> None:
    text = reference_text()
    assert len(text) > 400_000
    assert 'The "assert" statement' in text


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["prompt_tail"])
def test_demo_finds_the_fact(observer: str, smollm2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo", "--prompt-tokens", "6000", "--memory-tokens", "512", "--observer", observer, "--json"]
    status = main(argv)
    found = json.loads(capsys.readouterr().out)
    assert found["right"], found["answer"]
    assert status == 0
    assert found["memory_tokens"] == 512


@pytest.mark.slow
def test_demo_fails_when_the_fact_is_lost(smollm2: Any, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["demo", "--prompt-tokens", "3000", "--memory-tokens", "128", "--observer", "sink_recent", "--json"]
    status = main(argv)
    found = json.loads(capsys.readouterr().out)
    assert not found["right"]
    assert status == 1
