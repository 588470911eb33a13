"""DyT: the tokens that pass, its losses, and the gradient of a choice."""

import pytest
import torch
from method_helpers import VITS, backbone, images, shaken, two_forms

from lion_fast.errors import OptionError
from lion_fast.methods import DyT, create


@pytest.mark.parametrize("key", VITS)
def test_dyt_gathered_is_masked(key):
    masked, gathered = two_forms(backbone(key), "dyt", rank=4)
    for model in (masked, gathered):
        model.eval().double()
    x = images(masked, dtype=torch.float64)
    counted = []
    handles = [
        block.mlp.register_forward_pre_hook(lambda m, args: counted.append(args[0].shape[:-1].numel()))
        for block in gathered.backbone.blocks
    ]
    out, expected = gathered(x), masked(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    ran, full = counted[:3], counted[3]
    assert sum(ran) < 3 * full and gathered.diagnostics() == masked.diagnostics()
    prefix = gathered.backbone.num_prefix_tokens
    share = (sum(ran) / 3 - 3 * prefix) / (full - 3 * prefix)
    assert gathered.diagnostics()["passed"] == pytest.approx(share)
    for handle in handles:
        handle.remove()
    # gradients to what evaluation leaves differentiable, and both ends of the range
    names = [n for n, p in masked.named_parameters() if p.requires_grad and "dispatcher" not in n]
    g = torch.randn_like(out)
    for a, b in zip(
        *(torch.autograd.grad(m(x), [m.get_parameter(n) for n in names], g) for m in (masked, gathered)),
        strict=True,
    ):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)
    for bias in (-1e3, 1e3):
        for model in (masked, gathered):
            for dispatcher in model.dispatchers:
                dispatcher.bias.data.fill_(bias)
        torch.testing.assert_close(gathered(x), masked(x), rtol=0, atol=1e-12)
        assert gathered.diagnostics() == {"passed": float(bias > 0)}


@pytest.mark.parametrize("form", ["exact", "naive"])
@pytest.mark.parametrize("training", [True, False])
def test_dyt_without_a_threshold_is_adaptformer(form, training):
    frozen = backbone("vit")
    former = shaken(create(frozen, "adaptformer", num_classes=4, rank=4, scale=1.0))
    dyt = create(frozen, "dyt", num_classes=4, rank=4, threshold=-1.0, form=form)
    dyt.load_state_dict(former.state_dict(), strict=False)
    former.double().train(training), dyt.double().train(training)
    x = images(dyt, dtype=torch.float64)
    torch.testing.assert_close(dyt(x), former(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dyt.complete(x), former(x), rtol=0, atol=1e-12)


def test_dyt_losses():
    model = shaken(DyT(backbone("vit"), 4, rank=4, rate=0.3)).double().train()
    x, labels = images(model, 5, torch.float64), torch.tensor([0, 1, 2, 3, 0])
    seen = []
    inner = model.mask
    model.mask = lambda *args: (seen.append(inner(*args)), seen[-1])[1]
    logits = model(x)
    terms = model.loss_terms(x, labels)
    assert len(seen) == 3  # the forward's masks were used, and the complete model has none
    masks = torch.stack(seen)
    assert set(masks.detach().unique().round(decimals=9).tolist()) == {0.0, 1.0}
    assert (masks[:, :, 0] == 1).all()
    complete = model.complete(x)
    p, q = complete.softmax(-1).detach(), logits.softmax(-1)
    expected = {
        "complete": -complete.log_softmax(-1)[torch.arange(5), labels].mean(),
        "distillation": (p * (p.log() - q.log())).sum(-1).mean(),
        "rate": 2 * (masks[:, :, 1:].mean() - 0.3) ** 2,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=0, atol=1e-10)
    # the complete model is the teacher: distillation does not move what it alone would
    head = model.head.weight
    found, by_hand = (
        torch.autograd.grad(t, head, retain_graph=True)[0]
        for t in (terms["distillation"], (p * (p.log() - q.log())).sum(-1).mean())
    )
    torch.testing.assert_close(found, by_hand, rtol=0, atol=1e-10)
    assert model._last is None and model.diagnostics()["passed"] == masks[:, :, 1:].mean().item()
    # on images the forward did not see it is run anew
    seen.clear()
    model.loss_terms(images(model, 5, torch.float64), labels)
    assert len(seen) == 3
    model.eval()
    with pytest.raises(OptionError, match="belong to training"):
        model.loss_terms(x, labels)


def test_dyt_straight_through():
    """The gradient of a mask is that of its relaxed sample, at dropped tokens too."""
    model = DyT(backbone("vit"), 4).double().train()
    rows = torch.randn(2, 5, 48, dtype=torch.float64)
    gate = model.dispatchers[0]
    gate.weight.data.normal_()
    torch.manual_seed(7)
    mask = model.mask(gate, rows)
    g = torch.randn_like(mask)
    torch.manual_seed(7)
    logit = (rows[:, 1:] @ gate.weight.T).squeeze(-1)
    u = torch.rand_like(logit)
    soft = torch.sigmoid((logit + u.log() - (1 - u).log()) / 5.0)
    assert torch.equal(mask[:, 1:].detach().round(), (soft > 0.5).to(mask.dtype))
    assert 0 < mask[:, 1:].sum() < 8  # tokens of both kinds
    (found,) = torch.autograd.grad(mask, gate.weight, g)
    (expected,) = torch.autograd.grad(soft, gate.weight, g[:, 1:])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_dyt_noise_is_gumbels():
    """P(M = 1) is sigmoid(logit), whatever the temperature: the sign of a logistic variable about it."""
    model = DyT(backbone("vit"), 4).train()
    gate = model.dispatchers[0]
    gate.weight.data.zero_()
    for logit in (-2.0, 0.0, 1.0):
        gate.bias.data.fill_(logit)
        with torch.no_grad():
            share = model.mask(gate, torch.zeros(200, 501, 48))[:, 1:].mean().item()
        assert share == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=0.006)


def test_loss_terms_are_of_the_images_that_are_there():
    """A buffer of images that is written into between forward and loss."""
    model = create(backbone("vit"), "dyt", num_classes=4, threshold=-1.0).train()
    x, labels = images(model), torch.tensor([0, 1, 2])
    model(x)
    x.copy_(images(model))
    written = model.loss_terms(x, labels)
    model(x)
    for name, term in model.loss_terms(x, labels).items():
        torch.testing.assert_close(written[name], term)
