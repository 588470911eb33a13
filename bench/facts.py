"""What Triton makes of one kernel configuration, as facts: nothing here says what is right.

The text of this file and of `sass.py` is part of the key under which `aot.py` keeps facts.
"""

import functools
import importlib
import os
import re
import subprocess
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import sass
from shipped import Shipped


@dataclass
class Facts:
    """Of a compiled kernel: registers a thread, stack and shared memory in bytes, columns of tensor memory,
    and instructions by their names; or the `error` for which there is none.
    """

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    tensor_columns: int = 0
    tensor: dict[str, int] = field(default_factory=dict)
    register_a: int = 0
    instructions: int = 0
    hazards: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None


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


def compile_spec(spec: Shipped):
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


def measure(spec: Shipped) -> Facts:
    """Compiles one configuration and reads registers, memory and instructions from its cubin."""
    begin = time.perf_counter()
    try:
        compiled = compile_spec(spec)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        return Facts(error=text.splitlines()[-1][:200])
    usage, text = disassemble(compiled)
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.rsplit("Function", 1)[-1]))
    code = sass.parse(text)
    stores, loads = sass.spills(code)
    return Facts(
        registers=int(numbers["REG"]),
        stack=int(numbers["STACK"]),
        spill_stores=stores,
        spill_loads=loads,
        shared=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        tensor=dict(sass.tensor_instructions(code)),
        register_a=sum(bool(sass.register_a(i)) for i in code),
        instructions=len(code),
        hazards=[str(hazard) for hazard in sass.hazards(text)] if spec.capability == 90 else [],
        seconds=round(time.perf_counter() - begin, 2),
    )
