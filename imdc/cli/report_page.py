"""The report page of `imdc profile --html`: one file with its data, styles and script, and no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from imdc import __version__


def style() -> str:
    """What all report pages look like, in light and dark; also of `bench/longbench.py`."""
    return _part("report.css")


def page(data: Mapping[str, Any]) -> str:
    """The page for the values of `imdc profile --json`."""
    # Only the name of a local folder is shown, because the page is made to be passed on.
    model = str(data["model"])
    name = Path(model).name if Path(model).exists() else model
    title = f"{name}: {data['prompt_tokens']:,} tokens"
    # "<" may not stand in a script element: a model's name could close it.
    values = json.dumps({**data, "model": name}, separators=(",", ":")).replace("<", "\\u003c")
    return (
        _part("report.html")
        .replace("%TITLE%", html.escape(title))
        .replace("%VERSION%", html.escape(__version__))
        .replace("%STYLE%", style())
        .replace("%SCRIPT%", _part("report.js"))
        .replace("%DATA%", values)
    )


def _part(name: str) -> str:
    return (files("imdc.cli") / name).read_text(encoding="utf-8")
