"""A LionLayer run with 2:4 products through torch's semi-structured tensors: inference on wide states."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.equilibrium.functional import check_input
from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.masked import Seen
from lion_fast.equilibrium.solve import SolveInfo, apply_policy
from lion_fast.errors import OptionError
from lion_kernels.reference import ACTIVATIONS, STATE_FLOOR, flag_rows, relative_change

# What both of torch's libraries (cuSPARSELt, CUTLASS) take in half precision.
ROWS, COLUMNS = 32, 64
CAPABILITY = (8, 0)


def is_two_of_four(matrix: Tensor) -> bool:
    """Whether each four neighbours in a row of [N, K] hold two numbers other than zero, or fewer.

    >>> is_two_of_four(torch.tensor([[1.0, 0.0, 2.0, 0.0]])), is_two_of_four(torch.ones(1, 4))
    (True, False)
    """
    if matrix.ndim != 2 or matrix.shape[1] % 4:
        return False
    return bool(((matrix != 0).reshape(-1, 4).sum(1) <= 2).all())


def why_not(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    """The reason why torch has no 2:4 product of a weight [N, K] for such tokens, or None."""
    if device.type != "cuda":
        return f"2:4 products need a CUDA device, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"2:4 products need sm_80 or newer, not sm_{capability[0]}{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"2:4 products are for float16 and bfloat16 tokens, not {dtype}"
    if shape[0] % ROWS or shape[1] % COLUMNS:
        return f"2:4 products need a weight of multiples of {ROWS} x {COLUMNS}, not {shape[0]} x {shape[1]}"
    return None


def compress(matrix: Tensor) -> Tensor:
    """The matrix as torch's semi-structured tensor; `why_not` says where that exists."""
    return torch.sparse.to_sparse_semi_structured(matrix.contiguous())


def _solve(x, A, W, b, V, c, activation, max_iter, tol, damping) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.solve` for weights in x's dtype, dense or compressed: out, residual, steps."""
    phi, (rows, state) = ACTIVATIONS[activation].phi, (len(x), len(b))
    floor = STATE_FLOOR * state**0.5
    q = F.linear(x, A).float() + b.float()
    z, h = torch.zeros_like(q), torch.zeros_like(q)
    active = torch.ones(rows, dtype=torch.bool, device=x.device)
    change = torch.full((rows,), float("inf"), device=x.device)
    count = torch.zeros(rows, dtype=torch.int32, device=x.device)
    for k in range(1, max_iter + 1):
        new = phi(q if k == 1 else q + F.linear(z.to(x.dtype), W).float())
        moved = relative_change(new, z, floor)[:, 0]
        finite = torch.isfinite(moved)
        change = torch.where(active, moved, change)
        count += active
        h = torch.where((active & finite)[:, None], new, h)
        active = active & finite & (change > tol)
        # Asked of the host: a launch for nothing costs more than the question at these widths.
        if not active.any():
            break
        z = torch.where(active[:, None], z + damping * (new - z), z)
    out = (x.float() + F.linear(h.to(x.dtype), V).float() + c.float()).to(x.dtype)
    return out, flag_rows(change, out), count


class TwoOfFourLayer(nn.Module):
    """Runs a LionLayer that is pruned 2:4 on the sparse tensor cores; same parameters, for inference.

    A, W and V are rounded to the tokens' dtype and compressed at the first call and where they have changed
    since. W must be 2:4 here and in `refresh()`; matrices that are not, or whose shape has no 2:4
    product, stay dense. The state is float32, the products are in the tokens' dtype.

    Raises OptionError for a tied layer, for a W that is not 2:4, and at a call that torch has no 2:4 product
    for (a CPU, a device before sm_80, float32, other shapes) or that asks for gradients.

    >>> from lion_fast.pruning import prune_once
    >>> layer = LionLayer(64, 64)
    >>> prune_once(layer, 0.5, granularity="2:4")
    >>> TwoOfFourLayer(layer).why_not(torch.zeros(5, 64))
    '2:4 products need a CUDA device, not cpu'
    """

    def __init__(self, layer: LionLayer) -> None:
        super().__init__()
        if not isinstance(layer, LionLayer) or layer.recurrence != "free":
            raise OptionError("2:4 storage is for a LionLayer with recurrence='free'")
        self.layer = layer
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Forget the compressed weights, and look at the pattern of W again."""
        if not is_two_of_four(self.layer.recurrence_matrix()):
            raise OptionError(
                "W is not 2:4 (two of each four neighbours zero): prune it with granularity='2:4'"
            )
        self._compressed: tuple[tuple, Seen, list[Tensor]] | None = None

    def why_not(self, x: Tensor) -> str | None:
        """The reason why this storage does not run on such tokens, or None."""
        return why_not(x.device, x.dtype, (self.layer.state_dim, self.layer.state_dim))

    @torch.no_grad()
    def _weights(self, x: Tensor) -> list[Tensor]:
        held = [*self.layer.parameters(), *self.layer.buffers()]
        key = (x.device, x.dtype)
        if self._compressed is None or self._compressed[0] != key or not self._compressed[1].same(held):
            layer, found = self.layer, []
            for matrix in (layer.masked("A"), layer.recurrence_matrix(), layer.masked("V")):
                matrix = matrix.to(x.dtype).contiguous()
                fits = why_not(x.device, x.dtype, tuple(matrix.shape)) is None and is_two_of_four(matrix)
                found.append(compress(matrix) if fits else matrix)
            self._compressed = key, Seen(held), found
        return self._compressed[2]

    def forward(self, x: Tensor, return_info: bool = False) -> Tensor | tuple[Tensor, SolveInfo]:
        """As `LionLayer.forward`, without gradients: call it under `torch.no_grad()`."""
        layer = self.layer
        check_input(x, layer.dim)
        if reason := self.why_not(x):
            raise OptionError(f"{reason}; run the layer itself, which is dense")
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in layer.parameters())):
            raise OptionError("2:4 storage has no gradients: call it under torch.no_grad(), train the layer")
        tol = layer.solve.tolerance(x.dtype)
        A, W, V = self._weights(x)
        rows = x.reshape(-1, layer.dim).contiguous()
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            out, change, count = _solve(
                rows, A, W, layer.b, V, layer.c, layer.activation, layer.max_iter, tol, layer.damping
            )
        out = out.reshape(x.shape)
        info = SolveInfo(change.reshape(x.shape[:-1]), count.reshape(x.shape[:-1]), tol)
        apply_policy(info, layer.on_failure, layer._hint)
        return (out, info) if return_info else out
