"""A few seconds of `fuzz_readers.py`: whatever is damaged, a slide is read as promised, or refused in a sentence."""

from pathlib import Path

import numpy as np
import pytest
from fuzz_readers import KINDS, broken_promise, make_case, read, valid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_stimg import read_slide


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_undamaged_slides_are_read(kind: str):
    """Else the fuzzing would fuzz nothing."""
    folder, name = valid(kind)
    assert read(folder / name, {}).what == "read"
    assert broken_promise(read_slide(folder / name)) == ""


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@given(number=st.integers(0, 2**32 - 1))
def test_damaged_slides_are_read_or_refused_in_a_sentence(
    kind: str, number: int, tmp_path_factory: pytest.TempPathFactory
):
    folder: Path = tmp_path_factory.mktemp("case")
    slide, options = make_case(kind, np.random.default_rng(number), folder, bytes_of_hdf5=False)
    outcome = read(slide, options)
    assert outcome.what in ("read", "refused"), f"{folder}: {options}: {outcome.why}"
