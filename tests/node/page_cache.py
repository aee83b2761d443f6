"""What of a file is in the page cache, as the kernel says."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
MAP_FAILED = ctypes.c_void_p(-1).value


def resident_share(file: Path) -> float:
    """How much of a file is in the page cache, from 0 to 1.

    Of a file that this user may neither write nor owns the kernel does not tell, and says that all is there.

    Raises:
        OSError: the file cannot be read, or is empty.
    """
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == MAP_FAILED:
            raise os_error(file)
        try:
            if libc.mincore(address, size, pages) != 0:
                raise os_error(file)
        finally:
            libc.munmap(address, size)
    finally:
        os.close(descriptor)
    return sum(page & 1 for page in pages.raw) / len(pages.raw)


def os_error(file: Path) -> OSError:
    """What the last call into the C library said."""
    return OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
