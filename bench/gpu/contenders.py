"""What is timed: every contender is a function of the tokens alone, made for one problem.

All work on the same numbers, with the injection hoisted out of the iteration wherever the contender
allows it. Those that cannot stop by themselves are given the number of applications the problem takes,
which is their best case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from problems import ACTIVATION, MAX_ITER, NEUMANN_TERMS, TOL, Problem
from torch import Tensor
from torch.autograd.function import once_differentiable

from lion_fast import reference
from lion_fast.equilibrium.functional import equilibrium
from lion_fast.equilibrium.solvers import implicit


class NotInstalled(Exception):
    """The contender's library is not there."""


@dataclass
class Ready:
    """A contender made for a problem: call(x) -> out, and the leaves that its backward reaches."""

    call: Callable[[Tensor], Tensor]
    parameters: list[Tensor]


@dataclass(frozen=True)
class Contender:
    """`recurrence` says which weights it solves for; `compiled`, that it goes through torch.compile.

    What does not look at the device from the host is `captured`: timed from CUDA graphs, so that its figure
    is the device's and not the host's.
    """

    name: str
    make: Callable[[Problem], Ready]
    recurrence: str = "free"
    compiled: bool = False
    captured: bool = True
    note: str = ""


def _leaves(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype).clone().requires_grad_() for t in tensors]


class _StateSpace(torch.autograd.Function):
    """The free recurrence in R dimensions by torch alone, every operation in the tokens' dtype."""

    @staticmethod
    def forward(ctx, x, A, W, b, V, c, steps):
        q = torch.addmm(b, x, A.T)
        p = q
        for _ in range(steps - 1):
            p = torch.addmm(q, torch.relu(p), W.T)
        ctx.save_for_backward(x, p, A, W, V)
        return x + torch.addmm(c, torch.relu(p), V.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, p, A, W, V = ctx.saved_tensors
        slope = (p > 0).to(p.dtype)
        g = grad @ V
        y = g
        for _ in range(NEUMANN_TERMS):
            y = torch.addmm(g, slope * y, W)
        t, z = slope * y, torch.relu(p)
        return grad + t @ A, t.T @ x, t.T @ z, t.sum(0), grad.T @ z, grad.sum(0), None


class _TokenSpace(torch.autograd.Function):
    """The tied recurrence y = V phi(A (x + y) + b) in D dimensions with A x + b hoisted."""

    @staticmethod
    def forward(ctx, x, A, b, V, c, steps):
        q = torch.addmm(b, x, A.T)
        y = torch.zeros_like(x)
        for k in range(steps):
            p = q if k == 0 else torch.addmm(q, y, A.T)
            last, y = y, torch.relu(p) @ V.T
        ctx.save_for_backward(x, last, p, A, V)
        return x + y + c

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, y, p, A, V = ctx.saved_tensors
        slope = (p > 0).to(p.dtype)
        u = grad
        for _ in range(NEUMANN_TERMS):
            u = torch.addmm(grad, slope * (u @ V), A)
        t = slope * (u @ V)
        return grad + t @ A, t.T @ (x + y), t.sum(0), u.T @ torch.relu(p), grad.sum(0), None


def _reference(problem: Problem, recurrence: str) -> Ready:
    A, W, b, V, c = problem.free if recurrence == "free" else problem.tied
    layer = reference.LionLayer(
        A.shape[1],
        A.shape[0],
        recurrence=recurrence,
        activation=ACTIVATION,
        # Above the norms of all problems, so that nothing is scaled down.
        gamma=0.999,
        max_iter=MAX_ITER,
        tol=TOL,
        neumann_terms=NEUMANN_TERMS,
        device=A.device,
    )
    # The weights are within the bound already: bounding them is no part of the comparison.
    layer.recurrence_matrix = (lambda: layer.W) if recurrence == "free" else (lambda: layer.A @ layer.V)
    with torch.no_grad():
        for name, value in (("A", A), ("b", b), ("V", V), ("c", c)):
            getattr(layer, name).copy_(value)
        if recurrence == "free":
            layer.W.copy_(W)
    return Ready(layer, list(layer.parameters()))


def _hoisted(problem: Problem, recurrence: str) -> Ready:
    """The reference's loop with one stop test a step, but the injection computed once."""
    A, W, b, V, c = problem.free if recurrence == "free" else problem.tied
    options = {"max_iter": MAX_ITER, "tol": TOL, "neumann_terms": NEUMANN_TERMS, "early_exit": True}
    leaves = _leaves((A, W, b, V, c) if recurrence == "free" else (A, b, V, c), torch.float32)

    def free(x: Tensor) -> Tensor:
        A, W, b, V, c = leaves
        q = F.linear(x.float(), A, b)
        z, _ = implicit(lambda z, q: torch.relu(q + F.linear(z, W)), q, torch.zeros_like(q), **options)
        return (x + F.linear(z, V, c)).to(x.dtype)

    def tied(x: Tensor) -> Tensor:
        A, b, V, c = leaves
        q = F.linear(x.float(), A, b)
        z0 = torch.zeros(x.shape, device=x.device)
        y, _ = implicit(lambda y, q: F.linear(torch.relu(q + F.linear(y, A)), V), q, z0, **options)
        return (x + y + c).to(x.dtype)

    return Ready(free if recurrence == "free" else tied, leaves)


def _operators(problem: Problem, backend: str, max_iter: int | None = None) -> Ready:
    leaves = _leaves(problem.free, torch.float32)
    options = {
        "activation": ACTIVATION,
        "max_iter": max_iter or problem.steps["free"],
        "tol": TOL,
        "neumann_terms": NEUMANN_TERMS,
        "backend": backend,
    }
    return Ready(lambda x: equilibrium(x, *leaves, **options), leaves)


def _ours(problem: Problem) -> Ready:
    # On a CPU, in a dry run, the operators of torch stand in.
    return _operators(problem, "triton" if problem.x[0].is_cuda else "torch", MAX_ITER)


def _state_space(problem: Problem) -> Ready:
    leaves, steps = _leaves(problem.free, problem.x[0].dtype), problem.steps["free"]
    return Ready(lambda x: _StateSpace.apply(x, *leaves, steps), leaves)


def _token_space(problem: Problem) -> Ready:
    A, _, b, V, c = problem.tied
    leaves, steps = _leaves((A, b, V, c), problem.x[0].dtype), problem.steps["tied"]
    return Ready(lambda x: _TokenSpace.apply(x, *leaves, steps), leaves)


def _torchdeq(problem: Problem, monitored: bool) -> Ready:
    try:
        from torchdeq import get_deq
    except ImportError as error:
        raise NotInstalled(f"not installed: {error}") from error
    A, W, b, V, c = leaves = _leaves(problem.free, problem.x[0].dtype)
    if monitored:
        options = {"f_solver": "fixed_point_iter", "f_max_iter": MAX_ITER, "f_tol": TOL, "f_stop_mode": "rel"}
        options |= {"b_solver": "fixed_point_iter", "b_max_iter": NEUMANN_TERMS + 1, "ift": True}
        options |= {"b_tol": TOL, "b_stop_mode": "rel"}
    else:
        # Its blind solver fails in an implicit backward (torchdeq 0.1.0), so it keeps its default, one step.
        options = {"f_solver": "simple_fixed_point_iter", "f_max_iter": problem.steps["free"]}
    deq = get_deq(**options)

    def call(x: Tensor) -> Tensor:
        q = F.linear(x, A, b)
        z, _ = deq(lambda z: torch.relu(q + F.linear(z, W)), torch.zeros_like(q))
        return x + F.linear(z[-1], V, c)

    return Ready(call, leaves)


KNOWN, STOPS = "count known", "stops itself, host syncs"
EVERY = "injection in every application, host syncs"
# Those that look at the device from the host.
_host = partial(Contender, captured=False)
ALL = (
    Contender("lion-fast", _ours),
    Contender("torch R-space, half", _state_space, note=f"all in the tokens' dtype, {KNOWN}"),
    Contender("torch R-space, float32 state", lambda p: _operators(p, "torch"), note=KNOWN),
    _host("reference free", lambda p: _hoisted(p, "free"), note=STOPS),
    _host("reference tied", lambda p: _hoisted(p, "tied"), "tied", note=STOPS),
    _host("reference free, as written", lambda p: _reference(p, "free"), note=EVERY),
    _host("reference tied, as written", lambda p: _reference(p, "tied"), "tied", note=EVERY),
    Contender("torch D-space, half", _token_space, "tied", note=KNOWN),
    _host("torchdeq monitored", lambda p: _torchdeq(p, True), note=STOPS),
    _host("torchdeq blind", lambda p: _torchdeq(p, False), note=f"{KNOWN}, one-step gradient"),
    Contender("torch R-space, compiled", _state_space, compiled=True, note=KNOWN),
    Contender("torch D-space, compiled", _token_space, "tied", compiled=True, note=KNOWN),
)
