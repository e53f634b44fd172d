"""What a rank says of the exception that ends it."""

from __future__ import annotations

from cineline.core.control import Failed
from cineline.errors import CinelineError, EdgeBroken, reason
from cineline.rank.pulse import Pulse

NO_MEMORY = ("out of memory", "can't allocate memory", "status_alloc_failed")
"""Words of the RuntimeErrors that torch raises for want of memory: drivers', the CPU allocator's, CUDA libraries'."""


def failure_of(error: Exception, pulse: Pulse, device: str) -> Failed:
    """The failure, with the request whose turn it was, where it is any request's.

    Args:
        pulse: what the rank was at. device: where it computes.
    """
    own = error if isinstance(error, CinelineError) else None
    words = f"{type(error).__name__}: {error}"
    out_of_memory = _is_out_of_memory(error)
    if out_of_memory:
        where = f" in {pulse.words}" if pulse.words else ""
        words = (
            f"{device or 'the host'} has no memory left{where} ({type(error).__name__}: {reason(error)}): "
            "use a smaller size or fewer frames, more stages, or fewer requests in flight"
        )
    # What a device reports late may be of an item before.
    nobodys = isinstance(error, EdgeBroken) or (type(error).__name__ == "AcceleratorError" and not out_of_memory)
    return Failed(words, own, None if nobodys else pulse.request, out_of_memory)


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be loaded
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in NO_MEMORY)
