"""Figures. Every function takes `ax` where it draws on one, and returns it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .compaction_stimg import is_staggered
from .keys import BIN
from .palette import NO_CLASS, class_colours
from .writing import written_whole

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """A figure that belongs to no global state and needs no display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Figures need Matplotlib: pip install 'stimg[plot]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_figure_path(path: str | os.PathLike) -> None:
    """Raise before the work where a figure could not be saved afterwards: no Matplotlib, or no image's file name."""
    supported = sorted(new_figure(1, 1).canvas.get_supported_filetypes())
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in supported:
        raise ValueError(
            f"{Path(path).name} is no image file name: expected one that ends in .{', .'.join(supported)}."
        )


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure under a temporary name, then rename it."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=150)


def grid_positions(adata: AnnData) -> tuple[np.ndarray, float]:
    """Where to draw the spots: float64 (n_obs, 2), x and y downwards, and the distance between neighbours.

    On a staggered array the spots of a row are two columns apart, and rows sqrt(3) / 2 of that distance. Cells that
    were embedded by bins stand where they are, in the unit of their positions; the distance is their median one.
    """
    from .slides import positions, spot_positions

    if BIN in adata.obs:
        from scipy.spatial import cKDTree

        xy = positions(adata)
        nearest = cKDTree(xy).query(xy, k=2)[0][:, -1] if len(xy) > 1 else np.ones(1)
        return xy, float(np.median(nearest[nearest > 0])) if (nearest > 0).any() else 1.0

    rows, cols = spot_positions(adata)
    if is_staggered(rows, cols) and len(rows) > 1:
        return np.stack([cols, rows * np.sqrt(3)], axis=1).astype(float), 2.0
    return np.stack([cols, rows], axis=1).astype(float), 1.0


def spot_pitch(adata: AnnData) -> float | None:
    """Micrometres between neighbouring spots, where the slide tells what it is; None where it does not.

    100 on staggered arrays with Space Ranger's scale factors in `uns["spatial"]` (Visium), the size of the bins on
    Visium HD.
    """
    libraries = {} if BIN in adata.obs else adata.uns.get("spatial", {})
    for library in libraries.values() if isinstance(libraries, Mapping) else ():
        factors = library.get("scalefactors", {}) if isinstance(library, Mapping) else {}
        if "bin_size_um" in factors:
            return float(factors["bin_size_um"])
        if "spot_diameter_fullres" in factors and grid_positions(adata)[1] == 2:
            return 100.0
    return None


def plot_domains(
    adata: AnnData,
    values: Sequence[Any] | np.ndarray,
    title: str = "",
    ax: Axes | None = None,
    colours: Mapping[str, Any] | None = None,
    pitch: float | None = None,
) -> Axes:
    """A map of the slide, one disc a spot.

    Args:
        adata: a slide from `read_slide`.
        values: (n_obs,), classes (str, categories, integers or None) or numbers (float); or (n_obs, 3), the colours.
        title: above the map. ax: where to draw; None = a figure of its own (`ax.figure`).
        colours: of classes, by name; None = the library's, in the order of their names.
        pitch: micrometres between neighbours, for a scale bar; None = `spot_pitch`, and no bar where it tells none.
    """
    values = np.asarray(values)
    ax, spots = draw_spots(adata, ax)
    if values.dtype.kind == "f" and values.ndim == 1:
        spots.set(array=np.ma.masked_invalid(values), cmap="viridis")
        ax.figure.colorbar(spots, ax=ax, shrink=0.7)
    else:
        spots.set_facecolor(values if values.ndim == 2 else _class_colours(ax, values, colours))
    ax.set_title(title)
    _scale_bar(ax, adata, spot_pitch(adata) if pitch is None else pitch)
    return ax


def draw_spots(adata: AnnData, ax: Axes | None = None) -> tuple[Axes, EllipseCollection]:
    """Axes of a slide's size without ticks, and the discs of its spots on them, whose colours are still to be set."""
    from matplotlib.collections import EllipseCollection

    positions, pitch = grid_positions(adata)
    low, high = positions.min(0) - pitch, positions.max(0) + pitch
    if ax is None:
        ax = new_figure(7, min(max(5.5 * (high - low)[1] / (high - low)[0], 2.5), 12)).subplots()
    # Discs in data units: neighbours touch at any size of the figure.
    size = np.full(len(positions), 0.95 * pitch)
    spots = EllipseCollection(
        size, size, np.zeros(len(positions)), units="xy", offsets=positions, offset_transform=ax.transData
    )
    ax.add_collection(spots)
    ax.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(high[1], low[1]))
    ax.spines[:].set_visible(False)
    return ax, spots


def _scale_bar(ax: Axes, adata: AnnData, pitch: float | None) -> None:
    """A black bar of 1, 2 or 5 times a power of ten micrometres below the map, about a fifth as wide; None: no bar."""
    if pitch is None:
        return
    if not pitch > 0:
        raise ValueError(f"pitch is {pitch}: expected micrometres between neighbouring spots.")
    positions, spacing = grid_positions(adata)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    micrometres = (right - left) * pitch / spacing / 5
    power = 10.0 ** np.floor(np.log10(micrometres))
    length = max(step for step in (1, 2, 5) if step * power <= micrometres or step == 1) * power
    y = positions[:, 1].max() + 1.5 * spacing
    ax.plot([left + spacing, left + spacing + length * spacing / pitch], [y, y], color="black", linewidth=2.5)
    text = f"{length / 1000:g} mm" if length >= 1000 else f"{length:g} µm"
    ax.text(left + spacing, y + 0.7 * spacing, text, va="top", fontsize=8)
    ax.set_ylim(bottom + max(3 * spacing, 0.06 * (bottom - top)), top)


def _class_colours(ax: Axes, values: np.ndarray, colours: Mapping[str, Any] | None) -> np.ndarray:
    """RGBA (n, 4) of classes, with a legend beside the axes; spots without a class are grey."""
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D

    labels = np.array(["" if v is None or v != v else str(v) for v in values], dtype=object)
    classes = sorted(set(labels) - {""}, key=lambda c: (int(c), "") if c.isdigit() else (-1, c))
    colours = dict(zip(classes, class_colours(len(classes)), strict=True)) if colours is None else dict(colours)
    shown = {name: to_rgba(colours[name]) for name in classes}
    if (labels == "").any():
        shown[""] = to_rgba(NO_CLASS)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name or "no label")
        for name, colour in shown.items()
    ]
    columns = -(-len(handles) // 20)  # more in a column would be taller than the map
    ax.legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, ncols=columns)
    return np.array([shown[label] for label in labels])


def plot_maps(adata: AnnData, maps: Mapping[str, Sequence[Any] | np.ndarray], path: str | os.PathLike) -> None:
    """Several maps of one slide side by side, title by title, as an image file."""
    figure = new_figure(4.6 * len(maps), 4.2)
    for ax, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        plot_domains(adata, values, title=title, ax=ax)
    save_figure(figure, path)


def plot_loss(log_history: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """The loss over steps, in training and on held-out slides, from `trainer.state.log_history`, as an image file."""
    curves = {"training": logged(log_history, "loss"), "held-out slides": logged(log_history, "eval_loss")}
    plot_curves(curves, "masked mean squared error", "Pretraining loss", path)


def plot_probe(log_history: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """The probe's adjusted Rand index over steps, from `trainer.state.log_history`, as an image file."""
    curves = {"10-NN": logged(log_history, "probe_ari")}
    plot_curves(curves, "adjusted Rand index", "Probe on frozen embeddings", path)


def logged(log_history: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of every entry of a log history that has the key."""
    return [(entry["step"], entry[key]) for entry in log_history if key in entry]


def plot_curves(
    curves: Mapping[str, Sequence[tuple[int, float]]], ylabel: str, title: str, path: str | os.PathLike
) -> None:
    """Values over steps, one curve a name, as an image file; a curve of a single point is a dot."""
    figure = new_figure(6, 3.5)
    ax = figure.subplots()
    drawn = {name: points for name, points in curves.items() if points}
    for name, points in drawn.items():
        ax.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 30 else "", markersize=3)
    if len(drawn) > 1:
        ax.legend(frameon=False)
    ax.set(xlabel="step", ylabel=ylabel, title=title)
    ax.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)
