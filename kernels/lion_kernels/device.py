"""The decorator of functions that kernels call."""

import triton


def device_function(function):
    """`triton.jit` for a function that kernels call, with its part of a kernel's cache key made at once.

    Triton 3.6 leaves a callee's global constants out of the key of its caller where the callee has no key of
    its own yet. The name of a kernel in the disk cache would then depend on what the process had launched
    before, and a kernel that is there would be compiled again. Callees are defined before their callers.
    """
    compiled = triton.jit(function)
    # The interpreter's functions have no key.
    getattr(compiled, "cache_key", None)
    return compiled
