"""`stimg embed`: embeddings of slides."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import (
    BatchSizeOption,
    BinSizeOption,
    DeviceOption,
    LayerOption,
    ModelOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RevisionOption,
    ScaleOption,
    SlideKeyOption,
    SlidesArgument,
)


def embed(
    slides: SlidesArgument,
    output: OutputOption,
    model: ModelOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also write a map of domains (k-means) as PNG; of several slides the folder.")
    ] = None,
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
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the gene draws.", min=0)] = 0,
    layer: LayerOption = None,
    slide_key: SlideKeyOption = None,
    bin_size: BinSizeOption = None,
    microns_per_pixel: ScaleOption = None,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a copy of every SLIDE with an embedding of every spot, or cell, in obsm["X_stimg"].

    Outputs that are in the folder already, made with the same model and options, are kept: the same command goes on
    where it was interrupted. Under accelerate launch, processes share the slides.
    """
    from .cli_slides import Job, finished, for_every_slide, hush, plan, this_process
    from .keys import EMBEDDING, OF_EMBEDDING
    from .loading import load_encoder
    from .provenance import embedding_settings, same_settings
    from .writing import write_h5ad, written_whole

    hush(quiet)
    if plot is not None and slide_key is not None:
        raise ValueError("--plot draws one slide, but --slide-key tells several apart: leave one of them out.")
    jobs = plan(slides, output, plot)
    processes = this_process(device)
    network, processor, device = load_encoder(model, revision, processes.device if device is None else device)
    options: dict[str, Any] = {
        "stride": stride,
        "gene_selection": gene_selection,
        "num_gene_draws": num_gene_draws,
        "readout": readout,
        "smoothing": smoothing[0] if smoothing and len(smoothing) == 1 else smoothing,
        "num_channels": num_channels,
        "centered": centered,
        "projected": projected,
    }
    how = Reading(layer, slide_key, bin_size, microns_per_pixel)
    settings = embedding_settings(network, processor, seed=seed, **options) | how.settings

    def differences(told: Any) -> list[str]:
        return same_settings(told.get(OF_EMBEDDING, {}).get(EMBEDDING, {}), settings)

    done = finished(jobs, differences, overwrite)

    def work(job: Job) -> str:
        if job.output in done and (job.plot is None or job.plot.exists()):
            return f"{job.output} is there already."
        adata = how.read(job.slide)
        if plot is not None and num_domains > adata.n_obs:
            raise ValueError(f"--num-domains is {num_domains}, but the slide has {adata.n_obs} spots: expected fewer.")
        progress = not quiet and processes.first
        how.embed(
            adata, network, processor, **options, batch_size=batch_size, device=device, seed=seed, progress=progress
        )
        if job.plot is not None:
            from .domains import find_domains  # scikit-learn, which takes its time, for those who ask for it
            from .pl import domains
            from .plotting import save_figure

            find_domains(adata, num_domains, method="kmeans", seed=seed)
        job.output.parent.mkdir(exist_ok=True)
        with written_whole(job.output) as temporary:
            write_h5ad(adata, temporary)
            if job.plot is not None:
                job.plot.parent.mkdir(exist_ok=True)
                save_figure(domains(adata, title="k-means on the embedding").figure, job.plot)
        return f'{adata.n_obs:,} {how.called} are embedded in obsm["{EMBEDDING}"] of {job.output}.'

    for_every_slide(jobs, work, processes, quiet)


@dataclass(frozen=True)
class Reading:
    """How slides are read before they are embedded: options of `read_slide`."""

    layer: str | None
    slide_key: str | None
    bin_size: float | None
    microns_per_pixel: float | None

    @property
    def settings(self) -> dict[str, str]:
        """As `uns["stimg"]` tells them."""
        from .provenance import reading_settings

        return reading_settings(**asdict(self))

    @property
    def called(self) -> str:
        """What a row of a slide is."""
        return "spots" if self.bin_size is None else "cells"

    def read(self, slide: str) -> Any:
        """The slide, with its counts in `X`; cells that are to be binned keep their own rows.

        Raises:
            ValueError, OSError, ImportError: as `read_slide`.
        """
        from .slides import read_cells, read_slide

        if self.bin_size is not None:
            return read_cells(slide, layer=self.layer)
        return read_slide(slide, layer=self.layer, slide_key=self.slide_key, microns_per_pixel=self.microns_per_pixel)

    def embed(self, adata: Any, network: Any, processor: Any, **options: Any) -> None:
        """`embed_slide` on what `read` gave, and in `uns["stimg"]` how it was read."""
        from .embedding import embed_slide
        from .keys import EMBEDDING, OF_EMBEDDING, tell, told

        embed_slide(
            adata,
            network,
            processor,
            slide_key=self.slide_key,
            bin_size=self.bin_size,
            microns_per_pixel=self.microns_per_pixel,
            **options,
        )
        # The counts are in X by now, wherever the slide had them.
        tell(adata.uns, OF_EMBEDDING, EMBEDDING, told(adata.uns, OF_EMBEDDING)[EMBEDDING] | self.settings)
