"""From checkpoint to evidence: splits, probes, baselines and reports. Not part of the wheel."""
