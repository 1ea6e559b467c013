"""The versions that setup.py, the constraint files, CI and the README name are the same ones."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import imdc
from imdc.model import hf

ROOT = Path(__file__).resolve().parents[1]
CI = (".ci/run", ".ci/newcomer", ".ci/common")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned(name: str) -> tuple[int, int]:
    """Major and minor version of transformers in a constraint file."""
    found = re.search(r"^transformers==(\d+)\.(\d+)\.\d+$", text(name), flags=re.MULTILINE)
    assert found is not None
    return int(found[1]), int(found[2])


def bounds() -> tuple[tuple[int, int], tuple[int, int]]:
    """The lowest supported release of transformers, and the first that is not."""
    # .ci/newcomer --newest takes the upper bound out of a line of this form.
    found = re.search(r'"transformers>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text("setup.py"))
    assert found is not None
    return (int(found[1]), int(found[2])), (int(found[3]), int(found[4]))


def test_bounds_are_the_tested_releases() -> None:
    lowest, above = bounds()
    major, minor = pinned("constraints-ci.txt")
    assert lowest == pinned("constraints-lowest.txt")
    assert above == (major, minor + 1)
    assert (lowest, above) == (hf.LOWEST, hf.BELOW)


def test_releases_between_are_inside_the_bounds() -> None:
    named = re.search(r"for release in ([\d. ]+);", text(".ci/run"))
    assert named is not None
    lowest, above = bounds()
    for release in named[1].split():
        major, minor, _ = map(int, release.split("."))
        assert lowest < (major, minor) < above


def test_readme_and_changelog_name_the_bounds() -> None:
    lowest, above = bounds()
    newest = f"{above[0]}.{above[1] - 1}"
    assert f"transformers {lowest[0]}.{lowest[1]} to {newest}" in text("README.md").replace("\n", " ")
    assert f"transformers {lowest[0]}.{lowest[1]} to {newest}" in re.sub(r"\s+", " ", text("CHANGELOG.md"))


def test_the_version_has_a_dated_section_and_a_citation() -> None:
    dated = re.search(
        rf"^## {re.escape(imdc.__version__)} - (\d{{4}}-\d\d-\d\d)$", text("CHANGELOG.md"), flags=re.MULTILINE
    )
    assert dated is not None
    citation = text("CITATION.cff")
    assert f"\nversion: {imdc.__version__}\n" in citation
    assert f'\ndate-released: "{dated[1]}"\n' in citation


@pytest.mark.parametrize("name", CI)
def test_ci_names_tests_that_exist(name: str) -> None:
    named = subprocess.run(
        ["bash", "-c", "shopt -s failglob; echo " + " ".join(re.findall(r"tests/test_\S+?\.py", text(name)))],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert named.returncode == 0, named.stderr
    for path in named.stdout.split():
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", CI)
def test_ci_scripts_parse(name: str) -> None:
    done = subprocess.run(["bash", "-n", name], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
