"""Maps of a slide: `modeling_stimg.pl.domains(adata)`, `.gene`, `.embedding`, `.reconstruction`.

Every function draws on `ax` where it is given, else on a figure of its own, and returns the axes: save with
`ax.figure.savefig(...)`. Nothing of pyplot's global state is touched. Colours are told apart by colour-blind eyes;
a scale bar is drawn where the slide tells how far its spots are from each other, or `pitch` (micrometres) does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .counts_stimg import check_counts
from .keys import DOMAIN, EMBEDDING, colours_key
from .plotting import draw_spots, new_figure, plot_domains

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes

TARGET_SUM = 1e4
# Columns of `var` that hold a gene's other names.
_OTHER_NAMES = ("gene_name", "gene_names", "gene_id", "gene_ids", "symbol", "gene_symbol", "feature_name")


def domains(
    adata: AnnData, key: str = DOMAIN, ax: Axes | None = None, title: str | None = None, pitch: float | None = None
) -> Axes:
    """A map of domains, or of any other column of `obs`; numbers in it are drawn as such.

    Args:
        adata: a slide with `obs[key]`. Colours in `uns[f"{key}_colors"]`, scanpy's as well, are taken where they suit.
        title: None = `key`.

    Raises:
        ValueError: no such column, or no array positions.
    """
    if key not in adata.obs:
        raise ValueError(f"obs has no {key!r}: run find_domains first, or name one of {list(adata.obs.columns)}.")
    column, colours = adata.obs[key], None
    given = adata.uns.get(colours_key(key))
    if isinstance(column.dtype, pd.CategoricalDtype):
        names = [str(name) for name in column.cat.categories]
        if given is not None and len(given) >= len(names):
            colours = {name: str(colour) for name, colour in zip(names, given, strict=False)}
        values = np.array([None if pd.isna(value) else str(value) for value in column], dtype=object)
    else:
        values = column.to_numpy()
    return plot_domains(adata, values, title=key if title is None else title, ax=ax, colours=colours, pitch=pitch)


def gene(
    adata: AnnData,
    gene: str,
    layer: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    pitch: float | None = None,
) -> Axes:
    """A map of one gene: log1p of counts per 10,000 where `X` holds counts, else what `X` holds.

    Args:
        gene: as `var_names` call it, or as `var["gene_name"]`, `var["gene_ids"]` and the like do.
        layer: values of `layers[layer]` instead, as they are.

    Raises:
        ValueError: no such gene or layer.
    """
    values = expression(adata, gene, layer)
    return plot_domains(adata, values, title=gene if title is None else title, ax=ax, pitch=pitch)


def embedding(
    adata: AnnData,
    key: str = EMBEDDING,
    component: int | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    pitch: float | None = None,
) -> Axes:
    """A map of an embedding's three leading principal components as red, green and blue: like places look alike.

    Each reaches from its 2nd to its 98th percentile. Colours that are mixed are not told apart by all eyes:
    `component` draws a single one, 0 the leading, in viridis.

    Raises:
        ValueError: no such embedding or component.
    """
    from .clustering import principal_components

    if key not in adata.obsm:
        raise ValueError(f"obsm has no {key!r}: embed the slide first, or name one of {list(adata.obsm)}.")
    needed = 3 if component is None else component + 1
    if component is not None and component < 0:
        raise ValueError(f"component is {component}: expected a number from 0.")
    parts = principal_components(np.asarray(adata.obsm[key]), needed)
    if component is not None:
        if parts.shape[1] <= component:
            raise ValueError(f"component is {component}: obsm[{key!r}] has {parts.shape[1]} components, from 0.")
        what = f"{key}, component {component}"
        return plot_domains(adata, parts[:, component], title=what if title is None else title, ax=ax, pitch=pitch)
    low, high = np.percentile(parts, [2, 98], axis=0)
    colours = np.zeros((adata.n_obs, 3))
    colours[:, : parts.shape[1]] = np.clip((parts - low) / np.where(high > low, high - low, 1), 0, 1)
    return plot_domains(adata, colours, title=key if title is None else title, ax=ax, pitch=pitch)


def reconstruction(
    adata: AnnData,
    predicted: pd.DataFrame,
    gene: str | None = None,
    measured: np.ndarray | None = None,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Three maps of a gene: as it was measured, with the region hidden, and with the prediction in the region.

    One scale for all three. The edges of the region's spots are black.

    Args:
        adata: the slide. predicted: what `reconstruct_region` gave: the region's `obs_names` by genes.
        gene: a column of it; None = the first.
        measured: float (n_obs,), values in the units of the prediction; None = log1p of counts per 10,000, which is
            what most models predict; NaN everywhere where the slide does not have the gene.
        ax: three axes; None = a figure of their own.

    Returns:
        object (3,): the axes.

    Raises:
        ValueError: no such gene, or a region of another slide.
    """
    gene = str(predicted.columns[0]) if gene is None else gene
    if gene not in predicted:
        raise ValueError(f"The prediction has no gene {gene!r}: expected one of {list(predicted.columns)[:8]}, ...")
    hidden = np.isin(adata.obs_names, predicted.index)
    if hidden.sum() != len(predicted):
        raise ValueError(
            f"The prediction has {len(predicted)} spots, and {int(hidden.sum())} spots of the slide are called so: "
            "expected a prediction for this very slide, whose spot names are all different."
        )
    if measured is None:
        try:
            measured = expression(adata, gene)
        except ValueError:  # a gene that was not measured here can be predicted all the same
            measured = np.full(adata.n_obs, np.nan)
    measured = np.asarray(measured, dtype=np.float64)
    filled = measured.copy()
    filled[hidden] = predicted.loc[adata.obs_names[hidden], gene]
    shown = {"measured": measured, "hidden": np.where(hidden, np.nan, measured), "predicted": filled}
    top = np.nanmax([*measured[np.isfinite(measured)], *filled[np.isfinite(filled)], 0.0]) or 1.0
    axes = list(new_figure(12, 4).subplots(1, 3)) if ax is None else list(ax)
    if len(axes) != 3:
        raise ValueError(f"ax holds {len(axes)} axes: expected three, for measured, hidden and predicted.")
    for panel, (title, values) in zip(axes, shown.items(), strict=True):
        _, spots = draw_spots(adata, panel)
        colour_map = _grey_where_unknown()
        spots.set(array=np.ma.masked_invalid(values), cmap=colour_map, clim=(0, top), linewidth=0.5)
        spots.set_edgecolor(np.where(hidden[:, None], (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0)))
        panel.set_title(f"{gene}: {title}")
    axes[-1].figure.colorbar(spots, ax=axes, shrink=0.7, label="log1p of counts")
    result = np.empty(3, dtype=object)
    result[:] = axes
    return result


def expression(adata: AnnData, gene: str, layer: str | None = None) -> np.ndarray:
    """float64 (n_obs,): one gene's values: of a layer as they are, log1p of counts per 10,000 where `X` holds counts.

    Raises:
        ValueError: no such gene or layer.
    """
    if layer is not None and layer not in adata.layers:
        raise ValueError(f"The slide has no layer {layer!r}: expected one of {list(adata.layers)}.")
    matrix = adata.X if layer is None else adata.layers[layer]
    column = _column_of(adata, gene)
    values = matrix[:, [column]]
    values = np.asarray(values.todense() if hasattr(values, "todense") else values, dtype=np.float64).reshape(-1)
    if layer is not None or not _are_counts(matrix):
        return values
    library = np.asarray(matrix.sum(axis=1), dtype=np.float64).reshape(-1)
    return np.log1p(values * TARGET_SUM / np.maximum(library, 1))


def _column_of(adata: AnnData, gene: str) -> int:
    """Number of a gene's column, by its name or one of its other names; the first, where several are called so."""
    for names in (adata.var_names, *(adata.var[name].astype(str) for name in _OTHER_NAMES if name in adata.var)):
        found = np.flatnonzero(np.asarray(names) == gene)
        if found.size:
            return int(found[0])
    raise ValueError(
        f"The slide has no gene {gene!r}: expected a name as {adata.var_names[0]!r}, or as in a column of var "
        f"({', '.join(_OTHER_NAMES)})."
    )


def _are_counts(matrix: Any) -> bool:
    try:
        check_counts(np.asarray(matrix.data if hasattr(matrix, "indptr") else matrix))
    except ValueError:
        return False
    return True


def _grey_where_unknown() -> Any:
    from matplotlib import colormaps

    from .palette import NO_CLASS

    return colormaps["viridis"].with_extremes(bad=NO_CLASS)


__all__ = ["domains", "embedding", "expression", "gene", "reconstruction"]
