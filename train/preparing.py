"""What pretraining starts from: a processor with gene statistics, and slides as images, from files or from a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from data_processing.image_views import ImageView, RenumberedImages
from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor
from train.arguments import CorpusArguments, ModelArguments
from train.continuing import Parent, keep_statistics
from train.validation import choose_validation

if TYPE_CHECKING:
    from data_processing.open_corpus import Corpus


@dataclass
class Prepared:
    """What a run trains on.

    Attributes:
        images: slides to train on, and `records` what to tell of them. held_out_images: those to evaluate on.
        corpus: of the Hub, `ORG/NAME@COMMIT`, that they come from.
    """

    processor: STPatchProcessor
    images: Sequence[SlideImage]
    records: list[SlideRecord]
    held_out_images: Sequence[SlideImage]
    held_out_records: list[SlideRecord]
    corpus: str | None = None


def prepare(
    corpus: CorpusArguments, model: ModelArguments, seed: int, tell: bool, parent: Parent | None = None
) -> Prepared:
    """The processor, the slides as it sees them, and what to tell of them, apart for training and evaluation.

    Args:
        seed: of the draw of held-out slides. tell: how many genes of every slide matched. parent: whose genes and
            statistics are gone on from.
    """
    if corpus.corpus:
        return open_prepared(corpus.corpus, corpus, model, seed, parent)
    slides = read_slides(find_slides(corpus.slides, corpus.exclude), progress=tell)
    records = slide_records(slides)
    held_out = set(choose_validation(records, corpus.validation_slides, seed, seen_names(parent)))
    training = {name: adata for name, adata in slides.items() if name not in held_out}
    processor, images = build_processor(training, corpus, model, tell, parent)
    aside = slide_images({name: slides[name] for name in slides if name in held_out}, processor)
    return Prepared(processor, images, *_apart(records, held_out, aside))


def _apart(
    records: list[SlideRecord], held_out: set[str], held_out_images: Sequence[SlideImage]
) -> tuple[list[SlideRecord], Sequence[SlideImage], list[SlideRecord]]:
    return [r for r in records if r.name not in held_out], held_out_images, [r for r in records if r.name in held_out]


def seen_names(parent: Parent | None) -> list[str]:
    """Names of the slides that a parent saw."""
    return [] if parent is None else [record.name for record in parent.seen]


def processor_options(corpus: CorpusArguments, model: ModelArguments) -> dict[str, Any]:
    """Options of the processor that do not wait for statistics of genes."""
    return {
        "window_size": model.window_size,
        "num_channels": model.num_channels,
        "compaction": corpus.compaction,
        "gene_selection": corpus.gene_selection,
        "min_observed": corpus.min_observed,
        "sample_unit": model.sample_unit,
    }


def build_processor(
    slides: dict[str, AnnData],
    corpus: CorpusArguments,
    model: ModelArguments,
    tell: bool,
    parent: Parent | None = None,
) -> tuple[STPatchProcessor, list[SlideImage]]:
    """The processor over the slides' genes, with their statistics, and the slides as it sees them.

    Genes that a parent knows come first and keep its statistics.

    Images do not depend on `normalization`, which applies to windows: one pass serves statistics and training. Only
    `target_sum="panel"` takes a second one, because it needs the genes' shares first.
    """
    vocabulary = vocabulary_of(slides, corpus.gene_table)
    if parent is not None:
        vocabulary, _ = parent.processor.vocabulary.extended_by(vocabulary)
    options = processor_options(corpus, model)
    total = {"target_sum": 1e4 if corpus.target_sum == "panel" else corpus.target_sum}
    images = slide_images(slides, STPatchProcessor(vocabulary, **options, **total), tell=tell)
    sums = GeneSums.of(images)
    vocabulary = _after_parent(vocabulary.with_statistics(*sums.moments(), share=sums.shares()), parent)
    if corpus.target_sum == "panel":
        total = {"target_sum": "panel"}
        images = slide_images(slides, STPatchProcessor(vocabulary, **options, **total))
        vocabulary = _after_parent(vocabulary.with_statistics(*gene_moments(images)), parent)
    return STPatchProcessor(vocabulary, normalization=corpus.normalization, **options, **total), images


def _after_parent(vocabulary: GeneVocabulary, parent: Parent | None) -> GeneVocabulary:
    return vocabulary if parent is None else keep_statistics(parent.processor.vocabulary, vocabulary)


def open_prepared(
    given: str, corpus: CorpusArguments, model: ModelArguments, seed: int, parent: Parent | None
) -> Prepared:
    """The same for a corpus, whose gene statistics are used where they were computed at this `target_sum`."""
    from data_processing.open_corpus import Corpus, find_corpus

    found = find_corpus(given)
    built = Corpus(found.folder)
    records = built.records()
    held_out = set(choose_validation(records, corpus.validation_slides, seed, seen_names(parent)))
    kept = [i for i, record in enumerate(records) if record.name not in held_out]
    vocabulary, options = built.vocabulary, {**processor_options(corpus, model), "target_sum": corpus.target_sum}
    if corpus.target_sum != built.target_sum:
        training = ImageView(built.images(STPatchProcessor(vocabulary, **options)), kept)
        vocabulary = vocabulary.with_statistics(*GeneSums.of(training, progress=True).moments())
    images: Sequence[SlideImage]
    if parent is None:
        images = built.images(STPatchProcessor(vocabulary, **options))
    else:
        vocabulary, images = renumbered(built, vocabulary, options, parent.processor.vocabulary)
    processor = STPatchProcessor(vocabulary, normalization=corpus.normalization, **options)
    aside = ImageView(images, [i for i in range(len(records)) if i not in set(kept)])
    images = ImageView(images, kept) if held_out else images
    return Prepared(processor, images, *_apart(records, held_out, aside), corpus=found.hub)


def renumbered(
    built: "Corpus", vocabulary: GeneVocabulary, options: dict[str, Any], known: GeneVocabulary
) -> tuple[GeneVocabulary, RenumberedImages]:
    """A corpus with its genes numbered as an older vocabulary does, which is extended by those that it lacks.

    Args:
        vocabulary: the corpus' own, with statistics. options: of the processor. known: the older one.

    Raises:
        ValueError: two genes of the corpus are one gene there.
    """
    extended, numbers = known.extended_by(vocabulary)
    if len(np.unique(numbers)) < len(numbers):
        raise ValueError(
            f"{len(numbers) - len(np.unique(numbers))} genes of the corpus are another of its genes in the model that "
            "is gone on from: build the corpus with the gene table that the model's slides were read with."
        )
    statistics = {}
    for name in ("mean", "deviation", "share"):
        of_corpus = getattr(vocabulary, name)
        statistics[name] = np.zeros(len(extended), dtype=np.float32)
        statistics[name][numbers] = of_corpus
    extended = keep_statistics(known, extended.with_statistics(**statistics))
    # The corpus reads its rows by its own numbers, with the statistics of the genes that these stand for.
    own = vocabulary.with_statistics(**{name: getattr(extended, name)[numbers] for name in statistics})
    images = built.images(STPatchProcessor(own, **options))
    return extended, RenumberedImages(images, numbers, len(extended))


def gene_vectors(
    processor: STPatchProcessor, images: Sequence[SlideImage], rank: int, seed: int, smoothing: int = 0
) -> np.ndarray:
    """Leading gene vectors float32 (vocabulary, rank): those that a corpus holds, else computed."""
    built = getattr(images, "corpus", None)
    if built is not None:
        from data_processing.assembling import load_vectors

        known = load_vectors(built, processor.target_sum, rank, smoothing)
        if known is not None:
            return known
    mean, deviation = processor.vocabulary.mean, processor.vocabulary.deviation
    return leading_gene_vectors(images, mean, deviation, rank, seed, smoothing=smoothing)
