# Copyright 2026 The stimg authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Counter-based noise: every number is a function of (seed, window, what it is for), the same in NumPy and torch.

A window's place comes from `numpy.random.default_rng([seed, window])`; the noise of genes and masks, which is drawn by
the hundred thousand, from a counter-based hash (SplitMix64; Steele, Lea and Flood 2014) with the same integers on
every device.
"""

from typing import Any

import numpy as np

GENE_STREAM, MASK_STREAM = 1, 2

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits: torch has no unsigned arithmetic."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser on an int64 array or tensor; multiplication wraps, shifts are logical."""
    if isinstance(x, np.ndarray):
        x = x.astype(np.uint64)  # a copy, which is worked on in place
        shifted = x >> np.uint64(30)
        x ^= shifted
        x *= np.uint64(_MIX_1)
        x ^= np.right_shift(x, np.uint64(27), out=shifted)
        x *= np.uint64(_MIX_2)
        x ^= np.right_shift(x, np.uint64(31), out=shifted)
        return x.view(np.int64)
    x = (x ^ ((x >> 30) & (_WORD >> 30))) * _signed(_MIX_1)
    x = (x ^ ((x >> 27) & (_WORD >> 27))) * _signed(_MIX_2)
    return x ^ ((x >> 31) & (_WORD >> 31))


def _mix_word(x: int) -> int:
    """The same on one Python integer."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
    return x ^ (x >> 31)


def stream_key(seed: int, window: int, stream: int) -> int:
    """The int64 that starts the noise of one window."""
    key = _mix_word((int(seed) + _GOLDEN) & _WORD)
    key = _mix_word((key + int(window) * _GOLDEN) & _WORD)
    return _signed(_mix_word((key + stream * _GOLDEN) & _WORD))


def counter_hash(key: Any, counters: Any) -> Any:
    """SplitMix64 at the given counters: int64 array or tensor -> int64, the same bits in NumPy and torch.

    Args:
        key: from `stream_key`, or an int64 array or tensor of such keys. counters: int64; the two broadcast.
    """
    return _mix((counters + 1) * _signed(_GOLDEN) + key)


def counter_uniform(key: Any, counters: Any) -> Any:
    """float64 in (0, 1), exclusive at both ends: the 52 high bits of the hash, centred.

    Args:
        key, counters: as in `counter_hash`, and the same bits in NumPy and torch.
    """
    bits = (counter_hash(key, counters) >> 12) & (_WORD >> 12)
    uniform = bits.astype(np.float64) if isinstance(bits, np.ndarray) else bits.double()
    uniform += 0.5
    uniform *= 2.0**-52
    return uniform


def mask_noise(seed: int, window: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 `shape` in [0, 1): the `noise` of one window, entry `i` (flat) from the hash of (seed, window, i)."""
    bits = (counter_hash(stream_key(seed, window, MASK_STREAM), np.arange(np.prod(shape))) >> 40) & (_WORD >> 40)
    return (bits.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def window_uniforms(seed: int, window: int) -> tuple[float, float]:
    """Two numbers in [0, 1) that place window `window`: the first picks the slide (of many), the second the corner."""
    slide, corner = np.random.default_rng([seed, window]).random(2)
    return float(slide), float(corner)


__all__ = [
    "GENE_STREAM",
    "MASK_STREAM",
    "counter_hash",
    "counter_uniform",
    "mask_noise",
    "stream_key",
    "window_uniforms",
]
