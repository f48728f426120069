"""The rows of the table: features of a slide's spots, from models and from what costs nothing.

A `Method` gives the features of a slide for probes within it, and the features of several slides in common terms for
probes across slides. Both come unsmoothed: every method gets the same neighbourhood means, so that none wins by blur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from eval.aggregate import smoothing_name
from eval.baselines.across_slides import shared_components, shared_expression
from eval.baselines.expression import coordinates_only, neighbourhood_mean, principal_components, raw_expression
from eval.baselines.shuffled import shuffle_spots, shuffled_order
from eval.embedders import Embedder, EncoderEmbedder, cached
from eval.evaluation_sets import EvaluationSlide

BY_DEFAULT = ", as embed_slide writes it"
SHUFFLED = ", counts shuffled"
Found = TypeVar("Found")
Within = Callable[[EvaluationSlide], np.ndarray]
Across = Callable[[Sequence[EvaluationSlide], EvaluationSlide], list[np.ndarray]]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: of the row. within: features of one slide, float32 (n_obs, width). across: of training slides and a test
            slide in common terms, in that order; None where `within` does that already.
        smoothed: whether it is shown after neighbourhood means, too. seen: what its model saw of a slide.
    """

    name: str
    within: Within
    across: Across | None = None
    smoothed: bool = True
    seen: Callable[[EvaluationSlide], str | None] = lambda slide: None

    def on_slides(self, training: Sequence[EvaluationSlide], test: EvaluationSlide) -> list[np.ndarray]:
        """Features of the training slides, then of the test slide, in common terms."""
        if self.across is not None:
            return self.across(training, test)
        return [self.within(slide) for slide in (*training, test)]


def baseline_methods(seed: int = 0) -> list[Method]:
    """Raw expression, its principal components, bare coordinates, and raw expression on the wrong spots.

    The last one is what a mean over neighbours gains by telling where a spot lies, and nothing else.
    """

    def raw(slide: EvaluationSlide) -> np.ndarray:
        return raw_expression(slide.adata.X)

    def components(slide: EvaluationSlide) -> np.ndarray:
        return principal_components(slide.adata.X, seed=seed)

    def raw_across(training: Sequence[EvaluationSlide], test: EvaluationSlide) -> list[np.ndarray]:
        return shared_expression([slide.adata for slide in training], test.adata)

    def components_across(training: Sequence[EvaluationSlide], test: EvaluationSlide) -> list[np.ndarray]:
        return shared_components([slide.adata for slide in training], test.adata, seed=seed)

    def on_wrong_spots(features: np.ndarray) -> np.ndarray:
        return features[shuffled_order(len(features), seed)]

    def shuffled_across(training: Sequence[EvaluationSlide], test: EvaluationSlide) -> list[np.ndarray]:
        return [on_wrong_spots(features) for features in raw_across(training, test)]

    return [
        Method("raw", raw, raw_across),
        Method("PCA", components, components_across),
        Method("coordinates only", lambda slide: coordinates_only(slide.rows, slide.cols)),
        Method("raw, counts shuffled", lambda slide: on_wrong_spots(raw(slide)), shuffled_across),
    ]


def embedder_methods(embedders: Sequence[Embedder], cache: Path) -> list[Method]:
    """A row of every embedder, and of a trained encoder one more: what `embed_slide` writes when not told otherwise.

    A model that takes no neighbourhood mean by default writes just what stands in its first row.
    """
    methods = []
    for embedder in embedders:
        embed = cached(embedder, cache)
        methods.append(Method(embedder.name, embed, seen=embedder.seen))
        if isinstance(embedder, EncoderEmbedder) and embedder.has_default and embedder.options["smoothing"]:
            by_default = partial(_by_default, embedder, embed)
            methods.append(Method(embedder.name + BY_DEFAULT, by_default, smoothed=False, seen=embedder.seen))
    return methods


def written_method(embedder: EncoderEmbedder, cache: Path) -> Method:
    """A row of what `embed_slide` writes with the embedder's options; made once a slide, and kept without its mean."""
    by_default = partial(_by_default, embedder, cached(embedder, cache))
    return Method(embedder.name, once_a_slide(by_default), seen=embedder.seen)


def after_mean(method: Method, radius: int) -> Method:
    """The same features after the neighbourhood mean of a radius in sites, as a row of its own."""

    def across(training: Sequence[EvaluationSlide], test: EvaluationSlide) -> list[np.ndarray]:
        slides = [*training, test]
        return [smoothed(f, s, radius) for f, s in zip(method.on_slides(training, test), slides, strict=True)]

    def within(slide: EvaluationSlide) -> np.ndarray:
        return smoothed(method.within(slide), slide, radius)

    mean = f", {smoothing_name(radius)} mean" if radius else ""
    return replace(method, name=method.name + mean, within=within, across=across)


def on_shuffled_counts(method: Method, seed: int) -> Method:
    """A control: the same features of slides whose spots have swapped their counts (`eval/baselines/shuffled.py`)."""
    shuffled = once_a_slide(lambda slide: replace(slide, adata=shuffle_spots(slide.adata, seed)))

    def across(training: Sequence[EvaluationSlide], test: EvaluationSlide) -> list[np.ndarray]:
        return method.on_slides([shuffled(slide) for slide in training], shuffled(test))

    return replace(
        method, name=method.name + SHUFFLED, within=lambda slide: method.within(shuffled(slide)), across=across
    )


def once_a_slide(function: Callable[[EvaluationSlide], Found]) -> Callable[[EvaluationSlide], Found]:
    """The same function, called once for every slide; what it gave is kept in memory."""
    found: dict[int, tuple[EvaluationSlide, Found]] = {}

    def remembered(slide: EvaluationSlide) -> Found:
        if id(slide) not in found:
            found[id(slide)] = slide, function(slide)  # the slide is held, so that no other gets its id
        return found[id(slide)][1]

    return remembered


def smoothed(features: np.ndarray, slide: EvaluationSlide, radius: int) -> np.ndarray:
    """The mean over the (2 * radius + 1)-sided square of sites around each spot; with radius 0 the features."""
    return features if radius == 0 else neighbourhood_mean(features, slide.rows, slide.cols, radius)


def _by_default(embedder: EncoderEmbedder, embed: Within, slide: EvaluationSlide) -> np.ndarray:
    return embedder.smoothed_by_default(slide, embed(slide))
