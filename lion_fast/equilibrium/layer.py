"""`LionLayer`: the drop-in equilibrium layer."""

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.contraction import bounded, contraction_scale
from lion_fast.equilibrium.functional import adjoint_options, equilibrium
from lion_fast.equilibrium.masked import Masked
from lion_fast.equilibrium.solvers import SolveInfo, apply_policy, check_solve_options
from lion_fast.errors import OptionError, check_choice, check_number, check_whole, names_options
from lion_kernels import ops
from lion_kernels.reference import ACTIVATIONS

RECURRENCES = ("free", "tied")
# The read-out starts small, so that the layer starts near the identity, and not at zero, where no
# gradient would reach A and W.
READ_OUT_STD = 1e-2


class LionLayer(Masked):
    """out = x + Z V^T + c with the equilibrium Z = phi(Z Wh^T + x A^T + b), per token.

    Parameters: injection A [R, D], recurrence W [R, R], bias b [R], read-out V [D, R], bias c [D] for
    width D = `dim` and state width R = `state_dim`: 2RD + R^2 + R + D numbers. Wh is W scaled down
    where needed so that Lip(phi) ||Wh||_2 <= `gamma` for certain, whatever the weights. With
    `recurrence="tied"` there is no W and Wh comes from A V: the infinitely deep weight-tied adapter.

    x [..., D] of any leading shape and float dtype gives out of the same shape and dtype.

    Args:
        dim: width D of a token.
        state_dim: width R of the state.
        recurrence: "free" or "tied".
        activation: relu, tanh, gelu (erf), gelu_tanh or silu.
        gamma: contraction bound in (0, 1); `allow_expansive=True` admits more, and then a token that
            does not converge keeps its last finite state and is flagged.
        damping: step length beta in (0, 1].
        max_iter: applications of f at most; 1 is a plain adapter.
        tol: relative residual per token; None is 1e-2 for half types, 1e-4 float32, 1e-8 float64.
        backward: neumann, jfb, exact or phantom (see `functional.equilibrium`).
        neumann_terms: terms of the series after the first.
        backend: auto, torch or triton. auto is Triton on a CUDA device that has it.
        on_failure: ignore, warn or raise when a token does not converge; the last two synchronise
            with the device, and outside `torch.compile` only.

    Raises OptionError on an option outside its range, ValueError or TypeError on input that does not
    fit. `layer(x, return_info=True)` returns (out, `SolveInfo`), which stays on the device.

    Source: LION, arXiv 2303.09992 (AAAI 2024), in this project's reading: docs/mathematics.md.

    >>> layer = LionLayer(8, state_dim=4)
    >>> out, info = layer(torch.randn(2, 5, 8), return_info=True)
    >>> out.shape, info.reason
    (torch.Size([2, 5, 8]), 'converged')
    """

    matrices = ("A", "W", "V")
    # The state width of the layer that `compact` made this one from.
    compacted_from: int | None = None

    @names_options
    def __init__(
        self,
        dim: int,
        state_dim: int = 32,
        *,
        recurrence: str = "free",
        activation: str = "relu",
        gamma: float = 0.8,
        damping: float = 1.0,
        max_iter: int = 50,
        tol: float | None = None,
        backward: str = "neumann",
        neumann_terms: int = 8,
        backend: str = "auto",
        on_failure: str = "ignore",
        allow_expansive: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("recurrence", recurrence, RECURRENCES)
        check_choice("activation", activation, ACTIVATIONS)
        check_choice("backend", backend, ops.BACKENDS)
        check_solve_options(
            max_iter=max_iter,
            tol=tol,
            damping=damping,
            backward=backward,
            neumann_terms=neumann_terms,
            on_failure=on_failure,
        )
        check_whole("dim", dim)
        check_whole("state_dim", state_dim)
        check_number("gamma", gamma)
        if not (0 < gamma < 1 or (allow_expansive and gamma >= 1)):
            raise OptionError(
                f"gamma must be in (0, 1) for a contraction; got {gamma!r}. "
                "allow_expansive=True admits gamma >= 1, without a guarantee that an equilibrium exists."
            )
        self.dim, self.state_dim = dim, state_dim
        self.recurrence, self.activation = recurrence, activation
        self.gamma, self.damping, self.max_iter, self.tol = gamma, damping, max_iter, tol
        self.backward, self.neumann_terms = backward, neumann_terms
        self.backend, self.on_failure, self.allow_expansive = backend, on_failure, allow_expansive
        new = {"device": device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(state_dim, dim, **new))
        if recurrence == "free":
            self.W = nn.Parameter(torch.empty(state_dim, state_dim, **new))
        else:
            self.register_parameter("W", None)
        self.b = nn.Parameter(torch.empty(state_dim, **new))
        self.V = nn.Parameter(torch.empty(dim, state_dim, **new))
        self.c = nn.Parameter(torch.empty(dim, **new))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and W normal with variance 1/D and 1/R, V normal and small, b and c zero."""
        nn.init.normal_(self.A, std=self.dim**-0.5)
        if self.W is not None:
            nn.init.normal_(self.W, std=self.state_dim**-0.5)
        nn.init.normal_(self.V, std=READ_OUT_STD)
        nn.init.zeros_(self.b)
        nn.init.zeros_(self.c)

    def recurrence_matrix(self) -> Tensor:
        """Wh [R, R] with Lip(phi) ||Wh||_2 <= gamma, in the graph of the parameters."""
        limit = self.gamma / ACTIVATIONS[self.activation].lipschitz
        if self.W is not None:
            return bounded(self.masked("W"), limit)
        with torch.autocast(self.A.device.type, enabled=False):
            # V's gradient through A V is the series' next term: a Jacobian-free gradient is without.
            jacobian_free = adjoint_options(self.backward, self.neumann_terms, self.max_iter, 0.0)[0] == 0
            A, V = self.masked("A"), self.masked("V")
            W = A @ (V.detach() if jacobian_free else V)
            scale = contraction_scale(A @ V, limit)
            return (W.to(scale.dtype) * scale).to(W.dtype)

    def compact(self) -> "LionLayer":
        """A smaller layer without the hidden units that pruning left dead; see `pruning.compact`."""
        from lion_fast import pruning

        return pruning.compact(self)

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        inspect = self.on_failure != "ignore" and not torch.compiler.is_compiling()
        out = equilibrium(
            x,
            self.masked("A"),
            self.recurrence_matrix(),
            self.b,
            self.masked("V"),
            self.c,
            activation=self.activation,
            max_iter=self.max_iter,
            tol=self.tol,
            damping=self.damping,
            backward=self.backward,
            neumann_terms=self.neumann_terms,
            backend=self.backend,
            return_info=return_info or inspect,
        )
        if inspect:
            apply_policy(out[1], self.on_failure, self._hint())
            return out if return_info else out[0]
        return out

    def _hint(self) -> str:
        broken = [name for name, p in self.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            return f"The weights {', '.join(broken)} hold NaN or Inf: load or initialise them again."
        return "Raise max_iter or tol, or lower gamma."

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, state_dim={self.state_dim}, recurrence={self.recurrence!r}, "
            f"activation={self.activation!r}, gamma={self.gamma}, max_iter={self.max_iter}, "
            f"backward={self.backward!r}, neumann_terms={self.neumann_terms}, backend={self.backend!r}"
        )


def replace_layers(model: nn.Module) -> nn.Module:
    """Turn every `reference.LionLayer` inside `model` into the fast one, in place; returns `model`.

    Parameters, buffers, hooks and options stay the same objects, so an optimiser keeps working.

    >>> from lion_fast import reference
    >>> model = nn.Sequential(reference.LionLayer(8), nn.Linear(8, 2))
    >>> type(replace_layers(model)[0]) is LionLayer
    True
    """
    from lion_fast import reference

    for module in model.modules():
        if type(module) is reference.LionLayer:
            module.__class__ = LionLayer
    return model
