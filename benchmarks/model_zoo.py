"""Expand and collapse every classification model of torchvision and timm that has batch norms; print what fails.

    python -m benchmarks.model_zoo [--library torchvision|timm] [--pattern 'resnet*'] [--limit N] [--json FILE]

One model at a time, random weights, the smallest input it takes. benchmarks/model_zoo_checks.py says what must hold.
"""

import argparse
import collections
import contextlib
import fnmatch
import gc
import importlib
import io
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.model_zoo_checks import Mismatch, check, prepare, sensitivity

NUM_MEMBERS, ROWS, CLASSES = 2, 2, 5
_SIDES = (64, 128)  # of images, before the model's own


def models_of(library: str) -> dict[str, Callable[..., nn.Module]]:
    """Return name → constructor of every classification model of the library, of images and videos."""
    module = importlib.import_module(library)
    if library == "timm":
        return {name: partial(module.create_model, name, num_classes=CLASSES) for name in module.list_models()}
    found = {}
    for home in (module.models, module.models.video):
        for name in module.models.list_models(module=home):
            # GoogLeNet and Inception draw initial weights for a minute unless told not to.
            options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            found[name] = partial(module.models.get_model, name, num_classes=CLASSES, **options)
    return found


def make_on_meta(make: Callable[..., nn.Module], **options) -> nn.Module:
    """Return the model on the meta device, where nothing is allocated or computed."""
    try:
        with torch.device("meta"):
            return make(**options)
    except NotImplementedError:  # the constructor reads values, as torchvision's RegNets do
        return make(**options).to("meta")


def smallest_input(name: str, make: Callable[..., nn.Module], outline: nn.Module) -> tuple[dict, tuple[int, ...]]:
    """Return the options to make the model with, and the size of the smallest sample that it takes in training.

    Where many batch norms are left with two values a channel, rounding is amplified without bound: a larger one.

    Args:
        outline: the model on the meta device.
    """
    config = getattr(outline, "default_cfg", None) or {}
    own = tuple(config.get("input_size", (3, 299, 299) if name == "inception_v3" else (3, 224, 224)))
    video = not config and any(isinstance(module, nn.Conv3d) for module in outline.modules())
    frames = (16,) if video else ()
    found = []
    for side in _SIDES:
        size = (own[0], *frames, side, side)
        for options in ({}, {"img_size": side}) if side < own[-1] else ():
            with contextlib.suppress(Exception):  # each model refuses in its own way
                few = _small_groups(make_on_meta(make, **options).train(), torch.empty(ROWS, *size, device="meta"))
                if few <= 2:  # in the heads
                    return options, size
                found.append((options, size))
    return found[0] if found else ({}, (own[0], *frames, *own[1:]))


def _small_groups(model: nn.Module, x: torch.Tensor) -> int:
    """Return how many calls of batch norms have fewer than four values a channel and sample."""
    shapes: list[torch.Size] = []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    with x.device:
        model(x)
    return sum(shape.numel() < 4 * ROWS * shape[1] for shape in shapes)


def run_model(name: str, make: Callable[..., nn.Module], max_parameters: float = math.inf) -> dict:
    """Check one model; return its row: status "pass", "fail" or "skip", and why."""
    start = time.perf_counter()
    row: dict = {"model": name, "status": "skip"}
    outline = make_on_meta(make)
    row["parameters"] = sum(parameter.numel() for parameter in outline.parameters())
    norms = [type(module).__name__ for module in outline.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return row | {"reason": "no batch norm"}
    row["batch_norms"] = dict(collections.Counter(norms))
    if row["parameters"] > max_parameters:
        return row | {"reason": f"batch norms, but more than {max_parameters:g} parameters"}
    torch.manual_seed(0)
    try:
        options, size = smallest_input(name, make, outline)
        row["input"] = size
        model = prepare(make(**options)).train()
        with torch.no_grad():  # statistics other than 0 and 1
            model(torch.randn(ROWS, *size, dtype=torch.float64))
        x = torch.randn(NUM_MEMBERS * ROWS, *size, dtype=torch.float64)
        try:
            row |= {"status": "pass", "error": check(model, x, NUM_MEMBERS)}
        except Mismatch as mismatch:
            moved = sensitivity(model, x[:ROWS])
            reason = f"{mismatch}; one unit in the last place of the input moves the plain model by {moved:.1e}"
            row |= {"status": "fail", "reason": reason}
    except Exception as reason:
        row |= {"status": "fail", "reason": f"{type(reason).__name__}: {reason}"[:300]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 if a model fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("torchvision", "timm"), action="append", help="default: both")
    parser.add_argument("--pattern", default="*", help="of model names")
    parser.add_argument("--limit", type=int, help="number of models of each library")
    parser.add_argument("--max-parameters", type=float, default=60e6, help="larger models are skipped")
    parser.add_argument("--json", type=Path, help="write every row there, after each model")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rows: list[dict] = []
    for library in options.library or ("torchvision", "timm"):
        models = {name: make for name, make in models_of(library).items() if fnmatch.fnmatch(name, options.pattern)}
        for i, name in enumerate(list(models)[: options.limit], 1):
            with contextlib.redirect_stdout(io.StringIO()):  # some models print
                row = {"library": library, **run_model(name, models[name], options.max_parameters)}
            rows.append(row)
            gc.collect()
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
            counts = collections.Counter(row["status"] for row in rows)
            line = f"[{i}/{len(models)}] {library} {name}: {row['status']} ({dict(counts)})"
            print(
                f"\r\033[K{line}" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True
            )
    return report(rows)


def report(rows: list[dict]) -> int:
    """Print the counts, the reasons for skipping and a table of failures; return 1 if there is one."""
    failures = [row for row in rows if row["status"] == "fail"]
    passed = sum(row["status"] == "pass" for row in rows)
    print(f"\n{passed} of {passed + len(failures)} models with batch norms pass")
    for reason, count in collections.Counter(row["reason"] for row in rows if row["status"] == "skip").items():
        print(f"{count} skipped: {reason}")
    for row in failures:
        print(f"FAIL {row['library']} {row['model']}: {row['reason']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
