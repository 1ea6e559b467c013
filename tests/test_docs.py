"""What the documents say is there: the picture, the files that they name, the environment variables."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
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


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_schedule", ROOT / "docs" / "draw_schedule.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_picture_is_what_the_script_draws(drawing: ModuleType) -> None:
    assert drawing.draw() == text("docs/schedule.svg"), "run `python docs/draw_schedule.py`"
    assert "](docs/schedule.svg)" in text("README.md")


def test_picture_has_a_bar_for_every_chunk_and_every_memory(drawing: ModuleType) -> None:
    tree = ElementTree.fromstring(drawing.draw())
    fills = [rect.get("fill") for rect in tree.iter("{http://www.w3.org/2000/svg}rect")]
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
