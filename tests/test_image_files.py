"""Folder trees and tar shards of images: what is read, and every way in which they can be wrong."""

import os

import numpy as np
import pytest

pytest.importorskip("PIL")
from image_sets import jpeg, sample, write_folder, write_shard, write_shards

from latephase_kernels.data import ArchiveError
from latephase_kernels.data.image_files import Names
from latephase_kernels.data.image_folder import ImageFolder
from latephase_kernels.data.image_shards import ImageShards, find_shards
from latephase_kernels.data.imagenet import load_imagenet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_a_folder(folder):
    train = ImageFolder(folder / "train")
    assert train.classes == ("n0000", "n0001", "n0002") and len(train) == 24
    assert train.labels.tolist() == [label for label in range(3) for _ in range(8)]
    for label in range(3):
        for number in range(8):
            assert train.read(8 * label + number) == sample("train", label, number)
            assert train.name(8 * label + number).endswith(f"train/n{label:04d}/n{label:04d}_{number}.JPEG")
    assert len(ImageFolder(folder / "val", train.classes)) == 12


def test_shards(shards):
    train = ImageShards(find_shards(shards, "train"))
    assert train.classes == ("0", "1", "2") and len(train) == 24
    expected = [(number, label) for number in range(8) for label in range(3)]
    for index, (number, label) in enumerate(expected[0::2] + expected[1::2]):
        assert train.labels[index] == label and train.read(index) == sample("train", label, number)
        assert train.name(index).endswith(f"train-{index // 12:05d}.tar, member 'train/n{label}_{number}.jpg'")
    val = ImageShards(find_shards(shards, "val"), num_classes=3, class_names=["a", "b", "c"])
    assert len(val) == 12 and val.classes == ("a", "b", "c")
    train.close()
    assert train.read(0) == sample("train", 0, 0)


def test_many_shards_are_indexed_by_several_processes(tmp_path):
    write_shards(tmp_path, train=10, shards=10)
    train = ImageShards(find_shards(tmp_path, "train"))
    assert sorted(train.read(index) for index in range(30)) == sorted(
        sample("train", label, number) for label in range(3) for number in range(10)
    )


def test_shards_in_folders_of_their_own(tmp_path):
    (tmp_path / "val").mkdir()
    write_shard(tmp_path / "val" / "000.tar", [("a.jpg", jpeg(1)), ("a.cls", b"0\n")])
    assert find_shards(tmp_path, "val") == [tmp_path / "val" / "000.tar"] and find_shards(tmp_path, "train") == []


def test_a_shard_of_either_split_is_refused(tmp_path):
    for name in ("carnival-train-0.tar", "carnival-val-0.tar"):
        write_shard(tmp_path / name, [("a.jpg", jpeg(1)), ("a.cls", b"0")])
    with pytest.raises(ArchiveError, match="carnival-train-0.tar has both train and val in its name; put the shards"):
        load_imagenet(tmp_path)


def test_names():
    texts = ["a", "", "ü/n01.JPEG", "a" * 300]
    names = Names(texts)
    assert len(names) == 4 and [names[index] for index in range(4)] == texts


def test_folders_that_are_wrong(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; expected are FOLDER/train/CLASS/IMAGE.JPEG"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(ArchiveError, match="holds no folders, one for each class"):
        ImageFolder(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(ArchiveError, match="x holds no image; add some, or remove the folder"):
        ImageFolder(tmp_path)
    (tmp_path / "x" / "notes.txt").write_text("no image")
    with pytest.raises(ArchiveError, match="x holds no image"):
        ImageFolder(tmp_path)
    (tmp_path / "x" / "one.Png").write_bytes(b"?")
    with pytest.warns(UserWarning, match="holds 1 files that are no images .*, x/notes.txt the first; they are left"):
        assert len(ImageFolder(tmp_path)) == 1
    with pytest.raises(ArchiveError, match="has 3 folders that are no class of the training images, n0000 the first"):
        ImageFolder(folder / "val", ["x"])
    with pytest.warns(UserWarning, match="has no images of 2 of the 5 classes, more the first"):
        val = ImageFolder(folder / "val", ["n0000", "more", "n0001", "n0002", "z"])
    assert set(val.labels.tolist()) == {0, 2, 3}


GOOD = [("a.jpg", jpeg(1)), ("a.cls", b"0"), ("b.jpg", jpeg(2)), ("b.cls", b"1")]


@pytest.mark.parametrize(
    "members, message",
    [
        ([*GOOD, ("c.jpg", jpeg(3))], "has 1 samples without class, 'c' the first"),
        ([*GOOD, ("c.cls", b"0")], "has 1 samples without image, 'c' the first"),
        ([*GOOD, ("c.jpg", jpeg(3)), ("c.cls", b"cat")], "member 'c.cls', is no class number: b'cat'"),
        ([*GOOD, ("c.jpg", jpeg(3)), ("c.cls", b"-1")], "member 'c.cls', is no class number"),
        ([*GOOD, ("c.jpg", jpeg(3)), ("c.cls", b"1" * 99)], "member 'c.cls', is no class number"),
        ([*GOOD, ("c.jpg", jpeg(3)), ("c.cls", b"1" * 40)], "member 'c.cls', is no class number"),
        ([*GOOD, ("c.jpg", jpeg(3)), ("c.cls", b"9" * 18)], "hold no image of 9+7 of 10+ classes, 2 the first"),
        ([("a.jpg", jpeg(1)), ("a.cls", b"1")], "hold no image of 1 of 2 classes, 0 the first"),
        ([*GOOD, ("c.jpg", jpeg(3)), ("c.cls", b"3")], "hold no image of 1 of 4 classes, 2 the first"),
        ([*GOOD, ("a.png", jpeg(3))], "member 'a.png', is a second image of the sample 'a'"),
        ([*GOOD, ("a.jpg", jpeg(3))], "member 'a.jpg', is there twice"),
        ([*GOOD, ("../c.jpg", jpeg(3))], "points outside of the archive"),
        ([("a.txt", b"x")], "holds no images; expected are"),
        ([], "holds no images"),
    ],
)
def test_shards_that_are_wrong(members, message, tmp_path):
    with pytest.raises(ArchiveError, match=message):
        ImageShards([write_shard(tmp_path / "train-0.tar", members)])


def test_labels_beyond_the_training_classes(tmp_path):
    path = write_shard(tmp_path / "val-0.tar", GOOD)
    with pytest.raises(ArchiveError, match=r"val-0.tar, member 'b.jpg' has class 1, there are 1"):
        ImageShards([path], num_classes=1)


def test_truncated_shards(shards, tmp_path):
    """Wherever a shard is cut, it is an error that names it; a member at a time would look like a smaller shard."""
    content = (shards / "train-00000.tar").read_bytes()
    path = tmp_path / "cut.tar"
    last = len(content.rstrip(b"\0"))  # what follows is the end mark, and padding
    for end in [0, 300, 512, 1024, 5000, *range(5120, last, 7 * 512), last, len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(ArchiveError, match="cut.tar"):
            ImageShards([path])
    path.write_bytes(content)
    train = ImageShards([path])
    os.truncate(path, 1024)
    with pytest.raises(ArchiveError, match="cut.tar, member .* is cut off [0-9]+ bytes early"):
        train.read(len(train) - 1)


def test_compressed_and_missing_shards(tmp_path):
    import gzip

    (tmp_path / "train.tar").write_bytes(gzip.compress(write_shard(tmp_path / "a.tar", GOOD).read_bytes()))
    with pytest.raises(ArchiveError, match="train.tar is compressed, .*gunzip"):
        ImageShards([tmp_path / "train.tar"])
    with pytest.raises(FileNotFoundError, match="gone.tar"):
        ImageShards([tmp_path / "gone.tar"])
    with pytest.raises(FileNotFoundError, match="there are no shards; expected are"):
        ImageShards([])


def test_a_label_is_counted_once(tmp_path):
    """Samples in any order of members."""
    shuffled = [GOOD[1], GOOD[2], GOOD[0], GOOD[3]]
    train = ImageShards([write_shard(tmp_path / "train-0.tar", shuffled)])
    assert {train.read(index): int(label) for index, label in enumerate(train.labels)} == {jpeg(1): 0, jpeg(2): 1}
    assert np.array_equal(np.sort(train.labels), [0, 1])
