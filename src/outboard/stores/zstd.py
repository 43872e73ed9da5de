"""Zstandard for compiled loops: a chunk unpacked without the interpreter and without the GIL.

The wheel of python-zstandard keeps the library that it wraps to itself, so this is the system's own, libzstd.so.1
(Debian's libzstd1, which dpkg itself needs). Where it is missing :data:`AVAILABLE` is false and everything else works.

Source: zstd.h, ZSTD_decompressDCtx.
"""

from __future__ import annotations

import ctypes
from typing import Any

from llvmlite import binding
from numba import njit, types

from outboard.errors import RefusedError

_LIBRARY = "libzstd.so.1"


def _load() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        # Compiled code names the function wherever it may be called from, so that the name must lead somewhere.
        binding.add_symbol("ZSTD_decompressDCtx", ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value)
        return None
    binding.load_library_permanently(_LIBRARY)
    library.ZSTD_createDCtx.restype = ctypes.c_void_p
    library.ZSTD_freeDCtx.argtypes = [ctypes.c_void_p]
    return library


_library = _load()
AVAILABLE = _library is not None
_decompress: Any = types.ExternalFunction(
    "ZSTD_decompressDCtx", types.uint64(types.uintp, types.uintp, types.uint64, types.uintp, types.uint64)
)


@njit("uint64(uintp, uintp, uint64, uintp, uint64)", cache=True, nogil=True)
def unpack(context: int, into: int, room: int, packed: int, length: int) -> int:
    """Unpack ``length`` bytes at address ``packed`` to ``into``; how many came, or a number beyond ``room``: an error.

    :param context: of :func:`make_context`, used by one thread at a time.
    """
    return _decompress(context, into, room, packed, length)  # type: ignore[no-any-return]


def make_context() -> int:
    """What :func:`unpack` works with; :func:`free_context` gives it back.

    :raise RefusedError: ``no-zstd``: this host has no libzstd.
    """
    if _library is None:
        raise RefusedError("no-zstd", f"snapshots are unpacked by {_LIBRARY}, which this host lacks; install libzstd1")
    context = _library.ZSTD_createDCtx()
    if not context:
        raise MemoryError("ZSTD_createDCtx")
    return int(context)


def free_context(context: int) -> None:
    """Give a context back."""
    if _library is not None:
        _library.ZSTD_freeDCtx(context)
