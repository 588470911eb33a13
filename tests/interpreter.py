"""Products of Triton's interpreter in one order of summation.

The interpreter multiplies by numpy, whose BLAS may add up a row's terms in another order at another place of
the matrix, and does on some processors. That a row has the same bits in every batch is a property of the
kernels, so under test a product adds its terms in pairs, a tree over K, on every processor alike.
"""

import numpy as np


def ordered_product(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """a b for [..., M, K] and [..., K, N] in `dtype`, K a power of two, as every tile's side is.

    The terms k and k + K / 2 are added, then those that are K / 4 apart, and so on.

    >>> ordered_product(np.float32([[1, 2]]), np.float32([[3], [4]]), np.float32)
    array([[11.]], dtype=float32)
    """
    a, b = a.astype(dtype), b.astype(dtype)
    terms = np.moveaxis(a, -1, 0)[..., None] * np.moveaxis(b, -2, 0)[..., None, :]  # [K, ..., M, N]
    while len(terms) > 1:
        half = len(terms) // 2
        assert 2 * half == len(terms), f"K must be a power of two; got {a.shape[-1]}"
        terms = terms[:half] + terms[half:]
    return terms[0]


def sum_in_order() -> None:
    """Makes `tl.dot` in the interpreter an `ordered_product`; there are no 8-bit operands in our kernels."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        product = ordered_product(a.data, b.data, d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
