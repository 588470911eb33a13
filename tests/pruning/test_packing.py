"""Pruned and compacted adapters in files: sizes, bits, damage."""

import pytest
import safetensors.torch
import torch
from method_helpers import described, replace_tensors, rewrite
from training_helpers import same_bits, tiny_backbone, tiny_model

from lion_fast import LionLayer
from lion_fast.adapters import load_adapter, save_adapter
from lion_fast.equilibrium.masked import Masked
from lion_fast.errors import AdapterError, OptionError
from lion_fast.inspection import parameter_counts
from lion_fast.methods.files import TENSORS, read_adapter
from lion_fast.pruning import compact_model, prune_once
from lion_fast.pruning.compaction import describe_compacted, restore_compacted
from lion_fast.pruning.packing import pack_bits, pack_state, unpack_bits, unpack_state


def model(state_dim=32, **options):
    return tiny_model(state_dim=state_dim, **options).eval()


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (16, 7), (2, 3, 4, 5), (0,), (4, 0)])
def test_bits_come_back(shape):
    mask = torch.rand(shape) < 0.4
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.numel() == -(-mask.numel() // 8)
    flat = mask.flatten().tolist()
    for i, byte in enumerate(bits.tolist()):
        assert byte == sum(1 << k for k, kept in enumerate(flat[8 * i : 8 * i + 8]) if kept)
    assert torch.equal(unpack_bits(bits, mask.shape), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_a_packed_state_comes_back_bit_by_bit(keep, dtype):
    layer = LionLayer(12, 5).to(dtype)
    prune_once(layer, keep)
    with torch.no_grad():
        # A kept value may be zero, of either sign, or anything else.
        layer.A[tuple(layer.A_mask.nonzero()[0].tolist())] = -0.0
    state = layer.state_dict()
    packed = pack_state(state)
    assert not any(key.endswith("_mask") for key in packed) and "b" in packed and "A" not in packed
    back = unpack_state(packed)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert back[key].dtype == value.dtype
        assert torch.equal(back[key], value)
        if value.is_floating_point():
            assert torch.equal(torch.signbit(back[key]), torch.signbit(value))


def test_what_an_optimiser_left_off_the_mask_is_not_kept():
    layer = LionLayer(12, 5)
    prune_once(layer, 0.5)
    layer.A.data.add_(1.0 * ~layer.A_mask)
    back = unpack_state(pack_state(layer.state_dict()))
    assert (back["A"][~layer.A_mask] == 0).all() and torch.equal(back["A"], layer.masked("A"))


@pytest.mark.parametrize("granularity", ["element", "unit"])
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_the_file_shrinks_and_loads_to_the_same_bits(tmp_path, keep, granularity):
    dense, pruned = model(), model()
    save_adapter(dense, tmp_path / "dense")
    prune_once(pruned, keep, granularity=granularity)
    save_adapter(pruned, tmp_path / "pruned")
    sizes = {name: (tmp_path / name / TENSORS).stat().st_size for name in ("dense", "pruned")}
    matrices = sum(p.numel() for p in _matrices(dense))
    kept = sum(int(mask.sum()) for end in _ends(pruned) for mask in end.masks().values())
    bits = sum(-(-p.numel() // 8) for p in _matrices(dense))
    # Four bytes a value: those off the mask go, the bits come, and the names of three tensors for one.
    saved = 4 * (matrices - kept) - bits
    assert abs(sizes["dense"] - sizes["pruned"] - saved) < 2000
    if granularity == "element":
        assert sizes["pruned"] < (keep + 0.13) * sizes["dense"] + 3000

    loaded = load_adapter(tmp_path / "pruned", tiny_backbone())
    assert same_bits(loaded.adapter_state_dict(), pruned.adapter_state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), pruned(images))
    save_adapter(loaded, tmp_path / "again")
    first, again = (safetensors.torch.load_file(tmp_path / name / TENSORS) for name in ("pruned", "again"))
    assert same_bits(first, again)

    without, dropped = dense.num_trainable(), matrices - kept
    with_head = dense.num_trainable(head=True) - dropped
    assert parameter_counts(loaded) == {"dense": without, "kept": without - dropped, "with_head": with_head}
    assert loaded.num_trainable(kept=True) == without - dropped
    assert loaded.num_trainable(head=True, kept=True) == with_head
    told = [described(tmp_path / name) for name in ("dense", "pruned")]
    assert [each["format_version"] for each in told] == [1, 2]  # who can read it
    found = told[1]["parameters"]
    assert (found["kept"], found["kept_with_head"]) == (without - dropped, with_head)


def _ends(tuned) -> list[Masked]:
    return [tuned.input_end, tuned.output_end]


def _matrices(tuned):
    return [getattr(end, name) for end in _ends(tuned) for name in "AWV"]


def test_a_model_takes_masks_from_an_adapter_and_gives_them_back():
    dense, pruned = model(8), model(8)
    prune_once(pruned, 0.5)
    states = [{k: v.clone() for k, v in tuned.adapter_state_dict().items()} for tuned in (dense, pruned)]
    for state in (states[1], states[0], states[1]):
        dense.load_adapter_state_dict(state)
        assert same_bits(dense.adapter_state_dict(), state)


@pytest.mark.parametrize("recurrence", ["free", "tied"])
def test_a_compacted_model_is_saved_and_loaded(tmp_path, recurrence):
    tuned = model(recurrence=recurrence, gamma=0.2)
    prune_once(tuned, 0.4, granularity="unit")
    images = torch.randn(2, 3, 32, 32)
    out = tuned(images)
    save_adapter(tuned, tmp_path / "masked")
    changed = compact_model(tuned)
    assert sum(now for _, now in changed.values()) == -(-64 * 4 // 10)
    torch.testing.assert_close(tuned(images), out, rtol=0, atol=1e-5)
    save_adapter(tuned, tmp_path / "small")
    loaded = load_adapter(tmp_path / "small", tiny_backbone())
    assert torch.equal(loaded(images), tuned(images))
    for mine, its in zip(_ends(loaded), _ends(tuned), strict=True):
        assert (mine.state_dim, mine.recurrence, mine.compacted_from) == (its.state_dim, its.recurrence, 32)
    sizes = [(tmp_path / name / TENSORS).stat().st_size for name in ("masked", "small")]
    assert sizes[1] < sizes[0] + 2000
    with pytest.raises(OptionError, match="already compacted"):
        prune_once(loaded, 0.5)


A = "input_end.A"
SPOILED = {
    "fewer values": lambda t: t.update({A + "#kept": t[A + "#kept"][:-1]}),
    "no values": lambda t: t.pop(A + "#kept"),
    "no shape": lambda t: t.pop(A + "#shape"),
    "another shape": lambda t: t.update({A + "#shape": torch.tensor([3, 3])}),
    "negative shape": lambda t: t.update({A + "#shape": -t[A + "#shape"]}),
    "float bits": lambda t: t.update({A + "#bits": t[A + "#bits"].float()}),
    "more bits": lambda t: t.update({A + "#bits": t[A + "#bits"] | 255}),
}


@pytest.mark.parametrize("how", SPOILED)
def test_packed_matrices_that_do_not_fit_are_refused(tmp_path, how):
    tuned = model(5)
    prune_once(tuned, 0.5)
    save_adapter(tuned, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / TENSORS)
    SPOILED[how](tensors)
    replace_tensors(tmp_path, tensors)
    with pytest.raises(AdapterError, match="input_end.A cannot be read"):
        read_adapter(tmp_path)


def test_bits_behind_the_end_are_refused():
    bits = pack_bits(torch.ones(9, dtype=torch.bool))
    bits[-1] |= 4
    with pytest.raises(ValueError, match="behind the last entry"):
        unpack_bits(bits, torch.Size([9]))


@pytest.mark.parametrize(
    "compacted",
    [
        [],
        {"input_end": 3},
        {"input_end": {"state_dim": 9, "recurrence": "free", "compacted_from": 8}},
        {"input_end": {"state_dim": 0, "recurrence": "free", "compacted_from": 8}},
        {"input_end": {"state_dim": 4, "recurrence": "tied", "compacted_from": 8}},
        {"head": {"state_dim": 4, "recurrence": "free", "compacted_from": 8}},
        {"nowhere": {"state_dim": 4, "recurrence": "free", "compacted_from": 8}},
    ],
)
def test_a_compacted_form_that_does_not_fit_is_refused(tmp_path, compacted):
    tuned = model(8)
    if compacted:
        with pytest.raises(OptionError):
            restore_compacted(tuned, compacted)
    prune_once(tuned, 0.5, granularity="unit")
    compact_model(tuned)
    assert describe_compacted(tuned).keys() == {"input_end", "output_end"}
    save_adapter(tuned, tmp_path)
    rewrite(tmp_path, compacted=compacted)
    with pytest.raises(AdapterError):
        load_adapter(tmp_path, tiny_backbone())
