"""The command `latephase`."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import __version__


class _Parser(argparse.ArgumentParser):
    """Errors are one line; sub-commands inherit this."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _whole_number_from(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number, {minimum} or more, got {text!r}")
        return value

    return parse


def _demo(arguments: argparse.Namespace) -> None:
    # Imported here: --help and --version answer at once.
    from .train.demo import run_demo

    run_demo(num_seeds=arguments.seeds, num_members=arguments.members, output=arguments.output, quick=arguments.quick)


def build_parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    parser = _Parser(prog="latephase", description="Late-phase weights for PyTorch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"latephase {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="compare SGD, SWA and late-phase weights on bundled digits (about a minute, no download)",
        description="Train a small network on 300 bundled handwritten digits, with SGD, SWA and late-phase weights "
        "from the same state at T0; print the comparison, write results.json, curves.png and the collapsed model.",
    )
    demo.add_argument(
        "--seeds", type=_whole_number_from(1), metavar="N", help="runs to average (default 5; 1 with --quick)"
    )
    demo.add_argument(
        "--members", type=_whole_number_from(1), default=5, metavar="K", help="late-phase members (default 5)"
    )
    demo.add_argument("--output", default="demo_run", metavar="DIR", help="folder to write to (default ./demo_run)")
    demo.add_argument("--quick", action="store_true", help="a few steps only, to see that everything works")
    demo.set_defaults(run=_demo)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" shall not end a finished training
    parsed = build_parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except (OSError, ValueError) as error:
        print(f"latephase: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("latephase: interrupted", file=sys.stderr)
        return 130
    return 0
