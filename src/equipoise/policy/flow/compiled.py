"""Compiling the planner's loops.

numba notices a change of the file that a kernel stands in, not of the files that it calls: so a
kernel calls only kernels of its own file, or a cached one could be out of date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def kernel(function: Function) -> Function:
    """Compile a function at its first call, without the interpreter lock.

    The machine code is kept on disk where numba finds a place that it can write to (beside the
    file, the user's cache, NUMBA_CACHE_DIR); elsewhere each process compiles anew.
    """
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba's word for "no place to keep it"
        compiled = numba.njit(nogil=True)(function)
    return cast(Function, compiled)
