"""Metrics for `evaluate.load("eval/metrics/ari")`, without any network; each wraps a function of `eval/scoring.py`."""
