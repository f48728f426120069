"""Scores that were written down are not computed again; anything that they depend on makes them new."""

from pathlib import Path

import numpy as np
import pytest

from eval.resumable import ScoreLog, content_key


def test_a_score_is_computed_once_also_over_runs(tmp_path: Path):
    path = tmp_path / "new" / "scores.jsonl"
    calls = []

    def compute():
        calls.append(1)
        return {"ari": 0.1 + 0.2}

    for _ in range(2):
        log = ScoreLog(path)
        assert [log.get("a", compute), log.get("a", compute)] == [{"ari": 0.1 + 0.2}] * 2  # to the last bit
    assert len(calls) == 1
    assert log.num_computed == 0


@pytest.mark.parametrize("cut", range(1, 38, 4))
def test_a_line_left_half_costs_itself_alone(tmp_path: Path, cut: int):
    path = tmp_path / "scores.jsonl"
    log = ScoreLog(path)
    log.get("a", lambda: {"ari": 0.25})
    log.get("b", lambda: {"ari": 0.5})
    path.write_bytes(path.read_bytes()[:-cut])
    log = ScoreLog(path)
    assert log.known["a"] == {"ari": 0.25}
    log.get("b", lambda: {"ari": 0.75})
    log.get("c", lambda: {"ari": 1.0})
    assert set(ScoreLog(path).known) == {"a", "b", "c"}


def test_keys_tell_contents_apart():
    array = np.arange(6.0)
    parts = [
        (array,),
        (array.astype(np.float32),),
        (array.reshape(2, 3),),
        (array[::-1],),
        ([array, array],),
        ([(array, array)],),
        (array, array),
        ("a", 1),
        ("a", 1.0),
        ("a", "1"),
        ("a1",),
    ]
    assert len({content_key(*part) for part in parts}) == len(parts)
    assert content_key(array[::2]) == content_key(np.array([0.0, 2.0, 4.0]))
