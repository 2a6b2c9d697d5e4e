"""Memory that a training step frees stays with the process, for the next step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**30


def keep_freed_memory() -> bool:
    """Let glibc reuse large blocks instead of handing them back to the kernel.

    It maps everything beyond 32 MiB anew, and a batch's activations are that large: at every step the kernel then
    clears and maps the same pages again, about a tenth of a mobilenetv3 step at 128 px (docs/measurements.md).

    Returns:
        Whether this process runs on glibc, and took it.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl
        return False
    # glibc on 32-bit machines takes no more than 512 KiB and says 0.
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST - 1)
    )
