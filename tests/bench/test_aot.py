"""bench/aot.py: what it computes, what it refuses, and the reduced set of shipped configurations."""

import dataclasses
import importlib
import itertools
import json
import os

import aot
import facts
import pytest
import sass
import torch
from shipped import Shipped, shipped

from lion_kernels import launch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile"
)


def spec(name: str, capability: int = 90) -> Shipped:
    (found,) = (s for s in shipped() if s.name == name and s.capability == capability)
    return found


@pytest.mark.parametrize(
    "registers, kilobytes, warps, blocks",
    [(132, 48, 4, 3), (76, 30, 4, 6), (69, 30, 4, 7), (128, 48, 4, 4), (254, 72, 4, 2), (179, 72, 8, 1),
     (122, 72, 8, 2), (32, 0, 4, 16), (16, 0, 1, 32), (32, 100, 4, 2)],
)  # fmt: skip
def test_resident_blocks_by_registers_memory_and_warps(registers, kilobytes, warps, blocks):
    assert aot.blocks_per_sm(aot.CHIPS[90], registers, kilobytes * 1024, warps) == blocks


def problems(spec: Shipped, version="3.9.0", **found) -> list[str]:
    found = {"registers": 100, "shared": 1000, "tensor": {"HGMMA": 4}, **found}
    return aot.judge(spec, aot.Facts(**found), version).problems


PRODUCT = spec("step bf16 R=512")


@pytest.mark.parametrize(
    "found, told",
    [
        ({}, None),
        ({"spill_stores": 2, "spill_loads": 3}, "2 STL and 3 LDL"),
        ({"shared": 250_000}, "250000 B of shared memory"),
        ({"tensor": {"HMMA": 4}}, "HMMA"),
        ({"tensor": {}}, "no tensor core"),
        ({"error": "x"}, "does not compile: x"),
        ({"hazards": ["R4 is overwritten"]}, "R4 is overwritten"),
    ],
)
def test_what_must_not_ship(found, told):
    told_of = problems(PRODUCT, **found)
    assert told_of == [] if told is None else len(told_of) == 1 and told in told_of[0]


@pytest.mark.parametrize(
    "version, allowed",
    [("3.6.0", True), ("3.6.1", True), ("3.10.0", True), ("3.1.0", False), ("3.9.0", False)],
)
def test_a_spill_is_allowed_in_the_releases_it_is_marked_for(version, allowed):
    product = dataclasses.replace(PRODUCT, spills_in=("3.6", "3.10"))
    assert (problems(product, version, spill_loads=1) == []) is allowed
    assert problems(product, version) == []


def test_which_configurations_want_tensor_cores():
    """And narrow tiles are left to mma.sync."""
    wants = {kind: aot.wants_tensor_cores(spec(f"step {kind} R=512")) for kind in ("bf16", "tf32", "ieee")}
    assert wants == {"bf16": True, "tf32": True, "ieee": False}
    assert not aot.wants_tensor_cores(spec("step finish bf16 R=512"))
    narrow = dataclasses.replace(PRODUCT, constexprs={**PRODUCT.constexprs, "BLOCK_T": 32})
    assert problems(narrow, tensor={"HMMA": 4}) == [] != problems(narrow, tensor={})
    assert aot.expected_tensor(spec("step bf16 R=512", 80)) == ("HMMA", "HGMMA", "UTCHMMA")


def test_every_kernel_is_listed_once_per_name_for_every_capability():
    listed = [(s.name, s.capability) for s in shipped()]
    assert len(set(listed)) == len(listed)
    kernels = {(s.module, s.kernel, s.capability) for s in shipped()}
    for capability in aot.CHIPS:
        assert {k for m, k, c in kernels if c == capability} == {k for _, k, _ in kernels}
    quick = aot.quick(shipped())
    assert {(s.module, s.kernel, s.capability) for s in quick} == kernels


def test_shipped_covers_the_tables_and_names_every_argument():
    for capability, state in itertools.product(launch.CONFIGS, (16, 32, 64, 128, 256)):
        tile = launch.config("solve", 1, 768, state, torch.bfloat16, divmod(capability, 10))
        ours = [
            s for s in shipped() if (s.capability, s.kernel) == (capability, "_solve_fwd_kernel")
            and (s.constexprs["R"], s.constexprs["INPUT"]) == (state, "bf16")
        ]  # fmt: skip
        assert {s.constexprs["ACT"] for s in ours} >= {"relu", "gelu"}
        assert {(s.constexprs["BLOCK_T"], s.num_warps) for s in ours} == {(tile.block_t, tile.num_warps)}
    for s in shipped():
        kernel = getattr(importlib.import_module(s.module), s.kernel)
        assert sorted(kernel.arg_names) == sorted([*s.signature, *s.constexprs]), s.name
        # No tensor core serves the one kind that may spill.
        assert not s.spills_in or (s.kernel, s.constexprs["PRECISION"]) == ("_solve_fwd_kernel", "ieee")


def test_a_spill_is_found_and_named(tmp_path, monkeypatch, capsys):
    """A tile of four times the columns, which does not fit the registers."""
    wide = {**PRODUCT.constexprs, "BLOCK_N": 256, "BLOCKS": 2}
    bad = dataclasses.replace(PRODUCT, name="too wide a tile", constexprs=wide)
    monkeypatch.setattr(aot, "shipped", lambda: [bad])
    monkeypatch.setattr(aot, "CACHE", tmp_path / "cache.json")
    assert aot.main(["--jobs", "1", "--json", str(tmp_path / "rows.json")]) == 1
    printed = capsys.readouterr()
    assert "FAIL sm_90 too wide a tile: must not spill, but has" in printed.err
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["spill_stores"] > 0 and row["registers"] == 255

    monkeypatch.setattr(aot.facts, "measure", lambda spec: pytest.fail("the second run must not compile"))
    assert aot.main(["--jobs", "1"]) == 1
    # What is right is asked again.
    release = aot.release_of(row["triton"])
    marked = dataclasses.replace(bad, name="known to spill", spills_in=(release,))
    monkeypatch.setattr(aot, "shipped", lambda: [marked])
    assert aot.main(["--jobs", "1"]) == 0


def test_a_hazard_planted_in_a_real_kernel_is_caught():
    whole = next(
        s for s in shipped() if s.kernel == "_solve_fwd_kernel" and s.capability == 90
        and s.constexprs["BLOCK_R"] == 64 and s.constexprs["LOOP"] == "fp16"
    )  # fmt: skip
    text = facts.disassemble(facts.compile_spec(whole))[1]
    assert sass.hazards(text) == []
    readers = [i for i in sass.parse(text) if sass.register_a(i)]
    assert len(readers) >= 4, "the loop of this kernel reads its operand from registers"
    lines = text.splitlines()
    at = next(n for n, line in enumerate(lines) if f"/*{readers[0].address:04x}*/" in line)
    register = max(sass.register_a(readers[0]))
    # At the address of the next instruction, which it replaces.
    following = next(n for n in range(at + 1, len(lines)) if sass.parse(lines[n]))
    address = sass.parse(lines[following])[0].address
    lines[following] = f"        /*{address:04x}*/    FADD R{register}, R2, R3 ;"
    (hazard,) = sass.hazards("\n".join(lines))
    assert hazard.registers == (register,) and hazard.reader == readers[0]


def test_a_configuration_that_does_not_compile_is_a_failure(monkeypatch):
    broken = dataclasses.replace(PRODUCT, constexprs={**PRODUCT.constexprs, "BLOCK_N": 48})
    monkeypatch.setattr(aot, "shipped", lambda: [broken])
    assert "does not compile" in aot.run([broken], jobs=1, use_cache=False)[0].problems[0]
    assert aot.main(["--jobs", "1", "--no-cache"]) == 1


def test_a_result_is_known_by_what_was_compiled(monkeypatch):
    text = aot.kernel_text(PRODUCT)
    called = {"step_kernels.step_fwd_kernel", "step_kernels._product", "step_kernels.DONE", "tile.as_operand"}
    called |= {"sparse_kernels.sparse_product", "activations._normal_cdf"}
    assert {f"lion_kernels.{name}" for name in called} <= set(text)
    assert "lion_kernels.step_kernels.step_bwd_kernel" not in text
    known = aot.fingerprint(PRODUCT)
    assert aot.fingerprint(dataclasses.replace(PRODUCT, name="x", spills_in=("3.6",))) == known
    for change in (
        {"num_stages": 7},
        {"constexprs": {**PRODUCT.constexprs, "BLOCK_N": 32}},
        {"signature": {**PRODUCT.signature, "T": "i64"}},
    ):
        assert aot.fingerprint(dataclasses.replace(PRODUCT, **change)) != known
    callee = importlib.import_module("lion_kernels.activations")._normal_cdf
    callee._unsafe_update_src(callee.src.replace("0.3275911", "0.3275912"))
    try:
        assert aot.fingerprint(PRODUCT) != known
        with pytest.raises(RuntimeError, match="changed during the run"):
            aot.measure_keyed((known, PRODUCT))
    finally:
        callee._unsafe_update_src(callee.src.replace("0.3275912", "0.3275911"))
    assert aot.fingerprint(PRODUCT) == known


def test_the_markdown_table(tmp_path):
    rows = [
        aot.Row(name="solve sm_90 R64", capability=90, triton="3.9.0", registers=132, shared=49152,
                blocks_per_sm=3, tensor={"HGMMA": 9}),
        aot.Row(name="solve sm_80 R64", capability=80, triton="3.9.0", registers=160, shared=32768,
                blocks_per_sm=2, spill_loads=1),
        aot.Row(name="sum sm_90", capability=90, triton="3.9.0", error="x"),
    ]  # fmt: skip
    page, ours = tmp_path / "kernels.md", aot.markers("3.9")
    other = "\n".join([aot.markers("3.6")[0], "kept", aot.markers("3.6")[1]])
    page.write_text(f"before\n{ours[0]}\nold\n{ours[1]}\n{other}\nafter\n")
    aot.write_between(page, ours, aot.markdown(rows))
    text = page.read_text()
    assert "| solve R64 | 160 / 1 / 32 / 2, no tensor core | 132 / 0 / 48 / 3, HGMMA |" in text
    assert "| sum |  | does not compile |" in text
    assert "old" not in text and text.startswith("before\n") and text.endswith(f"{other}\nafter\n")
    with pytest.raises(ValueError, match="aot-table 3.8:start"):
        aot.write_between(page, aot.markers("3.8"), "x")


def test_the_reduced_set_of_shipped_configurations(capsys):
    """As CI runs it: every kernel for every capability."""
    assert aot.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert "sm_80" in printed and "HGMMA" in printed and "sm_100" in printed
