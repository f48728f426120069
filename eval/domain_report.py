"""Records of domain detection -> tables in the paper's layout, slide by slide, and as comma-separated values.

Means are taken over the slides of a set first, then over sets.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from eval.aggregate import (
    METRICS,
    PLACE,
    Mean,
    MeanOf,
    Record,
    check_records,
    distinct,
    matching,
    num_slides,
    set_mean,
    slide_mean,
    smoothing_name,
)
from eval.results import markdown_table

PROBE_TITLES = {"knn": "k-NN", "linear": "linear", "mlp": "MLP", "leiden": "Leiden"}
TRAIN_SHARE = 0.2  # of results that do not tell theirs
SPLIT_TITLES = {
    "spots": "trained on {share} of a slide's spots at random",
    "blocks": "trained on {share} of a slide's tiles",
    "slides": "trained on other slides",
    "no labels": "found without labels, as many clusters as domains",
}
MISSING = "–"  # noqa: RUF001 - a dash for "no such measurement"


def results_table(records: Sequence[Record], metadata: Mapping[str, Any] | None = None) -> str:
    """Markdown: means over sets, the paper's layout, then every set.

    Rows and columns stand in the order of their first appearance. A mean over fewer slides than there are says over
    how many.

    Args:
        records: see `eval/aggregate.py`. metadata: of the results; its notes on slides are printed, and
            the share of spots that trained.
    """
    check_records(records)
    metadata = metadata or {}
    share = metadata.get("protocol", {}).get("train_share", TRAIN_SHARE)
    sets = distinct(records, "set")
    about = f"{len(sets)} set(s), {num_slides(records)} slide(s)"
    lines = [
        "# Domain detection",
        "",
        f"Accuracy / adjusted Rand index; without labels the index alone. {about}; "
        "columns: the neighbourhood mean, in sites, that all features are given.",
        "",
        *_by_smoothing(records, set_mean, "mean over sets" if len(sets) > 1 else f"set {sets[0]}", share),
    ]
    if len(sets) > 1:
        lines += _paper_layout(records, sets)
        for name in sets:
            lines += _by_smoothing(matching(records, set=name), slide_mean, f"set {name}", share)
    notes = _notes(metadata)
    return "\n".join([*lines, *(["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else [])])


def slides_table(records: Sequence[Record]) -> str:
    """Markdown: every slide with the deviation over splits."""
    check_records(records)
    lines = ["# Slide by slide", "", "Accuracy ± deviation over splits / adjusted Rand index ± deviation.", ""]
    for name in distinct(records, "set"):
        for slide in distinct(matching(records, set=name), "slide"):
            lines += [f"## {name}: {slide}", ""]
            of_slide = matching(records, set=name, slide=slide)
            for split, probe in _tables(of_slide):
                cells = matching(of_slide, split=split, probe=probe)
                lines += [f"### {_title(split, probe)}", "", *_rows(cells, _slide_cell), ""]
    return "\n".join(lines)


def csv_table(records: Sequence[Record]) -> str:
    """Every mean and every slide as comma-separated values, a metric and its deviation a column.

    The level says what a line is: of a slide (deviation over splits), of a set (over its slides), of all sets (over
    sets).
    """
    check_records(records)
    metrics = [name for metric in METRICS for name in (metric, f"{metric}_sd")]
    header = ["level", *PLACE, *metrics, "num_slides", "seen"]
    rows = []
    for record in records:
        values = {**{key: record[key] for key in PLACE}, **{name: record.get(name) for name in metrics}}
        rows.append({"level": "slide", **values, "num_slides": 1, "seen": record.get("seen", "")})
    groups = dict.fromkeys(tuple(r[key] for key in ("split", "features", "smoothing", "probe")) for r in records)
    places = [dict(zip(("split", "features", "smoothing", "probe"), group, strict=True)) for group in groups]
    for name in [*distinct(records, "set"), None]:
        of_set = records if name is None else matching(records, set=name)
        for place in places:
            means = {m: (set_mean if name is None else slide_mean)(matching(of_set, **place), m) for m in METRICS}
            if means["ari"] is not None:
                row = {"level": "all" if name is None else "set", "set": name or "", "slide": "", **place}
                for metric, mean in means.items():
                    row |= {} if mean is None else {metric: mean.value, f"{metric}_sd": mean.deviation}
                rows.append({**row, "num_slides": means["ari"].num_slides, "seen": means["ari"].seen})
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------- tables


def _tables(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Split and probe of every table, split by split."""
    pairs = dict.fromkeys((record["split"], record["probe"]) for record in records)
    splits = distinct(records, "split")
    order = [*(s for s in SPLIT_TITLES if s in splits), *(s for s in splits if s not in SPLIT_TITLES)]
    return [pair for split in order for pair in pairs if pair[0] == split]


def _title(split: str, probe: str) -> str:
    return f"{split}, {PROBE_TITLES.get(probe, probe)}"


def _by_smoothing(records: Sequence[Record], mean_of: MeanOf, title: str, share: float) -> list[str]:
    counts = {split: num_slides(matching(records, split=split)) for split in distinct(records, "split")}
    lines = [f"## {title[0].upper()}{title[1:]}", ""]
    for split, probe in _tables(records):
        cells = matching(records, split=split, probe=probe)
        about = f"{SPLIT_TITLES.get(split, split).format(share=f'{100 * share:g} %')}; {counts[split]} slide(s)"
        lines += [f"### {_title(split, probe)}", "", f"{about[0].upper()}{about[1:]}.", ""]
        lines += [*_rows(cells, lambda found, n=counts[split]: _mean_cell(found, mean_of, n)), ""]
    return lines


def _rows(records: Sequence[Record], cell: Any) -> list[str]:
    """A row of every features, a column of every smoothing, and what models saw."""
    radii = sorted(distinct(records, "smoothing"))
    rows = []
    for name in distinct(records, "features"):
        of_features = matching(records, features=name)
        mean = set_mean(of_features, "ari")
        cells = [cell(matching(of_features, smoothing=radius)) for radius in radii]
        rows.append([name, *cells, (mean.seen if mean else "") or MISSING])
    return markdown_table(["features", *map(smoothing_name, radii), "seen"], rows)


def _paper_layout(records: Sequence[Record], sets: Sequence[str]) -> list[str]:
    """A row of every features as they are, a column of every set and their mean."""
    lines = ["## By set, features as they are", ""]
    as_they_are = matching(records, smoothing=0)
    for split, probe in _tables(as_they_are):
        cells = matching(as_they_are, split=split, probe=probe)
        counts = {name: num_slides(matching(records, set=name, split=split)) for name in sets}
        rows = []
        for name in distinct(cells, "features"):
            found = matching(cells, features=name)
            by_set = [_mean_cell(matching(found, set=s), slide_mean, counts[s]) for s in sets]
            rows.append([name, *by_set, _mean_cell(found, set_mean, sum(counts.values()))])
        lines += [f"### {_title(split, probe)}", "", *markdown_table(["features", *sets, "mean"], rows), ""]
    return lines


def _mean_cell(records: Sequence[Record], mean_of: MeanOf, num_slides: int) -> str:
    ari, accuracy = mean_of(records, "ari"), mean_of(records, "accuracy")
    if ari is None:
        return MISSING
    cell = _values(accuracy, ari)
    return cell if ari.num_slides == num_slides else f"{cell} ({ari.num_slides} of {num_slides})"


def _values(accuracy: Mean | None, ari: Mean) -> str:
    return f"{ari.value:.3f}" if accuracy is None else f"{accuracy.value:.3f} / {ari.value:.3f}"


def _slide_cell(records: Sequence[Record]) -> str:
    if not records:
        return MISSING
    (record,) = records
    shown = [metric for metric in ("accuracy", "ari") if record.get(metric) is not None]
    deviations = [f" ± {record[f'{m}_sd']:.3f}" if record.get(f"{m}_sd") is not None else "" for m in shown]
    return " / ".join(f"{record[m]:.3f}{d}" for m, d in zip(shown, deviations, strict=True))


def _notes(metadata: Mapping[str, Any]) -> list[str]:
    notes = [note for of_set in metadata.get("sets", {}).values() for note in of_set["notes"]]
    small = metadata.get("smaller_than_a_window", {})
    return notes + [f"{name}: no window fits into {', '.join(slides)}." for name, slides in small.items()]
