"""Keeps freed memory in the process, for the large buffers that decoding and CPU training reuse."""

import ctypes

# Numbers of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tells glibc not to hand freed memory back to the system; False where there is no glibc.

    By default it does so at every free of a large buffer. In the quickstart page faults then take a
    fifth of the CPU time, and a seventh of that of decoding JPEGs of ImageNet's size. The price is
    that memory stays at its peak. Environment variables of the same purpose
    (MALLOC_TRIM_THRESHOLD_, ...) work only when set before the process starts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(
        mallopt(option, value)
        for option, value in (
            (_MMAP_THRESHOLD, 2**30),  # bytes; below it memory comes from heaps, which stay
            (_TRIM_THRESHOLD, 2**31 - 1),
            (_TOP_PAD, 256 << 20),
        )
    )
