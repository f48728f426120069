"""Figures of docs/walkthrough.md and docs/honest_evaluation.md: phantom tissue, and nothing of a real slide.

    make demo
    python docs/figures.py --model demo/model

The committed figures are made with the demo's model, which knows phantom tissue. Another model's genes lend their names
to the phantom, so that it can be read, but what it learnt of them is not true of a phantom.
"""

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from anndata import AnnData

from data_processing.phantom import DOMAINS, PhantomTissue, abundant_genes
from data_processing.splits import block_splits, spot_splits
from data_processing.writing import write_whole
from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor, embed_slide, find_domains, pl
from modeling_stimg.clustering import k_means
from modeling_stimg.compaction_stimg import COMPACTIONS, compact
from modeling_stimg.domains import site_neighbours
from modeling_stimg.hub import find_model
from modeling_stimg.masking_stimg import draw_mask
from modeling_stimg.palette import COLOURS, MARKERS, NO_CLASS
from modeling_stimg.plotting import new_figure, plot_domains
from modeling_stimg.reconstruction_stimg import variable_genes
from modeling_stimg.sample_units_stimg import draw_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = ("slide", "compaction", "windows", "masks", "embedding", "fooled")
TISSUE_SEED, SLIDE_SEED = 0, 11  # the demo's tissue, and a slide of it that the demo has not drawn
NUM_GENES = 800
NUM_DRAWS = 200
SMOOTHINGS = (0, 1, 2, 3)
NUM_SPLITS = 5
BLUE, ORANGE, BLACK = COLOURS[0], COLOURS[1], COLOURS[-1]
DOMAIN_COLOURS = COLOURS[: len(DOMAINS)]


def phantom_slide(processor: STPatchProcessor, model: Path, seed: int = SLIDE_SEED) -> AnnData:
    """A slide of 32 x 32 sites whose genes the model knows: the phantom's own where it learnt of them, else renamed."""
    num_genes = min(NUM_GENES, len(processor.vocabulary))
    tissue = PhantomTissue.create(num_genes=num_genes, seed=TISSUE_SEED)
    if (processor.vocabulary.encode(tissue.gene_names) < 0).any():
        tissue = replace(tissue, gene_names=abundant_genes(model, num_genes))
    adata = tissue.slide(seed)
    adata.uns["label_colors"] = list(DOMAIN_COLOURS)
    return adata


def telling_gene(adata: AnnData) -> str:
    """The gene whose means differ most between the domains, in units of its deviation within them."""
    values = np.log1p(adata.X.toarray())
    labels = adata.obs["label"].to_numpy()
    means = np.stack([values[labels == label].mean(0) for label in adata.obs["label"].cat.categories])
    within = np.mean([values[labels == label].var(0) for label in adata.obs["label"].cat.categories], axis=0)
    return str(adata.var_names[np.argmax(means.var(0) / (within + 0.1))])


def grid(shape: tuple[int, int], rows: np.ndarray, cols: np.ndarray, values: np.ndarray) -> np.ndarray:
    """float64 (height, width): a value at every site, NaN where there is none."""
    image = np.full(shape, np.nan)
    image[rows, cols] = values
    return image


def draw_image(ax: "Axes", image: np.ndarray, title: str, colours: str = "viridis", **options: Any) -> Any:
    """One channel, empty sites grey."""
    from matplotlib import colormaps

    drawn = ax.imshow(np.ma.masked_invalid(image), cmap=colormaps[colours].with_extremes(bad=NO_CLASS), **options)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)
    return drawn


def draw_classes(ax: "Axes", codes: np.ndarray, colours: Sequence[str], title: str) -> None:
    """One channel of class numbers, each in its colour."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm(np.arange(len(colours) + 1) - 0.5, len(colours))
    cmap = ListedColormap(list(colours)).with_extremes(bad=NO_CLASS)
    ax.imshow(np.ma.masked_invalid(codes), cmap=cmap, norm=norm)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=9)


def frame(ax: "Axes", top: int, left: int, side: int, colour: str = BLACK) -> None:
    """The outline of a window on an image."""
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((left - 0.5, top - 0.5), side, side, fill=False, edgecolor=colour, linewidth=2))


# ---------------------------------------------------------------- the figures


def slide(adata: AnnData, processor: STPatchProcessor) -> "Figure":
    """Domains, one gene at the spots, and the same gene as a channel of the image."""
    gene = telling_gene(adata)
    image = processor.slide_to_image(adata)
    values = np.zeros(image.num_spots)
    genes, expression, owner = image.expression(np.arange(image.num_spots))
    number = processor.vocabulary.encode([gene])[0]
    values[owner[genes == number]] = expression[genes == number]
    figure = new_figure(11, 3.4)
    axes = figure.subplots(1, 3, width_ratios=[1.2, 1.1, 1])
    pl.domains(adata, "label", ax=axes[0], title="the tissue: domains,\nwhich nobody tells the model")
    pl.gene(adata, gene, ax=axes[1], title=f"what is measured: counts at spots,\nhere of {gene}")
    channel = grid((image.height, image.width), image.rows, image.cols, values)
    draw_image(axes[2], channel, f"the image: {image.height} x {image.width} sites,\none of {image.num_genes} channels")
    for ax in axes[:2]:
        ax.title.set_fontsize(9)
    return figure


def compaction(side: int = 16) -> "Figure":
    """A whole Visium array under the three rules, and what a window of each holds."""
    tissue = PhantomTissue.create(num_genes=60, seed=TISSUE_SEED)
    adata = tissue.slide(SLIDE_SEED, "visium", height=78, width=64, median_counts=20)
    codes = adata.obs["label"].cat.codes.to_numpy()
    array_row, array_col = adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()
    figure = new_figure(9, 6)
    axes = figure.subplots(2, 3, height_ratios=[1.3, 1])
    for (above, below), rule in zip(axes.T, COMPACTIONS, strict=True):
        rows, cols = compact(array_row, array_col, rule)
        image = grid((rows.max() + 1, cols.max() + 1), rows, cols, codes)
        top, left = int(0.4 * image.shape[0]), int(0.4 * image.shape[1])
        window = image[top : top + side, left : left + side]
        name = f'"{rule}": {image.shape[0]} x {image.shape[1]} sites,\n{np.isfinite(image).mean():.0%} hold a spot'
        draw_classes(above, image, DOMAIN_COLOURS, name)
        frame(above, top, left, side)
        draw_classes(below, window, DOMAIN_COLOURS, f"a window of {side} x {side}: {np.isfinite(window).sum()} spots")
    return figure


def windows(adata: AnnData, processor: STPatchProcessor) -> "Figure":
    """Windows that were drawn, how often a gene is drawn for one of them, and three of its channels."""
    image = processor.slide_to_image(adata)
    side = processor.window_size
    corners = draw_samples(image, "patch", side, processor.min_observed, 0, range(5))
    figure = new_figure(11, 3.4)
    axes = figure.subplot_mosaic([["slide", "draws", "a", "b", "c"]], width_ratios=[1.3, 1.3, 1, 1, 1])
    codes = adata.obs["label"].cat.codes.to_numpy()[image.obs_index]
    labels = grid((image.height, image.width), image.rows, image.cols, codes)
    draw_classes(axes["slide"], labels, DOMAIN_COLOURS, f"five windows of {side} x {side}")
    for top, left in corners:
        frame(axes["slide"], top, left, side)

    num_channels = min(64, processor.num_channels)
    options = {"windows": [corners[0]] * NUM_DRAWS, "num_channels": num_channels, "return_tensors": "np"}
    drawn = processor(image, **options)["gene_ids"]
    times = np.bincount(drawn.ravel(), minlength=len(processor.vocabulary))[image.measured] / NUM_DRAWS
    one = processor(image, windows=[corners[0]], genes=drawn[0], return_tensors="np")
    of_gene = image.part(np.isin(np.arange(image.num_spots), one["spot_index"])).gene_variances
    axes["draws"].scatter(of_gene[image.measured], times, s=6, color=BLUE)
    axes["draws"].set(xlabel="variance of the gene in the window", ylabel=f"share of {NUM_DRAWS} draws")
    axes["draws"].set_title(f"{num_channels} of {image.num_genes} genes a draw", fontsize=9)
    axes["draws"].spines[["top", "right"]].set_visible(False)
    values = np.where(one["pixel_mask"], one["pixel_values"][0], np.nan)
    for name, channel in zip("abc", np.argsort(-of_gene[drawn[0]], kind="stable"), strict=False):
        draw_image(axes[name], values[channel], processor.vocabulary.decode([int(drawn[0, channel])])[0])
    return figure


def masks(adata: AnnData, processor: STPatchProcessor, model: STImageMAEForPreTraining) -> "Figure":
    """What the three masks hide of a channel, what the model sees of it, and what it predicts."""
    image = processor.slide_to_image(adata)
    batch = processor(image, num_windows=1, seed=2, return_tensors="pt")
    observed = batch["pixel_mask"][0].numpy()
    number = int(processor.vocabulary.encode([telling_gene(adata)])[0])
    of_batch = {key: value for key, value in batch.items() if key != "spot_index"}
    at = np.flatnonzero(batch["gene_ids"][0].numpy() == number)
    channel = int(at[0]) if at.size else 0
    number = int(batch["gene_ids"][0, channel])
    gene = processor.vocabulary.decode([number])[0]
    noise = torch.from_numpy(np.random.default_rng(3).random(batch["pixel_values"].shape, dtype=np.float32))
    ratio = model.config.mask_ratio
    figure = new_figure(9, 6.2)
    axes = figure.subplots(2, 3)
    for ax, unit in zip(axes[0], ("entry", "site", "mixed"), strict=True):
        mask = draw_mask(noise, batch["channel_mask"], batch["pixel_mask"], ratio, unit)[0].numpy()
        whole = mask[batch["channel_mask"][0].numpy()].all(0)
        codes = np.where(whole, 2.0, np.where(mask[channel], 1.0, 0.0))
        title = f'"{unit}": {mask[:, observed].mean():.0%} of the entries hidden'
        draw_classes(ax, np.where(observed, codes, np.nan), (BLUE, ORANGE, BLACK), title)
    _legend(axes[0, 0], {"seen": BLUE, f"{gene} hidden here": ORANGE, "whole site hidden": BLACK, "no spot": NO_CLASS})
    unit = model.config.mask_unit
    with torch.no_grad():
        outputs = model(**of_batch, noise=noise)
    mask = outputs.mask[0].numpy()
    measured, predicted = batch["pixel_values"][0].numpy(), outputs.reconstruction[0].numpy()
    by_domain = domain_means(adata, processor, batch["gene_ids"][0].numpy(), batch["spot_index"][0].numpy())
    fit, best = (np.corrcoef(measured[mask], values[mask])[0, 1] for values in (predicted, by_domain))
    shown = {
        f"{gene}: measured": measured[channel],
        f'what the model sees ("{unit}")': np.where(mask[channel], np.nan, measured[channel]),
        f"predicted: r = {fit:.2f} over all hidden entries\n(means of the true domains: {best:.2f})": predicted[
            channel
        ],
    }
    limits = {"vmin": measured[channel][observed].min(), "vmax": measured[channel][observed].max()}
    for ax, (title, values) in zip(axes[1], shown.items(), strict=True):
        drawn = draw_image(ax, np.where(observed, values, np.nan), title, **limits)
    figure.colorbar(drawn, ax=axes[1], shrink=0.8, label=processor.normalization)
    return figure


def domain_means(adata: AnnData, processor: STPatchProcessor, genes: np.ndarray, spots: np.ndarray) -> np.ndarray:
    """float64 (C, S, S): what one would predict who knows every spot's domain, the genes' means over it.

    Args:
        genes: int64 (C,), vocabulary numbers. spots: int64 (S, S), spots of the slide's image, -1 = empty.
    """
    image = processor.slide_to_image(adata)
    known = genes[genes < image.pad_id]
    whole = processor(
        image, windows=[(0, 0)], window_size=max(image.height, image.width), genes=known, return_tensors="np"
    )
    values = whole["pixel_values"][0][:, image.rows, image.cols]  # (C, num_spots)
    domains = adata.obs["label"].cat.codes.to_numpy()[image.obs_index]
    means = np.zeros((len(genes), domains.max() + 1))
    for domain in np.unique(domains):
        means[: len(known), domain] = values[: len(known), domains == domain].mean(1)
    return means[:, domains[spots]]


def _legend(ax: "Axes", colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=7, ncols=2, frameon=False)


def embedding(adata: AnnData, processor: STPatchProcessor, model: STImageMAEForPreTraining) -> "Figure":
    """Labels, and k-means on raw expression and on the embedding, read in several ways."""
    from sklearn.metrics import adjusted_rand_score

    truth = adata.obs["label"].cat.codes.to_numpy()
    number = truth.max() + 1
    ways: dict[str, dict[str, Any]] = {
        "spot, no mean": {"readout": "spot", "smoothing": 0},
        "spot, mean over 3 x 3": {"readout": "spot", "smoothing": 1},
        "spot, mean over 9 x 9": {"readout": "spot", "smoothing": 4},
    }
    if model.config.mask_unit != "site":
        ways["context: the spot is hidden"] = {"readout": "context", "smoothing": 0}
    found = {"raw expression": k_means(raw_expression(adata, processor)[0], number, 0)}
    for way, options in ways.items():
        embed_slide(adata, model, processor, **options, key_added="way", progress=False)
        find_domains(adata, int(number), key="way", method="kmeans", key_added="way")
        found[way] = adata.obs["way"].cat.codes.to_numpy()
    names = adata.obs["label"].cat.categories
    colours = dict(zip(names, DOMAIN_COLOURS, strict=True))
    figure = new_figure(9.5, 6.4)
    axes = figure.subplots(2, 3).ravel()
    for ax in axes[len(found) + 1 :]:
        ax.set_visible(False)
    plot_domains(adata, adata.obs["label"].astype(str).to_numpy(), "labels", axes[0], colours)
    for ax, (way, clusters) in zip(axes[1:], found.items(), strict=False):
        title = f"{way}\nARI {adjusted_rand_score(truth, clusters):.2f}"
        plot_domains(adata, names[matched(clusters, truth)].to_numpy(), title, ax, colours)
        ax.get_legend().remove()
    axes[0].legend(handles=axes[0].get_legend().legend_handles, loc="lower left", fontsize=7, framealpha=1)
    for ax in axes:
        ax.title.set_fontsize(9)
    return figure


def matched(clusters: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Clusters numbered as the classes that they share most spots with, one to one."""
    from scipy.optimize import linear_sum_assignment

    shared = np.zeros((clusters.max() + 1, truth.max() + 1), dtype=np.int64)
    np.add.at(shared, (clusters, truth), 1)
    return linear_sum_assignment(shared, maximize=True)[1][clusters]


def raw_expression(adata: AnnData, processor: STPatchProcessor) -> tuple[np.ndarray, Any]:
    """float64 (n_obs, 512): log1p values of the slide's most variable genes, and the slide's image."""
    image = processor.slide_to_image(adata)
    chosen = variable_genes(image)
    dense = np.zeros((image.num_spots, image.pad_id))
    genes, values, owner = image.expression(np.arange(image.num_spots))
    dense[owner, genes] = values
    return dense[image.spot_of_obs][:, chosen], image


def fooled(adata: AnnData, processor: STPatchProcessor) -> "Figure":
    """How high features without biology score: a 10-NN probe over the neighbourhood mean, under two splits."""
    from sklearn.metrics import adjusted_rand_score
    from sklearn.neighbors import KNeighborsClassifier

    expression, image = raw_expression(adata, processor)
    rows, cols = image.rows[image.spot_of_obs], image.cols[image.spot_of_obs]
    shuffled = expression[np.random.default_rng(0).permutation(len(expression))]
    features = {
        "raw expression": expression,
        "raw expression on the wrong spots": shuffled,
        "coordinates alone": np.stack([rows, cols], axis=1).astype(float),
    }
    names = adata.obs["label"].astype(str).to_numpy()
    splits = {
        "20 % of the spots, at random": spot_splits(names, NUM_SPLITS),
        "20 % of the tiles of 6 x 6 sites": block_splits(names, rows, cols, NUM_SPLITS),
    }
    figure = new_figure(9, 3.6)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, (title, pairs) in zip(axes, splits.items(), strict=True):
        for number, (name, values) in enumerate(features.items()):
            curve = []
            for radius in SMOOTHINGS:
                squares = site_neighbours(adata, radius)
                means = np.asarray(squares @ values) / np.asarray(squares.sum(axis=1))
                scores = []
                for train, test in pairs:
                    probe = KNeighborsClassifier(10).fit(means[train], names[train])
                    scores.append(adjusted_rand_score(names[test], probe.predict(means[test])))
                curve.append(np.mean(scores))
            ax.plot(SMOOTHINGS, curve, color=COLOURS[number], marker=MARKERS[number], label=name)
        ax.set(xlabel="neighbourhood mean", title=f"trained on {title}")
        ax.set_xticks(SMOOTHINGS, ["none", *(f"{2 * r + 1} x {2 * r + 1}" for r in SMOOTHINGS[1:])])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("adjusted Rand index of a 10-NN probe")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


# ---------------------------------------------------------------- the command


def save_small(figure: "Figure", path: Path) -> None:
    """A PNG of at most 128 colours, whole or not at all; the same bits at any time."""
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, dpi=100, metadata={"Software": None})
    few = Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small = BytesIO()
    few.save(small, "PNG", optimize=True)
    write_whole(path, small.getvalue())


def main(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub id of a model; default: the one of this checkout.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path(__file__).parent / "images",
    only: Annotated[list[str] | None, typer.Option(help=f"Only these, each with --only: {', '.join(NAMES)}.")] = None,
) -> None:
    """Write walkthrough_slide.png and the others."""
    unknown = sorted(set(only or ()) - set(NAMES))
    if unknown:
        raise typer.BadParameter(f"there are no figures {unknown}: expected any of {', '.join(NAMES)}.")
    folder = find_model(model).folder
    processor = STPatchProcessor.from_pretrained(folder)
    network = STImageMAEForPreTraining.from_pretrained(folder)
    adata = phantom_slide(processor, folder)
    drawings = {
        "slide": lambda: slide(adata, processor),
        "compaction": compaction,
        "windows": lambda: windows(adata, processor),
        "masks": lambda: masks(adata, processor, network),
        "embedding": lambda: embedding(adata, processor, network),
        "fooled": lambda: fooled(adata, processor),
    }
    output.mkdir(parents=True, exist_ok=True)
    for name in only or NAMES:
        path = output / f"walkthrough_{name}.png"
        save_small(drawings[name](), path)
        typer.echo(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
