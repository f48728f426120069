"""The `stimg` command."""

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

SlideArgument = Annotated[
    str, typer.Argument(help="A slide: .h5ad, Space Ranger output folder, or legacy ST table.", show_default=False)
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model, in place of @REVISION.", show_default=False)
]


@app.callback()
def _stimg() -> None:
    """Spatial transcriptomics as images: embeddings of spots that know their surroundings."""


@app.command()
def inspect(
    slides: Annotated[
        list[str], typer.Argument(help="Slides: .h5ad, Space Ranger output folders, legacy ST tables.", metavar="SLIDE")
    ],
    model: Annotated[
        str | None, typer.Option(help="Folder, or Hub id (ORG/NAME, ORG/NAME@REVISION): tell how many genes it knows.")
    ] = None,
    genes: Annotated[Path | None, typer.Option(help="TSV with gene_id and gene_name, in place of a model.")] = None,
    compaction: Annotated[str, typer.Option(help="lattice, rank or minmax.")] = "lattice",
    window_size: Annotated[int, typer.Option(help="Side of the windows that are looked at.", min=1)] = 16,
    table: Annotated[Path | None, typer.Option(help="Also write a row a slide to this TSV.")] = None,
    revision: RevisionOption = None,
) -> None:
    """Tell what slides hold and how they look to a model, without changing anything."""
    from dataclasses import asdict

    from tqdm.auto import tqdm

    from .genes_stimg import GeneVocabulary
    from .hub import find_model
    from .inspection import inspect_slide
    from .processing_stimg import STPatchProcessor
    from .slides import read_slide

    if model is None and revision is not None:
        raise ValueError("--revision is given without --model: it tells which state of a Hub model is meant.")
    if model is not None and genes is not None:
        raise ValueError("Both --model and --genes are given: pass one of them.")
    if table is not None and not table.parent.is_dir():
        raise FileNotFoundError(f"The folder of {table} does not exist: make it first.")
    vocabulary = None if genes is None else GeneVocabulary.from_table(genes)
    if model is not None:
        vocabulary = STPatchProcessor.from_pretrained(find_model(model, revision, weights=False).folder).vocabulary
    names = [Path(slide).name.split(".")[0] for slide in slides]
    rows, failures = [], []
    for slide, name in zip(tqdm(slides, desc="read slides", disable=len(slides) == 1), names, strict=True):
        try:
            # Two slides of one name, such as outs/, are told apart by their paths.
            shown = name if names.count(name) == 1 else slide
            rows.append(inspect_slide(read_slide(slide), vocabulary, compaction, window_size, shown))
        except (ValueError, OSError, ImportError) as error:
            message = " ".join(str(error).split())
            failures.append(message if slide in message else f"{slide}: {message}")
    for row in rows:
        if len(slides) > 1:
            typer.echo(row.slide)
        for line, value in row.lines().items():
            typer.echo(f"{line + ':':<17}{value}")
    if table is not None and rows:
        import pandas as pd

        temporary = table.with_name(f"{table.name}.tmp")
        try:
            pd.DataFrame([asdict(row) for row in rows]).to_csv(temporary, sep="\t", index=False, float_format="%.4g")
            temporary.replace(table)
        finally:
            temporary.unlink(missing_ok=True)
    if failures:
        counted = f"{len(failures)} of {len(slides)} slides: " if len(slides) > 1 else ""
        raise ValueError(counted + "; ".join(failures))


@app.command()
def embed(
    slide: SlideArgument,
    output: Annotated[Path, typer.Option(help="The .h5ad to write.", show_default=False)],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a model, or Hub id (ORG/NAME, ORG/NAME@REVISION); default: the one of this checkout.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a map of domains (k-means clusters) as PNG.")] = None,
    num_domains: Annotated[int, typer.Option(help="Domains on the map.", min=2)] = 7,
    readout: Annotated[str | None, typer.Option(help="spot, context or both.")] = None,
    stride: Annotated[int | None, typer.Option(help="Sites between neighbouring windows.")] = None,
    gene_selection: Annotated[str | None, typer.Option(help="weighted, variable, random or slide.")] = None,
    num_gene_draws: Annotated[int | None, typer.Option(help="Gene draws that are averaged.")] = None,
    smoothing: Annotated[
        list[int] | None,
        typer.Option(help="Radius in sites of a final mean; 0 = none. Given several times: means side by side."),
    ] = None,
    num_channels: Annotated[int | None, typer.Option(help="Genes of a window.")] = None,
    centered: Annotated[bool | None, typer.Option(help="Take the mean over the slide off.")] = None,
    projected: Annotated[bool | None, typer.Option(help="Take the model's projection of its outputs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.", min=1)] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the gene draws.", min=0)] = 0,
    revision: RevisionOption = None,
) -> None:
    """Write a copy of SLIDE with an embedding of every spot in obsm["X_stimg"]."""
    import torch

    from .embedding import embed_slide
    from .hub import find_model
    from .keys import EMBEDDING
    from .modeling_stimg import STImageMAEModel
    from .plotting import check_figure_path, plot_domains, save_figure
    from .processing_stimg import STPatchProcessor
    from .slide_image_stimg import usable_device
    from .slides import read_slide

    if output.suffix != ".h5ad" or output.is_dir():
        raise ValueError(f"--output is {output.name}: expected a file name that ends in .h5ad.")
    if plot is not None:
        check_figure_path(plot)
    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"The folder of {path} does not exist: make it first.")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else str(usable_device(device))
    folder = find_model(model, revision).folder
    processor, network = STPatchProcessor.from_pretrained(folder), STImageMAEModel.from_pretrained(folder)
    adata = read_slide(slide)
    if plot is not None and num_domains > adata.n_obs:
        raise ValueError(f"--num-domains is {num_domains}, but the slide has {adata.n_obs} spots.")
    embed_slide(
        adata,
        network,
        processor,
        stride=stride,
        gene_selection=gene_selection,
        num_gene_draws=num_gene_draws,
        readout=readout,
        smoothing=smoothing[0] if smoothing and len(smoothing) == 1 else smoothing,
        num_channels=num_channels,
        centered=centered,
        projected=projected,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    if plot is not None:
        adata.obs["stimg_domain"] = _clusters(adata.obsm[EMBEDDING], num_domains, seed)
    temporary = output.with_name(f"{output.name}.tmp")
    try:
        adata.write_h5ad(temporary, compression="gzip")
        if plot is not None:
            domains = plot_domains(adata, adata.obs["stimg_domain"], title="k-means on the embedding")
            save_figure(domains.figure, plot)
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    typer.echo(f'{adata.n_obs:,} spots are embedded in obsm["{EMBEDDING}"] of {output}.', err=True)


def _clusters(embedding: Any, num_domains: int, seed: int) -> Any:
    """K-means clusters of an embedding as a pandas Categorical of "0", "1", ..."""
    import pandas as pd
    from scipy.cluster.vq import kmeans2

    _, labels = kmeans2(embedding.astype(float), num_domains, minit="++", seed=seed)
    return pd.Categorical([str(label) for label in labels])


def main() -> None:
    """Run the command; bad input ends in one sentence on stderr and exit status 2."""
    warnings.showwarning = lambda message, *_args, **_kwargs: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError) as error:
        # A damaged config says what is wrong in the cause of the error that names its class.
        cause = error.__cause__ if isinstance(error, StrictDataclassError) else error
        print(f"error: {' '.join(str(cause or error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
