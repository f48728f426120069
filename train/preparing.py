"""What pretraining starts from: a processor with gene statistics, and slides as images, from files or from a corpus."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from anndata import AnnData

from data_processing.corpus import (
    SlideRecord,
    find_slides,
    read_slides,
    slide_images,
    slide_records,
    vocabulary_of,
)
from data_processing.gene_statistics import GeneSums, gene_moments, leading_gene_vectors
from modeling_stimg import SlideImage, STPatchProcessor
from train.arguments import CorpusArguments, ModelArguments


def prepare(
    corpus: CorpusArguments, model: ModelArguments, tell: bool
) -> tuple[STPatchProcessor, Sequence[SlideImage], list[SlideRecord]]:
    """The processor, the slides as it sees them, and what to tell of them."""
    if not corpus.corpus:
        slides = read_slides(find_slides(corpus.slides, corpus.exclude))
        return *build_processor(slides, corpus, model, tell), slide_records(slides)
    return open_processor(os.path.expanduser(os.path.expandvars(corpus.corpus)), corpus, model)


def processor_options(corpus: CorpusArguments, model: ModelArguments) -> dict[str, Any]:
    """Options of the processor that do not wait for statistics of genes."""
    return {
        "window_size": model.window_size,
        "num_channels": model.num_channels,
        "compaction": corpus.compaction,
        "gene_selection": corpus.gene_selection,
        "min_observed": corpus.min_observed,
    }


def build_processor(
    slides: dict[str, AnnData], corpus: CorpusArguments, model: ModelArguments, tell: bool
) -> tuple[STPatchProcessor, list[SlideImage]]:
    """The processor over the slides' genes, with their statistics, and the slides as it sees them.

    Images do not depend on `normalization`, which applies to windows: one pass serves statistics and training. Only
    `target_sum="panel"` takes a second one, because it needs the genes' shares first.
    """
    vocabulary = vocabulary_of(slides, corpus.gene_table)
    options = processor_options(corpus, model)
    total = {"target_sum": 1e4 if corpus.target_sum == "panel" else corpus.target_sum}
    images = slide_images(slides, STPatchProcessor(vocabulary, **options, **total), tell=tell)
    sums = GeneSums.of(images)
    vocabulary = vocabulary.with_statistics(*sums.moments(), share=sums.shares())
    if corpus.target_sum == "panel":
        total = {"target_sum": "panel"}
        images = slide_images(slides, STPatchProcessor(vocabulary, **options, **total))
        vocabulary = vocabulary.with_statistics(*gene_moments(images))
    return STPatchProcessor(vocabulary, normalization=corpus.normalization, **options, **total), images


def open_processor(
    folder: str, corpus: CorpusArguments, model: ModelArguments
) -> tuple[STPatchProcessor, Sequence[SlideImage], list[SlideRecord]]:
    """The same for a corpus on disk, whose gene statistics are used where they were computed at this `target_sum`."""
    from data_processing.open_corpus import Corpus

    built = Corpus(folder)
    vocabulary, options = built.vocabulary, {**processor_options(corpus, model), "target_sum": corpus.target_sum}
    if corpus.target_sum != built.target_sum:
        images = built.images(STPatchProcessor(vocabulary, **options))
        vocabulary = vocabulary.with_statistics(*GeneSums.of(images, progress=True).moments())
    processor = STPatchProcessor(vocabulary, normalization=corpus.normalization, **options)
    return processor, built.images(processor), built.records()


def gene_vectors(processor: STPatchProcessor, images: Sequence[SlideImage], rank: int, seed: int) -> np.ndarray:
    """Leading gene vectors float32 (vocabulary, rank): those that a corpus holds, else computed."""
    built = getattr(images, "corpus", None)
    if built is not None:
        from data_processing.assembling import load_vectors

        known = load_vectors(built, processor.target_sum, rank)
        if known is not None:
            return known
    return leading_gene_vectors(images, processor.vocabulary.mean, processor.vocabulary.deviation, rank, seed)
