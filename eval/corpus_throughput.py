"""How fast a loader worker draws windows from a corpus on disk, and how much memory it takes, whatever its size."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from data_processing.assembling import assemble
from data_processing.open_corpus import Corpus
from data_processing.st_corpus import slide_row, write_row
from data_processing.window_dataset import WindowDataset
from eval.throughput import anonymous_memory, binned_phantom, one_core
from modeling_stimg import GeneVocabulary, STPatchProcessor


def build_phantom_corpus(
    folder: Path, num_spots: int, spots_per_slide: int, num_genes: int, genes_per_spot: int, seed: int
) -> dict[str, Any]:
    """Build a corpus of phantom slides, the way of real ones: rows, then the memory-mapped form and gene statistics.

    Returns:
        Slides, spots, non-zeros, seconds and bytes on disk.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    start = time.perf_counter()
    vocabulary = GeneVocabulary([f"PHANTOM{i:05d}" for i in range(num_genes)])
    num_slides = max(1, round(num_spots / spots_per_slide))
    sizes = np.diff(np.linspace(0, num_spots, num_slides + 1).astype(int))
    files = []
    for number, size in enumerate(tqdm(sizes, desc="phantom slides")):
        adata = binned_phantom(int(size), num_genes, genes_per_spot, seed=seed + number)
        files.append(folder / "data" / f"phantom_{number:04d}.parquet")
        write_row(slide_row(adata, vocabulary, files[-1].stem), files[-1])
    rows = time.perf_counter()
    assemble(folder, files, vocabulary, rank=0)
    return {
        "slides": num_slides,
        "spots": num_spots,
        "non_zeros": num_spots * genes_per_spot,
        "seconds_rows": rows - start,
        "seconds_assembling": time.perf_counter() - rows,
        "bytes_published": sum(file.stat().st_size for file in files),
        "bytes_training": sum(p.stat().st_size for p in (folder / "arrow").iterdir()),
    }


def forget_pages(folder: Path) -> None:
    """Ask the system to drop a corpus from its page cache.

    Raises:
        OSError: where that cannot be asked for.
    """
    if not hasattr(os, "posix_fadvise"):
        raise OSError("A cold page cache needs posix_fadvise, which this system lacks: run the benchmark on Linux.")
    for path in (folder / "arrow").iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_pages(folder: Path) -> None:
    """Read a corpus once, so that it lies in the page cache as far as it fits."""
    for path in (folder / "arrow").iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def mapped_memory() -> int:
    """Bytes of files that this process has resident (`RssFile`)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssFile")).split()[1]) * 1024


def measure_corpus(folder: Path, num_windows: int, seed: int) -> dict[str, Any]:
    """Cold and warm windows a second, and memory, each of a fresh process; slides are opened in a first round."""
    results: dict[str, Any] = {}
    for state, prepare in (("cold", forget_pages), ("warm", read_pages)):
        prepare(folder)
        results |= {f"{state}_{key}": value for key, value in _in_fresh_process(folder, num_windows, seed).items()}
    return results


def _in_fresh_process(folder: Path, num_windows: int, seed: int) -> dict[str, float]:
    code = (
        "import json, sys; from pathlib import Path; from eval.corpus_throughput import worker; "
        "print(json.dumps(worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))"
    )
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder.resolve()), str(num_windows), str(seed)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise OSError(f"The loader worker failed: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def worker(folder: Path, num_windows: int, seed: int) -> dict[str, float]:
    """What one loader worker does: windows over all slides, one by one, on one core; for a process of its own.

    The first round meets slides that were never opened and, where the page cache is cold, pages that were never read;
    the second is how training goes on.
    """
    with one_core():
        corpus = Corpus(folder)
        processor = STPatchProcessor(corpus.vocabulary)
        dataset = WindowDataset(corpus.images(processor), processor, 2 * num_windows, seed)
        times = [time.perf_counter()]
        for first in (0, num_windows):
            for index in range(first, first + num_windows):
                dataset[index]
            times.append(time.perf_counter())
    return {
        "first_windows_per_second": num_windows / (times[1] - times[0]),
        "windows_per_second": num_windows / (times[2] - times[1]),
        "anonymous_gb": anonymous_memory() / 1e9,
        "mapped_gb": mapped_memory() / 1e9,
    }
