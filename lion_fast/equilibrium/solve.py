"""How an equilibrium is solved: the options, checked in one place, and the record of how a solve ended."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from lion_fast.errors import ConvergenceError, check_choice, check_number, check_whole, names_options
from lion_kernels.ops import BACKENDS

_Call = TypeVar("_Call", bound=Callable)

BACKWARDS = ("neumann", "jfb", "exact", "phantom")
POLICIES = ("ignore", "warn", "raise")
TOLERANCES = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-4, torch.float64: 1e-8}
PHANTOM_DAMPING = 0.5
# An exact backward may take this many times the forward's iterations.
EXACT_FACTOR = 4
# Steps are counted in int32.
MOST = 10**8


def default_tol(dtype: torch.dtype) -> float:
    """The relative residual that is asked for when `tol` is None, by the tokens' dtype."""
    if dtype not in TOLERANCES:
        raise TypeError(f"an equilibrium needs {', '.join(map(str, TOLERANCES))}; got {dtype}")
    return TOLERANCES[dtype]


def check_tensor(x: Tensor, name: str = "x") -> None:
    """Raise TypeError unless x is a dense tensor of a float type of `TOLERANCES`."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor; got {getattr(x, 'layout', type(x).__name__)}")
    default_tol(x.dtype)


@dataclass(frozen=True, kw_only=True)
class SolveOptions:
    """The options of a solve, which every layer and call takes as keyword arguments of these names.

    max_iter: applications of f at most; 1 is one application, with its own gradient.
    tol: relative residual per token; None is 1e-2 for half types, 1e-4 float32, 1e-8 float64; 0 always makes
        `max_iter` applications.
    damping: step length beta in (0, 1].
    backward: the gradient: "neumann" with `neumann_terms` terms of the series after the first, "jfb"
        without, "exact" to `tol`, "phantom" of `neumann_terms` damped steps.
    neumann_terms: from 0 on.
    backend: "auto", "torch" or "triton"; auto is Triton on a CUDA device that has it.
    on_failure: "ignore", "warn" or "raise" when a token does not converge, and in the backward when its
        adjoint does not ("exact") or its series does not shrink (the other modes, see `SolveInfo`). The last
        two synchronise with the device, and look outside `torch.compile` only. An upstream gradient that is
        not finite passes through and is no failure.

    Raises OptionError on a value outside its range.

    >>> SolveOptions(max_iter=5).adjoint(1e-4)
    (4, 0.0, 1.0)
    """

    max_iter: int = 50
    tol: float | None = None
    damping: float = 1.0
    backward: str = "neumann"
    neumann_terms: int = 8
    backend: str = "auto"
    on_failure: str = "ignore"

    def __post_init__(self) -> None:
        check_choice("backward", self.backward, BACKWARDS)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("on_failure", self.on_failure, POLICIES)
        check_whole("max_iter", self.max_iter, 1, MOST)
        check_whole("neumann_terms", self.neumann_terms, 0, MOST)
        check_number("damping", self.damping, above=0, most=1)
        if self.tol is not None:
            check_number("tol", self.tol, least=0, below=1, note="0: always max_iter iterations")

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual asked for of tokens of `dtype`; TypeError where that is no float."""
        default = default_tol(dtype)
        return default if self.tol is None else self.tol

    @property
    def terms(self) -> int:
        """`neumann_terms`, as far as `max_iter` applications from zero have recurrences for them."""
        return min(self.neumann_terms, self.max_iter - 1)

    def adjoint(self, tol: float) -> tuple[int, float, float]:
        """(terms, tol, damping) of the adjoint iteration.

        A gradient of k applications from zero goes through k - 1 recurrences: there are no more Neumann
        terms, and one application, which is no equilibrium, has none in any mode.
        """
        return {
            "neumann": (self.terms, 0.0, 1.0),
            "jfb": (0, 0.0, 1.0),
            # damped as the forward: it converges wherever that did
            "exact": (EXACT_FACTOR * self.max_iter, tol, self.damping),
            "phantom": (max(self.neumann_terms - 1, 0), 0.0, PHANTOM_DAMPING),
        }["jfb" if self.max_iter == 1 else self.backward]


OPTIONS = tuple(field.name for field in fields(SolveOptions))


def takes_solve_options(*names: str) -> Callable[[_Call], _Call]:
    """Decorate a call whose `**solve` are options of a solve: `names`, or all.

    Its signature lists them with their types and defaults in place of `**solve`, and another keyword raises
    `UnknownOptionError`. A call whose `**` has another name has more behind it: that stays as it is.
    """
    listed = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(SolveOptions)
        if f.name in (names or OPTIONS)
    ]

    def decorate(call: _Call) -> _Call:
        signature = inspect.signature(call)
        *own, rest = signature.parameters.values()
        alone = rest.name == "solve"
        parameters = [*own, *listed] if alone else [*own, *listed, rest]
        call.__signature__ = signature.replace(parameters=parameters)
        return names_options(call) if alone else call

    return decorate


class Solving:
    """Gives a layer that holds its `solve` each of its options as an attribute, which can be set."""

    solve: SolveOptions


def _option(name: str) -> property:
    def read(layer):
        return getattr(layer.solve, name)

    def write(layer, value):
        layer.solve = replace(layer.solve, **{name: value})

    return property(read, write)


for _name in OPTIONS:
    setattr(Solving, _name, _option(_name))


@dataclass
class SolveInfo:
    """How a solve ended, one entry a token, on the device until somebody reads it.

    `residual` is |f(z) - z| / (|f(z)| + 1e-3) of the un-damped map, root mean squares, at the last
    application (inf where it was not finite); `iterations` counts applications of f; `tol` is what
    was asked for. `backward` is the record of the backward solve, once it has run (eager mode).

    `grows` is there in the record of a gradient that is a series cut off by design ("neumann", "jfb",
    "phantom"): True where the last term is not smaller than the one before it, so that the series
    approximates nothing; of "jfb" the last term is the first one left away. A series that shrinks has not
    failed, whatever its `residual`, which is the last change.
    """

    residual: Tensor
    iterations: Tensor
    tol: float
    backward: "SolveInfo | None" = None
    grows: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        """Bool per token, on the device."""
        return self.residual <= self.tol

    @property
    def failed(self) -> Tensor:
        """Bool per token, on the device: what `on_failure` speaks of."""
        return ~self.converged if self.grows is None else self.grows | ~torch.isfinite(self.residual)

    @property
    def reason(self) -> str:
        """Why the worst token stopped: converged, max_iter, diverged or non_finite. Reads the device."""
        if not torch.isfinite(self.residual).all():
            return "non_finite"
        if self.grows is not None and self.grows.any():
            return "diverged"
        return "converged" if self.converged.all() else "max_iter"

    def summary(self) -> dict[str, float | str]:
        """Plain numbers over all tokens, for a log. Reads the device."""
        some = self.residual.numel() > 0
        return {
            "converged": self.converged.float().mean().item() if some else 1.0,
            "iterations": self.iterations.float().mean().item() if some else 0.0,
            "max_iterations": int(self.iterations.max()) if some else 0,
            "residual": self.residual.max().item() if some else 0.0,
            "reason": self.reason,
        }


def apply_policy(
    info: SolveInfo,
    on_failure: str,
    hint: Callable[[], str] = str,
    what: str = "{} tokens did not reach their equilibrium",
) -> None:
    """Warn or raise where a token failed; reads the device unless `on_failure` is ignore.

    `hint` says what to do about it; `what` has a place for "some of all". Inside `torch.compile` nothing
    is looked at.
    """
    if on_failure == "ignore" or torch.compiler.is_compiling() or not (failed := int(info.failed.sum())):
        return
    message = (
        f"{what.format(f'{failed} of {info.residual.numel()}')} ({info.reason}): "
        f"worst residual {info.residual.max().item():.3g} against tol {info.tol:.3g} after "
        f"{int(info.iterations.max())} iterations. "
        f"{hint() or 'Raise max_iter or tol, or make the map contract more.'}"
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, stacklevel=3)


def record_backward(
    info: SolveInfo, record: SolveInfo, upstream: Tensor, on_failure: str, hint: Callable[[], str] = str
) -> None:
    """Set `info.backward`, one entry a token, and apply the policy to it.

    upstream [tokens, N] is the gradient that came: where it is not finite itself, the adjoint has not failed.
    """
    shape = info.residual.shape
    residual, iterations = record.residual.reshape(shape), record.iterations.reshape(shape)
    grows = None if record.grows is None else record.grows.reshape(shape)
    info.backward = SolveInfo(residual, iterations, record.tol, grows=grows)
    if on_failure == "ignore":
        return
    given = torch.isfinite(upstream).all(1).reshape(shape)
    exact = "Take backward='exact', since the series of the gradient does not shrink. "
    apply_policy(
        replace(info.backward, residual=torch.where(given, residual, 0.0)),
        on_failure,
        lambda: ("" if grows is None else exact) + hint(),
        "the gradients of {} tokens are not those of an equilibrium",
    )
