"""Numbers at the edge: NaN and Inf wherever they sit, half types that overflow, types that are no floats."""

import pytest
import torch
from equilibrium_helpers import KINDS, REFERENCES, assert_equal_each, every_backward, rough

from lion_fast.equilibrium import (
    LionLayer,
    PixelEnd,
    StateLayer,
    bounded,
    conv_norm_bound,
    equilibrium,
    reference,
)
from lion_fast.errors import ConvergenceError, OptionError
from lion_kernels.reference import relative_change

D, R = 12, 5
LAYERS = {**KINDS, **REFERENCES, "pixels": PixelEnd}
SIZES = {"pixels": (3, 4)}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def make(kind, **options):
    return rough(LAYERS[kind](*SIZES.get(kind, (D, R)), **options), 0.3)


def tokens(kind, count=4):
    return torch.randn(count, *((3, 6, 6) if kind == "pixels" else (D,)))


# Nothing non-finite leaves a layer unflagged


@pytest.mark.parametrize("name", ["U", "A", "W", "b", "V", "c", "x"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_layer
def test_what_is_not_finite_is_flagged_whatever_holds_it(kind, bad, name):
    layer, x = make(kind), tokens(kind)
    held = x if name == "x" else getattr(layer, name, None)
    if held is None:
        return  # the layer has no such weight
    clean = layer(x)
    with torch.no_grad():
        held.view(-1)[0] = bad
    out, info = layer(x, return_info=True)
    if kind in REFERENCES and name in "Ab":
        # relu of minus infinity is zero: for such a token this unit is off
        assert torch.isfinite(out[info.residual.isfinite()]).all()
        return
    assert info.reason == "non_finite"
    if name == "x":
        assert info.residual.isinf().tolist() == [True, False, False, False]
        assert torch.equal(out[1:], clean[1:])
    else:
        assert info.residual.isinf().all()
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="NaN" if name == "x" else f"weights {name} hold"):
        layer(x)


@pytest.mark.parametrize("state", [1, 8])
@pytest.mark.parametrize("kind", ["free", "states"])
def test_a_state_beyond_a_half_type_is_flagged(kind, state):
    """x = 3000 and A = 0.5 make p = 96,000, which float32 holds and float16 does not."""
    layer = KINDS[kind](64, state, activation="relu")
    with torch.no_grad():
        layer.A.fill_(0.5), layer.W.zero_()
        if kind == "free":
            layer.V.fill_(1e-3)
    x = torch.full((3, 64), 3000.0)
    x[1] = 1.0
    out, info = layer(x, return_info=True)
    assert info.converged.all() and (out[0] > 3000).all()
    out, info = layer.half()(x.half(), return_info=True)
    assert info.residual.isinf().tolist() == [True, False, True] and torch.isfinite(out[1]).all()
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="2 of 3"):
        layer(x.half())


def test_an_output_beyond_a_half_type_is_flagged():
    """The state fits and x + V z does not."""
    layer = rough(LionLayer(D, R), 0.1)
    with torch.no_grad():
        layer.c.fill_(30.0)
    x = torch.full((2, D), 65504.0)
    x[1] = 1.0
    assert layer(x, return_info=True)[1].converged.all()
    assert layer(x.half(), return_info=True)[1].residual.isinf().tolist() == [True, False]


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh"])
def test_far_below_zero_the_state_is_right_in_a_half_type_too(activation):
    """p = -96,000 is beyond float16, phi(p) is not: neither state nor gradient is lost."""
    layer = LionLayer(64, 8, activation=activation, backward="exact")
    with torch.no_grad():
        layer.A.fill_(-0.5), layer.W.fill_(0.01)
    x = torch.full((2, 64), 3000.0, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    half = x.detach().half().requires_grad_()
    out, info = layer(half, return_info=True)
    out.sum().backward()
    assert info.converged.all() and info.backward.converged.all()
    torch.testing.assert_close(out.float(), layer(x), rtol=2e-3, atol=0)
    torch.testing.assert_close(half.grad.float(), expected, rtol=2e-3, atol=0)


def test_gradients_of_a_token_that_is_flagged_are_finite():
    layer = LionLayer(64, 8, activation="relu").half()
    with torch.no_grad():
        layer.A.fill_(0.5), layer.V.fill_(1e-3), layer.W.zero_()
    x = torch.full((2, 64), 3000.0, dtype=torch.float16, requires_grad=True)
    out, info = layer(x, return_info=True)
    out.backward(torch.full_like(out, 1e-3))
    assert info.residual.isinf().all()
    assert all(torch.isfinite(t.grad).all() for t in (x, *layer.parameters()))


@every_backward
def test_a_gradient_that_is_not_finite_is_in_the_record(backward):
    layer = rough(LionLayer(D, R, backward=backward), 0.3)
    x = torch.randn(3, D, requires_grad=True)
    out, info = layer(x, return_info=True)
    upstream = torch.randn_like(out)
    upstream[1, 2] = float("nan")
    out.backward(upstream)
    finite = torch.isfinite(x.grad).all(1).tolist()
    assert finite == [True, False, True]
    if backward != "jfb":  # one term is no iteration and has no record
        assert info.backward.residual.isfinite().tolist() == finite


@every_backward
@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_gradient_changes_nothing(kind, backward):
    """Powers of two at which the square of an entry under- or overflows float32."""
    layer = rough(KINDS[kind](D, R, backward=backward, gamma=0.95, activation="tanh"))
    x = torch.randn(4, D, requires_grad=True)
    out = layer(x)
    upstream = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, x, upstream, retain_graph=True)
    for size in (2.0**-90, 2.0**80):
        (found,) = torch.autograd.grad(out, x, size * upstream, retain_graph=True)
        assert torch.equal(found, size * expected)


def test_a_sum_that_overflows_float32_is_no_state():
    """tanh would make 1 of it, and the sum could have been negative."""
    for layer in (LionLayer(D, R, activation="tanh"), StateLayer(D, R)):
        with torch.no_grad():
            layer.A.fill_(1.0)
        x = torch.zeros(2, D)
        x[0, :4] = torch.tensor([3e38, 3e38, -3e38, -3.3e38])
        assert layer(x, return_info=True)[1].residual.isinf().tolist() == [True, False]


def test_a_norm_that_overflows_is_no_residual_of_zero():
    new, old = torch.full((1, 2), 2.7e19), torch.full((1, 2), 1e19)
    assert relative_change(new, old, 1e-3).isinf().all()
    one, zero = torch.eye(2), torch.zeros(2)
    _, info = equilibrium(1e19 * torch.ones(1, 2), one, 0.8 * one, zero, one, zero, return_info=True)
    assert info.reason == "non_finite"


# Bits do not depend on the batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width, state", [(384, 32), (65, 7), (12, 130)])
def test_states_and_their_gradients_do_not_depend_on_the_batch(dtype, width, state):
    layer = StateLayer(width, state, backward="exact")
    x, upstream = torch.randn(300, width).to(dtype), torch.randn(300, state).to(dtype)

    def both(start, count):
        part = x[start : start + count].clone().requires_grad_()
        out = layer(part)
        return out, torch.autograd.grad(out, part, upstream[start : start + count])[0]

    whole = both(0, 300)
    for start, count in ((0, 1), (7, 2), (11, 3), (20, 7), (40, 8), (1, 17), (200, 63), (3, 193)):
        assert_equal_each(both(start, count), [t[start : start + count] for t in whole])
    turned = x.T.contiguous().T  # another layout of the same tokens
    assert torch.equal(layer(turned), whole[0])
    assert torch.equal(layer(x[:24].reshape(2, 3, 4, width)).flatten(0, 2), whole[0][:24])


# Types


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool, torch.float8_e4m3fn, "float32"])
def test_a_layer_of_another_type_is_refused(dtype):
    for cls in (LionLayer, reference.LionLayer):
        with pytest.raises(OptionError, match="dtype"):
            cls(D, R, dtype=dtype)


@every_layer
def test_tokens_and_weights_of_another_type_are_refused(kind):
    layer, x = make(kind), tokens(kind)
    for dtype in (torch.complex64, torch.int32, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=str(dtype)):
            layer(x.to(dtype))
    with pytest.warns(UserWarning, match="Complex modules"):
        layer.to(torch.complex64)
    with pytest.raises(TypeError, match="complex64"):
        layer(x)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_every_float_type_and_weights_of_another(kind, dtype):
    layer, x = make(kind), tokens(kind)
    out = layer(x.to(dtype))
    assert out.dtype == dtype
    assert (out.double() - layer(x).double()).norm() <= (
        1e-4 + 8 * torch.finfo(dtype).eps
    ) * 5 * out.double().norm()


def test_pixels_that_do_not_fit():
    end = PixelEnd(3, 4)
    for shape in ((3, 6, 6), (2, 4, 6, 6), (2, 6, 6, 3), (2, 3, 0, 6)):
        with pytest.raises(ValueError, match="3"):
            end(torch.zeros(shape))
    with pytest.raises(OptionError, match="backend"):
        PixelEnd(3, 4, backend="triton")


@every_layer
def test_what_is_no_dense_tensor_is_refused(kind):
    layer = make(kind)
    for wrong in ([1.0], None, tokens(kind).numpy(), tokens(kind).to_sparse()):
        with pytest.raises(TypeError, match="dense tensor"):
            layer(wrong)


def test_weights_and_matrices_that_do_not_fit_are_refused():
    x, A, W, b, V, c = (torch.zeros(s) for s in ((3, D), (R, D), (R, R), R, (D, R), D))
    for wrong in ((x, A[0], W, b, V, c), (x, A, W, b, V, c.to("meta")), (x.to("meta"), A, W, b, V, c)):
        with pytest.raises(ValueError):
            equilibrium(*wrong)
    for wrong in ((x, None, W, b, V, c), (x, A, [[1.0]], b, V, c), (x, A, W, b, V, c.to(torch.complex64))):
        with pytest.raises(TypeError):
            equilibrium(*wrong)
    for W in (torch.ones(3), torch.ones(2, 3, 3), torch.ones(0, 0)):
        with pytest.raises(ValueError, match="matrix"):
            bounded(W, 0.8)
    for limit in (float("nan"), -1.0, 0.0):
        with pytest.raises(OptionError, match="limit"):
            bounded(torch.eye(3), limit)
    for shape, height in (((2, 2, 2, 2), 8), ((2, 2, 3), 8), ((2, 2, 3, 3), 0), ((0, 2, 3, 3), 8)):
        with pytest.raises(ValueError, match="odd"):
            conv_norm_bound(torch.ones(shape), height, 8)
    for name in ("max_iter", "neumann_terms"):
        with pytest.raises(OptionError, match=name):
            LionLayer(D, R, **{name: 10**22})


# Small and degenerate


@pytest.mark.parametrize("width, state", [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("options", [
    {"gamma": 1e-30}, {"gamma": 0.999999, "max_iter": 20}, {"tol": 0.0, "max_iter": 1}, {"damping": 1e-12},
    {"tol": 0.0, "max_iter": 3, "backward": "phantom"}, {"neumann_terms": 0},
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_options_give_finite_results_or_say_so(kind, options, width, state):
    layer = KINDS[kind](width, state, **options)
    for x in (torch.randn(5, width), torch.full((5, width), -0.0), torch.full((5, width), 1e-42)):
        out, info = layer(x.requires_grad_(), return_info=True)
        out.sum().backward()
        assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
        assert not info.residual.isinf().any()
        if options.get("damping") or options.get("tol") == 0.0:
            assert info.reason == "max_iter" or (info.residual == 0).all()


@every_layer
def test_no_rows(kind):
    layer, x = make(kind), tokens(kind, 0)
    out, info = layer(x.requires_grad_(), return_info=True)
    out.sum().backward()
    assert len(out) == 0 and info.reason == "converged" and x.grad.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_enormous_float64(kind):
    layer = rough(KINDS[kind](D, R).double(), 0.3)
    x = torch.randn(3, D, dtype=torch.float64)
    x[0] *= 1e300
    out, info = layer(x, return_info=True)
    assert info.converged[1:].all() and (info.residual[0].isinf() or torch.isfinite(out[0]).all())
