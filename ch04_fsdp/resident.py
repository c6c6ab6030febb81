"""The memory of a CPU process as the kernel and malloc count it, from glibc itself. Elsewhere nothing happens.

As it is, glibc keeps freed memory for later: a process that held 1 GiB for a moment looks as if it held it for good.
`return_at_once` makes each block above 64 KiB a mapping of its own, which goes back to the kernel when it is freed.
Then the resident set is what lives, at the price of a page fault for each new page: not for timing.
"""

from __future__ import annotations

import ctypes
import functools
import sys

TRIM, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # mallopt's names for them: malloc.h
SMALL = 64 * 1024
LARGE = 32 * 2**20  # what glibc's own threshold grows to


class _MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h. In use: uordblks bytes of the heaps, hblkhd in mappings of their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, if it is a glibc that can be asked (2.33 or newer)."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype = _MallInfo
    return libc


def return_at_once(on: bool = True) -> bool:
    """Give freed memory back at once, or again keep it as glibc comes to do by itself. False: it cannot be told."""
    libc = _libc()
    if libc is None:
        return False
    libc.mallopt(MMAP_THRESHOLD, SMALL if on else LARGE)
    libc.mallopt(TRIM, SMALL if on else 2 * LARGE)
    libc.mallopt(TOP_PAD, 0 if on else SMALL)
    libc.mallopt(MMAP_MAX, 2**20)
    libc.malloc_trim(0)
    return True


def malloc_bytes() -> int | None:
    """Bytes that malloc has given out and that were not freed: of torch's tensors, gloo, oneDNN, Python and all."""
    libc = _libc()
    if libc is None:
        return None
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)
