"""`imdc profile --probe`: its values, its table, and its pictures in the report page."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, find_chromium
from rich.console import Console
from tiny_models import FAMILIES
from transformers import PreTrainedModel

import imdc
from imdc.cli.main import main
from imdc.cli.profile_tables import age_line, probe_table
from imdc.model import hf

SIZES = ("--memory-tokens", "128", "--chunk-tokens", "100", "--initial-memory", "0.25")


def probed(model: PreTrainedModel, tokens: int, **options: Any) -> imdc.ProbeResult:
    with imdc.patch(model, chunk_tokens=50, **options) as handle, imdc.probe(handle) as probe:
        model(torch.randint(3, 128, (1, tokens)), **{hf.CACHE_NAME: handle.new_cache()})
    return probe.result


def test_table_and_sentence_say_what_the_probe_found() -> None:
    result = probed(FAMILIES["gemma3"](), 1000, observer="sink_recent", schedule="fm", memory_tokens=104)
    out = io.StringIO()
    Console(file=out, width=80).print(probe_table("fm", result))
    printed = out.getvalue()
    assert "\u2026" not in printed and "fm: what reading did to the memory" in printed
    # 4 sinks and the latest 100 tokens: the last two chunks whole.
    assert [cell.strip() for cell in printed.splitlines()[-2].split("\u2502")[1:4]] == ["20/20", "50", "51.9%"]
    shares = [cell.strip() for cell in printed.splitlines()[-2].split("\u2502")[5:7]]
    assert shares == ["100.0%", "48.1%"]
    assert age_line("fm", result) == "fm: half of the memory is of the last 52 of 1,000 tokens"


def test_nothing_compressed_leaves_the_table_empty() -> None:
    result = probed(FAMILIES["mistral_sliding"](), 100, memory_tokens=64)
    out = io.StringIO()
    Console(file=out, width=80).print(probe_table("imdc", result))
    assert "%" not in out.getvalue() and "nan" not in out.getvalue()
    assert age_line("imdc", result) == ""


def test_command_probes_what_it_measures(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["profile", str(tiny_model_dir), "--prompt-tokens", "1k", "--compare", "imdc,unpatched", *SIZES]
    page = tmp_path / "report.html"
    assert main([*arguments, "--probe", "--json", "--html", str(page)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values["probes"]) == ["imdc"]
    probe, steps = values["probes"]["imdc"], values["prefills"][0]["steps"]
    assert probe["retention"] == [step["retention"] for step in steps]
    assert [len(row) for row in probe["survival"]] == [len(steps)] * len(steps)
    assert main(arguments) == 0
    assert "what reading did" not in capsys.readouterr().out
    assert main([*arguments, "--probe"]) == 0
    printed = capsys.readouterr().out
    assert "imdc: what reading did to the memory" in printed and "imdc: half of the memory is of the last" in printed

    executable = find_chromium()
    if executable is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    browser = Browser(executable, tmp_path / "profile", 1100, 900, False)
    try:
        browser.open(page)
        assert_pictures(browser, probe)
    finally:
        browser.close()


def assert_pictures(browser: Browser, probe: dict[str, Any]) -> None:
    count = len(probe["steps"])

    def tip(canvas: str) -> str:
        browser.move(f"document.getElementById('{canvas}')", across=0.99)
        return str(browser.evaluate("document.getElementById('tip').textContent"))

    # The pointer is on the last column, half way down.
    assert tip("mass") == f"step {count}, layer 2\n{100 * probe['mass_kept'][-1][1]:.1f}% of the attention kept"
    middle = count // 2
    there = 100 * probe["survival"][-1][middle]
    assert tip("survival") == f"step {count}, chunk {middle + 1}\n{there:.1f}% of the chunk is there"
    share = 100 * probe["layer_origins"][1][count]
    assert tip("origins") == f"chunk {count}, layer 2\n{share:.1f}% of the layer's memory"
    browser.move("document.querySelectorAll('[role=tab]')[1]", click=True)
    assert browser.evaluate("document.getElementById('probe').offsetHeight") == 0
    assert browser.errors == []
