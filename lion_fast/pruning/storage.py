"""How a pruned layer is best stored and run: dense, compact, block-sparse or 2:4, and why."""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from lion_fast.equilibrium.layer import LionLayer
from lion_fast.equilibrium.states import StateLayer
from lion_fast.errors import OptionError
from lion_fast.pruning.compaction import find_units
from lion_fast.pruning.two_of_four import is_two_of_four
from lion_kernels.blocks import BLOCKS, find_pattern
from lion_kernels.launch import padded_state

# Up to this state width the tokens' way through memory is what a solve costs, and its weights stay on chip.
TRAFFIC_BOUND = 128


class Storage(NamedTuple):
    """A storage by name, the reason for it in a sentence, and the block size where it is block-sparse."""

    name: str
    reason: str
    block: int | None = None


def measured_crossovers(path: str | os.PathLike[str] | None = None) -> dict[str, dict[str, Any]]:
    """What was measured, by device name: a file that bench/gpu/crossovers.py wrote, or this package's own.

    Per device `block-sparse` is a list of {"state_dim", "block", "from_sparsity"}: from that share of dead
    blocks of W on, the block-sparse solve was faster than the dense one. `2:4` is a list of {"state_dim"}
    at which it was faster at inference. A state width is served by the widest entry that is not wider.
    Other keys of the file are for readers.

    Raises OptionError for a file of another format.
    """
    file = files("lion_fast.pruning").joinpath("crossovers.json") if path is None else Path(path)
    found = json.loads(file.read_text("utf-8"))
    if not isinstance(found, dict) or found.get("format") != 1:
        raise OptionError(f"{file} holds no crossovers of format 1; write one by bench/gpu/crossovers.py")
    return found["devices"]


def choose_storage(
    layer: LionLayer,
    device: torch.device | str | None = None,
    crossovers: Mapping[str, Mapping[str, Any]] | None = None,
) -> Storage:
    """The storage in which this layer is expected to run fastest on a device, from measurements alone.

    layer: as it is; its zeros count, whether masks made them or not.
    device: None is the layer's own.
    crossovers: measurements in place of `measured_crossovers()`.

    Compaction needs no measurement, being a smaller dense layer. Without a measurement of the device
    everything else stays dense.

    >>> choose_storage(LionLayer(64, 32)).name
    'dense'
    """
    live, _ = find_units(layer)
    state, units = layer.state_dim, max(int(live.sum()), 1)
    if units < state:
        before, after = padded_state(state), padded_state(units)
        tile = (
            f"kernels work in {after} columns in place of {before}"
            if after < before
            else (
                f"kernels still work in {before} columns, so it is smaller and not faster"
                if before <= TRAFFIC_BOUND
                else f"{after} columns"
            )
        )
        return Storage("compact", f"{state - units} of {state} hidden units are dead; {tile}")
    if state <= TRAFFIC_BOUND:
        return Storage(
            "dense",
            f"a solve of state width {state} is bound by reading and writing the tokens: sparse weights "
            f"save nothing up to {TRAFFIC_BOUND}",
        )
    W = layer.recurrence_matrix().detach()
    if W.all():
        return Storage("dense", "the recurrence has no zeros")
    name = _device_name(torch.device(device) if device is not None else W.device)
    table = measured_crossovers() if crossovers is None else crossovers
    if name not in table:
        return Storage("dense", f"no measurement for this device ({name})")
    told = []
    for block in sorted(BLOCKS, reverse=True):
        found = find_pattern(W != 0, block).sparsity
        entry = _entry(table[name].get("block-sparse", ()), state, block=block)
        if entry is None:
            told.append(f"blocks of {block} were not measured")
            continue
        least = entry["from_sparsity"]
        if found >= least:
            reason = f"{found:.0%} of the {block} x {block} blocks are dead; it pays from {least:.0%} on"
            return Storage("block-sparse", f"{reason} ({name}, state width {entry['state_dim']})", block)
        told.append(f"{found:.0%} of the blocks of {block} are dead, it pays from {least:.0%} on")
    if is_two_of_four(W):
        if _entry(table[name].get("2:4", ()), state) is not None:
            return Storage("2:4", f"every four neighbours hold two zeros, which is faster here ({name})")
        told.append("2:4 was not measured to be faster")
    return Storage("dense", f"{'; '.join(told)} ({name})")


def describe_storage(model: nn.Module) -> dict[str, dict[str, Any]]:
    """`choose_storage` of every LionLayer inside a model, by name; JSON-able. A StateLayer runs dense."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LionLayer):
            found[name] = choose_storage(module)._asdict()
        elif isinstance(module, StateLayer):
            reason = "its states are what the head reads, so none can go, and its solve is on narrow rows"
            found[name] = Storage("dense", reason)._asdict()
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _entry(entries, state: int, **wanted) -> Mapping[str, Any] | None:
    fitting = [
        e for e in entries if e["state_dim"] <= state and all(e.get(k) == v for k, v in wanted.items())
    ]
    return max(fitting, key=lambda e: e["state_dim"], default=None)
