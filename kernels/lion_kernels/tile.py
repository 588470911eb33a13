"""What kernels share: the decorator of functions that they call, operands, and the stop of a row."""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


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


@device_function
def as_operand(tile, KIND: tl.constexpr):
    """A tile in the dtype in which it enters a product: "fp16", "bf16" or "fp32"."""
    if KIND == "fp16":
        return tile.to(tl.float16)
    elif KIND == "bf16":
        return tile.to(tl.bfloat16)
    else:
        tl.static_assert(KIND == "fp32")
        return tile.to(tl.float32)


@device_function
def relative_change(new, old, FLOOR: tl.constexpr):
    """|new - old| / (|new| + FLOOR) per row, [BLOCK_T, BLOCK_R] -> [BLOCK_T]; inf where one is not finite."""
    moved = tl.sqrt(tl.sum((new - old) * (new - old), axis=1))
    size = tl.sqrt(tl.sum(new * new, axis=1))
    return tl.where((moved < INFINITY) & (size < INFINITY), moved / (size + FLOOR), INFINITY)


@device_function
def finite_rows(tile):
    """1 per row of numbers that are all finite, else 0: [BLOCK_T, BLOCK_D] -> [BLOCK_T]."""
    return tl.min(tl.where(tl.abs(tile.to(tl.float32)) < INFINITY, 1, 0), axis=1)


@device_function
def hold(p, KIND: tl.constexpr):
    """p in the range of the tokens' dtype, on whose edge phi' is what it is beyond; float32's is p's own."""
    if KIND == tl.float16:
        return tl.minimum(tl.maximum(p, -65504.0), 65504.0)
    else:
        return p


@device_function
def stop_rows(new, old, active, change, test, tol, FLOOR: tl.constexpr, CHECK_EVERY: tl.constexpr):
    """After a step, per row: whether it goes on, its relative change, whether the step was finite; and
    whether any row goes on. Without `test` only rows whose step was not finite stop.
    """
    # The largest flag is taken over [BLOCK_T, BLOCK_R]: a second reduction of a reduced axis breaks
    # Triton 3.6's compiler on sm_100, and the broadcast costs no instruction.
    if CHECK_EVERY == 1:
        change = tl.where(active, relative_change(new, old, FLOOR), change)
        finite = change < INFINITY
        active = active & finite & (change > tol)
        running = tl.max(tl.broadcast_to(active.to(tl.int32)[:, None], new.shape))
    else:
        running = 1
        if test:
            change = tl.where(active, relative_change(new, old, FLOOR), change)
            finite = change < INFINITY
            active = active & finite & (change > tol)
            running = tl.max(tl.broadcast_to(active.to(tl.int32)[:, None], new.shape))
        else:
            finite = tl.sum(new * new, axis=1) < INFINITY
            change = tl.where(finite, change, INFINITY)
            active = active & finite
    return active, change, finite, running
