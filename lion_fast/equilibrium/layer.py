"""`LionLayer`: the drop-in equilibrium layer."""

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.contraction import bounded, bounded_product
from lion_fast.equilibrium.functional import check_input, solve_tokens
from lion_fast.equilibrium.masked import Masked
from lion_fast.equilibrium.solve import (
    TOLERANCES,
    SolveInfo,
    SolveOptions,
    Solving,
    takes_solve_options,
)
from lion_fast.errors import OptionError, check_choice, check_number, check_whole
from lion_kernels.reference import ACTIVATIONS

RECURRENCES = ("free", "tied")
# The read-out starts small, so that the layer starts near the identity, and not at zero, where no
# gradient would reach A and W.
READ_OUT_STD = 1e-2


def broken_weights(layer: nn.Module) -> str:
    """What is wrong with weights that hold NaN or Inf, or nothing. Reads the device."""
    broken = [name for name, p in layer.named_parameters() if not torch.isfinite(p).all()]
    if not broken:
        return ""
    return f"The weights {', '.join(broken)} hold NaN or Inf: load or initialise them again."


def hint(layer: nn.Module) -> str:
    """What to do about a solve of `layer` that failed. Reads the device."""
    return broken_weights(layer) or (
        "Raise max_iter or tol, or lower gamma; where it is not finite, look for NaN and Inf in the input or "
        "for numbers beyond its dtype."
    )


class LionLayer(Solving, Masked):
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
        max_iter, tol, damping, backward, neumann_terms, backend, on_failure: see `SolveOptions`.

    Raises OptionError on an option outside its range, ValueError or TypeError on input that does not
    fit. `layer(x, return_info=True)` returns (out, `SolveInfo`), which stays on the device.

    Source: LION, arXiv 2303.09992 (AAAI 2024), in this project's reading: docs/mathematics.md.

    >>> layer = LionLayer(8, state_dim=4)
    >>> out, info = layer(torch.randn(2, 5, 8), return_info=True)
    >>> out.shape, info.reason
    (torch.Size([2, 5, 8]), 'converged')
    """

    matrices = ("A", "W", "V")
    _hint = hint
    # The state width of the layer that `pruning.compact` made this one from.
    compacted_from: int | None = None

    @takes_solve_options()
    def __init__(
        self,
        dim: int,
        state_dim: int = 32,
        *,
        recurrence: str = "free",
        activation: str = "relu",
        gamma: float = 0.8,
        allow_expansive: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **solve,
    ) -> None:
        super().__init__()
        check_choice("recurrence", recurrence, RECURRENCES)
        check_choice("activation", activation, ACTIVATIONS)
        self.solve = SolveOptions(**solve)
        if dtype is not None and dtype not in TOLERANCES:
            raise OptionError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}; got {dtype!r}")
        check_whole("dim", dim)
        check_whole("state_dim", state_dim)
        note = "for a contraction; allow_expansive=True admits more, and then there may be no equilibrium"
        check_number("gamma", gamma, above=0, below=None if allow_expansive else 1, note=note)
        self.dim, self.state_dim = dim, state_dim
        self.recurrence, self.activation = recurrence, activation
        self.gamma, self.allow_expansive = gamma, allow_expansive
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
        # V's gradient through A V is the series' next term: a Jacobian-free gradient is without.
        jacobian_free = self.solve.adjoint(0.0)[0] == 0
        return bounded_product(self.masked("A"), self.masked("V"), limit, gradient_of_V=not jacobian_free)

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        check_input(x, self.dim)
        found = solve_tokens(
            x, self.masked("A"), self.recurrence_matrix(), self.b, self.masked("V"), self.c,
            self.activation, self.solve, return_info=return_info, contracts=self.gamma < 1,
            hint=self._hint,
        )  # fmt: skip
        return found if return_info else found[0]

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, state_dim={self.state_dim}, recurrence={self.recurrence!r}, "
            f"activation={self.activation!r}, gamma={self.gamma}, max_iter={self.max_iter}, "
            f"backward={self.backward!r}, neumann_terms={self.neumann_terms}, backend={self.backend!r}"
        )
