"""What a slide looks like to a model: spots, grid and genes, without a model."""

from dataclasses import dataclass

import numpy as np
from anndata import AnnData

from .compaction_stimg import check_grid, compact, is_staggered
from .genes_stimg import GeneVocabulary
from .slide_image_stimg import window_counts


@dataclass(frozen=True)
class SlideInspection:
    """Numbers of one slide; `inspect_slide` makes it.

    Attributes:
        slide: its name. spots: rows of the AnnData. sites: occupied sites, fewer where spots share a position.
        array: "staggered" or "square". height, width: sites of the grid after compaction.
        fill: share of the grid's sites that hold a spot. fullest_window: spots in the fullest window of `window_size`.
        median_counts, min_counts, max_counts: counts per spot.
        genes: columns of the AnnData. measured, unmatched: distinct genes of the vocabulary that the slide has, and
            columns that the vocabulary does not know; None without a vocabulary.
    """

    slide: str
    spots: int
    sites: int
    array: str
    height: int
    width: int
    fill: float
    fullest_window: int
    median_counts: float
    min_counts: float
    max_counts: float
    genes: int
    measured: int | None
    unmatched: int | None
    window_size: int

    def lines(self) -> dict[str, str]:
        """The same in words, a line each."""
        shared = f" on {self.sites:,} sites" if self.sites < self.spots else ""
        grid = f"{self.height} x {self.width} sites after compaction, {self.fill:.0%} of them observed"
        reach = f"from {self.min_counts:,.0f} to {self.max_counts:,.0f}"
        lines = {
            "spots": f"{self.spots:,}{shared}",
            "genes": f"{self.genes:,}",
            "counts per spot": f"median {self.median_counts:,.0f}, {reach}",
            "array": f"{self.array}, {grid}",
            "fullest window": f"{self.fullest_window} of {self.window_size**2} sites",
        }
        if self.measured is not None:
            lines["vocabulary"] = f"{self.measured:,} of its genes measured, {self.unmatched:,} columns unmatched"
        return lines


def inspect_slide(
    adata: AnnData,
    vocabulary: GeneVocabulary | None = None,
    compaction: str = "lattice",
    window_size: int = 16,
    name: str = "slide",
) -> SlideInspection:
    """Look at a slide as `read_slide` gives it.

    Raises:
        ValueError: an unknown `compaction`, positions of no array, or hardly any gene that the vocabulary knows.
    """
    row, col = adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()
    grid_row, grid_col = compact(row, col, compaction)
    check_grid(grid_row, grid_col)
    occupied = np.zeros((grid_row.max() + 1, grid_col.max() + 1), dtype=bool)
    occupied[grid_row, grid_col] = True
    counts = np.asarray(adata.X.sum(axis=1)).ravel()
    match = None if vocabulary is None else vocabulary.match(adata)
    return SlideInspection(
        slide=name,
        spots=adata.n_obs,
        sites=int(occupied.sum()),
        array="staggered" if is_staggered(row, col) else "square",
        height=occupied.shape[0],
        width=occupied.shape[1],
        fill=float(occupied.mean()),
        fullest_window=int(window_counts(occupied, window_size).max()),
        median_counts=float(np.median(counts)),
        min_counts=float(counts.min()),
        max_counts=float(counts.max()),
        genes=adata.n_vars,
        measured=None if match is None else len(np.unique(match.ids[match.ids >= 0])),
        unmatched=None if match is None else match.num_genes - match.num_matched,
        window_size=window_size,
    )
