"""Where a step's memory goes: what the backward keeps, by who kept it, the peak, and what is there anyway.

What is kept has two instruments with one rule of ownership. `SavedTensors` sums the unique storages that
autograd keeps, on any device: counted, so the same numbers every time. `cuda_activations` finds them in the
CUDA allocator.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lion_fast.backbones import Backbone, cheaper
from lion_fast.backbones.at_work import AtWork
from lion_fast.training.memory import PeakMemory

OWNERS = ("backbone", "method", "head", "loss")


def owners_of(model: nn.Module) -> dict[int, str]:
    """Whose work each module of a model does, by its id: the backbone's, the head's, else the method's.

    A module that a method put into a block of the backbone, and holds itself too, is the method's.

    >>> stack = nn.Sequential(nn.Linear(2, 2))
    >>> set(owners_of(stack).values())
    {'method'}
    """
    if isinstance(model, Backbone):
        return {id(module): "backbone" for module in model.modules()}
    owners = {}
    for name, module in model.named_modules(remove_duplicate=False):
        place = name.split(".")[0]
        owner = place if place in ("backbone", "head") else "method"
        if owners.get(id(module)) != "method":
            owners[id(module)] = owner
    return owners


class SavedTensors:
    """Context manager: bytes of the unique storages kept for a backward by what runs inside, by owner.

    Parameters, buffers and `exclude` (the images) are there anyway and do not count. A storage that several
    keep counts once, for the first of backbone, method, head, loss that keeps it; kept as a view, it counts
    whole, since whole is what stays allocated. Who keeps is whose module is at work (`AtWork`), and outside
    of all modules the loss. A part of the graph that is let go on the way counts too.

    >>> x = torch.ones(1000, requires_grad=True)
    >>> with SavedTensors(nn.Identity()) as kept:
    ...     y = (x + 1).exp().exp()
    >>> kept.total
    8000
    """

    def __init__(self, model: nn.Module, exclude: Iterable[Tensor] = ()):
        self._work = AtWork(owners_of(model), outside="loss")
        apart = [*model.parameters(), *model.buffers(), *exclude]
        self._apart = {t.untyped_storage().data_ptr() for t in apart}
        self._kept: dict[int, tuple[int, set[str]]] = {}
        # held while counting: a part of the graph that is let go on the way would give its address to others
        self._held: list[torch.UntypedStorage] = []
        self.tensors: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __enter__(self) -> "SavedTensors":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        cheaper.KEEPS.append(self._keep)
        self._work.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._held.clear()
        self._work.__exit__(*exc_info)
        cheaper.KEEPS.remove(self._keep)
        self._hooks.__exit__(*exc_info)

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by owner, in the order of `OWNERS`."""
        found = dict.fromkeys(OWNERS, 0)
        for size, owners in self._kept.values():
            found[_first(owners)] += size
        return found

    @property
    def addresses(self) -> dict[int, str]:
        """The owner of each storage that is kept, by its address."""
        return {where: _first(owners) for where, (_, owners) in self._kept.items()}

    @property
    def total(self) -> int:
        """Bytes of all owners."""
        return sum(size for size, _ in self._kept.values())

    def _pack(self, t: Tensor) -> Tensor:
        self._keep(t)
        # a result would keep the node that it came from, and that keeps it
        return t if t.is_leaf else t.detach()

    def _keep(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        where = storage.data_ptr()
        if storage.nbytes() == 0 or where in self._apart:
            return
        owner = self._work.name
        size, owners = self._kept.setdefault(where, (storage.nbytes(), set()))
        if not owners:
            self._held.append(storage)
            self.tensors.append((owner, tuple(t.shape), t.dtype))
        owners.add(owner)


def _first(owners: set[str]) -> str:
    return next(owner for owner in OWNERS if owner in owners)


def saved_bytes(
    model: nn.Module, forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()
) -> dict[str, int]:
    """`SavedTensors.bytes` of one forward; its graph is let go."""
    with SavedTensors(model, exclude) as kept:
        out = forward()
    found = kept.bytes
    del out
    return found


def cuda_activations(
    model: nn.Module, forward: Callable[[], Tensor], exclude: Iterable[Tensor] = ()
) -> dict[str, int]:
    """Bytes that a forward leaves allocated on CUDA, by the owners of `SavedTensors`, from the allocator.

    "unkept" is what is alive without being kept for the backward, such as the logits.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory._snapshot()
    with SavedTensors(model, exclude) as kept:
        out = forward()
    torch.cuda.synchronize()
    found = allocated_since(before, torch.cuda.memory._snapshot(), kept.addresses)
    del out
    return found


def allocated_since(
    before: Mapping[str, Any], after: Mapping[str, Any], kept: Mapping[int, str]
) -> dict[str, int]:
    """Bytes asked for in blocks of one snapshot of CUDA's allocator that an earlier one does not hold.

    A block belongs to who keeps the storage at its address, by `kept`; else it is "unkept". A block that was
    there before counts only if it is kept: its address was free for a while.

    >>> block = {"state": "active_allocated", "address": 512, "size": 1024, "requested_size": 1000}
    >>> snapshots = {"segments": []}, {"segments": [{"blocks": [block], "address": 512}]}
    >>> allocated_since(*snapshots, {512: "head"})
    {'backbone': 0, 'method': 0, 'head': 1000, 'loss': 0, 'unkept': 0}
    """
    found = dict.fromkeys((*OWNERS, "unkept"), 0)
    there = {address for address, _ in _active_blocks(before)}
    for address, size in _active_blocks(after):
        if address in kept or address not in there:
            found[kept.get(address, "unkept")] += size
    return found


def _active_blocks(snapshot: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Address and size asked for of every block in use."""
    for segment in snapshot["segments"]:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated":
                yield address, block.get("requested_size", block["size"])
            address += block["size"]  # blocks lie one behind the other


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


def peak_bytes(work: Callable[[], object], device: torch.device) -> tuple[int, str]:
    """The most bytes in use during `work()` above the level at its start, and how that was measured."""
    cuda = device.type == "cuda"
    with PeakMemory(device) as peak:
        before = torch.cuda.memory_allocated(device) if cuda else 0
        work()
        if cuda:
            torch.cuda.synchronize(device)
    how = "peak of torch's CUDA allocator above its level at the start" if cuda else peak.how
    return peak.bytes - before, how
