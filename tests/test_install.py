"""What a wheel holds, and that the folder `kernels` never shadows Hugging Face's package of that name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.utils import import_utils

import imdc

ROOT = Path(__file__).resolve().parents[1]

# A stand-in for Hugging Face's `kernels`: real enough for transformers to import its models with it.
FAKE_KERNELS = """
from unittest.mock import MagicMock

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.startswith("use_kernel"):
        return lambda *args, **kwargs: lambda decorated: decorated
    return MagicMock(name=name)
"""

# Runs when the command calls sys.exit, as every way of starting ends: in its process, with its search path.
AT_EXIT = """
import os, sys

leave = sys.exit

def report(status=None):
    import kernels
    try:
        from transformers import LlamaForCausalLM
        found = LlamaForCausalLM.__name__
    except ImportError as error:
        found = type(error).__name__
    with open(os.environ["IMDC_TEST_REPORT"], "a") as file:
        print(f"kernels={os.path.dirname(kernels.__file__)} llama={found}", file=file)
    leave(status)

sys.exit = report
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the files in a freshly built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("imdc", "kernels", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(folder / done.stdout.split()[-1]).namelist()


@pytest.fixture
def fake_kernels(tmp_path: Path) -> Path:
    """A folder for PYTHONPATH that looks as if Hugging Face's `kernels` were installed, in a version it accepts."""
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.9.0")
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    (site / f"kernels-{version}.dist-info").mkdir()
    (site / f"kernels-{version}.dist-info" / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n"
    )
    (site / "sitecustomize.py").write_text(AT_EXIT)
    return site


def kernels_seen_by(command: list[str], site: Path) -> str:
    """Run `command` in the repository root; which `kernels` it saw, and whether Llama could be imported."""
    report = site / "report"
    environment = {**os.environ, "PYTHONPATH": str(site), "IMDC_TEST_REPORT": str(report), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return report.read_text().splitlines()[0]


def test_wheel_holds_every_module_and_no_top_level_kernels(wheel: list[str]) -> None:
    expected = {f"imdc/{path.relative_to(ROOT / 'imdc').as_posix()}" for path in (ROOT / "imdc").rglob("*.py")}
    expected |= {f"imdc/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {"imdc/py.typed"} | {f"imdc/cli/report.{kind}" for kind in ("css", "html", "js")}
    shipped = {name for name in wheel if ".dist-info/" not in name}
    assert shipped == expected


def test_wheel_names_its_version_command_and_licence(wheel: list[str]) -> None:
    assert any(name.startswith(f"imdc-{imdc.__version__}.dist-info/") for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)
    assert any(name.endswith("LICENSE") for name in wheel)


def test_installed_kernels_are_this_checkouts() -> None:
    import imdc.kernels

    assert imdc.kernels.__file__ is not None
    assert Path(imdc.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_tests_see_no_stray_kernels() -> None:
    assert str(ROOT) not in [os.path.abspath(entry) for entry in sys.path]


@pytest.mark.slow
def test_ways_of_the_readme_see_hugging_faces_kernels(fake_kernels: Path) -> None:
    scripts = Path(sys.executable).parent
    ways = [
        [str(scripts / "imdc"), "--version"],
        [sys.executable, "bench/prefill.py", "--help"],
        [str(scripts / "pytest"), "--collect-only", "-q", "tests/test_config.py"],
    ]
    for way in ways:
        (fake_kernels / "report").unlink(missing_ok=True)
        seen = kernels_seen_by(way, fake_kernels)
        assert seen == f"kernels={fake_kernels / 'kernels'} llama=LlamaForCausalLM", way


@pytest.mark.slow
def test_the_check_above_can_fail(fake_kernels: Path) -> None:
    # With the repository root on the path the wrong package is found: why the README names no `python -m pytest`.
    seen = kernels_seen_by([sys.executable, "-c", "import sys; sys.exit(0)"], fake_kernels)
    assert seen.startswith(f"kernels={ROOT / 'kernels'} ")


def test_readme_names_no_way_that_shadows() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"python3? -m pytest|python3? -c", text), name
