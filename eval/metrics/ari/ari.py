"""Adjusted Rand index, as a module of `evaluate`."""

import datasets
import evaluate

from eval.scoring import cluster_scores

DESCRIPTION = (
    "Adjusted Rand index: how far two groupings of the same spots agree, whatever the groups are called. 1 for the "
    "same grouping, 0 on average for groupings that have nothing to do with each other."
)
INPUTS = """
Args:
    predictions: list of int, group of every spot, such as a cluster or a predicted class.
    references: list of int, annotated class of every spot. Leave spots without a class out of both.

Returns:
    {"ari": float}
"""
CITATION = "Hubert & Arabie, Comparing partitions, Journal of Classification 2, 193-218 (1985)."


class AdjustedRandIndex(evaluate.Metric):
    """`compute(predictions=..., references=...)` -> {"ari"}."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("int64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return cluster_scores(predictions, references)
