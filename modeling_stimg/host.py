"""What the CPU of this machine offers, and how this process' C library handles freed memory."""

import ctypes
import sys

import torch

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have freed memory reused by this process instead of given back: for training on a CPU.

    glibc maps every block of 32 MB or more anew, which is a batch's widest activations: each step the kernel zeroes
    them page by page, up to a sixth of the step's time. The price is that memory never shrinks.

    Returns:
        Whether it took effect; elsewhere than on glibc there is nothing to do.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products in bfloat16. Without them they take tens of times as long."""
    if hasattr(torch.cpu, "get_capabilities"):
        return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return torch.cpu._is_avx512_bf16_supported()  # an older torch, which tells of x86 alone
