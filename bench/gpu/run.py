"""One button for a GPU: checks correctness, then measures, then leaves rows to commit.

    PYTHONPATH=.:kernels python3 bench/gpu/run.py --out bench/results [--minutes 24] [--sanitizer] [--ncu]

Order: tests/gpu and a check of its own; when either is red, nothing is timed and the exit status is 1.
Then the device's copy bandwidth and matrix rates, then times, the most important shapes first, and in the
last third of the minutes the sparse forms beside the dense one (bench/gpu/sparse.py). Each row
is appended to a JSON-lines file as soon as it is known, so an interrupted run keeps what it has, and a
second run of the same revision on the same device goes on where the first stopped. `bench/gpu/table.py`
writes the committed rows into docs/kernels.md.

`--dry-run --device cpu` runs all of this program on tiny shapes; its rows never go to bench/results.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "kernels", Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import contenders  # noqa: E402, I001
import measure  # noqa: E402
import problems  # noqa: E402
import sparse  # noqa: E402
import torch  # noqa: E402
from lion_kernels import ops, reference  # noqa: E402

RESULTS = ROOT / "bench" / "results"
# Errors of out - x and of dx, relative to their norms, that no contender in half precision may exceed.
OUT_ERROR, DX_ERROR = 3e-2, 6e-2
TEST_SECONDS = 420
# The part of the minutes that is kept for the sparse stage.
SPARSE_SHARE = 1 / 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def git_revision() -> str:
    """The commit, with a mark where tracked files differ from it.

    A copy without its history says it by LION_FAST_REVISION; otherwise it is 'unknown'.
    """
    if named := os.environ.get("LION_FAST_REVISION"):
        return named

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    revision = git("rev-parse", "--short=12", "HEAD") if shutil.which("git") else ""
    if not revision:
        return "unknown"
    return revision + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def environment(device: str, dtype: str) -> dict[str, object]:
    """What every row says about where it was measured."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": dtype,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "revision": git_revision(),
    }


class Rows:
    """A JSON-lines file that rows are appended to; what it holds already is not measured again."""

    def __init__(self, folder: Path, common: dict[str, object]):
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", str(common["device"]).lower()).strip("-")
        self.path = folder / f"gpu-{slug}-{common['dtype']}-{common['revision']}.jsonl"
        self.common = common
        self.rows: list[dict] = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                # An interrupted run can leave half a line at the end.
                try:
                    self.rows.append(json.loads(line))
                except ValueError:
                    continue
            self.path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict) -> None:
        row = {**row, **self.common, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def first(self, **wanted) -> dict | None:
        """The first row with these values."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in wanted.items())), None)


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """|got - exact| / |exact|; infinite where got is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    exact = exact.double()
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def quick_check(device: str, dtype: torch.dtype) -> list[str]:
    """Forward and backward of the operators against float64, for shapes with ragged tiles; what is wrong."""
    backend = "triton" if device == "cuda" else "torch"
    wrong = []
    for width, state in ((768, 64), (100, 24), (384, 128), (768, 16), (256, 256), (192, 512)):
        shape = problems.Shape(1, width, state, "hard", tokens=131)
        x = torch.randn(shape.rows, width, device=device).to(dtype)
        upstream = torch.randn_like(x)
        if dtype == torch.float32 and state == 256 and device == "cuda":
            backend = "auto"
        A, W, b, V, c = problems.weights(shape, device)[0]
        for activation in ("relu", "gelu", "tanh"):
            options = (activation, 30, problems.TOL, 1.0, True)
            out, p, _, _ = ops.solve(x, A, W, b, V, c, *options, True, backend)
            exact = reference.solve(*(t.double() for t in (x, A, W, b, V, c)), *options)
            given = (activation, 8, 0.0, 1.0, True)
            got = ops.adjoint(upstream, x, p, A, W, V, *given, backend)
            right = reference.adjoint(*(t.double() for t in (upstream, x, exact[1], A, W, V)), *given)
            name = f"D={width} R={state} {activation}"
            error = relative(out.double() - x.double(), exact[0] - x.double())
            if not error <= OUT_ERROR:
                wrong.append(f"{name}: out is off by {error:.1e}")
            for label, ours, target in zip(("dx", "dA", "dW", "db", "dV", "dc"), got, right, strict=False):
                if not relative(ours, target) <= DX_ERROR:
                    wrong.append(f"{name}: {label} is off by {relative(ours, target):.1e}")
    return wrong


def run_tests() -> str | None:
    """What is wrong with tests/gpu, or None; a run over its time limit counts as wrong."""
    tests = ROOT / "tests" / "gpu"
    if not any(tests.glob("test_*.py")):
        return f"{tests} holds no tests"
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    try:
        result = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=TEST_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"tests/gpu took more than {TEST_SECONDS} s"
    return None if result.returncode == 0 else f"pytest tests/gpu returned {result.returncode}"


def correct(device: str, dtype: torch.dtype, dry: bool) -> bool:
    """Stage 1; says what is wrong."""
    wrong = quick_check(device, dtype)
    for line in wrong:
        print(f"WRONG {line}", file=sys.stderr)
    if not wrong and not dry and (reason := run_tests()):
        wrong = [reason]
        print(f"WRONG {reason}", file=sys.stderr)
    print(f"correctness: {'red, nothing is timed' if wrong else 'green'}", flush=True)
    return not wrong


def accelerator_tools(sanitizer: bool, ncu: bool) -> bool:
    """compute-sanitizer's memcheck and racecheck over the quick check, and ncu over one solve, where asked.

    False where a sanitizer found something. A tool that is not there, or that this machine refuses, is
    said and not counted.
    """
    this = [sys.executable, str(Path(__file__).resolve()), "--check-only"]
    clean = True
    if sanitizer:
        for tool in ("memcheck", "racecheck"):
            if not shutil.which("compute-sanitizer"):
                print("compute-sanitizer is not installed")
                break
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *this]
            result = subprocess.run(command, capture_output=True, text=True)
            print(f"compute-sanitizer {tool}: exit status {result.returncode}\n{result.stdout[-1500:]}")
            clean &= result.returncode != 9
    if ncu and not shutil.which("ncu"):
        print("ncu is not installed")
    elif ncu:
        sections = ["--section", "SpeedOfLight", "--section", "Occupancy", "--clock-control", "none"]
        command = ["ncu", *sections, "--kernel-name", "regex:_solve_fwd_kernel", "--launch-count", "2", *this]
        result = subprocess.run(command, capture_output=True, text=True)
        print(f"ncu: exit status {result.returncode}\n{result.stdout[-6000:]}")
    return clean


def errors(
    subject: measure.Subject, problem: problems.Problem, recurrence: str
) -> tuple[float, float | None]:
    """The relative errors of out - x and, but for the mode forward, of dx, against float64."""
    exact_weights = [t.double() for t in (problem.free if recurrence == "free" else problem.tied)]
    x = problem.x[0].double()
    options = (problems.ACTIVATION, problems.MAX_ITER, problems.TOL, 1.0, True)
    out, p, _, _ = reference.solve(x, *exact_weights, *options)
    error_out = relative(subject.output().double() - x, out - x)
    if subject.mode == "forward":
        return error_out, None
    A, W, _, V, _ = exact_weights
    g = problem.upstream[0].double()
    given = (problems.ACTIVATION, problems.NEUMANN_TERMS, 0.0, 1.0, True)
    return error_out, relative(subject.gradients()[0], reference.adjoint(g, x, p, A, W, V, *given)[0])


def prepare(
    contender: contenders.Contender, problem: problems.Problem, mode: str, device: str
) -> tuple[measure.Subject | None, dict]:
    """The subject, if it can run and is right, and what its row says besides the times."""
    try:
        if (contender.graph or contender.compiled == "reduce-overhead") and device != "cuda":
            raise contenders.NotInstalled("needs CUDA graphs")
        if contender.graph and mode == "backward":
            raise contenders.NotInstalled("a captured backward is part of 'both'")
        ready = contender.make(problem)
        subject = measure.Subject(ready, problem, mode, contender.compiled, contender.graph, device)
        error_out, error_dx = errors(subject, problem, contender.recurrence)
    except contenders.NotInstalled as reason:
        return None, {"skipped": str(reason)}
    except Exception as error:
        return None, {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    told = {"error_out": error_out, "error_dx": error_dx}
    # torchdeq stops its backward by its own rule, so its dx is reported and not judged.
    judged = error_dx is not None and not contender.name.startswith("torchdeq")
    if not error_out <= OUT_ERROR or (judged and not error_dx <= DX_ERROR):
        return None, {**told, "failed": "wrong result, not timed"}
    return subject, {
        **told,
        "peak_bytes": subject.peak_bytes(),
        "saved_bytes": subject.saved_bytes(),
    }


def row_of(contender, problem, mode, dtype, roof) -> dict:
    """The part of a row that is known before measuring."""
    shape = problem.shape
    applications = problem.applications[contender.recurrence]
    size, operations = problems.counts(shape, dtype, problem.applications["free"])[mode]
    return {
        "kind": "time",
        "contender": contender.name,
        "note": contender.note,
        "mode": mode,
        "batch": shape.batch,
        "tokens": shape.tokens,
        "width": shape.width,
        "state": shape.state,
        "problem": shape.problem,
        "recurrence": contender.recurrence,
        "applications": applications,
        "bytes": size,
        "operations": operations,
        "copy_rate": roof["copy"],
        "matrix_rate": roof["tf32" if dtype == torch.float32 else "bf16"],
    }


def measure_shape(shape, dtype, device, chosen, rows: Rows, roof, seconds: float, modes) -> None:
    """All chosen contenders of one shape, mode by mode; rows that exist are left alone."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1 << 16
    problem = None
    for mode in modes:
        known = {"kind": "time", "mode": mode, "problem": shape.problem, "tokens": shape.tokens}
        known |= {"batch": shape.batch, "width": shape.width, "state": shape.state}
        todo = [c for c in chosen if rows.first(contender=c.name, **known) is None]
        # A lone contender would be measured beside nothing: the rest of its shape was there before it.
        if not todo:
            continue
        problem = problem or problems.build(shape, dtype, device, cache)
        subjects, bases = [], []
        for contender in todo:
            base = row_of(contender, problem, mode, dtype, roof)
            subject, told = prepare(contender, problem, mode, device)
            if subject is None:
                rows.add({**base, **told})
            else:
                subjects.append(subject)
                bases.append({**base, **told})
        rounds = 3 if rows.common.get("dry_run") else 11
        measured = measure.interleaved(subjects, seconds, rounds)
        for base, samples in zip(bases, measured, strict=True):
            found = measure.quantiles(samples)
            time_floor = found["us"] / 1e6
            found["copy_percent"] = 100 * base["bytes"] / time_floor / base["copy_rate"]
            found["matrix_percent"] = 100 * base["operations"] / time_floor / base["matrix_rate"]
            rows.add({**base, **found})
        _report(rows, known)
        del subjects
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _report(rows: Rows, known: dict) -> None:
    shape = f"B={known['batch']} D={known['width']} R={known['state']} {known['problem']}"
    print(f"{shape} {known['mode']}, device {rows.common['device']}")
    for row in rows.rows:
        if all(row.get(k) == v for k, v in known.items()):
            if "us" in row:
                text = f"{row['us']:10.1f} us [{row['us_20']:.1f}, {row['us_80']:.1f}]"
                text += f" {row['copy_percent']:5.1f} % of copy"
            else:
                text = row.get("skipped") or row.get("failed")
            print(f"  {row['contender']:<38}{text}", flush=True)


def passes(dry: bool) -> Iterator[tuple[problems.Shape, list[contenders.Contender], float]]:
    """(shape, contenders, share of the time in which a shape may still start), the important first."""
    eager = [c for c in contenders.ALL if not c.compiled]
    # Ours again beside the compiled ones, which shows how far the device has drifted since.
    again = dataclasses.replace(eager[0], name=f"{eager[0].name}, again")
    compiled = [again, *(c for c in contenders.ALL if c.compiled)]
    if dry:
        yield problems.Shape(2, 16, 8, "hard", tokens=5), eager, 1.0
        yield problems.Shape(1, 16, 8, "easy", tokens=7), compiled[:2], 1.0
        return
    everything = problems.shapes()
    for shape in everything[:8]:
        yield shape, eager, 0.5
    for shape in filter(problems.is_central, everything):
        yield shape, compiled, 0.75
    for shape in everything[8:]:
        yield shape, eager, 1.0


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the rows (default bench/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--minutes", type=float, default=24, help="time limit of the whole run (default 24)")
    parser.add_argument(
        "--sparse-share", type=float, default=SPARSE_SHARE, help="part of the minutes kept for sparse forms"
    )
    parser.add_argument("--seconds", type=float, default=0.12, help="per contender, mode and shape")
    parser.add_argument("--check-only", action="store_true", help="only the built-in check of results")
    parser.add_argument("--sanitizer", action="store_true", help="also run compute-sanitizer")
    parser.add_argument("--ncu", action="store_true", help="also profile the solve kernel with ncu")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; nothing goes to bench/results")
    options = parser.parse_args(argv)
    begin = time.monotonic()
    device, dtype = options.device, DTYPES[options.dtype]
    if not 0 <= options.sparse_share <= 1:
        parser.error(f"--sparse-share must be in [0, 1]; got {options.sparse_share}")
    if device == "cpu" and not (options.dry_run or options.check_only):
        parser.error("a CPU's times are no results; use --dry-run")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine's torch sees no CUDA device; `--dry-run --device cpu` tries the program")
    out = options.out or (Path(tempfile.mkdtemp(prefix="lion-fast-")) if options.dry_run else RESULTS)
    if options.dry_run and RESULTS in (out.resolve(), *out.resolve().parents):
        parser.error("a dry run does not write to bench/results; give another --out, or none")
    torch.manual_seed(0)
    if options.check_only:
        return 0 if correct(device, dtype, dry=True) else 1

    common = environment(device, options.dtype)
    if options.dry_run:
        common["dry_run"] = True
    print(json.dumps(common))
    if not correct(device, dtype, options.dry_run):
        return 1
    if not accelerator_tools(options.sanitizer, options.ncu):
        return 1
    rows = Rows(out, common)
    ceiling = rows.first(kind="ceilings")
    if ceiling is None:
        rows.add({"kind": "ceilings", **measure.ceilings(device, small=options.dry_run)})
        ceiling = rows.first(kind="ceilings")
    print({name: f"{ceiling[name]:.3g}" for name in ("copy", "bf16", "tf32")}, f"device {common['device']}")
    left, dense_minutes = 0, (1 - options.sparse_share) * options.minutes
    for shape, chosen, share in passes(options.dry_run):
        if time.monotonic() - begin > share * dense_minutes * 60:
            left += 1
            continue
        modes = measure.MODES
        if any(c.compiled for c in chosen):
            torch._dynamo.reset()
            # A host's compiler takes many seconds for each.
            modes = modes[:1] if options.dry_run else modes
        measure_shape(shape, dtype, device, chosen, rows, ceiling, options.seconds, modes)
    end = begin + 60 * options.minutes
    cases_left = sparse.stage(dtype, device, rows, options.seconds, end, options.dry_run, prepare)
    minutes = (time.monotonic() - begin) / 60
    print(f"{len(rows.rows)} rows in {rows.path} after {minutes:.1f} min; {left} shapes left out for time")
    print(f"{cases_left} sparse cases left out for time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
