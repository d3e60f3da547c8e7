"""Small image sets in the formats of large ones, for tests."""

import io
import tarfile

import numpy as np
from PIL import Image

CLASSES = 3


def jpeg(seed, width=50, height=40, **options):
    """An encoded image of smooth random colours; its content is told by the seed."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    file = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90, **options)
    return file.getvalue()


def sample(split, label, number):
    """The file of one image of the sets below."""
    return jpeg((split == "val", label, number), width=40 + 7 * number % 30, height=36 + 5 * label)


def write_folder(path):
    """FOLDER/SPLIT/CLASS/IMAGE.JPEG: 8 training images and 4 others of each class."""
    for split, count in (("train", 8), ("val", 4)):
        for label in range(CLASSES):
            folder = path / split / f"n{label:04d}"
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"n{label:04d}_{number}.JPEG").write_bytes(sample(split, label, number))
    return path


def write_shard(path, samples):
    """A tar file of (name, content)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(path, train=8, shards=2):
    """FOLDER/train-00000.tar, …, with the images of write_folder dealt out in turn; KEY.jpg, KEY.cls and KEY.json."""
    path.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", 4)):
        keys = [(label, number) for number in range(count) for label in range(CLASSES)]
        for shard in range(shards):
            members = []
            for label, number in keys[shard::shards]:
                key = f"{split}/n{label}.{number}".replace(".", "_")
                members += [(f"{key}.jpg", sample(split, label, number)), (f"{key}.cls", str(label).encode())]
                members += [(f"{key}.json", b"{}")]
            write_shard(path / f"{split}-{shard:05d}.tar", members)
    return path
