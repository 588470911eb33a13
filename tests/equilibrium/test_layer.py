"""The layers as modules: shapes, memory, compilation, batches, the record of a solve, bad input."""

import copy
import dataclasses
import gc
import inspect
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from equilibrium_helpers import (
    KINDS,
    PHI,
    REFERENCES,
    assert_close_each,
    assert_equal_each,
    both,
    every_backward,
    every_kind,
    gradients,
    rough,
    unrolled,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from lion_fast.equilibrium import (
    LionLayer,
    PixelEnd,
    SolveOptions,
    StateLayer,
    equilibrium,
    reference,
    replace_layers,
)
from lion_fast.errors import ConvergenceError, OptionError
from lion_kernels import reference as kernels

D, R = 12, 5
either = pytest.mark.parametrize("cls", [LionLayer, StateLayer])


def test_replace_layers_keeps_weights_and_optimisers():
    model = torch.nn.Sequential(reference.LionLayer(D, R), torch.nn.Linear(D, 3), reference.LionLayer(3, 2))
    parameters, x = list(model.parameters()), torch.randn(4, D)
    before = model(x)
    assert replace_layers(model) is model
    assert [type(m) for m in model] == [LionLayer, torch.nn.Linear, LionLayer]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.allclose(model(x), before, atol=1e-4)


def test_parameter_count():
    for width, state in ((768, 51), (384, 32), (7, 3)):
        layer = LionLayer(width, state, device="meta", dtype=torch.bfloat16)
        assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())
        free = sum(p.numel() for p in layer.parameters())
        assert free == 2 * state * width + state**2 + state + width
        tied = sum(p.numel() for p in LionLayer(width, state, recurrence="tied").parameters())
        assert tied == free - state**2
        states = sum(p.numel() for p in StateLayer(width, state).parameters())
        assert states == state * width + state**2 + state
    assert 2 * (2 * 51 * 768 + 51**2 + 51 + 768) == 163_512


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 3), (2, 1, 4), (0,), (3, 0)])
@every_kind
def test_any_leading_shape(kind, lead):
    layer = KINDS[kind](D, R, tol=1e-14, max_iter=400, gamma=0.9, backward="exact").double()
    x = torch.randn(*lead, D, dtype=torch.float64, requires_grad=True)
    (out, info), expected = rough(layer, 0.4)(x, return_info=True), unrolled(layer, x)
    assert out.shape == (*lead, R if kind == "states" else D)
    assert info.residual.shape == info.iterations.shape == lead and info.reason == "converged"
    upstream = torch.randn_like(out)
    found = gradients(layer, out, upstream, x)
    for a, e in zip(found, gradients(layer, expected, upstream, x), strict=True):
        assert (a - e).norm() <= 1e-9 * e.norm()


@every_backward
@pytest.mark.parametrize("kind", [*KINDS, *REFERENCES])
def test_autocast_changes_nothing(kind, backward):
    layer = rough((KINDS | REFERENCES)[kind](D, R, backward=backward), 0.4)
    x = torch.randn(6, D, requires_grad=True)
    plain = layer(x)
    upstream = torch.randn_like(plain)
    expected = gradients(layer, plain, upstream, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, again = layer(x), layer(x)
        (inside,) = torch.autograd.grad(again, x, upstream)
        inner = F.linear(mixed, torch.eye(mixed.shape[-1]))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain) and inner.dtype == torch.bfloat16
    assert_equal_each(gradients(layer, mixed, upstream, x), expected)
    assert kind not in ("free", "tied") or torch.equal(inside, expected[0])


# Module behaviour


def test_copies_survive(tmp_path):
    layer, x = rough(LionLayer(D, R)), torch.randn(4, D)
    expected = layer(x)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    loaded = LionLayer(D, R)
    loaded.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded):
        assert torch.equal(other(x), expected)
        other(x).sum().backward()
        assert other.W.grad is not None and layer.W.grad is None
    moved = copy.deepcopy(layer).to(torch.float64).to("cpu")
    assert torch.allclose(moved(x.double()).float(), expected, atol=1e-4)
    assert copy.deepcopy(layer).half()(x.half()).dtype == torch.float16
    assert sorted(layer.state_dict()) == ["A", "V", "W", "b", "c"]
    assert sorted(LionLayer(D, R, recurrence="tied").state_dict()) == ["A", "V", "b", "c"]


# Memory


def saved_tensors(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return saved


@every_backward
def test_saved_for_backward_is_x_and_one_state(backward):
    """Per token: X itself and one R-wide tensor, whatever the number of iterations."""
    rows = 1000
    for max_iter in (1, 5, 50):
        layer = rough(LionLayer(D, R, backward=backward, max_iter=max_iter, tol=0.0), 0.4)
        x = torch.randn(rows, D, requires_grad=True)
        per_token = [t for t in saved_tensors(layer, x) if t.numel() >= rows]
        widths = sorted(t.shape[-1] for t in per_token)
        assert widths == [R, D], widths
        assert {t.untyped_storage().data_ptr() for t in per_token if t.shape[-1] == D} == {x.data_ptr()}
        with torch.no_grad():
            assert not [t for t in saved_tensors(layer, x) if t.numel() >= rows]


@both
@pytest.mark.parametrize("backward", ["neumann", "exact"])
def test_nothing_outlives_a_skipped_backward(cls, backward):
    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # a tensor with its graph would close a cycle

    layer = rough(cls(D, R, backward=backward))
    x, alive = torch.randn(10, D, requires_grad=True), []

    def pack(tensor):
        saved = Saved(tensor)
        alive.append(weakref.ref(saved))
        return saved

    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            out, info = layer(x, return_info=True)
        assert sum(ref() is not None for ref in alive) > 5
        del out
        assert all(ref() is None for ref in alive), "the graph is kept alive by more than its output"
    finally:
        gc.enable()
    assert info.residual.shape == (10,)


# Compilation


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@every_kind
def test_compiles_as_one_graph(compiler, kind):
    torch._dynamo.reset()
    layer = rough(KINDS[kind](D, R), 0.4)
    x = torch.randn(2, 8, D, requires_grad=True)
    expected = layer(x)
    upstream = torch.randn_like(expected)
    grads = gradients(layer, expected, upstream, x)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    out = compiled(x)
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)
    assert_close_each(gradients(layer, out, upstream, x), grads, 1e-4)
    (out, info), (_, other) = compiled(x, return_info=True), layer(x, return_info=True)
    assert torch.allclose(out, expected, rtol=0, atol=1e-5)
    assert torch.equal(info.iterations, other.iterations) and info.reason == "converged"


# Batch invariance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width,state", [(D, R), (384, 32), (768, 51), (65, 64)])
def test_a_token_does_not_depend_on_its_batch(dtype, width, state):
    layer = rough(LionLayer(width, state, activation="tanh", gamma=0.95))
    x = torch.randn(1000, width).to(dtype)
    x[500:] *= 100  # half of the tokens converge at another speed
    whole, info = layer(x, return_info=True)
    for start, count in ((0, 1), (0, 2), (3, 1), (499, 2), (17, 63), (17, 64), (250, 65), (400, 500)):
        part, some = layer(x[start : start + count], return_info=True)
        assert torch.equal(part, whole[start : start + count]), (start, count)
        assert torch.equal(some.iterations, info.iterations[start : start + count])
    order = torch.randperm(1000)
    assert torch.equal(layer(x[order]), whole[order])


def test_an_input_gradient_does_not_depend_on_its_batch():
    layer = rough(LionLayer(384, 32, backward="exact"))
    x, upstream = torch.randn(300, 384, requires_grad=True), torch.randn(300, 384)
    (whole,) = torch.autograd.grad(layer(x), x, upstream)
    part = x[100:117].detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(layer(part), part, upstream[100:117])[0], whole[100:117])


# The solve's record and its failures


def aligned(x, rate, **options):
    """An equilibrium that contracts by exactly `rate`: W = rate I and positive states; z = x / (1 - rate)."""
    eye, zero = torch.eye(R, dtype=torch.float64), torch.zeros(R, dtype=torch.float64)
    return equilibrium(x, eye, rate * eye, zero, eye, zero, residual=False, return_info=True, **options)


@pytest.mark.parametrize("rate", [0.9, 0.99, 0.999])
def test_geometric_rates(rate):
    x, tol = torch.rand(3, R, dtype=torch.float64) + 0.5, 1e-6
    z, info = aligned(x, rate, max_iter=100_000, tol=tol)
    assert info.reason == "converged"
    assert (z * (1 - rate) / x - 1).abs().max() < 1.1 * tol / (1 - rate)
    # |z_k - z_k-1| / |z_k| = rate^(k-1) (1 - rate) / (1 - rate^k) falls under tol at:
    expected = 1 + torch.log(torch.tensor(tol / (1 - rate))) / torch.log(torch.tensor(rate))
    assert (info.iterations - expected).abs().max() <= 2


def test_damping_does_not_fake_convergence():
    """A small step changes z little; the residual is that of the un-damped map."""
    x = torch.rand(3, R, dtype=torch.float64) + 0.5
    for damping in (0.1, 0.01):
        _, info = aligned(x, 0.9, damping=damping, max_iter=5, tol=0.05)
        assert info.reason == "max_iter" and (info.residual > 0.4).all()


def test_info_says_what_happened():
    layer = rough(LionLayer(D, R, tol=1e-8, max_iter=100, gamma=0.9).double(), 0.4)
    x = torch.randn(6, D, dtype=torch.float64)
    out, info = layer(x, return_info=True)
    Wh = layer.recurrence_matrix()
    z = torch.linalg.lstsq(layer.V, (out - x - layer.c).T).solution.T
    f = F.relu(z @ Wh.T + x @ layer.A.T + layer.b)
    residual = (f - z).norm(dim=1) / (f.norm(dim=1) + 1e-3 * R**0.5)
    assert (residual < 2e-8).all() and (info.residual <= 1e-8).all() and info.converged.all()
    assert info.summary()["reason"] == "converged" and 1 < info.summary()["iterations"] < 100
    assert info.backward is None
    layer.backward = "exact"
    out, info = layer(x, return_info=True)
    out.sum().backward()
    assert info.backward.reason == "converged" and (info.backward.iterations > 1).all()
    layer.max_iter = 2
    assert layer(x, return_info=True)[1].reason == "max_iter"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_token_stays_alone(bad):
    layer = rough(LionLayer(D, R))
    x = torch.randn(100, D)
    clean = layer(x)
    x[41, 3] = bad
    out, info = layer(x, return_info=True)
    others = torch.arange(100) != 41
    assert torch.equal(out[others], clean[others])
    assert info.reason == "non_finite" and info.converged.tolist() == others.tolist()
    assert torch.isfinite(out[41, torch.arange(D) != 3]).all()


@both
@pytest.mark.parametrize("activation", PHI)
def test_expansive_maps_are_flagged_and_finite(activation, cls):
    layer = cls(D, R, activation=activation, gamma=50.0, allow_expansive=True, max_iter=200)
    with torch.no_grad():
        layer.W.copy_(40 * torch.eye(R)), layer.A.normal_(), layer.V.normal_()
    x = torch.randn(30, D, requires_grad=True)
    out, info = layer(x, return_info=True)
    assert torch.isfinite(out).all()
    if activation != "tanh":
        assert info.reason == "non_finite" and not info.converged.all()


@either
def test_policies(cls):
    layer = rough(cls(D, R, max_iter=2, tol=1e-6, on_failure="raise"))
    with pytest.raises(ConvergenceError, match="max_iter"):
        layer(torch.randn(4, D))
    layer.on_failure = "warn"
    with pytest.warns(UserWarning, match="Raise max_iter"):
        layer(torch.randn(4, D))
    layer.on_failure = "ignore"
    layer(torch.randn(4, D))


@pytest.mark.parametrize("name", ["A", "W", "b"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_named(name, bad):
    layer = LionLayer(D, R, on_failure="raise")
    with torch.no_grad():
        getattr(layer, name).view(-1)[0] = bad
    with pytest.raises(ConvergenceError, match=f"weights {name} "):
        layer(torch.randn(4, D))
    layer.on_failure = "ignore"
    assert layer(torch.randn(4, D), return_info=True)[1].reason == "non_finite"


def test_no_host_synchronisation():
    """Fake CUDA tensors have no values: any look at one from the host raises."""
    if torch.__version__ < "2.8" and not torch.cuda.is_available():
        pytest.skip("fake CUDA tensors need a GPU in this torch")
    with FakeTensorMode(), torch.no_grad():
        layer = LionLayer(D, R, device="cuda", backend="torch")
        x = torch.randn(70, D, device="cuda")
        out, info = layer(x, return_info=True)
        assert out.device.type == info.residual.device.type == info.converged.device.type == "cuda"
        args = (x, layer.A, layer.recurrence_matrix(), layer.b, layer.V, layer.c, "relu", 50, 1e-4, 1.0, True)
        _, p, _, count = kernels.solve(*args)
        assert count.shape == (70,) and p.shape == (70, R)
        kernels.adjoint(x, x, p, layer.A, layer.recurrence_matrix(), layer.V, "relu", 8, 1e-4, 1.0, True)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            info.summary()


# Bad input


@pytest.mark.parametrize("cls", [LionLayer, reference.LionLayer, StateLayer])
@pytest.mark.parametrize(
    "option, values",
    {
        "gamma": (1.0, 0.0, -0.5, float("nan"), "0.5", "a"),
        "activation": ("elu",),
        "backward": ("bptt",),
        "backend": ("cuda",),
        "on_failure": ("panic",),
        "damping": (0.0, 1.5, None),
        "max_iter": (0, 2.5),
        "neumann_terms": (-1,),
        "tol": (-1e-3, 2.0, "small"),
        "state_dim": (0, 2.0, True),
        "dim": (3.0, 0),
    }.items(),
)
def test_bad_options(cls, option, values):
    for value in values:
        with pytest.raises(OptionError, match=option):
            cls(**{"dim": D, option: value})


def test_bad_options_of_the_layer_alone():
    with pytest.raises(OptionError, match="recurrence"):
        LionLayer(D, recurrence="loose")
    with pytest.raises(OptionError, match="gamma"):
        LionLayer(D, gamma=0.0, allow_expansive=True)


@pytest.mark.parametrize("make", [LionLayer, reference.LionLayer, StateLayer, PixelEnd])
def test_options_of_a_solve_are_attributes(make):
    layer = make(4, 3, max_iter=7, backward="jfb", on_failure="warn")
    assert (layer.max_iter, layer.tol, layer.backward, layer.backend) == (7, None, "jfb", "auto")
    options = {f.name: f.default for f in dataclasses.fields(SolveOptions)}
    if make is PixelEnd:  # it runs in torch
        del options["backend"]
    layer.tol, layer.neumann_terms = 1e-3, 2
    assert layer.solve == SolveOptions(
        max_iter=7, backward="jfb", on_failure="warn", tol=1e-3, neumann_terms=2
    )
    with pytest.raises(OptionError, match="max_iter"):
        layer.max_iter = 0
    assert pickle.loads(pickle.dumps(layer)).solve == copy.deepcopy(layer).solve == layer.solve
    listed = inspect.signature(make).parameters
    assert options.items() <= {name: p.default for name, p in listed.items()}.items()


def test_unknown_options_raise():
    for cls in (LionLayer, reference.LionLayer, StateLayer, PixelEnd):
        with pytest.raises(TypeError, match="'gama'; did you mean gamma") as raised:
            cls(D, R, gama=0.5)
        assert isinstance(raised.value, OptionError)
    with pytest.raises(OptionError, match="recurrence"):
        StateLayer(D, R, recurrence="tied")
    with pytest.raises(TypeError, match="iterations"):
        LionLayer(D, R)(torch.randn(2, D), iterations=3)
    layer = LionLayer(D, R)
    arguments = (torch.randn(2, D), layer.A, layer.W, layer.b, layer.V, layer.c)
    with pytest.raises(TypeError, match="'terms'.*neumann_terms"):
        equilibrium(*arguments, terms=3)


@either
def test_bad_input(cls):
    layer = cls(D, R)
    for wrong in (torch.randn(4, D + 1), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="12"):
            layer(wrong)
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(4, D, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="cannot run"):
        cls(D, R, backend="triton")(torch.randn(4, D))


def test_matrices_that_do_not_fit():
    layer = LionLayer(D, R)
    with pytest.raises(ValueError, match="W must have shape"):
        equilibrium(torch.randn(4, D), layer.A, torch.eye(4), layer.b, layer.V, layer.c)
