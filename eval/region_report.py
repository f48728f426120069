"""Records of region reconstruction -> tables in the layout of the paper's grid, curves, and maps of single genes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.palette import LINE_COLOURS, MARKERS
from eval.region_reconstruction import METRICS, Reconstruction
from eval.results import markdown_table
from modeling_stimg.plotting import new_figure, save_figure

Record = Mapping[str, Any]
MISSING = "–"  # noqa: RUF001 - a dash for "no such measurement"
NUM_MAPS = 4
PLACE = ("slide", "region", "mask_size", "window_size", "predictor")
GENE_MAPS_FILE = "gene_maps.json"
OFF_SCALE = "zeros"  # an error several times that of all others, which would flatten their curves


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
        *region_summary(records),
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
        lines += ["", f"## {slide}", "", *region_summary([r for r in records if r["slide"] == slide])]
    if skipped:
        lines += ["", "## Not measured", "", *(f"- {sentence}" for sentence in skipped)]
    return "\n".join(lines) + "\n"


def region_summary(records: Sequence[Record]) -> list[str]:
    """Lines of a Markdown table: the mean over all sizes, then over slides, by predictor."""
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


def region_csv(records: Sequence[Record]) -> str:
    """Comma-separated values: a line for every predictor, slide and size, each metric with its deviation."""
    metrics = [name for metric in METRICS for name in (metric, f"{metric}_sd")]
    header = [*PLACE, *metrics, "pearson_genes", "repetitions", "hidden_spots", "genes", "seen"]
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: record.get(name) for name in header} for record in records)
    return text.getvalue()


def plot_regions(records: Sequence[Record], units: str, path: Path) -> bool:
    """MSE over the side of the window, a panel a side of the mask, a curve a predictor; means over slides.

    The curve of `"zeros"` is left out. Of the slides those count that were measured in most windows, all in the same
    ones: a slide that comes in for some windows alone would bend the curves.

    Returns:
        whether there is something to draw: squares in windows of two sizes or more.
    """
    squares = [r for r in records if r["mask_size"] is not None and r["predictor"] != OFF_SCALE]
    masks, windows = (sorted(set(_distinct(squares, key))) for key in ("mask_size", "window_size"))
    if len(windows) < 2:
        return False
    num_columns = min(3, len(masks))
    num_rows = math.ceil(len(masks) / num_columns)
    figure = new_figure(3.6 * num_columns + 2.4, 3 * num_rows + 0.4)
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=True).ravel()
    for ax, mask in zip(panels, masks, strict=False):
        of_slide = {
            slide: frozenset(r["window_size"] for r in squares if (r["slide"], r["mask_size"]) == (slide, mask))
            for slide in _distinct(squares, "slide")
        }
        most = max(of_slide.values(), key=len)
        slides = [slide for slide, found in of_slide.items() if found == most]
        for number, predictor in enumerate(_distinct(squares, "predictor")):
            found = {
                window: _mean(
                    [
                        r["mse"]
                        for r in squares
                        if (r["predictor"], r["mask_size"], r["window_size"]) == (predictor, mask, window)
                        and r["slide"] in slides
                    ]
                )
                for window in windows
            }
            points = [(window, value) for window, value in found.items() if value is not None]
            if points:
                colour, marker = LINE_COLOURS[number % len(LINE_COLOURS)], MARKERS[number % len(MARKERS)]
                # Rows of a model are drawn full, simple predictors dashed.
                style = "-" if any(r.get("seen") for r in squares if r["predictor"] == predictor) else "--"
                ax.plot(*zip(*points, strict=True), style, color=colour, marker=marker, markersize=5, label=predictor)
        ax.set_title(f"mask of {mask} x {mask} sites, {len(slides)} slide(s)", fontsize=9)
        ax.set_xticks(windows)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels[len(masks) :]:
        ax.set_axis_off()
    labels = {label: handle for ax in panels for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels, loc="outside right upper", frameon=False, fontsize=8, title="predictor")
    figure.supxlabel("side of the window that is seen [sites]", fontsize=9)
    figure.supylabel(f"mean squared error [({units})²]", fontsize=9)
    save_figure(figure, path)
    return True


def gene_maps(
    positions: np.ndarray,
    hidden: np.ndarray,
    context: np.ndarray,
    reconstruction: Reconstruction,
    predictor: str,
    gene_names: Sequence[str],
    title: str,
    units: str,
) -> dict[str, Any]:
    """What `plot_gene_maps` draws of the first genes of a reconstruction: plain values, for JSON.

    Args:
        positions: float (spots, 2) of the spots to draw, x and y downwards, in distances between neighbours.
        hidden: bool (spots,). context: float (visible spots, genes), what was measured there.
        predictor: whose predictions are shown. gene_names: of all genes of the reconstruction.
    """
    genes = range(min(NUM_MAPS, len(gene_names)))
    measured, predicted = np.zeros((2, len(genes), len(positions)))
    for gene in genes:
        measured[gene][~hidden] = predicted[gene][~hidden] = context[:, gene]
        measured[gene][hidden] = reconstruction.truth[:, gene]
        predicted[gene][hidden] = reconstruction.predicted[predictor][:, gene]
    return {
        "title": title,
        "units": units,
        "predictor": predictor,
        "positions": positions.tolist(),
        "hidden": hidden.tolist(),
        "genes": list(gene_names[: len(genes)]),
        "measured": measured.tolist(),
        "predicted": predicted.tolist(),
    }


def plot_gene_maps(maps: Mapping[str, Any], path: Path) -> None:
    """Maps of `gene_maps` as an image file: a row a gene; truth, prediction, error.

    The prediction is drawn where it is one, among the visible spots as they were measured; the edges of its spots are
    black. Colours: viridis for expression, on one scale for both maps of a gene, and purple to orange for errors.
    """
    from matplotlib import colormaps
    from matplotlib.collections import EllipseCollection

    positions, hidden, units = np.array(maps["positions"]), np.array(maps["hidden"]), maps["units"]
    num_genes = len(maps["genes"])
    figure = new_figure(11, 3.1 * num_genes + 0.6)
    figure.suptitle(maps["title"])
    low, high = positions.min(0) - 1, positions.max(0) + 1
    rows = zip(
        figure.subplots(num_genes, 3, squeeze=False),
        maps["genes"],
        np.array(maps["measured"]),
        np.array(maps["predicted"]),
        strict=True,
    )
    for row, name, measured, predicted in rows:
        error = np.where(hidden, predicted - measured, np.nan)
        bound = np.nanmax(np.abs(error)) or 1.0
        top = max(measured.max(), predicted.max()) or 1.0
        panels = (
            (f"{name}: measured", measured, "viridis", (0, top), units),
            (f"predicted ({maps['predictor']})", predicted, "viridis", (0, top), units),
            ("predicted - measured", error, "PuOr_r", (-bound, bound), f"difference, {units}"),
        )
        for ax, (title, values, colours, limits, label) in zip(row, panels, strict=True):
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
            ax.set_title(title, fontsize=9)
            ax.spines[:].set_visible(False)
    figure.supxlabel("Spots with a black edge were hidden; grey: seen, so without an error.", fontsize=8)
    save_figure(figure, path)
