"""Compiles every shipped kernel configuration without a GPU and checks what came out.

    python bench/aot.py [--quick] [--arch 90] [--only TEXT] [--jobs 2] [--json FILE] [--markdown FILE]

For sm_80, sm_90 and sm_100: registers, stack, spills (STL and LDL instructions), shared memory, resident
blocks (CTAs) per multiprocessor, tensor-core instructions, and on sm_90 the hazard check of `sass.py`.
Exits with 1 and names the configuration on a spill where it is marked spill-free, on more shared memory
than the chip has, on a missing HGMMA on sm_90, on a hazard, and where it does not compile.
Results are kept under build/ by the hash of the kernel's source, so that a second run is quick.
"""

import argparse
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "bench", ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import sass  # noqa: E402, I001
from lion_kernels import launch  # noqa: E402

CACHE = ROOT / "build" / "aot.json"
MARKERS = ("<!-- aot-table:start -->", "<!-- aot-table:end -->")
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
TENSOR_COLUMNS_PER_SM = 512
# The tile side that is the rows of a kernel's products, where it is not the token rows.
PRODUCT_ROWS = {"_weight_grads_kernel": "BLOCK_R", "_sampled_kernel": "BLOCK"}
# Shared memory that the system keeps per block, and the granularity of its allocation.
SHARED_RESERVED, SHARED_UNIT = 1024, 128


@dataclass(frozen=True)
class Chip:
    """Shared memory in bytes."""

    shared_per_sm: int
    shared_per_block: int


CHIPS = {
    80: Chip(164 * 1024, 163 * 1024),
    90: Chip(228 * 1024, 227 * 1024),
    100: Chip(228 * 1024, 227 * 1024),
}


@dataclass
class Row:
    """What the compiler made of one configuration; `problems` is empty where all is well."""

    name: str
    capability: int
    triton: str
    spill_free: bool
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    blocks_per_sm: int = 0
    tensor: dict[str, int] = field(default_factory=dict)
    register_a: int = 0
    instructions: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def blocks_per_sm(chip: Chip, registers: int, shared: int, num_warps: int, tensor_columns: int = 0) -> int:
    """How many blocks are resident on one multiprocessor by registers, shared memory and warps.

    Registers are handed out per warp in units of 256, from four files of a quarter each.
    """
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    warps = min(WARPS_PER_SM, REGISTERS_PER_SM // 4 // per_warp * 4)
    taken = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    limits = [warps // num_warps, chip.shared_per_sm // taken, BLOCKS_PER_SM]
    if tensor_columns:
        limits.append(TENSOR_COLUMNS_PER_SM // tensor_columns)
    return min(limits)


def expected_tensor(spec: launch.Shipped) -> tuple[str, ...]:
    """The tensor-core instructions of which one must be there; empty where none need be.

    A wgmma takes 64 rows, those of the first operand's tile; narrower tiles are left to mma.sync.
    """
    if not wants_tensor_cores(spec):
        return ()
    rows = spec.constexprs[PRODUCT_ROWS.get(spec.kernel, "BLOCK_T")]
    wgmma = spec.capability == 90 and rows >= 64
    return ("HGMMA",) if wgmma else ("HMMA", "HGMMA", "UTCHMMA")


def uses_products(spec: launch.Shipped) -> bool:
    """Whether the kernel multiplies matrices at all: those that do say in which precision."""
    return "PRECISION" in spec.constexprs


def wants_tensor_cores(spec: launch.Shipped) -> bool:
    """Whether some product of a configuration has operands that the tensor cores take."""
    given = spec.constexprs
    halves = {given.get("INPUT"), given.get("LOOP")} & {"fp16", "bf16"}
    return uses_products(spec) and (bool(halves) or given["PRECISION"] == "tf32")


@functools.cache
def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not bundled with Triton {triton.__version__}: expected {path}")
    return str(path)


def _dump(cubin: str, *options: str) -> str:
    return subprocess.run(
        [_tool("cuobjdump"), *options, cubin], check=True, capture_output=True, text=True
    ).stdout


def compile_spec(spec: launch.Shipped):
    """The compiled kernel of Triton for one configuration; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(spec.module), spec.kernel)
    names = kernel.arg_names
    if missing := set(names) - set(spec.signature) - set(spec.constexprs):
        raise ValueError(f"{spec.name}: no type or value is given for {', '.join(sorted(missing))}")
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in spec.constexprs else spec.signature[n] for n in names},
        constexprs={(names.index(n),): value for n, value in spec.constexprs.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in spec.divisible},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return triton.compile(source, target=GPUTarget("cuda", spec.capability, 32), options=options)


def disassemble(compiled) -> tuple[str, str]:
    """The resource usage and the SASS of a compiled kernel, as cuobjdump prints them."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        return _dump(path, "--dump-resource-usage"), _dump(path, "--dump-sass")


def judge(row: Row, spec: launch.Shipped, found: list[sass.Hazard]) -> list[str]:
    """Why a configuration must not ship, from what was measured; empty where all is well."""
    chip = CHIPS[spec.capability]
    problems = []
    if spec.spill_free and row.spill_stores + row.spill_loads:
        problems.append(f"marked spill-free, but has {row.spill_stores} STL and {row.spill_loads} LDL")
    if row.shared > chip.shared_per_block:
        problems.append(f"{row.shared} B of shared memory, the chip has {chip.shared_per_block} B per block")
    expected = expected_tensor(spec)
    if expected and not any(row.tensor.get(name) for name in expected):
        used = ", ".join(row.tensor) or "no tensor core"
        problems.append(f"expected {' or '.join(expected)}, found {used}")
    problems += [f"hazard: {hazard}" for hazard in found]
    return problems


def measure(spec: launch.Shipped) -> Row:
    """Compiles one configuration and reads registers, memory and instructions from its cubin."""
    import triton

    row = Row(spec.name, spec.capability, triton.__version__, spec.spill_free)
    begin = time.perf_counter()
    try:
        compiled = compile_spec(spec)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        row.problems.append(f"does not compile: {text.splitlines()[-1][:200]}")
        return row
    usage, text = disassemble(compiled)
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.rsplit("Function", 1)[-1]))
    code = sass.parse(text)
    row.registers, row.stack = int(numbers["REG"]), int(numbers["STACK"])
    row.spill_stores, row.spill_loads = sass.spills(code)
    row.shared = compiled.metadata.shared
    warps = compiled.metadata.num_warps
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    row.blocks_per_sm = blocks_per_sm(CHIPS[spec.capability], row.registers, row.shared, warps, columns)
    row.tensor = dict(sass.tensor_instructions(code))
    row.register_a = sum(bool(sass.register_a(i)) for i in code)
    row.instructions = len(code)
    row.problems = judge(row, spec, sass.hazards(text) if spec.capability == 90 else [])
    row.seconds = round(time.perf_counter() - begin, 2)
    return row


def kernel_sources(module: str, seen: dict[str, str] | None = None) -> dict[str, str]:
    """The text of a module of kernels and of those of this package that it imports.

    Triton's own key of a kernel depends on which kernels were asked before (3.6), so it is not used.
    """
    seen = {} if seen is None else seen
    path = ROOT / "kernels" / (module.replace(".", "/") + ".py")
    if module in seen or not path.exists():
        return seen
    text = path.read_text()
    # Launch configurations are in the specification; only what holds kernels counts here.
    if not re.search(r"^import triton", text, re.MULTILINE):
        return seen
    seen[module] = text
    for inner, names in re.findall(r"^from lion_kernels(?:\.(\w+))? import (.+)$", text, re.MULTILINE):
        for name in [inner] if inner else re.findall(r"\w+", names):
            kernel_sources(f"lion_kernels.{name}", seen)
    return seen


def fingerprint(spec: launch.Shipped) -> str:
    """Changes with the kernels' source, the configuration, Triton's version and this tool."""
    import triton

    tools = [Path(__file__).read_text(), Path(sass.__file__).read_text()]
    parts = [*kernel_sources(spec.module).values(), repr(spec), triton.__version__, *tools]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def measure_keyed(task: tuple[str, launch.Shipped]) -> Row:
    """`measure`, if this process still has the source that the key was made from; else RuntimeError."""
    key, spec = task
    if fingerprint(spec) != key:
        raise RuntimeError("a kernel's source changed during the run; start it again")
    return measure(spec)


def _load_cache() -> dict[str, dict]:
    try:
        return json.loads(CACHE.read_text())
    except (OSError, ValueError):
        return {}


def _save_cache(cache: dict[str, dict]) -> None:
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    partial = CACHE.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(cache))
    partial.replace(CACHE)


def quick(specs: list[launch.Shipped]) -> list[launch.Shipped]:
    """One configuration per kernel and capability: the one with the widest state, on sm_90 the narrowest too.

    The widest is where registers run out.
    """
    groups: dict[tuple[str, int], list[launch.Shipped]] = {}
    for spec in specs:
        groups.setdefault((spec.kernel, spec.capability), []).append(spec)
    chosen = []
    for (_, capability), group in groups.items():
        ordered = sorted(group, key=lambda s: (s.constexprs.get("BLOCK_R", 0), s.name))
        chosen += [ordered[-1]] if capability != 90 or len(ordered) == 1 else [ordered[0], ordered[-1]]
    return chosen


def run(specs: list[launch.Shipped], jobs: int = 2, use_cache: bool = True, report=None) -> list[Row]:
    """A row per configuration, in order; `report(row)` is called as each is known."""
    keys = [fingerprint(spec) for spec in specs]
    cache = _load_cache() if use_cache else {}
    todo = [(key, spec) for key, spec in zip(keys, specs, strict=True) if key not in cache]
    for key in keys:
        if key in cache and report:
            report(Row(**cache[key]))
    if todo and jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(todo)), mp_context=context) as pool:
            results = pool.map(measure_keyed, todo)
            _collect(todo, results, cache, use_cache, report)
    else:
        _collect(todo, map(measure_keyed, todo), cache, use_cache, report)
    return [Row(**cache[key]) for key in keys]


def _collect(todo, results, cache, use_cache, report) -> None:
    for (key, _), row in zip(todo, results, strict=True):
        cache[key] = asdict(row)
        if report:
            report(row)
    if use_cache and todo:
        # A failure to compile may be this machine's; it is tried again.
        _save_cache({k: row for k, row in {**_load_cache(), **cache}.items() if row["registers"]})


def describe(row: Row) -> str:
    """One line of the printed table."""
    tensor = " ".join(f"{name} {count}" for name, count in row.tensor.items()) or "-"
    ok = "ok" if not row.problems else "FAIL"
    mark = "" if row.spill_free else " (spills allowed)"
    return (
        f"sm_{row.capability:<4}{row.name:<44}{row.registers:>5}{row.stack:>7}"
        f"{f'{row.spill_stores}/{row.spill_loads}':>9}{row.shared / 1024:>9.1f}{row.blocks_per_sm:>6}"
        f"  {tensor:<14}{row.seconds:>6.1f}s  {ok}{mark}"
    )


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table: one line per configuration, one column per target."""
    targets = sorted({row.capability for row in rows})
    found = {(row.name.replace(f" sm_{row.capability}", ""), row.capability): row for row in rows}
    names = dict.fromkeys(name for name, _ in found)
    head = ["configuration", *(f"sm_{t}: registers / spills / shared KB / blocks per SM" for t in targets)]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for name in names:
        cells = []
        for target in targets:
            row = found.get((name, target))
            if row is None:
                cells.append("")
            elif row.registers == 0:
                cells.append("does not compile")
            else:
                spilled = row.spill_stores + row.spill_loads
                tensor = " ".join(row.tensor) or "no tensor core"
                numbers = f"{row.registers} / {spilled} / {row.shared / 1024:.0f} / {row.blocks_per_sm}"
                cells.append(f"{numbers}, {tensor}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    versions = ", ".join(sorted({row.triton for row in rows}))
    lines.append(f"\nCompiled ahead of time with Triton {versions}; nothing in this table was timed.")
    return "\n".join(lines)


def write_between(path: Path, markers: tuple[str, str], text: str) -> None:
    """Replaces what stands between two marker lines of a file; ValueError where they are not there once."""
    content = path.read_text(encoding="utf-8")
    start, end = markers
    if content.count(start) != 1 or content.count(end) != 1 or content.index(start) > content.index(end):
        raise ValueError(f"{path} needs one line {start} and after it one line {end}")
    before, after = content.split(start)[0], content.split(end)[1]
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="aot.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one configuration per kernel and target")
    parser.add_argument("--arch", type=int, choices=sorted(CHIPS), action="append", help="only this target")
    parser.add_argument("--only", default="", help="only configurations whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--no-cache", action="store_true", help="compile again what is known")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="update the table between the markers of this file")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the kernels by interpreted ones; unset it")
    begin = time.perf_counter()
    specs = [
        s for s in launch.shipped() if s.capability in (options.arch or CHIPS) and options.only in s.name
    ]
    if options.quick:
        specs = quick(specs)
    if not specs:
        parser.error("no configuration matches; see lion_kernels.launch.shipped")
    print(
        f"{'target':<7}{'configuration':<44}{'regs':>5}{'stack':>7}{'STL/LDL':>9}{'smem KB':>9}{'CTAs':>6}"
        f"  {'tensor cores':<14}{'time':>7}"
    )
    rows = run(specs, options.jobs, not options.no_cache, lambda row: print(describe(row), flush=True))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown:
        write_between(options.markdown, MARKERS, markdown(rows))
    failed = [row for row in rows if row.problems]
    for row in failed:
        for problem in row.problems:
            print(f"FAIL sm_{row.capability} {row.name}: {problem}", file=sys.stderr)
    seconds = time.perf_counter() - begin
    print(f"{len(rows)} configurations, {len(failed)} failed, {seconds:.0f} s, Triton {rows[0].triton}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
