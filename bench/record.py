"""What every benchmark writes beside its figures: machine, versions, commit. Results are never overwritten.

A result names no path of the machine: such paths mean nothing elsewhere and give away whose machine it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from imdc.model.loading import cache_dir

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def circumstances(*, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit, command and time of this run.

    A `commit` is named where the tree came without its history: what git says there is of another one.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": _without_machine_paths([os.path.basename(sys.executable), *sys.argv]),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "system": platform.platform(),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("imdc", "torch", "transformers", "triton")},
        },
        "commit": commit or _git("rev-parse", "HEAD"),
        "uncommitted": None if commit else _git("status", "--porcelain", "--", "imdc", "kernels", "bench/*.py"),
    }


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of this run, for JSON."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def write(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write `result` to `folder` under a name of its own; returns where.

    Every string in it that is a path of this machine goes through `relative`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    path, number = folder / f"{name}-{stamp}.json", 1
    while True:
        try:
            file = path.open("x", encoding="utf-8")
            break
        except FileExistsError:
            # Of a run that ended within the same second.
            number += 1
            path = folder / f"{name}-{stamp}-{number}.json"
    with file:
        json.dump(_without_machine_paths(result), file, indent=1)
        file.write("\n")
    return path


def relative(path: str | os.PathLike[str]) -> str:
    """The path as it reads on any machine.

    From the project's folder for what lies in it or beside it ("../shared/data"), from imdc's own cache for what lies
    there; of any other only the last part is kept. A relative path stays as it is, unless it climbs two folders up.
    """
    text = os.fspath(path)
    if not os.path.isabs(text) and not _climbs(text):
        return text
    lexical = Path(os.path.abspath(text))
    for base in (ROOT, cache_dir()):
        if lexical.is_relative_to(base):
            return lexical.relative_to(base).as_posix()
    if ROOT.parent.name and lexical.is_relative_to(ROOT.parent):
        return f"../{lexical.relative_to(ROOT.parent).as_posix()}"
    return lexical.name


def _climbs(path: str) -> bool:
    """Whether a relative path leads out of the folder beside the project's, where folders are the machine's own."""
    return Path(os.path.normpath(path)).parts[:2] == ("..", "..")


def _without_machine_paths(value: Any) -> Any:
    """`value` of JSON with every string that is a path of this machine, or an option set to one, made relative."""
    if isinstance(value, dict):
        return {name: _without_machine_paths(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_machine_paths(one) for one in value]
    if not isinstance(value, (str, Path)):
        return value
    option, equals, path = str(value).rpartition("=") if str(value).startswith("--") else ("", "", str(value))
    # A model's answer may look like a path as well, so its first folder, or where it climbs to the last, has to exist.
    rooted = os.path.isabs(path) and len(Path(path).parts) > 1 and os.path.exists(os.path.join(*Path(path).parts[:2]))
    if rooted or (_climbs(path) and os.path.exists(os.path.dirname(path))):
        path = relative(path)
    return f"{option}{equals}{path}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
