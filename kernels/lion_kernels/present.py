"""What this process and its device are now; asked when a kernel is launched, never at an import."""

import contextlib
import functools
import importlib.util
import os

import torch
from torch import Tensor

from lion_kernels import launch

# The first release that compiles every kernel: on some, the compilers of 3.2 and 3.5 end the process
OLDEST = (3, 6)


@functools.cache
def triton_missing() -> str | None:
    """Why there is no Triton that compiles the kernels, or None; the interpreter takes older ones."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if interpreted() or tuple(map(int, triton.__version__.split(".")[:2])) >= OLDEST:
        return None
    return f"the kernels need Triton {OLDEST[0]}.{OLDEST[1]} or newer; {triton.__version__} is installed"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, as TRITON_INTERPRET=1 asks before the first import."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a CUDA device; of the interpreter's tables on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def tf32_allowed() -> bool:
    """Whether torch lets float32 products on CUDA run in tf32, by either of its two settings."""
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", None)
    return settings.allow_tf32 if precision is None else precision == "tf32"


def numerics(dtype: torch.dtype) -> dict[str, str]:
    """`launch.numerics` under torch's present settings, in the interpreter where that is on."""
    return launch.numerics(dtype, tf32_allowed(), interpreted())


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes the device of `x` the current one, where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
