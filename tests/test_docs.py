"""What the documents say is there: the picture, the files that they name, the environment variables."""

from __future__ import annotations

import importlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from imdc.config import PrefillConfig
from imdc.model.families import FAMILIES
from imdc.schedule import build_steps

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/DESIGN.md", "docs/RESULTS.md")
# Set by a test for a process of its own, and read nowhere else.
INTERNAL = {"IMDC_TEST_REPORT"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of docs/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module


@pytest.mark.parametrize(("name", "document"), [("schedule", "README.md"), ("gains", "docs/RESULTS.md")])
def test_picture_is_what_the_script_draws(script: Callable[[str], ModuleType], name: str, document: str) -> None:
    drawn = script(f"draw_{name}").draw()
    assert drawn == text(f"docs/{name}.svg"), f"run `python docs/draw_{name}.py`"
    assert f"]({'docs/' if document == 'README.md' else ''}{name}.svg)" in text(document)


def test_picture_has_a_mark_for_every_measured_gain(script: Callable[[str], ModuleType]) -> None:
    drawing = script("draw_gains")
    tree = ElementTree.fromstring(drawing.draw())
    gains = [gain for panel in drawing.PANELS for gain in panel.measured()[1].values()]
    assert len(list(tree.iter(f"{SVG}circle"))) == len(gains) > 10
    shown = {element.text for element in tree.iter(f"{SVG}text")}
    assert {drawing.signed(mean) for mean, _, _ in gains} <= shown
    assert all(drawing.LEAST <= low <= mean <= high <= drawing.MOST for mean, low, high in gains)


def test_picture_has_a_bar_for_every_chunk_and_every_memory(script: Callable[[str], ModuleType]) -> None:
    drawing = script("draw_schedule")
    tree = ElementTree.fromstring(drawing.draw())
    fills = [rect.get("fill") for rect in tree.iter(f"{SVG}rect")]
    steps = [
        step
        for name in ("fm", "im", "imdc")
        for step in build_steps(drawing.PROMPT_TOKENS, PrefillConfig(schedule=name))
    ]
    # One more of each colour explains it.
    assert fills.count("#f2a54a") == len(steps) + 1
    assert fills.count("#3b6ea8") == sum(step.memory_before > 0 for step in steps) + 1


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name: str) -> None:
    document, folder = text(name), (ROOT / name).parent
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", document)
    named = re.findall(r"`((?:tests|docs|examples|\.ci|bench)/[\w./]+\.\w+)`", document)
    assert linked + named
    assert [path for path in linked if not (folder / path).exists()] == []
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_sections_that_are_linked_exist(name: str) -> None:
    for path, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text(name)):
        linked = ((ROOT / name).parent / path if path else ROOT / name).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.+)$", linked, flags=re.MULTILINE)
        # As GitHub names them.
        assert section in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_environment_variables_are_listed() -> None:
    read = set()
    for folder in ("imdc", "kernels", "bench", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text(encoding="utf-8")
            read |= set(re.findall(r"""environ(?:\.(?:get|setdefault|pop)\(|\[)["'](\w+)["']""", source))
            read |= set(re.findall(r"""getenv\(["'](\w+)["']""", source))
            # A name that a constant of the module holds.
            for constant in re.findall(r"environ(?:\.get\(|\[)([A-Z_]+)[,)\]]", source):
                read |= set(re.findall(rf"""^{constant} = ["'](\w+)["']""", source, flags=re.MULTILINE))
    assert {"IMDC_CACHE", "IMDC_FUZZ_EXAMPLES", "TRITON_INTERPRET", "HF_HUB_OFFLINE", "LONGBENCH_DATA"} <= read
    documents = text("README.md") + text("CONTRIBUTING.md")
    assert {name for name in read - INTERNAL if f"`{name}" not in documents} == set()


def test_readme_names_the_families() -> None:
    readme = re.sub(r"\s+", " ", text("README.md"))
    for family in FAMILIES.values():
        assert family.title in readme, family.title
