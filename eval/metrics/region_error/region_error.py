"""Errors of reconstructed expression, as a module of `evaluate`."""

import datasets
import evaluate

from eval.scoring import region_scores

DESCRIPTION = "How far predicted expression of a masked region is from what was measured there."
INPUTS = """
Args:
    predictions: list of lists of float (spots, genes), predicted log1p values.
    references: list of lists of float (spots, genes), measured log1p values.

Returns:
    {"mse": float, "mae": float, "pearson": float}: mean squared and mean absolute error over all entries, and Pearson's
    correlation over spots, averaged over the genes that vary (NaN where none does).
"""
CITATION = "The task is that of arXiv 2603.13432."


class RegionError(evaluate.Metric):
    """`compute(predictions=..., references=...)` -> {"mse", "mae", "pearson"}."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Sequence(datasets.Value("float64")) for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[float]]) -> dict[str, float]:
        return region_scores(predictions, references)
