"""bench/aot.py: what it computes, what it refuses, and the reduced set of shipped configurations."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import aot  # noqa: E402
import sass  # noqa: E402

from lion_kernels import launch  # noqa: E402

ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def spec(name: str, capability: int = 90) -> launch.Shipped:
    (found,) = (s for s in launch.shipped() if s.name == name and s.capability == capability)
    return found


@pytest.mark.parametrize(
    "registers, kilobytes, warps, blocks",
    [(132, 48, 4, 3), (76, 30, 4, 6), (69, 30, 4, 7), (128, 48, 4, 4), (254, 72, 4, 2), (179, 72, 8, 1),
     (122, 72, 8, 2), (32, 0, 4, 16), (16, 0, 1, 32), (32, 100, 4, 2)],
)  # fmt: skip
def test_resident_blocks_by_registers_memory_and_warps(registers, kilobytes, warps, blocks):
    assert aot.blocks_per_sm(aot.CHIPS[90], registers, kilobytes * 1024, warps) == blocks


def test_what_must_not_ship():
    good = aot.Row("x", 90, "3", True, registers=100, shared=1000, tensor={"HGMMA": 4})
    product = dataclasses.replace(spec("step bf16 R=512"), spill_free=True)
    assert aot.judge(good, product, []) == []
    spilled = dataclasses.replace(good, spill_stores=2, spill_loads=3)
    assert aot.judge(spilled, product, []) == ["marked spill-free, but has 2 STL and 3 LDL"]
    assert aot.judge(spilled, dataclasses.replace(product, spill_free=False), []) == []
    (problem,) = aot.judge(dataclasses.replace(good, shared=250_000), product, [])
    assert "250000 B of shared memory" in problem
    (problem,) = aot.judge(dataclasses.replace(good, tensor={"HMMA": 4}), product, [])
    assert problem == "expected HGMMA, found HMMA"
    (problem,) = aot.judge(dataclasses.replace(good, tensor={}), product, [])
    assert problem == "expected HGMMA, found no tensor core"
    writer, reader = sass.parse(
        "/*0010*/ MOV R4, R5 ;\n/*0020*/ HGMMA.64x8x16.F32 R24, R4, gdesc[UR4], R24 ;"
    )
    (problem,) = aot.judge(good, product, [sass.Hazard(reader, writer, (4,))])
    assert "MOV R4, R5 writes R4" in problem


def test_which_configurations_want_tensor_cores():
    assert aot.wants_tensor_cores(spec("step bf16 R=512")) and aot.wants_tensor_cores(spec("step tf32 R=512"))
    assert not aot.wants_tensor_cores(spec("step ieee R=512"))
    assert not aot.wants_tensor_cores(spec("step finish bf16 R=512"))


def test_narrow_tiles_are_left_to_mma_sync():
    narrow = dataclasses.replace(spec("step bf16 R=512"), constexprs={**spec("step bf16 R=512").constexprs})
    narrow.constexprs["BLOCK_T"] = 32
    row = aot.Row("x", 90, "3", True, registers=100, shared=1000, tensor={"HMMA": 4})
    assert aot.judge(row, narrow, []) == []
    row.tensor = {}
    (problem,) = aot.judge(row, narrow, [])
    assert problem == "expected HMMA or HGMMA or UTCHMMA, found no tensor core"
    assert aot.expected_tensor(spec("step bf16 R=512", 80)) == ("HMMA", "HGMMA", "UTCHMMA")


def test_every_kernel_is_listed_once_per_name_for_every_capability():
    listed = [(s.name, s.capability) for s in launch.shipped()]
    assert len(set(listed)) == len(listed)
    kernels = {(s.module, s.kernel, s.capability) for s in launch.shipped()}
    for capability in aot.CHIPS:
        assert {k for m, k, c in kernels if c == capability} == {k for _, k, _ in kernels}
    quick = aot.quick(launch.shipped())
    assert {(s.module, s.kernel, s.capability) for s in quick} == kernels


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")
def test_a_spill_is_found_and_named(tmp_path, monkeypatch, capsys):
    """A tile of four times the columns, which does not fit the registers."""
    good = spec("step bf16 R=512")
    wide = {**good.constexprs, "BLOCK_N": 256, "BLOCKS": 2}
    bad = dataclasses.replace(good, name="too wide a tile", constexprs=wide)
    monkeypatch.setattr(launch, "shipped", lambda: [bad])
    monkeypatch.setattr(aot, "CACHE", tmp_path / "cache.json")
    assert aot.main(["--jobs", "1", "--json", str(tmp_path / "rows.json")]) == 1
    printed = capsys.readouterr()
    assert "FAIL sm_90 too wide a tile: marked spill-free, but has" in printed.err
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["spill_stores"] > 0 and row["registers"] == 255

    monkeypatch.setattr(aot, "measure", lambda spec: pytest.fail("the second run must not compile"))
    assert aot.main(["--jobs", "1"]) == 1


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not compile")
def test_a_hazard_planted_in_a_real_kernel_is_caught():
    whole = next(
        s for s in launch.shipped() if s.kernel == "_solve_fwd_kernel" and s.capability == 90
        and s.constexprs["BLOCK_R"] == 64 and s.constexprs["LOOP"] == "fp16"
    )  # fmt: skip
    text = aot.disassemble(aot.compile_spec(whole))[1]
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
    broken = spec("step bf16 R=512")
    broken = dataclasses.replace(broken, constexprs={**broken.constexprs, "BLOCK_N": 48})
    monkeypatch.setattr(launch, "shipped", lambda: [broken])
    assert "does not compile" in aot.run([broken], jobs=1, use_cache=False)[0].problems[0]
    assert aot.main(["--jobs", "1", "--no-cache"]) == 1


def test_a_result_is_known_by_the_source_of_its_kernel(monkeypatch):
    product = spec("step bf16 R=512")
    sources = aot.kernel_sources(product.module)
    assert {"lion_kernels.step", "lion_kernels.activations", "lion_kernels.solve"} <= set(sources)
    assert "lion_kernels.launch" not in sources
    known = aot.fingerprint(product)
    assert aot.fingerprint(product) == known
    assert aot.fingerprint(dataclasses.replace(product, num_stages=7)) != known
    monkeypatch.setattr(aot, "kernel_sources", lambda module: {**sources, "lion_kernels.step": "changed"})
    assert aot.fingerprint(product) != known
    with pytest.raises(RuntimeError, match="changed during the run"):
        aot.measure_keyed((known, product))


def test_the_markdown_table(tmp_path):
    rows = [
        aot.Row(
            "solve sm_90 R64", 90, "3.9.0", True, 132, shared=49152, blocks_per_sm=3, tensor={"HGMMA": 9}
        ),
        aot.Row("solve sm_80 R64", 80, "3.9.0", True, 160, shared=32768, blocks_per_sm=2, spill_loads=1),
        aot.Row("sum sm_90", 90, "3.9.0", True, problems=["does not compile: x"]),
    ]
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{aot.MARKERS[0]}\nold\n{aot.MARKERS[1]}\nafter\n")
    aot.write_between(page, aot.MARKERS, aot.markdown(rows))
    text = page.read_text()
    assert "| solve R64 | 160 / 1 / 32 / 2, no tensor core | 132 / 0 / 48 / 3, HGMMA |" in text
    assert "| sum |  | does not compile |" in text
    assert "old" not in text and text.startswith("before\n") and text.endswith("after\n")
    (tmp_path / "bare.md").write_text("nothing")
    with pytest.raises(ValueError, match="aot-table:start"):
        aot.write_between(tmp_path / "bare.md", aot.MARKERS, "x")


def test_the_reduced_set_of_shipped_configurations():
    """As CI runs it: every kernel for every capability."""
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), "--quick"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    print(result.stdout[-6000:])
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert "sm_80" in result.stdout and "HGMMA" in result.stdout and "sm_100" in result.stdout
