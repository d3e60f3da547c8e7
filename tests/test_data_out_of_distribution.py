"""SVHN, LSUN and Tiny-ImageNet (resized), CIFAR-C: read in the exact formats of the published files."""

import dataclasses
import hashlib
import io
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from latephase_kernels.data import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    ArchiveError,
    cifar_corrupted,
    load_cifar10_c,
    load_cifar100_c,
    load_lsun_resized,
    load_svhn,
    load_tiny_imagenet_resized,
    resized_images,
    svhn,
)

# ---- SVHN: MATLAB files of version 5, byte by byte as MathWorks' "MAT-File Format" describes them


def element(kind, data):
    if len(data) <= 4:
        return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def matrix(name, values, array_class, number_kind, flags=0):
    content = element(6, struct.pack("<II", array_class | flags, 0))
    content += element(5, struct.pack(f"<{values.ndim}i", *values.shape))
    content += element(1, name.encode())
    return element(14, content + element(number_kind, values.tobytes(order="F")))


def compressed(content):
    data = zlib.compress(content, 1)
    return struct.pack("<II", 15, len(data)) + data  # not padded


def mat_file(*elements):
    return (
        b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(124, b" ")
        + struct.pack("<H", 0x0100)
        + b"IM"
        + b"".join(elements)
    )


@pytest.fixture
def house_numbers(monkeypatch):
    monkeypatch.setattr(svhn, "_NUM_TEST_IMAGES", 7)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
    return images, np.array([[1], [10], [3], [9], [2], [10], [5]])


@pytest.mark.parametrize("wrap", [compressed, lambda content: content])
@pytest.mark.parametrize(("number_type", "number_kind"), [("u1", 2), ("<f8", 9), ("<i2", 3)])
def test_svhn_is_read_as_published(number_type, number_kind, wrap, house_numbers, tmp_path):
    images, numbers = house_numbers
    other = compressed(element(14, element(6, struct.pack("<II", 1, 0)) + element(5, bytes(8)) + element(1, b"cell")))
    content = mat_file(
        wrap(matrix("X", images, 9, 2)), other, wrap(matrix("y", numbers.astype(number_type), 6, number_kind))
    )
    (tmp_path / "test_32x32.mat").write_bytes(content)
    for path in (tmp_path, str(tmp_path / "test_32x32.mat")):
        data = load_svhn(path, verify=False)
        for index in range(7):  # X(row, column, colour, image)
            assert np.array_equal(data.images[index].numpy(), np.moveaxis(images[..., index], 2, 0))
        assert data.labels.tolist() == [1, 0, 3, 9, 2, 0, 5] and data.labels.dtype == torch.int64
        assert data.images.is_contiguous() and data.classes[0] == "0" and data.mean is None


def test_wrong_svhn_files_are_named(house_numbers, tmp_path):
    path = tmp_path / "test_32x32.mat"
    with pytest.raises(FileNotFoundError, match=r'get it with .*download\("svhn-test", folder\)'):
        load_svhn(tmp_path)
    images, numbers = house_numbers
    pixels, labels = matrix("X", images, 9, 2), matrix("y", numbers.astype("u1"), 6, 2)
    bomb = zlib.compress(bytes((1 << 27) + 1), 1)
    for content, message in (
        (b"", "no MATLAB file of version 5"),
        (b"MATLAB 7.3 MAT-file".ljust(126) + b"IM", "no MATLAB file of version 5"),
        (mat_file(pixels), "has no labels y"),
        (mat_file(labels), "has no images X"),
        (mat_file(pixels, matrix("y", numbers.astype("u1") + 1, 6, 2)), "has no labels y from 1 to 10"),
        (mat_file(pixels, matrix("y", numbers[:6].astype("u1"), 6, 2)), "has no labels y"),
        (mat_file(pixels, matrix("y", numbers + 0.5, 6, 9)), "has no labels y"),
        (mat_file(matrix("X", images[:31], 9, 2), labels), "has no images X"),
        (mat_file(matrix("X", images, 9, 2, flags=0x800), labels), "has no images X"),
        (mat_file(pixels, labels)[:20_000], "longer than what holds it"),
        (mat_file(pixels, compressed(labels))[:-9], "longer than what holds it"),
        (mat_file(compressed(labels)[:-20] + bytes(20)), "cannot be read as SVHN's file"),
        (mat_file(struct.pack("<II", 15, len(bomb)) + bomb), "cut off, or has more than 134217728 bytes"),
        (mat_file(struct.pack("<II", 14, 1 << 31)), "longer than what holds it"),
        (
            mat_file(element(14, element(6, bytes(8)) + element(5, struct.pack("<ii", 99, -9)) + element(1, b"X"))),
            "no images X",
        ),
        (mat_file(element(14, b"")), "cannot be read as SVHN's file"),
        (mat_file(struct.pack("<HH", 14, 9) + bytes(4)), "longer than what holds it"),
    ):
        path.write_bytes(content)
        with pytest.raises(ArchiveError, match=f"test_32x32.mat .*{message}"):
            load_svhn(path, verify=False)
    with pytest.raises(ArchiveError, match="expected 64275384; delete it"):
        load_svhn(path)


# ---- LSUN and Tiny-ImageNet (resized): folders of pictures


def picture_bytes(values, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr(resized_images, "_NUM_IMAGES", 4)
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("load", "folder"), [(load_lsun_resized, "LSUN_resize"), (load_tiny_imagenet_resized, "Imagenet_resize")]
)
@pytest.mark.parametrize("packed", [True, False])
def test_folders_of_pictures_are_read_sorted_by_name(load, folder, packed, pictures, tmp_path, monkeypatch):
    grey = pictures[3, :, :, 0]
    files = {f"{folder}/{folder}/{name}.png": picture_bytes(pictures[name]) for name in (2, 0, 1)}
    files[f"{folder}/{folder}/3.jpg"] = picture_bytes(grey, "JPEG")
    files |= {f"{folder}/{folder}/._1.png": b"\0\5\x16\7", f"{folder}/.DS_Store": b"Bud1"}  # as macOS packs them
    if packed:
        path = write_tar(tmp_path / f"{folder}.tar.gz", files)
        with pytest.raises(ArchiveError, match="its md5 is"):
            load(tmp_path)
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        constant = "_LSUN" if folder.startswith("LSUN") else "_TINY_IMAGENET"
        monkeypatch.setattr(resized_images, constant, dataclasses.replace(getattr(resized_images, constant), md5=md5))
    else:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    data = load(tmp_path)
    assert np.array_equal(data.images[:3].numpy(), pictures[:3].transpose(0, 3, 1, 2))
    decoded = np.asarray(Image.open(io.BytesIO(picture_bytes(grey, "JPEG"))))
    assert all(np.array_equal(channel.numpy(), decoded) for channel in data.images[3])  # red = green = blue
    assert data.labels.tolist() == [-1] * 4 and data.labels.dtype == torch.int64 and data.classes == ()


def test_wrong_pictures_are_named(pictures, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"facebookresearch/odin links to LSUN_resize.tar.gz: put it into that folder"
    ):
        load_lsun_resized(tmp_path)
    good = [picture_bytes(picture) for picture in pictures]
    huge = picture_bytes(np.zeros((5000, 5000), dtype=np.uint8))  # 25 MB of pixels, 30 kB of file: never decoded
    for content, message in (
        (huge, "has 5000 × 5000 pixels, expected 32 × 32"),
        (good[0][:-900], "is no PNG picture or damaged"),
        (picture_bytes(pictures[0], "JPEG"), "is no PNG picture or damaged"),  # no format but the one of its name
        (b"", "is no PNG picture or damaged"),
    ):
        files = {f"{index}.png": picture for index, picture in enumerate([*good[:3], content])}
        write_tar(tmp_path / "LSUN_resize.tar.gz", files)
        with pytest.raises(ArchiveError, match=f"LSUN_resize.tar.gz, member '3.png', {message}"):
            load_lsun_resized(tmp_path, verify=False)
    write_tar(tmp_path / "LSUN_resize.tar.gz", {"0.png": good[0]})
    with pytest.raises(ArchiveError, match="holds 1 pictures, expected 4"):
        load_lsun_resized(tmp_path, verify=False)


# ---- CIFAR-C: arrays in a tar


def array_bytes(values, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, values, **options)
    return buffer.getvalue()


@pytest.fixture
def corrupted(monkeypatch):
    monkeypatch.setattr(cifar_corrupted, "_NUM_IMAGES", 3)
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (15, 32, 32, 3), dtype=np.uint8), np.tile(np.array([3, 9, 0], dtype=np.uint8), 5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("load", "name"), [(load_cifar10_c, "CIFAR-10-C"), (load_cifar100_c, "CIFAR-100-C")])
def test_cifar_c_is_read_severity_by_severity(load, name, packed, corrupted, tmp_path):
    images, labels = corrupted
    kinds = ("fog", "frost", "spatter")
    files = {f"{name}/{kind}.npy": array_bytes(images + index) for index, kind in enumerate(kinds)}
    files[f"{name}/labels.npy"] = array_bytes(labels)
    if packed:
        write_tar(tmp_path / f"{name}.tar", files, "w")
        with pytest.raises(ArchiveError, match=r"expected 29184\d{5}"):
            load(tmp_path, "fog", 1, verify=True)
    else:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / file).write_bytes(content)
    for severity in range(1, 6):
        for index, kind in enumerate(kinds):
            data = load(tmp_path, kind, severity)
            rows = slice(3 * severity - 3, 3 * severity)
            assert np.array_equal(data.images.numpy(), (images + index)[rows].transpose(0, 3, 1, 2))
            assert data.labels.tolist() == [3, 9, 0] and data.labels.dtype == torch.int64
    assert data.mean == ((0.4914, 0.4822, 0.4465) if name == "CIFAR-10-C" else (0.5071, 0.4867, 0.4408))
    with pytest.raises(ArchiveError, match=r"lacks snow.npy; get it again"):
        load(tmp_path, "snow", 1)


class Marker:
    """An object whose pickle makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_wrong_cifar_c_files_are_named_and_not_executed(corrupted, tmp_path):
    assert len(CORRUPTIONS) == 15 and len({*CORRUPTIONS, *EXTRA_CORRUPTIONS}) == 19
    for arguments, message in (
        (("rain", 1), "corruption must be one of"),
        (("fog", 6), "severity must be from 1 to 5"),
    ):
        with pytest.raises(ValueError, match=message):
            load_cifar10_c(tmp_path, *arguments)
    with pytest.raises(FileNotFoundError, match="cifar-10-c"):
        load_cifar10_c(tmp_path, "fog", 1)
    images, labels = corrupted
    marker = tmp_path / "marker"
    objects = np.array([Marker(marker)], dtype=object)
    good = array_bytes(images)
    for content, message in (
        (array_bytes(objects, allow_pickle=True), "holds object of shape"),
        (array_bytes(images[:14]), r"holds uint8 of shape \(14, 32, 32, 3\), expected uint8 \(15, 32, 32, 3\)"),
        (array_bytes(images.astype(np.int8)), "holds int8"),
        (array_bytes(np.asfortranarray(images)), "holds uint8"),
        (array_bytes(images, version=(2, 0)), "is no .npy file as CIFAR-C has"),
        (good[:-1], "ends 1 bytes early|is cut off"),
        (good.replace(b"{", b"open(", 1), "is no .npy file"),
        (b"PK", "ends .* bytes early"),
    ):
        files = {"CIFAR-10-C/fog.npy": content, "CIFAR-10-C/labels.npy": array_bytes(labels)}
        write_tar(tmp_path / "CIFAR-10-C.tar", files, "w")
        with pytest.raises(ArchiveError, match=f"CIFAR-10-C.tar, member 'CIFAR-10-C/fog.npy', {message}"):
            load_cifar10_c(tmp_path, "fog", 5)
    assert not marker.exists()
    write_tar(tmp_path / "CIFAR-10-C.tar", {"fog.npy": good, "labels.npy": array_bytes(labels + 1)}, "w")
    with pytest.raises(ArchiveError, match="has labels above 9"):
        load_cifar10_c(tmp_path, "fog", 1)
