"""Accuracy, adjusted Rand index and macro F1 of a probe, as a module of `evaluate`."""

import datasets
import evaluate

from eval.scoring import probe_scores

DESCRIPTION = "How well a probe on frozen embeddings predicts the annotated classes of test spots."
INPUTS = """
Args:
    predictions: list of int, predicted class of every test spot.
    references: list of int, annotated class of every test spot.

Returns:
    {"accuracy": float, "ari": float, "macro_f1": float}; macro F1 is the mean over every class that is among the
    references or the predictions.
"""
CITATION = "The probes are those of arXiv 2603.13432."


class ProbeAccuracy(evaluate.Metric):
    """`compute(predictions=..., references=...)` -> {"accuracy", "ari", "macro_f1"}."""

    def _info(self) -> evaluate.MetricInfo:
        features = {name: datasets.Value("int64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return probe_scores(predictions, references)
