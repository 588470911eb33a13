"""Compiles every shipped kernel configuration without a GPU and checks what came out.

    python bench/aot.py [--quick] [--arch 90] [--only TEXT] [--jobs N] [--json FILE] [--markdown FILE]

For sm_80, sm_90 and sm_100: registers, stack, spills (STL and LDL instructions), shared memory, resident
blocks (CTAs) per multiprocessor, tensor-core instructions, and on sm_90 the hazard check of `sass.py`.
Exits with 1 and names the configuration on a spill where it is not marked for this Triton release, on more
shared memory than the chip has, on a missing HGMMA on sm_90, on a hazard, and where it does not compile.

What was compiled is kept under build/ by its sources and judged anew each time, so a second run takes
seconds, until a kernel, its configuration, Triton or the reading of a cubin (`facts.py`) changes.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "bench", ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import facts  # noqa: E402, I001
import sass  # noqa: E402
from facts import Facts  # noqa: E402
from lion_fast.files import write_atomically  # noqa: E402
from lion_fast.studies.markdown import table  # noqa: E402
from shipped import Shipped, shipped  # noqa: E402

CACHE = ROOT / "build" / "aot.json"
# Compiled configurations between two writes of the cache.
SAVE_EVERY = 20
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
class Row(Facts):
    """A configuration with the facts of it; `problems` is empty where all is well."""

    name: str = ""
    capability: int = 0
    triton: str = ""
    may_spill: bool = False
    blocks_per_sm: int = 0
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


def expected_tensor(spec: Shipped) -> tuple[str, ...]:
    """The tensor-core instructions of which one must be there; empty where none need be.

    A wgmma takes 64 rows, those of the first operand's tile; narrower tiles are left to mma.sync.
    """
    if not wants_tensor_cores(spec):
        return ()
    rows = spec.constexprs[PRODUCT_ROWS.get(spec.kernel, "BLOCK_T")]
    wgmma = spec.capability == 90 and rows >= 64
    return ("HGMMA",) if wgmma else ("HMMA", "HGMMA", "UTCHMMA")


def wants_tensor_cores(spec: Shipped) -> bool:
    """Whether some product of a configuration has operands that the tensor cores take.

    The kernels that multiply matrices say in which precision.
    """
    given = spec.constexprs
    halves = {given.get("INPUT"), given.get("LOOP")} & {"fp16", "bf16"}
    return "PRECISION" in given and (bool(halves) or given["PRECISION"] == "tf32")


def release_of(version: str) -> str:
    """The major and minor number: "3.6" of "3.6.0"."""
    return ".".join(version.split(".")[:2])


def judge(spec: Shipped, found: Facts, version: str) -> Row:
    """The row of a configuration: facts, and the reasons why it must not ship with this Triton."""
    row = Row(**asdict(found), name=spec.name, capability=spec.capability, triton=version)
    row.may_spill = release_of(version) in spec.spills_in
    if row.error:
        row.problems.append(f"does not compile: {row.error}")
        return row
    chip = CHIPS[spec.capability]
    row.blocks_per_sm = blocks_per_sm(chip, row.registers, row.shared, spec.num_warps, row.tensor_columns)
    if row.spill_stores + row.spill_loads and not row.may_spill:
        row.problems.append(f"must not spill, but has {row.spill_stores} STL and {row.spill_loads} LDL")
    if row.shared > chip.shared_per_block:
        row.problems.append(
            f"{row.shared} B of shared memory, the chip has {chip.shared_per_block} B per block"
        )
    expected = expected_tensor(spec)
    if expected and not any(row.tensor.get(name) for name in expected):
        used = ", ".join(row.tensor) or "no tensor core"
        row.problems.append(f"expected {' or '.join(expected)}, found {used}")
    row.problems += [f"hazard: {hazard}" for hazard in row.hazards]
    return row


def kernel_text(spec: Shipped) -> dict[str, str]:
    """The sources of a kernel and of all that it calls, and the values of the constants they read, by name.

    Launchers, comments between functions and other kernels of the module are no part of it.
    """
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    found: dict[str, str] = {}
    todo = [getattr(importlib.import_module(spec.module), spec.kernel)]
    while todo:
        function = todo.pop()
        name = f"{function.module}.{function.fn.__name__}"
        if name in found:
            continue
        found[name] = function.src
        for word in sorted(set(re.findall(r"\w+", function.src))):
            value = function.fn.__globals__.get(word)
            if isinstance(value, JITFunction):
                todo.append(value)
            elif isinstance(value, tl.constexpr):
                found[f"{function.module}.{word}"] = repr(value.value)
    return found


def fingerprint(spec: Shipped) -> str:
    """Changes with the kernel, what is asked of it, Triton, and how a cubin is read."""
    import triton

    tools = [Path(module.__file__).read_text() for module in (facts, sass)]
    asked = {k: v for k, v in sorted(vars(spec).items()) if k not in ("name", "spills_in")}
    parts = [*map(str, sorted(kernel_text(spec).items())), repr(asked), triton.__version__, *tools]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def measure_keyed(task: tuple[str, Shipped]) -> Facts:
    """`facts.measure`, if this process has the source that the key was made from; else RuntimeError."""
    key, spec = task
    if fingerprint(spec) != key:
        raise RuntimeError("a kernel's source changed during the run; start it again")
    return facts.measure(spec)


def _load_cache() -> dict[str, Facts]:
    try:
        return {key: Facts(**found) for key, found in json.loads(CACHE.read_text()).items()}
    except (OSError, ValueError, TypeError):
        return {}


def _save_cache(cache: dict[str, Facts]) -> None:
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    # A failure to compile may be this machine's; it is tried again.
    kept = {key: asdict(found) for key, found in cache.items() if not found.error}
    write_atomically(CACHE, json.dumps(kept))


def quick(specs: list[Shipped]) -> list[Shipped]:
    """One configuration per kernel and capability: the one with the widest state, on sm_90 the narrowest too.

    The widest is where registers run out.
    """
    groups: dict[tuple[str, int], list[Shipped]] = {}
    for spec in specs:
        groups.setdefault((spec.kernel, spec.capability), []).append(spec)
    chosen = []
    for (_, capability), group in groups.items():
        ordered = sorted(group, key=lambda s: (s.constexprs.get("BLOCK_R", 0), s.name))
        chosen += [ordered[-1]] if capability != 90 or len(ordered) == 1 else [ordered[0], ordered[-1]]
    return chosen


def run(specs: list[Shipped], jobs: int | None = None, use_cache: bool = True, report=None) -> list[Row]:
    """A row per configuration, in order; `report(row)` is called as each is known.

    `jobs` processes compile (default: one per core) what the cache does not hold.
    """
    import triton

    # Two names can ask for the same kernel.
    names: dict[str, list[Shipped]] = {}
    for spec in specs:
        names.setdefault(fingerprint(spec), []).append(spec)
    known = _load_cache() if use_cache else {}
    rows: dict[tuple[str, int], Row] = {}

    def add(key: str) -> None:
        for spec in names[key]:
            row = rows[spec.name, spec.capability] = judge(spec, known[key], triton.__version__)
            if report:
                report(row)

    for key in names:
        if key in known:
            add(key)
    todo = [(key, same[0]) for key, same in names.items() if key not in known]
    jobs = min(jobs or os.cpu_count() or 1, len(todo))
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) if jobs > 1 else None
    try:
        found = (pool.map if pool else map)(measure_keyed, todo)
        for n, ((key, _), one) in enumerate(zip(todo, found, strict=True), 1):
            known[key] = one
            add(key)
            if use_cache and (n % SAVE_EVERY == 0 or n == len(todo)):
                _save_cache({**_load_cache(), **known})
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return [rows[spec.name, spec.capability] for spec in specs]


def describe(row: Row) -> str:
    """One line of the printed table."""
    tensor = " ".join(f"{name} {count}" for name, count in row.tensor.items()) or "-"
    ok = "ok" if not row.problems else "FAIL"
    mark = " (spills with this release)" if row.may_spill else ""
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
    cells = [[name, *(_cell(found.get((name, target))) for target in targets)] for name in names]
    versions = ", ".join(sorted({row.triton for row in rows}))
    told = f"Compiled ahead of time with Triton {versions}; nothing in this table was timed."
    return "\n".join([*table(head, cells, left=range(len(head))), "", told])


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row.error:
        return "does not compile"
    spilled, tensor = row.spill_stores + row.spill_loads, " ".join(row.tensor) or "no tensor core"
    return f"{row.registers} / {spilled} / {row.shared / 1024:.0f} / {row.blocks_per_sm}, {tensor}"


def markers(release: str) -> tuple[str, str]:
    """The lines between which a page keeps the table of a release, such as "3.6"."""
    return f"<!-- aot-table {release}:start -->", f"<!-- aot-table {release}:end -->"


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
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument("--no-cache", action="store_true", help="compile again what is known")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--markdown", type=Path, help="update this release's table in this file")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the kernels by interpreted ones; unset it")
    begin = time.perf_counter()
    specs = [s for s in shipped() if s.capability in (options.arch or CHIPS) and options.only in s.name]
    if options.quick:
        specs = quick(specs)
    if not specs:
        parser.error("no configuration matches; see bench/shipped.py")
    print(
        f"{'target':<7}{'configuration':<44}{'regs':>5}{'stack':>7}{'STL/LDL':>9}{'smem KB':>9}{'CTAs':>6}"
        f"  {'tensor cores':<14}{'time':>7}"
    )
    rows = run(specs, options.jobs, not options.no_cache, lambda row: print(describe(row), flush=True))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown:
        write_between(options.markdown, markers(release_of(rows[0].triton)), markdown(rows))
    failed = [row for row in rows if row.problems]
    for row in failed:
        for problem in row.problems:
            print(f"FAIL sm_{row.capability} {row.name}: {problem}", file=sys.stderr)
    seconds = time.perf_counter() - begin
    print(f"{len(rows)} configurations, {len(failed)} failed, {seconds:.0f} s, Triton {rows[0].triton}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
