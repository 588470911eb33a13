"""The layer as its formula reads: the oracle of the tests and the "before" of every benchmark."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.equilibrium import layer
from lion_fast.equilibrium.contraction import contraction_scale
from lion_fast.equilibrium.functional import check_input
from lion_fast.equilibrium.solve import SolveInfo, apply_policy
from lion_fast.equilibrium.solvers import solve_implicit
from lion_kernels.reference import ACTIVATIONS, accumulate_dtype, flag_rows


class LionLayer(layer.LionLayer):
    """`lion_fast.LionLayer` by an eager loop over f(z; x); same arguments, state_dict and meaning.

    recurrence="free" iterates z in R dimensions, "tied" the token-space state y in D dimensions,
    y = V phi(A (x + s y) + b) with the scale s of the contraction bound inside. The injection is
    computed in each application of f, one stop test is made a step, and every product is its own
    kernel. `backend` is accepted and ignored. The residual of "tied" is measured in token space.

    >>> fast, plain = layer.LionLayer(8, 4), LionLayer(8, 4)
    >>> _ = plain.load_state_dict(fast.state_dict())
    >>> x = torch.randn(3, 8)
    >>> bool((fast(x) - plain(x)).abs().max() < 1e-4)
    True
    """

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        check_input(x, self.dim)
        phi = ACTIVATIONS[self.activation].phi
        acc = accumulate_dtype(x.dtype)
        options = replace(self.solve, tol=self.solve.tolerance(x.dtype))
        with torch.autocast(x.device.type, enabled=False):
            tokens = x.reshape(-1, self.dim).to(acc)
            weights = self.masked("A"), self.recurrence_matrix(), self.b, self.masked("V"), self.c
            A, Wh, b, V, c = (t.to(acc) for t in weights)
            if self.recurrence == "free":
                z0 = tokens.new_zeros(tokens.shape[0], self.state_dim)

                def f(z: Tensor, x: Tensor) -> Tensor:
                    return phi(F.linear(z, Wh) + F.linear(x, A, b))

            else:
                z0 = torch.zeros_like(tokens)
                limit = self.gamma / ACTIVATIONS[self.activation].lipschitz
                s = contraction_scale(A @ V, limit, self.A.dtype)

                def f(y: Tensor, x: Tensor) -> Tensor:
                    return F.linear(phi(F.linear(x + s * y, A, b)), V)

            z, info = solve_implicit(
                f,
                tokens,
                z0,
                options,
                options.terms,
                early_exit=True,
                return_info=return_info,
                hint=self._hint,
            )
            prompt = (F.linear(z, V) if self.recurrence == "free" else z) + c
            out = (tokens + prompt).to(x.dtype)
        info.residual = flag_rows(info.residual, out.detach()).reshape(x.shape[:-1])
        info.iterations = info.iterations.reshape(x.shape[:-1])
        apply_policy(info, self.on_failure, self._hint)
        out = out.reshape(x.shape)
        return (out, info) if return_info else out


def replace_layers(model: nn.Module) -> nn.Module:
    """Turn every `reference.LionLayer` inside `model` into the fast one, in place; returns `model`.

    Parameters, buffers, hooks and options stay the same objects, so an optimiser keeps working.

    >>> model = nn.Sequential(LionLayer(8), nn.Linear(8, 2))
    >>> type(replace_layers(model)[0]) is layer.LionLayer
    True
    """
    for module in model.modules():
        if type(module) is LionLayer:
            module.__class__ = layer.LionLayer
    return model
