"""Images a second from JPEGs on the disk to a finished training step, and which part limits it.

    python benchmarks/bench_input.py [--device cuda] [--model torchvision:resnet50] [--seconds 10] [--output FILE]

JPEGs of 500 × 375 are made here, as many as one stacked step takes; they stay in the page cache, so that decoding is
measured and the disk is not. Three rates, all through the public training code:

    input      minibatches loaded, decoded, cropped and normalized on the device, and dropped
    step       training steps on one stacked batch that stays where it is
    training   training steps on minibatches as they are loaded
"""

import argparse
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latephase_kernels.data.image_crops import sample_generator
from latephase_kernels.data.image_decoding import training_pixels
from latephase_kernels.data.image_folder import ImageFolder
from latephase_kernels.data.worker_pool import available_cores
from latephase_kernels.train.recipe import Data, Images, Late, Model, Optimizer, Recipe, Schedule, check
from latephase_kernels.train.runs import processor
from latephase_kernels.train.trainer import Trainer

WIDTH, HEIGHT, QUALITY = 500, 375, 92
NUM_CLASSES = 8
ENOUGH = 0.95  # of the step's rate: the input does not limit


def make_jpeg(seed: int) -> bytes:
    """Encode an image with detail at every scale, of about the bytes a photograph of this size has."""
    from PIL import Image

    random = np.random.default_rng(seed)
    pixels = random.normal(scale=0.8, size=(HEIGHT, WIDTH, 3)).astype(np.float32)
    for cells in (4, 8, 16, 32, 64, 128):
        coarse = random.normal(size=(3, cells, cells)).astype(np.float32)
        layers = [Image.fromarray(layer).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for layer in coarse]
        pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1) * (128 / cells) ** 0.5
    levels = (pixels - pixels.mean()) / pixels.std() * 50 + 120
    file = io.BytesIO()
    Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make_images(folder: Path, count: int, distinct: int) -> int:
    """Write `count` files in class folders, each one of `distinct` images; return their mean size in bytes."""
    contents = [make_jpeg(seed) for seed in range(min(distinct, count))]
    for number in range(count):
        path = folder / f"class{number % NUM_CLASSES}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number % len(contents)])
    return round(statistics.fmean(map(len, contents)))


def rate(act: Callable[[], int], device: torch.device, *, seconds: float, warmup: int) -> float:
    """Return images a second: those of all steps after `warmup`, until `seconds` are over and three are done."""
    for _ in range(warmup):
        act()
    _wait(device)
    images, steps, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds or steps < 3:
        images, steps = images + act(), steps + 1
    _wait(device)
    return images / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(arguments: argparse.Namespace, folder: Path, decoder: str, workers: int) -> dict[str, Any]:
    """Return the three rates with one decoder, and what limits training."""
    device = torch.device(arguments.device)
    options = {"widths": [8, 8]} if arguments.model == "small_resnet" else {}
    recipe = check(
        Recipe(
            data=Data(name="imagenet"),
            images=Images(size=arguments.size, resize=arguments.size, workers=workers, decoder=decoder),
            model=Model(arguments.model, options),
            batch_size=arguments.batch,
            epochs=1_000_000,
            optimizer=Optimizer(lr=1e-3, nesterov=False),
            schedule=Schedule(1_000_000, 1_000_000, 1e-3),
            late=Late(
                start=0,
                members=arguments.members,
                targets=["batch_norm"],
                base_grad_scale="mean",
                member_chunk=arguments.chunk,
            ),
            precision=arguments.precision,
            channels_last=device.type == "cuda",  # on CPUs oneDNN of torch 2.14 crashes with it (8 channels, 64 × 64)
            cuda_graph=arguments.cuda_graph,
        )
    )
    trainer = Trainer(recipe, ImageFolder(folder), device)
    batches: Any = trainer.batches
    count, images = arguments.members, arguments.members * arguments.batch
    position = 0

    def load() -> int:
        nonlocal position
        batches.stack(position, count)
        position += count
        return images

    def step() -> int:
        return trainer.step() * arguments.batch

    try:
        found: dict[str, Any] = {"decoder": batches.decoder_name, "workers": workers}
        found["input"] = rate(load, device, seconds=arguments.seconds, warmup=2)
        stacked, load_next = batches.stack(position, count), batches.stack
        batches.stack = lambda first, count: stacked
        found["step"] = rate(step, device, seconds=arguments.seconds, warmup=5)
        batches.stack = load_next
        found["training"] = rate(step, device, seconds=arguments.seconds, warmup=2)
    finally:
        trainer.task.close()
    found["share"] = found["training"] / found["step"]
    found["limit"] = limit(found)
    return found


def worker_milliseconds(folder: Path, size: int) -> float:
    """Return the CPU time a worker spends on one training image, in ms: other work on the machine hardly changes it."""
    files = ImageFolder(folder)
    times = []
    for index in range(min(len(files), 64)):
        start = time.process_time()
        training_pixels(files.read(index), files.name(index), sample_generator(0, 0, index), size)
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def limit(found: dict[str, Any]) -> str:
    """Say what limits training: the step, the input, or both where they take turns on the same cores."""
    if found["share"] >= ENOUGH:
        return "step"
    return "input" if found["input"] < found["step"] else "both share the cores"


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return where this runs, for a reader of the figures."""
    on_gpu = arguments.device.startswith("cuda")
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else processor(),
        "processor": processor(),
        "cores": available_cores(),
        "torch": torch.__version__,
        **{name: value for name, value in vars(arguments).items() if name != "output"},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the rates as Markdown."""
    lines = [
        "| decoder | workers | input, images/s | step | training | training to step | limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        rates = (f"{found[name]:,.0f}" for name in ("input", "step", "training"))
        cells = (found["decoder"], str(found["workers"]), *rates, f"{found['share']:.2f}", found["limit"])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure every decoder asked for; print the table and write the JSON."""
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--model", default="torchvision:resnet50" if on_gpu else "small_resnet")
    parser.add_argument("--precision", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--members", type=int, default=10 if on_gpu else 2)
    parser.add_argument("--batch", type=int, default=128 if on_gpu else 32)
    parser.add_argument("--chunk", type=int, default=5 if on_gpu else None, help="members a forward pass")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--decoders", nargs="+", default=["cpu", "gpu"] if on_gpu else ["cpu"], choices=["cpu", "gpu"])
    parser.add_argument("--workers", nargs="+", type=int, default=[min(available_cores(), 16)])
    parser.add_argument("--cuda_graph", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each of the three rates")
    parser.add_argument("--distinct", type=int, default=128, help="different images")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    with tempfile.TemporaryDirectory() as folder:
        count = max(arguments.members * arguments.batch, arguments.distinct)
        mean_bytes = make_images(Path(folder), count, arguments.distinct)
        milliseconds = worker_milliseconds(Path(folder), arguments.size)
        results = []
        for decoder in arguments.decoders:
            for workers in arguments.workers:
                try:
                    results.append(measure(arguments, Path(folder), decoder, workers))
                except ValueError as error:  # no such decoder here
                    print(f"{decoder} decoder left out: {error}", file=sys.stderr)
    content = {**facts(arguments), "mean_jpeg_bytes": mean_bytes, "worker_ms": milliseconds, "results": results}
    print(f"{content['hardware']}, {content['cores']} cores, torch {content['torch']}; JPEGs of {mean_bytes:,} bytes")
    print(f"a worker: {milliseconds:.2f} ms of CPU time an image, {1e3 / milliseconds:,.0f} images/s a core")
    print(table(results))
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=2, default=os.fspath) + "\n")
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
