"""A LionLayer run with block-sparse products: the storage for wide states with dead blocks."""

import torch
from torch import Tensor, nn

from lion_fast.equilibrium.functional import backward_record, check_input
from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.masked import Seen
from lion_fast.equilibrium.solve import SolveInfo, apply_policy
from lion_fast.equilibrium.solvers import final
from lion_fast.errors import OptionError
from lion_kernels import launch_step, reference
from lion_kernels.blocks import BLOCKS, BlockSparse, find_pattern
from lion_kernels.sparse import has_kernels


class _BlockSparseEquilibrium(torch.autograd.Function):
    """As `functional._Equilibrium`; A, W and V are the values of their patterns where they have one."""

    @staticmethod
    def forward(ctx, x, A, W, b, V, c, patterns, activation, max_iter, tol, damping, adjoint, tell):
        weights = _weights((A, W, V), patterns)
        if _on_kernels(x, b):
            from lion_kernels.step import solve_wide as solve
        else:
            weights, solve = [_dense(w) for w in weights], reference.solve
        out, p, change, count = solve(
            x, weights[0], weights[1], b, weights[2], c, activation, max_iter, tol, damping, True
        )
        ctx.save_for_backward(x, p, A, W, V)
        ctx.patterns, ctx.options, ctx.dtypes = patterns, (activation, *adjoint, True), (b.dtype, c.dtype)
        ctx.tol, ctx.tell = tol, tell
        ctx.mark_non_differentiable(change, count)
        return out, change, count

    @staticmethod
    def backward(ctx, grad_out, _change, _count):
        x, p, A, W, V = ctx.saved_tensors
        with torch.no_grad():
            grads = _BlockSparseEquilibrium._gradients(ctx, grad_out, x, p, A, W, V)
        return *final(grads, grad_out, x, A, W, V), *[None] * 7

    @staticmethod
    def _gradients(ctx, grad_out, x, p, A, W, V):
        weights, kernels = _weights((A, W, V), ctx.patterns), _on_kernels(x, p)
        if kernels:
            from lion_kernels.step import adjoint_wide as adjoint
        else:
            weights, adjoint = [_dense(w) for w in weights], reference.adjoint
        dx, dA, dW, db, dV, dc, change, count = adjoint(grad_out.contiguous(), x, p, *weights, *ctx.options)
        if ctx.tell is not None:
            ctx.tell(SolveInfo(change, count, ctx.tol), grad_out, p, _dense(weights[1]), _dense(weights[2]))
        grads = []
        for grad, own, pattern in zip((dA, dW, dV), (A, W, V), ctx.patterns, strict=True):
            grad = grad if pattern is None or kernels else pattern.gather(grad)
            grads.append(grad.to(own.dtype))
        dA, dW, dV = grads
        return dx, dA, dW, db.to(ctx.dtypes[0]), dV, dc.to(ctx.dtypes[1])


def _weights(tensors, patterns) -> list[Tensor | BlockSparse]:
    return [
        t if pattern is None else BlockSparse(pattern, t)
        for t, pattern in zip(tensors, patterns, strict=True)
    ]


def _dense(weight: Tensor | BlockSparse) -> Tensor:
    return weight.dense() if isinstance(weight, BlockSparse) else weight


def _on_kernels(x: Tensor, state: Tensor) -> bool:
    return has_kernels(x) and launch_step.why_not(x.dtype, state.shape[-1]) is None


class BlockSparseLayer(nn.Module):
    """Runs a pruned LionLayer over the kept blocks of A, W and V alone; same parameters, same outputs.

    A block of `block` x `block` without a kept entry is neither loaded nor multiplied, and its weights'
    gradient is not formed. Which blocks these are is looked up from the layer's masks here, by `refresh()`,
    and where a mask has changed since. A matrix without a mask stays dense. Where the
    kernels do not run, plain torch does, with dense products.

    Raises OptionError for a tied layer, whose Wh = A V is dense, for one without masks, and for another
    block than 16, 32 or 64.

    >>> from lion_fast.pruning import prune_once
    >>> layer = LionLayer(32, 32)
    >>> prune_once(layer, 0.5, granularity="block", block=16)
    >>> x = torch.randn(5, 32)
    >>> bool((BlockSparseLayer(layer, 16)(x) - layer(x)).abs().max() < 1e-6)
    True
    """

    def __init__(self, layer: LionLayer, block: int = 64) -> None:
        super().__init__()
        if not isinstance(layer, LionLayer) or layer.recurrence != "free":
            raise OptionError("block-sparse storage is for a LionLayer with recurrence='free'")
        if block not in BLOCKS:
            raise OptionError(f"block must be one of {', '.join(map(str, BLOCKS))}; got {block!r}")
        self.layer, self.block = layer, block
        self.refresh()

    def refresh(self) -> None:
        """Look up the kept blocks again."""
        masks = self.layer.masks()
        if not masks:
            raise OptionError("the layer has no masks: prune it with granularity='block' first")
        self._patterns = {name: find_pattern(mask, self.block) for name, mask in masks.items()}
        self._seen = Seen(masks.values())

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        """As `LionLayer.forward`."""
        layer = self.layer
        check_input(x, layer.dim)
        tol = layer.solve.tolerance(x.dtype)
        matrices = {"A": layer.masked("A"), "W": layer.recurrence_matrix(), "V": layer.masked("V")}
        if not self._seen.same(layer.masks().values()):
            self.refresh()
        patterns = tuple(self._patterns.get(name) for name in matrices)
        A, W, V = (
            t if pattern is None else pattern.gather(t)
            for t, pattern in zip(matrices.values(), patterns, strict=True)
        )
        if layer.max_iter == 1:
            W = W * 0  # as in `equilibrium`
        wanted = (return_info or layer.on_failure != "ignore") and layer.max_iter > 1
        told, tell = backward_record(layer.activation, layer.solve, tol, layer.gamma < 1, layer._hint)
        with torch.autocast(x.device.type, enabled=False):
            out, change, count = _BlockSparseEquilibrium.apply(
                x.reshape(-1, layer.dim).contiguous(), A, W, layer.b, V, layer.c, patterns, layer.activation,
                layer.max_iter, tol, layer.damping, layer.solve.adjoint(tol),
                tell if wanted else None,
            )  # fmt: skip
        out = out.reshape(x.shape)
        info = SolveInfo(change.reshape(x.shape[:-1]), count.reshape(x.shape[:-1]), tol)
        told.append(info)
        apply_policy(info, layer.on_failure, layer._hint)
        return (out, info) if return_info else out
