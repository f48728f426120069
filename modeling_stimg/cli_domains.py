"""`stimg domains`: domains of slides, without labels."""

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


def domains(
    slides: SlidesArgument,
    output: OutputOption,
    model: ModelOption = None,
    n_domains: Annotated[
        int | None, typer.Option(help="How many; default: as many as Leiden finds.", min=2, show_default=False)
    ] = None,
    method: Annotated[
        str, typer.Option(help="auto (gmm with --n-domains, else leiden), gmm, kmeans, leiden.")
    ] = "auto",
    smoothing: Annotated[
        int, typer.Option(help="Radius in sites of the square whose spots decide with a spot; 0 = none.", min=0)
    ] = 0,
    smoothed: Annotated[str, typer.Option(help="What is smoothed: labels or embedding.")] = "labels",
    resolution: Annotated[float, typer.Option(help="Of Leiden without --n-domains: higher, more domains.")] = 1.0,
    plot: Annotated[
        Path | None, typer.Option(help="Also write a map as PNG; of several slides the folder for them.")
    ] = None,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(help="Seed of gene draws and of clusterings.", min=0)] = 0,
    layer: LayerOption = None,
    slide_key: SlideKeyOption = None,
    bin_size: BinSizeOption = None,
    microns_per_pixel: ScaleOption = None,
    revision: RevisionOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a copy of every SLIDE with its domains in obs["stimg_domain"].

    A slide that stimg embed wrote keeps its embedding, and needs no model; any other is embedded first.
    """
    from .cli_embed import Reading
    from .cli_slides import Job, finished, for_every_slide, has_embedding, hush, plan, this_process
    from .domains import domain_settings, find_domains
    from .keys import DOMAIN, EMBEDDING, OF_DOMAINS, OF_EMBEDDING
    from .loading import load_encoder
    from .parsing import read_h5ad_file
    from .pl import domains as domain_map
    from .plotting import save_figure
    from .provenance import embedding_settings, same_settings
    from .writing import write_h5ad, written_whole

    hush(quiet)
    if plot is not None and slide_key is not None:
        raise ValueError("--plot draws one slide, but --slide-key tells several apart: leave one of them out.")
    jobs = plan(slides, output, plot)
    how = Reading(layer, slide_key, bin_size, microns_per_pixel)
    chosen = {"method": method, "smoothing": smoothing, "seed": seed, "smoothed": smoothed, "resolution": resolution}
    settings = domain_settings(n_domains, **chosen)
    embedded = {job.slide for job in jobs if has_embedding(job.slide, EMBEDDING)}
    processes = this_process(device)
    network = processor = embedding = None
    if len(embedded) < len(jobs):
        network, processor, device = load_encoder(model, revision, processes.device if device is None else device)
        embedding = embedding_settings(network, processor, seed=seed) | how.settings

    def differences(told: Any, made_here: bool) -> list[str]:
        found = same_settings(told.get(OF_DOMAINS, {}).get(DOMAIN, {}), settings)
        if made_here:
            found += same_settings(told.get(OF_EMBEDDING, {}).get(EMBEDDING, {}), embedding)
        return found

    done: set[Path] = set()
    for made_here in (False, True):
        these = [job for job in jobs if (job.slide not in embedded) == made_here]
        done |= finished(these, lambda told, here=made_here: differences(told, here), overwrite)

    def work(job: Job) -> str:
        if job.output in done and (job.plot is None or job.plot.exists()):
            return f"{job.output} is there already."
        progress = not quiet and processes.first
        if job.slide in embedded:
            adata = read_h5ad_file(Path(job.slide))
        else:
            adata = how.read(job.slide)
            how.embed(adata, network, processor, batch_size=batch_size, device=device, seed=seed, progress=progress)
        find_domains(adata, n_domains, **chosen, progress=progress)
        job.output.parent.mkdir(exist_ok=True)
        with written_whole(job.output) as temporary:
            write_h5ad(adata, temporary)
            if job.plot is not None:
                job.plot.parent.mkdir(exist_ok=True)
                save_figure(domain_map(adata, title=f"domains ({settings['method']})").figure, job.plot)
        return f'{len(adata.obs[DOMAIN].cat.categories)} domains are in obs["{DOMAIN}"] of {job.output}.'

    for_every_slide(jobs, work, processes, quiet)
