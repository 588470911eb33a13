"""What an adapter holds and how its equilibria behave: parameters, bounds, measured rates."""

import copy
import platform
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast import __version__
from lion_fast.equilibrium.contraction import spectral_norm_bound
from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.pixel import PixelEnd, conv_norm_bound
from lion_fast.equilibrium.states import StateLayer
from lion_fast.methods import TunedModel
from lion_fast.methods.reading import ReadOut
from lion_fast.pruning import count_parameters
from lion_kernels.reference import ACTIVATIONS

_RATE_STEPS = 200
_RATE_ROWS = 4096


def parameter_counts(model: TunedModel) -> dict[str, int]:
    """`count_parameters` as reports name it: "dense", "kept", and "with_head", which is kept and the head.

    >>> import lion_fast
    >>> small = lion_fast.load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2)
    >>> parameter_counts(lion_fast.create(small, "lion", num_classes=10, state_dim=16))
    {'dense': 3344, 'kept': 3344, 'with_head': 7834}
    """
    counts = count_parameters(model, model.head)
    return {"dense": counts["dense"], "kept": counts["kept"], "with_head": counts["kept_with_head"]}


def ends(model: nn.Module) -> dict[str, nn.Module]:
    """The equilibrium ends of a LION model by name; empty for other methods.

    Of a read-out of states it is the `StateLayer` in it.
    """
    found = {name: getattr(model, f"{name}_end", None) for name in ("input", "output")}
    found = {name: end.layer if isinstance(end, ReadOut) else end for name, end in found.items()}
    return {name: end for name, end in found.items() if isinstance(end, (LionLayer, PixelEnd, StateLayer))}


def measure_ends(model: TunedModel, images: Tensor) -> dict[str, dict[str, float]]:
    """Per end: bound, measured rate and iterations, of one forward pass on images (B, 3, H, W).

    `gamma` is the bound asked for, `certified` the bound Lip(phi) ||Wh|| that holds for the weights as they
    are. `rate` is measured in float64 on tokens of these images: the largest ratio of successive steps of
    the plain iteration, |Z^{k+1} - Z^k| / |Z^k - Z^{k-1}| over all tokens, once the steps are a thousandth
    of the first. `iterations` and `max_iterations` are what the solver needed at its own tolerance,
    `residual` the worst.
    """
    inputs: dict[str, Tensor] = {}
    hooks = [
        end.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, end in ends(model).items()
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    report = {}
    for name, end in ends(model).items():
        with torch.no_grad():
            certified, rate = _bound_and_rate(end, inputs[name])
            with model.backbone.autocast(images.device):
                told = end(inputs[name], return_info=True)[1].summary()
        report[name] = {"gamma": end.gamma, "certified": certified, "rate": rate}
        for key in ("iterations", "max_iterations", "residual", "converged"):
            report[name][key] = float(told[key])
    return report


def _bound_and_rate(end: nn.Module, x: Tensor) -> tuple[float, float]:
    end = copy.deepcopy(end).double()
    activation = ACTIVATIONS[end.activation]
    if isinstance(end, (LionLayer, StateLayer)):
        recurrence = end.recurrence_matrix()
        certified = activation.lipschitz * spectral_norm_bound(recurrence).item()
        q = x.reshape(-1, x.shape[-1])[:_RATE_ROWS].double() @ end.A.T + end.b
        steps = _steps(lambda z: activation.phi(z @ recurrence.T + q), q)
    else:
        kernel = end.recurrence_kernel(*x.shape[-2:])
        certified = activation.lipschitz * conv_norm_bound(kernel, *x.shape[-2:]).item()
        q = F.conv2d(x[:4].double(), end.U, end.b, padding=1)
        steps = _steps(lambda z: activation.phi(F.conv2d(z, kernel, padding=1) + q), q)
    return certified, _rate(list(steps))


def _steps(f, like: Tensor) -> Iterator[float]:
    """|Z^{k+1} - Z^k| over all tokens, k = 0, 1, ..., from Z^0 = 0, until nothing but rounding is left."""
    z, first = torch.zeros_like(like), None
    for _ in range(_RATE_STEPS):
        new = f(z)
        step = (new - z).norm().item()
        first = step if first is None else first
        if step <= 1e-12 * first:
            return
        yield step
        z = new


def _rate(steps: list[float]) -> float:
    late = [b / a for a, b in zip(steps, steps[1:], strict=False) if a <= 1e-3 * steps[0]]
    return max(late) if late else 0.0


def environment() -> dict[str, object]:
    """Versions, device, and whether the Triton backend can run, with the reason where it cannot."""
    import timm
    import torchvision

    from lion_kernels.ops import why_not_triton

    cuda = torch.cuda.is_available()
    reason = why_not_triton(torch.device("cuda" if cuda else "cpu"), torch.float32, 32)
    return {
        "lion_fast": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "triton": reason is None,
        "triton_reason": reason,
    }
