"""One kind of step of a model: training, training on cached features, inference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.methods import TunedModel
from lion_fast.studies.profiling.parts import Parts, Untold
from lion_fast.training.metrics import autocast


class Step:
    """One kind of step: `run()` is one, and tells its parts to who asks."""

    def __init__(self, model: TunedModel, images, labels, kind: str, mixed_precision: str, optimizer: str):
        self.model, self.labels, self.kind = model, labels, kind
        self.device, self.mixed_precision = images.device, mixed_precision
        self.train = kind != "infer"
        self.net: nn.Module = model
        self.inputs = images
        if kind == "cached":
            model.eval()
            with torch.no_grad(), self._autocast(), model.backbone.autocast(images.device):
                self.inputs = model.encode(images)
            self.net = model.behind()
            self.mixed_precision = "no"  # as `fit` has it: heads compute in their own dtype
        model.train(self.train)
        self.net.train(self.train)
        self.optimizer = None
        if self.train:
            make = {"adamw": torch.optim.AdamW, "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}
            self.optimizer = make[optimizer](list(model.trainable_parameters()), lr=0.0)
        scaled = self.train and self.mixed_precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    def _autocast(self):
        return autocast(self.device, self.mixed_precision)

    def run(self, parts: Parts | Untold | None = None) -> None:
        parts = parts or Untold()
        if not self.train:
            with torch.no_grad(), self._autocast(), parts.phase("forward", "method"):
                self.net(self.inputs)
            return
        with parts.phase("optimiser", "optimiser"):
            self.optimizer.zero_grad(set_to_none=True)
        parts.backward(self.loss(parts))
        with parts.phase("optimiser", "optimiser"):
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def loss(self, parts: Parts | Untold | None = None) -> Tensor:
        """The forward of a training step."""
        parts = parts or Untold()
        with self._autocast():
            with parts.phase("forward", "method"):
                logits = self.net(self.inputs)
            with parts.phase("forward", "loss"):
                loss = F.cross_entropy(logits.float(), self.labels)
                if self.kind == "train":
                    for term in self.model.loss_terms(self.inputs, self.labels).values():
                        loss = loss + term
                return self.scaler.scale(loss)
