"""Adapters written under some releases of torch and timm, read with equal answers under others.

python tests/exchange.py write FOLDER: every method on every kind of backbone, and what each model answers.
python tests/exchange.py read FOLDER: the same answers from what was written there. `make versions` runs both
on the oldest releases that `setup.py` allows and on the newest.
"""

import sys
from pathlib import Path

import torch
from method_helpers import BACKBONES, backbone, images, shaken
from safetensors.torch import load_file, save_file

from lion_fast import create, load_adapter, load_backbone
from lion_fast.methods import available


def write(folder: Path) -> None:
    for key, (name, kwargs) in BACKBONES.items():
        weights = folder / key / "weights.safetensors"
        weights.parent.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in backbone(key).model.state_dict().items()}, weights)
        for method, kind in available().items():
            frozen = load_backbone(name, weights=weights, **kwargs)
            if frozen.family in kind.families:
                model = shaken(create(frozen, method, num_classes=4)).eval()
                model.save_adapter(weights.parent / method)
                x = images(model)
                save_file({"x": x, "y": answer(model, x)}, weights.parent / f"{method}.safetensors")


def read(folder: Path) -> None:
    adapters = sorted(path.parent for path in folder.glob("*/*/adapter.json"))
    for adapter in adapters:
        was = load_file(adapter.with_suffix(".safetensors"))
        model = load_adapter(adapter, weights=adapter.parent / "weights.safetensors")
        torch.testing.assert_close(
            answer(model, was["x"]), was["y"], rtol=1e-9, atol=1e-9, msg=f"{adapter} answers otherwise"
        )
    print(f"{len(adapters)} adapters from {folder} answer as they did")
    assert adapters


@torch.no_grad()
def answer(model, x):
    return model.double()(x.double())


if __name__ == "__main__":
    torch.manual_seed(0)
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
