"""The picture of `imdc profile --plot`: measured and predicted peak over the prompt, one line per schedule."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imdc.errors import ConfigError
from imdc.units import MIB

if TYPE_CHECKING:
    from imdc.profiler.measure import MeasuredPrefill


def check_figure(path: str) -> None:
    """Refuse before anything was measured.

    Raises:
        ConfigError: matplotlib is not installed, or does not know the ending of `path`.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    ending = Path(path).suffix.removeprefix(".").lower()
    # Without an ending matplotlib adds its own.
    if ending and ending not in known:
        raise ConfigError(f"--plot {path!r}: .{ending} is no picture format; use one of {', '.join(sorted(known))}")


def draw(prefills: Sequence[MeasuredPrefill], path: str) -> None:
    """Write the picture to `path`; its ending chooses the format.

    Raises:
        ConfigError: matplotlib does not know the ending, or the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for prefill in prefills:
        tokens = [measured.start + measured.chunk_tokens for measured in prefill.steps]
        peaks = [measured.peak_bytes / MIB for measured in prefill.steps]
        predicted = [measured.predicted.above_weights / MIB for measured in prefill.steps]
        # The two often lie on each other: a broad pale line with a thin one on it shows both.
        (line,) = axes.plot(tokens, peaks, marker="o", linewidth=5, alpha=0.35, label=f"{prefill.name}, measured")
        label, color = f"{prefill.name}, predicted", line.get_color()
        axes.plot(tokens, predicted, "x--", color=color, linewidth=1.2, markersize=4, label=label)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("peak above the weights, MiB")
    axes.set_ylim(bottom=0)
    axes.legend()
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--plot {path!r} cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
