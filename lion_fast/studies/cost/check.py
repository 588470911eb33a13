"""Nothing is timed before it is right: forms of one function beside each other, compiled beside eager."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_fast.errors import LionError
from lion_fast.methods import TunedModel
from lion_fast.studies.cost import models
from lion_fast.studies.cost.models import VARIANTS, Backbones, batch, forms_of
from lion_fast.studies.cost.setting import FLOOR, Contender
from lion_fast.studies.measuring import distance

# The largest relative distance between two forms of one function, in float32.
FORMS_AGREE = 1e-4
# ... and between the compiled and the eager model, by dtype
COMPILED_AGREES = {"fp32": 1e-4, "bf16": 5e-2, "fp8": 1e-1}
COMPILED_GRADIENTS_AGREE = {"fp32": 1e-3, "bf16": 1e-1, "fp8": 2e-1}


class Wrong(LionError, RuntimeError):
    """Contenders that should agree do not: a time of theirs would be a time of something else."""


def forms(contender: Contender, backbones: Backbones) -> str:
    """Compare a contender with its method's other form; what was compared and how far apart. `Wrong` raised.

    In float32, whatever the setting's dtype, on two images: outputs, and for two forms the gradients of every
    trained parameter. Methods without another form have nothing to compare here; the tests do that.
    """
    if contender.form in VARIANTS:
        return "one way to compute it"
    if not contender.form:
        return "one form only"
    merged = contender.form == "merged"
    if not merged and dict(contender.options).get("depth") == "shallow":
        return "one form only with these options"
    other = {"exact": "naive", "naive": "exact", "merged": forms_of(contender.method)[0]}[contender.form]
    backbone = backbones.exact()
    images, labels = batch(backbone, 2, backbones.device)
    both = (contender, Contender(contender.method, contender.options, other))
    one, two = (models.build(backbone, c).to(backbones.device).eval() for c in both)
    if merged:
        with torch.no_grad():
            apart = distance(one(images), two(images))
        return f"merged = unmerged to {_agreed(contender, 'merged and unmerged outputs', apart, FORMS_AGREE)}"
    (a, grads_a), (b, grads_b) = (_logits_and_gradients(model, images, labels) for model in (one, two))
    outputs = _agreed(contender, "outputs of the exact and the naive form", distance(a, b), FORMS_AGREE)
    apart = max((distance(grads_a[n], grads_b[n]) for n in grads_a.keys() & grads_b.keys()), default=0.0)
    gradients = _agreed(contender, "gradients of the exact and the naive form", apart, FORMS_AGREE)
    return f"exact = naive to {outputs}, gradients to {gradients}"


def compiled(step) -> str:
    """Compare a step's compiled net with the eager one, as `forms` compares forms."""
    contender, dtype = step.contender, step.setting.dtype
    if contender.method == "dyt" and step.train:
        return "not compared: draws noise"
    with torch.no_grad(), step.autocast():
        apart = distance(step.net(step.inputs).float(), step.eager(step.inputs).float())
    outputs = _agreed(contender, "compiled and eager outputs", apart, COMPILED_AGREES[dtype])
    if not step.train or contender == FLOOR:
        return f"compiled = eager to {outputs}"
    apart = distance(_gradients(step, step.net), _gradients(step, step.eager))
    gradients = _agreed(contender, "compiled and eager gradients", apart, COMPILED_GRADIENTS_AGREE[dtype])
    return f"compiled = eager to {outputs}, gradients to {gradients}"


def _agreed(contender: Contender, what: str, apart: float, bound: float) -> str:
    if not apart <= bound:
        raise Wrong(f"{contender.label()}: {what} differ by {apart:.1e}; at most {bound:.0e} is allowed")
    return f"{apart:.1e}"


def _logits_and_gradients(model: TunedModel, images: Tensor, labels: Tensor) -> tuple[Tensor, dict]:
    logits = model(images)
    model.zero_grad()
    F.cross_entropy(logits, labels).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return logits.detach(), grads


def _gradients(step, net: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the cross-entropy by everything that is trained, in one vector."""
    with step.autocast():
        loss = F.cross_entropy(net(step.inputs).float(), step.target)
    found = torch.autograd.grad(loss, list(step.model.trainable_parameters()), allow_unused=True)
    return torch.cat([g.float().flatten() for g in found if g is not None])
