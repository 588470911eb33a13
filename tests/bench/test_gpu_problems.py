"""What the GPU run measures: shapes in their order, counted bytes, sparse contenders that are all right."""

import check
import dense
import problems
import pytest
import sparse
import timing
import torch

from lion_fast.studies import measuring


def test_shapes_come_in_order_of_importance_and_cover_the_plan():
    found = problems.shapes()
    assert found[: len(problems.FIRST_SHAPES)] == problems.FIRST_SHAPES
    assert [(s.state, s.batch) for s in found[:6:2]] == [(64, 256), (64, 64), (64, 1)]
    assert len(found) == len(set(found)) == 3 * 6 * 5 * 2
    first = dense.passes(rest=False, dry=False)
    assert {c.name for _, chosen in first for c in chosen} == set(dense.FIRST)
    assert sum(any(c.compiled for c in chosen) for _, chosen in first) == 2


def test_counted_bytes_and_operations():
    counted = problems.counts(problems.Shape(2, 10, 4, "easy", tokens=3), torch.bfloat16, 5.0)
    assert counted["forward"] == ((2 * 6 * 10 + 96) * 2, 4 * 6 * 10 * 4 + 2 * 6 * 16 * 4)
    assert counted["backward"][0] == (3 * 6 * 10 + 6 * 4 + 96) * 2 + 96 * 4
    # Only where a gradient is to come is the pre-activation written.
    size, operations = map(sum, zip(counted["forward"], counted["backward"], strict=True))
    assert counted["both"] == (size + 6 * 4 * 2, operations)


def test_the_first_checks_are_those_of_the_timed_kernels():
    found = list(check.cases(rest=False))
    assert {c.rows for c in found} >= {131, 12608}
    assert {c.state for c in found if not c.wide and not c.block} >= {64, 16, 128, 32}
    assert any(c.wide for c in found) and {c.block for c in found} >= {64, 32}
    assert set(map(str, found)) < set(map(str, check.cases(rest=True)))
    assert max(c.rows for c in check.cases(False, small=True)) < 200


def test_sparse_cases_begin_with_the_target():
    found = sparse.cases()
    first = found[0]
    assert (first.width, first.state, first.form, first.sparsity) == (768, 768, "block 64", 0.75)
    assert len(found) == len(set(found)) == 6 * (6 * 5 + 1)
    assert {c.sparsity for c in found if c.state == 64} == {0, 0.25, 0.5, 0.75, 0.9, 0.95}


def made_case(granularity, block=None, state=64, width=64, sparsity=0.5):
    case = sparse.Case(width, state, granularity, sparsity, block)
    shape = problems.Shape(2, width, state, "sparse", tokens=7)
    return sparse.build(case, shape, problems.draw_tokens(shape, torch.float32, "cpu", 1000))


def test_masks_drop_whole_groups():
    for sparsity, kept in ((0.0, 16), (0.75, 4), (0.95, 1), (1.0, 1)):
        masks = made_case("block", 16, sparsity=sparsity).masks
        for mask in masks.values():
            tiles = mask.view(4, 16, 4, 16).float().mean((1, 3))
            assert set(tiles.unique().tolist()) <= {0.0, 1.0} and tiles.sum() == kept
    units = made_case("unit", sparsity=0.75).masks
    assert units["W"].sum() == 16**2 and (units["A"].any(1) == units["V"].any(0)).all()
    assert all((m.view(-1, 4).sum(1) == 2).all() for m in made_case("2:4").masks.values())
    problem = made_case("element", sparsity=0.9)
    assert abs(problem.masks["W"].float().mean() - 0.1) < 1e-3
    assert (problem.free[1] != 0).sum() <= problem.masks["W"].sum()
    assert 3 < problem.steps["free"] < 50


@pytest.mark.parametrize(
    ("granularity", "block", "state", "width"),
    [("block", 16, 64, 96), ("block", 32, 72, 40), ("unit", None, 40, 24), ("element", None, 48, 40)],
)
def test_every_sparse_contender_equals_dense_with_zeros(granularity, block, state, width):
    problem = made_case(granularity, block, state, width, 0.75)
    names, expected = set(), {}
    for contender in sparse.chosen(problem.case):
        subject, told = timing.prepare(contender, problem, "backward", "cpu")
        if contender.name == "BSR loop" and state % block:
            assert told == {"skipped": f"torch's BSR needs multiples of {block}, not {state} x {width}"}
            continue
        assert subject is not None, (contender.name, told)
        assert told["error_out"] < 2e-3 and told["error_dx"] < 2e-3, (contender.name, told)
        names.add(contender.name)
        gradients = dict(zip("xAWbVc", subject.gradients(), strict=True))
        expected = expected or gradients
        for name, got in gradients.items():
            target = expected[name]
            if contender.name == "block-sparse fused" and name in "AWV":
                target = sparse.find_pattern(problem.masks[name], block).gather(target)
            elif contender.name == "compacted" and name in "AWbV":
                kept = problem.masks["V"].any(0)
                target = target[:, kept] if name == "V" else target[kept]
                target = target[:, kept] if name == "W" else target
            assert measuring.distance(got, target) < 5e-3, (contender.name, name)
    assert len(names) >= 3


def test_the_two_of_four_contenders_equal_dense_with_zeros(monkeypatch):
    monkeypatch.setattr(sparse.two_of_four, "why_not", lambda *a: None)
    monkeypatch.setattr(sparse.two_of_four, "compress", lambda matrix: matrix)
    problem = made_case("2:4")
    for contender in sparse.chosen(problem.case):
        subject, told = timing.prepare(contender, problem, "forward", "cpu")
        assert subject is not None and told["error_out"] < 2e-3, (contender.name, told)
