"""The models of the contenders: which forms a method has, and each form built from one seed."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_fast.backbones import Backbone, cheaper, load_backbone
from lion_fast.methods import TunedModel, available, create, method_options
from lion_fast.methods.lion import VARIANTS
from lion_fast.options import sides
from lion_fast.studies.cost.setting import Contender, Setting

NUM_CLASSES = 100
SEED = 0


def forms_of(method: str) -> list[str]:
    """The forms a method is measured in: those of its option `form`, and "merged" where it merges."""
    cls = available()[method]
    forms = [""]
    if "form" in method_options(cls):
        # LION's variants are two functions, the others' forms two ways to compute one
        forms = list(VARIANTS) if method == "lion" else ["exact", "naive"]
    # a method that trains the backbone's own weights is the bare backbone once trained: nothing to merge
    if cls.merge is not TunedModel.merge and method not in cheaper.OWNERS:
        forms.append("merged")
    return forms


class Backbones:
    """The backbone of a setting, random from a seed; in float32 for methods that train its weights."""

    def __init__(self, setting: Setting, device: torch.device):
        self.setting, self.device = setting, device
        self._made: dict[tuple, Backbone] = {}
        self.checked: dict[tuple, str] = {}  # what `check.forms` said of a method with its options

    def get(self, method: str) -> Backbone:
        """The backbone as a method gets it."""
        setting = self.setting
        precision = "fp32" if method in cheaper.OWNERS else setting.dtype
        fold = setting.fold and method in (*cheaper.FOLDABLE, "floor")
        return self.make(precision, setting.memory, fold)

    def exact(self) -> Backbone:
        """In float32, with nothing saved or folded: what the others are compared with."""
        return self.make("fp32", "plain", False)

    def make(self, precision: str, memory: str, fold: bool) -> Backbone:
        """Made once, however often it is asked for."""
        chosen = (precision, memory, fold)
        if chosen not in self._made:
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                self._made[chosen] = load_backbone(
                    self.setting.backbone,
                    pretrained=False,
                    img_size=self.setting.img_size,
                    precision=precision,
                    memory=memory,
                    fold=fold,
                ).to(self.device)
        return self._made[chosen]


def batch(backbone: Backbone, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images (size, 3, H, W) and labels (size) from the seed."""
    draw = torch.Generator().manual_seed(SEED)
    images = torch.randn(size, 3, *sides(backbone.img_size), generator=draw)
    return images.to(device), torch.randint(NUM_CLASSES, (size,), generator=draw).to(device)


def build(backbone: Backbone, contender: Contender) -> TunedModel:
    """The model of a contender, drawn from the seed; merged where that is its form."""
    options = dict(contender.options)
    if contender.form not in ("", "merged"):
        options["form"] = contender.form
    model = create(backbone, contender.method, num_classes=NUM_CLASSES, seed=SEED, **options)
    move_off_start(model)
    return model.merge() if contender.form == "merged" else model


@torch.no_grad()
def move_off_start(model: TunedModel) -> None:
    """Give parameters that start at exactly zero small random values: a form compared where half of it is
    zero is not compared."""
    draw = torch.Generator().manual_seed(SEED)
    for name, p in model.named_parameters():
        if p.requires_grad and not name.startswith("backbone.") and p.numel() and not p.any():
            p.copy_(0.01 * torch.randn(p.shape, generator=draw))


def describe(model: TunedModel, contender: Contender) -> dict[str, Any]:
    """Trained parameters, and what the adapter takes on disk; nothing is trained in a merged model."""
    told: dict[str, Any] = {
        "parameters": model.num_trainable(),
        "parameters_with_head": model.num_trainable(head=True),
    }
    if contender.form != "merged":
        with tempfile.TemporaryDirectory() as folder:
            model.save_adapter(folder)
            told["adapter_bytes"] = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file())
    return told
