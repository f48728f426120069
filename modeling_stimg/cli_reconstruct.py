"""`stimg reconstruct`: the expression of a region, predicted from the spots around it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    BatchSizeOption,
    DeviceOption,
    LayerOption,
    ModelOption,
    QuietOption,
    RevisionOption,
    SlideArgument,
)

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

_TABLES = (".tsv", ".tsv.gz")
NUM_MAPS = 6


def reconstruct(
    slide: SlideArgument,
    spots: Annotated[
        str,
        typer.Option(
            help="The region: a column of obs that is True in it, or COLUMN=VALUE, the spots of that value.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            help=".tsv or .tsv.gz: a row a spot, a column a gene. .h5ad: the same as X, with the spots' obs and obsm.",
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    genes: Annotated[
        list[str] | None,
        typer.Option(help="Which genes, e.g. --genes A B C; default: the 512 that vary most.", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Also write maps as PNG, a row a gene: measured, hidden, predicted; of at most 6 genes."),
    ] = None,
    window_size: Annotated[int | None, typer.Option(help="Side of the windows, in sites.", min=1)] = None,
    num_views: Annotated[int, typer.Option(help="Windows that a hidden spot is read in.", min=1)] = 4,
    calibrated: Annotated[bool, typer.Option(help="Correct by what the model is off at visible spots.")] = True,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the gene draws.", min=0)] = 0,
    layer: LayerOption = None,
    revision: RevisionOption = None,
    quiet: QuietOption = False,
) -> None:
    """Predict the expression of a region of SLIDE from the spots around it, as if it had not been measured.

    Values are log1p of counts per the model's target_sum, of every spot of the region and every gene.
    """
    from .cli_slides import hush
    from .embedding import reconstruct_region
    from .hub import find_model
    from .loading import load_decoder, usable
    from .plotting import check_figure_path
    from .processing_stimg import STPatchProcessor
    from .slides import read_slide
    from .writing import check_place, written_whole

    hush(quiet)
    if not output.name.endswith((*_TABLES, ".h5ad")) or output.is_dir():
        raise ValueError(f"--output is {output.name}: expected a file name that ends in .tsv, .tsv.gz or .h5ad.")
    if plot is not None:
        check_figure_path(plot)
    for path in (output, plot):
        if path is not None:
            check_place(path, slide)
    device = usable(device)
    folder = find_model(model, revision).folder
    processor, network = STPatchProcessor.from_pretrained(folder), load_decoder(folder)
    adata = read_slide(slide, layer=layer)
    predicted = reconstruct_region(
        adata,
        network,
        processor,
        region(adata, spots),
        genes=genes or None,
        progress=not quiet,
        window_size=window_size,
        num_views=num_views,
        calibrated=calibrated,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    with written_whole(output) as temporary:
        write_prediction(adata, predicted, region(adata, spots), temporary)
        if plot is not None:
            draw_maps(adata, processor, predicted, plot)
    if not quiet:
        typer.echo(f"{predicted.shape[1]:,} genes of {len(predicted):,} spots are predicted in {output}.", err=True)


def region(adata: "AnnData", spots: str) -> Any:
    """What `reconstruct_region` takes: a column's name, or, of `COLUMN=VALUE`, bool (n_obs,).

    Raises:
        ValueError: no such value.
    """
    column, equals, value = spots.rpartition("=")
    if spots in adata.obs or not equals or column not in adata.obs:
        return spots
    values = adata.obs[column].astype(str).to_numpy()
    if not (values == value).any():
        known = sorted(set(values))
        raise ValueError(f"obs[{column!r}] is {value!r} nowhere: expected one of {known[:12]}.")
    return values == value


def write_prediction(adata: "AnnData", predicted: "pd.DataFrame", spots: Any, output: Path) -> None:
    """The prediction as a table, or as the slide's spots of the region with the prediction as `X`."""
    import numpy as np
    from anndata import AnnData

    from .writing import write_h5ad

    if output.suffix == ".h5ad":
        inside = np.asarray(adata.obs[spots] if isinstance(spots, str) else spots, dtype=bool)
        part = AnnData(predicted.to_numpy(), obs=adata.obs[inside].copy(), var=predicted.columns.to_frame()[[]])
        part.obsm = {name: values[inside] for name, values in adata.obsm.items()}
        write_h5ad(part, output)
        return
    packed = {"method": "gzip", "mtime": 0} if output.suffix == ".gz" else None  # the same bits at any time
    predicted.to_csv(output, sep="\t", float_format="%.5g", index_label="spot", compression=packed)


def draw_maps(adata: "AnnData", processor: Any, predicted: "pd.DataFrame", path: Path) -> None:
    """Maps of the first genes of a prediction as an image file, a row a gene."""
    from .embedding import measured_expression
    from .pl import reconstruction
    from .plotting import new_figure, save_figure

    shown = [str(name) for name in predicted.columns[:NUM_MAPS]]
    measured = measured_expression(adata, processor, shown)
    figure = new_figure(12, 3.8 * len(shown))
    for row, name in zip(figure.subplots(len(shown), 3, squeeze=False), shown, strict=True):
        reconstruction(adata, predicted, name, measured=measured[name].to_numpy(), ax=row)
    save_figure(figure, path)
