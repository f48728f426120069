"""Figures of domain detection: maps of domains, bars, curves over smoothing.

Colours are those of Okabe and Ito, told apart by colour-blind eyes, and never the only thing that tells: maps name
their domains on the tissue, bars carry their values and hatches, curves their names and markers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_processing.writing import write_whole
from eval.aggregate import Record, check_records, distinct, matching, num_slides, set_mean, smoothing_name
from eval.clustering import k_means
from eval.domain_scores import Plan
from eval.features import Method, smoothed
from eval.palette import COLOURS, DARK_YELLOW, MARKERS, YELLOW
from eval.scoring import cluster_scores, named_clusters
from modeling_stimg.plotting import grid_positions, new_figure, save_figure

HATCHES = ("", "//", "..", "xx", "--")
NO_CLASS_COLOUR = "#DDDDDD"
MAPS_FILE = "maps.json"
SMOOTHED_MAP = ("raw", 2)  # the baseline to beat is shown beside the methods as they are
SPLIT_ORDER = ("spots", "blocks", "slides", "no labels")
PROBE_ORDER = ("knn", "linear", "mlp", "k-means", "leiden")  # a colour and a hatch each, the same in all panels
TITLES = {"knn": "k-NN", "linear": "linear", "mlp": "MLP", "k-means": "k-means", "leiden": "Leiden"}


def write_figures(
    plans: Sequence[Plan], methods: Sequence[Method], records: Sequence[Record], output: Path, seed: int
) -> None:
    """`ari.png`, `smoothing.png`, `maps.json` and from it a map of every set's largest slide."""
    plot_bars(records, output / "ari.png")
    plot_smoothing(records, output / "smoothing.png")
    maps = {plan.name: domain_maps(plan, methods, seed) for plan in plans}
    write_whole(output / MAPS_FILE, (json.dumps(maps) + "\n").encode())
    for name, of_slide in maps.items():
        plot_maps_of_slide(of_slide, output / f"maps_{name}.png")


# ---------------------------------------------------------------- maps


def domain_maps(plan: Plan, methods: Sequence[Method], seed: int) -> dict[str, Any]:
    """What the maps of a set's largest slide show: labels, and k-means of every method, named after the labels.

    Returns:
        {"slide", "positions" (n, 2), "pitch", "classes", "maps": {title: (n,) names}}, plain values.
    """
    slide = max((plan.slides[name] for name in plan.within), key=lambda slide: len(slide.codes))
    positions, pitch = grid_positions(slide.adata)
    chosen = [(method, 0) for method in methods if method.smoothed]
    chosen += [(method, SMOOTHED_MAP[1]) for method in methods if method.name == SMOOTHED_MAP[0]]
    maps = {"labels": slide.labels.tolist()}
    labelled = slide.codes >= 0
    for method, radius in chosen:
        features = smoothed(method.within(slide), slide, radius)
        clusters = k_means(features, len(slide.classes), seed)
        ari = cluster_scores(clusters[labelled], slide.codes[labelled])["ari"]
        name = method.name if radius == 0 else f"{method.name}, {smoothing_name(radius)} mean"
        maps[f"{name}\nARI {ari:.2f}"] = named_clusters(clusters, slide.codes, slide.classes).tolist()
    return {
        "slide": slide.name,
        "positions": positions.tolist(),
        "pitch": pitch,
        "classes": list(slide.classes),
        "maps": maps,
    }


def load_maps(path: Path) -> dict[str, dict[str, Any]]:
    """By set, what `domain_maps` gave; nothing where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def plot_maps_of_slide(maps: Mapping[str, Any], path: Path) -> None:
    """Panels of `domain_maps`, labels first; a domain has one colour and shape on all, and its name on the first."""
    from matplotlib.lines import Line2D

    positions = np.array(maps["positions"], dtype=float)
    names = dict.fromkeys([*maps["classes"], *(n for m in maps["maps"].values() for n in m if n is not None)])
    style = {n: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]) for i, n in enumerate(names)}
    num_columns = min(4, len(maps["maps"]))
    num_rows = math.ceil(len(maps["maps"]) / num_columns)
    low, high = positions.min(0) - maps["pitch"], positions.max(0) + maps["pitch"]
    side = 3.0
    height = float(np.clip(side * (high - low)[1] / (high - low)[0], 1.5, 6))
    figure = new_figure(side * num_columns + 2, (height + 0.5) * num_rows)
    panels = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    scale = min(side / (high - low)[0], height / (high - low)[1])
    size = (0.85 * maps["pitch"] * scale * 72 * 0.9) ** 2
    for ax, (title, values) in zip(panels, maps["maps"].items(), strict=False):
        values = np.array(values, dtype=object)
        for name in [None, *names]:
            here = np.array([value == name for value in values])
            colour, marker = style[name] if name is not None else (NO_CLASS_COLOUR, "o")
            ax.scatter(*positions[here].T, s=size, c=colour, marker=marker, linewidths=0)
        title = f"{maps['slide']}: {title}" if title == "labels" else title
        ax.set_title(title, fontsize=8)
        ax.set(aspect="equal", xticks=[], yticks=[], xlim=(low[0], high[0]), ylim=(high[1], low[1]))
        ax.spines[:].set_visible(False)
    for name in maps["classes"]:
        _name_on_tissue(panels[0], positions, np.array([v == name for v in maps["maps"]["labels"]]), name)
    for ax in panels[len(maps["maps"]) :]:
        ax.set_axis_off()
    handles = [Line2D([], [], linestyle="", marker=m, color=c, label=n) for n, (c, m) in style.items()]
    handles.append(Line2D([], [], linestyle="", marker="o", color=NO_CLASS_COLOUR, label="no label"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8, title="domain")
    figure.suptitle("k-means with as many clusters as domains, matched to the labels; a disc is a spot", fontsize=9)
    save_figure(figure, path)


def _name_on_tissue(ax: Any, positions: np.ndarray, here: np.ndarray, name: str) -> None:
    """Write a domain's name at the spot of it that has most of it around."""
    from matplotlib.patheffects import withStroke
    from scipy.spatial import cKDTree

    own = positions[here]
    nearest = cKDTree(own)  # not all distances at once: a class may have a hundred thousand spots
    crowd = nearest.query_ball_point(own, np.nextafter(6, 0), p=np.inf, return_length=True)
    x, y = own[int(crowd.argmax())]
    outline = [withStroke(linewidth=2, foreground="white")]
    ax.text(x, y, name, ha="center", va="center", fontsize=6, path_effects=outline)


# ---------------------------------------------------------------- bars and curves


def plot_bars(records: Sequence[Record], path: Path) -> None:
    """Horizontal bars of the mean ARI over sets of every method as it is: a panel a split, a bar a probe."""
    check_records(records)
    records = matching(records, smoothing=min(distinct(records, "smoothing")))
    features = distinct(records, "features")
    splits = sorted(distinct(records, "split"), key=SPLIT_ORDER.index)
    most = max(len(distinct(matching(records, split=split), "probe")) for split in splits)
    figure = new_figure(2.2 + 3.2 * len(splits), 1.6 + 0.17 * len(features) * (most + 0.8))
    panels = figure.subplots(1, len(splits), squeeze=False, sharey=True)[0]
    for ax, split in zip(panels, splits, strict=True):
        probes = sorted(distinct(matching(records, split=split), "probe"), key=PROBE_ORDER.index)
        height = 0.8 / len(probes)
        for position, probe in enumerate(probes):
            means = [set_mean(matching(records, features=f, probe=probe, split=split), "ari") for f in features]
            values = [float("nan") if mean is None else mean.value for mean in means]
            bars = ax.barh(
                np.arange(len(features)) - 0.4 + height * (position + 0.5),
                values,
                height=height,
                color=COLOURS[PROBE_ORDER.index(probe)],
                hatch=HATCHES[PROBE_ORDER.index(probe)],
                edgecolor="white",
                linewidth=0.3,
                label=TITLES.get(probe, probe),
            )
            ax.bar_label(bars, ["" if math.isnan(v) else f"{v:.2f}" for v in values], padding=2, fontsize=6)
        ax.set_yticks(np.arange(len(features)), features, fontsize=8)
        ax.margins(x=0.15, y=0.01)
        ax.axvline(0, color="0.3", linewidth=0.8)
        ax.set_title(split, fontsize=9)
        ax.set_xlabel("adjusted Rand index", fontsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=len(probes))
    panels[0].invert_yaxis()  # the first row on top, as in the table
    radius = records[0]["smoothing"]
    drawn = "Features as they are" if radius == 0 else f"Features after a {smoothing_name(radius)} mean"
    about = f"{len(distinct(records, 'set'))} set(s), {num_slides(records)} slide(s)"
    figure.suptitle(f"{drawn}: mean over {about}", fontsize=9)
    save_figure(figure, path)


def plot_smoothing(records: Sequence[Record], path: Path) -> None:
    """Mean ARI over sets against the sites of the neighbourhood mean: a panel a split and probe, a curve a method."""
    check_records(records)
    radii = sorted(distinct(records, "smoothing"))
    panels = [
        (split, probe)
        for split in sorted(distinct(records, "split"), key=SPLIT_ORDER.index)
        for probe in sorted(distinct(matching(records, split=split), "probe"), key=PROBE_ORDER.index)
        if len(distinct(matching(records, split=split, probe=probe), "smoothing")) > 1
    ] or [(records[0]["split"], records[0]["probe"])]
    names = [
        name
        for name in distinct(records, "features")
        if len(distinct(matching(records, features=name), "smoothing")) > 1
    ] or distinct(records, "features")
    num_columns = min(3, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = new_figure(4.4 * num_columns, 3.2 * num_rows)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for ax, (split, probe) in zip(axes, panels, strict=False):
        ends = []
        for position, name in enumerate(names):
            found = matching(records, split=split, probe=probe, features=name)
            means = [set_mean(matching(found, smoothing=radius), "ari") for radius in radii]
            points = [(place, mean.value) for place, mean in enumerate(means) if mean is not None]
            if not points:
                continue
            colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
            dashes = ("-", "--", ":")[position // len(COLOURS) % 3]
            ax.plot(
                *zip(*points, strict=True), color=colour, marker=marker, linestyle=dashes, markersize=4, linewidth=1.2
            )
            ends.append((points[-1][1], points[-1][0], name, colour))
        _name_curves(ax, ends)
        ax.set_xticks(range(len(radii)), [smoothing_name(radius) for radius in radii])
        ax.set_xlim(-0.2, len(radii) - 1 + 1.6)
        ax.set_title(f"{split}, {TITLES.get(probe, probe)}", fontsize=9)
        ax.set_xlabel("sites of the neighbourhood mean", fontsize=8)
        ax.set_ylabel("adjusted Rand index", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    save_figure(figure, path)


def _name_curves(ax: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each curve's name at its end, names that would overlap moved apart."""
    if not ends:
        return
    low, high = ax.get_ylim()
    gap = (high - low) / 22
    ends = sorted(ends)
    heights = [value for value, *_ in ends]
    for upper in range(1, len(heights)):
        heights[upper] = max(heights[upper], heights[upper - 1] + gap)
    heights[-1] = min(heights[-1], max(high, low + gap * len(heights)))  # back into the axes, from the top down
    for lower in range(len(heights) - 2, -1, -1):
        heights[lower] = min(heights[lower], heights[lower + 1] - gap)
    for (value, place, name, colour), height in zip(ends, heights, strict=True):
        text = {"fontsize": 6, "color": DARK_YELLOW if colour == YELLOW else colour, "va": "center"}
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.4, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 3}
        ax.annotate(name, (place, value), (place + 0.3, height), annotation_clip=False, arrowprops=line, **text)
