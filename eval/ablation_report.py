"""Rows of an ablation -> a table by factor (Markdown, CSV) and a curve for every factor of numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_processing.writing import write_whole
from eval.palette import COLOURS
from eval.results import markdown_table

Record = Mapping[str, Any]

PROBE_TITLES = {"knn": "k-NN", "linear": "linear", "mlp": "MLP"}
LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # of smoothings, told apart without colour as well
METRICS = {"accuracy": "accuracy", "ari": "adjusted Rand index"}
MISSING = "–"  # noqa: RUF001 - a dash for "not measured yet"
CSV_HEADER = (
    *("factor", "variant", "base", "max_steps", "num_windows", "num_spots_seen", "slide", "seen", "shuffled"),
    *("smoothing", "probe", "accuracy", "accuracy_sd", "ari", "ari_sd", "macro_f1", "macro_f1_sd"),
)


class Column(NamedTuple):
    """What stands in a column: a probe, the radius of a smoothing in sites, and whether counts were shuffled."""

    probe: str
    smoothing: int
    shuffled: bool

    @property
    def title(self) -> str:
        """E.g. `"k-NN, 3x3 mean"`."""
        side = 2 * self.smoothing + 1
        mean = f", {side}x{side} mean" if self.smoothing else ""
        return f"{PROBE_TITLES.get(self.probe, self.probe)}{mean}{', counts shuffled' if self.shuffled else ''}"


def ablation_table(records: Sequence[Record], planned: Sequence[tuple[str, str]], base_key: str) -> str:
    """Markdown: a table a factor, accuracy / ARI as means over slides.

    Args:
        records: those that are there. planned: (factor, variant) of all rows, in the order of the table.
        base_key: the key of the base, whose rows say so.
    """
    columns = _columns(records)
    header = [column.title for column in columns]
    slides = list(dict.fromkeys(score["slide"] for record in records for score in record["scores"]))
    lines = [f"Accuracy / ARI, mean over {len(slides)} slide(s): {', '.join(slides)}.", ""]
    lines.append("Every row is one training: rows that vary its seed alone, if any, tell how much is chance.")
    by_row = {(record["factor"], record["variant"]): record for record in records}
    for factor in dict.fromkeys(factor for factor, _ in planned):
        rows, notes = [], []
        for variant in (v for f, v in planned if f == factor):
            record = by_row.get((factor, variant))
            if record is None:
                rows.append([variant, *[MISSING] * (2 + len(columns))])
                continue
            name = f"{variant} (base)" if record["key"] == base_key else variant
            budget = [f"{record['trained'][key]:,}" for key in ("num_windows", "num_spots_seen")]
            rows.append([name, *budget, *(_cell(record, column) for column in columns)])
            if record["too_small"]:
                notes += ["", f"{variant}: larger than {', '.join(record['too_small'])}, whose sites stand in it once."]
        lines += ["", f"## {factor}", ""]
        lines += [*markdown_table([factor, "windows trained", "spots seen", *header], rows), *notes]
    return "\n".join(lines) + "\n"


def ablation_csv(records: Sequence[Record], base_key: str) -> str:
    """CSV: a line for every row, slide, smoothing and probe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_HEADER, lineterminator="\n")
    writer.writeheader()
    for record in records:
        told = {"factor": record["factor"], "variant": record["variant"], "base": record["key"] == base_key}
        for found in record["scores"]:
            writer.writerow({**told, **record["trained"], **found})
    return text.getvalue()


def plot_curves(records: Sequence[Record], folder: Path) -> list[Path]:
    """A PNG for every factor whose variants are numbers, at least two: accuracy and ARI over it, a line a column.

    Points are means over slides; bars reach from the lowest slide to the highest, where there are several.

    Returns:
        The files, named after the factors.
    """
    written = []
    for factor in dict.fromkeys(record["factor"] for record in records):
        points = {float(r["variant"]): r for r in records if r["factor"] == factor and _is_number(r["variant"])}
        if len(points) >= 2:
            path = folder / f"{re.sub(r'[^a-z0-9]+', '_', factor.lower()).strip('_')}.png"
            _plot_curve(factor, dict(sorted(points.items())), path)
            written.append(path)
    return written


def _plot_curve(factor: str, points: Mapping[float, Record], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [column for column in _columns(list(points.values())) if not column.shuffled]
    probes = list(dict.fromkeys(column.probe for column in columns))
    radii = list(dict.fromkeys(column.smoothing for column in columns))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(points)
    first = next(iter(points.values()))
    num_slides = len({score["slide"] for score in first["scores"]})
    for axes, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        for column in columns:
            values = [_values(record, column, metric) for record in points.values()]
            means = np.array([np.mean(v) if v else np.nan for v in values])
            reach = [[m - min(v, default=m) for m, v in zip(means, values, strict=True)]]
            reach += [[max(v, default=m) - m for m, v in zip(means, values, strict=True)]]
            style, marker = LINES[radii.index(column.smoothing) % len(LINES)]
            axes.errorbar(
                places,
                means,
                yerr=reach if num_slides > 1 else None,
                color=COLOURS[probes.index(column.probe) % len(COLOURS)],
                linestyle=style,
                marker=marker,
                markersize=5,
                capsize=2,
                elinewidth=0.7,
                label=column.title,
            )
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xlabel(f"{factor} [{first['unit']}]" if first["unit"] else factor)
        axes.set_ylabel(f"{title}, mean over {num_slides} slide(s)")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="probe", loc="outside right upper", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())


def _columns(records: Sequence[Record]) -> list[Column]:
    """The columns of all scores: all of a probe beside each other, those of shuffled counts last."""
    found = list(dict.fromkeys(_column(score) for record in records for score in record["scores"]))
    probes = list(dict.fromkeys(column.probe for column in found))
    return sorted(found, key=lambda column: (column.shuffled, probes.index(column.probe), column.smoothing))


def _column(found: Mapping[str, Any]) -> Column:
    return Column(found["probe"], found["smoothing"], found["shuffled"])


def _values(record: Record, column: Column, metric: str) -> list[float]:
    return [found[metric] for found in record["scores"] if _column(found) == column]


def _cell(record: Record, column: Column) -> str:
    means = [_values(record, column, metric) for metric in METRICS]
    return " / ".join(f"{np.mean(values):.3f}" for values in means) if all(means) else MISSING


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
