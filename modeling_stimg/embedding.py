"""`embed_slide` and `reconstruct_region`: a frozen model over an AnnData."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from tqdm.auto import tqdm

from .keys import BIN, EMBEDDING, OF_EMBEDDING, check_uns, tell
from .processing_stimg import STPatchProcessor
from .provenance import embedding_provenance, embedding_settings, reading_settings
from .reconstruction_stimg import reconstruct_spots, variable_genes
from .slide_image_stimg import SlideImage
from .slides import read_slide, slide_rows


def embed_slide(
    adata: AnnData,
    model: Any,
    processor: STPatchProcessor,
    stride: int | None = None,
    gene_selection: str | None = None,
    num_gene_draws: int | None = None,
    readout: str | None = None,
    smoothing: int | Sequence[int] | None = None,
    batch_size: int = 32,
    device: str | None = None,
    seed: int = 0,
    key_added: str = EMBEDDING,
    progress: bool = True,
    num_channels: int | None = None,
    centered: bool | None = None,
    projected: bool | None = None,
    slide_key: str | None = None,
    bin_size: float | None = None,
    microns_per_pixel: float | None = None,
    layer: str | None = None,
) -> None:
    """Give every spot of a slide an embedding, in `adata.obsm[key_added]`.

    Writes float32 (n_obs, width) in the order of `adata.obs`, and how it was made to
    `adata.uns["stimg"]["embedding"][key_added]` (`embedding_provenance`); everything else of `adata` stays as it is.
    Every spot is covered; spots that share an array position share an embedding (with one warning). The same input
    gives the same bits.

    Args:
        adata: raw counts and array positions, wherever `read_slide` finds them; it may be backed by a file.
        model: an `STImageMAEModel` or `STImageMAEForPreTraining`. processor: its processor.
        stride, gene_selection, num_gene_draws, readout, smoothing, num_channels, centered, projected: see
            `embed_image`; None = what the model's `config.embedding_defaults` says, else the general default.
        batch_size: windows at a time.
        device: e.g. `"cuda"`; None = where the model is.
        seed: of the gene draws.
        key_added: key in `obsm`.
        progress: tell how many genes matched, and show a progress bar.
        slide_key: a column of `obs` that tells several slides apart: each is embedded by itself.
        bin_size: um; cells at any positions are summed in bins of that side, every cell gets the embedding of its bin,
            and `adata.obs["stimg_bin"]` (int64) tells which; see `bin_cells`. microns_per_pixel: scale of positions.
        layer: where the counts are; see `read_slide`.

    Raises:
        ValueError: no raw counts, no array positions, too few genes that the model knows, or something else in
            `uns["stimg"]`.
    """
    check_uns(adata.uns)
    options = {
        "stride": stride,
        "gene_selection": gene_selection,
        "num_gene_draws": num_gene_draws,
        "readout": readout,
        "smoothing": smoothing,
        "num_channels": num_channels,
        "centered": centered,
        "projected": projected,
    }
    settings = embedding_settings(model, processor, seed=seed, **options)
    settings |= reading_settings(layer, slide_key, bin_size, microns_per_pixel)
    slide = read_slide(adata, layer=layer, slide_key=slide_key, bin_size=bin_size, microns_per_pixel=microns_per_pixel)
    rows_of = {"slide": slice(None)} if slide_key is None else slide_rows(slide, slide_key)
    embedding = None
    for name, rows in rows_of.items():
        part = slide if slide_key is None else slide[rows].copy()
        image = processor.slide_to_image(part, on_duplicate="first", name=name)
        if progress and embedding is None:  # the same genes in every slide
            tqdm.write(image.gene_match, file=sys.stderr)
        of_spots = model.embed(
            image, processor, **options, batch_size=batch_size, device=device, seed=seed, progress=progress
        )
        if embedding is None:
            embedding = np.zeros((slide.n_obs, of_spots.shape[1]), dtype=of_spots.dtype)
        embedding[rows] = of_spots[image.spot_of_obs]
    if bin_size is not None:
        bin_of_cell = slide.uns["stimg_bins"]["bin_of_cell"]
        adata.obs[BIN], embedding = bin_of_cell, embedding[bin_of_cell]
    adata.obsm[key_added] = embedding
    tell(adata.uns, OF_EMBEDDING, key_added, embedding_provenance(settings, image))


def reconstruct_region(
    adata: AnnData,
    model: Any,
    processor: STPatchProcessor,
    spots: Sequence[bool] | np.ndarray | pd.Series | str,
    genes: Sequence[str] | Sequence[int] | np.ndarray | None = None,
    progress: bool = True,
    **options: Any,
) -> pd.DataFrame:
    """Predict the expression of a region from the spots around it, as if it had not been measured.

    Nothing of the region's counts enters: changing them changes no bit of the prediction. The same input gives the same
    bits. A spot outside the region that shares its array position with one inside is hidden too. Genes that were
    measured on the slide are calibrated on the spots outside the region (`calibrate`); others are as the decoder says.

    Args:
        adata: as for `embed_slide`; it stays as it is.
        model: an `STImageMAEForPreTraining`, best one trained with `mask_unit` `"mixed"` or `"site"`. processor: its
            processor.
        spots: bool (n_obs,), True = in the region, in the order of `adata.obs`; or the name of such a column of `obs`.
        genes: names, of the slide or of the vocabulary, or vocabulary numbers, also of genes that were not measured on
            this slide; None = the 512 genes of the slide that vary most over the spots outside the region.
        progress: tell how many genes matched, and show a progress bar.
        options: `window_size`, `stride`, `num_views`, `gene_selection`, `num_gene_draws`, `calibrated`, `batch_size`,
            `device`, `seed`; see `reconstruct_spots`.

    Returns:
        float32 (spots of the region, genes), log1p of counts per the processor's `target_sum`: a row for each of the
        region's `obs_names`, in the order of `adata.obs`, and a column for each gene as it was asked for, or as the
        slide calls it.

    Raises:
        ValueError: a region that is empty, the whole slide or not told by one bool a spot, an unknown gene, a slide
            that `embed_slide` refuses, or a model that cannot reconstruct.
    """
    region = _region(adata, spots)
    slide = read_slide(adata)
    image = processor.slide_to_image(slide, on_duplicate="first")
    if progress:
        tqdm.write(image.gene_match, file=sys.stderr)
    # A position is hidden with all the spots on it.
    hidden = np.zeros(image.num_spots, dtype=bool)
    hidden[image.spot_of_obs[region]] = True
    if hidden.all():
        raise ValueError(
            f"The region holds all {image.num_spots:,} array positions of the slide: leave some out, to predict it "
            "from them."
        )
    numbers, names = named_genes(slide, image, processor, hidden, genes)
    predicted = reconstruct_spots(model, processor, image, hidden, genes=numbers, progress=progress, **options)
    row = hidden.cumsum() - 1
    return pd.DataFrame(predicted[row[image.spot_of_obs[region]]], index=adata.obs_names[region], columns=names)


def measured_expression(slide: AnnData, processor: STPatchProcessor, genes: Sequence[str]) -> pd.DataFrame:
    """What was measured of genes, in the units of `reconstruct_region`: what to hold a prediction against.

    Args:
        slide: as `read_slide` gives it; it stays as it is. processor: of the model that predicts. genes: as in
            `reconstruct_region`.

    Returns:
        float64 (n_obs, genes), log1p of counts per the processor's `target_sum`, a column a gene as it was asked for;
        NaN where the slide does not have the gene. Spots on one array position have the values of the first.

    Raises:
        ValueError: an unknown gene, or a slide that `embed_slide` refuses.
    """
    image = processor.slide_to_image(slide, on_duplicate="first")
    numbers, _ = named_genes(slide, image, processor, np.zeros(image.num_spots, dtype=bool), genes)
    columns = {}
    for name, number in zip(genes, numbers, strict=True):
        values = np.full(image.num_spots, 0.0 if number in image.measured else np.nan)
        entries = np.flatnonzero(np.asarray(image.indices) == number)
        values[np.searchsorted(image.indptr, entries, side="right") - 1] = np.asarray(image.values)[entries]
        columns[name] = values[image.spot_of_obs]
    return pd.DataFrame(columns, index=slide.obs_names)


def _region(adata: AnnData, spots: Sequence[bool] | np.ndarray | pd.Series | str) -> np.ndarray:
    """bool (n_obs,): the spots of a region, told by themselves or by a column of `obs`."""
    told = "spots"
    if isinstance(spots, str):
        if spots not in adata.obs:
            raise ValueError(
                f"obs has no column {spots!r}: expected one of {list(adata.obs.columns)}, or a bool a spot."
            )
        told, spots = f"obs[{spots!r}]", adata.obs[spots]
    region = np.asarray(spots)
    if region.shape != (adata.n_obs,):
        raise ValueError(f"{told} has shape {region.shape}: expected ({adata.n_obs},), True or False for every spot.")
    if region.dtype == object and all(isinstance(value, bool | np.bool_) for value in region):
        region = region.astype(bool)
    if region.dtype != bool:
        raise ValueError(
            f"{told} holds {region.dtype} values, e.g. {region[0]!r}: expected True or False for every spot, such as "
            f'adata.obs["label"] == "layer 1".'
        )
    if not region.any():
        raise ValueError(f"{told} is True for no spot: expected a region to reconstruct.")
    return region


def named_genes(
    slide: AnnData,
    image: SlideImage,
    processor: STPatchProcessor,
    hidden: np.ndarray,
    genes: Sequence[str] | Sequence[int] | np.ndarray | None,
) -> tuple[np.ndarray, list[str]]:
    """Vocabulary numbers int64 (genes,), and names, of the genes asked for."""
    of_column = processor.vocabulary.match(slide).ids  # int64 (n_vars,), -1 = unknown
    if genes is None:
        numbers = variable_genes(image.part(~hidden))
        columns = {number: name for name, number in zip(slide.var_names[::-1], of_column[::-1], strict=True)}
        return numbers, [str(columns[number]) for number in numbers]
    if isinstance(genes, str):
        raise ValueError(f"genes is the text {genes!r}: expected a list of names.")
    given = np.asarray(genes)
    if given.size == 0:
        raise ValueError("genes is empty: expected at least one gene, or None for the slide's most variable ones.")
    if given.ndim == 1 and given.dtype.kind not in "iu":
        # What a slide calls a gene may be no name of the vocabulary's.
        known = {str(name): number for name, number in zip(slide.var_names, of_column, strict=True) if number >= 0}
        of_vocabulary = processor.vocabulary.encode(given.tolist())
        numbers = np.array([known.get(str(name), n) for name, n in zip(given, of_vocabulary, strict=True)])
        if (numbers >= 0).all():
            return processor.gene_numbers(numbers), [str(name) for name in given]
    numbers = processor.gene_numbers(genes)
    return numbers, processor.vocabulary.decode(numbers)
