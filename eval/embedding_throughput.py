"""How long a slide takes from its file to a file with its embedding."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm.auto import tqdm

from modeling_stimg import STPatchProcessor, embed_slide, read_slide
from modeling_stimg.writing import write_h5ad


def measure_embedding(
    paths: Sequence[Path], model: Any, processor: STPatchProcessor, device: str | None = None
) -> list[dict[str, Any]]:
    """Read, embed as the model does by default, and write every slide, as `stimg embed` does.

    What runs first is not counted.

    Returns:
        for every slide its spots and genes, the seconds of each part, and spots a second over all of them.
    """
    _timed(paths[0], model, processor, device)  # kernels are chosen, and memory is taken, by what runs first
    return [_timed(path, model, processor, device) for path in tqdm(paths, desc="slides")]


def _timed(path: Path, model: Any, processor: STPatchProcessor, device: str | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        adata = read_slide(path)
        read = perf_counter()
        embed_slide(adata, model, processor, device=device, progress=False)
        embedded = perf_counter()
        write_h5ad(adata, Path(folder) / "embedded.h5ad")
        written = perf_counter()
    return {
        "slide": path.stem,
        "spots": adata.n_obs,
        "genes": adata.n_vars,
        "read_seconds": read - start,
        "embed_seconds": embedded - read,
        "write_seconds": written - embedded,
        "spots_per_second": adata.n_obs / (written - start),
    }
