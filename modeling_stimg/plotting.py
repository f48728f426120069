"""Figures. Every function takes `ax` where it draws on one, and returns it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOMAIN_COLOURS = "tab20"


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to no global state and needs no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need Matplotlib: pip install 'stimg[plot]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure under a temporary name, then rename it."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.tmp{os.getpid()}{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def grid_positions(adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Where to draw the spots: x, y float64 (n_obs,), y downwards; odd rows of a staggered array are in between."""
    rows = adata.obs["array_row"].to_numpy().astype(float)
    cols = adata.obs["array_col"].to_numpy().astype(float)
    staggered = len(rows) > 1 and len(set((rows + cols) % 2)) == 1
    # On a staggered array neighbours of a row are two columns apart, and rows sqrt(3) / 2 of that.
    return (cols, rows * np.sqrt(3)) if staggered else (cols, rows)


def plot_domains(adata: AnnData, values: Sequence[Any] | np.ndarray, title: str = "", ax: Axes | None = None) -> Axes:
    """A map of the slide, one marker a spot.

    Args:
        adata: a slide from `read_slide`.
        values: (n_obs,), classes (str, categories, integers or None) or numbers (float).
        ax: where to draw; None = a figure of its own (`ax.figure`).
    """
    x, y = grid_positions(adata)
    if ax is None:
        span = max(np.ptp(y), 1) / max(np.ptp(x), 1)
        ax = _figure(6, min(max(6 * span, 2.5), 12)).subplots()
    values = np.asarray(values)
    # A marker about as wide as the distance between spots.
    width = ax.figure.get_figwidth() * ax.get_position().width * 72
    size = (
        0.9 * width / (np.ptp(x) / (2 if np.ptp(y) != 0 and y.max() != adata.obs["array_row"].max() else 1) + 1)
    ) ** 2
    if values.dtype.kind == "f":
        drawn = ax.scatter(x, y, c=values, s=size, cmap="viridis", linewidths=0)
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7)
    else:
        _scatter_classes(ax, x, y, values, size)
    ax.set(title=title, aspect="equal", xticks=[], yticks=[])
    ax.invert_yaxis()
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


def _scatter_classes(ax: Axes, x: np.ndarray, y: np.ndarray, values: np.ndarray, size: float) -> None:
    from matplotlib import colormaps

    labels = np.array(["" if v is None or v != v else str(v) for v in values], dtype=object)
    classes = sorted(set(labels) - {""}, key=lambda c: (len(c), c) if c.isdigit() else (0, c))
    colours = colormaps[DOMAIN_COLOURS](np.arange(len(classes)) % 20)
    if (labels == "").any():
        ax.scatter(x[labels == ""], y[labels == ""], s=size, color="0.88", linewidths=0, label="no label")
    for name, colour in zip(classes, colours, strict=True):
        ax.scatter(x[labels == name], y[labels == name], s=size, color=colour, linewidths=0, label=name)
    legend = ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([30])


def plot_loss(log_history: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """The training loss over steps, from `trainer.state.log_history`, as an image file."""
    points = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    figure = _figure(6, 3.5)
    ax = figure.subplots()
    ax.plot(*zip(*points, strict=True) if points else ([], []), color="tab:blue")
    ax.set(xlabel="step", ylabel="masked mean squared error", title="Pretraining loss")
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
