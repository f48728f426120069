"""Records of region reconstruction -> table.md in the layout of the paper's grid, and maps of single genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.region_reconstruction import METRICS, Reconstruction
from eval.results import markdown_table
from modeling_stimg.plotting import new_figure, save_figure

Record = Mapping[str, Any]
MISSING = "–"  # noqa: RUF001 - a dash for "no such measurement"
NUM_MAPS = 4


def region_table(records: Sequence[Record], units: str, skipped: Sequence[str]) -> str:
    """Markdown: the mean over all sizes by predictor, the grid of sizes, then slide by slide.

    Args:
        units: of truth and predictions, in words. skipped: sentences about what could not be measured.
    """
    lines = [
        f"Reconstruction of hidden regions, {units}; lower MSE and MAE and higher Pearson are better. Means are taken "
        "over sizes first, then over slides. Pearson: mean over the genes that vary among the hidden spots; a "
        "prediction that does not vary counts as 0.",
        "",
        *_summary(records),
    ]
    squares = [r for r in records if r["mask_size"] is not None]
    if squares:
        lines += [
            "",
            "## Squares of the paper's grid",
            "",
            "Mean over slides; a column of windows, by side of the mask.",
        ]
        lines += ["", *_grid(squares, ("mse", "mae"))]
        lines += ["", *_grid(squares, ("pearson",))]
    for slide in _distinct(records, "slide"):
        lines += ["", f"## {slide}", "", *_summary([r for r in records if r["slide"] == slide])]
    if skipped:
        lines += ["", "## Not measured", "", *(f"- {sentence}" for sentence in skipped)]
    return "\n".join(lines) + "\n"


def _summary(records: Sequence[Record]) -> list[str]:
    rows = []
    for predictor in _distinct(records, "predictor"):
        of_predictor = [r for r in records if r["predictor"] == predictor]
        slides = [[r for r in of_predictor if r["slide"] == s] for s in _distinct(of_predictor, "slide")]
        means = [_mean([_mean([r[metric] for r in rows_of]) for rows_of in slides]) for metric in METRICS]
        genes = _mean([_mean([r["pearson_genes"] for r in rows_of]) for rows_of in slides])
        seen = ", ".join(dict.fromkeys(str(r["seen"]) for r in of_predictor if r.get("seen"))) or MISSING
        rows.append([predictor, *(_number(mean) for mean in means), f"{genes:.0f}", seen])
    return markdown_table(["predictor", "MSE", "MAE", "Pearson", "genes that vary", "seen"], rows)


def _grid(records: Sequence[Record], metrics: Sequence[str]) -> list[str]:
    masks = sorted(set(_distinct(records, "mask_size")))
    titles = {"mse": "MSE", "mae": "MAE", "pearson": "Pearson"}
    header = ["predictor", "window", *(f"{mask}: {titles[metric]}" for mask in masks for metric in metrics)]
    num_slides = len(_distinct(records, "slide"))
    rows = []
    for predictor in _distinct(records, "predictor"):
        for window in sorted(set(_distinct(records, "window_size")), reverse=True):
            row = [predictor, str(window)]
            for mask in masks:
                cell = [
                    r
                    for r in records
                    if (r["predictor"], r["window_size"], r["mask_size"]) == (predictor, window, mask)
                ]
                some = "" if len(cell) in (0, num_slides) else f" ({len(cell)} of {num_slides})"
                row += [_number(_mean([r[metric] for r in cell])) + some for metric in metrics]
            rows.append(row)
    return markdown_table(header, rows)


def _distinct(records: Sequence[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4f}"


def plot_gene_maps(
    positions: np.ndarray,
    hidden: np.ndarray,
    context: np.ndarray,
    reconstruction: Reconstruction,
    predictor: str,
    gene_names: Sequence[str],
    title: str,
    units: str,
    path: Path,
) -> None:
    """Maps of the first genes of a reconstruction as an image file: a row a gene; truth, prediction, error.

    The prediction is drawn where it is one, among the visible spots as they were measured; the edges of its spots are
    black. Colours: viridis for expression, on one scale for both maps of a gene, and purple to orange for errors.

    Args:
        positions: float (spots, 2) of the spots to draw, x and y downwards, in distances between neighbours.
        hidden: bool (spots,). context: float (visible spots, genes), what was measured there.
        gene_names: of all genes of the reconstruction.
    """
    from matplotlib import colormaps
    from matplotlib.collections import EllipseCollection

    shown = range(min(NUM_MAPS, len(gene_names)))
    figure = new_figure(11, 3.1 * len(shown) + 0.6)
    figure.suptitle(title)
    low, high = positions.min(0) - 1, positions.max(0) + 1
    for row, gene in zip(figure.subplots(len(shown), 3, squeeze=False), shown, strict=True):
        truth, predicted = np.zeros((2, len(positions)))
        truth[~hidden] = predicted[~hidden] = context[:, gene]
        truth[hidden] = reconstruction.truth[:, gene]
        predicted[hidden] = reconstruction.predicted[predictor][:, gene]
        error = np.where(hidden, predicted - truth, np.nan)
        bound = np.nanmax(np.abs(error)) or 1.0
        top = max(truth.max(), predicted.max()) or 1.0
        panels = (
            (f"{gene_names[gene]}: measured", truth, "viridis", (0, top), units),
            (f"predicted ({predictor})", predicted, "viridis", (0, top), units),
            ("predicted - measured", error, "PuOr_r", (-bound, bound), f"difference, {units}"),
        )
        for ax, (name, values, colours, limits, label) in zip(row, panels, strict=True):
            size = np.full(len(positions), 0.92)
            spots = EllipseCollection(
                size, size, np.zeros(len(positions)), units="xy", offsets=positions, offset_transform=ax.transData
            )
            cmap = colormaps[colours].with_extremes(bad="0.9")
            spots.set(array=np.ma.masked_invalid(values), cmap=cmap, clim=limits)
            spots.set_edgecolor(np.where(hidden[:, None], (0, 0, 0, 1), (0, 0, 0, 0)))
            spots.set_linewidth(0.5)
            ax.add_collection(spots)
            bar = figure.colorbar(spots, ax=ax, shrink=0.8)
            bar.set_label(label, fontsize=7)
            ax.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(high[1], low[1]))
            ax.set_title(name, fontsize=9)
            ax.spines[:].set_visible(False)
    figure.supxlabel("Spots with a black edge were hidden; grey: seen, so without an error.", fontsize=8)
    save_figure(figure, path)
