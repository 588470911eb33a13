"""One contender, ready to be run, and everything about it that is not the time of its steps."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.backbones import fp8
from lion_fast.studies.cost import check, models
from lion_fast.studies.cost.flops import counted_macs
from lion_fast.studies.cost.setting import FLOOR, Contender, Setting
from lion_fast.studies.measuring import host_seconds
from lion_fast.studies.memory import cuda_activations, peak_bytes, resident_bytes, saved_bytes

# Small, so that no weight goes anywhere while it is timed: iterations depend on weights.
LEARNING_RATE = 1e-6


class Step:
    """A contender in a setting: `run()` is one step, as it is timed.

    `model` has the weights, `eager` is what a step calls and `net` the same as the setting's engine runs it;
    `inputs` and `target` are images and labels, or what the floor of training has in their place.
    """

    def __init__(
        self,
        setting: Setting,
        contender: Contender,
        backbones: models.Backbones,
        images: Tensor,
        labels: Tensor,
    ):
        self.setting, self.contender, self.backbones = setting, contender, backbones
        self.inputs, self.target, self.device = images, labels, images.device
        self.train = setting.mode == "train"
        self.optimizer: torch.optim.Optimizer | None = None
        started = time.perf_counter()
        self.model: nn.Module = self._build()
        self.build_seconds = time.perf_counter() - started
        self.eager = self._prepare()
        self.net = self.eager
        if setting.engine != "eager":
            self.net = torch.compile(
                self.eager, mode="reduce-overhead" if setting.engine == "graphs" else None
            )

    def _build(self) -> nn.Module:
        contender, checked = self.contender, self.backbones.checked
        model = models.build(self.backbones.get(contender.method), contender)
        pair = contender.method, contender.options, contender.form == "merged"
        if pair not in checked:
            checked[pair] = check.forms(contender, self.backbones)
        self.checked = checked[pair]
        return model.to(self.device).train(self.train)

    def _prepare(self) -> Callable[[Tensor], Tensor]:
        if self.train:
            self.optimizer = torch.optim.AdamW(self.model.trainable_parameters(), lr=LEARNING_RATE)
        return self.model

    def autocast(self):
        """Of the setting's dtype; also casts, at each use, the float32 weights of methods that own them."""
        if self.setting.dtype != "fp32":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def run(self) -> Tensor | None:
        """One step; the outputs where nothing is trained."""
        if self.setting.engine == "graphs":
            torch.compiler.cudagraph_mark_step_begin()
        if self.train:
            return self._run_training()
        with torch.no_grad(), self.autocast():
            return self.net(self.inputs)

    def _run_training(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().backward()
        self.optimizer.step()

    def forward(self) -> Tensor:
        """The forward of a training step, to the loss."""
        with self.autocast():
            logits = self.net(self.inputs)
            loss = F.cross_entropy(logits.float(), self.target)
            for term in self.model.loss_terms(self.inputs, self.target).values():
                loss = loss + term
        return loss

    def describe(self) -> dict[str, Any]:
        """The part of the row that is no time of a step."""
        told: dict[str, Any] = {"status": "ok", "build_seconds": self.build_seconds}
        told["first_step_seconds"] = host_seconds(self.run, self.device)
        eager = self.setting.engine == "eager"
        if not eager:
            told["checked"] = check.compiled(self)
        told["peak_bytes"], told["peak_measured"] = peak_bytes(self.run, self.device)
        if self.contender != FLOOR:
            told |= models.describe(self.model, self.contender)
            told.setdefault("checked", self.checked)
        told["resident_bytes"] = resident_bytes(self.model, self.optimizer)
        # a compiled model's products are the eager one's; fp8's are no products that torch counts
        told["macs_per_image"] = self._macs() if eager and self.setting.dtype != "fp8" else None
        if self.train:
            # compiled, autograd keeps nothing that the hooks could see
            told["activation_bytes"] = self._activations() if eager else None
        elif self.setting.dtype != "fp32":
            told["against_fp32"] = self._against_fp32()
        if hasattr(self.model, "diagnostics"):
            told["diagnostics"] = self.model.diagnostics()
        return told

    def _macs(self) -> float:
        """Of an image, counted on few of them."""
        whole = self.inputs, self.target
        few = min(2, len(self.inputs))
        self.inputs, self.target = (t[:few].detach().requires_grad_(t.requires_grad) for t in whole)
        try:
            return counted_macs(self.run) / few
        finally:
            self.inputs, self.target = whole

    def _activations(self) -> dict[str, int]:
        exclude = [self.inputs, self.target]
        kept = saved_bytes(self.model, self.forward, exclude)
        if self.device.type == "cuda":
            kept["by_allocator"] = cuda_activations(self.model, self.forward, exclude)
        return kept

    @torch.no_grad()
    def _against_fp32(self) -> dict[str, float]:
        """How far the outputs are from those in float32, and on how many images the largest is the same."""
        exact: nn.Module = self.backbones.exact()
        if self.contender != FLOOR:
            exact = models.build(exact, self.contender).to(self.device).eval()
        expected, found = exact(self.inputs).float(), self.run().float()
        told = fp8.error(found, expected)._asdict()
        return told | {"same_class": (found.argmax(1) == expected.argmax(1)).float().mean().item()}


class FloorStep(Step):
    """The bare backbone. Its training step is a forward from embedded tokens and a backward to them."""

    def _build(self) -> nn.Module:
        return self.backbones.get(self.contender.method)

    def _prepare(self) -> Callable[[Tensor], Tensor]:
        backbone = self.model
        if not self.train:
            return backbone
        with torch.no_grad():
            tokens = backbone.enter(self.inputs) if backbone.family != "cnn" else self.inputs
            if backbone.precision != "fp32":
                tokens = tokens.to(torch.bfloat16)
            shape = backbone(self.inputs).shape
        self.inputs = tokens.detach().requires_grad_()
        self.target = torch.randn(shape, device=self.device, dtype=tokens.dtype)
        return lambda tokens: backbone.pool(backbone.body(tokens))

    def _run_training(self) -> None:
        self.inputs.grad = None
        self.forward().backward(self.target)

    def forward(self) -> Tensor:
        """The backbone's output of the tokens."""
        return self.net(self.inputs)
