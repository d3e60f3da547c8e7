"""The command `latephase`."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

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


def _list_of(parse: Callable[[str], float]) -> Callable[[str], list]:
    def parse_all(text: str) -> list:
        try:
            return [parse(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers with commas between them, got {text!r}") from None

    return parse_all


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a command whose function has arguments of the same names."""
    return {name: value for name, value in vars(arguments).items() if name != "run"}


def _demo(arguments: argparse.Namespace) -> None:
    # Imported here: --help and --version answer at once.
    from .train.demo import run_demo

    run_demo(num_seeds=arguments.seeds, num_members=arguments.members, output=arguments.output, quick=arguments.quick)


def _nqp(arguments: argparse.Namespace) -> int:
    from .train.nqp_command import run_nqp

    return 1 if run_nqp(**_options(arguments))["checks"]["failed"] else 0


def _train(arguments: Sequence[str]) -> int:
    from .data import WorkerError
    from .train.checkpoints import RunError
    from .train.ranks import RankError
    from .train.train_command import run_train

    try:
        return run_train(arguments)
    except (RunError, RankError, WorkerError, FloatingPointError, ImportError) as error:
        raise ValueError(str(error)) from error


def _eval(arguments: argparse.Namespace) -> None:
    from .data import WorkerError
    from .train.checkpoints import RunError
    from .train.eval_command import run_eval

    try:
        run_eval(**_options(arguments))
    except (RunError, WorkerError, ImportError) as error:
        raise ValueError(str(error)) from error


def _collapse(arguments: argparse.Namespace) -> None:
    from .train.checkpoints import RunError
    from .train.collapse_command import run_collapse

    try:
        run_collapse(**_options(arguments))
    except (RunError, ImportError) as error:
        raise ValueError(str(error)) from error


def _report(arguments: argparse.Namespace) -> None:
    from .train.report import run_report

    run_report(arguments.folders, arguments.output)


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
    _add_nqp(commands)
    commands.add_parser(
        "train",
        help="train by a recipe: CIFAR, Fashion-MNIST, ImageNet, enwik8, digits, text, or a YAML file of your own",
    )
    _add_eval(commands)
    _add_collapse(commands)
    _add_report(commands)
    return parser


def _add_nqp(commands: "argparse._SubParsersAction[_Parser]") -> None:
    nqp = commands.add_parser(
        "nqp",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # run_nqp has the defaults
        help="simulate late-phase weights on the noisy quadratic problem, beside the closed form (less than a minute)",
        description="Simulate SGD and late-phase weights on the noisy quadratic problem and compare their steady-state "
        "loss with the closed form; print the tables, write results.json, nqp.md and nqp.png. The exit code is 1 if a "
        "simulation is more than 4 standard errors from the closed form.",
    )
    counts, numbers = _list_of(_whole_number_from(1)), _list_of(float)
    nqp.add_argument("--members", type=counts, metavar="K,K,...", help="members to try (default 1,2,5,10)")
    nqp.add_argument("--step-sizes", type=numbers, metavar="A,A,...", help="step sizes (default 0.05,0.1,0.15)")
    nqp.add_argument(
        "--shares", type=numbers, metavar="P,P,...", help="shares of late coordinates, 0 to 1 (default 0,0.25,0.5,1)"
    )
    nqp.add_argument(
        "--base-grad-scale",
        choices=("mean", "sum", "both"),
        help="what base coordinates get of the members' gradients (default both, one after the other)",
    )
    nqp.add_argument(
        "--late-coordinates",
        choices=("spread", "sharpest"),
        help="which ones are late: spread evenly (the default), or the first, of largest curvature",
    )
    nqp.add_argument(
        "--seeds", dest="num_seeds", type=_whole_number_from(2), metavar="N", help="runs (default 200; 50 with --quick)"
    )
    nqp.add_argument(
        "--steps",
        dest="num_steps",
        type=_whole_number_from(1),
        metavar="N",
        help="minibatches a run, K to an outer iteration (default 800; 100 with --quick)",
    )
    nqp.add_argument("--dimension", type=_whole_number_from(1), metavar="D", help="coordinates (default 100)")
    nqp.add_argument("--batch-size", type=_whole_number_from(1), metavar="B", help="samples a minibatch (default 16)")
    nqp.add_argument("--output", metavar="DIR", help="folder to write to (default ./nqp_run)")
    nqp.add_argument("--quick", action="store_true", help="few seeds and few steps")
    nqp.set_defaults(run=_nqp)


def _add_reading(command: argparse.ArgumentParser) -> None:
    """Add what the commands that read a run's model have in common."""
    command.add_argument("--data", metavar="DIR", help="where all data lie (default: as in the run's recipe)")
    command.add_argument(
        "--last", action="store_true", help="of a run with SWA the last weights, not their average over time"
    )
    command.add_argument("--device", help="cuda, cpu, mps, ... (default: cuda where it is there, else cpu)")


def _add_eval(commands: "argparse._SubParsersAction[_Parser]") -> None:
    evaluate = commands.add_parser(
        "eval",
        allow_abbrev=False,
        help="evaluate a run of latephase train: accuracy, calibration, foreign images, bits per character",
        description="Evaluate the final model of a run, averaged, as an ensemble and member by member, or several runs "
        "as a deep ensemble; print the tables, write evaluation.json and, with --ood, ood.png into the run's folder "
        "(with --last evaluation_last.json and ood_last.png; of an ensemble: into a folder of its own, where latephase "
        "report finds it). Data that is missing is named and left out.",
    )
    evaluate.add_argument(
        "folders", nargs="+", metavar="RUN", help="the folder of the run; several, of one recipe: their deep ensemble"
    )
    evaluate.add_argument(
        "--ood",
        type=lambda text: text.split(","),
        default=[],
        metavar="SET,SET,...",
        help="sets to tell from the test set: svhn, lsun, tiny_imagenet, cifar10, cifar100, or all",
    )
    evaluate.add_argument(
        "--corruptions", action="store_true", help="error of the averaged model on CIFAR-10-C or CIFAR-100-C"
    )
    _add_reading(evaluate)
    evaluate.add_argument(
        "--output", metavar="DIR", help="folder to write to (default: the run's, or NAME_deep_ensemble-seedN beside it)"
    )
    evaluate.set_defaults(run=_eval)


def _add_collapse(commands: "argparse._SubParsersAction[_Parser]") -> None:
    collapse = commands.add_parser(
        "collapse",
        allow_abbrev=False,
        help="the members of a run's last checkpoint averaged into one plain model, as safetensors",
        description="Collapse the model of a run's last checkpoint, finished or not, and write it as safetensors. The "
        "file loads into the plain network, strictly. A finished run has its own already, model.safetensors, in mode "
        "exact.",
    )
    collapse.add_argument("folder", metavar="RUN", help="the folder of the run")
    collapse.add_argument(
        "--mode",
        choices=("exact", "weights"),
        default="exact",
        help="exact averages the layers' outputs in eval mode, for inference (the default); weights averages the "
        "tensors, for further training",
    )
    collapse.add_argument(
        "--member", type=_whole_number_from(0), metavar="K", help="keep member K, from 0 on, instead of the average"
    )
    _add_reading(collapse)
    collapse.add_argument(
        "--output", metavar="FILE", help="file or folder to write to (default RUN/collapsed.safetensors)"
    )
    collapse.set_defaults(run=_collapse)


def _add_report(commands: "argparse._SubParsersAction[_Parser]") -> None:
    report = commands.add_parser(
        "report",
        allow_abbrev=False,
        help="all finished runs beside the published figures, mean and standard deviation over seeds",
        description="Collect the results of finished runs, average those of one name over their seeds, and print them "
        "beside the published figures; write report.md, report.json and report.png. Runs are matched by their "
        "recipes' names.",
    )
    report.add_argument(
        "folders",
        nargs="*",
        default=["runs"],
        metavar="RUNS",
        help="folders of runs, or folders that hold some (default ./runs)",
    )
    report.add_argument("--output", default="report", metavar="DIR", help="folder to write to (default ./report)")
    report.set_defaults(run=_report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 (a failed check), 2 for what the user can mend, 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "±" shall not end a finished training
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments and arguments[0] == "train":  # its options are a recipe's, parsed there
            return _train(arguments[1:])
        parsed = build_parser().parse_args(arguments)
        return parsed.run(parsed) or 0
    except (OSError, ValueError) as error:
        print(f"latephase: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("latephase: interrupted", file=sys.stderr)
        return 130
