"""Multiply-accumulates, counted as they run, and the formulas that the counts are checked against."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lion_kernels import ops


def counted_macs(work: Callable[[], object]) -> int:
    """Multiply-accumulates of every matrix product, convolution, attention and equilibrium in `work()`.

    torch's own counter (two FLOPs are one), with rules added for the equilibrium: what its solver really
    did, iteration by iteration. Elementwise work, norms and softmax do not count, as is usual.

    >>> a = torch.ones(2, 3)
    >>> counted_macs(lambda: a @ a.T)
    12
    """
    with _Counter() as counter:
        work()
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """torch's rules without its module tracking, whose hooks stumble over views made without gradients."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = _RULES.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
        if rule is None and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if rule is not None:
            self.flops += rule(*args, **kwargs, out_val=out)
        return out


def _solve(x, A, *args, out_val=None, **kwargs) -> int:
    (rows, width), state = x.shape, A.shape[0]
    # injection and read-out once per row, one R x R product per application after the first (from z = 0)
    applications = int(out_val[3].clamp_min(1).sum())
    return 2 * (2 * rows * width * state + (applications - rows) * state * state)


def _adjoint(grad_out, x, p, A, *args, out_val=None, **kwargs) -> int:
    (rows, width), state = x.shape, A.shape[0]
    terms = int(out_val[7].sum())
    # V^T g, then the terms, then dx, dA, dV (D R each) and dW
    return 2 * (4 * rows * width * state + (terms + rows) * state * state)


def _attention(query, key, value, *args, out_val=None, **kwargs) -> int:
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(grad_out, query, key, value, *args, out_val=None, **kwargs) -> int:
    # the scores again, then the gradients of scores, q, k and v: as torch counts its CUDA kernels
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[-2] * (3 * width + 2 * value.shape[-1])


_RULES = {
    torch.ops.lion_kernels.solve: _solve,
    torch.ops.lion_kernels.adjoint: _adjoint,
    # torch's CPU attention, which older counters do not know
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
assert ops.solve is torch.ops.lion_kernels.solve.default


def vit_macs(
    depth: int,
    width: int,
    patches: int = 196,
    *,
    prefix: int = 1,
    patch: int = 16,
    prompts: int = 0,
    form="naive",
) -> int:
    """Multiply-accumulates per image of a plain ViT without head: n_p 3 p^2 D + L (12 n D^2 + 2 n m D).

    n query rows, m key rows in a block. Prompts (in every block) are rows like others in the "naive" form;
    in the "exact" one only keys and values, cached; "cvpt" adds to the blocks a cross-attention to cached
    keys and values: 2 n D^2 + 2 n P D.

    >>> f"{vit_macs(12, 768) / 1e9:.2f}"
    '17.56'
    """
    rows = patches + prefix + (prompts if form == "naive" else 0)
    keys = rows + (prompts if form == "exact" else 0)
    block = 12 * rows * width**2 + 2 * rows * keys * width
    if form == "cvpt":
        block += 2 * rows * width**2 + 2 * rows * prompts * width
    return patches * 3 * patch**2 * width + depth * block
