"""The command line: `lion-fast COMMAND`, a module of this package each.

A command's module has a docstring, whose first line and examples are its help, `add_arguments(parser)` and
`run(args)`, which prints for people unless `args.json`, and returns a mapping for JSON; and, where a result
can be other than good, `exit_code(result)`.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

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
from lion_fast.errors import LionError, OptionError

COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (finetune, evaluate, predict, prune, info, demo, vtab, bench, profile, experiment)
}
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done. 1: the input cannot be used, with one line on stderr. 2: a wrong option or command line.
    130: interrupted. Others are a command's own.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return EXIT_USAGE
    command = COMMANDS[args.command]
    try:
        result = command.run(args)
    except (LionError, KeyboardInterrupt) as error:
        if args.debug:
            raise
        return _tell(args.command, error)
    except BrokenPipeError:  # the reader of stdout has gone: `lion-fast ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    if args.json and os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=1))
    return command.exit_code(result) if hasattr(command, "exit_code") else EXIT_OK


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
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


def _tell(command: str, error: BaseException) -> int:
    """Say what ended a command; its exit code."""
    if isinstance(error, LionError):
        print(f"lion-fast {command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE if isinstance(error, OptionError) else EXIT_FAILED
    print(f"\nlion-fast {command}: {str(error) or 'interrupted'}", file=sys.stderr)
    if hasattr(error, "hint"):
        print(error.hint, file=sys.stderr)
    return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
