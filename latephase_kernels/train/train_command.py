"""The command line of `latephase train`: a recipe's name or file, and dotted options over it."""

import dataclasses
import math
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .quantities import format_metrics
from .recipe import Recipe, recipe_file, recipe_names

_OWN_OPTIONS = ("config", "output", "resume", "device", "tensorboard", "base")
# The parts of a recipe that hold options of their own.
_PARTS: dict[str, Any] = {
    field.name: field.default_factory
    for field in dataclasses.fields(Recipe)
    if dataclasses.is_dataclass(field.default_factory)
}


def build_parser() -> Any:
    """Return jsonargparse's parser: the options of the command and, dotted, those of a recipe.

    Raises:
        ImportError: jsonargparse is missing.
    """
    try:
        from jsonargparse import ArgumentParser
    except ModuleNotFoundError:
        raise ImportError("train: recipes need jsonargparse; pip install 'latephase_kernels[train]'") from None
    parser = ArgumentParser(
        prog="latephase train RECIPE",
        exit_on_error=False,
        allow_abbrev=False,
        description=f"Train by a recipe: {', '.join(recipe_names())}, or a YAML file of your own. "
        "Every option of the recipe can be given here, dotted: --late.members=5 --optimizer.lr=0.05 --late.start=null. "
        "--print_config shows the result.",
    )
    parser.add_argument("--config", action="config", help="YAML with options, over the recipe's")
    parser.add_argument("--base", type=str, default=None, help="only in a recipe's file: the recipe that it changes")
    parser.add_argument("--output", type=str, default=None, help="the run's folder (default runs/NAME-seedN)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    device_help = "cuda, cpu, mps, … (default: cuda where it is there, else cpu)"
    parser.add_argument("--device", type=str, default=None, help=device_help)
    parser.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard, too")
    parser.add_class_arguments(Recipe)
    return parser


def parse_recipe(arguments: Sequence[str]) -> tuple[Recipe, dict[str, Any]]:
    """Return the recipe that the arguments ask for, and the command's own options.

    Raises:
        ValueError: there is no such recipe, or an option does not fit.
        SystemExit: no recipe was given (2), or --help or --print_config was answered (0).
    """
    parser = build_parser()
    if not arguments or arguments[0].startswith("-"):
        parser.print_help(sys.stdout if arguments and arguments[0] in ("-h", "--help") else sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    files = _with_bases(recipe_file(arguments[0]))
    layers = [part for file in files for part in ("--config", _config_of(file))]
    try:
        parsed = parser.parse_args([*layers, *arguments[1:]]).as_dict()
    except ArgumentError as error:
        part = re.search(r'Parser key "(\w+)":\s+Unable to load config \'(.*?)\'', str(error))
        if part is not None and part[1] in _PARTS:
            raise _part_error(*part.groups()) from None
        raise ValueError(f"train: {error} (see latephase train --help)") from None
    own = {key: parsed.pop(key) for key in _OWN_OPTIONS}
    if own.pop("base") != _base_of(files[-1]):
        raise ValueError("train: base must stand in the recipe's own file; give that file in place of the recipe")
    del own["config"]
    for name in _PARTS:
        if not isinstance(parsed[name], dict):
            raise _part_error(name, parsed[name])
    return Recipe(**parsed | {name: part(**parsed[name]) for name, part in _PARTS.items()}), own


def _part_error(name: str, got: Any) -> ValueError:
    first = dataclasses.fields(_PARTS[name])[0].name
    return ValueError(f"train: {name} must hold options, such as {name}.{first}, got {got}")


def _content_of(file: Path) -> dict[str, Any]:
    """Return what a recipe's file holds; {} where that is no YAML or no options: the options' parser says so better.

    Raises:
        ValueError: it is no UTF-8.
    """
    import yaml  # comes with jsonargparse

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"train: {file} must be text in UTF-8: {error}") from None
    except yaml.YAMLError:
        content = None
    return content if isinstance(content, dict) else {}


def _config_of(file: Path) -> str:
    """Return a recipe's content as one line of ASCII: the parser of the options reads files in the locale's encoding.

    Of a file that holds no options its name.
    """
    import yaml

    content = _content_of(file)
    return yaml.safe_dump(content, default_flow_style=True, width=math.inf, sort_keys=False) if content else str(file)


def _base_of(file: Path) -> str | None:
    """Return the recipe that a recipe's file changes; None for a file that stands alone."""
    base = _content_of(file).get("base")
    return None if base is None else str(base)


def _with_bases(file: Path) -> list[Path]:
    """Return the files of a recipe's base, of that one's base and so on, the first to be read in front.

    Raises:
        ValueError: there is no such recipe, or a recipe is its own base.
    """
    files = [file]
    while (base := _base_of(files[0])) is not None:
        following = recipe_file(base)
        if following.resolve() in [other.resolve() for other in files]:
            raise ValueError(f"train: {following} is its own base; base must be another recipe")
        files.insert(0, following)
    return files


def as_yaml(recipe: Recipe) -> str:
    """Return the whole recipe, defaults included, as YAML."""
    import yaml  # comes with jsonargparse

    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)


def format_results(results: dict[str, Any]) -> str:
    """Return a finished run's metrics as a table, one row a way to predict."""
    return format_metrics(
        {way: found for way, found in results["metrics"].items() if not way.startswith("member ")}, ""
    )


def run_train(arguments: Sequence[str]) -> int:
    """Do what `latephase train ARGUMENTS` asks for; return the exit code: 0, or 128 + the signal that ended it.

    Raises:
        As parse_recipe and run_training.
    """
    from .run_training import Interrupted, run_training

    recipe, own = parse_recipe(arguments)
    output = own.pop("output") or f"runs/{recipe.name}-seed{recipe.seed}"
    try:
        results = run_training(recipe, as_yaml(recipe), output, **own)
    except Interrupted as interrupted:
        if int(os.environ.get("RANK", "0")) == 0:
            print(
                f"latephase: {interrupted} after a checkpoint was written; go on with --resume --output {output}",
                file=sys.stderr,
            )
        return 128 + interrupted.number
    if results:  # of the first process, where there are several
        print(format_results(results))
        print(f"written to {output}")
    return 0
