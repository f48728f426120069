"""What the page does with a slide, without the page: everything in it can be called, and tested, by itself."""

import shutil
import tempfile
import threading
import time
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData

from . import pl
from .app_uploads import MAX_UNPACKED, read_upload
from .compaction_stimg import compact
from .domains import find_domains
from .embedding import embed_slide, measured_expression, reconstruct_region
from .inspection import SlideInspection, inspect_slide
from .keys import DOMAIN
from .loading import LoadedModel
from .plotting import plot_domains
from .reconstruction_stimg import variable_genes
from .writing import write_h5ad, written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOMAIN_REGION, SQUARE_REGION = "spots of one domain", "square around the middle"
# Of slides that are open at once: each holds its counts in memory.
MAX_OPEN = 8
IDLE_SECONDS = 3600.0
_NO_SLIDE = "No slide is open here, or it has been closed after an hour of rest: drop one above."
# Columns of `var` with names that people know, where `var_names` are ids.
_SYMBOLS = ("gene_name", "gene_names", "symbol", "gene_symbol", "feature_name")


@dataclass
class OpenSlide:
    """A slide of one user.

    Attributes:
        name: of the upload, without its suffix. adata: as `read_slide` gives it; embedding and domains are
            written to it. inspection: what `stimg inspect` tells. notes: warnings of the reader.
        genes: those that the model knows, as (shown name, name in `var_names`), the most variable first.
        folder: of this slide alone, below that of the app; what is downloaded is written there.
        embedded: whether it has been embedded here. domains: names of the domains that were found here.
        used: when it was last asked for, as `time.monotonic` tells.
    """

    name: str
    adata: AnnData
    inspection: SlideInspection
    notes: list[str]
    genes: list[tuple[str, str]]
    folder: Path
    embedded: bool = False
    domains: list[str] = field(default_factory=list)
    used: float = field(default_factory=time.monotonic)


def open_slide(upload: Path, model: LoadedModel, folder: Path, max_bytes: int = MAX_UNPACKED) -> OpenSlide:
    """Read an upload, and remove it: from here on the slide is in memory alone.

    Args:
        upload: the file that was dropped. folder: of the app.

    Raises:
        ValueError, OSError, ImportError: as `read_upload`, and a slide that the model hardly knows a gene of.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            adata = read_upload(upload, folder, max_bytes)
            inspection = inspect_slide(
                adata, model.processor.vocabulary, model.processor.compaction, model.processor.window_size, upload.stem
            )
            genes = known_genes(adata, model)
        notes = [str(warning.message).replace(str(folder), "") for warning in caught]
    finally:
        upload.unlink(missing_ok=True)
        if upload.parent.parent == folder and not any(upload.parent.iterdir()):
            upload.parent.rmdir()  # the server gives every upload a folder
    return OpenSlide(upload.stem, adata, inspection, notes, genes, Path(tempfile.mkdtemp(prefix="slide-", dir=folder)))


def known_genes(adata: AnnData, model: LoadedModel) -> list[tuple[str, str]]:
    """Genes of a slide that the model knows: (symbol where the slide tells it, name in `var_names`), by variance."""
    image = model.processor.slide_to_image(adata, on_duplicate="first")
    of_column = model.processor.vocabulary.match(adata).ids
    column = {int(number): i for i, number in reversed(list(enumerate(of_column))) if number >= 0}
    columns = [column[int(number)] for number in variable_genes(image, len(image.measured))]
    symbols = next((adata.var[name].astype(str) for name in _SYMBOLS if name in adata.var), adata.var_names)
    return [
        (str(symbol), str(name))
        for symbol, name in zip(np.asarray(symbols)[columns], adata.var_names[columns], strict=True)
    ]


def counts_map(slide: OpenSlide) -> "Figure":
    """A map of the counts of every spot."""
    counts = np.asarray(slide.adata.X.sum(axis=1), dtype=np.float64).reshape(-1)
    return plot_domains(slide.adata, counts, title=f"{slide.name}: counts per spot").figure


def domain_map(slide: OpenSlide, model: LoadedModel, n_domains: int | None) -> "Figure":
    """Embed the slide, where that has not been done yet, and find its domains: `embed_slide`, `find_domains`.

    Args:
        n_domains: how many; None = as many as Leiden finds.
    """
    if not slide.embedded:
        embed_slide(slide.adata, model.network, model.processor)
        slide.embedded = True
    find_domains(slide.adata, n_domains, progress=True)
    slide.domains = [str(name) for name in slide.adata.obs[DOMAIN].cat.categories]
    return pl.domains(slide.adata, title=f"{slide.name}: {len(slide.domains)} domains").figure


def gene_map(slide: OpenSlide, gene: str | None) -> "Figure":
    """A map of one gene as it was measured: log1p of counts per 10,000."""
    return pl.gene(slide.adata, _named(gene)).figure


def region(slide: OpenSlide, kind: str, domain: str | None, side: int) -> np.ndarray:
    """bool (n_obs,): the spots whose expression is to be predicted.

    Args:
        kind: `DOMAIN_REGION`, the spots of `domain`; or `SQUARE_REGION`, `side` sites around the middle of the slide.

    Raises:
        ValueError: no such domain, or no domains yet.
    """
    if kind == SQUARE_REGION:
        rows, cols = compact(
            slide.adata.obs["array_row"].to_numpy(), slide.adata.obs["array_col"].to_numpy(), "lattice"
        )
        # The spot next to the middle, so that a hole in the tissue is no empty region.
        middle = np.argmin((rows - (rows.max() + 1) // 2) ** 2 + (cols - (cols.max() + 1) // 2) ** 2)
        down, right = (x - x[middle] + side // 2 for x in (rows, cols))
        return (down >= 0) & (down < side) & (right >= 0) & (right < side)
    if kind != DOMAIN_REGION:
        raise ValueError(f"The region is {kind!r}: expected {DOMAIN_REGION!r} or {SQUARE_REGION!r}.")
    if not slide.domains:
        raise ValueError("There are no domains yet: find them above, or take the square around the middle.")
    if domain not in slide.domains:
        raise ValueError(f"There is no domain {domain!r}: choose one of {', '.join(slide.domains)}.")
    return (slide.adata.obs[DOMAIN] == domain).to_numpy()


def reconstruction_maps(slide: OpenSlide, model: LoadedModel, gene: str | None, spots: np.ndarray) -> "Figure":
    """A gene as it was measured, with a region hidden, and as it is predicted there: `reconstruct_region`.

    Raises:
        ValueError: a model without a decoder, an unknown gene, or a region that cannot be predicted.
    """
    gene = _named(gene)
    if not model.has_decoder:
        raise ValueError(f"{model.name} was saved without its decoder, and cannot reconstruct.")
    predicted = reconstruct_region(slide.adata, model.network, model.processor, spots, genes=[gene])
    measured = measured_expression(slide.adata, model.processor, [gene])
    return pl.reconstruction(slide.adata, predicted, gene, measured=measured[gene].to_numpy())[0].figure


def write_result(slide: OpenSlide) -> Path:
    """The slide with its embedding and its domains as an .h5ad, written whole, in the slide's own folder.

    Raises:
        ValueError: there is nothing to download yet. NoRoomError: a full disk.
    """
    if not slide.embedded:
        raise ValueError("There is no embedding yet: find the domains first, which embeds the slide.")
    path = slide.folder / f"{slide.name}_stimg.h5ad"
    with written_whole(path) as temporary:
        write_h5ad(slide.adata, temporary)
    return path


def _named(gene: str | None) -> str:
    if not gene:
        raise ValueError("No gene is chosen: choose one, or type its name.")
    return str(gene)


class OpenSlides:
    """The slide of every session, and no other's; those that rest too long, or are too many, are closed."""

    def __init__(self, capacity: int = MAX_OPEN, idle_seconds: float = IDLE_SECONDS) -> None:
        self._slides: OrderedDict[str, OpenSlide] = OrderedDict()  # the longest unused first
        self._lock = threading.Lock()
        self._capacity, self._idle = capacity, idle_seconds

    def put(self, session: str, slide: OpenSlide) -> None:
        """The slide of a session, in place of the one before."""
        self.close(session)
        with self._lock:
            self._slides[session] = slide
        self._tidy()

    def get(self, session: str) -> OpenSlide:
        """The slide of a session. Raises ValueError where there is none."""
        self._tidy()
        with self._lock:
            if session not in self._slides:
                raise ValueError(_NO_SLIDE)
            self._slides.move_to_end(session)
            self._slides[session].used = time.monotonic()
            return self._slides[session]

    def close(self, session: str) -> None:
        """Forget a session's slide, and remove its files."""
        with self._lock:
            slide = self._slides.pop(session, None)
        if slide is not None:
            shutil.rmtree(slide.folder, ignore_errors=True)

    def _tidy(self) -> None:
        with self._lock:
            rested = [name for name, slide in self._slides.items() if time.monotonic() - slide.used > self._idle]
            too_many = list(self._slides)[: max(len(self._slides) - self._capacity, 0)]
        for session in {*rested, *too_many}:
            self.close(session)

    def __len__(self) -> int:
        return len(self._slides)
