"""The parts of a step, told as it runs: forward by the module at work, backward by whose node runs.

A node of autograd's graph belongs to the part that made it. The engine runs the node first that was made
last, so a backward is in one part from the first node of it to the first of the next.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from lion_fast.backbones.at_work import AtWork
from lion_fast.studies.measuring import timer_of, wait
from lion_fast.studies.memory import owners_of

# "method" is what is the method's beside its ends; "other" is between the parts
PARTS = ("input end", "backbone", "output end", "method", "head", "loss", "optimiser", "other")
PHASES = ("forward", "backward", "optimiser", "other")
# Autograd gives the nodes that add up a parameter's gradient no place in its order
_NO_PLACE = 2**63

Place = tuple[str, str]  # phase, part


def parts_of(model: nn.Module) -> dict[int, str]:
    """The part of each module of a model, by its id: its owner's, and of the ends their own."""
    parts = owners_of(model)
    for name in ("input", "output"):
        end = getattr(model, f"{name}_end", None)
        if end is not None:
            parts |= {id(module): f"{name} end" for module in end.modules()}
    return parts


def name_of(place: Place) -> str:
    """A place in words.

    >>> name_of(("forward", "head")), name_of(("optimiser", "optimiser"))
    ('forward: head', 'optimiser')
    """
    return ": ".join(dict.fromkeys(place))


class Untold:
    """Stands where nobody wants to know the parts."""

    def phase(self, phase: str, part: str):
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Parts(AtWork):
    """Base of those who follow a step: `enter` is called with every place that the work comes to."""

    def __init__(self, model: nn.Module):
        super().__init__(parts_of(model), outside="other")
        self._phase = "other"
        self._made: list[tuple[int, str]] = []  # a node's number from which on nodes are of a part

    def enter(self, place: Place) -> None:
        raise TypeError(f"{type(self).__name__} must say what it does at a place")

    def follow(self, nodes: list[tuple[torch.autograd.graph.Node, str]]) -> None:
        """Hook the nodes of a backward, given with their parts in the order they will run."""
        raise TypeError(f"{type(self).__name__} must say how it follows a backward")

    @contextmanager
    def phase(self, phase: str, part: str) -> Iterator[None]:
        """A phase of the step; `part` is whose work is outside of all modules."""
        self._to(phase, part)
        try:
            yield
        finally:
            self._to("other", "other")

    def backward(self, loss: Tensor) -> None:
        """The backward of a loss that was computed in phases of this step."""
        self.follow(self._nodes(loss))
        with self.phase("backward", "other"):
            loss.backward()

    def changed(self) -> None:
        if self._phase == "forward":  # a backward's modules compute again what its nodes are of anyway
            self._here()

    def _to(self, phase: str, part: str) -> None:
        self._phase, self._stack[0] = phase, (None, part)
        self._here()

    def _here(self) -> None:
        self._made.append((torch.autograd._get_sequence_nr(), self.name))
        self.enter((self._phase, self.name))

    def _nodes(self, loss: Tensor) -> list[tuple[torch.autograd.graph.Node, str]]:
        found, ahead = {}, [loss.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in found:
                found[node] = node._sequence_nr()
                ahead += [before for before, _ in node.next_functions]
        starts = [number for number, _ in self._made]
        order = sorted((n for n in found if found[n] < _NO_PLACE), key=found.__getitem__, reverse=True)
        parts = [self._made[max(bisect_right(starts, found[node]) - 1, 0)][1] for node in order]
        self._made.clear()
        return list(zip(order, parts, strict=True))


class Clock(Parts):
    """Seconds of a step by place; all of the step is at some place.

    On CUDA the time of the device between events, read once it is done.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        super().__init__(model)
        self._device, self._timer = device, timer_of(device)
        self._marks: list[tuple[Place | None, object]] = []

    def enter(self, place: Place | None) -> None:
        self._marks.append((place, self._timer.read()))

    def follow(self, nodes) -> None:
        self.enter(None)  # hooking is no part of the step
        before = None
        for node, part in nodes:
            if part != before:
                node.register_prehook(lambda grads, part=part: self.enter(("backward", part)))
            before = part

    def seconds(self) -> dict[Place, float]:
        """Of the step since the last call, in the order the places were come to first."""
        self.enter(None)
        wait(self._device)
        found: dict[Place, float] = {}
        for (place, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if place is not None:
                found[place] = found.get(place, 0.0) + self._timer.between(start, end)
        self._marks.clear()
        return found


class Ranges(Parts):
    """Ranges in the trace of torch's profiler, named "phase: part"; in a backward one for each node."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.names: set[str] = set()
        self._open: torch.autograd.profiler.record_function | None = None

    def enter(self, place: Place) -> None:
        self.close()
        if place[1] != "other":
            name = name_of(place)
            self.names.add(name)
            self._open = torch.autograd.profiler.record_function(name)
            self._open.__enter__()

    def close(self) -> None:
        """End the range that is open."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def follow(self, nodes) -> None:
        for node, part in nodes:
            node.register_prehook(lambda grads, part=part: self.enter(("backward", part)))
            node.register_hook(lambda inputs, outputs: self.close())
