"""Triton's interpreter without its repeated work, a third of the time of the kernel tests.

It patches `triton.language` at every call of a device function, which a kernel makes for every block of keys. What it
patches stays so until the launch ends, and depends on nothing but which modules of the language the function sees: once
per launch and set of modules does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from triton import language
from triton.runtime import interpreter


def patch_language_once_per_launch() -> None:
    """Replace the interpreter's two functions for the rest of this process."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[frozenset[str]] = set()

    def patch_once(fn: Callable[..., Any]) -> Any:
        modules = (x for x in fn.__globals__.values() if isinstance(x, ModuleType))
        seen = frozenset(module.__name__ for module in modules if module in (language, language.core))
        if seen in patched:
            return None  # only a launch wants it, to restore the language, and a launch is the first
        patched.add(seen)
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
