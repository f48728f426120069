"""How fast windows are made and how much memory a slide takes, against what the hardware must do at least."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from anndata import AnnData
from tqdm.auto import tqdm

from modeling_stimg import GeneVocabulary, SlideImage, STImageMAEConfig, STImageMAEModel, STPatchProcessor, embed_slide
from modeling_stimg.sampling_stimg import draw_corners, window_spots

# ---------------------------------------------------------------------------- windows


@contextmanager
def one_core() -> Iterator[None]:
    """This process on one core, torch with one thread."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    if cores is not None:
        os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def window_non_zeros(image: SlideImage, corner: tuple[int, int], window_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Genes int32 (n,) and values float32 (n,) of a window, contiguous."""
    spots = window_spots(image, [corner], window_size).ravel()
    genes, values, _ = image.expression(spots[spots >= 0])
    return genes, values


def textbook_window(
    image: SlideImage, corner: tuple[int, int], window_size: int, num_channels: int, rng: np.random.Generator
) -> np.ndarray:
    """A window as a textbook would make it: dense over all genes, their variances, Gumbel top-k, the chosen columns.

    Returns:
        float32 (num_channels, window_size, window_size).
    """
    sites = window_spots(image, [corner], window_size).ravel()
    observed = np.flatnonzero(sites >= 0)
    genes, values, owner = image.expression(sites[observed])
    dense = np.zeros((len(observed), image.pad_id), dtype=np.float32)
    dense[owner, genes] = values
    weights = dense.var(axis=0)[image.measured] + 1e-6
    keys = np.log(weights) + rng.gumbel(size=len(weights))
    num_chosen = min(num_channels, len(keys))
    chosen = image.measured[np.argpartition(-keys, num_chosen - 1)[:num_chosen]]
    window = np.zeros((num_channels, window_size**2), dtype=np.float32)
    window[: len(chosen), observed] = dense[:, chosen].T
    return window.reshape(-1, window_size, window_size)


def measure_windows(
    image: SlideImage, processor: STPatchProcessor, num_batches: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Time per window on the CPU, as a multiple of one weighted `np.bincount` over the same window's non-zeros.

    Each batch of windows is timed three ways, and beside it, window by window, the bincount of contiguous genes and
    values: as the slide holds them (int32 and float32, which `np.bincount` first widens), and widened beforehand.
    Ratios are those of a batch's sums; medians over batches.
    """
    size, channels = processor.window_size, processor.num_channels
    rng = np.random.default_rng(seed)
    rows = []
    for number in tqdm(range(-2, num_batches), desc=image.name):
        windows = range((number + 2) * batch_size, (number + 3) * batch_size)
        corners = draw_corners(image, size, processor.min_observed, seed, windows)
        entries = [window_non_zeros(image, corner, size) for corner in corners]
        start = time.perf_counter()
        processor(image, num_windows=batch_size, first_window=windows[0], seed=seed, return_tensors="pt")
        batched = time.perf_counter()
        for window in windows:
            processor(image, num_windows=1, first_window=window, seed=seed, return_tensors="pt")
        single = time.perf_counter()
        for genes, values in entries:
            np.bincount(genes, values, minlength=image.pad_id)
        counted = time.perf_counter()
        for corner in corners[:4]:
            textbook_window(image, corner, size, channels, rng)
        textbook = (time.perf_counter() - counted) * len(corners) / len(corners[:4])
        wide = 0.0
        for genes, values in entries:
            genes, values = genes.astype(np.int64), values.astype(np.float64)
            widened = time.perf_counter()
            np.bincount(genes, values, minlength=image.pad_id)
            wide += time.perf_counter() - widened
        if number >= 0:  # the first two warm up
            times = (batched - start, single - batched, counted - single, wide, textbook)
            rows.append((*times, np.mean([len(genes) for genes, _ in entries])))
    batched, single, bincount, wide, textbook, non_zeros = np.array(rows).T
    return {
        "slide": image.name,
        "non_zeros": float(np.median(non_zeros)),
        "bincount_ms": float(np.median(bincount)) / batch_size * 1e3,
        "batch_ms": float(np.median(batched)) / batch_size * 1e3,
        "batch_ratio": float(np.median(batched / bincount)),
        "wide_ratio": float(np.median(batched / wide)),
        "single_ratio": float(np.median(single / bincount)),
        "textbook_ratio": float(np.median(textbook / bincount)),
    }


def measure_resident(
    image: SlideImage, processor: STPatchProcessor, device: str, num_batches: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Windows a second from a slide that lies on an accelerator, and the most that its memory would let through.

    The floor counts every non-zero's gene and value read once and the tensor written once, at the bandwidth that a
    copy of a gigabyte reaches.
    """
    size, channels = processor.window_size, processor.num_channels

    def batch(number: int) -> None:
        processor(
            image,
            num_windows=batch_size,
            first_window=number * batch_size,
            seed=seed,
            device=device,
            return_tensors="pt",
        )

    for number in range(3):
        batch(number)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for number in range(num_batches):
        batch(number)
    torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - start) / num_batches
    corners = draw_corners(image, size, processor.min_observed, seed, range(batch_size * num_batches))
    non_zeros = np.mean([len(window_non_zeros(image, corner, size)[0]) for corner in corners[: 4 * batch_size]])
    floor = (non_zeros * 8 + channels * size**2 * 4) / copy_bandwidth(device)
    return {
        "slide": image.name,
        "device": torch.cuda.get_device_name(device),
        "windows_per_second": batch_size / seconds,
        "floor_windows_per_second": 1 / floor,
    }


def copy_bandwidth(device: str, num_bytes: int = 1 << 30) -> float:
    """Bytes a second that a copy on the device reads and writes, taken together."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize(device)
    return 20 * num_bytes / (time.perf_counter() - start)


# ---------------------------------------------------------------------------- memory


def anonymous_memory() -> int:
    """Bytes of anonymous memory that this process has resident (`RssAnon`).

    Raises:
        OSError: not on Linux.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        raise OSError("The memory benchmark reads /proc/self/status, which there is on Linux alone: run it there.")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """Context manager: `peak` is the most anonymous memory in bytes, looked at every few milliseconds."""

    def __init__(self, interval_s: float = 0.005):
        self.peak = anonymous_memory()
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self.peak = max(self.peak, anonymous_memory())

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_memory())


def binned_phantom(num_bins: int, genes: Sequence[str], genes_per_bin: int, seed: int) -> AnnData:
    """A slide of square bins, as dense as Visium HD's: `genes_per_bin` non-zeros in each, counts of 1 and more.

    Raises:
        ValueError: more genes a bin than there are genes.
    """
    num_genes = len(genes)
    if not 0 < genes_per_bin <= num_genes:
        raise ValueError(f"genes_per_bin is {genes_per_bin}: expected 1 to {num_genes}, the number of genes.")
    rng = np.random.default_rng(seed)
    width = int(np.ceil(np.sqrt(num_bins)))
    # One gene from each of as many strata, so that genes are distinct and ascending without a sort.
    edges = np.linspace(0, num_genes, genes_per_bin + 1).astype(np.int32)
    columns = np.empty((num_bins, genes_per_bin), dtype=np.int32)
    counts = np.empty((num_bins, genes_per_bin), dtype=np.float32)
    for start in range(0, num_bins, 10_000):
        block = columns[start : start + 10_000]
        block[:] = edges[:-1] + (rng.random(block.shape, dtype=np.float32) * np.diff(edges)).astype(np.int32)
        counts[start : start + 10_000] = rng.geometric(0.7, block.shape)
    indptr = np.arange(num_bins + 1, dtype=np.int64) * genes_per_bin
    matrix = sp.csr_matrix((counts.reshape(-1), columns.reshape(-1), indptr.astype(np.int32)), (num_bins, num_genes))
    adata = AnnData(matrix)
    adata.obs["array_row"], adata.obs["array_col"] = np.divmod(np.arange(num_bins), width)
    adata.var_names = list(genes)
    return adata


def random_model(
    num_genes: int, hidden_size: int, num_layers: int, seed: int
) -> tuple[STImageMAEModel, STPatchProcessor]:
    """An untrained model of phantom genes, and its processor."""
    vocabulary = GeneVocabulary([f"PHANTOM{i:05d}" for i in range(num_genes)])
    torch.manual_seed(seed)
    config = STImageMAEConfig(
        vocab_size=len(vocabulary) + 1,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        intermediate_size=4 * hidden_size,
    )
    return STImageMAEModel(config), STPatchProcessor(vocabulary)


def measure_memory(
    model: STImageMAEModel,
    processor: STPatchProcessor,
    num_bins: int,
    num_genes: int,
    genes_per_bin: int,
    stride: int | None,
    seed: int,
) -> dict[str, Any]:
    """Peak of anonymous memory from a slide's CSR to the embeddings of all its bins, the CSR included.

    The slide's genes are the first ones of the vocabulary.
    """
    before = anonymous_memory()
    adata = binned_phantom(num_bins, processor.vocabulary.gene_ids[:num_genes], genes_per_bin, seed)
    with_slide = anonymous_memory()
    start = time.perf_counter()
    with PeakMemory() as memory:
        embed_slide(adata, model, processor, stride=stride, seed=seed, progress=False)
    embedding = adata.obsm["X_stimg"]
    return {
        "bins": num_bins,
        "genes": adata.n_vars,
        "non_zeros": int(adata.X.nnz),
        "embedding": list(embedding.shape),
        "finite": bool(np.isfinite(embedding).all()),
        "before_gb": before / 1e9,
        "csr_gb": (with_slide - before) / 1e9,
        "peak_gb": memory.peak / 1e9,
        "dense_gb": num_bins * adata.n_vars * 4 / 1e9,
        "seconds": time.perf_counter() - start,
    }
