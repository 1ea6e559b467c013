"""The report of `imdc profile`: its tables, and its page in a browser."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, find_chromium
from rich.console import Console
from tiny_models import FAMILIES

import imdc.cli.profile as command
from imdc.cli.profile_tables import steps_table, summary_table
from imdc.cli.report_page import page
from imdc.config import PrefillConfig
from imdc.model.shape import ModelShape
from imdc.profiler.measure import measure, measure_unpatched
from imdc.units import format_bytes

CONFIG = PrefillConfig(memory_tokens=128, chunk_tokens=100, initial_memory=0.25)


def prompt(tokens: int) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A report page of three schedules and the unpatched model, and the values in it."""
    model, ids = FAMILIES["llama"](), prompt(1000)
    prefills = tuple(measure(model, ids, replace(CONFIG, schedule=name)) for name in ("imdc", "fm", "full"))
    prefills = (*prefills, measure_unpatched(model, ids))
    shape = ModelShape.from_model(model)
    # A name that would break out of the page if it were not escaped.
    outcome = command.Outcome(
        "</script><b>x", "cpu", shape, 1000, prefills, {"tokens": {1.8: 0.2}, "bytes": {1.8: 0.233}}
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(outcome.as_json()), encoding="utf-8")
    return path, outcome.as_json()


def test_tables_fit_into_eighty_columns() -> None:
    model, ids = FAMILIES["llama"](), prompt(1000)
    prefills = [measure(model, ids, CONFIG), measure_unpatched(model, ids)]
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.print(steps_table(prefills[0]))
    console.print(summary_table(prefills))
    printed = out.getvalue()
    assert "\u2026" not in printed
    assert "predicted" in printed and "unpatched" in printed and "tokens/s" in printed


def test_page_names_a_local_model_without_its_folder(report: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.touch()
    text = page({**report[1], "model": str(path)})
    assert "<h1>model.gguf: 1,000 tokens</h1>" in text
    assert str(tmp_path) not in text


def test_page_stands_alone(report: tuple[Path, dict[str, Any]]) -> None:
    text = report[0].read_text(encoding="utf-8")
    # The one address in the page names the SVG namespace; nothing is fetched from it.
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", text)


@pytest.fixture(params=[(1100, 900, False), (390, 800, True)], ids=["desk", "phone"])
def browser(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    width, height, dark = request.param
    opened = Browser(executable, tmp_path / "profile", width, height, dark)
    yield opened
    opened.close()


def test_page_in_a_browser(browser: Browser, report: tuple[Path, dict[str, Any]]) -> None:
    path, values = report
    browser.open(path)
    prefills = values["prefills"]

    def shown() -> tuple[str, str, int]:
        return (
            browser.evaluate("document.querySelector('[aria-selected=true]').textContent"),
            browser.evaluate("document.getElementById('measured').textContent"),
            browser.evaluate("document.querySelectorAll('#bytes rect.memory').length"),
        )

    def expected(index: int) -> tuple[str, str, int]:
        prefill = prefills[index]
        return prefill["name"], format_bytes(prefill["peak_bytes"]), len(prefill["steps"])

    assert shown() == expected(0)
    assert browser.evaluate("document.querySelector('h1').textContent") == "</script><b>x: 1,000 tokens"
    for index in (1, 2):
        browser.move(f"document.querySelectorAll('[role=tab]')[{index}]", click=True)
        assert shown() == expected(index)
    assert len({prefill["peak_bytes"] for prefill in prefills}) == 4

    browser.move("document.getElementById('bytes')", across=0.99)
    last = prefills[2]["steps"][-1]
    tip = browser.evaluate("document.getElementById('tip').textContent")
    assert tip.startswith(f"step {len(prefills[2]['steps'])}: ")
    assert f"measured  {format_bytes(last['peak_bytes'])}" in tip
    browser.move("document.getElementById('heat')", across=0.01)
    assert "layer 2" in browser.evaluate("document.getElementById('tip').textContent")
    browser.move("document.getElementById('retention')", across=0.99)
    share = last["retention"][1]
    assert share is not None
    assert f"kept {100 * share:.1f}%" in browser.evaluate("document.getElementById('tip').textContent")

    # Where nothing was compressed the page says so, and one step is named once.
    browser.move("document.querySelectorAll('[role=tab]')[3]", click=True)
    assert shown() == expected(3)
    assert browser.evaluate("document.getElementById('retention').offsetHeight") == 0
    assert browser.evaluate("document.getElementById('nothing').offsetHeight") > 0
    assert (
        browser.evaluate("[...document.querySelectorAll('#bytes text')].filter(t => /step/.test(t.textContent)).length")
        == 1
    )

    # Nothing sticks out to the side, and dark mode changes the ground.
    assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    dark = browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert browser.errors == []
