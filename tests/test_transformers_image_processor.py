"""transformers' own common image-processor tests, from the source distribution of the installed version."""

from pathlib import Path

from transformers_common.source_tests import run_common_tests

# Far fewer would mean that the suite no longer sees the processor class.
LEAST_PASSED = 20


def test_common_image_processor_tests_of_transformers(tmp_path: Path):
    # One of the common tests of image processors calls itself slow; it takes seconds.
    counts = run_common_tests("common_image_processor_tests.py", tmp_path, RUN_SLOW="1")
    assert counts["passed"] >= LEAST_PASSED
