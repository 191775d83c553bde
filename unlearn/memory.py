"""Telling an exhausted memory from other errors, and saying so: where it was, and what needs less."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from unlearn.collective import alarm
from unlearn.errors import UnlearnError

# In lower case, with blanks for underscores. A library's handle that was not created (CUBLAS_STATUS_NOT_INITIALIZED)
# is none of them: it has other causes as well.
_SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, MPS
    "can't allocate memory",  # torch's allocator for CPUs
    "not enough memory",  # the same on Windows
    "cannot allocate memory",  # the system's ENOMEM, as libraries pass it on
    "unable to allocate",  # numpy's
    "bad alloc",
    "alloc failed",  # CUBLAS_STATUS_ALLOC_FAILED, and those of CUDNN, CUSOLVER, CUSPARSE, HIPBLAS
    "allocation failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, HPUs
    "allocation failure",  # XPU
    "rocblas status memory error",
    "out of device memory",  # XPU
    "out of host memory",
    "out of resources",
    "insufficient memory",  # MPS
    "invalid buffer size",
    "no executable batch size found",  # accelerate, after it has tried a single row
)
_ELSEWHERE = "in another process"
_LONGEST = 160  # characters of a library's own words
_LESS = "a smaller model.dtype or a device with more memory"


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch's devices, their libraries and the system raise when there is no more memory."""
    if isinstance(error, UnlearnError):  # it has been told
        return False
    # classes of other libraries by their names, so that commands which need no torch can ask
    kind = type(error).__name__
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = str(error).lower().replace("_", " ")
    # not of every kind: other errors may quote the user's own texts
    return (isinstance(error, RuntimeError | OSError) or kind == "SafetensorError") and any(s in said for s in _SIGNS)


@contextmanager
def told(where: str, advice: str) -> Iterator[None]:
    """Make of an exhausted memory one message for the user; other errors pass.

    Args:
        where: The stage, or the part of it.
        advice: What to do there, up to "or ...", which is the same everywhere.

    Raises:
        UnlearnError: the memory is exhausted.
    """
    try:
        yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        words = " ".join(str(e).split()).rstrip(".")
        said = f" ({words[:_LONGEST]}{'...' if len(words) > _LONGEST else ''})" if words else ""
        message = f"{where}: out of memory{said}. To need less, {advice}; or choose {_LESS}"
        if _ELSEWHERE not in words:
            alarm(message)
        raise UnlearnError(message) from e
