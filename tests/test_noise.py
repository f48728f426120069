"""Counter-based noise: the same bits everywhere, uniform, and fixed for ever."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from modeling_stimg.noise_stimg import counter_hash, counter_uniform, mask_noise, stream_key, window_uniforms

WORD = (1 << 64) - 1


def split_mix(key: int, counter: int) -> int:
    """SplitMix64 (Steele, Lea and Flood 2014) in Python's unbounded integers."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_hash_has_the_same_bits_in_numpy_torch_and_plain_integers(key: int, counters: list[int]):
    expected = [split_mix(key & WORD, c) for c in counters]
    assert [h & WORD for h in counter_hash(key, np.array(counters)).tolist()] == expected
    assert [h & WORD for h in counter_hash(key, torch.tensor(counters)).tolist()] == expected
    keys = torch.tensor([[key], [~key]])  # many windows at once
    uniform = counter_uniform(keys, torch.tensor(counters))
    assert torch.equal(uniform, torch.from_numpy(counter_uniform(keys.numpy(), np.array(counters))))
    assert uniform[0].tolist() == [((e >> 12) + 0.5) * 2.0**-52 for e in expected]


def test_uniforms_are_uniform_and_streams_differ():
    draws = [counter_uniform(stream_key(s, w, k), np.arange(20_000)) for s, w, k in ((0, 0, 1), (0, 1, 1), (0, 0, 2))]
    for draw in draws:
        assert 0 < draw.min() < draw.max() < 1
        assert stats.kstest(draw, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(draws)[np.triu_indices(3, 1)]).max() < 0.03
    noise = mask_noise(0, 0, (4, 50, 100))
    assert noise.dtype == np.float32
    assert 0 <= noise.min() < noise.max() < 1
    assert stats.kstest(noise.ravel(), "uniform").pvalue > 1e-4


def test_known_values_do_not_move():
    """A change of these changes every seeded result that was ever published."""
    assert stream_key(0, 0, 1) == 6235967106033911276
    assert counter_hash(stream_key(7, 3, 1), np.arange(2)).tolist() == [9039918076914087103, 2273161980084142884]
    assert (mask_noise(7, 3, (2, 2)) * 2**24).tolist() == [[4106017.0, 15924673.0], [16699448.0, 13328340.0]]
    assert window_uniforms(7, 3) == tuple(np.random.default_rng([7, 3]).random(2))
