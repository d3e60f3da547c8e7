"""ImageNet, or any images laid out as it: a folder tree or tar shards, told by what is there."""

from pathlib import Path

from . import image_folder, image_shards
from .files import ArchiveError
from .image_files import ImageFiles
from .image_folder import ImageFolder
from .image_shards import ImageShards, find_shards

_CLASS_NAMES = "classes.txt"  # beside shards, whose labels are numbers: one name a line


def load_imagenet(folder: str | Path) -> tuple[ImageFiles, ImageFiles]:
    """Return training and validation images; nothing but names, headers and labels is read.

    Args:
        folder: holds train/CLASS/IMAGE and val/CLASS/IMAGE, or shards of both splits; then, if there is a classes.txt,
            the classes' names.

    Raises:
        FileNotFoundError: a split is missing.
        ArchiveError: see ImageFolder and ImageShards; or both layouts are there; or a shard may be of either split.
        OSError: something cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; {image_folder.LAYOUT}; or {image_shards.LAYOUT}")
    shards = {split: find_shards(folder, split) for split in ("train", "val")}
    if not any(shards.values()):
        train = ImageFolder(folder / "train")
        return train, ImageFolder(folder / "val", train.classes)
    for split, found in shards.items():
        if not found:
            raise FileNotFoundError(f"{folder} has no shards of the split {split}; {image_shards.LAYOUT}")
        if any(entry.is_dir() for entry in (folder / split).glob("*")):
            raise ArchiveError(f"{folder / split} holds shards and class folders; keep one of them")
    both = set(shards["train"]) & set(shards["val"])
    if both:
        raise ArchiveError(
            f"{min(both)} has both train and val in its name; put the shards into the folders {folder / 'train'} "
            f"and {folder / 'val'}"
        )
    names = folder / _CLASS_NAMES
    class_names = names.read_text(encoding="utf-8").split("\n") if names.exists() else None
    class_names = [name.strip() for name in class_names if name.strip()] if class_names else None
    sharded = ImageShards(shards["train"], class_names=class_names)
    return sharded, ImageShards(shards["val"], num_classes=len(sharded.classes), class_names=sharded.classes)
