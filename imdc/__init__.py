"""Prefill very long prompts with Hugging Face models chunk by chunk, in bounded memory.

Names are imported on first use: importing `imdc` changes nothing global and needs neither torch nor a GPU.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imdc.config import PrefillConfig as PrefillConfig
    from imdc.explain import explain as explain
    from imdc.memory import ImdcCache as ImdcCache
    from imdc.patch import PatchHandle as PatchHandle
    from imdc.patch import patch as patch
    from imdc.persistence import load_cache as load_cache
    from imdc.plan import Plan as Plan
    from imdc.plan import plan as plan
    from imdc.report import PrefillReport as PrefillReport
    from imdc.report import StepReport as StepReport

__version__ = "0.1.0"

_HOMES = {
    "PrefillConfig": "imdc.config",
    "ImdcCache": "imdc.memory",
    "PatchHandle": "imdc.patch",
    "patch": "imdc.patch",
    "load_cache": "imdc.persistence",
    "Plan": "imdc.plan",
    "explain": "imdc.explain",
    "plan": "imdc.plan",
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


class _Package(ModuleType):
    """This package, where `imdc.plan` stays the function when Python binds the submodule of that name to it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
