"""CIFAR-10 and CIFAR-100 in all four official forms, and files that only pretend to be CIFAR."""

import dataclasses
import hashlib
import io
import os
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch

from latephase_kernels.data import ArchiveError, cifar, load_cifar10, load_cifar100
from latephase_kernels.data.cifar import CIFAR10, CIFAR100, load_cifar
from latephase_kernels.data.cifar_pickle import read_cifar_pickle

# The official layouts with few images a file.
SMALL = {
    10: dataclasses.replace(CIFAR10, images_per_file=7, test_images=4),
    100: dataclasses.replace(CIFAR100, images_per_file=13, test_images=5),
}


class Python2Pickle:
    """Writes what Python 2's cPickle wrote for CIFAR (protocol 2): its byte strings have opcodes of their own."""

    def __init__(self):
        self.out, self.memo = io.BytesIO(b"\x80\x02"), 0
        self.out.seek(2)

    def put(self):
        if self.memo < 256:
            self.out.write(b"q" + bytes([self.memo]))
        else:
            self.out.write(b"r" + struct.pack("<I", self.memo))
        self.memo += 1

    def save(self, value):
        write = self.out.write
        if isinstance(value, dict):
            write(b"}")
            self.put()
            write(b"(")
            for key, entry in value.items():
                self.save(key)
                self.save(entry)
            write(b"u")
        elif isinstance(value, list):
            write(b"]")
            self.put()
            for start in range(0, len(value), 1000):
                write(b"(")
                for entry in value[start : start + 1000]:
                    self.save(entry)
                write(b"e")
        elif isinstance(value, str):
            content = value.encode("latin-1")
            write(b"U" + bytes([len(content)]) if len(content) < 256 else b"T" + struct.pack("<i", len(content)))
            write(content)
            self.put()
        elif isinstance(value, int):
            self.integer(value)
        else:
            self.array(value)

    def integer(self, value):
        if value < 256:
            self.out.write(b"K" + bytes([value]))
        else:
            self.out.write(b"M" + struct.pack("<H", value) if value < 65536 else b"J" + struct.pack("<i", value))

    def array(self, values):
        write = self.out.write
        for name in (b"numpy.core.multiarray\n_reconstruct\n", b"numpy\nndarray\n"):
            write(b"c" + name)
            self.put()
        write(b"K\x00\x85")
        self.put()
        self.save("b")
        write(b"\x87")
        self.put()
        write(b"R")
        self.put()
        write(b"(K\x01")
        for length in values.shape:
            self.integer(length)
        write(b"\x86")
        self.put()
        write(b"cnumpy\ndtype\n")
        self.put()
        self.save("u1")
        write(b"K\x00K\x01\x87")
        self.put()
        write(b"R")
        self.put()
        write(b"(K\x03")
        self.save("|")
        is_fortran = not values.flags.c_contiguous
        write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb" + (b"\x88" if is_fortran else b"\x89"))
        self.save(values.tobytes("A").decode("latin-1"))
        write(b"tb")

    @classmethod
    def dumps(cls, value):
        writer = cls()
        writer.save(value)
        return writer.out.getvalue() + b"."


def python3_pickle(protocol):
    return lambda value: pickle.dumps(value, protocol=protocol)


def make_data(layout):
    """Random images and labels of every file of a layout, whatever the form."""
    generator = np.random.default_rng(0)
    counts = {**dict.fromkeys(layout.train_files, layout.images_per_file), layout.test_file: layout.test_images}
    return {
        file: (
            generator.integers(0, 256, (count, 3072), dtype=np.uint8),
            generator.integers(0, layout.num_classes, count),
        )
        for file, count in counts.items()
    }


def names_of(layout):
    return [f"class_{index}" for index in range(layout.num_classes)]


def python_files(layout, data):
    """As in cifar-*-python.tar.gz: the entries and their order are those of the official files."""
    files, dumps = {}, Python2Pickle.dumps
    for file, (images, labels) in data.items():
        labels = labels.tolist()
        file_names = [f"image_s_{index:06}.png" for index in range(len(labels))]
        if layout.num_classes == 10:
            content = {"batch_label": "training batch 1 of 5", "labels": labels, "data": images}
            files[file] = dumps({**content, "filenames": file_names})
        else:
            content = {"filenames": file_names, "batch_label": "training batch 1 of 1", "fine_labels": labels}
            files[file] = dumps({**content, "coarse_labels": [label // 5 for label in labels], "data": images})
    meta = {layout.names[1]: names_of(layout)}
    if layout.num_classes == 10:
        meta = {"num_cases_per_batch": 10000, **meta, "num_vis": 3072}
    files[layout.names[0]] = dumps(meta)
    return files


def binary_files(layout, data):
    """As in cifar-*-binary.tar.gz: label byte or coarse and fine label, then red, green and blue planes."""
    files = {}
    for file, (images, labels) in data.items():
        label_bytes = np.stack([labels // 5, labels], axis=1).astype(np.uint8)[:, 2 - layout.label_bytes :]
        files[f"{file}.bin"] = np.concatenate([label_bytes, images], axis=1).tobytes()
    files[layout.names[2]] = ("\n".join(names_of(layout)) + "\n\n").encode()
    return files


def write_tar(path, folder, files):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        directory = tarfile.TarInfo(folder)
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_form(layout, form, packed, place, data):
    files = (python_files if form == "python" else binary_files)(layout, data)
    index = 0 if form == "python" else 1
    if packed:
        return write_tar(place / f"{layout.downloads[index]}.tar.gz", layout.folders[index], files)
    folder = place / layout.folders[index]
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
@pytest.mark.parametrize("form", ["python", "binary"])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_every_official_form_gives_the_same_set(num_classes, form, packed, tmp_path):
    layout = SMALL[num_classes]
    data = make_data(layout)
    source = write_form(layout, form, packed, tmp_path, data)
    for train, files in ((True, layout.train_files), (False, (layout.test_file,))):
        images = np.concatenate([data[file][0] for file in files]).reshape(-1, 3, 32, 32)
        labels = np.concatenate([data[file][1] for file in files])
        for path in (tmp_path, str(source)):
            loaded = load_cifar(path, layout, train=train, verify=False)
            assert loaded.images.dtype == torch.uint8 and np.array_equal(loaded.images.numpy(), images)
            assert loaded.labels.dtype == torch.int64 and np.array_equal(loaded.labels.numpy(), labels)
            assert loaded.classes == tuple(names_of(layout)) and len(loaded) == len(labels)


def test_pixels_and_constants_are_where_the_documentation_says(tmp_path):
    # "The first 1024 entries contain the red channel values, the next 1024 the green …, in row-major order".
    layout = dataclasses.replace(SMALL[10], test_images=1)
    data = make_data(layout)
    pixels = np.zeros(3072, dtype=np.uint8)
    pixels[[31, 1024 + 32, 2048 + 33]] = 1, 2, 3
    data["test_batch"] = (pixels[None], np.array([9]))
    loaded = load_cifar(write_form(layout, "binary", False, tmp_path, data), layout, train=False)
    assert loaded.images.nonzero().tolist() == [[0, 0, 0, 31], [0, 1, 1, 0], [0, 2, 1, 1]]
    # The constants of the paper's recipes.
    assert loaded.mean == (0.4914, 0.4822, 0.4465) and loaded.std == (0.2023, 0.1994, 0.2010)
    assert CIFAR100.mean == (0.5071, 0.4867, 0.4408) and CIFAR100.std == (0.2675, 0.2565, 0.2761)


def test_official_sizes(tmp_path):
    layout = dataclasses.replace(CIFAR10, train_files=())
    folder = write_form(layout, "binary", False, tmp_path, make_data(layout))
    assert (folder / "test_batch.bin").stat().st_size == 30_730_000  # as published
    assert load_cifar10(tmp_path, train=False).images.shape == (10_000, 3, 32, 32)
    with pytest.raises(ValueError, match=r"lacks data_batch_1.bin, .*data_batch_5.bin; get CIFAR-10 again"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize(("load", "layout"), [(load_cifar10, CIFAR10), (load_cifar100, CIFAR100)])
@pytest.mark.parametrize("form", [0, 1])
def test_an_archive_that_is_not_the_published_one_is_refused_before_it_is_opened(load, layout, form, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"holds none of them; get one with .*{layout.downloads[1]}"):
        load(tmp_path)
    archive = tmp_path / f"{layout.downloads[form]}.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(ArchiveError, match=r"has 14 bytes, expected 1[67]\d{7}; delete it and get it again"):
        load(tmp_path)


def test_the_digest_decides(tmp_path, monkeypatch):
    layout = SMALL[10]
    archive = write_form(layout, "binary", True, tmp_path, make_data(layout))
    content = archive.read_bytes()
    published = dataclasses.replace(cifar.DOWNLOADS["cifar-10-binary"], size=len(content))
    for digest, fits in ((hashlib.md5(content).hexdigest(), True), (published.digest, False)):
        entry = dataclasses.replace(published, digest=digest)
        monkeypatch.setitem(cifar.DOWNLOADS, "cifar-10-binary", entry)
        if fits:
            assert len(load_cifar(archive, layout)) == 35
        else:
            with pytest.raises(ArchiveError, match="its md5 is .*expected c32a1d4ab5d03f1284b67883e8d87530"):
                load_cifar(archive, layout)


def change_labels(files, name, value):
    """Rewrite the first label of a binary file."""
    content = bytearray(files[name])
    content[0] = value
    return {**files, name: bytes(content)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda files: change_labels(files, "test_batch.bin", 10),
            "test_batch.bin', has the label 10, the largest is 9",
        ),
        (lambda files: {**files, "test_batch.bin": files["test_batch.bin"][:-1]}, "no multiple of the 3073"),
        (
            lambda files: {**files, "test_batch.bin": files["test_batch.bin"][:-3073]},
            "3 images and 3 labels, expected 4",
        ),
        (lambda files: {**files, "batches.meta.txt": b"cat\ndog\n"}, "has 2 names of classes, expected 10"),
        (lambda files: {**files, "batches.meta.txt": b"cat\n" * 10}, "names of classes, expected 10"),
        (lambda files: {n: c for n, c in files.items() if n != "test_batch.bin"}, "lacks test_batch.bin"),
        (lambda files: {**files, "copy/test_batch.bin": files["test_batch.bin"]}, "is a second test_batch.bin"),
    ],
)
def test_wrong_binary_files_are_named(change, message, tmp_path):
    layout = SMALL[10]
    files = change(binary_files(layout, make_data(layout)))
    files = {"batches.meta.txt": files.pop("batches.meta.txt"), **files}
    path = write_tar(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-batches-bin", files)
    with pytest.raises(ValueError, match=message):
        load_cifar(path, dataclasses.replace(layout, names=("", "", "batches.meta.txt")), train=False, verify=False)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"labels": [0, 1, 2, 10]}, "has the label 10, the largest is 9"),
        ({"labels": [0, 1, 2, -1]}, "has no labels from 0 to 9"),
        ({"labels": [0, 1, 2, "3"]}, "has no labels from 0 to 9"),
        ({"labels": [0, 1, 2]}, "has 4 images and 3 labels, expected 4"),
        ({"labels": None}, "has no labels"),
        ({"data": np.zeros((4, 3071), np.uint8)}, "has no images of 3072 bytes"),
        ({"data": np.zeros((5, 3072), np.uint8), "labels": [0] * 5}, "has 5 images and 5 labels, expected 4"),
        ({"data": [1, 2]}, "has no images"),
        ({"data": np.zeros((4, 3072), np.int8)}, "cannot be used: not a pickle as CIFAR's files are"),
        ({"data": np.zeros((4, 3072), np.float32)}, "cannot be used: not a pickle as CIFAR's files are"),
    ],
)
def test_wrong_python_files_are_named(entries, message, tmp_path):
    layout = SMALL[10]
    files = python_files(layout, make_data(layout))
    content = {"labels": [0] * 4, "data": np.zeros((4, 3072), np.uint8), **entries}
    files["test_batch"] = pickle.dumps(content, protocol=2)
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)
    with pytest.raises(ValueError, match=f"cifar-10-python.tar.gz, member '.*test_batch', {message}"):
        load_cifar(path, layout, train=False, verify=False)


def test_the_pickles_made_here_are_of_the_official_size():
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {"num_cases_per_batch": 10000, "label_names": names, "num_vis": 3072}
    assert len(Python2Pickle.dumps(meta)) == 158  # bytes of the official batches.meta


@pytest.mark.parametrize("dumps", [Python2Pickle.dumps, *map(python3_pickle, (2, 3, 4))])
def test_the_pickle_reader_agrees_with_pickle(dumps):
    generator = np.random.default_rng(0)
    content = {
        "batch_label": "testing batch 1 of 1",
        "labels": generator.integers(
            0, 100_000, 3000
        ).tolist(),  # one, two and four bytes; more than one batch of items
        "data": generator.integers(0, 256, (2, 3072), dtype=np.uint8),  # longer than a short string can be
        "empty": [],
        "columns": np.asfortranarray(generator.integers(0, 256, (3, 5), dtype=np.uint8)),
        "filenames": [f"image_{index}.png" for index in range(400)],
    }
    pickled = dumps(content)
    reference = pickle.loads(pickled, encoding="latin1")  # both were made here
    result = read_cifar_pickle(pickled)
    assert set(result) == set(reference) == set(content)
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            assert result[key].dtype == np.uint8 and np.array_equal(result[key], value)
            assert np.array_equal(reference[key], value)
        else:
            assert result[key] == reference[key] == value


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, __import__, bytearray, np.frombuffer, np.load])
def test_calls_of_functions_do_not_happen(function, protocol, tmp_path):
    marker = tmp_path / "marker"
    argument = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    pickled = pickle.dumps({"data": Call(function, argument)}, protocol=protocol)
    with pytest.raises(ValueError, match="not a pickle as CIFAR's files are"):
        read_cifar_pickle(pickled)
    assert not marker.exists()
    if function is os.system and protocol == 2:  # the test itself can fail: the standard machine does call it
        pickle.loads(pickled)
        assert marker.exists()


def nested(depth):
    """Tuples that hold the one before twice: 2^depth leaves, a few bytes a level."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))


@pytest.mark.parametrize(
    "pickled",
    [
        b"",
        b".",
        b"\x80\x02}",  # no end
        b"\x80\x02]q\x00.",  # no dict
        b"\x80\x02}}.",
        b"\x80\x02}q\x00e.",  # no mark
        b"\x80\x02}(U\x01au.",  # a key without a value
        b"\x80\x02}h\x05.",  # nothing remembered
        b"\x80\x02\x87.",
        b"\x80\x02}K\x01K\x02s.",  # a key that is no string
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
        b"\x80\x04}}\x93.",  # STACK_GLOBAL of two dicts
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf16\x86R.",
        b"\x80\x02T\xff\xff\xff\x7fabc.",  # claims to have 2 GiB
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc.",  # 2^63 − 1 bytes
        b"\x80\x04\x8d" + b"\xff" * 8 + b"abc.",
        b"\x80\x02]r\xff\xff\xff\xff.",  # remembered at place 2^32 − 1: a list as long as that elsewhere
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02" + b"]" * (1 << 21) + b".",  # 56 bytes of memory for each byte here
        nested(200) + b"}R.",
        b"\x80\x02}" + nested(200)[2:] + b"K\x00s.",  # as a key its hash would take for ever
        nested(200) + b"}\x93.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n" + nested(200)[2:] + b"R.",
    ],
)
def test_malformed_and_hostile_pickles_end_in_an_error(pickled):
    with pytest.raises(ValueError, match="not a pickle as CIFAR's files are"):
        read_cifar_pickle(pickled)


MEGABYTE = struct.pack("<I", 1 << 20) + bytes(1 << 20)
EMPTY_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
BYTE_TYPE = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
BUILD_MEGABYTE = b"(K\x01J\x00\x00\x10\x00K\x01\x86h\x01\x89h\x00tb"


@pytest.mark.parametrize(
    "pickled",
    [
        # One string of a megabyte, remembered, and turned into bytes a hundred times: as keys, by a codec, as arrays.
        b"\x80\x02T" + MEGABYTE + b"q\x00}(" + b"h\x00K\x01" * 100 + b"u.",
        b"\x80\x03B" + MEGABYTE + b"q\x00}(" + b"h\x00K\x01" * 100 + b"u.",
        b"\x80\x02X" + MEGABYTE + b"q\x00}(" + b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R" * 100 + b"t.",
        b"\x80\x02T" + MEGABYTE + b"q\x00" + BYTE_TYPE + b"q\x01" + (EMPTY_ARRAY + BUILD_MEGABYTE) * 100 + b".",
    ],
)
def test_short_files_do_not_become_long_in_memory(pickled):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="not a pickle .*: it uses the same bytes again and again"):
            read_cifar_pickle(pickled)
        assert tracemalloc.get_traced_memory()[1] < 12 * len(pickled)
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:.*escape sequence:DeprecationWarning")
def test_every_truncation_and_many_damages_end_in_an_error_or_a_dict():
    pickled = Python2Pickle.dumps({"labels": [1, 300], "data": np.zeros((1, 4), np.uint8), "filenames": ["a"]})
    for length in range(len(pickled)):
        with pytest.raises(ValueError, match="not a pickle"):
            read_cifar_pickle(pickled[:length])
    generator = np.random.default_rng(0)
    for _ in range(3000):
        damaged = bytearray(pickled)
        damaged[generator.integers(len(pickled))] = generator.integers(256)
        try:
            assert isinstance(read_cifar_pickle(bytes(damaged)), dict)
        except ValueError as error:
            assert "not a pickle" in str(error)
