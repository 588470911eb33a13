"""Where a training step's memory goes: what the backward keeps, by who kept it.

Two instruments with one rule of ownership. `SavedTensors` sums the unique storages that autograd keeps, on
any device: counted, so the same numbers every time. `cuda_activations` reads the CUDA allocator's record.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from lion_fast import frozen

OWNERS = ("backbone", "method", "head", "loss")
# Files whose work is the frozen backbone's, whoever calls it; every other file of ours is a method's
_BACKBONE = (
    "lion_fast/backbones.py",
    "lion_fast/frozen.py",
    "lion_fast/fp8.py",
    "lion_fast/methods/blocks.py",
)
_METHOD = ("/lion_fast/", "/lion_kernels/")


def owner_of(frames: Iterable[tuple[str, str, object]]) -> str:
    """Who works, by the innermost frame that tells: (file, function, the module or None), innermost first.

    >>> owner_of([("torch/nn/functional.py", "gelu", None), ("/x/timm/layers/mlp.py", "forward", None)])
    'backbone'
    """
    for file, function, is_head in frames:
        file = file.replace("\\", "/")
        if is_head:
            return "head"
        if "/timm/" in file or file.endswith(_BACKBONE):
            return "backbone"
        if "/lion_fast/bench/" in file:
            break
        if any(part in file for part in _METHOD):
            in_head = file.endswith("methods/base.py") and function == "forward"
            return "head" if in_head else "method"
    return "loss"


class SavedTensors:
    """Context manager: bytes of the unique storages kept for a backward by what runs inside, by owner.

    Parameters, buffers and `exclude` (the images) are there anyway and do not count. A storage that several
    keep counts once, for the first of backbone, method, head, loss that keeps it; kept as a view, it counts
    whole, since whole is what stays allocated.

    >>> x = torch.ones(1000, requires_grad=True)
    >>> with SavedTensors(nn.Identity()) as kept:
    ...     y = (x + 1).exp().exp()
    >>> kept.total
    8000
    """

    def __init__(self, model: nn.Module, exclude: Iterable[Tensor] = ()):
        self.head = getattr(model, "head", None)
        apart = [*model.parameters(), *model.buffers(), *exclude]
        self._apart = {t.untyped_storage().data_ptr() for t in apart}
        self._kept: dict[int, tuple[int, set[str]]] = {}
        self.tensors: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __enter__(self) -> "SavedTensors":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        frozen.KEEPS.append(self._keep)
        return self

    def __exit__(self, *exc_info: object) -> None:
        frozen.KEEPS.remove(self._keep)
        self._hooks.__exit__(*exc_info)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by owner, in the order of `OWNERS`."""
        found = dict.fromkeys(OWNERS, 0)
        for size, owners in self._kept.values():
            found[next(owner for owner in OWNERS if owner in owners)] += size
        return found

    @property
    def total(self) -> int:
        """Bytes of all owners."""
        return sum(size for size, _ in self._kept.values())

    def _pack(self, t: Tensor) -> Tensor:
        self._keep(t)
        return t

    def _keep(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        where = storage.data_ptr()
        if storage.nbytes() == 0 or where in self._apart:
            return
        owner = owner_of(self._frames())
        # what is kept stays allocated while the graph lives, so an address is one storage
        size, owners = self._kept.setdefault(where, (storage.nbytes(), set()))
        if not owners:
            self.tensors.append((owner, tuple(t.shape), t.dtype))
        owners.add(owner)

    def _frames(self) -> Iterator[tuple[str, str, object]]:
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            own = file.endswith("nn/modules/linear.py") and self.head is not None
            is_head = own and frame.f_locals.get("self") is self.head
            if not file.endswith("bench/memory.py"):
                yield file, frame.f_code.co_name, is_head
            frame = frame.f_back


def saved_bytes(
    model: nn.Module, forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()
) -> dict[str, int]:
    """`SavedTensors.bytes` of one forward; its graph is let go."""
    with SavedTensors(model, exclude) as kept:
        out = forward()
    found = kept.bytes
    del out
    return found


def cuda_activations(forward: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that a forward leaves allocated on CUDA, by owner, from the allocator's snapshot.

    Ownership is by who allocated; `SavedTensors` goes by who keeps. The totals agree but for the allocator's
    rounding and what is alive without being kept, such as the logits.
    """
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history("all", context="alloc", stacks="python")
    try:
        out = forward()
        torch.cuda.synchronize()
        snapshot = torch.cuda.memory._snapshot()
    finally:
        torch.cuda.memory._record_memory_history(None)
    found: Counter[str] = Counter(dict.fromkeys(OWNERS, 0))
    for segment in snapshot["segments"]:
        for block in segment["blocks"]:
            frames = block.get("frames") or ()
            if block["state"] == "active_allocated" and frames:
                told = owner_of((f["filename"], f["name"], False) for f in frames)
                found[told] += block.get("requested_size", block["size"])
    del out
    return dict(found)


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
    """Bytes of the backbone's and the other weights, of gradients, and of the optimiser's state."""
    backbone = {id(p) for p in model.backbone.parameters()} if hasattr(model, "backbone") else set()
    found = {"backbone_weights": 0, "method_weights": 0, "gradients": 0, "optimiser": 0}
    for p in model.parameters():
        size = p.numel() * p.element_size()
        found["backbone_weights" if id(p) in backbone else "method_weights"] += size
        found["gradients"] += size if p.requires_grad else 0
    for state in optimizer.state.values() if optimizer is not None else ():
        found["optimiser"] += sum(t.numel() * t.element_size() for t in state.values() if torch.is_tensor(t))
    return found
