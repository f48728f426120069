"""Many small computations on all cores, each on one thread: its bits do not depend on how many cores there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from modeling_stimg.clustering import one_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`function` of every item, in their order; as many at a time as torch would use threads (`OMP_NUM_THREADS`).

    For functions that spend their time in NumPy, SciPy or torch, which leave the interpreter to others meanwhile.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_thread(), ThreadPoolExecutor(min(num_threads, max(len(items), 1))) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(num_threads)
