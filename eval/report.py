"""Result records -> results.json, table.md and a figure.

A record is a dict with the keys slide, features, probe (str), accuracy, accuracy_sd, ari, ari_sd, macro_f1,
macro_f1_sd (float) and, where it matters, seen (str): whether the slide was part of the pretraining.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_processing.writing import write_whole
from eval.results import markdown_table, write_results

Record = Mapping[str, Any]

REQUIRED_KEYS = ("slide", "features", "probe", "accuracy", "accuracy_sd", "ari", "ari_sd", "macro_f1", "macro_f1_sd")
PROBE_TITLES = {"knn": "k-NN", "linear": "linear", "mlp": "MLP"}
BAR_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")  # Okabe and Ito: told apart by colour-blind eyes
MISSING = "–"  # noqa: RUF001 - a dash for "no such measurement"


def write_report(records: Sequence[Record], metadata: Mapping[str, Any], output_dir: str | os.PathLike[str]) -> str:
    """Write `results.json` (records and metadata) and `table.md` into `output_dir`, made if it is missing.

    Each file appears whole or not at all.

    Returns
    -------
    The text of `table.md`.
    """
    table = results_table(records)
    write_results(output_dir, records, metadata, table)
    return table


def results_table(records: Sequence[Record]) -> str:
    """Markdown: accuracy / ARI per features and probe, the mean over slides first, then slide by slide.

    Features, probes and slides stand in the order of their first appearance. A mean over only some of the slides says
    over how many.
    """
    _check_records(records)
    features, probes, slides = (_distinct(records, key) for key in ("features", "probe", "slide"))
    header = [PROBE_TITLES.get(probe, probe) for probe in probes]
    rows = []
    for name in features:
        cells = [_mean_cell(_matching(records, features=name, probe=probe), len(slides)) for probe in probes]
        rows.append([name, *cells])
    lines = [f"Accuracy / ARI, mean over {len(slides)} slide(s).", "", *markdown_table(["features", *header], rows)]
    for slide in slides:
        lines += ["", f"## {slide}", "", "Accuracy / ARI ± deviation over splits.", ""]
        on_slide = _matching(records, slide=slide)
        has_seen = any("seen" in record for record in on_slide)
        rows = []
        for name in _distinct(on_slide, "features"):
            of_features = _matching(on_slide, features=name)
            cells = [_slide_cell(_matching(of_features, probe=probe)) for probe in probes]
            seen = ", ".join(dict.fromkeys(str(r["seen"]) for r in of_features if "seen" in r)) or MISSING
            rows.append([name, *cells, seen] if has_seen else [name, *cells])
        lines += markdown_table(["features", *header, "seen"] if has_seen else ["features", *header], rows)
    return "\n".join(lines) + "\n"


def plot_ari(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Save a PNG of horizontal bars: the mean ARI over slides of every features row, one colour per probe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _check_records(records)
    features, probes = _distinct(records, "features"), _distinct(records, "probe")
    bar_height = 0.8 / len(probes)
    figure = Figure(figsize=(8, 1.2 + 0.26 * len(features) * (len(probes) + 0.6)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for position, probe in enumerate(probes):
        means = [_mean(_matching(records, features=name, probe=probe), "ari") for name in features]
        bars = axes.barh(
            np.arange(len(features)) - 0.4 + bar_height * (position + 0.5),
            means,
            height=bar_height,
            color=BAR_COLOURS[position % len(BAR_COLOURS)],
            label=PROBE_TITLES.get(probe, probe),
        )
        axes.bar_label(bars, ["" if np.isnan(mean) else f"{mean:.3f}" for mean in means], padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(features)), features)
    axes.invert_yaxis()  # the first row on top, as in the table
    axes.margins(x=0.12, y=0.01)
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel(f"adjusted Rand index, mean over {len(_distinct(records, 'slide'))} slide(s)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(title="probe", loc="outside right upper", frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_whole(Path(path), image.getvalue())


def _check_records(records: Sequence[Record]) -> None:
    """ValueError unless there are records, complete and each of its own slide, features and probe."""
    if not records:
        raise ValueError("no records: nothing to report")
    met = set()
    for record in records:
        missing = [key for key in REQUIRED_KEYS if key not in record]
        if missing:
            raise ValueError(f"a record lacks {', '.join(missing)}: {dict(record)}")
        place = (record["slide"], record["features"], record["probe"])
        if place in met:
            raise ValueError(f"two records of slide {place[0]!r}, features {place[1]!r}, probe {place[2]!r}: keep one")
        met.add(place)


def _distinct(records: Iterable[Record], key: str) -> list[str]:
    return list(dict.fromkeys(record[key] for record in records))


def _matching(records: Iterable[Record], **values: str) -> list[Record]:
    return [record for record in records if all(record[key] == value for key, value in values.items())]


def _mean(records: Sequence[Record], key: str) -> float:
    return float(np.mean([record[key] for record in records])) if records else float("nan")


def _mean_cell(records: Sequence[Record], num_slides: int) -> str:
    if not records:
        return MISSING
    cell = f"{_mean(records, 'accuracy'):.3f} / {_mean(records, 'ari'):.3f}"
    return cell if len(records) == num_slides else f"{cell} ({len(records)} of {num_slides})"


def _slide_cell(records: Sequence[Record]) -> str:
    if not records:
        return MISSING
    (record,) = records
    return f"{record['accuracy']:.3f} ± {record['accuracy_sd']:.3f} / {record['ari']:.3f} ± {record['ari_sd']:.3f}"
