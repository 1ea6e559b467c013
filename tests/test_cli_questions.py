"""`imdc read` and `imdc ask`: a document read in one process is asked in another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import build

import imdc
from imdc.cli.document import Frame
from imdc.cli.main import main
from imdc.cli.prompts import chat_prompt, encode_prompt

SMALL = ["--memory-tokens", "64", "--chunk-tokens", "40"]


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<a>"])
def test_document_and_question_make_the_prompt(byte_tokenizer: Any, template: str | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    frame = Frame.of(byte_tokenizer)
    ids = torch.cat((frame.document("A text."), frame.question("Why?")), dim=1)
    assert ids[0].tolist() == encode_prompt(byte_tokenizer, chat_prompt(byte_tokenizer, "A text.", "Why?"))


@pytest.mark.parametrize("recall", ["none", "host", "disk"])
def test_what_is_read_is_asked(
    recall: str, document: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, saved = ["--model", str(tiny_model_dir)], str(tmp_path / "document.imdc")
    read = ["read", *model, "--file", str(document), "--save", saved, *SMALL, "--recall", recall]
    values = json.loads(shown(capsys, *read, "--json"))
    pair = 3 * 2 * 2 * 16 * 4
    assert values["prompt_tokens"] == 420 and values["memory_tokens"] == 64
    # And means of 27 blocks in bfloat16, which the file has not.
    pairs, means = (0, 0) if recall == "none" else (420 * pair, 27 * 3 * 2 * 16 * 2)
    assert values["kv_bytes"] == 64 * pair and values["host_bytes"] == pairs + means
    assert values["file_bytes"] == Path(saved).stat().st_size > values["kv_bytes"] + pairs
    assert values["config"]["observer"] == "questions"

    ask = [
        "ask",
        saved,
        *model,
        *(["--recall", "disk"] if recall == "disk" else []),
        "--max-new-tokens",
        "6",
        "--question",
        "Why?",
        "--question",
        "When?",
    ]
    answers = json.loads(shown(capsys, *ask, "--json"))
    both = [one["answer"] for one in answers["answers"]]
    assert [one["question"] for one in answers["answers"]] == ["Why?", "When?"] and answers["kv_bytes"] == 64 * pair
    assert all((one["recalled_bytes"] > 0) == (recall != "none") for one in answers["answers"])
    text = shown(capsys, *ask)
    assert text.startswith(both[0]) and "s per question" in text and ("host memory" in text) == (recall == "host")
    assert ("on disk" in text) == (recall == "disk")
    if recall == "none":
        assert main([*ask, "--recall-every", "2"]) == 2
        assert "no pairs to take back; read the document with" in capsys.readouterr().err
    else:
        never = json.loads(shown(capsys, *ask, "--recall-every", "0", "--json"))["answers"]
        moved = [[one["recalled_bytes"] for one in several] for several in (answers["answers"], never)]
        assert all(more > less > 0 for more, less in zip(*moved, strict=True))
    assert "tokens read in" in shown(capsys, *read)


def test_pairs_are_read_into_eight_bits(
    document: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, saved = str(tiny_model_dir), str(tmp_path / "document.imdc")
    store = ["--recall", "host", "--recall-dtype", "int8"]
    read = ["read", "--model", model, "--file", str(document), "--save", saved, *SMALL, *store]
    stored = json.loads(shown(capsys, *read, "--json"))["host_bytes"]
    plan = ["plan", model, "--prompt-tokens", "420", "--dtype", "float32", "--json", *SMALL, *store]
    assert json.loads(shown(capsys, *plan))["host_bytes"] == stored < 0.45 * 420 * 3 * 2 * 2 * 16 * 4
    assert "all pairs in host memory as int8" in shown(capsys, *read)
    answers = json.loads(shown(capsys, "ask", saved, "--model", model, "--question", "Why?", "--json"))
    assert answers["host_bytes"] == stored and answers["answers"][0]["recalled_bytes"] > 0


def test_given_questions_vote_in_place_of_general_ones(
    document: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    seen: list[Any] = []
    read = imdc.PatchHandle.read

    def noted(handle: Any, ids: Any, questions: Any = None, **options: Any) -> Any:
        seen.append(questions)
        return read(handle, ids, questions, **options)

    monkeypatch.setattr(imdc.PatchHandle, "read", noted)
    argv = ["read", "--model", str(tiny_model_dir), "--file", str(document), "--save", str(tmp_path / "a"), *SMALL]
    shown(capsys, *argv)
    shown(capsys, *argv, "--question", "Why?", "--question", "When?")
    shown(capsys, *argv, "--observer", "window")
    assert [None if one is None else len(one) for one in seen] == [len(imdc.GENERAL_QUESTIONS), 2, None]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--save", "missing/folder/a"], "its folder does not exist"),
        (["--file", "missing.txt"], "cannot read 'missing.txt'"),
        (["--observer", "window", "--question", "Why?"], "no effect with observer='window'"),
        (["--recall", "host", "--recall-limit", "1KiB"], "recall_limit=1024"),
        (["--recall-limit", "1GiB"], "no effect with recall='none'"),
        (["--recall-dtype", "int8"], "recall_dtype='int8' has no effect with recall='none'"),
    ],
)
def test_bad_input_of_read_is_one_line(
    change: list[str], message: str, document: Path, tiny_model_dir: Path, tmp_path: Path, capsys: Any
) -> None:
    saved = tmp_path / "a"
    argv = ["read", "--model", str(tiny_model_dir), "--file", str(document), "--save", str(saved), *SMALL, *change]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert not saved.exists()


def test_another_model_is_not_asked(tiny_model_dir: Path, document: Path, tmp_path: Path, capsys: Any) -> None:
    saved, other = str(tmp_path / "a"), tmp_path / "other"
    shown(capsys, "read", "--model", str(tiny_model_dir), "--file", str(document), "--save", saved, *SMALL)
    for file in tiny_model_dir.iterdir():
        other.mkdir(exist_ok=True)
        (other / file.name).write_bytes(file.read_bytes())
    build("llama", seed=1, vocab_size=257).save_pretrained(other)
    assert main(["ask", saved, "--model", str(other), "--question", "Why?"]) == 2
    assert "was filled by another model" in capsys.readouterr().err
    assert main(["ask", str(tmp_path / "none"), "--model", str(tiny_model_dir), "--question", "Why?"]) == 2
    assert "no such file" in capsys.readouterr().err
