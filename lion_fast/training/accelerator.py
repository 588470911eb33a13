"""The device and the processes of a run, as Accelerate finds them."""

from typing import TYPE_CHECKING

import torch

from lion_fast.errors import OptionError
from lion_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config: TrainConfig) -> "Accelerator":
    """Accelerate's device and processes; `OptionError` for what does not run here."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    # The state is a singleton that would refuse a second run with another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    try:
        accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")
    except ValueError as error:
        raise OptionError(f"mixed_precision={config.mixed_precision!r} cannot run here: {error}") from error
    if config.device not in (None, accelerator.device.type):
        raise OptionError(f"device={config.device!r} cannot run here; there is {accelerator.device.type}")
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # Accelerate would go on without a loss scaler
        raise OptionError(
            "mixed_precision='fp16' cannot run here: it needs an accelerator; a CPU has bf16 or no"
        )
    kind = accelerator.distributed_type
    if kind not in [getattr(DistributedType, name) for name in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU")]:
        raise OptionError(
            f"{kind.value} is not supported: launch with data parallelism (the trained parameters are small, "
            "the frozen backbone is not synchronised)"
        )
    accelerator.gradient_accumulation_steps = 1  # `take_step` accumulates, whatever the launcher says
    return accelerator
