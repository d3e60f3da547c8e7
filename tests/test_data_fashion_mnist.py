"""Fashion-MNIST: read in the exact format of the published files."""

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from latephase_kernels.data import ArchiveError, fashion_mnist, load_fashion_mnist


@pytest.fixture
def files(monkeypatch):
    """Contents of the four files, by name; five training and three test images."""
    generator, contents = np.random.default_rng(0), {}
    for part, count in (("train", 5), ("t10k", 3)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(9, 9 - count, -1, dtype=np.uint8)
        contents[f"{part}-images-idx3-ubyte"] = struct.pack(">iiii", 2051, count, 28, 28) + images.tobytes()
        contents[f"{part}-labels-idx1-ubyte"] = struct.pack(">ii", 2049, count) + labels.tobytes()
    monkeypatch.setattr(fashion_mnist, "_NUM_TRAIN", 5)
    monkeypatch.setattr(fashion_mnist, "_NUM_TEST", 3)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(fashion_mnist, "_SHA256", digests)
    return contents


def write(folder, files, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_it_is_read_as_published(files, tmp_path, place, packed):
    write(tmp_path / place, files, packed)
    for train, part, count in ((True, "train", 5), (False, "t10k", 3)):
        data = load_fashion_mnist(tmp_path, train=train)
        pixels = np.frombuffer(files[f"{part}-images-idx3-ubyte"][16:], dtype=np.uint8).reshape(count, 1, 28, 28)
        assert np.array_equal(data.images.numpy(), pixels) and data.images.dtype == torch.uint8
        assert data.labels.tolist() == list(range(9, 9 - count, -1)) and data.labels.dtype == torch.int64
        assert len(data.classes) == 10 and data.classes[9] == "Ankle boot"


def test_torchvision_reads_the_same(files, tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    write(tmp_path / "FashionMNIST" / "raw", files, packed=False)
    theirs, ours = datasets.FashionMNIST(str(tmp_path)), load_fashion_mnist(tmp_path)
    assert torch.equal(theirs.data, ours.images[:, 0]) and torch.equal(theirs.targets, ours.labels)
    assert theirs.classes == list(ours.classes)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda content: content[:-1], "no IDX file of bytes"),
        (lambda content: content + b"0", "no IDX file of bytes"),
        (lambda content: b"1" + content[1:], "no IDX file of bytes"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged, or another data set"),
    ],
)
@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_what_is_damaged_is_named(files, tmp_path, name, damage, message):
    write(tmp_path, files | {name: damage(files[name])})
    with pytest.raises(ArchiveError, match=f"{name}.*{message}.*torchvision.datasets.FashionMNIST"):
        load_fashion_mnist(tmp_path, train=False)


def test_what_gzip_cannot_read_is_named(files, tmp_path):
    write(tmp_path, files)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArchiveError, match=f"{path.name} is damaged"):
        load_fashion_mnist(tmp_path)


def test_labels_are_within_the_classes(files, tmp_path):
    write(tmp_path, files | {"t10k-labels-idx1-ubyte": files["t10k-labels-idx1-ubyte"][:-1] + b"\n"})
    with pytest.raises(ArchiveError, match="the label 10, the largest is 9"):
        load_fashion_mnist(tmp_path, train=False, verify=False)


def test_what_is_missing_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path)
