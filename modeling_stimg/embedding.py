"""`embed_slide`: a frozen model over an AnnData."""

import sys
from typing import Any

import numpy as np
from anndata import AnnData
from tqdm.auto import tqdm

from .processing_stimg import STPatchProcessor
from .slides import read_slide

KEY_ADDED = "X_stimg"


def embed_slide(
    adata: AnnData,
    model: Any,
    processor: STPatchProcessor,
    stride: int | None = None,
    gene_selection: str | None = None,
    num_gene_draws: int | None = None,
    readout: str | None = None,
    smoothing: int | None = None,
    batch_size: int = 32,
    device: str | None = None,
    seed: int = 0,
    key_added: str = KEY_ADDED,
    progress: bool = True,
) -> None:
    """Give every spot of a slide an embedding, in `adata.obsm[key_added]`.

    Writes float32 (n_obs, width) in the order of `adata.obs`; everything else of `adata` stays as it is. Every spot is
    covered; spots that share an array position share an embedding (with one warning). The same input gives the same
    bits.

    Args:
        adata: raw counts in `X`, and array positions under any of the names that `read_slide` knows.
        model: an `STImageMAEModel` or `STImageMAEForPreTraining`. processor: its processor.
        stride, gene_selection, num_gene_draws, readout, smoothing: see `embed_image`; None = what the model's
            `config.embedding_defaults` says, else the general default.
        batch_size: windows at a time.
        device: e.g. `"cuda"`; None = where the model is.
        seed: of the gene draws.
        key_added: key in `obsm`.
        progress: tell how many genes matched, and show a progress bar.

    Raises:
        ValueError: no raw counts, no array positions, or too few genes that the model knows.
    """
    image = processor.slide_to_image(read_slide(adata), on_duplicate="first")
    if progress:
        tqdm.write(image.gene_match, file=sys.stderr)
    embedding = model.embed(
        image,
        processor,
        stride=stride,
        gene_selection=gene_selection,
        num_gene_draws=num_gene_draws,
        readout=readout,
        smoothing=smoothing,
        batch_size=batch_size,
        device=device,
        seed=seed,
        progress=progress,
    )
    adata.obsm[key_added] = np.ascontiguousarray(embedding[image.spot_of_obs])
