"""What the README says works: its Python example, its commands, its tables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from imdc.cli.main import build_parser
from imdc.config import GROWTHS, SCHEDULES, PrefillConfig
from imdc.observers import OBSERVERS

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_example_runs(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, recalling = blocks("python")
    assert len(example.strip().splitlines()) <= 11
    (tmp_path / "book.txt").write_text("Call me Ishmael. " * 250)
    monkeypatch.chdir(tmp_path)
    named: dict[str, Any] = {}
    exec(re.sub(r'name = ".*"', f"name = {str(tiny_model_dir)!r}", example), named)
    report = named["handle"].report
    assert report.memory_tokens == 2048 < report.prompt_tokens
    assert str(report.kv_bytes) in capsys.readouterr().out
    before = named.pop("output")
    exec(recalling, named)
    assert named["output"].shape == before.shape and named["output"] is not before
    assert "_imdc_handle" not in vars(named["model"])


def test_commands_are_understood() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("imdc ")]
    assert len(lines) >= 2
    for line in lines:
        args = build_parser().parse_args(shlex.split(line)[1:])
        assert args.command in line


@pytest.mark.parametrize(
    ("heading", "names", "default"),
    [("schedule", SCHEDULES, PrefillConfig().schedule), ("observer", OBSERVERS, PrefillConfig().observer)],
)
def test_tables_list_every_choice(heading: str, names: tuple[str, ...], default: str) -> None:
    table = README.partition(f"| `{heading}` |")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == tuple(names)
    assert f"`{default}` (default)" in table


def test_growths_are_named() -> None:
    assert ", ".join(f"`{name}`" for name in GROWTHS) in README
