"""Prefill very long prompts with Hugging Face models chunk by chunk, in bounded memory.

Names are imported on first use: importing `imdc` changes nothing global and needs neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imdc.cache.cache import ImdcCache as ImdcCache
    from imdc.cache.file import load_cache as load_cache
    from imdc.cache.file import save_cache as save_cache
    from imdc.config import PrefillConfig as PrefillConfig
    from imdc.model.language_model import language_model as language_model
    from imdc.observers import GENERAL_QUESTIONS as GENERAL_QUESTIONS
    from imdc.observers import Observer as Observer
    from imdc.planner.plan import Plan as Plan
    from imdc.planner.plan import plan as plan
    from imdc.prefill.explain import explain as explain
    from imdc.prefill.patch import PatchHandle as PatchHandle
    from imdc.prefill.patch import patch as patch
    from imdc.prefill.probe import probe as probe
    from imdc.prefill.recording import ProbeResult as ProbeResult
    from imdc.report import PrefillReport as PrefillReport
    from imdc.report import StepReport as StepReport

__version__ = "0.2.0"

_HOMES = {
    "PrefillConfig": "imdc.config",
    "ImdcCache": "imdc.cache.cache",
    "PatchHandle": "imdc.prefill.patch",
    "language_model": "imdc.model.language_model",
    "patch": "imdc.prefill.patch",
    "ProbeResult": "imdc.prefill.recording",
    "probe": "imdc.prefill.probe",
    "load_cache": "imdc.cache.file",
    "save_cache": "imdc.cache.file",
    "Plan": "imdc.planner.plan",
    "explain": "imdc.prefill.explain",
    "plan": "imdc.planner.plan",
    "GENERAL_QUESTIONS": "imdc.observers",
    "Observer": "imdc.observers",
    "PrefillReport": "imdc.report",
    "StepReport": "imdc.report",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'imdc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
