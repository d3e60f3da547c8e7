"""What a training run does, as data: read from YAML, overridden by dotted options, written into the run's folder.

Epochs are counted in passes over the training set, batch sizes per member and over all devices together.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass
class Data:
    """Which data, and how images are augmented.

    Attributes:
        name: images: cifar10, cifar100, fashion_mnist, digits, imagenet (or any images laid out as it); texts: enwik8,
            python_text (comes with Python) or text_file.
        folder: where the archive, or the folder extracted from it, lies; for text_file the file.
        num_train: only the first so many training images, of sets that are held in memory; null for all.
        crop_padding: random crops from images padded by this many pixels; 0 for none.
        flip: random horizontal flips.
        cutout: side of a random square set to the mean; 0 for none.
    """

    name: str = "cifar10"
    folder: str = "data"
    num_train: int | None = None
    crop_padding: int = 4
    flip: bool = True
    cutout: int = 0


@dataclass
class Text:
    """How a text is read; without effect on images.

    Attributes:
        window: symbols that gradients go back through; batch_size counts streams.
        evaluation_streams: streams side by side into which validation and test text are cut; 1 carries the recurrent
            state through the whole text, more are faster, and each starts from zeros.
    """

    window: int = 100
    evaluation_streams: int = 1


@dataclass
class Images:
    """How images on the disk are loaded: of data.name imagenet; without effect on others.

    Attributes:
        size: pixels a side of what the network sees: a random-resized-crop in training, the middle in evaluation.
        resize: the shorter side before the middle is taken.
        workers: processes that read and decode, on each device; None for as many as there are cores, 16 at most; on
            Windows there are none.
        decoder: cpu; gpu (torchcodec's or torchvision's); auto: the GPU's where there is one. Evaluation is the CPU's.
        corrupt: error; replace: put another training image in a corrupt one's place, with a warning that names it.
    """

    size: int = 224
    resize: int = 256
    workers: int | None = None
    decoder: str = "auto"
    corrupt: str = "error"


@dataclass
class Model:
    """Which network.

    Attributes:
        name: wide_resnet, hyper_wide_resnet, small_resnet, torchvision:NAME or timm:NAME; for a text char_lstm.
        options: arguments of its constructor, but for the number of classes.
        weights: to start from: a name of torchvision's (IMAGENET1K_V1), "pretrained" for timm, or a file (.pth, .pt,
            .safetensors); None for random ones.
    """

    name: str = "wide_resnet"
    options: dict[str, int | float | bool | str | list] = field(default_factory=dict)
    weights: str | None = None


@dataclass
class Optimizer:
    """The base weights' optimizer; members have the same rule with their own options.

    Attributes:
        name: sgd or adamw.
        lr: learning rate before annealing.
        momentum: of SGD.
        nesterov: of SGD.
        weight_decay: of base weights; decoupled for AdamW.
        clip_norm: largest norm of a gradient, of the base weights' and of each member's by itself; None for any.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    clip_norm: float | None = None


@dataclass
class Schedule:
    """Learning rate: constant until anneal_start, then linear to end_lr at anneal_end, then constant; times the drops.

    Attributes:
        anneal_start: epoch.
        anneal_end: epoch.
        end_lr: of base weights.
        drop_epochs: from each of these on, the rate is multiplied by drop_factor.
        drop_factor: see there.
        members_follow: members keep their ratio to the base weights' rate; else their rate stays as it is.
    """

    anneal_start: float = 100
    anneal_end: float = 180
    end_lr: float = 0.001
    drop_epochs: list[float] = field(default_factory=list)
    drop_factor: float = 0.1
    members_follow: bool = True


@dataclass
class Late:
    """The late phase.

    Attributes:
        start: T0, the epoch in which members begin; None for plain training.
        members: K.
        targets: names as in `expand`, or "rank1:NAME": gains for the module of that name alone.
        noise_std: σ0.
        base_grad_scale: γ_θ: sum, mean or a number.
        lr: of members before annealing; None for the base weights'.
        weight_decay: of members; None for the base weights'.
        member_state: of the optimizer at T0: fresh or copy.
        member_chunk: members a forward pass, where all at once do not fit; None for all.
        fuse: run batch norm and ReLU as one op where that is proven equal.
    """

    start: float | None = 120
    members: int = 10
    targets: list[str] = field(default_factory=lambda: ["batch_norm", "head"])
    noise_std: float = 0.0
    base_grad_scale: float | str = "sum"
    lr: float | None = None
    weight_decay: float | None = None
    member_state: str = "fresh"
    member_chunk: int | None = None
    fuse: bool = True


@dataclass
class Swa:
    """Stochastic weight averaging, statistics recomputed at the end.

    Attributes:
        start: the first epoch after which weights are averaged; None for none.
        per_epoch: how often weights enter the average in an epoch, the last time at its end.
    """

    start: float | None = None
    per_epoch: int = 1


@dataclass
class Parallel:
    """Several devices: one process each, started by torchrun. With R processes each has 1/R of a step's samples.

    Attributes:
        member_ranks: M processes, or groups of R/M that share them, divide the members among them; 1: all processes
            have all members.
        batch_norm: local (a process normalizes by its own samples; statistics are averaged) or synchronized (by all
            samples of a minibatch: the same optimization on any number of devices).
        timeout_seconds: after which a process that does not answer ends the others.
    """

    member_ranks: int = 1
    batch_norm: str = "local"
    timeout_seconds: float = 50.0


@dataclass
class Recipe:
    """A training run.

    Attributes:
        name: of the run in tables.
        batch_size: images, or streams of text, a member and minibatch, over all devices.
        accumulate: minibatches a member and step, one after the other; the gradient is the mean of theirs.
        epochs: passes over the training set.
        seed: of weights, order, augmentation and dropout.
        label_smoothing: of the cross entropy.
        precision: float32 or bfloat16 (autocast).
        channels_last: memory format of images and convolutions.
        compile: torch.compile the model.
        cuda_graph: capture forward and backward once, and replay them without Python; on a GPU, for images.
        deterministic: refuse operators whose results differ between runs. Costs nothing on a CPU, where a seed
            reproduces a run in any case; on a GPU convolutions may be slower, and sums do without atomics.
        skip_nonfinite: skip a step whose loss is not finite (statistics restored), and count it; else stop the run.
        evaluate_every: epochs between evaluations on the test set, or the validation text; the last epoch always is.
        dropout_passes: at the end, predict by the mean over this many passes with dropout, too (MC-dropout); 0: do not.
        checkpoint_minutes: between checkpoints; one is written at the end and on interruption, too.
        keep_checkpoints: the newest that stay.
    """

    name: str = "unnamed"
    data: Data = field(default_factory=Data)
    images: Images = field(default_factory=Images)
    text: Text = field(default_factory=Text)
    model: Model = field(default_factory=Model)
    batch_size: int = 128
    accumulate: int = 1
    epochs: int = 200
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    late: Late = field(default_factory=Late)
    swa: Swa = field(default_factory=Swa)
    parallel: Parallel = field(default_factory=Parallel)
    seed: int = 0
    label_smoothing: float = 0.0
    precision: str = "float32"
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    deterministic: bool = False
    skip_nonfinite: bool = False
    evaluate_every: int = 10
    dropout_passes: int = 0
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """Return the file of a recipe of the package, or of the user's own.

    Raises:
        ValueError: there is neither a recipe of this name nor a YAML file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ValueError(f"train: there is no file {name}")
    if name in recipe_names():
        return RECIPES / f"{name}.yaml"
    near = difflib.get_close_matches(name, recipe_names(), 1)
    raise ValueError(
        f"train: there is no recipe {name!r}"
        + (f" (is {near[0]} meant?)" if near else "")
        + f"; there are {', '.join(recipe_names())}, or give a YAML file"
    )


def check(recipe: Recipe) -> Recipe:
    """Return the recipe if its parts fit together.

    Raises:
        ValueError: the message names the option.
    """
    data, images, text, optimizer = recipe.data, recipe.images, recipe.text, recipe.optimizer
    late, swa, schedule, parallel = recipe.late, recipe.swa, recipe.schedule, recipe.parallel
    an_epoch = f"null or an epoch from 0 to below epochs ({recipe.epochs})"
    demands: Sequence[tuple[bool, str, str]] = (
        (data.num_train is None or data.num_train >= 1, "data.num_train", "null or at least 1"),
        (data.crop_padding >= 0, "data.crop_padding", "at least 0"),
        (data.cutout >= 0, "data.cutout", "at least 0"),
        (recipe.batch_size >= 1, "batch_size", "at least 1"),
        (recipe.accumulate >= 1, "accumulate", "at least 1"),
        (images.size >= 1, "images.size", "at least 1"),
        (images.resize >= images.size, "images.resize", f"at least images.size ({images.size})"),
        (images.workers is None or images.workers >= 0, "images.workers", "null or at least 0"),
        (images.decoder in ("auto", "cpu", "gpu"), "images.decoder", "auto, cpu or gpu"),
        (images.corrupt in ("error", "replace"), "images.corrupt", "error or replace"),
        (schedule.anneal_start >= 0, "schedule.anneal_start", "at least 0"),
        (schedule.end_lr >= 0, "schedule.end_lr", "at least 0"),
        (all(epoch >= 0 for epoch in schedule.drop_epochs), "schedule.drop_epochs", "epochs, none below 0"),
        (schedule.drop_factor > 0, "schedule.drop_factor", "more than 0"),
        (recipe.epochs >= 1, "epochs", "at least 1"),
        (
            parallel.member_ranks >= 1 and late.members % parallel.member_ranks == 0,
            "parallel.member_ranks",
            f"at least 1, and divide late.members ({late.members})",
        ),
        (parallel.batch_norm in ("local", "synchronized"), "parallel.batch_norm", "local or synchronized"),
        (parallel.timeout_seconds > 0, "parallel.timeout_seconds", "more than 0"),
        (-(2**63) <= recipe.seed < 2**64, "seed", "from -2⁶³ to below 2⁶⁴"),
        (recipe.evaluate_every >= 1, "evaluate_every", "at least 1"),
        (recipe.dropout_passes >= 0, "dropout_passes", "at least 0"),
        (recipe.checkpoint_minutes >= 0, "checkpoint_minutes", "at least 0"),
        (0 <= recipe.label_smoothing < 1, "label_smoothing", "at least 0 and below 1"),
        (recipe.keep_checkpoints >= 1, "keep_checkpoints", "at least 1"),
        (recipe.precision in ("float32", "bfloat16"), "precision", "float32 or bfloat16"),
        (optimizer.name in ("sgd", "adamw"), "optimizer.name", "sgd or adamw"),
        (optimizer.lr > 0, "optimizer.lr", "more than 0"),
        (optimizer.weight_decay >= 0, "optimizer.weight_decay", "at least 0"),
        (optimizer.momentum >= 0, "optimizer.momentum", "at least 0"),
        (
            optimizer.name != "sgd" or optimizer.momentum > 0 or not optimizer.nesterov,
            "optimizer.nesterov",
            "false where optimizer.momentum is 0",
        ),
        (optimizer.clip_norm is None or optimizer.clip_norm > 0, "optimizer.clip_norm", "null or more than 0"),
        (text.window >= 1, "text.window", "at least 1"),
        (text.evaluation_streams >= 1, "text.evaluation_streams", "at least 1"),
        (swa.per_epoch >= 1, "swa.per_epoch", "at least 1"),
        (late.members >= 1, "late.members", "at least 1"),
        (0 <= late.noise_std < math.inf, "late.noise_std", "finite and at least 0"),
        (
            late.base_grad_scale in ("sum", "mean")
            if isinstance(late.base_grad_scale, str)
            else math.isfinite(late.base_grad_scale),
            "late.base_grad_scale",
            "sum, mean or a finite number",
        ),
        (late.lr is None or late.lr >= 0, "late.lr", "null or at least 0"),
        (late.weight_decay is None or late.weight_decay >= 0, "late.weight_decay", "null or at least 0"),
        (late.member_state in ("fresh", "copy"), "late.member_state", "fresh or copy"),
        (
            schedule.anneal_start <= schedule.anneal_end,
            "schedule.anneal_end",
            f"anneal_start ({schedule.anneal_start}) or later",
        ),
        (late.start is None or 0 <= late.start < recipe.epochs, "late.start", an_epoch),
        (swa.start is None or 0 <= swa.start < recipe.epochs, "swa.start", an_epoch),
        (
            swa.start is None or late.start is None or swa.start >= late.start,
            "swa.start",
            f"late.start ({late.start}) or later: plain weights and members have no common average",
        ),
        (
            late.member_chunk is None or 1 <= late.member_chunk <= late.members,
            "late.member_chunk",
            f"null or from 1 to late.members ({late.members})",
        ),
    )
    for holds, option, expected in demands:
        if not holds:
            raise ValueError(f"train: {option} must be {expected}, got {attrgetter(option)(recipe)}")
    return recipe
