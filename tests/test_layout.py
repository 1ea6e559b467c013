"""How the sources hang together: imports go downward, files stay small, importing has no side effects."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 300

# Rooms and their floors; "" is the root of the package, what all rooms share.
FLOORS = {"kernels": 0, "": 1, "model": 2, "cache": 3, "planner": 3, "prefill": 4, "profiler": 5, "cli": 6}
NO_TORCH = (
    "",
    "planner",
    "imdc.model.backend_rule",
    "imdc.model.families",
    "imdc.model.shape",
    "imdc.model.config_file",
    "imdc.model.config_terms",
)


def sources() -> dict[str, Path]:
    """Module name to file, of everything that is shipped."""
    found = {}
    for package, folder in (("imdc", ROOT / "imdc"), ("imdc.kernels", ROOT / "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imports(name: str, path: Path, *, lazy: bool) -> set[str]:
    """Modules of imdc that a file imports when it is imported; with `lazy` also those inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # Names for annotations are never imported when the program runs.
    tree.body = [
        node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {module for module in found if module.split(".")[0] == "imdc"}


@cache
def graph(*, lazy: bool = False) -> dict[str, set[str]]:
    known = sources()
    # The root is left out: it names the public functions and imports them on first use.
    return {
        name: imports(name, path, lazy=lazy) & known.keys() - {"imdc", name}
        for name, path in known.items()
        if name != "imdc"
    }


def room(name: str) -> str:
    """The room of a module."""
    first = name.split(".")[1]
    return first if first in FLOORS else ""


@pytest.mark.parametrize("lazy", [False, True], ids=["imported", "imported in functions too"])
def test_imports_have_no_cycle(lazy: bool) -> None:
    order = list(TopologicalSorter(graph(lazy=lazy)).static_order())
    assert set(order) == sources().keys() - {"imdc"}


@pytest.mark.parametrize("name", sorted(sources().keys() - {"imdc"}))
def test_imports_between_rooms_go_down(name: str) -> None:
    found = graph(lazy=True)[name]
    assert not {other for other in found if room(other) != room(name) and FLOORS[room(other)] >= FLOORS[room(name)]}


@pytest.mark.parametrize("name", [name for name in sources() if room(f"{name}.") in NO_TORCH or name in NO_TORCH])
def test_rooms_without_torch_import_none(name: str) -> None:
    tree = ast.parse(sources()[name].read_text(encoding="utf-8"))
    # Scores of observers need torch, where they are computed; a plan computes none.
    nodes = tree.body if name == "imdc.observers" else list(ast.walk(tree))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {one for one in named if one.split(".")[0] in ("torch", "transformers", "triton")}


def test_the_map_in_contributing_is_the_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `([\w/]+)/` \| ([^|]+) \|", text, flags=re.MULTILINE)
    shown = {folder.removeprefix("imdc/").removeprefix("imdc"): (int(floor), files) for floor, folder, files in rows}
    assert {name: floor for name, (floor, _) in shown.items()} == FLOORS
    for name, (_, files) in shown.items():
        folder = ROOT / "kernels" if name == "kernels" else ROOT / "imdc" / name
        assert re.findall(r"`(\w+)`", files) == sorted(
            path.stem for path in folder.glob("*.py") if path.stem[:2] != "__"
        )


def test_the_root_is_small() -> None:
    assert len(list((ROOT / "imdc").glob("*.py"))) <= 10


@pytest.mark.parametrize("path", sources().values(), ids=sources().keys())
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_kernels_package_is_a_docstring_only() -> None:
    # A guard that raises there would break transformers, which imports a stray `kernels` to read its version.
    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


def test_import_is_light_and_touches_nothing(tmp_path: Path) -> None:
    code = """
import sys
import imdc
print(sorted({"torch", "transformers", "triton", "einops", "rich"} & sys.modules.keys()))
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions
from transformers import LlamaForCausalLM, PreTrainedModel
before = dict(functions._global_mapping), dict(vars(LlamaForCausalLM)), dict(vars(PreTrainedModel))
imdc.patch, imdc.PrefillConfig, imdc.plan
after = dict(functions._global_mapping), dict(vars(LlamaForCausalLM)), dict(vars(PreTrainedModel))
print(before == after)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "True"]


def test_patch_needs_no_triton(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["triton"] = None
sys.path.append({str(ROOT / "tests")!r})
import imdc, torch
from tiny_models import FAMILIES
model, ids = FAMILIES["llama"](), torch.arange(3, 103)[None]
with imdc.patch(model, memory_tokens=64, chunk_tokens=32) as handle:
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
print(handle.report.memory_tokens)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["64"]


def test_public_names_are_found() -> None:
    import imdc

    assert set(imdc.__all__) >= {"PrefillConfig", "PatchHandle", "PrefillReport", "StepReport", "patch", "plan"}
    for name in imdc.__all__:
        assert getattr(imdc, name) is not None
        assert name in dir(imdc)
    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        imdc.pach  # noqa: B018
