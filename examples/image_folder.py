"""Your own photographs: a folder per class, a split that is written down, predictions with names.

    python examples/image_folder.py [FOLDER]

Without FOLDER it paints a small one: three classes of coloured noise.
"""

import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import lion_fast
from lion_fast.data import load_data
from lion_fast.training import TrainConfig, fit, predict_files


def paint(root: Path) -> Path:
    torch.manual_seed(0)
    for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = torch.randint(0, 150, (32, 32, 3), dtype=torch.uint8)
            pixels[..., channel] += 80
            Image.fromarray(pixels.numpy()).save(root / name / f"{i:02d}.png")
    return root


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else paint(Path(temporary) / "photos")
    splits = load_data(folder, val=0.2, test=0.2, seed=0)
    print(f"classes {splits.classes}, images {splits.description['sizes']}")

    # Random weights and two blocks keep the example quick and offline; for something real take
    # lion_fast.load_backbone("vit_tiny_patch16_224") as it is.
    backbone = lion_fast.load_backbone(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, depth=2
    )
    model = lion_fast.create(backbone, method="lion", num_classes=len(splits.classes), seed=0, state_dim=16)
    result = fit(
        model,
        splits,
        TrainConfig(epochs=6, batch_size=8, lr=5e-3, augment="flip"),
        Path(temporary) / "run",
    )
    print(
        f"best epoch {result.best_epoch}: {result.history[result.best_epoch - 1]['val_accuracy']:.2f} right"
    )

    paths = [folder / name for name in splits.test.names[:3]]
    read, probabilities, failed = predict_files(model, paths)
    for path, row in zip(read, probabilities, strict=True):
        print(f"{path.parent.name}/{path.name}: {splits.classes[row.argmax()]} ({row.max():.2f})")
    for path, reason in failed:
        print(f"{path}: {reason}")
