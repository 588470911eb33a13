"""E2VPT's pruning: importance, what goes and stays gone, masked or removed."""

import math

import pytest
import torch
import torch.nn.functional as F
from method_helpers import backbone, images, shaken

from lion_fast.adapters import load_adapter, save_adapter
from lion_fast.errors import AdapterError, BackboneError, OptionError
from lion_fast.methods import E2VPT


@pytest.mark.parametrize("masks", ["fixed", "learned"])
@pytest.mark.parametrize("form", ["exact", "naive"])
def test_e2vpt_importance_is_the_masks_gradient(masks, form):
    """Against central differences of the loss, mask entry by mask entry."""
    model = E2VPT(backbone("vit"), 4, length=3, masks=masks, form=form).double().eval()
    model.prompts.data.mul_(20)
    data = [(images(model, 4, torch.float64), torch.arange(4)) for _ in range(2)]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    token, segment = model.importance(data)
    assert token.shape == (3,) and segment.shape == (3, 16)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    h, absolute = 1e-4, model.importance(data, absolute=True)

    @torch.no_grad()
    def slopes(*at):
        """Of each batch's loss, to a factor on the prompts there."""
        losses = []
        for factor in (1 + h, 1 - h):
            kept = model.prompts.clone()
            model.prompts[at].mul_(factor)
            losses.append(torch.stack([F.cross_entropy(model(x), y) for x, y in data]))
            model.prompts.copy_(kept)
        return (losses[0] - losses[1]) / (2 * h)

    for p in range(3):
        slope = slopes(slice(None), p)
        assert token[p].item() == pytest.approx(slope.mean().item(), rel=1e-4, abs=1e-9)
        assert absolute[0][p].item() == pytest.approx(slope.abs().mean().item(), rel=1e-4, abs=1e-9)
        for s in (0, 7, 15):  # the dimensions j with j mod 16 = s
            slope = slopes(slice(None), p, slice(s, None, 16)).mean()
            assert segment[p, s].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-9)
    with pytest.raises(OptionError, match="at least one batch"):
        model.importance([])


@pytest.mark.parametrize("removal", ["masked", "removed"])
def test_e2vpt_pruning(removal, tmp_path):
    frozen = backbone("vit")
    model = shaken(E2VPT(frozen, 4, length=10, kv_length=2, removal=removal, masks="learned"))
    assert model.num_trainable() == 3 * 48 * 12 + 170
    for mask in (model.token_mask, model.segment_mask):
        mask.data.fill_(1)
    whole = model.prompts.detach().clone()
    token, segment = torch.randn(10), torch.randn(10, 16)
    assert model.prune(0.5, 0.5, (token, segment)) == (5, 8)
    assert model.options["pruned"] == [5, 8] and model.options["masks"] == "fixed"
    assert model.num_trainable() == 3 * 48 * (5 * 8 / 16 + 2)
    gone = set(token.argsort()[:5].tolist())
    assert set(model.kept_tokens.tolist()) == set(range(10)) - gone
    expected = whole.clone()
    for p in range(10):
        for s in segment[p].argsort()[:8].tolist():
            expected[:, p, s::16] = 0
        if p in gone:
            expected[:, p] = 0
    if removal == "removed":
        expected = expected[:, model.kept_tokens]
    assert torch.equal(model.visual_prompts(), expected)
    # what is pruned stays so, through a step, saving, and rewinding
    x, labels = images(model, 4), torch.arange(4)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    F.cross_entropy(model(x), labels).backward()
    optimizer.step()
    zeros = expected == 0
    assert ((model.visual_prompts() == 0) == zeros).all()
    model.eval()
    save_adapter(model, tmp_path)
    again = load_adapter(tmp_path, backbone=frozen)
    assert torch.equal(again(x), model(x)) and torch.equal(again.kept_tokens, model.kept_tokens)
    assert again.num_trainable() == model.num_trainable()
    before, kv, head = model.prompts.clone(), model.kv_prompts.clone(), model.head.weight.clone()
    model.rewind()
    assert ((model.visual_prompts() == 0) == zeros).all()
    for old, new in ((before, model.prompts), (kv, model.kv_prompts), (head, model.head.weight)):
        assert not torch.equal(old, new)
    assert model.prompts.abs().max() <= math.sqrt(6 / (3 * 256 + 48))
    with pytest.raises(OptionError, match="pruned already"):
        model.prune(0.1, 0.1, (token, segment))
    with pytest.raises(OptionError, match="before pruning"):
        model.importance([(x, labels)])


def test_e2vpt_masked_and_removed_are_two_functions():
    """A zero prompt still has the key and value of the norm's shift, and draws attention to it."""
    frozen = backbone("vit")
    masked = shaken(E2VPT(frozen, 4, length=6)).double()
    removed = E2VPT(frozen, 4, length=6, removal="removed").double()
    removed.load_adapter_state_dict(masked.adapter_state_dict())
    x = images(masked, dtype=torch.float64)
    assert torch.equal(masked(x), removed(x))
    for model in (masked, removed):
        torch.manual_seed(3)
        model.prune(0.5, 0.0, (torch.randn(6), torch.randn(6, 16)))
    assert [len(model.prefix()[0][0][0]) for model in (masked, removed)] == [6 + 5, 3 + 5]
    assert (masked(x) - removed(x)).abs().max() > 1e-4
    # the three zero prompts of a block are one key, three times
    k, v = masked.prefix()[0]
    zero = [i for i in range(6) if i not in masked.kept_tokens.tolist()]
    block = frozen.blocks[0]
    D = frozen.width_in
    key = block.norm1.bias @ block.attn.qkv.weight[D : 2 * D].T + block.attn.qkv.bias[D : 2 * D]
    for i in zero:
        torch.testing.assert_close(k[:, i].flatten(), key)
        torch.testing.assert_close(v[:, i], v[:, zero[0]])


@pytest.mark.parametrize(
    "length, ratios, pruned",
    [(10, (0.9, 0.9), (9, 12)), (5, (0.1, 0.1), (0, 1)), (1, (0.9, 0.3), (0, 4)), (10, (0.7, 0), (7, 0))],
)
def test_e2vpt_ratios(length, ratios, pruned):
    model = E2VPT(backbone("vit"), 4, length=length)
    assert model.prune(*ratios, (torch.randn(length), torch.randn(length, 16))) == pruned


def test_e2vpt_refuses():
    model = E2VPT(backbone("vit"), 4, length=5)
    good = torch.zeros(5), torch.zeros(5, 16)
    for ratios in ((1.0, 0), (0, -0.1)):
        with pytest.raises(OptionError, match="ratio"):
            model.prune(*ratios, good)
    with pytest.raises(OptionError, match="scores must be of shapes"):
        model.prune(0.5, 0.5, (torch.zeros(4), good[1]))
    model.prune(0.5, 0.5, good)
    state = model.adapter_state_dict()
    for name, bad in (("kept_tokens", 5), ("kept_segments", -1)):
        broken = state[name].clone()
        broken.view(-1)[-1] = bad
        with pytest.raises(AdapterError, match=f"{name} of the adapter are no increasing indices"):
            model.load_adapter_state_dict(state | {name: broken})
    with pytest.raises(BackboneError, match="16 segments; the width 40"):
        E2VPT(backbone("vit", embed_dim=40, num_heads=2), 4)


def test_scores_and_labels_as_they_come():
    model = E2VPT(backbone("vit"), 4, length=4)
    x, labels = images(model), torch.tensor([0, 1, 2])
    whole = model.importance([(x, labels)])
    for dtype in (torch.int32, torch.uint8):
        assert all(map(torch.equal, model.importance([(x, labels.to(dtype))]), whole))
    with pytest.raises(OptionError, match="NaN"):
        model.prune(0.5, 0.5, (whole[0] * math.nan, whole[1]))
