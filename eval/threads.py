"""Many small computations on all cores, each on one thread: its bits do not depend on how many cores there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

Item = TypeVar("Item")
Result = TypeVar("Result")


@cache
def _controller() -> ThreadpoolController:
    """Of the libraries that are loaded; looking for them takes longer than a small probe."""
    import sklearn.cluster  # noqa: F401 - which brings its own OpenMP

    return ThreadpoolController()


def one_thread() -> AbstractContextManager:
    """A context in which NumPy, SciPy and scikit-learn use a single thread."""
    return _controller().limit(limits=1)


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
