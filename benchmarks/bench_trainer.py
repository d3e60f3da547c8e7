"""Time of a step of `latephase train` beside the bare forward, backward and optimizer step on the same batch.

    python benchmarks/bench_trainer.py [--device cuda] [--depth 28 --width 10 --batch 128 --members 10] [--output FILE]

CIFAR's recipe on random images of CIFAR's number and shape, which live on the device: before T0 (one minibatch) and
after it (K stacked ones). The front-end's own work is the rest: drawing and augmenting the batch, the learning rates,
the sums of the losses. All take turns in one run. "the rest alone" is a trainer's step whose forward, backward and
optimizer do nothing: its ratio to the bare step within a round is the overhead, less noisy than "trainer" less one.
"deterministic" is a trainer's step with --deterministic.
"""

import argparse
import json
import os

import torch
import torch.nn.functional as F
from timing import interleaved, quartiles, ratios

from latephase_kernels.data import ImageSet
from latephase_kernels.train.determinism import determinism
from latephase_kernels.train.recipe import Data, Late, Model, Recipe, check
from latephase_kernels.train.runs import processor
from latephase_kernels.train.trainer import Trainer

CLASSES, IMAGES = 10, 50_000


def random_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (IMAGES, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    return ImageSet(images, labels, tuple(map(str, range(CLASSES))), (0.5,) * 3, (0.25,) * 3)


def make_trainer(arguments, data, late):
    recipe = Recipe(
        data=Data(),
        model=Model("wide_resnet", {"depth": arguments.depth, "width": arguments.width}),
        batch_size=arguments.batch,
        late=Late(start=0 if late else None, members=arguments.members),
        precision=arguments.precision,
        channels_last=arguments.channels_last,
    )
    return Trainer(check(recipe), data, arguments.device)


def bare_step(trainer, images, labels, num_members):
    """Forward, backward and optimizer of the same kind of model on one fixed batch: what cannot be saved."""
    bfloat16 = trainer.recipe.precision == "bfloat16"
    trainer.optimizer.zero_grad()
    with torch.autocast(trainer.device.type, torch.bfloat16, enabled=bfloat16):
        logits = trainer.model(images)
    (F.cross_entropy(logits.float(), labels) * num_members).backward()
    trainer.optimizer.step()


def leave_out_training(trainer):
    """Make forward, backward and optimizer of a trainer's steps take no time."""
    zero = torch.zeros((), device=trainer.device, requires_grad=True)
    trainer.task.losses = lambda *_: 0.0 * zero
    trainer.optimizer.step = lambda: None


def bench(arguments, data, late):
    """Return {contender: figures} before or after T0."""
    trained, bare, idle = (make_trainer(arguments, data, late) for _ in range(3))
    count = arguments.members if late else 1
    trained.step(), bare.step(), idle.step()  # expands after T0, and makes the optimizers' state
    leave_out_training(idle)
    images, labels = bare.batches.stack(0, count)

    def deterministic_step():
        with determinism(True):
            trained.step()

    functions = {
        "bare": lambda: bare_step(bare, images, labels, count),
        "trainer": trained.step,
        "deterministic": deterministic_step,
        "the rest alone": idle.step,
    }
    times = interleaved(functions, torch.device(arguments.device), seconds=arguments.seconds / 2)
    return {
        name: {"ms": [1e3 * t for t in quartiles(t)], "to_bare": ratios(t, times["bare"]), "rounds": len(t)}
        for name, t in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=["cpu", "cuda"])
    shape = {"depth": 28, "width": 10, "batch": 128, "members": 10}
    small = {"depth": 10, "width": 4, "batch": 32, "members": 4}  # that a CPU has many rounds in a minute
    for name in shape:
        parser.add_argument(f"--{name}", type=int, help=f"default {shape[name]}; on a CPU {small[name]}")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--output", help="write the figures here as JSON")
    arguments = parser.parse_args()
    defaults = shape if arguments.device == "cuda" else small
    for name, default in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    data = random_images()
    rows = {"before T0": bench(arguments, data, late=False), "after T0": bench(arguments, data, late=True)}
    settings = {name: getattr(arguments, name) for name in ("device", *shape, "precision", "channels_last")}
    settings |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    for phase, contenders in rows.items():
        for name, row in contenders.items():
            low, ratio, high = row["to_bare"]
            print(f"  {phase:10} {name:14} {row['ms'][1]:9.2f} ms   × {ratio:.4f} ({low:.4f} … {high:.4f})")
    if arguments.output:
        machine = torch.cuda.get_device_name() if arguments.device == "cuda" else processor()
        with open(arguments.output, "w") as file:
            json.dump({**settings, "machine": machine, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
