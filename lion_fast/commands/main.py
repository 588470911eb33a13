"""The command line: `lion-fast COMMAND`, a module of this package each.

A command's module has a docstring, whose first line and examples are its help, `add_arguments(parser)` and
`run(args)`, which prints for people unless `args.json`, and returns a mapping for JSON; and, where a result
can be other than good, `exit_code(result)`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from difflib import get_close_matches
from typing import Any, NoReturn

from lion_fast import __version__
from lion_fast.commands import (
    bench,
    demo,
    evaluate,
    experiment,
    finetune,
    info,
    predict,
    profile,
    prune,
    vtab,
)
from lion_fast.commands.common import flushed, is_gone, is_main_process, plain, prepare_streams, silence
from lion_fast.errors import LionError, OptionError, check_text, one_line, refuse_unknown, shown

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (finetune, evaluate, predict, prune, info, demo, vtab, bench, profile, experiment)
}
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED = 0, 1, 2, 70, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 1: the input cannot be used, with one line on stderr. 2: a wrong option or command line.
    70: a fault of lion-fast itself. 130: interrupted. Others are a command's own.
    """
    prepare_streams()
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        with flushed():
            return _run(argv)
    except (Exception, KeyboardInterrupt) as error:
        gone = isinstance(error, BrokenPipeError) and is_gone(sys.stdout)  # `lion-fast ... | head`
        silence(sys.stdout)
        if gone:
            return EXIT_OK
        if "--debug" in argv:
            raise
        return _tell(" ".join(["lion-fast", *argv[:1]]), error)


def _run(argv: list[str]) -> int:
    parser = build_parser()
    try:
        for text in argv:
            check_text("an argument", text)
            if text.startswith("-") and text.endswith("=--"):  # which argparse takes for no value at all
                raise OptionError(f"{text[:-3]} needs a value, and -- is none")
        refuse_unknown((text for text in argv[:1] if not text.startswith("-")), COMMANDS, "command")
    except OptionError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return EXIT_USAGE
    command = COMMANDS[args.command]
    # what libraries print is no JSON
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        result = command.run(args)
    if args.json and is_main_process():
        print(json.dumps(plain(result), indent=1, allow_nan=False))
    return command.exit_code(result) if hasattr(command, "exit_code") else EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="lion-fast",
        description="Tune a frozen vision backbone with equilibrium layers (LION), and compare.",
    )
    parser.add_argument("--version", action="version", version=f"lion-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary, _, examples = (module.__doc__ or "").strip().partition("\n\n")
        command = commands.add_parser(
            name,
            help=summary[:1].lower() + summary[1:].rstrip("."),
            description=summary,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(command)
    return parser


class _Parser(argparse.ArgumentParser):
    """Takes whole names only, and tells what is wrong in one line."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **how)

    def parse_known_args(self, *args: Any, **how: Any) -> tuple[argparse.Namespace, list[str]]:
        found, unknown = super().parse_known_args(*args, **how)
        for text in unknown:
            name, names = text.split("=")[0], list(self._option_string_actions)
            near = get_close_matches(name, names, 1) or [n for n in names if n.startswith(name)]
            hint = f"; did you mean {near[0]}?" if near and name.startswith("-") else ""
            self.error(f"unknown argument {shown(text)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {one_line(message)} (see {self.prog} --help)\n")


def _tell(who: str, error: BaseException) -> int:
    """Say what ended a command; its exit code."""
    if isinstance(error, KeyboardInterrupt):
        said, code = f"\n{who}: {str(error) or 'interrupted'}", EXIT_INTERRUPTED
        said += f"\n{error.hint}" if hasattr(error, "hint") else ""
    else:
        what, code = _reason(error)
        said = f"{who}: error: {one_line(what)}"
    try:
        print(said, file=sys.stderr, flush=True)
    except OSError:  # nobody listens
        silence(sys.stderr)
    return code


def _reason(error: Exception) -> tuple[str, int]:
    """What is wrong and what to do, and the exit code."""
    if isinstance(error, LionError):
        return str(error), EXIT_USAGE if isinstance(error, OptionError) else EXIT_FAILED
    # torch has no class for a CPU without memory
    if isinstance(error, MemoryError) or "out of memory" in (text := str(error)) or "allocate memory" in text:
        return f"out of memory; take smaller batches, images or models ({error})", EXIT_FAILED
    if isinstance(error, OSError):
        place = f": {error.filename}; give another path, or mend that one" if error.filename else ""
        return f"{error.strerror or error}{place}", EXIT_FAILED
    return (
        f"this is a fault of lion-fast, {type(error).__name__}: {one_line(error, 300)}; run it again with "
        "--debug and report what it shows"
    ), EXIT_BUG


if __name__ == "__main__":
    sys.exit(main())
