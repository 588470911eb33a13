"""Which storage a pruned layer runs in, and the block-sparse one without its kernels."""

import pytest
import torch
from pruning_helpers import TwoEnds, loud

from lion_fast import LionLayer, pruning
from lion_fast.errors import ConvergenceError, OptionError
from lion_fast.pruning import prune_once


def quarter_of_blocks(layer):
    """W keeps 9 of its 36 blocks of 32; A and V keep all, so that no unit is dead."""
    blocks = torch.zeros(36, dtype=torch.bool)
    blocks[torch.randperm(36)[:9]] = True
    layer.set_mask("W", blocks.view(6, 6).repeat_interleave(32, 0).repeat_interleave(32, 1))


def test_storage_is_dense_without_a_measurement_and_says_why():
    assert pruning.measured_crossovers() == {}
    form = pruning.choose_storage(LionLayer(64, 128))
    assert form.name == "dense" and "bound by reading and writing the tokens" in form.reason
    wide = LionLayer(32, 192)
    assert pruning.choose_storage(wide) == ("dense", "the recurrence has no zeros", None)
    quarter_of_blocks(wide)
    form = pruning.choose_storage(wide)
    assert form.name == "dense" and "no measurement for this device (cpu)" in form.reason


def test_storage_follows_measured_crossovers():
    wide = LionLayer(32, 192)
    quarter_of_blocks(wide)
    entries = [{"state_dim": 128, "block": 32, "from_sparsity": 0.5}]
    form = pruning.choose_storage(wide, crossovers={"cpu": {"block-sparse": entries}})
    assert (form.name, form.block) == ("block-sparse", 32)
    # The widest measurement that is not wider than the layer decides.
    entries.append({"state_dim": 192, "block": 32, "from_sparsity": 0.9})
    entries.append({"state_dim": 512, "block": 32, "from_sparsity": 0.1})
    form = pruning.choose_storage(wide, crossovers={"cpu": {"block-sparse": entries}})
    assert form.name == "dense" and "75% of the blocks of 32 are dead, it pays from 90% on" in form.reason
    half = LionLayer(32, 192)
    prune_once(half, 0.5, granularity="2:4")
    for state, name in ((192, "2:4"), (256, "dense")):
        assert pruning.choose_storage(half, crossovers={"cpu": {"2:4": [{"state_dim": state}]}}).name == name


def test_dead_units_are_compacted_whatever_was_measured():
    for state, keep, text in ((64, 0.5, "32 columns in place of 64"), (64, 0.9, "smaller and not faster")):
        layer = LionLayer(16, state)
        prune_once(layer, keep, granularity="unit")
        form = pruning.choose_storage(layer)
        assert form.name == "compact" and text in form.reason
    told = pruning.describe_storage(TwoEnds())
    assert {name: form["name"] for name, form in told.items()} == dict.fromkeys(
        ("input_end", "output_end"), "dense"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_sparse_storage_without_kernels(dtype):
    layer = loud(LionLayer(40, 72, max_iter=200, tol=1e-12, backward="exact", gamma=0.5, dtype=dtype))
    with pytest.raises(OptionError, match="no masks"):
        pruning.BlockSparseLayer(layer, 16)
    layer.set_mask("W", torch.rand(72, 72) < 0.5)
    with pytest.raises(OptionError, match="block"):
        pruning.BlockSparseLayer(layer, 8)
    with pytest.raises(OptionError, match="recurrence='free'"):
        pruning.BlockSparseLayer(LionLayer(8, 8, recurrence="tied"))
    form = pruning.BlockSparseLayer(layer, 16)
    prune_once(layer, 0.3, granularity="block", block=16)
    x = torch.randn(3, 5, 40, dtype=dtype, requires_grad=True)
    upstream = torch.randn(3, 5, 40, dtype=dtype)
    inputs = [x, *layer.parameters()]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(form(x), layer(x), rtol=0, atol=tolerance)
    got, expected = (torch.autograd.grad(each(x), inputs, upstream) for each in (form, layer))
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=tolerance * max(1, right.abs().max()))
    assert "_patterns" not in form.state_dict() and len(list(form.parameters())) == 5
    with pytest.raises(ValueError, match="width 40"):
        form(torch.randn(2, 39, dtype=dtype))


def test_block_sparse_storage_follows_every_change_of_a_mask():
    layer = loud(LionLayer(32, 32))
    prune_once(layer, 0.5, granularity="block", block=16)
    form, x = pruning.BlockSparseLayer(layer, 16), torch.randn(4, 32)
    for mask in (torch.rand(32, 32) < 0.5, None):
        layer.set_mask("W", mask)
        with torch.no_grad():
            layer.W.normal_()
        torch.testing.assert_close(form(x), layer(x))
    layer.A_mask.fill_(True)
    with torch.no_grad():
        layer.A.normal_()
    torch.testing.assert_close(form(x), layer(x))


def test_block_sparse_storage_tells_of_failures():
    layer = loud(LionLayer(32, 32, on_failure="raise", backward="exact"))
    prune_once(layer, 0.5, granularity="block", block=16)
    form, x = pruning.BlockSparseLayer(layer, 16), torch.randn(4, 32)
    out, info = form(x, return_info=True)
    out.sum().backward()
    assert info.converged.all() and info.backward.converged.all()
    with torch.no_grad():
        layer.V[0, 0] = float("nan")
    with pytest.raises(ConvergenceError, match="V hold"):
        form(x)
    with pytest.raises(RuntimeError, match="twice"):
        layer.V.data[0, 0] = 0
        out = form(x.requires_grad_())
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        grad.sum().backward()
