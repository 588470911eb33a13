"""The activations and their derivatives as device functions, one form for all kernels.

MATH selects the arithmetic, the same in forward and adjoint so that the derivative belongs to the
function that ran:

- "exact": float32 accuracy, for float32 tokens;
- "ptx": the hardware's approximate tanh (relative error 2^-11) and reciprocal, and an error function
  of five terms (absolute error 1.5e-7), for half-precision tokens, whose rounding is larger;
- "approx": the formulas of "ptx" without inline PTX, which Triton's interpreter lacks.
"""

import triton.language as tl

from lion_kernels.tile import device_function

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
GELU_CUBIC = tl.constexpr(0.044715)


@device_function
def _tanh(p, MATH: tl.constexpr):
    if MATH == "ptx":
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [p], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        e = tl.exp(-2.0 * tl.abs(p))
        t = (1.0 - e) / (1.0 + e)
        t = tl.where(p < 0, -t, t)
        # 1 - e cancels near zero; the next term of the series is below 2e-8 of the result.
        s = p * p
        series = p * (1.0 - s * (0.33333333333 - s * (0.13333333333 - s * 0.05396825397)))
        return tl.where(s < 0.01, series, t)


@device_function
def _reciprocal(p, MATH: tl.constexpr):
    if MATH == "ptx":
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [p], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / p


@device_function
def _sigmoid(p, MATH: tl.constexpr):
    if MATH == "exact":
        return 1.0 / (1.0 + tl.exp(-p))
    else:
        return 0.5 + 0.5 * _tanh(0.5 * p, MATH)


@device_function
def _normal_cdf(p, MATH: tl.constexpr):
    """(1 + erf(p / sqrt 2)) / 2; Abramowitz and Stegun 7.1.26 where MATH is not exact."""
    if MATH == "exact":
        return 0.5 + 0.5 * tl.erf(p * SQRT_HALF)
    else:
        u = tl.abs(p) * SQRT_HALF
        t = _reciprocal(1.0 + 0.3275911 * u, MATH)
        s = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        tail = 0.5 * t * (0.254829592 + t * (-0.284496736 + t * s)) * tl.exp(-u * u)
        return tl.where(p < 0, tail, 1.0 - tail)


@device_function
def _gelu_tanh(p, MATH: tl.constexpr):
    """tanh(sqrt(2/pi) (p + 0.044715 p^3)), the inner value of the tanh form of gelu."""
    return _tanh(p * (SQRT_2_OVER_PI + SQRT_2_OVER_PI * GELU_CUBIC * p * p), MATH)


@device_function
def activate(p, ACT: tl.constexpr, MATH: tl.constexpr):
    """phi(p) for float32 p; NaN stays NaN."""
    if ACT == "relu":
        # Without this NaN would become zero, and the solve flags rows by it.
        return tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "tanh":
        return _tanh(p, MATH)
    elif ACT == "gelu":
        return p * _normal_cdf(p, MATH)
    elif ACT == "gelu_tanh":
        half = 0.5 * p
        return half + half * _gelu_tanh(p, MATH)
    else:
        tl.static_assert(ACT == "silu")
        return p * _sigmoid(p, MATH)


@device_function
def slope(p, ACT: tl.constexpr, MATH: tl.constexpr):
    """phi'(p) for float32 p; zero at zero for relu."""
    if ACT == "relu":
        return tl.where(p > 0, 1.0, 0.0)
    elif ACT == "tanh":
        t = _tanh(p, MATH)
        return 1.0 - t * t
    elif ACT == "gelu":
        return _normal_cdf(p, MATH) + p * INV_SQRT_2PI * tl.exp(-0.5 * p * p)
    elif ACT == "gelu_tanh":
        t = _gelu_tanh(p, MATH)
        inner = SQRT_2_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * p * p)
        return 0.5 * (1.0 + t) + 0.5 * p * (1.0 - t * t) * inner
    else:
        tl.static_assert(ACT == "silu")
        s = _sigmoid(p, MATH)
        return s * (1.0 + p * (1.0 - s))
