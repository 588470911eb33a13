"""A tiny frozen ViT, coloured-noise images and a script to run in other processes."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import lion_fast
from lion_fast.data import load_data

QUICK = {"epochs": 2, "batch_size": 8, "lr": 1e-2, "device": "cpu"}
TINY = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}


def tiny_backbone(seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return lion_fast.load_backbone("vit_tiny_patch16_224", pretrained=False, img_size=32, **TINY)


def tiny_model(method: str = "lion", num_classes: int = 3, seed: int = 0, **options):
    """LION with both ends, whose gradients pass through the backbone, unless `options` say otherwise."""
    if method == "lion":
        options = {"state_dim": 8, "form": "residual"} | options
    return lion_fast.create(tiny_backbone(), method, num_classes=num_classes, seed=seed, **options)


def write_images(root: Path, classes: int = 3, each: int = 20, size: int = 32) -> Path:
    """A folder per class; class k is noise that is brighter in channel k."""
    rng = np.random.default_rng(0)
    for k in range(classes):
        folder = root / f"class{k}"
        folder.mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 140, (size, size, 3))
            pixels[..., k % 3] += rng.integers(0, 60)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return root


class Tensors(torch.utils.data.Dataset):
    """Ready tensors with labels, as `fit` takes them without a transform."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels, self.constant = images, labels, True

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int):
        return self.images[i], int(self.labels[i])


def random_splits(n: int = 23, n_val: int = 7, classes: int = 3, seed: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> Tensors:
        labels = torch.arange(count) % classes
        images = torch.randn(count, 3, 32, 32, generator=generator)
        return Tensors(images + labels.view(-1, 1, 1, 1), labels)

    return SimpleNamespace(train=some(n), val=some(n_val) if n_val else None)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def start(
    data: Path,
    out: Path,
    *,
    method: str = "lion",
    resume: str = "no",
    launch: tuple = (),
    preexec_fn=None,
    **settings,
) -> subprocess.Popen:
    """`main` in a process of its own, which leaves its adapter in `out/result.safetensors`."""
    told = [f"{key}={value}" for key, value in settings.items()]
    command = [
        sys.executable,
        *launch,
        __file__,
        data,
        out,
        out / "result.safetensors",
        method,
        resume,
        *told,
    ]
    how = {"env": os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, "preexec_fn": preexec_fn}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how)


def run(*args, **settings) -> None:
    """`start` to the end."""
    with start(*args, **settings) as process:
        told = process.communicate(timeout=300)[1]
    assert process.returncode == 0, told


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Until the log says that a step is done."""
    deadline = time.time() + 240
    while time.time() < deadline and process.poll() is None:
        rows = (out / "steps.csv").read_text().splitlines() if (out / "steps.csv").exists() else []
        done = rows[-1].split(",")[0] if rows else ""
        if done.isdigit() and int(done) >= step:
            return
        time.sleep(0.002)
    told = process.poll() is not None and process.stderr.read()
    raise AssertionError(f"the training never got there: {told}")


def main() -> None:
    """Train on an image folder: script.py DATA OUT RESULT.safetensors METHOD RESUME key=value...

    METHOD "states" is LION in that form.
    """
    data, out, result, method, resume, *settings = sys.argv[1:]
    from safetensors.torch import save_file

    from lion_fast.training import TrainConfig, fit

    values = {"epochs": 4, "batch_size": 8, "lr": 1e-2, "device": "cpu"}
    for setting in settings:
        key, value = setting.split("=")
        values[key] = type(getattr(TrainConfig(), key))(int(value) if value.isdigit() else value)
    model = tiny_model("lion", form="states", grid=2) if method == "states" else tiny_model(method)
    fit(model, load_data(data), TrainConfig(**values), out, resume=resume != "no" and resume, progress=False)
    several = torch.distributed.is_initialized()
    if not several or torch.distributed.get_rank() == 0:
        save_file(model.adapter_state_dict(), result)
    if several:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
