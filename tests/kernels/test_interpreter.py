"""The products that stand in for the interpreter's: right, and the same wherever a row stands."""

import numpy as np
from interpreter import ordered_product


def test_products_are_right_and_do_not_look_at_a_rows_place():
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((64, 32)), draw.standard_normal((32, 16))
    a32, b32 = a.astype(np.float32), b.astype(np.float32)
    whole = ordered_product(a32, b32, np.float32)
    exact = a32.astype(np.float64) @ b32.astype(np.float64)
    # Each of five additions and the product round by 2^-24 of the sum of the sizes of all terms.
    assert (np.abs(whole - exact) <= 6 * 2**-24 * (np.abs(a32) @ np.abs(b32))).all()
    order = draw.permutation(64)
    assert (ordered_product(a32[order], b32, np.float32) == whole[order]).all()
    assert (ordered_product(a32[5:6], b32, np.float32) == whole[5:6]).all()
    halves = ordered_product(a.astype(np.float16), b.astype(np.float16), np.float32)
    assert halves.dtype == np.float32 and (np.abs(halves - exact) < 0.05).all()
