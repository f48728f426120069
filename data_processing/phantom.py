"""Phantom tissue: slides with known domains, for tests and for the demo.

    python data_processing/phantom.py --output demo/slides --num-slides 8

A `PhantomTissue` is the biology that all slides of a collection share: genes, cell types with marker genes, and
domains that are mixtures of cell types. Each slide lays the domains out anew: wavy layers, and nodules with a core
nested in them. Spots mix cell types at random around their domain's mixture, and counts are negative binomial with a
library size of their own, so that a single spot says little and its surroundings say more.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import scipy.sparse as sp
import typer
from anndata import AnnData

from modeling_stimg import STPatchProcessor

ARRAYS = ("visium", "square")
LAYERS = ("layer 1", "layer 2", "layer 3", "layer 4")
NODULE, CORE = "nodule", "core"
DOMAINS = (*LAYERS, NODULE, CORE)


@dataclass(frozen=True)
class PhantomTissue:
    """What the slides of one collection have in common.

    Attributes:
        gene_names: (num_genes,). profiles: float64 (cell types, num_genes), each row a distribution over genes.
        mixtures: float64 (6, cell types): share of every cell type in each of `DOMAINS`.
    """

    gene_names: tuple[str, ...]
    profiles: np.ndarray
    mixtures: np.ndarray

    @classmethod
    def create(
        cls, num_genes: int = 800, num_cell_types: int = 8, num_markers: int = 24, fold: float = 4.0, seed: int = 0
    ) -> "PhantomTissue":
        """Draw the biology.

        Args:
            num_genes: genes, of which `num_markers` a cell type are `fold` times higher in it.
            seed: int from 0.
        """
        rng = np.random.default_rng([seed, 0])
        baseline = rng.lognormal(0.0, 1.0, num_genes)
        profiles = np.tile(baseline, (num_cell_types, 1)) * rng.lognormal(0.0, 0.15, (num_cell_types, num_genes))
        for profile in profiles:
            profile[rng.choice(num_genes, min(num_markers, num_genes), replace=False)] *= fold
        profiles /= profiles.sum(1, keepdims=True)
        # Neighbouring layers share their cell types: a domain differs from the next in proportions, not in kind.
        centres = np.linspace(0, num_cell_types - 3, len(LAYERS))
        layers = np.exp(-0.5 * ((np.arange(num_cell_types) - centres[:, None]) / 1.0) ** 2)
        nodule = 0.3 * layers.mean(0)
        nodule[-2] += 0.7
        core = 0.6 * nodule
        core[-1] += 0.7
        mixtures = np.stack([*layers, nodule, core])
        return cls(
            gene_names=tuple(f"PHANTOM{i:04d}" for i in range(num_genes)),
            profiles=profiles,
            mixtures=mixtures / mixtures.sum(1, keepdims=True),
        )

    def slide(
        self,
        seed: int,
        array: str = "visium",
        height: int = 32,
        width: int = 32,
        median_counts: float = 500.0,
        purity: float = 6.0,
        dispersion: float = 0.3,
        num_holes: int = 2,
    ) -> AnnData:
        """Draw one slide.

        Args:
            seed: int from 0; the same seed gives the same slide.
            array: `"visium"` (odd rows shifted half a site, `array_col` every second number) or `"square"`.
            height, width: sites of the compact grid.
            median_counts: library size of the median spot.
            purity: concentration of the Dirichlet around a domain's mixture; low = noisy spots.
            dispersion: of the negative binomial (variance = mean + dispersion * mean ** 2).
            num_holes: tears in the tissue, without spots.

        Returns:
            AnnData (spots, genes): counts float32 CSR in `X`; `obs["array_row"]`, `obs["array_col"]` int64,
            `obs["label"]` the domain; `obsm["spatial"]` positions in units of the pitch; `uns["meta"]["patient"]`.

        Raises:
            ValueError: an unknown `array`, or a slide smaller than 4 x 4 sites.
        """
        if array not in ARRAYS:
            raise ValueError(f"array is {array!r}: expected one of {ARRAYS}.")
        if min(height, width) < 4:
            raise ValueError(f"A slide of {height} x {width} sites: expected at least 4 x 4.")
        rng = np.random.default_rng([seed, 1])
        rows, cols = (axis.ravel() for axis in np.mgrid[:height, :width])
        domains = _lay_out(rows / height, cols / width, rng)
        kept = ~_torn(rows / height, cols / width, num_holes, rng)
        rows, cols, domains = rows[kept], cols[kept], domains[kept]

        mixtures = rng.gamma(purity * self.mixtures[domains] + 1e-3)
        mixtures /= mixtures.sum(1, keepdims=True)
        library = median_counts * rng.lognormal(0.0, 0.4, len(rows))
        mean = library[:, None] * (mixtures @ self.profiles)
        counts = rng.poisson(mean * rng.gamma(1 / dispersion, dispersion, mean.shape))

        array_col = 2 * cols + rows % 2 if array == "visium" else cols
        spatial = np.stack([array_col / 2, rows * np.sqrt(3) / 2] if array == "visium" else [cols, rows], axis=1)
        obs = pd.DataFrame(
            {
                "array_row": rows.astype(np.int64),
                "array_col": array_col.astype(np.int64),
                "label": pd.Categorical.from_codes(domains, DOMAINS),
            },
            index=[f"{r}x{c}" for r, c in zip(rows, array_col, strict=True)],
        )
        return AnnData(
            X=sp.csr_matrix(counts.astype(np.float32)),
            obs=obs,
            var=pd.DataFrame(index=list(self.gene_names)),
            obsm={"spatial": spatial.astype(np.float64)},
            uns={"meta": {"patient": f"phantom {seed}"}},
        )


def _lay_out(down: np.ndarray, right: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Domain number of every site: wavy layers across the slide, and three nodules, each with a core."""
    phase = rng.uniform(0, 2 * np.pi, 3)
    waves = sum(np.sin(2 * np.pi * f * right + p) / f for f, p in zip((1, 2, 4), phase, strict=True))
    depth = down + 0.08 * waves + rng.uniform(-0.08, 0.08)
    domains = np.clip((depth * len(LAYERS)).astype(int), 0, len(LAYERS) - 1)
    for _ in range(3):
        centre, radius = rng.uniform(0.15, 0.85, 2), rng.uniform(0.09, 0.16)
        distance = np.hypot(down - centre[0], right - centre[1])
        domains[distance < radius] = DOMAINS.index(NODULE)
        domains[distance < 0.5 * radius] = DOMAINS.index(CORE)
    return domains


def _torn(down: np.ndarray, right: np.ndarray, num_holes: int, rng: np.random.Generator) -> np.ndarray:
    """Sites without tissue: the corners outside a rounded outline, and elliptic holes."""
    torn = np.abs(2 * down - 1) ** 4 + np.abs(2 * right - 1) ** 4 > 1.15
    for _ in range(num_holes):
        centre, radii = rng.uniform(0.15, 0.85, 2), rng.uniform(0.03, 0.08, 2)
        torn |= ((down - centre[0]) / radii[0]) ** 2 + ((right - centre[1]) / radii[1]) ** 2 < 1
    return torn


def abundant_genes(model: Path, num_genes: int) -> tuple[str, ...]:
    """Ids of the genes that hold the largest shares of the counts that a model saw.

    Raises:
        ValueError: it knows fewer, or not how much there was of them.
    """
    vocabulary = STPatchProcessor.from_pretrained(model).vocabulary
    if vocabulary.share is None or len(vocabulary) < num_genes:
        told = "no shares of counts" if vocabulary.share is None else f"{len(vocabulary):,} genes"
        raise ValueError(f"{model} has {told}: expected a model that was trained on at least {num_genes:,} genes.")
    chosen = np.argsort(-vocabulary.share, kind="stable")[:num_genes]
    return tuple(vocabulary.gene_ids[i] for i in chosen)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the slides; made if missing.")],
    num_slides: Annotated[int, typer.Option(help="Slides to draw.")] = 8,
    array: Annotated[str, typer.Option(help="visium (staggered) or square.")] = "visium",
    height: Annotated[int, typer.Option(help="Rows of sites.")] = 32,
    width: Annotated[int, typer.Option(help="Columns of sites.")] = 32,
    num_genes: Annotated[int, typer.Option(help="Genes.")] = 800,
    median_counts: Annotated[float, typer.Option(help="Library size of the median spot.")] = 500.0,
    seed: Annotated[int, typer.Option(help="Seed of the tissue; slide i has the seed 1000 * seed + i.")] = 0,
    genes_of: Annotated[
        Path | None, typer.Option(help="Folder of a model, after whose most abundant genes the phantom's are called.")
    ] = None,
) -> None:
    """Write phantom slides as phantom_00.h5ad, phantom_01.h5ad, ..."""
    output.mkdir(parents=True, exist_ok=True)
    tissue = PhantomTissue.create(num_genes=num_genes, seed=seed)
    if genes_of is not None:
        tissue = replace(tissue, gene_names=abundant_genes(genes_of, num_genes))
    for number in range(num_slides):
        adata = tissue.slide(1000 * seed + number, array, height, width, median_counts)
        path = output / f"phantom_{number:02d}.h5ad"
        temporary = path.with_suffix(".tmp")
        adata.write_h5ad(temporary, compression="gzip")
        temporary.replace(path)
    typer.echo(f"{num_slides} slides of {adata.n_obs} spots and {adata.n_vars} genes are in {output}.")


if __name__ == "__main__":
    typer.run(main)
