"""From rows on disk to a corpus that trains: the memory-mapped form, gene statistics, and leading gene vectors.

A corpus folder holds `data/*.parquet` (one slide each, the form to publish), and from `assemble` on `genes.json`,
`gene_vectors.safetensors`, `arrow/` (the same rows, memory-mapped in training) and, last, `corpus.json`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from data_processing.gene_statistics import GeneSums, leading_gene_vectors
from data_processing.open_corpus import ARROW_FOLDER, CORPUS_FILE, Corpus
from data_processing.st_corpus import STCorpus
from data_processing.writing import write_whole
from modeling_stimg import GeneVocabulary, STPatchProcessor
from modeling_stimg.model_files import check_weights

VECTORS_FILE = "gene_vectors.safetensors"


def assemble(
    folder: Path,
    files: Sequence[Path],
    vocabulary: GeneVocabulary,
    target_sum: float = 1e4,
    rank: int = 256,
    num_proc: int = 1,
    seed: int = 0,
    progress: bool = True,
    vector_smoothing: int = 0,
) -> Corpus:
    """Make a corpus folder ready for training; what was there before is replaced as a whole.

    Args:
        folder: of the corpus. files: its rows, Parquet files of one slide each in the folder, in their order.
        target_sum: counts per spot that means, deviations and vectors are computed at.
        rank: how many leading gene vectors; 0 = none.
        num_proc: processes that write the memory-mapped form.
        vector_smoothing: `smoothing` of `leading_gene_vectors`.

    Raises:
        ValueError: no files.
    """
    for stale in (CORPUS_FILE, VECTORS_FILE):
        (folder / stale).unlink(missing_ok=True)  # from here on the corpus is not whole
    _write_arrow(folder, files, num_proc)
    vocabulary.save(folder)
    corpus = Corpus(folder, unfinished=True)
    images = corpus.images(STPatchProcessor(vocabulary, target_sum=target_sum))
    sums = GeneSums.of(images, progress)
    vocabulary = vocabulary.with_statistics(*sums.moments(), share=sums.shares())
    if rank > 0:
        vectors = leading_gene_vectors(
            images, vocabulary.mean, vocabulary.deviation, rank, seed, progress=progress, smoothing=vector_smoothing
        )
        temporary = folder / f"{VECTORS_FILE}.tmp"
        # safetensors writes the bytes as they lie in memory, whatever the strides say.
        save_file({"vectors": np.ascontiguousarray(vectors)}, temporary)
        temporary.replace(folder / VECTORS_FILE)
    vocabulary.save(folder)
    facts = {"slides": len(files), "vocabulary": vocabulary.ids_sha256, "target_sum": float(target_sum)}
    facts["vector_smoothing"] = vector_smoothing
    facts["shards"] = [file.relative_to(folder).as_posix() for file in files]
    write_whole(folder / CORPUS_FILE, (json.dumps(facts, indent=1) + "\n").encode("utf-8"))
    return Corpus(folder)


def _write_arrow(folder: Path, files: Sequence[Path], num_proc: int) -> None:
    """The rows as one memory-mapped dataset in `arrow/`."""
    cache, temporary, target = (folder / name for name in (".cache", f"{ARROW_FOLDER}.tmp", ARROW_FOLDER))
    for leftover in (cache, temporary):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        builder = STCorpus(cache_dir=str(cache), config_name="corpus", files=tuple(map(str, files)))
        builder.download_and_prepare(num_proc=num_proc if num_proc > 1 and len(files) > 1 else None)
        builder.as_dataset(split="train").save_to_disk(str(temporary), num_proc=None)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def content_hash(files: Sequence[Path]) -> str:
    """sha256 over the content of rows, whatever compression or machine wrote their files."""
    digest = hashlib.sha256()
    for file in files:
        for column in pq.read_table(file).combine_chunks().columns:
            for chunk in column.chunks:
                for buffer in chunk.buffers():
                    digest.update(b"none" if buffer is None else buffer)
    return digest.hexdigest()


def load_vectors(corpus: Corpus, target_sum: float | str, rank: int, smoothing: int = 0) -> np.ndarray | None:
    """The first `rank` leading gene vectors of a corpus, float32 (vocabulary, rank).

    None where it has fewer, or those of another `target_sum` or smoothing.

    Raises:
        ValueError: the file is damaged or cut off.
    """
    path = corpus.folder / VECTORS_FILE
    same = target_sum == corpus.target_sum and smoothing == corpus.facts.get("vector_smoothing", 0)
    if not path.exists() or not same:
        return None
    check_weights(path, str(corpus.folder))
    with safe_open(path, "np") as file:
        vectors = file.get_slice("vectors")
        return vectors[:, :rank] if vectors.get_shape()[1] >= rank else None
