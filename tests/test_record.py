"""What benchmarks write: results that name no machine path."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
MACHINE_PATH = re.compile(r"/(?:root|work|home|tmp)/")
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff")]


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_under_test", ROOT / "bench" / "record.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published() -> list[Path]:
    """Files that others read."""
    found = [path for path in PAGES if path.exists()]
    for folder in ("bench/results", "docs", "examples"):
        found += [path for path in sorted((ROOT / folder).rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return found


@pytest.mark.parametrize("path", published(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_published_files_name_no_machine_path(path: Path) -> None:
    assert MACHINE_PATH.findall(path.read_text(encoding="utf-8")) == []


def test_paths_are_relative_to_the_project_or_the_cache(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMDC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    assert record.relative(ROOT / "bench" / "results") == "bench/results"
    assert record.relative(ROOT) == "."
    assert record.relative(ROOT.parent / "shared" / "data") == "../shared/data"
    assert record.relative(ROOT / "bench" / ".." / "README.md") == "README.md"
    assert record.relative(tmp_path / "cache" / "SmolLM2-v1") == "SmolLM2-v1"
    assert record.relative("/mnt/disk/somebody/models/llama") == "llama"
    assert record.relative("../shared/data/books") == "../shared/data/books"
    assert record.relative("../a/../../runs/n8") == record.relative("../../../tmp/n8") == "n8"
    assert record.relative("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_written_result_names_no_machine_path(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    result = {
        "command": ["python", str(ROOT / "bench" / "needle.py"), f"--out={tmp_path}", "--model", str(tmp_path / "m")],
        "output": os.path.relpath(tmp_path / "run"),
        "options": {"out": tmp_path, "setting": [[512, 4096]], "memory_of": None},
        "rows": [
            {
                "answer": "/no such folder/ is 15306",
                "code": "../../no such folder/b.h",
                "seconds": 1.5,
                "right": True,
                "ratio": "full / imdc",
            }
        ],
    }
    written = json.loads(record.write("needle", result, tmp_path / "results").read_text(encoding="utf-8"))
    assert written == {
        "command": ["python", "bench/needle.py", f"--out={tmp_path.name}", "--model", "m"],
        "output": "run",
        "options": {"out": tmp_path.name, "setting": [[512, 4096]], "memory_of": None},
        "rows": result["rows"],
    }


def test_the_command_of_a_run_names_no_machine_path(
    record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(ROOT / "bench" / "needle.py"), "--model", str(tmp_path / "m"), f"--output={tmp_path / 'run'}"]
    monkeypatch.setattr("sys.argv", words)
    assert record.circumstances()["command"][1:] == ["bench/needle.py", "--model", "m", "--output=run"]
