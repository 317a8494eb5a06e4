"""How the C library keeps memory: what a message of megabytes needs is not given back in between.

By default glibc maps every large block anew and unmaps it when it is freed. A state in a message passes through half a
dozen such blocks, and the kernel clears each of their pages again each time: most of the seconds that a large message
takes are that. Kept, the blocks are warm when the next message comes. The price is that a process stays at its peak.
"""

import ctypes

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Keep freed blocks for the next ones, in one arena for all threads; does nothing where there is no glibc.

    To be called before threads are started: each would have an arena of its own, and blocks of its own.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT)):
        mallopt(option, value)
