"""`stimg inspect`: what slides hold."""

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    BinSizeOption,
    LayerOption,
    QuietOption,
    RevisionOption,
    ScaleOption,
    SlideKeyOption,
    SlidesArgument,
)


def inspect(
    slides: SlidesArgument,
    model: Annotated[
        str | None, typer.Option(help="Folder, or Hub id (ORG/NAME, ORG/NAME@REVISION): tell how many genes it knows.")
    ] = None,
    genes: Annotated[Path | None, typer.Option(help="TSV with gene_id and gene_name, in place of a model.")] = None,
    compaction: Annotated[str, typer.Option(help="lattice, rank or minmax.")] = "lattice",
    window_size: Annotated[int, typer.Option(help="Side of the windows that are looked at.", min=1)] = 16,
    table: Annotated[Path | None, typer.Option(help="Also write a row a slide to this TSV.")] = None,
    layer: LayerOption = None,
    slide_key: SlideKeyOption = None,
    bin_size: BinSizeOption = None,
    microns_per_pixel: ScaleOption = None,
    revision: RevisionOption = None,
    quiet: QuietOption = False,
) -> None:
    """Tell what slides hold and how they look to a model, without changing anything."""
    from dataclasses import asdict

    from tqdm.auto import tqdm

    from .cli_slides import TOLD, sentence
    from .genes_stimg import GeneVocabulary
    from .hub import find_model
    from .inspection import inspect_slide
    from .processing_stimg import STPatchProcessor
    from .slides import read_slide, slide_rows
    from .writing import check_place, written_whole

    if model is None and revision is not None:
        raise ValueError("--revision is given without --model: it tells which state of a Hub model is meant.")
    if model is not None and genes is not None:
        raise ValueError("Both --model and --genes are given: pass one of them.")
    if table is not None:
        if table.is_dir():
            raise ValueError(f"--table is {table}, a folder: expected a file name, such as {table / 'slides.tsv'}.")
        check_place(table, *slides, *([] if genes is None else [genes]))
    vocabulary = None if genes is None else GeneVocabulary.from_table(genes)
    if model is not None:
        vocabulary = STPatchProcessor.from_pretrained(find_model(model, revision, weights=False).folder).vocabulary
    names = [Path(slide).name.split(".")[0] for slide in slides]
    rows, failures = [], []
    for slide, name in zip(tqdm(slides, desc="read slides", disable=quiet or len(slides) == 1), names, strict=True):
        try:
            # Two slides of one name, such as outs/, are told apart by their paths.
            shown = name if names.count(name) == 1 else slide
            adata = read_slide(
                slide, layer=layer, slide_key=slide_key, bin_size=bin_size, microns_per_pixel=microns_per_pixel
            )
            if slide_key is None:
                rows.append(inspect_slide(adata, vocabulary, compaction, window_size, shown))
                continue
            for part, spots in slide_rows(adata, slide_key).items():
                rows.append(inspect_slide(adata[spots], vocabulary, compaction, window_size, f"{shown}/{part}"))
        except TOLD as error:
            message = sentence(error)
            failures.append(message if slide in message else f"{slide}: {message}")
    for row in rows:
        if len(slides) > 1 or slide_key is not None:
            typer.echo(row.slide)
        for line, value in row.lines().items():
            typer.echo(f"{line + ':':<17}{value}")
    if table is not None and rows:
        import pandas as pd

        with written_whole(table) as temporary:
            pd.DataFrame([asdict(row) for row in rows]).to_csv(temporary, sep="\t", index=False, float_format="%.4g")
    if failures:
        counted = f"{len(failures)} of {len(slides)} slides: " if len(slides) > 1 else ""
        raise ValueError(counted + "; ".join(failures))
