"""Matplotlib for benchmarks: imported only when something is drawn, without a display, in one style."""

import importlib
from pathlib import Path
from typing import Any

from tetrion.entrypoints.errors import InputError
from tetrion.entrypoints.record import whole

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 160,
}


def import_matplotlib() -> Any:
    """The `matplotlib` module in our style, drawing into files. Raises InputError where it is not installed."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise InputError("plots: need matplotlib; install it with pip install matplotlib") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    return matplotlib


def check_png(path: Path, field: str) -> None:
    """Raises InputError for a name that is not a PNG's. To be asked before anything is measured or computed."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{field}: must be the name of a PNG file, which ends in .png, got {str(path)!r}")


def save(figure: Any, path: Path) -> None:
    """Write the figure to `path`, whole or not at all, making its folder."""
    with whole(path) as temporary:
        figure.savefig(temporary, bbox_inches="tight")
