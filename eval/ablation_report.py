"""Rows of an ablation -> a table by factor (Markdown, CSV) and a curve for every factor of numbers.

Means are taken over the slides of a set first, then over sets, by the code of domain detection.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_processing.writing import write_whole
from eval.aggregate import METRICS, Mean, distinct, matching, set_mean, slide_mean, smoothing_name
from eval.domain_report import MISSING, PROBE_TITLES, SPLIT_TITLES
from eval.palette import COLOURS
from eval.results import markdown_table

Record = Mapping[str, Any]

LINES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # of smoothings, told apart without colour as well
CSV_HEADER = (
    *("level", "factor", "variant", "base", "max_steps", "num_windows", "num_spots_seen", "set", "slide", "split"),
    *("seen", "shuffled", "smoothing", "probe", "accuracy", "accuracy_sd", "ari", "ari_sd", "macro_f1", "macro_f1_sd"),
    *("ari_less_base", "num_slides"),
)


class Column(NamedTuple):
    """What stands in a column: a split, a probe, the radius of a mean in sites, and whether counts were shuffled."""

    split: str
    probe: str
    smoothing: int
    shuffled: bool

    @property
    def title(self) -> str:
        """E.g. `"spots, k-NN, 3x3 mean"`."""
        return f"{self.split}, {self.title_in_split}"

    @property
    def title_in_split(self) -> str:
        """E.g. `"k-NN, 3x3 mean"`."""
        mean = f", {smoothing_name(self.smoothing)} mean" if self.smoothing else ""
        return f"{PROBE_TITLES.get(self.probe, self.probe)}{mean}{', counts shuffled' if self.shuffled else ''}"

    def of(self, scores: Sequence[Record]) -> list[Record]:
        """What stands in this column."""
        return matching(scores, **self._asdict())


def ablation_table(records: Sequence[Record], planned: Sequence[tuple[str, str]], base_key: str) -> str:
    """Markdown: a table a factor, the adjusted Rand index and its difference to the base.

    Args:
        records: those that are there. planned: (factor, variant) of all rows, in the order of the table.
        base_key: the key of the base, whose rows say so.
    """
    columns = _columns(records)
    header = [column.title for column in columns]
    every = [score for record in records for score in record["scores"]]
    slides = {name: distinct(matching(every, set=name), "slide") for name in distinct(every, "set")}
    told = "; ".join(f"{name}: {', '.join(of_set)}" for name, of_set in slides.items())
    lines = [f"Adjusted Rand index, mean over {len(slides)} set(s) of the means over their slides ({told}).", ""]
    lines.append(
        "In brackets the difference to the base. Every row is one training: rows that vary its seed alone, if any, "
        "tell how much is chance. A mean that a column names is taken of what the row gives."
    )
    by_row = {(record["factor"], record["variant"]): record for record in records}
    base = next((record["scores"] for record in records if record["key"] == base_key), [])
    for factor in dict.fromkeys(factor for factor, _ in planned):
        rows: list[list[str]] = []
        small: dict[str, list[str]] = {}
        for variant in (v for f, v in planned if f == factor):
            record = by_row.get((factor, variant))
            if record is None:
                rows.append([variant, *[MISSING] * (2 + len(columns))])
                continue
            is_base = record["key"] == base_key
            budget = [record["trained"][key] for key in ("num_windows", "num_spots_seen")]
            cells = [_cell(column.of(record["scores"]), [] if is_base else column.of(base)) for column in columns]
            shown = [MISSING if number is None else f"{number:,}" for number in budget]
            rows.append([f"{variant} (base)" if is_base else variant, *shown, *cells])
            if record["too_small"]:
                small.setdefault(", ".join(record["too_small"]), []).append(variant)
        lines += ["", f"## {factor}", "", *markdown_table([factor, "windows trained", "spots seen", *header], rows)]
        for of_rows, variants in small.items():
            lines += ["", f"A window of {', '.join(variants)} is larger than {of_rows}, whose sites stand in it once."]
    return "\n".join(lines) + "\n"


def ablation_csv(records: Sequence[Record], base_key: str) -> str:
    """CSV: for every row, split, smoothing and probe a line for every slide, every set, and all sets.

    The level says what a line is: of a slide (deviation over splits), of a set (over its slides), of all sets (over
    sets).
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_HEADER, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    base = next((_lines(record) for record in records if record["key"] == base_key), iter(()))
    of_base = {_place(line): line["ari"] for line in base}
    for record in records:
        told = {"factor": record["factor"], "variant": record["variant"], "base": record["key"] == base_key}
        for line in _lines(record):
            there = of_base.get(_place(line))
            less_base = {} if there is None else {"ari_less_base": line["ari"] - there}
            writer.writerow({**told, **record["trained"], **line, **less_base})
    return text.getvalue()


def plot_curves(records: Sequence[Record], folder: Path) -> list[Path]:
    """A PNG for every factor whose variants are numbers, at least two: ARI over it, a panel a split, a line a column.

    Points are means over sets of means over slides; bars reach from the lowest slide to the highest, where there are
    several.

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
    splits, probes, radii = (
        list(dict.fromkeys(getattr(column, name) for column in columns)) for name in ("split", "probe", "smoothing")
    )
    figure = Figure(figsize=(1.5 + 3.75 * len(splits), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(points)
    first = next(iter(points.values()))
    for axes, split in zip(figure.subplots(1, len(splits), squeeze=False)[0], splits, strict=True):
        slides: set[tuple[str, str]] = set()
        for column in (column for column in columns if column.split == split):
            found = [column.of(record["scores"]) for record in points.values()]
            slides |= {(score["set"], score["slide"]) for scores in found for score in scores}
            means = np.array([_value(set_mean(scores, "ari")) for scores in found])
            lowest, highest = (
                [pick([score["ari"] for score in scores], default=np.nan) for scores in found] for pick in (min, max)
            )
            style, marker = LINES[radii.index(column.smoothing) % len(LINES)]
            axes.errorbar(
                places,
                means,
                yerr=np.maximum([means - lowest, highest - means], 0) if len(slides) > 1 else None,
                color=COLOURS[probes.index(column.probe) % len(COLOURS)],
                linestyle=style,
                marker=marker,
                markersize=5,
                capsize=2,
                elinewidth=0.7,
                label=column.title_in_split,
            )
        axes.set_title(f"{split}, {len(slides)} slide(s)")
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_xlabel(f"{factor} [{first['unit']}]" if first["unit"] else factor)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("adjusted Rand index")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="probe", loc="outside right upper", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(path, image.getvalue())


def _columns(records: Sequence[Record]) -> list[Column]:
    """The columns of all scores: all of a split and probe beside each other, those of shuffled counts last."""
    found = list(dict.fromkeys(_column(score) for record in records for score in record["scores"]))
    probes = list(dict.fromkeys(column.probe for column in found))
    splits = list(SPLIT_TITLES)
    return sorted(found, key=lambda c: (c.shuffled, splits.index(c.split), probes.index(c.probe), c.smoothing))


def _column(found: Mapping[str, Any]) -> Column:
    return Column(*(found[name] for name in Column._fields))


def _lines(record: Record) -> Iterator[dict[str, Any]]:
    """The lines of a row's scores: slides, then sets, then all."""
    scores = record["scores"]
    for found in scores:
        yield {"level": "slide", **found, "num_slides": 1}
    for level, name in [*(("set", name) for name in distinct(scores, "set")), ("all", "")]:
        of_level = matching(scores, set=name) if level == "set" else scores
        for column in _columns([{"scores": of_level}]):
            means = {
                metric: (slide_mean if level == "set" else set_mean)(column.of(of_level), metric) for metric in METRICS
            }
            values = {metric: mean.value for metric, mean in means.items() if mean is not None}
            values |= {f"{metric}_sd": mean.deviation for metric, mean in means.items() if mean is not None}
            about = {"num_slides": means["ari"].num_slides, "seen": means["ari"].seen}
            yield {"level": level, "set": name, "slide": "", **column._asdict(), **values, **about}


def _place(line: Mapping[str, Any]) -> tuple:
    return tuple(line[name] for name in ("level", "set", "slide", *Column._fields))


def _value(mean: Mean | None) -> float:
    return np.nan if mean is None else mean.value


def _cell(scores: Sequence[Record], base: Sequence[Record]) -> str:
    """A mean over sets, and its difference to the base's, where there is one."""
    mean, there = set_mean(scores, "ari"), set_mean(base, "ari")
    if mean is None:
        return MISSING
    return f"{mean.value:.3f}" if there is None else f"{mean.value:.3f} ({mean.value - there.value:+.3f})"


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
