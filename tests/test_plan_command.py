"""`imdc plan`: what it reads, compares, solves for and refuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import LLAMA_8B

import imdc.cli.plan as command
from imdc.cli.main import build_parser, main
from imdc.config import PrefillConfig
from imdc.model.config_file import read_config
from imdc.model.loading import find_smollm2_gguf
from imdc.model.shape import ModelShape
from imdc.planner.batch import Batch
from imdc.planner.fit import largest_within, peak_bytes
from imdc.planner.gpus import GPUS
from imdc.units import GIB

# A GGUF header with one entry, whose name claims to have 2**62 bytes.
LONG_STRING = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62)


@pytest.fixture
def config_json(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_8B), encoding="utf-8")
    return str(path)


def compute(*arguments: str) -> command.Outcome:
    return command.compute(build_parser().parse_args(["plan", *arguments]))


def test_command_compares_and_says_what_fits(config_json: str) -> None:
    outcome = compute("--config-json", config_json, "--prompt-tokens", "1M", "--gpu", "4090")
    assert outcome.gpu is GPUS["4090"]
    assert outcome.plan.prompt_tokens == 1_000_000
    assert set(outcome.others) == {"im", "fm", "full", "unpatched"}
    assert outcome.plan.peak_bytes < outcome.others["fm"] < outcome.limit < outcome.others["full"]  # type: ignore[operator]
    text = command.render(outcome)
    assert "no faster than" in text
    assert "does not fit" in text
    longest = outcome.longest_unpatched
    assert longest is not None and f"reads up to {longest:,} tokens" in text


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--prompt-tokens", "500k", "--solve", "memory"), "--memory-tokens"),
        (("--prompt-tokens", "500k", "--solve", "chunk"), "--chunk-tokens"),
        (("--schedule", "full", "--solve", "prompt"), "--prompt-tokens"),
    ],
)
def test_command_solves_for_the_largest(config_json: str, arguments: tuple[str, ...], option: str) -> None:
    solved = compute("--config-json", config_json, "--gpu", "24GiB", *arguments)
    assert solved.plan.peak_bytes <= 24 * GIB
    what = arguments[-1]
    found = {
        "memory": solved.plan.config.memory_tokens,
        "chunk": int(solved.plan.config.chunk_tokens),
        "prompt": solved.plan.prompt_tokens,
    }[what]
    assert solved.solved == (what, False)
    rest = [word for word in arguments if word not in ("--solve", what)]
    larger = compute("--config-json", config_json, "--gpu", "24GiB", *rest, option, str(round(found * 1.1)))
    assert larger.plan.peak_bytes > 24 * GIB
    assert command.render(solved).startswith(f"largest {what} that fits 24.0 GiB: {found:,} tokens")


def test_solved_prompt_leaves_no_shorter_one_that_does_not_fit(config_json: str) -> None:
    # Right above whole chunks all chunks are smaller: 3,001 tokens take less than 3,000, and longer ones more again.
    sizes = ("--memory-tokens", "256", "--chunk-tokens", "3000")
    config = PrefillConfig(memory_tokens=256, chunk_tokens=3000)
    shape = ModelShape.from_config(SimpleNamespace(**LLAMA_8B))
    for length in (2900, 36_000):
        limit = peak_bytes(shape, Batch(length), config, "cuda")
        found = compute("--config-json", config_json, "--gpu", f"{limit}B", "--solve", "prompt", *sizes)
        for shorter in range(100, found.plan.prompt_tokens + 1, 100):
            assert peak_bytes(shape, Batch(shorter), config, "cuda") <= limit, (length, shorter)
        assert peak_bytes(shape, Batch(found.plan.prompt_tokens + 1), config, "cuda") > limit


def test_command_finds_no_bound_for_a_bounded_prompt(config_json: str) -> None:
    outcome = compute("--config-json", config_json, "--gpu", "24GiB", "--solve", "prompt")
    assert outcome.solved == ("prompt", True)
    assert command.render(outcome).startswith("no prompt is too long for 24.0 GiB")


def test_command_fits_auto_chunks_into_the_gpu(config_json: str) -> None:
    outcome = compute("--config-json", config_json, "--prompt-tokens", "1M", "--gpu", "24GiB", "--chunk-tokens", "auto")
    assert isinstance(outcome.plan.config.chunk_tokens, int)
    assert 23 * GIB < outcome.plan.peak_bytes <= 24 * GIB


def test_command_prints_json(config_json: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config-json", config_json, "--prompt-tokens", "64k", "--gpu", "h100", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] is True
    assert values["gpu"] == "h100"
    assert values["least_seconds"] > 0
    assert sum(step["chunk_tokens"] for step in values["steps"]) == 64_000


def test_command_reads_the_header_of_a_gguf_file() -> None:
    path = find_smollm2_gguf()
    if path is None:
        pytest.skip("SmolLM2 is not installed")
    shape = ModelShape.from_config(read_config(path))
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.vocab, shape.tied) == (30, 576, 3, 49152, True)
    assert shape.parameters == 134_515_008
    outcome = compute(str(path), "--prompt-tokens", "32k", "--dtype", "bfloat16", "--device", "cpu")
    assert outcome.plan.shape.weights == 2 * 134_515_008


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--prompt-tokens is missing"),
        (("--prompt-tokens", "0"), "--prompt-tokens '0' must be greater than zero"),
        (("--prompt-tokens", "12 parsecs"), "--prompt-tokens '12 parsecs' is not understood"),
        (("--prompt-tokens", "1k", "--gpu", "24"), "--gpu '24' is not understood: give a number with a unit"),
        (("--prompt-tokens", "1k", "--gpu", "24 apples"), "--gpu '24 apples' is not understood"),
        (("--prompt-tokens", "1k", "--gpu", "h20"), "GPU 'h20' is not in the table. Did you mean 'h200'?"),
        (("--prompt-tokens", "1k", "--gpu", "12GiB"), "the weights alone need at least 15.0 GiB in bfloat16"),
        (("--prompt-tokens", "1M", "--gpu", "15.1GiB", "--solve", "memory"), "it needs at least 15.2 GiB"),
        (("--prompt-tokens", "1k", "--solve", "memory"), "--solve memory needs --gpu"),
        (("--prompt-tokens", "1k", "--solve", "prompt", "--gpu", "h100"), "contradict each other"),
        (("--prompt-tokens", "1k", "--memory-tokens", "8"), "raise memory_tokens to at least 36"),
        (("--prompt-tokens", "1k", "--gpu", ""), "--gpu '' is not understood"),
        (
            ("--prompt-tokens", "100M"),
            "48,829 steps, and a plan has 8,192 at most; raise --chunk-tokens to at least 12208",
        ),
        (("--prompt-tokens", "999999999999M"), "raise --chunk-tokens"),
        (("--prompt-tokens", "1M", "--gpu", "24GiB", "--schedule", "full", "--solve", "memory"), "keeps everything"),
        (("--prompt-tokens", "1M", "--gpu", "24GiB", "--schedule", "full", "--solve", "chunk"), "than 'full'"),
        (("--prompt-tokens", "1k", ""), "give one model"),
    ],
)
def test_command_refuses_bad_input(
    config_json: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--config-json", config_json, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "was not found"),
        (b"{", "cannot be read as a model config"),
        (b"\xff\xfe", "cannot be read as a model config"),
        (b"[1]", "holds list, not the entries"),
    ],
)
def test_command_refuses_bad_config_files(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_bytes(content)
    assert main(["plan", "--config-json", str(path), "--prompt-tokens", "1k"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\0" * 20, b"no model at all, only text", LONG_STRING])
def test_command_refuses_broken_gguf_files(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    assert main(["plan", str(path), "--prompt-tokens", "1k"]) == 2
    assert "is not a readable GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "family"),
    [("gemma3", "gemma3_text"), ("qwen3moe", "qwen3_moe"), ("qwen2moe", "qwen2_moe"), ("llama", "llama")],
)
def test_gguf_architectures_go_by_the_names_of_transformers(tmp_path: Path, name: str, family: str) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = [text("general.architecture") + struct.pack("<I", 8) + text(name)]
    sizes = {"block_count": 12, "embedding_length": 64, "feed_forward_length": 128, "attention.head_count": 4}
    if name == "qwen2moe":
        sizes |= {"expert_count": 4, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 48}
    for key, value in {**sizes, "vocab_size": 100, "attention.sliding_window": 32}.items():
        entries.append(text(f"{name}.{key}") + struct.pack("<II", 4, value))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))
    shape = ModelShape.from_config(read_config(path))
    assert shape.family == family
    if name == "gemma3":
        assert (shape.sliding_layers, shape.rotary_bases) == (10, 2)
    if name == "qwen2moe":
        assert (shape.experts, shape.intermediate, shape.shared) == (4, 32, 48)


def test_search_takes_few_tries_where_peaks_are_straight() -> None:
    tried: list[int] = []

    def peak(value: int) -> int:
        tried.append(value)
        return 7 * value + 123

    assert largest_within(7 * 654_321 + 125, peak, 10, 10**6, "it") == 654_321
    assert len(tried) <= 10


def test_command_answers_within_two_seconds_and_without_torch(config_json: str) -> None:
    code = (
        "import sys; from imdc.cli.main import main; "
        f"main(['plan', '--config-json', {config_json!r}, '--prompt-tokens', '1M', '--gpu', '24GiB', "
        "'--solve', 'memory']); assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    # Processor time, and the best of three: other tests may hold the processors.
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0.0 < min(seconds) < 2.0
