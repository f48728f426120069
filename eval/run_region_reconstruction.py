r"""Masked region reconstruction: what does a model say about a hole in a slide, beside means and interpolation?

    python eval/run_region_reconstruction.py --model runs/patch --output_dir runs/regions \
        --slides '$STIMG_DATA/slides/her2st_F2.h5ad' '$STIMG_DATA/slides/her2st_F3.h5ad'

Squares of 4 to 18 sites are hidden in the middle of windows of 20 to 30, the paper's grid; all rows see that window
alone. With --region COLUMN or --polygon, that region of every slide is hidden instead, and all of the slide around it
is seen. Predicted are the genes that vary most over the spots of the slide that are not hidden, in log1p of counts per
the processor's `target_sum`, by the model, by the model before training, and by predictors that cost nothing.

Writes `results.json`, `table.md` and figures into the output folder (`eval/report.py` puts several together). A row
that is in `results.json` already is not computed again, so an interrupted run goes on where it was.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from tqdm.auto import tqdm
from transformers import HfArgumentParser, set_seed

from data_processing.corpus import find_slides, load_pretraining, read_slides
from data_processing.writing import write_whole
from eval.provenance import seen
from eval.region_reconstruction import (
    EvaluatedSlide,
    Reconstruction,
    Region,
    errors,
    fingerprint,
    reconstruct,
    square_regions,
    summarise,
)
from eval.region_report import GENE_MAPS_FILE, gene_maps, plot_gene_maps, plot_regions, region_table
from eval.results import run_metadata, write_results
from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.genes_stimg import SlideGenes
from modeling_stimg.hub import find_model

TRAINED = "stimg"
RANDOM_START, SINGULAR_START = "untrained, random start", "untrained, singular start"


@dataclass
class RegionArguments:
    """What to hide, and how to predict it."""

    model: str = field(
        metadata={"help": "Model folder, as train/run_pretrain.py writes it, or Hub id (ORG/NAME, ORG/NAME@REVISION)."}
    )
    slides: list[str] = field(metadata={"help": "Slides, best unseen ones: files or globs; $VARIABLES are expanded."})
    output_dir: str = field(metadata={"help": "Folder for results.json, table.md and figures; made if missing."})
    mask_sizes: list[int] = field(
        default_factory=lambda: [4, 8, 10, 14, 16, 18], metadata={"help": "Sides of the hidden squares, in sites."}
    )
    window_sizes: list[int] = field(
        default_factory=lambda: [20, 22, 24, 26, 30],
        metadata={"help": "Sides of the square windows around them, in sites: all that is seen."},
    )
    repetitions: int = field(default=20, metadata={"help": "Squares that are drawn for every pair of sizes."})
    region: str | None = field(
        default=None, metadata={"help": "Column of obs with True and False: hide this region in place of squares."}
    )
    polygon: str | None = field(
        default=None,
        metadata={
            "help": "Hide the spots within this polygon in place of squares: 'x,y x,y x,y ...'; see polygon_key."
        },
    )
    polygon_key: str = field(
        default="spatial",
        metadata={"help": "Entry of obsm with the x and y that the polygon is given in; 'array' = column and row."},
    )
    num_genes: int = field(default=512, metadata={"help": "Most variable genes that are predicted."})
    model_window: int | None = field(
        default=None,
        metadata={
            "help": "Side of the windows that the model reads within what is seen; default: the model's own. 0: one "
            "window, as large as all that is seen of a square's surroundings."
        },
    )
    stride: int | None = field(default=None, metadata={"help": "Sites between these windows; default: a quarter."})
    num_views: int = field(default=4, metadata={"help": "Windows that every hidden spot is read in."})
    gene_selection: str | None = field(
        default=None,
        metadata={"help": "Genes that the model sees: weighted, variable, random or slide; default: its own."},
    )
    num_gene_draws: int = field(default=1, metadata={"help": "Gene draws that are averaged."})
    untrained: bool = field(default=True, metadata={"help": "Whether to measure the model before training too."})
    device: str | None = field(default=None, metadata={"help": "Where to run the models, e.g. cuda."})
    seed: int = field(default=0, metadata={"help": "Seed of squares, gene draws and the random start."})

    def check(self) -> None:
        """Raise ValueError where a number is out of its range."""
        for name in ("repetitions", "num_genes", "num_views", "num_gene_draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected an integer from 1.")
        if self.region is not None and self.polygon is not None:
            raise ValueError("Both --region and --polygon are given: pass one of them.")
        if not self.mask_sizes or not self.window_sizes or min(self.mask_sizes + self.window_sizes) < 1:
            raise ValueError(
                f"mask_sizes are {self.mask_sizes} and window_sizes {self.window_sizes}: expected sides from 1."
            )
        if max(self.mask_sizes) >= min(self.window_sizes):
            raise ValueError(
                f"A mask of {max(self.mask_sizes)} sites leaves nothing to see in a window of "
                f"{min(self.window_sizes)}: every mask has to be smaller than every window."
            )

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `read_spots`."""
        names = ("stride", "num_views", "gene_selection", "num_gene_draws", "device", "seed")
        return {name: getattr(self, name) for name in names}


def load_models(arguments: RegionArguments, folder: Path) -> dict[str, STImageMAEForPreTraining]:
    """The models to compare, by row: before training (at the start that it had, where that was kept), and trained."""
    trained = STImageMAEForPreTraining.from_pretrained(folder)
    if not arguments.untrained:
        return {TRAINED: trained}
    start = folder / "untrained"
    told = load_pretraining(start)
    if told is not None and told[1]["singular_start"]:
        return {SINGULAR_START: STImageMAEForPreTraining.from_pretrained(start), TRAINED: trained}
    set_seed(arguments.seed)
    return {RANDOM_START: STImageMAEForPreTraining(trained.config), TRAINED: trained}


def named_region(adata: AnnData, arguments: RegionArguments, slide: EvaluatedSlide) -> Region:
    """The region of a column of `obs` or of a polygon.

    Raises:
        ValueError: no such column or entry, no polygon, or one that holds no spot or every spot.
    """
    name = slide.image.name
    inside = _inside(adata, arguments, name)
    hidden = np.zeros(slide.image.num_spots, dtype=bool)
    hidden[slide.image.spot_of_obs[inside]] = True
    if not hidden.any() or hidden.all():
        raise ValueError(
            f"{name}: the region holds {int(hidden.sum()):,} of {len(hidden):,} spots: expected some, with others "
            "around them."
        )
    return Region(hidden, ~hidden)


def _inside(adata: AnnData, arguments: RegionArguments, name: str) -> np.ndarray:
    """bool (n_obs,): spots of the region."""
    if arguments.region is None:
        return _within(adata, _corners(arguments.polygon), arguments.polygon_key, name)
    if arguments.region not in adata.obs:
        raise ValueError(f"{name}: obs has no column {arguments.region!r}: it has {list(adata.obs.columns)}.")
    inside = adata.obs[arguments.region].to_numpy()
    if inside.dtype != bool:
        raise ValueError(f"{name}: obs[{arguments.region!r}] holds {inside.dtype} values: expected True and False.")
    return inside


def _corners(polygon: str) -> np.ndarray:
    """float64 (corners, 2) of 'x,y x,y ...'."""
    try:
        corners = np.array([[float(number) for number in corner.split(",")] for corner in polygon.split()])
    except ValueError:
        corners = np.zeros(0)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3 or not np.isfinite(corners).all():
        raise ValueError(f"--polygon is {polygon!r}: expected three corners or more, such as '0,0 100,0 100,80'.")
    return corners


def _within(adata: AnnData, corners: np.ndarray, key: str, name: str) -> np.ndarray:
    """bool (n_obs,): spots within a polygon."""
    from matplotlib.path import Path as Polygon

    if key == "array":
        positions = adata.obs[["array_col", "array_row"]].to_numpy(np.float64)
    elif key in adata.obsm:
        positions = np.asarray(adata.obsm[key], np.float64)[:, :2]
    else:
        raise ValueError(
            f"{name}: obsm has no {key!r}: it has {list(adata.obsm)}; 'array' takes column and row of obs."
        )
    return Polygon(corners).contains_points(positions)


@dataclass(frozen=True)
class Row:
    """What one row of results is of: a region of a slide, or squares of one size."""

    slide: str
    region: str
    mask_size: int | None = None
    window_size: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return self.slide, self.region, self.mask_size, self.window_size

    def sizes(self) -> str:
        if self.mask_size:
            return f"{self.mask_size} x {self.mask_size} sites hidden in {self.window_size} x {self.window_size}"
        return self.region


def all_rows(slides: list[str], arguments: RegionArguments) -> list[Row]:
    """Every row of the table, slide by slide."""
    named = arguments.region or arguments.polygon
    if named is not None:
        return [Row(slide, f"column {named}" if arguments.region else f"polygon {named}") for slide in slides]
    return [
        Row(slide, "square", mask, window)
        for slide in slides
        for window in arguments.window_sizes
        for mask in arguments.mask_sizes
    ]


class Evaluation:
    """Slides, models and arguments: computes rows, and draws one."""

    def __init__(self, arguments: RegionArguments, slides: dict[str, AnnData]):
        self.arguments, self.slides = arguments, slides
        self.found = find_model(arguments.model)
        self.processor = STPatchProcessor.from_pretrained(self.found.folder)
        self.models = load_models(arguments, self.found.folder)
        told = load_pretraining(self.found.folder)
        self.corpus, self.pretraining = (None, None) if told is None else told
        # One at a time: a slide's values are the largest thing here.
        self._opened: tuple[str, EvaluatedSlide] | None = None

    def slide(self, name: str) -> EvaluatedSlide:
        if self._opened is None or self._opened[0] != name:
            self._opened = name, EvaluatedSlide.of(self.slides[name], self.processor, name)
        return self._opened[1]

    def regions(self, row: Row) -> list[Region]:
        slide = self.slide(row.slide)
        if row.mask_size is None:
            return [named_region(self.slides[row.slide], self.arguments, slide)]
        sizes = row.mask_size, row.window_size
        return square_regions(slide.image, *sizes, self.arguments.repetitions, self.arguments.seed)

    def reconstruct(self, row: Row, region: Region) -> Reconstruction:
        own = self.arguments.model_window
        if own == 0:
            own = row.window_size
        options = {**self.arguments.reading, "window_size": own}
        return reconstruct(
            self.slide(row.slide), region, self.models, self.processor, self.arguments.num_genes, options
        )

    def records(self, row: Row) -> Iterator[dict[str, Any]]:
        """A record for every predictor, or none where the slide has no such squares."""
        scores: dict[str, list[dict[str, float]]] = {}
        spots = []
        regions = self.regions(row)
        for region in regions:
            found = self.reconstruct(row, region)
            spots.append(int(region.hidden.sum()))
            for name, predicted in found.predicted.items():
                scores.setdefault(name, []).append(errors(found.truth, predicted))
        saw = seen(row.slide, self.slides[row.slide], self.corpus)
        for name, of_predictor in scores.items():
            yield {
                "slide": row.slide,
                "region": row.region,
                "mask_size": row.mask_size,
                "window_size": row.window_size,
                "predictor": name,
                **summarise(of_predictor),
                "repetitions": len(regions),
                "hidden_spots": float(np.mean(spots)),
                "genes": len(found.genes),
                "seen": saw if name.startswith((TRAINED, SINGULAR_START)) else None,
            }

    @property
    def units(self) -> str:
        target = self.processor.target_sum
        return "log1p of counts per " + ("panel" if isinstance(target, str) else f"{target:,.0f}")

    def settings(self) -> dict[str, Any]:
        """All that numbers depend on beside the slides."""
        arguments = self.arguments
        weights = {
            name: fingerprint(*(tensor.float().numpy() for _, tensor in sorted(model.state_dict().items())))
            for name, model in self.models.items()
        }
        names = ("repetitions", "num_genes", "model_window", "polygon_key")
        return {
            "reading": arguments.reading,
            **{name: getattr(arguments, name) for name in names},
            "processor": self.processor.to_dict(),
            "weights": weights,
        }

    def draw(self, row: Row) -> dict[str, Any]:
        """Maps of the first genes of the first region of a row."""
        slide, region = self.slide(row.slide), self.regions(row)[0]
        found = self.reconstruct(row, region)
        drawn = region.hidden | region.visible
        names = self.processor.vocabulary
        return gene_maps(
            slide.positions[drawn],
            region.hidden[drawn],
            slide.values(region.visible, found.genes),
            found,
            TRAINED,
            [names.gene_names[gene] or names.gene_ids[gene] for gene in found.genes],
            f"{row.slide}, {row.sizes()}: the genes that vary most outside the hidden region",
            self.units,
        )


Digests = dict[str, dict[str, str]]


def digests_of(slides: dict[str, AnnData], rows: list[Row], arguments: RegionArguments) -> Digests:
    """Fingerprints of what an earlier run's records may rest on: that nothing outdated enters a table.

    Returns:
        "slides": of counts and spot names; "genes_and_places": of gene names and array positions; "regions": of the
        spots of those that are no squares.
    """
    digests: Digests = {"slides": {}, "genes_and_places": {}, "regions": {}}
    for name, adata in slides.items():
        matrix, genes = adata.X.tocsr(), SlideGenes.of(adata)
        digests["slides"][name] = fingerprint(matrix.data, matrix.indices, matrix.indptr, adata.obs_names.to_numpy(str))
        positions = [adata.obs[column].to_numpy() for column in ("array_row", "array_col")]
        digests["genes_and_places"][name] = fingerprint(np.array(genes.ids), np.array(genes.symbols), *positions)
    for row in rows:
        if row.mask_size is None:
            inside = _inside(slides[row.slide], arguments, row.slide)
            digests["regions"][f"{row.slide}, {row.region}"] = fingerprint(inside)
    return digests


def finished_records(output: Path, settings: dict[str, Any], digests: Digests) -> tuple[list[dict[str, Any]], Digests]:
    """The records of an earlier run with the same settings, and the digests of all slides that they are of.

    Args:
        digests: see `digests_of`.

    Raises:
        ValueError: there are records, but of other settings or of slides that changed since.
    """
    path = output / "results.json"
    if not path.exists():
        return [], digests
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records, metadata = content["records"], content["metadata"]
        known = metadata["settings"]
        digests_known = {kind: metadata.get(kind, {}) for kind in digests}  # earlier versions told the first alone
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of this script ({error}): give another --output_dir.") from error
    wanted = json.loads(json.dumps(settings))
    other = sorted(key for key in {*known, *wanted} if known.get(key) != wanted.get(key))
    if other:
        raise ValueError(f"{path} was made with another {', '.join(other)}: give another --output_dir, or remove it.")
    changed = {
        name: None
        for kind, of_slides in digests.items()
        for name, digest in of_slides.items()
        if digests_known[kind].get(name, digest) != digest
    }
    if changed:
        raise ValueError(
            f"{path} was made with other slides or regions called {'; '.join(sorted(changed))}: give another "
            "--output_dir."
        )
    return records, {kind: digests_known[kind] | of_slides for kind, of_slides in digests.items()}


def not_measured(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """A sentence about every slide that has no room for some squares."""
    return [
        f"{slide}: no window of which half of the sites hold a spot, with {len(of_slide)} pair(s) of sizes: "
        f"{', '.join(f'{row.mask_size} in {row.window_size}' for row in of_slide)}."
        for slide, of_slide in rows.items()
    ]


def write(
    output: Path, done: dict[tuple[Any, ...], list[dict[str, Any]]], metadata: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """Write what is there; its records and its table."""
    records = [record for of_row in done.values() for record in of_row]
    text = region_table(records, metadata["units"], metadata["skipped"])
    write_results(output, records, metadata, text)
    return records, text


def main(argv: list[str] | None = None) -> None:
    (arguments,) = HfArgumentParser(RegionArguments).parse_args_into_dataclasses(argv)
    arguments.check()
    slides = read_slides(find_slides(arguments.slides))
    evaluation = Evaluation(arguments, slides)
    output = Path(arguments.output_dir)
    settings = evaluation.settings()
    rows = all_rows(list(slides), arguments)
    done: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    finished, digests = finished_records(output, settings, digests_of(slides, rows, arguments))
    for record in finished:
        key = record["slide"], record["region"], record["mask_size"], record["window_size"]
        done.setdefault(key, []).append(record)
    metadata = run_metadata(
        arguments.seed,
        **digests,
        settings=settings,
        units=evaluation.units,
        hub=evaluation.found.hub,
        corpus=None if evaluation.corpus is None else [record.name for record in evaluation.corpus],
        pretraining=evaluation.pretraining,
    )
    impossible: dict[str, list[Row]] = {}
    for row in tqdm(rows, desc="regions"):
        if row.key not in done:
            found = list(evaluation.records(row))
            if not found:
                impossible.setdefault(row.slide, []).append(row)
                continue
            done[row.key] = found
        metadata["skipped"] = not_measured(impossible)
        write(output, done, metadata)
    drawn = [row for row in rows if row.key in done]
    if not drawn:
        raise ValueError(f"No slide of {list(slides)} has room for these sizes: give smaller window_sizes.")
    metadata["skipped"] = not_measured(impossible)
    records, text = write(output, done, metadata)
    maps = evaluation.draw(drawn[len(drawn) // 2])
    write_whole(output / GENE_MAPS_FILE, (json.dumps(maps) + "\n").encode())
    plot_gene_maps(maps, output / "maps.png")
    plot_regions(records, evaluation.units, output / "mse.png")
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
