"""Aligned tables and plots, as `plan` and `simulate` show them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_laer.files.checks import one_line, quoted
from megatron_laer.files.writing import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Return a table as text, with the columns of `left` left-aligned, others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def check_can_plot(path: Path, flag: str = "--plot") -> None:
    """Refuse a plot that cannot be made, before the work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            f"{flag} needs the package matplotlib: `pip install matplotlib`, or leave {flag} out "
            "(--json has the figures)"
        )
    from matplotlib.backend_bases import FigureCanvasBase

    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if _ending(path) not in endings:
        raise ValueError(f"{flag} {quoted(path)}: give a file that ends in .{', .'.join(endings)}")


def plot(title: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.grid(alpha=0.3)
    axes.set_title(one_line(title, 100), parse_math=False)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def write_plot(path: Path, figure: Figure, flag: str) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=_ending(path))
    write_output(path, content.getvalue(), flag)


def _ending(path: Path) -> str:
    return path.suffix.removeprefix(".").lower()
