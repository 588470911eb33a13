"""The GPU in one press: all there is to know, in the order of its value, within the minutes given.

    python3 bench/gpu/run.py [STAGE ...] [--out DIR] [--minutes N] [--list]

Stages, in this order whatever is asked for: warm (compile on all cores), first (is it right, how fast are the
kernels, what does a ViT-B cost, what do sparse forms cost), tests (those of the kernels, then the sanitizer),
rest (all other shapes, contenders and methods), accuracy (experiments from a pack, bench/gpu/pack.py). Every
step is a process of its own with a time limit: what it wrote stays, whatever ends it, and the next begins. A
step that a CUDA error ended is started again and goes on behind the contender that it died of. Rows known
from --out or from bench/results, of the same device, versions and code, are not taken again; failed ones are.

Exit status 1 where something is wrong; a step that ran out of time or was left out is not. `--dry-run`
rehearses all of it on a CPU with tiny shapes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import rows as stage

ROOT = stage.ROOT
STAGES = ("warm", "first", "tests", "rest", "accuracy")
GRID = ROOT / "bench" / "accuracy" / "gpu.yaml"
PACK = ROOT / "build" / "gpu-pack"
# Rows of the methods and of the experiments.
ROW_FILES = (Path("methods-gpu", "rows.jsonl"), Path("accuracy", "gpu", "rows.jsonl"))
# A step that is interrupted has so long to write what it knows.
GRACE_SECONDS = 8
# With less than this left no step begins.
LEAST_SECONDS = 10
# How often a step is started again after it has lost the device.
RESTARTS = 6
# The exit status of `lion-fast experiment` whose minutes are over before its grid is.
OUT_OF_TIME = 3


@dataclass(frozen=True)
class Step:
    """One process: the words behind `python3`, and the minutes that it may take at most.

    gates: whether its failure makes the run red; a sanitizer's report does not. beside: a step that runs at
    the same time. missing: why it cannot run here. prefix: what runs python. told: it takes `--minutes`.
    """

    stage: str
    name: str
    words: tuple[str, ...]
    minutes: float
    gates: bool = True
    beside: "Step | None" = None
    missing: str | None = None
    prefix: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    told: bool = True


def steps(options: argparse.Namespace) -> list[Step]:
    """All steps in their order. A dry run has the same ones, with tiny shapes on a CPU."""
    out, device, dry = options.out, options.device, options.dry_run
    own = ("--out", str(out), "--device", device, *(("--dry-run",) if dry else ()))
    own += ("--new-rows", str(options.new_rows)) if options.new_rows is not None else ()

    def script(name: str, *words: str) -> tuple[str, ...]:
        return (f"bench/gpu/{name}.py", *own, *words)

    def bench(plan: str, *dry_methods: str) -> tuple[str, ...]:
        words = ("--plan", plan)
        if dry:
            words = ("--backbones", "vit_tiny_patch16_224", "--img-size", "32", "--batch-sizes", "2")
            words += ("--rounds", "1", "--methods", *dry_methods)
        where = ("--device", device, "--out", str((out / ROW_FILES[0]).parent))
        return ("-m", "lion_fast", "bench", *words, "--rows-only", "--progress", *where)

    def sanitizer(tool: str) -> Step:
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
        missing = None if dry or shutil.which(command[0]) else f"{command[0]} is not installed"
        # Freed blocks of torch's allocator would hide a read past the end.
        alone = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
        words = script("check", "--small")
        return Step("tests", tool, words, 1.5, False, None, missing, () if dry else command, alone)

    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", f"-n{2 if dry else 12}", "--dist=worksteal")
    pytest += ("--collect-only",) if dry else ("-m", "gpu")
    tests = ("tests/kernels", "tests/studies", "tests/backbones")
    pack = (("LION_FAST_CACHE", str(options.pack)), ("LION_FAST_OFFLINE", "1"))
    experiment = ("-m", "lion_fast", "experiment", str(options.grid), "--rows-only")
    experiment += ("--workers", "1" if dry else "8", "--out", str((out / ROW_FILES[1]).parent))
    no_pack = f"{options.pack} is not there: make it with bench/gpu/pack.py and let it travel"
    no_pack = None if options.pack.exists() else no_pack
    contenders = Step("warm", "compile contenders", script("dense", "--compile-only"), 1.5, gates=False)
    return [
        Step("warm", "compile kernels", script("warm"), 1.5, beside=contenders),
        Step("first", "check", script("check"), 1),
        Step("first", "dense kernels", script("dense"), 2.25),
        Step("first", "methods on a ViT-B", bench("first", "lion", "probe"), 2.75),
        Step("first", "sparse kernels", script("sparse"), 1.5),
        Step("tests", "tests", (*pytest, *tests), 4, told=False),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        Step("rest", "check the rest", script("check", "--rest"), 1.5),
        Step("rest", "all dense kernels", script("dense", "--rest"), 3),
        Step("rest", "all methods", bench("full", "vpt"), 5),
        Step("rest", "all sparse kernels", script("sparse", "--rest"), 3),
        Step("accuracy", "accuracy", experiment, 7, missing=no_pack, variables=pack),
    ]


class Log:
    """What all steps print, on the terminal and in a file that comes back."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")
        self.lock = threading.Lock()

    def write(self, line: str) -> None:
        with self.lock:
            print(line, flush=True)
            self.file.write(line + "\n")
            self.file.flush()


class Running:
    """A step's process, in a group of its own so that nothing that it started outlives it."""

    def __init__(self, step: Step, seconds: float, log: Log):
        self.begin = time.monotonic()
        self.seconds = seconds
        words = [*step.prefix, sys.executable, *step.words]
        if step.told:
            words += ["--minutes", f"{max(0.0, seconds - GRACE_SECONDS) / 60:.3f}"]
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, **dict(step.variables), "PYTHONUNBUFFERED": "1"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        self.process = subprocess.Popen(words, cwd=ROOT, env=variables, start_new_session=True, **output)
        self.reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self.reader.start()

    def _read(self, log: Log) -> None:
        for line in self.process.stdout:
            log.write(line.rstrip("\n"))

    def wait(self) -> int | None:
        """The exit status, or None where its time was up."""
        try:
            self.process.wait(max(0.0, self.begin + self.seconds - time.monotonic()))
            return self.process.returncode
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.stop()

    def stop(self) -> None:
        """End what is left of the group: first politely, so that it can write what it knows."""
        for signal_, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
            try:
                os.killpg(self.process.pid, signal_)
            except ProcessLookupError:
                break
            try:
                self.process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
        self.reader.join(GRACE_SECONDS)


def run_step(step: Step, seconds: float, log: Log) -> tuple[str, int | None]:
    """Run a step and the one beside it: its state ("ok", "red", "out of time") and exit status.

    Where the device was lost to the process, another goes on behind what it was lost by.
    """
    end = time.monotonic() + seconds
    beside = Running(step.beside, seconds, log) if step.beside else None
    try:
        for _ in range(RESTARTS):
            status = Running(step, end - time.monotonic(), log).wait()
            # A process that a signal ended may have been taken down by its device too.
            lost = status is not None and (status == stage.LOST_DEVICE or status < 0)
            if not lost or end - time.monotonic() < LEAST_SECONDS:
                break
            log.write(f"-- {step.name}: ended with {status}, its device lost to it; once more")
        if beside is not None and beside.wait() is None:
            log.write(f"-- {step.beside.name}: out of time")
    finally:
        if beside is not None:
            beside.stop()
    return ("out of time" if status in (None, OUT_OF_TIME) else "ok" if status == 0 else "red"), status


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)} (default: all)")
    parser.add_argument("--out", type=Path, default=stage.RESULTS, help="folder (default bench/results)")
    parser.add_argument("--minutes", type=float, default=25, help="of all stages together (default 25)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--grid", type=Path, default=GRID, help="of the accuracy stage")
    parser.add_argument("--pack", type=Path, default=PACK, help="weights and images of the accuracy stage")
    parser.add_argument("--list", action="store_true", help="say what would run, and stop")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; nothing goes to bench/results")
    parser.add_argument("--new-rows", type=int, help="of a dry run: every step stops after so many rows")
    options = parser.parse_args(argv)
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    options.out = options.out.resolve()
    todo = [s for s in steps(options) if not options.stages or s.stage in options.stages]
    if options.list:
        for step in todo:
            print(f"{step.stage:<10}{step.name:<26}at most {step.minutes:g} min  {step.missing or ''}")
        return 0
    stage.refuse_no_result(parser, options)
    if options.device == "cuda" and not (shutil.which("nvidia-smi") or Path("/dev/nvidiactl").exists()):
        parser.error("this machine has no CUDA device; `--dry-run --device cpu` tries the program")
    # A shell's background job ignores Ctrl-C, and so would every step, which could then only be killed.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.dry_run:
        bring_earlier_rows(stage.RESULTS, options.out)
    if (found := stage.revision()).startswith(stage.DIGEST):
        os.environ["LION_FAST_REVISION"] = found  # for the steps that would know none
    os.environ.setdefault("LION_FAST_RUN", time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()))
    return run_all(todo, options.out, 60 * options.minutes)


def bring_earlier_rows(results: Path, out: Path) -> None:
    """Copy the committed rows of the steps that know one folder only; the kernels' are found anyway."""
    for name in ROW_FILES:
        if (results / name).exists() and not (out / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(results / name, out / name)


def run_all(todo: list[Step], out: Path, seconds: float) -> int:
    """Run the steps within the seconds; the exit status. What became of each is in steps.jsonl."""
    log, begin, told = Log(out / "log.txt"), time.monotonic(), []
    try:
        for step in todo:
            left = begin + seconds - time.monotonic()
            state, status, since = "left out", None, time.monotonic()
            if step.missing:
                state = f"left out: {step.missing}"
            elif left >= LEAST_SECONDS:
                limit = min(60 * step.minutes, left)
                log.write(f"-- {step.stage}: {step.name}, at most {limit:.0f} s")
                state, status = run_step(step, limit, log)
            row = {"stage": step.stage, "step": step.name, "state": state, "status": status}
            row |= {"seconds": round(time.monotonic() - since, 1), "gates": step.gates}
            row |= {"run": os.environ.get("LION_FAST_RUN")}
            told.append(row)
            with (out / "steps.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    finally:
        log.write(f"-- {(time.monotonic() - begin) / 60:.1f} min in all")
        for row in told:
            log.write(f"   {row['stage']:<10}{row['step']:<26}{row['seconds']:>7.0f} s  {row['state']}")
    return 1 if any(row["state"] == "red" and row["gates"] for row in told) else 0


if __name__ == "__main__":
    sys.exit(main())
