"""transformers' own common model and configuration tests, from the source distribution of the installed version."""

from pathlib import Path

from transformers_common.source_tests import run_common_tests

# Far fewer would mean that the suite no longer sees the model classes.
LEAST_PASSED = 80


def test_common_model_tests_of_transformers(tmp_path: Path):
    assert run_common_tests("common_model_tests.py", tmp_path)["passed"] >= LEAST_PASSED
