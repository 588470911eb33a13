"""`StateLayer`: an equilibrium layer that gives its states instead of adding their read-out."""

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.contraction import bounded
from lion_fast.equilibrium.functional import check_input, solve_tokens
from lion_fast.equilibrium.layer import hint
from lion_fast.equilibrium.masked import Masked
from lion_fast.equilibrium.solve import SolveInfo, SolveOptions, Solving, takes_solve_options
from lion_fast.errors import check_choice, check_gamma, check_whole
from lion_kernels.reference import ACTIVATIONS, linear


class StateLayer(Solving, Masked):
    """Z = phi(Z Wh^T + x A^T + b), per token: the equilibrium of a `LionLayer` without its read-out.

    Parameters: injection A [R, D], recurrence W [R, R], bias b [R]: R D + R^2 + R numbers. Wh is bounded as
    in a `LionLayer`. x [..., D] of any float dtype gives Z [..., R] in x's dtype, under autocast too. The
    injection is a product of its own, given in x's dtype; the solve then runs on tokens of width R, by the
    kernels of `LionLayer`. On a CPU a token's bits do not depend on its batch; on a GPU the injection is
    the vendor's product, which promises no such thing.

    Args:
        dim: width D of a token.
        state_dim: width R of the state.
        activation, gamma, damping, max_iter, tol, backward, neumann_terms, backend, on_failure: see
            `LionLayer`. max_iter=1 leaves phi(x A^T + b), and W without effect.

    Raises OptionError on an option outside its range, ValueError or TypeError on input that does not fit.

    >>> layer = StateLayer(8, state_dim=4)
    >>> layer(torch.randn(2, 5, 8)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 5, 4]), 52)
    """

    matrices = ("A", "W")
    _hint = hint

    @takes_solve_options()
    def __init__(
        self, dim: int, state_dim: int = 32, *, activation: str = "tanh", gamma: float = 0.8, **solve
    ) -> None:
        super().__init__()
        check_choice("activation", activation, ACTIVATIONS)
        self.solve = SolveOptions(**solve)
        check_whole("dim", dim)
        check_whole("state_dim", state_dim)
        check_gamma(gamma)
        self.dim, self.state_dim = dim, state_dim
        self.activation, self.gamma = activation, gamma
        self.A = nn.Parameter(torch.empty(state_dim, dim))
        self.W = nn.Parameter(torch.empty(state_dim, state_dim))
        self.b = nn.Parameter(torch.empty(state_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A and W normal with variance 1/D and 1/R, b zero."""
        nn.init.normal_(self.A, std=self.dim**-0.5)
        nn.init.normal_(self.W, std=self.state_dim**-0.5)
        nn.init.zeros_(self.b)

    def recurrence_matrix(self) -> Tensor:
        """Wh [R, R] with Lip(phi) ||Wh||_2 <= gamma, in the graph of the parameters."""
        return bounded(self.masked("W"), self.gamma / ACTIVATIONS[self.activation].lipschitz)

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        check_input(x, self.dim)
        W = self.recurrence_matrix()
        # as a LionLayer's, the state does not depend on whether autocast is on
        with torch.autocast(x.device.type, enabled=False):
            q = linear(x.reshape(-1, self.dim), self.masked("A"), self.b).reshape(
                *x.shape[:-1], self.state_dim
            )
        # with A = V = 1 and b = c = 0 the whole solve's output is its state; each a tensor of its own, since
        # torch.compile leaves the graph where an autograd.Function gets one twice
        new = {"dtype": self.A.dtype, "device": self.A.device}
        A, V = (torch.eye(self.state_dim, **new) for _ in range(2))
        b, c = (torch.zeros(self.state_dim, **new) for _ in range(2))
        z, info = solve_tokens(
            q, A, W, b, V, c, self.activation, self.solve,
            residual=False, return_info=return_info, contracts=self.gamma < 1, hint=self._hint,
        )  # fmt: skip
        z = z.to(x.dtype)
        return (z, info) if return_info else z

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, state_dim={self.state_dim}, activation={self.activation!r}, gamma={self.gamma}, "
            f"backend={self.backend!r}"
        )
