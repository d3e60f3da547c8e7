"""From a recipe's words to data, network and optimizer."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import late_phase as lp
from ..data import (
    ImageFiles,
    ImageSet,
    TextSet,
    load_cifar10,
    load_cifar100,
    load_enwik8,
    load_fashion_mnist,
    load_imagenet,
    load_python_text,
    load_text,
)
from ..data.digits import NUM_CLASSES, PIXEL_MEAN, PIXEL_STD, load_digits, split_digits
from ..late_phase.kept_state import buffers_kept, random_numbers_kept
from ..models import CharLSTM, HyperWideResNet, SmallResNet, WideResNet
from .recipe import Data, Model, Optimizer

AnyData = ImageSet | ImageFiles | TextSet
_LOADERS = {"cifar10": load_cifar10, "cifar100": load_cifar100, "fashion_mnist": load_fashion_mnist}
DATA_NAMES = (*_LOADERS, "digits", "imagenet", "enwik8", "python_text", "text_file")


def build_data(data: Data) -> tuple[AnyData, AnyData]:
    """Return training and test set.

    Of ImageNet these are training and validation images that stay on the disk; of a text, the same text twice: it holds
    its own parts.

    Raises:
        ValueError: an unknown name, damaged files, or data.num_train does not fit.
        OSError: the files are not there; the message says where to get them.
    """
    train, test = _whole(data)
    if data.num_train is None:
        return train, test
    if not isinstance(train, ImageSet) or data.num_train > len(train):
        expected = f"from 1 to {len(train)}" if isinstance(train, ImageSet) else "null, as no images in memory,"
        raise ValueError(f"train: data.num_train must be {expected} for {data.name}, got {data.num_train}")
    first = slice(data.num_train)
    return dataclasses.replace(train, images=train.images[first], labels=train.labels[first]), test


def _whole(data: Data) -> tuple[AnyData, AnyData]:
    if data.name in _LOADERS:
        load = _LOADERS[data.name]
        return load(data.folder, train=True), load(data.folder, train=False)
    if data.name == "digits":
        return _digits()
    if data.name == "imagenet":
        return load_imagenet(data.folder)
    text = _text(data)
    if text is not None:
        return text, text
    raise ValueError(f"train: data.name must be one of {', '.join(DATA_NAMES)}, got {data.name!r}")


def _digits() -> tuple[ImageSet, ImageSet]:
    """The bundled digits: 300 training images, the same in every run; 1497 test images."""
    images, labels = load_digits()
    split = split_digits(images, labels)
    levels = images.mul(PIXEL_STD).add(PIXEL_MEAN).mul(16).round().to(torch.uint8)
    classes = tuple(str(digit) for digit in range(NUM_CLASSES))
    mean, std = (PIXEL_MEAN * 16 / 255,), (PIXEL_STD * 16 / 255,)
    return (
        ImageSet(levels[split.train_indices], split.train_labels, classes, mean, std),
        ImageSet(levels[split.test_indices], split.test_labels, classes, mean, std),
    )


def _text(data: Data) -> TextSet | None:
    """The text of this name, or None where it is no text's name."""
    if data.name == "enwik8":
        return load_enwik8(data.folder)
    if data.name == "python_text":
        return load_python_text()
    return load_text(data.folder) if data.name == "text_file" else None


def build_network(model: Model, num_classes: int, in_channels: int) -> nn.Module:
    """Return a freshly initialized network.

    Raises:
        ValueError: an unknown name, or options its constructor does not take.
        ImportError: the library it is from is not installed.
    """
    library, _, name = model.name.rpartition(":")
    options: dict[str, Any] = dict(model.options)
    try:
        if not library and name == "wide_resnet":
            return WideResNet(num_classes=num_classes, in_channels=in_channels, **options)
        if not library and name == "hyper_wide_resnet":
            return HyperWideResNet(num_classes=num_classes, in_channels=in_channels, **options)
        if not library and name == "small_resnet":
            return SmallResNet(num_classes=num_classes, in_channels=in_channels, **options)
        if library == "torchvision":
            import torchvision

            return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
        if library == "timm":
            import timm

            return timm.create_model(name, num_classes=num_classes, in_chans=in_channels, **options)
    except ModuleNotFoundError:
        raise ImportError(f"train: model.name {model.name} needs {library}; pip install {library}") from None
    except (TypeError, RuntimeError, ValueError) as error:  # each library has its own for an unknown name or option
        raise ValueError(f"train: model {model.name} with options {model.options}: {error}") from None
    raise ValueError(
        "train: model.name must be wide_resnet, hyper_wide_resnet, small_resnet, torchvision:NAME or timm:NAME, "
        f"got {model.name!r}"
    )


@torch.no_grad()
def check_network(network: nn.Module, name: str, image_sizes: Sequence[int], num_classes: int) -> None:
    """Run a network once as in training, so that one that does not fit the data is refused before training begins.

    Args:
        network: on its device, in training mode; it is the same afterwards.
        name: model.name of the recipe.
        image_sizes: channels, height, width.
        num_classes: how many logits an image must get.

    Raises:
        ValueError: it fails on such images, or its answer is not one tensor of logits.
    """
    images = torch.zeros(2, *image_sizes, device=next(network.parameters()).device)
    shape = " × ".join(map(str, image_sizes))
    try:
        with buffers_kept(network), random_numbers_kept(network):
            answer = network(images)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # each network has its own
        raise ValueError(
            f"train: model.name {name} does not run on this data's images of {shape}: {error}; choose another network, "
            "or set its model.options"
        ) from error
    if not isinstance(answer, Tensor) or answer.shape != (2, num_classes):
        found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(
            f"train: model.name {name} must answer 2 images of {shape} with one tensor [2, {num_classes}], got "
            f"{found}; choose another network, or set its model.options"
        )


def build_language_model(model: Model, num_symbols: int) -> nn.Module:
    """Return a freshly initialized network that predicts the next of num_symbols symbols.

    Raises:
        ValueError: an unknown name, or options its constructor does not take.
    """
    if model.name != "char_lstm":
        raise ValueError(f"train: model.name must be char_lstm for a text, got {model.name!r}")
    options: dict[str, Any] = dict(model.options)
    try:
        return CharLSTM(num_symbols, **options)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"train: model {model.name} with options {model.options}: {error}") from None


def build_targets(names: Sequence[str]) -> tuple[str | Callable[[str, nn.Module], bool | str], ...]:
    """Return a recipe's late.targets as expand takes them: "rank1:NAME" gives gains to the module of that name."""
    return tuple(_rank1_at(name.removeprefix("rank1:")) if name.startswith("rank1:") else name for name in names)


def _rank1_at(wanted: str) -> Callable[[str, nn.Module], bool | str]:
    return lambda name, _: "rank1" if name == wanted else False


def build_optimizer(optimizer: Optimizer, model: nn.Module, *, skips_steps: bool) -> torch.optim.Optimizer:
    """Return the optimizer of a plain model's weights.

    Args:
        optimizer: which, and its options.
        model: plain.
        skips_steps: it shall be able to leave a step out, decided on the device: the fused implementations can.
    """
    no_weight_decay: Any = getattr(model, "no_weight_decay", set)  # timm's models have it, too
    exempt = no_weight_decay()
    groups = lp.param_groups(
        model, lr=optimizer.lr, weight_decay=optimizer.weight_decay, no_decay=lambda name, _: name in exempt
    )
    fused = True if skips_steps else None
    if optimizer.name == "adamw":
        return torch.optim.AdamW(groups, lr=optimizer.lr, fused=fused)
    return torch.optim.SGD(
        groups, lr=optimizer.lr, momentum=optimizer.momentum, nesterov=optimizer.nesterov, fused=fused
    )
